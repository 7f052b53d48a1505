//! Reservations on a real LIO target, from hosts with kernels of their own. `make san` builds what they need and runs
//! them, as root; without `QUORATE_SAN` in the environment they say so and pass.
#![allow(clippy::unwrap_used)]

use quorate_fence::target::{Lio, TargetAccess as _};
use quorate_guest::log::GuestBoot;
use quorate_guest::verify::{AckRange, verify};
use quorate_san::{
    ACCOUNT, CLUSTER, Memory, PASSWORD, San, SanHost, TARGET_ADDRESS, TARGET_IQN, TOOLS,
};
use quorate_storage::reservation::{ClusterTag, ReservationKey};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How often a host takes its units back while it writes.
const TAKEN_BACK: u32 = 10;
/// For whatever the SAN and the kernels need to settle, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

fn san(lun_mebibytes: u64) -> Option<(tempfile::TempDir, San)> {
    if std::env::var_os("QUORATE_SAN").is_none() {
        println!("SKIPPED the SAN's tests: `make san` runs them");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let san = San::new(dir.path(), lun_mebibytes).unwrap();
    Some((dir, san))
}

fn number(answer: &Value, field: &str) -> u64 {
    answer[field]
        .as_u64()
        .unwrap_or_else(|| panic!("no {field} in {answer}"))
}

fn error(answer: &Value) -> &str {
    answer["error"]
        .as_str()
        .unwrap_or_else(|| panic!("no error: {answer}"))
}

fn key(host: u64, epoch: u64) -> String {
    let key = ReservationKey::new(ClusterTag::of(CLUSTER), host, epoch).unwrap();
    format!("{:#018x}", key.raw())
}

/// Starts a log and waits for some records.
fn write(host: &mut SanHost, boot: u8, records: u64) {
    host.must(&format!("log start {boot}")).unwrap();
    host.until("log status", LIMIT, |told| {
        number(told, "records") >= records
    })
    .unwrap();
}

/// Ends a log; what was acknowledged.
fn stop(host: &mut SanHost, boot: u8) -> (Value, AckRange) {
    let told = host.must("log stop").unwrap();
    let range = AckRange {
        boot: GuestBoot([boot; 16]),
        first: number(&told, "first"),
        last: number(&told, "last"),
    };
    (told, range)
}

/// Nothing failed but what a starved machine does to a path: it says nothing of who may write, and nothing was acknowledged.
fn nothing_else_failed(told: &Value) {
    const PATH: [u64; 4] = [5, 11, 67, 110]; // EIO, EAGAIN, ENOLINK, ETIMEDOUT
    let failed = number(told, "failed");
    let path = told["errno"].as_u64().is_some_and(|no| PATH.contains(&no));
    assert!(failed == 0 || path, "{told}");
    if failed > 0 {
        println!("the path failed under {failed} writes: {told}");
    }
}

/// Who was cut off, where nothing had to be repeated: else the first try did it, and its answer was lost.
fn cut_off(took: &Value, key: &str) {
    let cut = took["cut"].as_array().unwrap();
    assert!(cut.iter().all(|cut| cut == key), "{took}");
    assert!(cut.len() == 1 || took["tries"] != 1, "{took}");
}

struct Lab {
    san: San,
    a: SanHost,
    b: SanHost,
    acknowledged: Vec<AckRange>,
    /// The last to go.
    _dir: tempfile::TempDir,
}

#[test]
fn one_host_at_a_time_writes_a_lun() {
    let Some((dir, mut san)) = san(16) else {
        return;
    };
    let begun = Instant::now();
    san.start_target(Memory::Keeps).unwrap();
    let (mut a, mut b) = (san.start_host(1).unwrap(), san.start_host(2).unwrap());
    a.wait_ready().unwrap();
    b.wait_ready().unwrap();
    println!(
        "\nMEASURED san: LIO target and two hosts ready in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let mut lab = Lab {
        _dir: dir,
        san,
        a,
        b,
        acknowledged: Vec::new(),
    };

    let drill = lab.a.must("drill 1 1").unwrap();
    println!("{}", drill["report"].as_str().unwrap());
    assert_eq!(
        (&drill["proof"], &drill["persistent"]),
        (&true.into(), &true.into())
    );

    takes_over_from_a_live_owner(&mut lab);
    hands_over(&mut lab);
    survives_power_loss_of_the_san(&mut lab);
    cuts_off_a_host_without_network(&mut lab);
    repairs_lost_keys(&mut lab);
    refuses_a_stranger(&mut lab);
    moves_as_the_agent_does(&mut lab);
    cuts_as_the_leader_does(&mut lab);

    // The target's write cache is the page cache of this machine.
    let image = std::fs::File::open(lab.san.lun(0)).unwrap();
    let verdict = verify(image, &lab.acknowledged).unwrap();
    assert!(verdict.good(), "{:?}", verdict.findings);
    println!(
        "MEASURED san: log of {} records by {} owners, {} acknowledged, none lost or damaged; whole test {:.1} s",
        verdict.last,
        verdict.boots.len(),
        verdict.acknowledged,
        begun.elapsed().as_secs_f64()
    );
    assert_eq!(verdict.boots.len(), 8);
    measures_the_hand_over(&mut lab);
    lab.acknowledged.clear();
    shows_pools_as_they_are(&mut lab);
    opens_units_with_the_kernels_initiator(&mut lab);
    shuts_one_host_out_at_the_san(&mut lab);
    let image = std::fs::File::open(lab.san.lun(2)).unwrap();
    let verdict = verify(image, &lab.acknowledged).unwrap();
    assert!(verdict.good(), "{:?}", verdict.findings);
    println!(
        "MEASURED san: with the kernel's initiator and the SAN's list, a log of {} records, {} acknowledged, none lost or \
         damaged; whole test {:.1} s",
        verdict.last,
        verdict.acknowledged,
        begun.elapsed().as_secs_f64()
    );
}

/// What `quorate storage show` and `storage drill` print of pools of block devices; its pages are made of this.
const PAGES: &str = include_str!("../../daemon/src/cli/golden/storage-units.json");

/// A step of a pool's drill, as it is on the page.
fn step_on_page(pool: usize) -> Value {
    let pages: Value = serde_json::from_str(PAGES).unwrap();
    pages[pool]["drill"]["steps"].clone()
}

/// A pool of block devices on real LUNs: what a host sees of it, and its drill, on a LUN that nobody uses and on one in use.
fn shows_pools_as_they_are(lab: &mut Lab) {
    for (host, number) in [(&mut lab.a, 1), (&mut lab.b, 2)] {
        host.must(&format!("vm leave {number}")).unwrap();
    }
    lab.a.must("use lun1").unwrap();
    let told = lab.a.must("pool").unwrap();
    assert_eq!(
        (&told["kind"], &told["usable"], &told["proof"]),
        (&"block".into(), &true.into(), &"Reservation".into())
    );
    let image =
        |name: &str| serde_json::json!({ "image": name, "bytes": 16 << 20, "problem": null });
    assert_eq!(
        told["images"],
        serde_json::json!([image("lun0"), image("lun1")])
    );
    let drill = lab.a.must("attempt 1").unwrap();
    assert_eq!(drill["passed"], true, "{drill}");
    assert_eq!(drill["steps"], step_on_page(0), "the page says what is so");
    assert_eq!(
        lab.a.must("inspect").unwrap()["keys"],
        serde_json::json!([])
    );

    lab.a.must("acquire 1 7").unwrap();
    let drill = lab.a.must("attempt 1").unwrap();
    assert_eq!(drill["passed"], false, "{drill}");
    let steps = drill["steps"]
        .to_string()
        .replace(&key(1, 7), "0x51abc00100000007");
    assert_eq!(steps, step_on_page(1).to_string());
    let seen = lab.a.must("inspect").unwrap();
    assert_eq!(seen["keys"], serde_json::json!([key(1, 7)]), "left alone");
    lab.a.must("release 1 7").unwrap();
}

/// A target with an account: hosts log in with open-iscsi under the cluster's names, and its unit decides who writes.
fn opens_units_with_the_kernels_initiator(lab: &mut Lab) {
    let told = lab.a.ask("use third not-the-password").unwrap();
    assert!(error(&told).contains("check `chap.user`"), "{told}");
    for host in [&mut lab.a, &mut lab.b] {
        let told = host.must(&format!("use third {PASSWORD}")).unwrap();
        println!(
            "MEASURED san: a login of the kernel's initiator, and its device {} us",
            number(&told, "us")
        );
        assert!(
            told["device"].as_str().unwrap().starts_with("/dev/sd"),
            "{told}"
        );
        assert_eq!(number(&told, "bytes"), 16 << 20);
        let told = host.must("pool").unwrap();
        assert_eq!(
            (&told["kind"], &told["usable"], &told["proof"]),
            (&"iscsi".into(), &true.into(), &"Reservation".into())
        );
        // LIO names all of its targets, whoever asks.
        let third = serde_json::json!({ "image": "third", "bytes": 16 << 20, "problem": null });
        assert!(
            told["images"].as_array().unwrap().contains(&third),
            "{told}"
        );
    }
    let drill = lab.b.must("attempt 2").unwrap();
    assert_eq!(drill["passed"], true, "{drill}");

    lab.a.must("acquire 1 50").unwrap();
    write(&mut lab.a, 50, 20);
    let seen = lab.b.must("inspect").unwrap();
    assert_eq!(seen["may_write"], false, "{seen}");
    let initiator = seen["initiators"][0].as_str().unwrap();
    assert!(
        initiator.starts_with(&San::third_initiator(1)),
        "{initiator}"
    );
    cut_off(&lab.b.must("takeover 2 51").unwrap(), &key(1, 50));
    write(&mut lab.b, 51, 20);
    nothing_else_failed(&nothing_gets_through(lab));
    for (host, boot) in [(&mut lab.a, 50), (&mut lab.b, 51)] {
        let (_, range) = stop(host, boot);
        lab.acknowledged.push(range);
    }
    lab.b.must("release 2 51").unwrap();
}

/// The driver for LIO: A, which writes, is shut out of one target; its writes fail, its other units answer; it is let in again.
fn shuts_one_host_out_at_the_san(lab: &mut Lab) {
    let lio = Lio::new(1, lab.san.shell(env!("CARGO_BIN_EXE_quorate-san-ssh")));
    let lio = lio.with_account(Some((ACCOUNT.to_owned(), PASSWORD.to_owned())));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.unwrap();
    let soon = || tokio::time::Instant::now() + LIMIT;
    let (targets, initiator) = ([San::third()], San::third_initiator(1));
    let allowed = |who: &str| {
        runtime
            .block_on(lio.allowed(&targets, who, soon()))
            .unwrap()
    };
    for host in [&mut lab.a, &mut lab.b] {
        host.must(&format!("use third {PASSWORD} list")).unwrap();
    }
    assert_eq!(lab.a.must("pool").unwrap()["proof"], "TargetAccess");
    lab.a.must("patience 3").unwrap();
    write(&mut lab.a, 52, 20);
    assert_eq!(allowed(&initiator), [true]);

    let cut = runtime
        .block_on(lio.cut(&targets, &initiator, soon()))
        .remove(0)
        .unwrap();
    println!(
        "MEASURED san: LIO shuts a host out of a target in {} ms: {}",
        cut.took_ms, cut.how
    );
    assert_eq!(allowed(&initiator), [false]);
    assert_eq!(allowed(&San::third_initiator(2)), [true], "nobody else");
    write(&mut lab.b, 53, 20);
    lab.a
        .until("log status", LIMIT, |told| number(told, "failed") > 0)
        .unwrap();
    let again = lab
        .a
        .ask_once(&format!("use third {PASSWORD} list"))
        .unwrap();
    assert!(error(&again).contains(&initiator), "{again}");
    lab.a.must("use lun0").unwrap();
    lab.a.must("inspect").unwrap();
    let (late, range) = stop(&mut lab.a, 52);
    lab.acknowledged.push(range);
    let new = lab.b.must("log status").unwrap();
    assert!(
        number(&late, "last") < number(&new, "first"),
        "a late write got through: {late} {new}"
    );
    assert_eq!(
        number(&late, "refused"),
        0,
        "no reservation is at work: {late}"
    );
    println!(
        "MEASURED san: {} late writes of the host that was shut out, all failed",
        number(&late, "failed")
    );
    let (_, range) = stop(&mut lab.b, 53);
    lab.acknowledged.push(range);

    runtime
        .block_on(lio.allow(&targets, &initiator, soon()))
        .unwrap();
    assert_eq!(allowed(&initiator), [true]);
    let begun = Instant::now();
    insist(&mut lab.a, &format!("use third {PASSWORD} list"));
    write(&mut lab.a, 54, 20);
    println!(
        "MEASURED san: a host that was let in again writes after {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let (_, range) = stop(&mut lab.a, 54);
    lab.acknowledged.push(range);
}

/// Asks until it works: a starved machine loses a session now and then, which is not what is measured.
fn insist(host: &mut SanHost, command: &str) -> Value {
    let worked = |told: &Value| told.get("error").is_none();
    host.until(command, LIMIT, worked).unwrap()
}

/// A live migration as the disk sees it, with the hand-over of both LUNs between the last write of the one host and the first
/// of the other, and without. By the hosts' own clocks: the end of the one's log, the hand-over, the first record of the
/// other's. The log is not looked at any more.
fn measures_the_hand_over(lab: &mut Lab) {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    insist(&mut lab.a, "vm own 1 30 30 in");
    let (mut from, mut to) = ((1, &mut lab.a), (2, &mut lab.b));
    for epoch in 31..=44 {
        insist(to.1, &format!("vm register {} {epoch}", to.0));
        write(from.1, 100, 5);
        let mut span = number(&from.1.must("log stop").unwrap(), "us");
        let source = format!("{} {}", from.0, epoch - 1);
        let hand_over = format!("vm handover {} {epoch} {source}", to.0);
        let measured = epoch % 2 == 0;
        if measured {
            span += number(&insist(to.1, &hand_over), "us");
        }
        write(to.1, 101, 1);
        span += number(&to.1.must("log stop").unwrap(), "first_us");
        if measured {
            with.push(span);
        } else {
            insist(to.1, &hand_over);
            without.push(span);
        }
        std::mem::swap(&mut from, &mut to);
    }
    let median = |times: &mut Vec<u64>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    let (with, without) = (median(&mut with), median(&mut without));
    println!(
        "MEASURED san: from the last write of a source to the first of its target, two LUNs: {with} us with hand-over, {without} us \
         without (medians of 7); {} us more, 25000 at most are wanted",
        with.saturating_sub(without)
    );
}

/// What the agents of two hosts do to the disks of a VM in live migrations, one of which comes to nothing.
fn moves_as_the_agent_does(lab: &mut Lab) {
    lab.b.must("release 2 16").unwrap();
    lab.a.must("vm own 1 20 20 in").unwrap();
    write(&mut lab.a, 6, 20);
    lab.b.must("vm register 2 21").unwrap();
    // The source stands still here, and asks the target.
    let (_, range) = stop(&mut lab.a, 6);
    lab.acknowledged.push(range);
    lab.b.must("vm handover 2 21 1 20").unwrap();
    assert_eq!(lab.a.must("inspect").unwrap()["may_write"], false);
    write(&mut lab.b, 7, 20);
    // Back, but the switchover fails after the hand-over: B, still the owner of 21, takes its units back. Its guest stands
    // still from before the hand-over on; A's would have to be cut off, which is not done under B's own writes.
    lab.a.must("vm register 1 22").unwrap();
    lab.b.must("log pause").unwrap();
    lab.a.must("vm handover 1 22").unwrap();
    let told = lab.b.ask("vm own 2 21 21 in").unwrap();
    assert_eq!(told["kind"], "superseded", "{told}");
    let told = lab.b.ask("vm own 2 21 22 in busy").unwrap();
    assert_eq!(told["kind"], "refused", "{told}");
    assert!(error(&told).contains("stand still"), "{told}");
    lab.b.must("vm own 2 21 22 in").unwrap();
    lab.b.must("log resume").unwrap();
    let before = number(&lab.b.must("log status").unwrap(), "records");
    lab.b
        .until("log status", LIMIT, |told| {
            number(told, "records") > before + 20
        })
        .unwrap();
    assert_eq!(lab.a.must("inspect").unwrap()["may_write"], false);
    let told = lab.b.must("log status").unwrap();
    nothing_else_failed(&told);
}

/// B, which writes, is silent; A cuts it off, lets it in again, cuts it off for good and becomes the owner.
fn cuts_as_the_leader_does(lab: &mut Lab) {
    let took = lab.a.must("cut 2 21").unwrap();
    cut_off(&took, &key(2, 21));
    println!(
        "MEASURED san: cut of a silent host by another (register, preempt and abort, read back) {} us",
        number(&took, "us")
    );
    let refused = number(&lab.b.must("log status").unwrap(), "refused");
    lab.b
        .until("log status", LIMIT, |told| {
            number(told, "refused") > refused + 20
        })
        .unwrap();
    let told = lab.b.ask("vm own 2 21 22 out").unwrap();
    assert_eq!(told["kind"], "refused", "{told}");
    assert!(error(&told).contains("cut off"), "{told}");
    takes_back_under_its_own_writes(lab);
    cut_off(&lab.a.must("cut 2 21").unwrap(), &key(2, 21));
    lab.a.must("vm own 1 23 23 in").unwrap();
    write(&mut lab.a, 8, 50);
    let refused = number(&lab.b.must("log status").unwrap(), "refused");
    lab.b
        .until("log status", LIMIT, |told| {
            number(told, "refused") > refused + 20
        })
        .unwrap();
    let told = lab.b.ask("vm own 2 21 22 in").unwrap();
    assert_eq!(told["kind"], "superseded", "{told}");
    let (late, range) = stop(&mut lab.b, 7);
    nothing_else_failed(&late);
    let new = lab.a.must("log status").unwrap();
    assert!(
        number(&late, "last") < number(&new, "first"),
        "a late write got through: {late} {new}"
    );
    lab.acknowledged.push(range);
    let (_, range) = stop(&mut lab.a, 8);
    lab.acknowledged.push(range);
    for (host, number) in [(&mut lab.a, 1), (&mut lab.b, 2)] {
        host.must(&format!("vm leave {number}")).unwrap();
    }
    assert_eq!(
        lab.a.must("inspect").unwrap()["keys"],
        serde_json::json!([])
    );
}

/// B, whose guest has not noticed the end of the cut, takes its units back, again and again, while it writes as fast as it
/// can. LIO carries PREEMPT AND ABORT out in the thread of the session that asked for it, and waits there for commands that it
/// took while the key was the holder's: of these B has some as soon as it is registered again. The session then hangs for good.
fn takes_back_under_its_own_writes(lab: &mut Lab) {
    for round in 0..TAKEN_BACK {
        if round > 0 {
            cut_off(&lab.a.must("cut 2 21").unwrap(), &key(2, 21));
        }
        let before = number(&lab.b.must("log status").unwrap(), "records");
        lab.b.must("vm own 2 21 22 in busy").unwrap();
        lab.b
            .until("log status", LIMIT, |told| {
                number(told, "records") > before + 5
            })
            .unwrap();
    }
    println!("MEASURED san: a host took its units back under its own writes {TAKEN_BACK} times");
}

/// Epoch 1 on A writes; B is kept out, then takes over with epoch 2 under A's writes.
fn takes_over_from_a_live_owner(lab: &mut Lab) {
    lab.a.must("acquire 1 1").unwrap();
    write(&mut lab.a, 1, 100);

    let seen = lab.b.must("inspect").unwrap();
    assert_eq!(seen["keys"], serde_json::json!([key(1, 1)]));
    assert_eq!(seen["kind"], "write exclusive, registrants only (5)");
    assert_eq!(seen["may_write"], false);
    let initiator = seen["initiators"][0].as_str().unwrap();
    assert!(initiator.contains("host-1"), "{initiator}");
    assert!(error(&lab.b.ask("acquire 2 2").unwrap()).contains("still registered"));
    lab.b.must("log start 99").unwrap();
    lab.b
        .until("log status", LIMIT, |told| number(told, "refused") >= 20)
        .unwrap();
    let told = lab.b.must("log stop").unwrap();
    assert_eq!(number(&told, "records"), 0, "{told}");
    nothing_else_failed(&told);

    let took = lab.b.must("takeover 2 2").unwrap();
    cut_off(&took, &key(1, 1));
    assert_eq!(took["keys"], serde_json::json!([key(2, 2)]));
    println!(
        "MEASURED san: take-over (register, preempt and abort, read back) {} us",
        number(&took, "us")
    );
    write(&mut lab.b, 2, 100);
    let late = nothing_gets_through(lab);
    nothing_else_failed(&late);
    println!(
        "MEASURED san: {} late writes of the old owner, all refused with EBADE",
        number(&late, "refused")
    );
    for command in ["register 1 1", "acquire 1 1", "takeover 1 1", "repair 1 1"] {
        let told = lab.a.ask(command).unwrap();
        assert!(error(&told).contains("has taken over"), "{command}: {told}");
    }
    let (_, range) = stop(&mut lab.a, 1);
    lab.acknowledged.push(range);
    let (told, range) = stop(&mut lab.b, 2);
    assert_eq!(number(&told, "refused"), 0, "{told}");
    nothing_else_failed(&told);
    lab.acknowledged.push(range);
}

/// A goes on trying to write while B writes; all of it fails. What A was told last may have been
/// on its way when it was cut off; then it lies before B's first record.
fn nothing_gets_through(lab: &mut Lab) -> Value {
    let late = lab
        .a
        .until("log status", LIMIT, |told| number(told, "refused") >= 20)
        .unwrap();
    let new = lab.b.must("log status").unwrap();
    assert!(
        number(&late, "last") < number(&new, "first"),
        "a late write got through: {late} {new}"
    );
    late
}

/// Epochs 3 to 13, to and fro, as in live migrations; A has it in the end.
fn hands_over(lab: &mut Lab) {
    let (mut times, mut readings) = (Vec::new(), Vec::new());
    let (mut from, mut to) = ((2, &mut lab.b), (1, &mut lab.a));
    for epoch in 3..=13 {
        to.1.must(&format!("register {} {epoch}", to.0)).unwrap();
        for host in [&mut from.1, &mut to.1] {
            assert_eq!(host.must("inspect").unwrap()["may_write"], true, "both may");
        }
        // The source has stopped and flushed here.
        let told = to.1.must(&format!("handover {} {epoch}", to.0)).unwrap();
        if told["tries"] == 1 {
            assert_eq!(told["commands"], serde_json::json!(["PREEMPT"]), "{told}");
        }
        times.push(number(&told, "us"));
        readings.push(number(&to.1.must("read").unwrap(), "us"));
        assert_eq!(to.1.must("inspect").unwrap()["may_write"], true);
        assert_eq!(from.1.must("inspect").unwrap()["may_write"], false);
        std::mem::swap(&mut from, &mut to);
    }
    times.sort_unstable();
    readings.sort_unstable();
    println!(
        "MEASURED san: hand-over at the switchover (read, preempt, read back) {} us (median of {}; {} to {}); one reading {} us",
        times[times.len() / 2],
        times.len(),
        times[0],
        times[times.len() - 1],
        readings[readings.len() / 2]
    );
    // A migration that fails before the switchover: the source does not notice.
    write(&mut lab.a, 3, 20);
    lab.b.must("register 2 14").unwrap();
    lab.b.must("release 2 14").unwrap();
    let before = number(&lab.a.must("log status").unwrap(), "records");
    lab.a
        .until("log status", LIMIT, |told| {
            number(told, "records") > before + 20
        })
        .unwrap();
}

/// The target is killed and comes back: A, which writes, goes on by itself, B stays out.
fn survives_power_loss_of_the_san(lab: &mut Lab) {
    lab.san.kill_target();
    let before = number(&lab.a.must("log status").unwrap(), "records");
    let begun = Instant::now();
    lab.san.start_target(Memory::Keeps).unwrap();
    assert!(
        lab.san.target_console().contains("SAN-RESTORED"),
        "{}",
        lab.san.target_console()
    );
    lab.a
        .until("log status", LIMIT, |told| {
            number(told, "records") > before + 20
        })
        .unwrap();
    println!(
        "MEASURED san: writes go on {:.1} s after the target is switched on again",
        begun.elapsed().as_secs_f64()
    );
    let seen = lab
        .b
        .until("inspect", LIMIT, |seen| seen["may_write"] == false)
        .unwrap();
    assert_eq!(
        seen["keys"],
        serde_json::json!([key(1, 13)]),
        "APTPL kept the keys"
    );
    assert_eq!(seen["holder"], key(1, 13));
    let told = lab.a.must("log status").unwrap();
    assert_eq!(number(&told, "refused"), 0, "{told}");
}

/// A, which writes, loses its network; B takes over; A's queued writes fail when it returns.
fn cuts_off_a_host_without_network(lab: &mut Lab) {
    lab.san.set_cable(1, false).unwrap();
    lab.b.must("takeover 2 15").unwrap();
    write(&mut lab.b, 4, 50);
    lab.san.set_cable(1, true).unwrap();
    nothing_gets_through(lab);
    let (_, range) = stop(&mut lab.a, 3);
    lab.acknowledged.push(range);
    let (told, range) = stop(&mut lab.b, 4);
    assert_eq!(number(&told, "refused"), 0, "{told}");
    nothing_else_failed(&told);
    lab.acknowledged.push(range);
}

/// The target comes back without its keys: the owner registers again, nobody else does.
fn repairs_lost_keys(lab: &mut Lab) {
    lab.san.kill_target();
    lab.san.start_target(Memory::Forgets).unwrap();
    let lost = lab
        .b
        .until("inspect", LIMIT, |seen| {
            seen["keys"] == serde_json::json!([])
        })
        .unwrap();
    assert_eq!(lost["holder"], Value::Null);
    let told = lab.b.must("repair 2 15").unwrap();
    assert_eq!(told["keys"], serde_json::json!([key(2, 15)]));
    println!(
        "MEASURED san: repair of lost registrations {} us",
        number(&told, "us")
    );
    let told = lab.a.ask("repair 1 13").unwrap();
    assert!(error(&told).contains("has taken over"), "{told}");
    let seen = lab
        .a
        .until("inspect", LIMIT, |seen| seen["may_write"] == false);
    assert_eq!(seen.unwrap()["holder"], key(2, 15));
    write(&mut lab.b, 5, 20);
    let (told, range) = stop(&mut lab.b, 5);
    assert_eq!(number(&told, "refused"), 0, "{told}");
    nothing_else_failed(&told);
    lab.acknowledged.push(range);
}

fn refuses_a_stranger(lab: &mut Lab) {
    lab.b.must("release 2 15").unwrap();
    lab.a.must("stranger deadbeef").unwrap();
    for command in [
        "acquire 2 16",
        "register 2 16",
        "takeover 2 16",
        "drill 2 16",
    ] {
        let told = lab.b.ask(command).unwrap().to_string();
        assert!(told.contains("0x00000000deadbeef"), "{command}: {told}");
    }
    assert_eq!(
        lab.a.must("inspect").unwrap()["may_write"],
        true,
        "it was left alone"
    );
    let told = lab.b.must("acquire 2 16 force").unwrap();
    cut_off(&told, "0x00000000deadbeef");
    assert_eq!(lab.a.must("inspect").unwrap()["may_write"], false);
    lab.b.must("release 2 16").unwrap();
    takes_a_unit_from_a_stranger(lab);
}

/// A start of a VM with an operator's word about strangers, as `quorate storage take` records it: it is for those that were
/// seen and no others.
fn takes_a_unit_from_a_stranger(lab: &mut Lab) {
    lab.a.must("stranger deadbeef").unwrap();
    for words in ["", " busy", " feedface"] {
        let told = lab.b.ask(&format!("vm own 2 17 17 in{words}")).unwrap();
        assert_eq!(told["kind"], "refused", "{told}");
        let text = error(&told);
        assert!(text.contains("0x00000000deadbeef"), "{told}");
        assert!(text.contains("quorate storage take"), "{told}");
    }
    assert_eq!(lab.a.must("inspect").unwrap()["may_write"], true);
    lab.b.must("vm own 2 17 17 in feedface deadbeef").unwrap();
    let seen = lab.a.must("inspect").unwrap();
    assert_eq!(seen["keys"], serde_json::json!([key(2, 17)]));
    assert_eq!(seen["may_write"], false);
    lab.b.must("vm leave 2").unwrap();
}

/// libiscsi's tests of persistent reservations: what our own stand on conforms.
#[test]
fn the_target_passes_libiscsis_tests_of_reservations() {
    let Some((_dir, mut san)) = san(64) else {
        return;
    };
    san.start_target(Memory::Keeps).unwrap();
    let url = format!("iscsi://{TARGET_ADDRESS}/{TARGET_IQN}/1");
    let mut verdicts = Vec::new();
    for (suite, tests) in [
        ("PrinReadKeys", 2),
        ("PrinServiceactionRange", 1),
        ("PrinReportCapabilities", 1),
        ("ProutRegister", 1),
        ("ProutReserve", 13),
        ("ProutClear", 1),
        ("ProutPreempt", 1),
    ] {
        let test = format!("SCSI.{suite}");
        let arguments = [
            "--dataloss",
            "-i",
            TOOLS[0],
            "-I",
            TOOLS[1],
            "-t",
            &test,
            &url,
        ];
        let said = san.run_tool("iscsi-test-cu", &arguments).unwrap();
        println!("{said}");
        let told = verdicts_of(suite, &said);
        assert_eq!(told.len(), tests, "{suite} did not run to its end");
        verdicts.extend(told);
    }
    let names = |wanted| -> Vec<&str> {
        let those = verdicts.iter().filter(|(_, verdict)| *verdict == wanted);
        those.map(|(name, _)| name.as_str()).collect()
    };
    let (failed, skipped) = (names(Ran::Failed), names(Ran::Skipped));
    println!(
        "MEASURED san: libiscsi's PERSISTENT RESERVE tests on LIO: {} passed, {} failed {failed:?}, {} skipped {skipped:?}",
        names(Ran::Passed).len(),
        failed.len(),
        skipped.len()
    );
    assert_eq!((failed.len(), skipped.len()), (0, 0));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ran {
    Passed,
    Failed,
    Skipped,
}

/// What the tool says of each test: a line `Test: NAME ...passed`, whose end may be on a later line, after
/// notes of the test. One that was skipped counts as passed there, and says so in such a note.
fn verdicts_of(suite: &str, said: &str) -> Vec<(String, Ran)> {
    let suites = said.split("Suite: ").nth(1).unwrap_or_default();
    let summary = suites.split("Run Summary").next().unwrap_or_default();
    let tests = summary.split("  Test: ").skip(1);
    tests
        .map(|text| {
            let name = text.split_whitespace().next().unwrap_or_default();
            let ran = if text.contains("[SKIPPED]") {
                Ran::Skipped
            } else if text.contains("passed") && !text.contains("FAILED") {
                Ran::Passed
            } else {
                Ran::Failed
            };
            (format!("{suite}.{name}"), ran)
        })
        .collect()
}

#[test]
fn the_tools_verdicts_are_read() {
    let said = "    [SKIPPED] REPORT_SUPPORTED_OPCODES is not implemented.\n\nSuite: S\n  Test: A ...passed\n  \
        Test: B ...    [INFO] a note\npassed\n  Test: C ...FAILED\n    1. x.c:1\n  Test: D ...    [SKIPPED] none\npassed\n\n\
        Run Summary: Type Total Ran Passed Failed\n";
    let told: Vec<Ran> = verdicts_of("S", said)
        .into_iter()
        .map(|(_, ran)| ran)
        .collect();
    assert_eq!(told, [Ran::Passed, Ran::Passed, Ran::Failed, Ran::Skipped]);
    assert!(verdicts_of("S", "iscsi login failed").is_empty());
}
