//! The controller's task around a group that answers as it is told.

use super::*;
use async_trait::async_trait;
use quorate_membership::PowerOffEvidence;
use quorate_state::{Command, Envelope, FORMAT, HostMode, Outcome, State};
use quorate_types::settings::FenceDevice;
use quorate_types::{BootId, ClusterSettings, HostName, Millis, NodeId, Revision, Timestamp};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(20);

pub(crate) fn host(n: u8) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

/// A group of which this node is the leader, in one process.
pub(crate) struct FakeGroup {
    state: Mutex<State>,
    applied: watch::Sender<u64>,
    pub(crate) leading: watch::Sender<Leading>,
    /// Outcomes are not known, although what is proposed is applied.
    pub(crate) silent: AtomicBool,
}

impl FakeGroup {
    pub(crate) fn new() -> Arc<Self> {
        let group = Self {
            state: Mutex::default(),
            applied: watch::channel(0).0,
            leading: watch::channel(leading(1)).0,
            silent: AtomicBool::new(false),
        };
        group
            .apply(Command::CreateCluster {
                id: "c".into(),
                name: "c".into(),
                ca_certificate: String::new(),
                ca_key: String::new(),
                host: host(1),
                address: "192.0.2.1:7".into(),
                settings: ClusterSettings::default(),
            })
            .unwrap();
        group
            .apply(Command::CreateToken {
                hash: "t".into(),
                expires: Timestamp(u64::MAX),
            })
            .unwrap();
        group
            .apply(Command::AdmitHost {
                token: "t".into(),
                host: host(2),
                address: "192.0.2.2:7".into(),
            })
            .unwrap();
        Arc::new(group)
    }

    pub(crate) fn apply(&self, command: Command) -> Result<Outcome, ProposeFailure> {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "test".into(),
            command,
        };
        let result = self.state.lock().unwrap().apply(&envelope);
        self.applied.send_modify(|index| *index += 1);
        Ok(result?)
    }

    fn proposals(&self) -> u64 {
        *self.applied.borrow()
    }
}

pub(crate) fn leading(term: u64) -> Leading {
    Leading {
        leader: Some(1),
        term,
        is_self: true,
    }
}

#[async_trait]
impl Group for FakeGroup {
    fn node(&self) -> NodeId {
        1
    }
    fn state(&self) -> Arc<State> {
        Arc::new(self.state.lock().unwrap().clone())
    }
    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }
    fn leadership(&self) -> watch::Receiver<Leading> {
        self.leading.subscribe()
    }
    fn quorum_ack_age(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
    fn predecessors_silent_for(&self) -> Duration {
        Duration::ZERO
    }
    async fn barrier(&self) -> Result<(), String> {
        Ok(())
    }
    async fn propose(&self, _: &str, command: Command) -> Result<Outcome, ProposeFailure> {
        let result = self.apply(command);
        if self.silent.load(Ordering::SeqCst) {
            return Err(ProposeFailure::Unknown("no answer".into()));
        }
        result
    }
    fn members(&self) -> GroupMembers {
        GroupMembers {
            voters: [1].into(),
            learners: [2].into(),
            ..GroupMembers::default()
        }
    }
    async fn add_learner(&self, _: NodeId) -> Result<(), String> {
        Ok(())
    }
    async fn change_voters(&self, _: BTreeSet<NodeId>) -> Result<(), String> {
        Ok(())
    }
    async fn remove_node(&self, _: NodeId) -> Result<(), String> {
        Ok(())
    }
}

struct NoSwitch;

#[async_trait]
impl PowerSwitch for NoSwitch {
    async fn off(&self, _: &HostName, _: &[FenceDevice]) -> Result<PowerOffEvidence, String> {
        Err("no device".into())
    }
}

struct NoGate;

#[async_trait]
impl StorageGate for NoGate {
    async fn shut(&self, door: &Door, _: Duration) -> Shut {
        let one = |_: &String| Err("no SAN".to_owned());
        door.targets.iter().map(one).collect()
    }
    async fn open(&self, _: &Door, _: Duration) -> Result<Vec<String>, String> {
        Err("no SAN".into())
    }
    async fn look(&self, _: &Door, _: Duration) -> Result<Vec<bool>, String> {
        Err("no SAN".into())
    }
}

pub(crate) struct Site {
    pub(crate) group: Arc<FakeGroup>,
    pub(crate) controller: Controller,
    _stop: watch::Sender<bool>,
}

impl Site {
    pub(crate) async fn new() -> Self {
        let group = FakeGroup::new();
        let (stop, stopped) = watch::channel(false);
        let controller = Controller::start(
            host(1),
            group.clone(),
            Arc::new(NoSwitch),
            Arc::new(NoGate),
            stopped,
        );
        let site = Self {
            group,
            controller,
            _stop: stop,
        };
        site.until("it leads", |site| site.controller.picture().is_some())
            .await;
        site
    }

    pub(crate) async fn until(&self, what: &str, good: impl Fn(&Self) -> bool) {
        let end = tokio::time::Instant::now() + SOON;
        while !good(self) {
            assert!(tokio::time::Instant::now() < end, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn beat(&self, n: u8) -> Option<HeartbeatReply> {
        self.controller.heartbeat(HeartbeatRequest {
            host: host(n),
            boot: BootId("b".into()),
            guard_armed: false,
            watchdog_ms: None,
            applied: Revision(0),
            sequence: 1,
            report: None,
        })
    }
}

#[tokio::test]
async fn a_host_is_not_confirmed_dead_while_an_earlier_leaders_lease_may_run() {
    let site = Site::new().await;
    // Elected a moment ago, and the host was not heard in this term.
    let confirmed = site.controller.confirm_dead(host(2), "bob".into()).await;
    assert!(
        matches!(&confirmed, Err(ControllerError::TooSoon { wait, .. }) if *wait <= Millis(2000)),
        "{confirmed:?}"
    );
    let reply = site.beat(2).unwrap();
    assert!(reply.granted_ms > 0, "it is not sealed: {reply:?}");
    let confirmed = site.controller.confirm_dead(host(2), "bob".into()).await;
    assert!(matches!(confirmed, Err(ControllerError::Alive { .. })));
    let end = boot_now().plus(Millis(2100));
    site.until("the lease ends", |_| boot_now() > end).await;
    let confirmed = site.controller.confirm_dead(host(2), "bob".into()).await;
    assert_eq!(confirmed, Ok(()));
}

#[tokio::test]
async fn an_unknown_outcome_is_settled_although_there_is_nothing_left_to_plan() {
    let site = Site::new().await;
    let _ = site.beat(1);
    // Host 2 is drained and empty: the one plan that there is says so.
    site.group.silent.store(true, Ordering::SeqCst);
    let mode = Command::SetHostMode {
        host: host(2),
        mode: HostMode::Draining,
    };
    site.group.apply(mode).unwrap();
    let empty = |site: &Site| {
        let state = site.group.state();
        state.hosts[&host(2)].mode == HostMode::Maintenance
    };
    let _ = site.beat(2);
    site.until("the plan is applied, unknown to its maker", empty)
        .await;
    let before = site.group.proposals();
    site.group.silent.store(false, Ordering::SeqCst);
    site.until("one more proposal settles it", |site| {
        site.group.proposals() > before
    })
    .await;
    // And only that: nothing is proposed for ever.
    let settled = tokio::time::timeout(SOON, async {
        loop {
            let before = site.group.proposals();
            tokio::time::sleep(Duration::from_millis(700)).await;
            if site.group.proposals() == before {
                return;
            }
        }
    });
    assert!(settled.await.is_ok());
}
