//! The keeper, while leaders change.

use super::*;
use crate::tests::{FakeGroup, Site, host, leading};
use quorate_controller_logic::cut_job;
use quorate_state::{Action, GuestAbi, Plan, PlannedAction, Reason};
use quorate_types::{Manifest, PoolName, VmName};
use std::sync::atomic::Ordering;

/// Says that every door is shut. While it is asked, this host loses the leadership to another one, which cuts h2 off, and
/// gets it back.
struct Meanwhile {
    group: Arc<FakeGroup>,
    cut: bool,
    opened: Mutex<Vec<String>>,
}

#[async_trait]
impl StorageGate for Meanwhile {
    async fn shut(&self, door: &Door, _: Duration) -> Shut {
        let one = |_: &String| Ok((String::new(), 1));
        door.targets.iter().map(one).collect()
    }
    async fn open(&self, door: &Door, _: Duration) -> Result<Vec<String>, String> {
        self.opened.lock().unwrap().push(door.initiator.clone());
        Ok(Vec::new())
    }
    async fn look(&self, door: &Door, _: Duration) -> Result<Vec<bool>, String> {
        if self.cut {
            let pools = BTreeSet::from([PoolName::new("san").unwrap()]);
            let cut = Command::CutStorage {
                host: host(2),
                pools,
            };
            self.group.apply(cut).unwrap();
            self.group.leading.send_replace(leading(3));
        }
        Ok(vec![false; door.targets.len()])
    }
}

async fn opened(cut: bool) -> usize {
    let group = FakeGroup::new();
    with_a_san(&group);
    let gate = Arc::new(Meanwhile {
        group: group.clone(),
        cut,
        opened: Mutex::default(),
    });
    let keeper = Keeper {
        gate: gate.clone(),
        group,
        turn: Arc::default(),
        kept: Arc::default(),
        term: 1,
    };
    keeper.run(Restorable::new()).await;
    gate.opened.lock().unwrap().len()
}

/// A VM `db` with a disk on a SAN.
fn with_a_san(group: &FakeGroup) {
    let manifest = serde_json::json!({
        "pools": { "san": { "kind": "iscsi", "portals": ["192.0.2.9"], "target": "iqn.2026-01.com.example:s",
                            "access": { "tgt": {} } } },
        "vms": { "db": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "db" }] } },
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    let base = None;
    group
        .apply(Command::ApplyManifest { base, manifest })
        .unwrap();
}

/// Opens every door, of a SAN that does not have the target of a disk.
struct OneIsMissing;

#[async_trait]
impl StorageGate for OneIsMissing {
    async fn shut(&self, door: &Door, _: Duration) -> Shut {
        let one = |_: &String| Ok((String::new(), 1));
        door.targets.iter().map(one).collect()
    }
    async fn open(&self, _: &Door, _: Duration) -> Result<Vec<String>, String> {
        Ok(vec!["the SAN has no such target".to_owned()])
    }
    async fn look(&self, door: &Door, _: Duration) -> Result<Vec<bool>, String> {
        Ok(vec![false; door.targets.len()])
    }
}

#[tokio::test]
async fn a_disk_that_is_missing_keeps_no_host_shut_out() {
    let group = FakeGroup::new();
    with_a_san(&group);
    let pools = BTreeSet::from([PoolName::new("san").unwrap()]);
    let host = host(2);
    group.apply(Command::CutStorage { host, pools }).unwrap();
    let cuts = group.state().storage_cuts.clone();
    assert_eq!(cuts.len(), 1);
    let kept = Arc::new(Mutex::new(Keeping::default()));
    let keeper = Keeper {
        gate: Arc::new(OneIsMissing),
        group: group.clone(),
        turn: Arc::default(),
        kept: Arc::clone(&kept),
        term: 1,
    };
    keeper.run(cuts).await;
    assert!(group.state().storage_cuts.is_empty(), "it is let in again");
    let told = kept.lock().unwrap().problems().to_vec();
    assert_eq!(told, ["pool san: the SAN has no such target"]);
}

#[tokio::test]
async fn a_keeper_of_an_earlier_term_opens_nothing() {
    assert_eq!(opened(false).await, 2);
    assert_eq!(opened(true).await, 0);
}

/// `db` is started on h2, behind the door of its disk.
fn with_an_owner(group: &FakeGroup) {
    with_a_san(group);
    let action = Action::Start {
        vm: VmName::new("db").unwrap(),
        host: host(2),
        abi: GuestAbi {
            machine: "pc-q35-10.0".into(),
            cpu_model: "qemu64".into(),
        },
    };
    let reason = Reason::default();
    let plan = Plan {
        base: group.state().revision,
        actions: vec![PlannedAction { action, reason }],
    };
    group.apply(Command::CommitPlan(plan)).unwrap();
}

#[tokio::test]
async fn a_cut_that_may_still_be_recorded_is_told_from_one_that_is_not() {
    let group = FakeGroup::new();
    with_an_owner(&group);
    let (done, mut ended) = mpsc::channel(1);
    let mut storage = Storage::new(Arc::new(OneIsMissing), group.clone(), done);
    for (silent, known) in [(true, false), (false, true)] {
        group.silent.store(silent, Ordering::SeqCst);
        let job = cut_job(&group.state(), &host(2)).unwrap();
        assert!(storage.start(job, Instant(0)));
        let finished = ended.recv().await.unwrap();
        assert_eq!(storage.finished(finished, Instant(0)), known);
        storage.forget(&host(2));
    }
}

/// Otherwise a seal ends some seconds after its host is heard again.
#[tokio::test]
async fn a_host_gets_no_lease_while_a_cut_of_it_may_still_be_recorded() {
    let site = Site::new().await;
    with_an_owner(&site.group);
    site.group.silent.store(true, Ordering::SeqCst);
    site.until("h2 is cut off", |site| {
        let _ = site.beat(1);
        !site.group.state().storage_cuts.is_empty()
    })
    .await;
    let end = tokio::time::Instant::now() + Duration::from_secs(7);
    while tokio::time::Instant::now() < end {
        let _ = site.beat(1);
        let reply = site.beat(2).unwrap();
        assert_eq!(reply.granted_ms, 0, "{reply:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
