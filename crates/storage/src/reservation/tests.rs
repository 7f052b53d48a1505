//! Operations against the model of the standard: tables, and the promises under random orders.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::device::{DeviceError, ReservationDevice};
use super::plan::{Here, Next, Older, Role, Wish, decide};
use super::*;

const TAG: ClusterTag = ClusterTag::new(0xabc);
const STRANGER: u64 = 0xbad0_0000_0000_0001;

fn key(host: u64, epoch: u64) -> ReservationKey {
    ReservationKey::new(TAG, host, epoch).unwrap()
}

fn until() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn wish(mine: ReservationKey, role: Role, older: Older) -> Wish {
    Wish {
        mine,
        role,
        older,
        beside: None,
        spent: 0,
        past_cut: false,
        busy: false,
        strangers: Strangers::Refuse,
    }
}

fn acquire(lun: &FakeLun, nexus: u32, mine: ReservationKey) -> Result<Outcome, ReservationError> {
    let wish = wish(mine, Role::Owner, Older::Refuse);
    fulfil(&lun.nexus(nexus), &wish, until())
}

fn register(lun: &FakeLun, nexus: u32, mine: ReservationKey) -> Result<Outcome, ReservationError> {
    let wish = wish(mine, Role::Beside, Older::Refuse);
    fulfil(&lun.nexus(nexus), &wish, until())
}

fn hand_over(lun: &FakeLun, nexus: u32, mine: ReservationKey) -> Result<Outcome, ReservationError> {
    let wish = wish(mine, Role::Owner, Older::Preempt);
    fulfil(&lun.nexus(nexus), &wish, until())
}

fn take_over(lun: &FakeLun, nexus: u32, mine: ReservationKey) -> Result<Outcome, ReservationError> {
    let wish = wish(mine, Role::Owner, Older::PreemptAndAbort);
    fulfil(&lun.nexus(nexus), &wish, until())
}

fn release(lun: &FakeLun, nexus: u32, mine: ReservationKey) -> Result<Outcome, ReservationError> {
    let wish = wish(mine, Role::Nobody, Older::Refuse);
    fulfil(&lun.nexus(nexus), &wish, until())
}

fn refusal(result: Result<Outcome, ReservationError>) -> Refusal {
    result.unwrap_err().refusal().unwrap().clone()
}

#[test]
fn the_life_of_a_disk() {
    let lun = FakeLun::new();
    let (one, two, three) = (key(1, 1), key(2, 2), key(3, 3));
    assert!(acquire(&lun, 1, one).unwrap().after.only_writer(one));
    assert!(lun.may_write(1) && !lun.may_write(2));

    // A live migration: both may write, then only the target.
    register(&lun, 2, two).unwrap();
    assert!(lun.may_write(1) && lun.may_write(2));
    let outcome = hand_over(&lun, 2, two).unwrap();
    assert_eq!(outcome.cut(), vec![one.raw()]);
    assert_eq!(
        outcome.commands,
        vec![Command::Preempt {
            key: two.raw(),
            victim: one.raw(),
            abort: false
        }],
        "one command at the pause"
    );
    assert!(!lun.may_write(1) && lun.may_write(2));

    // The owner fails: a third host takes over.
    assert_eq!(
        refusal(acquire(&lun, 3, three)),
        Refusal::OlderOwner { owner: two }
    );
    let outcome = take_over(&lun, 3, three).unwrap();
    assert!(outcome.after.only_writer(three));
    assert!(matches!(
        outcome.commands.last(),
        Some(Command::Preempt { abort: true, .. })
    ));
    assert!(!lun.may_write(2));
    for late in [
        register(&lun, 2, two),
        acquire(&lun, 2, two),
        take_over(&lun, 1, one),
    ] {
        assert!(matches!(refusal(late), Refusal::Superseded { by, .. } if by == three));
    }
    assert!(release(&lun, 3, three).unwrap().after.keys.is_empty());
    assert!(!lun.is_reserved());
}

#[test]
fn every_operation_may_be_repeated() {
    let lun = FakeLun::new();
    let (one, two) = (key(1, 1), key(2, 2));
    for _ in 0..3 {
        assert!(acquire(&lun, 1, one).unwrap().after.only_writer(one));
    }
    for _ in 0..3 {
        assert_eq!(register(&lun, 2, two).unwrap().after.keys.len(), 2);
    }
    for _ in 0..3 {
        assert!(hand_over(&lun, 2, two).unwrap().after.only_writer(two));
    }
    for _ in 0..3 {
        assert!(take_over(&lun, 2, two).unwrap().after.only_writer(two));
    }
    for _ in 0..3 {
        assert!(release(&lun, 2, two).unwrap().after.keys.is_empty());
        assert!(release(&lun, 1, one).unwrap().after.keys.is_empty());
    }
}

#[test]
fn a_failed_migration_leaves_the_source_alone() {
    let lun = FakeLun::new();
    acquire(&lun, 1, key(1, 1)).unwrap();
    register(&lun, 2, key(2, 2)).unwrap();
    release(&lun, 2, key(2, 2)).unwrap();
    assert!(lun.may_write(1) && !lun.may_write(2));
}

#[test]
fn a_late_release_does_not_end_a_newer_registration() {
    let lun = FakeLun::new();
    acquire(&lun, 1, key(1, 1)).unwrap();
    acquire(&lun, 1, key(1, 2)).unwrap();
    release(&lun, 1, key(1, 1)).unwrap();
    assert!(lun.may_write(1) && lun.is_reserved());
}

#[test]
fn a_former_life_of_the_same_host_is_removed() {
    let lun = FakeLun::new();
    acquire(&lun, 1, key(1, 1)).unwrap();
    // After a reboot the session is another one: nexus 9.
    let after = acquire(&lun, 9, key(1, 2)).unwrap().after;
    assert!(after.only_writer(key(1, 2)));
    assert!(!lun.may_write(1));
}

#[test]
fn a_stranger_is_refused_and_forced_out() {
    for kind in [
        ReservationType::WriteExclusive,
        ReservationType::WriteExclusiveRegistrantsOnly,
        ReservationType::WriteExclusiveAllRegistrants,
        ReservationType::ExclusiveAccessAllRegistrants,
    ] {
        let lun = FakeLun::new();
        lun.put_key(7, STRANGER);
        lun.put_reservation(7, kind);
        let before = lun.nexus(1).read_keys().unwrap();
        for result in [
            acquire(&lun, 1, key(1, 1)),
            register(&lun, 1, key(1, 1)),
            take_over(&lun, 1, key(1, 1)),
        ] {
            let refusal = refusal(result);
            assert!(
                matches!(&refusal, Refusal::Foreign { keys, holds: Some(_) } if keys == &[STRANGER]),
                "{refusal}"
            );
            assert!(refusal.to_string().contains("--force"), "{refusal}");
        }
        assert_eq!(lun.nexus(1).read_keys().unwrap(), before, "nothing changed");

        let mut forced = wish(key(1, 1), Role::Owner, Older::Refuse);
        forced.strangers = Strangers::All;
        let outcome = fulfil(&lun.nexus(1), &forced, until()).unwrap();
        assert!(outcome.after.only_writer(key(1, 1)), "{kind}: {outcome:?}");
        assert!(!lun.may_write(7));
    }
}

#[test]
fn a_stranger_that_is_only_registered_is_refused_too() {
    let lun = FakeLun::new();
    lun.put_key(7, STRANGER);
    assert!(matches!(
        refusal(acquire(&lun, 1, key(1, 1))),
        Refusal::Foreign { holds: None, .. }
    ));
}

#[test]
fn registrations_come_back_after_a_restart() {
    let lun = FakeLun::new();
    lun.cannot_persist();
    let (one, two) = (key(1, 1), key(2, 2));
    acquire(&lun, 1, one).unwrap();
    register(&lun, 2, two).unwrap();
    lun.restart();
    assert!(lun.may_write(7), "anybody may, now");
    register(&lun, 2, two).unwrap();
    let mut repair = wish(one, Role::Owner, Older::PreemptAndAbort);
    assert!(matches!(
        fulfil(&lun.nexus(1), &repair, until())
            .unwrap_err()
            .refusal(),
        Some(Refusal::Superseded { .. })
    ));
    repair.beside = Some(two);
    fulfil(&lun.nexus(1), &repair, until()).unwrap();
    assert!(lun.may_write(1) && lun.may_write(2) && !lun.may_write(7));
    // Once it has switched over, the target is no longer beside anybody.
    hand_over(&lun, 2, two).unwrap();
    assert!(fulfil(&lun.nexus(1), &repair, until()).is_err());
    assert!(!lun.may_write(1));
}

#[test]
fn a_device_that_keeps_its_word_needs_no_repair() {
    let lun = FakeLun::new();
    acquire(&lun, 1, key(1, 1)).unwrap();
    lun.restart();
    assert!(lun.may_write(1) && !lun.may_write(2));
}

#[test]
fn decisions_by_table() {
    let held = |key: u64| {
        Some(device::ReservationHeld {
            key,
            kind: ReservationType::WriteExclusiveRegistrantsOnly,
            scope: 0,
        })
    };
    let (one, two) = (key(1, 1), key(2, 2));
    let owner = |mine, older| wish(mine, Role::Owner, older);
    let do_register = Ok(Next::Do(Command::Register { key: two.raw() }));
    let do_reserve = Ok(Next::Do(Command::Reserve { key: two.raw() }));
    let do_preempt = |abort| {
        Ok(Next::Do(Command::Preempt {
            key: two.raw(),
            victim: one.raw(),
            abort,
        }))
    };
    let old = Err(Refusal::OlderOwner { owner: one });
    let both = [one.raw(), two.raw()];
    let (refuse, gently, hard) = (Older::Refuse, Older::Preempt, Older::PreemptAndAbort);
    use Here::{NotRegistered, Registered, Unknown};
    for (name, keys, holder, here, wish, expected) in [
        (
            "fresh",
            &both[..0],
            0,
            Unknown,
            owner(two, refuse),
            do_register.clone(),
        ),
        (
            "registered",
            &both[1..],
            0,
            Registered,
            owner(two, refuse),
            do_reserve.clone(),
        ),
        (
            "not known",
            &both[1..],
            0,
            Unknown,
            owner(two, refuse),
            do_reserve.clone(),
        ),
        (
            "conflict",
            &both[1..],
            0,
            NotRegistered,
            owner(two, refuse),
            do_register.clone(),
        ),
        (
            "done",
            &both[1..],
            2,
            Registered,
            owner(two, refuse),
            Ok(Next::Done),
        ),
        (
            "done before",
            &both[1..],
            2,
            Unknown,
            owner(two, refuse),
            do_register.clone(),
        ),
        (
            "old owner",
            &both[..1],
            1,
            Unknown,
            owner(two, refuse),
            old.clone(),
        ),
        (
            "take over",
            &both[..1],
            1,
            Unknown,
            owner(two, hard),
            do_register.clone(),
        ),
        (
            "preempt",
            &both[..],
            1,
            Registered,
            owner(two, hard),
            do_preempt(true),
        ),
        (
            "switch over",
            &both[..],
            1,
            Unknown,
            owner(two, gently),
            do_preempt(false),
        ),
        (
            "no holder",
            &both[..],
            0,
            Registered,
            owner(two, hard),
            do_reserve,
        ),
        (
            "leftover",
            &both[..],
            2,
            Registered,
            owner(two, hard),
            do_preempt(true),
        ),
        (
            "beside",
            &both[..],
            1,
            Registered,
            wish(two, Role::Beside, refuse),
            Ok(Next::Done),
        ),
        (
            "beside, first",
            &both[..1],
            1,
            Unknown,
            wish(two, Role::Beside, refuse),
            do_register,
        ),
        (
            "gone",
            &both[..1],
            1,
            Unknown,
            wish(two, Role::Nobody, refuse),
            Ok(Next::Done),
        ),
    ] {
        let holder = match holder {
            1 => held(one.raw()),
            2 => held(two.raw()),
            _ => None,
        };
        let facts = Facts::new(1, keys, holder);
        assert_eq!(decide(&facts, here, &wish), expected, "{name}");
    }
}

#[test]
fn a_path_that_is_down_is_an_error_and_no_success() {
    let lun = FakeLun::new();
    acquire(&lun, 1, key(1, 1)).unwrap();
    lun.set_down(2, true);
    let error = take_over(&lun, 2, key(2, 2)).unwrap_err();
    assert!(matches!(
        error,
        ReservationError::Device {
            error: DeviceError::Path(_),
            ..
        }
    ));
    lun.set_down(2, false);
    assert!(take_over(&lun, 2, key(2, 2)).is_ok());
}

#[tokio::test]
async fn a_path_that_is_mended_in_time_is_no_error() {
    let lun = FakeLun::new();
    let unit = Reservation::new(Arc::new(lun.nexus(1)), TAG, Duration::from_secs(60));
    lun.disturb(1, 3);
    unit.own(key(1, 1), &Claim::default(), Strangers::Refuse)
        .await
        .unwrap();
    lun.disturb(1, 3);
    assert!(unit.facts().await.unwrap().only_writer(key(1, 1)));
    lun.disturb(1, 3);
    assert_eq!(unit.inspect().await.unwrap().ours, [key(1, 1)]);
    lun.disturb(1, 3);
    assert_eq!(unit.may_write().await.unwrap(), Some(true));
    lun.disturb(1, 3);
    unit.release(key(1, 1)).await.unwrap();
    lun.disturb(1, 3);
    let report = unit.drill(key(1, 1)).await.unwrap();
    assert!(report.proof.is_some(), "{report}");
}

#[test]
fn a_path_that_stays_disturbed_is_an_error_at_the_deadline() {
    let lun = FakeLun::new();
    lun.disturb(1, u32::MAX);
    let soon = Instant::now() + Duration::from_millis(100);
    let wish = wish(key(1, 1), Role::Owner, Older::Refuse);
    let error = fulfil(&lun.nexus(1), &wish, soon).unwrap_err();
    assert!(error.to_string().contains("disturbed"), "{error}");
    assert!(lun.log().is_empty());
}

#[test]
fn a_passed_deadline_changes_nothing() {
    let lun = FakeLun::new();
    let wish = wish(key(1, 1), Role::Owner, Older::Refuse);
    assert!(fulfil(&lun.nexus(1), &wish, Instant::now()).is_err());
    assert!(lun.log().is_empty());
}

#[test]
fn the_drill_tells_good_devices_from_bad() {
    let lun = FakeLun::new();
    let report = drill::alone(&lun.nexus(1), key(1, 1), until());
    assert_eq!(
        report.proof,
        Some(crate::StorageFence::Reservation),
        "{report}"
    );
    assert!(report.persistent && lun.nexus(1).read_keys().unwrap().keys.is_empty());

    lun.cannot_persist();
    let (one, two) = (lun.nexus(1), lun.nexus(2));
    let report = drill::pair((&one, key(1, 1)), (&two, key(2, 2)), until());
    assert!(report.proof.is_some() && !report.persistent, "{report}");
    assert!(report.to_string().contains("until the SAN restarts"));

    lun.put_key(9, STRANGER);
    let report = drill::alone(&one, key(1, 1), until());
    assert_eq!(report.proof, None);
    assert!(
        report
            .failed()
            .unwrap()
            .problem
            .as_ref()
            .unwrap()
            .contains("scratch LUN")
    );
    assert_eq!(one.read_keys().unwrap().keys, vec![STRANGER]);
}

/// A box that says yes to everything and keeps nobody from writing.
struct Lax(fake::FakeDevice);

impl ReservationDevice for Lax {
    fn name(&self) -> String {
        "lax".into()
    }
    fn read_keys(&self) -> Result<device::KeyList, DeviceError> {
        self.0.read_keys()
    }
    fn read_reservation(&self) -> Result<(u32, Option<device::ReservationHeld>), DeviceError> {
        self.0.read_reservation()
    }
    fn capabilities(&self) -> Result<device::Capabilities, DeviceError> {
        Err(DeviceError::Unsupported("old".into()))
    }
    fn read_full_status(&self) -> Result<(u32, Vec<device::Nexus>), DeviceError> {
        Err(DeviceError::Unsupported("old".into()))
    }
    fn command(&self, command: Command) -> Result<(), DeviceError> {
        self.0.command(command)
    }
    fn write_nothing(&self) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported("old".into()))
    }
    fn rewrite_first_block(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_device_that_enforces_nothing_gives_no_proof() {
    let lun = FakeLun::new();
    let (one, two) = (Lax(lun.nexus(1)), Lax(lun.nexus(2)));
    let report = drill::pair((&one, key(1, 1)), (&two, key(2, 2)), until());
    assert_eq!(report.proof, None);
    assert_eq!(
        report.failed().unwrap().name,
        "the second host may not write"
    );
}

#[test]
fn both_ways_of_reading_tell_the_same() {
    for kind in [
        None,
        Some(ReservationType::WriteExclusive),
        Some(ReservationType::WriteExclusiveRegistrantsOnly),
        Some(ReservationType::WriteExclusiveAllRegistrants),
    ] {
        let lun = FakeLun::new();
        lun.put_key(1, key(1, 1).raw());
        lun.put_key(2, key(1, 1).raw());
        lun.put_key(3, STRANGER);
        if let Some(kind) = kind {
            lun.put_reservation(2, kind);
        }
        let facts = Facts::read(&lun.nexus(1)).unwrap();
        assert_eq!(facts, Facts::read(&Lax(lun.nexus(1))).unwrap());
        assert_eq!(facts.keys[&key(1, 1).raw()], 2, "two paths");
        assert_eq!(facts.held.is_some(), kind.is_some());
    }
}

/// Somebody registers between reading keys and reading the reservation, so many times.
struct Restless(fake::FakeDevice, FakeLun, AtomicU64);

impl ReservationDevice for Restless {
    fn name(&self) -> String {
        "restless".into()
    }
    fn read_keys(&self) -> Result<device::KeyList, DeviceError> {
        let keys = self.0.read_keys();
        let left = self.2.load(Ordering::SeqCst);
        if left > 0 {
            self.2.store(left - 1, Ordering::SeqCst);
            self.1.put_key(7, STRANGER + left);
        }
        keys
    }
    fn read_reservation(&self) -> Result<(u32, Option<device::ReservationHeld>), DeviceError> {
        self.0.read_reservation()
    }
    fn capabilities(&self) -> Result<device::Capabilities, DeviceError> {
        self.0.capabilities()
    }
    fn read_full_status(&self) -> Result<(u32, Vec<device::Nexus>), DeviceError> {
        Err(DeviceError::Unsupported("old".into()))
    }
    fn command(&self, command: Command) -> Result<(), DeviceError> {
        self.0.command(command)
    }
    fn write_nothing(&self) -> Result<(), DeviceError> {
        self.0.write_nothing()
    }
    fn rewrite_first_block(&self) -> Result<(), DeviceError> {
        self.0.rewrite_first_block()
    }
}

#[test]
fn two_readings_that_do_not_belong_together_are_made_again() {
    let read = |times| {
        let lun = FakeLun::new();
        Facts::read(&Restless(lun.nexus(1), lun, AtomicU64::new(times)))
    };
    let facts = read(3).unwrap();
    assert_eq!((facts.generation, facts.keys.len()), (3, 1));
    assert!(read(100).is_err(), "it never settles");
}

/// A device that hangs until it is let go: when it is read, or in commands.
struct Hanging {
    held: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
    in_commands: bool,
    device: Lax,
}

impl Hanging {
    fn wait(&self, command: bool) {
        if command == self.in_commands {
            let _ = self.held.lock().unwrap().recv();
        }
    }
}

impl ReservationDevice for Hanging {
    fn name(&self) -> String {
        "hanging".into()
    }
    fn read_keys(&self) -> Result<device::KeyList, DeviceError> {
        self.wait(false);
        self.device.read_keys()
    }
    fn read_reservation(&self) -> Result<(u32, Option<device::ReservationHeld>), DeviceError> {
        self.device.read_reservation()
    }
    fn capabilities(&self) -> Result<device::Capabilities, DeviceError> {
        self.device.capabilities()
    }
    fn read_full_status(&self) -> Result<(u32, Vec<device::Nexus>), DeviceError> {
        self.device.read_full_status()
    }
    fn command(&self, command: Command) -> Result<(), DeviceError> {
        self.wait(true);
        self.device.command(command)
    }
    fn write_nothing(&self) -> Result<(), DeviceError> {
        self.device.write_nothing()
    }
    fn rewrite_first_block(&self) -> Result<(), DeviceError> {
        self.device.rewrite_first_block()
    }
}

/// Tries to acquire a device that hangs past the deadline; what it did once it was let go.
async fn acquire_late(in_commands: bool) -> (FakeLun, Vec<Command>) {
    let lun = FakeLun::new();
    let (let_go, held) = std::sync::mpsc::channel();
    let device = Arc::new(Hanging {
        held: held.into(),
        in_commands,
        device: Lax(lun.nexus(1)),
    });
    let reservation = Reservation::new(device, TAG, Duration::from_millis(50));
    for _ in 0..2 {
        let error = reservation
            .acquire(key(1, 1), Strangers::Refuse)
            .await
            .unwrap_err();
        assert!(
            matches!(error, ReservationError::Unresponsive { .. }),
            "{error}"
        );
    }
    drop(let_go);
    // Its turn comes when the thread that was left behind has ended.
    let mut answers = false;
    for _ in 0..1000 {
        answers = answers || reservation.inspect().await.is_ok();
    }
    assert!(answers, "it never comes back");
    let log = lun.log().into_iter().map(|(_, command)| command).collect();
    (lun, log)
}

#[tokio::test]
async fn a_device_that_hangs_is_left_behind_and_does_nothing_late() {
    let (_, log) = acquire_late(false).await;
    assert!(log.is_empty(), "{log:?}");
}

#[tokio::test]
async fn a_registration_that_comes_late_is_taken_back() {
    let (lun, log) = acquire_late(true).await;
    let key = key(1, 1).raw();
    let wanted = [Command::Register { key }, Command::Unregister { key }];
    assert_eq!(log, wanted);
    assert!(lun.nexus(1).read_keys().unwrap().keys.is_empty());
}

#[tokio::test]
async fn the_handle_does_what_the_functions_do() {
    let lun = FakeLun::new();
    let at = |nexus| Reservation::new(Arc::new(lun.nexus(nexus)), TAG, Duration::from_secs(60));
    let (a, b) = (at(1), at(2));
    a.acquire(key(1, 1), Strangers::Refuse).await.unwrap();
    let seen = b.inspect().await.unwrap();
    assert_eq!(seen.persistent, Some(true));
    assert_eq!(b.may_write().await.unwrap(), Some(false));
    assert_eq!((seen.ours.len(), seen.foreign.len()), (1, 0));
    assert_eq!(seen.nexuses.unwrap()[0].initiator, "nexus 1");
    b.register(key(2, 2)).await.unwrap();
    a.repair(key(1, 1), Some(key(2, 2))).await.unwrap();
    b.hand_over(key(2, 2), Some(key(1, 1))).await.unwrap();
    a.take_over(key(1, 3)).await.unwrap();
    assert_eq!(b.may_write().await.unwrap(), Some(false));
    assert_eq!(a.may_write().await.unwrap(), Some(true));
    a.release(key(1, 3)).await.unwrap();
    assert!(b.drill(key(2, 4)).await.unwrap().proof.is_some());
}

/// What the cluster does with one disk, in any order; refused orders included.
#[derive(Debug, Clone, Copy)]
enum Order {
    Acquire(u32),
    BeginMigration(u32),
    SwitchOver,
    CancelMigration,
    TakeOver(u32),
    Repair,
    Stop,
    Restart,
    /// A host repeats something with a key that is history.
    Late(u32, u8),
}

fn orders() -> impl Strategy<Value = Vec<Order>> {
    let host = 1_u32..=3;
    let one = prop_oneof![
        3 => host.clone().prop_map(Order::Acquire),
        3 => host.clone().prop_map(Order::BeginMigration),
        3 => Just(Order::SwitchOver),
        1 => Just(Order::CancelMigration),
        3 => host.clone().prop_map(Order::TakeOver),
        2 => Just(Order::Repair),
        1 => Just(Order::Stop),
        2 => Just(Order::Restart),
        4 => (host, 0_u8..4).prop_map(|(host, what)| Order::Late(host, what)),
    ];
    proptest::collection::vec(one, 1..40)
}

/// The cluster's own record, as the replicated state keeps it.
#[derive(Default)]
struct Record {
    epoch: u64,
    owner: Option<(u32, ReservationKey)>,
    target: Option<(u32, ReservationKey)>,
    past: Vec<(u32, ReservationKey)>,
    /// The device forgot everything and nobody has repaired it yet.
    lost: bool,
}

impl Record {
    fn next(&mut self, host: u32) -> ReservationKey {
        self.epoch += 1;
        key(u64::from(host), self.epoch)
    }

    fn follow(&mut self, lun: &FakeLun, order: Order) {
        match order {
            Order::Acquire(host) if self.owner.is_none() && self.target.is_none() => {
                let mine = self.next(host);
                acquire(lun, host, mine).unwrap();
                (self.owner, self.lost) = (Some((host, mine)), false);
            }
            Order::BeginMigration(host) => match (self.owner, self.target) {
                (Some((from, _)), None) if from != host => {
                    let mine = self.next(host);
                    register(lun, host, mine).unwrap();
                    self.target = Some((host, mine));
                }
                _ => {}
            },
            Order::SwitchOver => {
                if let Some((host, mine)) = self.target.take() {
                    hand_over(lun, host, mine).unwrap();
                    self.past.extend(self.owner.replace((host, mine)));
                    self.lost = false;
                }
            }
            Order::CancelMigration => {
                if let Some((host, mine)) = self.target.take() {
                    release(lun, host, mine).unwrap();
                    self.past.push((host, mine));
                }
            }
            Order::TakeOver(host) => {
                let mine = self.next(host);
                let outcome = take_over(lun, host, mine).unwrap();
                assert!(outcome.after.only_writer(mine));
                self.past.extend(self.owner.replace((host, mine)));
                self.past.extend(self.target.take());
                self.lost = false;
            }
            Order::Repair => {
                if let Some((host, mine)) = self.owner {
                    let mut wish = wish(mine, Role::Owner, Older::PreemptAndAbort);
                    wish.beside = self.target.map(|(_, key)| key);
                    fulfil(&lun.nexus(host), &wish, until()).unwrap();
                    // The target of a migration repairs itself.
                    if let Some((host, mine)) = self.target {
                        register(lun, host, mine).unwrap();
                    }
                    self.lost = false;
                }
            }
            Order::Stop if self.target.is_none() => {
                if let Some((host, mine)) = self.owner.take() {
                    release(lun, host, mine).unwrap();
                    self.past.push((host, mine));
                }
            }
            Order::Restart => {
                lun.forget();
                self.lost = true;
            }
            Order::Late(host, what) => self.late(lun, host, what),
            Order::Acquire(_) | Order::Stop => {}
        }
    }

    /// A host with a key of the past. While nobody else holds the device it may register,
    /// so the lease forbids it; once somebody does, the device's keys do.
    fn late(&self, lun: &FakeLun, host: u32, what: u8) {
        let stale = self.past.iter().rev().find(|(other, _)| *other == host);
        let Some((_, mine)) = stale.copied() else {
            return;
        };
        let Some((_, owner)) = self.owner else {
            return;
        };
        // The target of a cancelled migration has a newer key than the owner: to the device
        // it could be the rightful one. Its host's ledger keeps it from coming back.
        if self.lost || mine.epoch() > owner.epoch() {
            return;
        }
        let result = match what {
            0 => register(lun, host, mine),
            1 => acquire(lun, host, mine),
            2 => take_over(lun, host, mine),
            _ => {
                release(lun, host, mine).unwrap();
                return;
            }
        };
        let refused = refusal(result);
        assert!(matches!(refused, Refusal::Superseded { .. }), "{refused}");
    }

    /// one-writer: nobody but the owner and the target of a migration under way.
    fn check(&self, lun: &FakeLun) {
        if self.lost || self.owner.is_none() {
            return;
        }
        for host in 1..=3 {
            let entitled = [self.owner, self.target]
                .iter()
                .flatten()
                .any(|(other, _)| *other == host);
            assert_eq!(lun.may_write(host), entitled, "host {host}");
        }
    }
}

proptest! {
    #[test]
    fn at_no_time_do_two_epochs_write(orders in orders()) {
        let lun = FakeLun::new();
        let mut record = Record::default();
        for order in orders {
            record.follow(&lun, order);
            record.check(&lun);
        }
    }

    #[test]
    fn a_stranger_is_never_pushed_out_without_force(
        orders in proptest::collection::vec((0_u8..5, 1_u32..=3, 1_u64..9), 1..20),
        holds: bool,
    ) {
        let lun = FakeLun::new();
        lun.put_key(7, STRANGER);
        if holds {
            lun.put_reservation(7, ReservationType::WriteExclusiveRegistrantsOnly);
        }
        for (what, host, epoch) in orders {
            let mine = key(u64::from(host), epoch);
            let result = match what {
                0 => acquire(&lun, host, mine),
                1 => register(&lun, host, mine),
                2 => hand_over(&lun, host, mine),
                3 => take_over(&lun, host, mine),
                _ => release(&lun, host, mine),
            };
            prop_assert!(what == 4 || result.is_err());
            prop_assert!(lun.log().is_empty());
            prop_assert!(lun.may_write(7));
        }
    }

    /// Two owners race, command by command: never do both believe that they won.
    #[test]
    fn of_two_that_race_one_wins(turns in proptest::collection::vec(any::<bool>(), 60)) {
        let lun = FakeLun::new();
        acquire(&lun, 3, key(3, 1)).unwrap();
        let mut racers = [Racer::new(1, key(1, 2)), Racer::new(2, key(2, 3))];
        for turn in turns {
            racers[usize::from(turn)].step(&lun);
        }
        for _ in 0..60 {
            racers.iter_mut().for_each(|racer| racer.step(&lun));
        }
        prop_assert_eq!(racers[1].ended, Some(true), "the newest epoch wins");
        prop_assert!(lun.may_write(2) && !lun.may_write(3));
        // The older one may have finished before; then it was cut off afterwards.
        if racers[0].ended == Some(true) {
            prop_assert!(!lun.may_write(1));
        }
    }
}

/// `fulfil` with a breath between reading and commanding.
struct Racer {
    nexus: u32,
    wish: Wish,
    here: Here,
    next: Option<Next>,
    ended: Option<bool>,
}

impl Racer {
    fn new(nexus: u32, mine: ReservationKey) -> Self {
        Self {
            nexus,
            wish: wish(mine, Role::Owner, Older::PreemptAndAbort),
            here: Here::Unknown,
            next: None,
            ended: None,
        }
    }

    fn step(&mut self, lun: &FakeLun) {
        if self.ended.is_some() {
            return;
        }
        let device = lun.nexus(self.nexus);
        match self.next.take() {
            None => match decide(&Facts::read(&device).unwrap(), self.here, &self.wish) {
                Ok(Next::Done) => self.ended = Some(true),
                Ok(next) => self.next = Some(next),
                Err(_) => self.ended = Some(false),
            },
            Some(Next::Do(command)) => {
                self.here = match device.command(command) {
                    Ok(()) => Here::Registered,
                    Err(_) => Here::NotRegistered,
                };
            }
            Some(Next::Done) => {}
        }
    }
}
