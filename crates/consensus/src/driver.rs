//! Heartbeats, elections with a pre-vote, and what this node says about the leadership.
//!
//! openraft 0.9 has no pre-vote: a follower that is cut off alone would raise its term again and again
//! and, once healed, depose a healthy leader by it (the leader steps down on the higher vote, and the
//! others refuse the newcomer until their lease ran out: 1 to 2 s without a leader). So openraft's own
//! election timer is off, and this task decides when to stand for election:
//!
//! ```text
//!              heard the leader                      majority would vote for me
//!   WAITING <--------------------- ASKING ------------------------------------> openraft elects
//!      | silence for election_min..max ^  |  no majority
//!      +-------------------------------+  +--> WAITING (short, growing pause)
//! ```
//!
//! A leader that is heard but hears nobody (answers get lost) would be a trap: its heartbeats keep the
//! others from electing. So a leader that no majority answers marks its requests, and their receivers say
//! "here" without passing them to raft: the lease on that leader runs out, and another is elected. If the
//! answers come through again first, the very next request counts.
//!
//! A *witness* ([`Role::Witness`]) waits longer than a host does, unless a host asks whose log is shorter than the
//! witness's own: then nobody but the witness can lead, and it stands at once. It leads only until a host has its
//! log ([`crate::witness`]).
//!
//! Asking changes no term and no disk, at either side. What always holds: a node answers "yes" only if it
//! heard no leader for `election_min` itself and the asker's log is at least as long. So while a majority
//! hears a leader, no term grows, however the other links are cut. It must not change raft's rules: the
//! real vote is openraft's, with its own lease check.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::ServerState;
use openraft::error::Fatal;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use crate::clock::{BootTime, Newest};
use crate::codec;
use crate::fault::FaultCell;
use crate::log::LogStore;
use crate::network::{VoteAnswer, VoteHeader};
use crate::quiet::Quiet;
use crate::quorum::AckTable;
use crate::types::{LogId, Raft, StoredMembership, Vote};
use crate::witness::Handover;
use crate::{Leadership, NodeId, PeerLink, RaftMethod, Role, Timings};

const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// What the driver, the server side and the facade share.
pub(crate) struct Shared {
    pub(crate) me: NodeId,
    pub(crate) timings: Timings,
    pub(crate) raft: Raft,
    pub(crate) log: LogStore,
    pub(crate) link: Arc<dyn PeerLink>,
    pub(crate) acks: Arc<AckTable>,
    /// When a leader was heard last.
    pub(crate) contact: Newest,
    /// When this node gave its vote last: the one that has it gets the time to win.
    pub(crate) voted: Newest,
    /// What bounds the leases of earlier leaders.
    pub(crate) quiet: Arc<Quiet>,
    pub(crate) fault: FaultCell,
    pub(crate) leadership: watch::Sender<Leadership>,
    pub(crate) role: Role,
    /// A node whose log is shorter than this one's looks for votes, and nobody leads.
    pub(crate) behind: Notify,
}

/// What openraft reports about itself, copied out of its watch channel.
pub(crate) struct View {
    pub(crate) leads: bool,
    pub(crate) vote: Vote,
    pub(crate) leader: Option<NodeId>,
    pub(crate) membership: Arc<StoredMembership>,
}

impl Shared {
    pub(crate) fn view(&self) -> View {
        let metrics = self.raft.server_metrics();
        let m = metrics.borrow();
        View {
            leads: m.state == ServerState::Leader
                && m.vote.committed
                && m.vote.leader_id.node_id == self.me,
            vote: m.vote,
            leader: m.current_leader,
            membership: Arc::clone(&m.membership_config),
        }
    }

    /// Send time of the newest request that a majority acknowledged, if this node leads.
    pub(crate) fn quorum_time(&self, view: &View) -> Option<BootTime> {
        if !view.leads || self.fault.reason().is_some() {
            return None;
        }
        let at = self
            .acks
            .quorum_time(self.me, view.vote, &view.membership, BootTime::now())?;
        self.quiet.leads(view.vote.leader_id.term, at).then_some(at)
    }

    /// On the leader: no earlier leader had a majority that answered anything sent after this.
    pub(crate) fn quiet_since(&self, view: &View) -> Option<BootTime> {
        let configs = view.membership.membership().get_joint_config().as_slice();
        let alone = configs.iter().all(|config| config.len() == 1);
        self.quiet.since(view.vote.leader_id.term, alone)
    }

    pub(crate) fn current_leadership(&self) -> Leadership {
        let view = self.view();
        let term = view.vote.leader_id.term;
        let fresh = |at: BootTime| at.age() <= self.timings.election_max;
        let leader = if self.fault.reason().is_some() {
            None
        } else if view.leads {
            self.quorum_time(&view)
                .filter(|at| fresh(*at))
                .map(|_| self.me)
        } else {
            view.leader
                .filter(|id| *id != self.me && fresh(self.contact.get()))
        };
        Leadership {
            leader,
            term,
            is_self: leader == Some(self.me),
        }
    }

    /// A request of the leader with this vote is about to be given to raft.
    pub(crate) fn note_request(&self, vote: Vote) {
        // What raft knows may be older here, never newer: then a request too many is noted.
        if vote >= self.view().vote {
            self.quiet.heard(BootTime::now());
        }
    }

    /// Would this node vote for a candidate whose log ends at `last`?
    pub(crate) fn would_vote(&self, last: Option<LogId>) -> bool {
        let view = self.view();
        let leader_heard = if view.leads {
            self.quorum_time(&view)
        } else {
            Some(self.contact.get())
        };
        if leader_heard.is_some_and(|at| at.age() < self.timings.election_min) {
            return false;
        }
        let mine = self.last_log_id();
        if last < mine {
            self.behind.notify_one();
        }
        last >= mine
    }

    pub(crate) fn last_log_id(&self) -> Option<LogId> {
        self.raft.data_metrics().borrow().last_log
    }

    fn publish(&self) {
        let now = self.current_leadership();
        let changed = self.leadership.send_if_modified(|old| {
            let changed = *old != now;
            *old = now;
            changed
        });
        if changed {
            tracing::info!(
                node = self.me,
                leader = now.leader,
                term = now.term,
                "leadership as seen here"
            );
        }
    }

    /// Copies a fatal error of openraft into the fault cell. True if this node has to stop.
    fn has_failed(&self) -> bool {
        let running = self.raft.metrics().borrow().running_state.clone();
        match running {
            Err(Fatal::StorageError(e)) => {
                self.fault.report(e.to_string());
            }
            Err(Fatal::Panicked) => {
                self.fault.report("the consensus core panicked");
            }
            Err(Fatal::Stopped) | Ok(()) => {}
        }
        self.fault.reason().is_some()
    }
}

/// When to stand for election next.
#[derive(Debug)]
struct Patience {
    /// Bounds of the wait after a leader was heard.
    silence: (Duration, Duration),
    since: BootTime,
    wait: Duration,
    refusals: u32,
}

impl Patience {
    /// A witness lets the hosts stand first.
    fn new(timings: &Timings, role: Role) -> Self {
        let silence = match role {
            Role::Host => (timings.election_min, timings.election_max),
            Role::Witness => (
                timings.election_max,
                timings.election_max + timings.election_min,
            ),
        };
        Self {
            silence,
            since: BootTime::now(),
            wait: between(silence.0, silence.1),
            refusals: 0,
        }
    }

    /// Time left until this node should stand for election, given the last word of a leader.
    fn left(&mut self, contact: BootTime) -> Duration {
        if contact > self.since {
            self.since = contact;
            if self.refusals > 0 || self.wait.is_zero() {
                self.refusals = 0;
                self.wait = between(self.silence.0, self.silence.1);
            }
        }
        self.wait.saturating_sub(self.since.age())
    }

    /// Somebody needs what only this node has: no reason to wait longer.
    fn hurry(&mut self) {
        self.wait = Duration::ZERO;
    }

    /// The majority was asked and said no, or did not answer.
    fn refused(&mut self, timings: &Timings) {
        let pause = timings.heartbeat * (1 << self.refusals.min(2));
        self.refusals = self.refusals.saturating_add(1);
        self.since = BootTime::now();
        self.wait = between(pause, pause * 2);
    }

    /// openraft was told to elect; wait for the outcome.
    fn elected(&mut self, timings: &Timings) {
        self.refusals = self.refusals.saturating_add(1);
        self.since = BootTime::now();
        self.wait = between(timings.election_min / 2, timings.election_min);
    }
}

fn between(low: Duration, high: Duration) -> Duration {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let (low, high) = (millis(low), millis(high));
    Duration::from_millis(if low < high {
        rand::random_range(low..high)
    } else {
        low
    })
}

/// Runs until `stop` becomes true or the node failed.
pub(crate) async fn run(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    let mut server = shared.raft.server_metrics();
    let mut fault = shared.fault.watch();
    let mut patience = Patience::new(&shared.timings, shared.role);
    let mut handover = Handover::default();
    let mut heartbeat_at = Instant::now();
    loop {
        shared.publish();
        if *stop.borrow() {
            return;
        }
        if shared.has_failed() {
            shared.publish();
            let _ = shared.raft.shutdown().await;
            return;
        }
        let view = shared.view();
        shared.acks.set_membership(&view.membership);
        let wake = if view.leads {
            patience = Patience::new(&shared.timings, shared.role);
            if Instant::now() >= heartbeat_at {
                if shared.role == Role::Host || handover.speaks(&shared, &view) {
                    let _ = shared.raft.trigger().heartbeat().await;
                }
                heartbeat_at = Instant::now() + shared.timings.heartbeat;
            }
            heartbeat_at
        } else {
            handover = Handover::default();
            let left = stand_if_due(&shared, &view, &mut patience).await;
            Instant::now() + left.min(shared.timings.heartbeat)
        };
        tokio::select! {
            _ = stop.changed() => {}
            _ = fault.changed() => {}
            alive = server.changed() => {
                if alive.is_err() && !*stop.borrow() && !shared.has_failed() {
                    shared.fault.report("the consensus core ended unexpectedly");
                }
            }
            () = shared.acks.news.notified() => {}
            () = shared.behind.notified() => if shared.role == Role::Witness { patience.hurry() },
            () = sleep_until(wake) => {}
        }
    }
}

/// Persists the commit point now and then, so that a restart needs no leader to see the newest state.
pub(crate) async fn flush(shared: Arc<Shared>, mut stop: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            _ = stop.changed() => return,
            () = tokio::time::sleep(FLUSH_INTERVAL) => {}
        }
        if shared.fault.reason().is_some() || shared.log.flush().await.is_err() {
            return;
        }
    }
}

/// Stands for election if the time has come. Returns how long to wait at most.
async fn stand_if_due(shared: &Shared, view: &View, patience: &mut Patience) -> Duration {
    let timings = &shared.timings;
    let configs = view.membership.membership().get_joint_config().as_slice();
    if !configs.iter().any(|c| c.contains(&shared.me)) {
        return timings.heartbeat;
    }
    let alone = configs.iter().all(|c| c.len() == 1);
    let quiet = || shared.contact.get().max(shared.voted.get());
    let left = patience.left(quiet());
    let at_once = alone && patience.refusals == 0;
    if !left.is_zero() && !at_once {
        return left;
    }
    if majority_would_vote(shared, configs).await && (alone || patience.left(quiet()).is_zero()) {
        tracing::info!(
            node = shared.me,
            "no leader heard and a majority agrees: standing for election"
        );
        patience.elected(timings);
        let _ = shared.raft.trigger().elect().await;
    } else {
        patience.refused(timings);
    }
    patience.left(quiet())
}

async fn majority_would_vote(shared: &Shared, configs: &[BTreeSet<NodeId>]) -> bool {
    let mut granted = BTreeSet::from([shared.me]);
    let agreed = |granted: &BTreeSet<NodeId>| {
        configs
            .iter()
            .all(|c| c.intersection(granted).count() > c.len() / 2)
    };
    if agreed(&granted) {
        return true;
    }
    let header = VoteHeader::Ask {
        last: shared.last_log_id(),
    };
    let Ok(body) = codec::frame(&header, &[]) else {
        return false;
    };
    let timeout = shared.timings.request_timeout();
    let others: BTreeMap<NodeId, Vec<u8>> = configs
        .iter()
        .flatten()
        .filter(|id| **id != shared.me)
        .map(|id| (*id, body.clone()))
        .collect();
    let mut answers: FuturesUnordered<_> = others
        .into_iter()
        .map(|(id, body)| async move {
            let call = shared.link.call(id, RaftMethod::Vote, body, timeout);
            let answer = tokio::time::timeout(timeout, call).await;
            let granted = match answer {
                Ok(Ok(reply)) => matches!(
                    codec::unframe(&reply),
                    Ok((VoteAnswer::Ask { granted: true }, _))
                ),
                _ => false,
            };
            (id, granted)
        })
        .collect();
    while let Some((id, yes)) = answers.next().await {
        if yes {
            granted.insert(id);
        }
        if agreed(&granted) {
            return true;
        }
    }
    false
}
