//! The facade: one raft node of this process.
//!
//! Owns the node's tasks and ends them. What always holds: every call is bounded by a deadline, and what a
//! call returns after a storage failure is `Stopped`, never success. It must not be asked to interpret
//! commands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use openraft::error::{CheckIsLeaderError, ClientWriteError, InitializeError, RaftError};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::timeout;

use crate::clock::{BootTime, Newest};
use crate::driver::{self, Shared};
use crate::error::{BarrierError, BootstrapError, HandleError, OpenError, ProposeError};
use crate::fault::FaultCell;
use crate::log::LogStore;
use crate::log::file::LogFile;
use crate::machine::MachineStore;
use crate::media::{Backend, Media};
use crate::network::Network;
use crate::quiet::Quiet;
use crate::quorum::AckTable;
use crate::serve::Inbound;
use crate::snapshot::{Place, SnapshotStore};
use crate::tenure::Gate;
use crate::types::Raft;
use crate::{Applied, Config, Leadership, LogStatus, NodeId, PeerLink, RaftMethod, StateMachine};

const LOG_FILE: &str = "raft.redb";
/// Proposals in flight at once; the next wait within their deadline.
const PROPOSALS: usize = 256;
const BOOTSTRAP_DEADLINE: Duration = Duration::from_secs(10);
const BARRIER_DEADLINE: Duration = Duration::from_secs(2);

/// A raft node. Clones are handles to the same node.
pub struct Consensus<M> {
    pub(crate) inner: Arc<Inner<M>>,
}

impl<M> Clone for Consensus<M> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

pub(crate) struct Inner<M> {
    pub(crate) shared: Arc<Shared>,
    machine: MachineStore<M>,
    inbound: Inbound,
    proposals: Semaphore,
    max_command_bytes: usize,
    stop: watch::Sender<bool>,
}

impl<M> Drop for Inner<M> {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

impl<M> std::fmt::Debug for Consensus<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consensus")
            .field("node", &self.inner.shared.me)
            .finish_non_exhaustive()
    }
}

impl<M: StateMachine> Consensus<M> {
    /// Opens the node in `config.dir`: restores the newest snapshot into `machine` and applies the committed
    /// rest of the log. A node without a log waits to be bootstrapped or added by a leader.
    ///
    /// # Errors
    /// [`OpenError`] names the file and what to do. Nothing is changed or repaired.
    pub async fn open(
        config: Config,
        machine: M,
        link: Arc<dyn PeerLink>,
    ) -> Result<Self, OpenError> {
        let path = config.dir.join(LOG_FILE);
        let node_id = config.node_id;
        Self::open_on(config, machine, link, move || LogFile::open(&path, node_id)).await
    }

    /// As [`Consensus::open`], on media instead of files. `config.dir` only names them in messages.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open_media(
        config: Config,
        machine: M,
        link: Arc<dyn PeerLink>,
        media: Media,
    ) -> Result<Self, OpenError> {
        let path = config.dir.join(LOG_FILE);
        let node_id = config.node_id;
        let place = Place::Medium(media.snapshot, config.dir.join("snapshot"));
        let log = Backend(media.log);
        let open = move || LogFile::open_with_backend(log, &path, node_id);
        Self::open_in(config, machine, link, open, place).await
    }

    /// As [`Consensus::open`], on the log file that `open_log` opens.
    pub(crate) async fn open_on(
        config: Config,
        machine: M,
        link: Arc<dyn PeerLink>,
        open_log: impl FnOnce() -> Result<LogFile, OpenError> + Send + 'static,
    ) -> Result<Self, OpenError> {
        let place = Place::Dir(config.dir.clone());
        Self::open_in(config, machine, link, open_log, place).await
    }

    async fn open_in(
        config: Config,
        machine: M,
        link: Arc<dyn PeerLink>,
        open_log: impl FnOnce() -> Result<LogFile, OpenError> + Send + 'static,
        place: Place,
    ) -> Result<Self, OpenError> {
        let raft_config = Arc::new(config.openraft()?);
        let acks = Arc::new(AckTable::default());
        let quiet = Arc::new(Quiet::new(BootTime::now()));
        let gate = Gate(config.tenure.clone());
        let fault = FaultCell::gated(gate.clone());
        let (log, machine) = {
            let (acks, fault) = (Arc::clone(&acks), fault.clone());
            tokio::task::spawn_blocking(move || open_files(place, open_log, machine, acks, fault))
                .await
                .map_err(|e| OpenError::Start {
                    reason: e.to_string(),
                })??
        };
        if let Err(e) = check_reach(&log, &machine).await {
            log.close().await;
            return Err(e);
        }
        let network = Network {
            link: Arc::clone(&link),
            me: config.node_id,
            acks: Arc::clone(&acks),
            quiet: Arc::clone(&quiet),
            timings: config.timings,
            gate: gate.clone(),
        };
        let started = Raft::new(
            config.node_id,
            raft_config,
            network,
            log.clone(),
            machine.clone(),
        )
        .await;
        let raft = match started {
            Ok(raft) => raft,
            Err(e) => {
                log.close().await;
                return Err(OpenError::Start {
                    reason: fault.reason().unwrap_or_else(|| e.to_string()),
                });
            }
        };
        let shared = Arc::new(Shared {
            me: config.node_id,
            timings: config.timings,
            raft,
            log,
            link,
            acks,
            // A node that had to win a tenure has waited longer than any election takes.
            contact: Newest::new(match &config.tenure {
                Some(_) => BootTime::LONG_AGO,
                None => BootTime::now(),
            }),
            voted: Newest::new(BootTime::LONG_AGO),
            quiet,
            role: config.role,
            behind: Notify::new(),
            fault,
            leadership: watch::Sender::new(Leadership::default()),
        });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(driver::run(Arc::clone(&shared), stopped.clone()));
        tokio::spawn(driver::flush(Arc::clone(&shared), stopped));
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                machine,
                inbound: Inbound::new(config.max_snapshot_bytes),
                proposals: Semaphore::new(PROPOSALS),
                max_command_bytes: config.max_command_bytes,
                stop,
            }),
        })
    }

    /// Starts a cluster of which this node is the only voter, and waits until it leads.
    ///
    /// # Errors
    /// Refused if this node has a log already.
    pub async fn bootstrap(&self) -> Result<(), BootstrapError> {
        let shared = &self.inner.shared;
        let members = std::collections::BTreeSet::from([shared.me]);
        let mut leadership = self.leadership();
        match shared.raft.initialize(members).await {
            Ok(()) => {}
            Err(RaftError::APIError(
                InitializeError::NotAllowed(_) | InitializeError::NotInMembers(_),
            )) => {
                return Err(BootstrapError::AlreadyInitialised { node: shared.me });
            }
            Err(RaftError::Fatal(e)) => return Err(BootstrapError::Stopped(self.reason(&e))),
        }
        match timeout(BOOTSTRAP_DEADLINE, leadership.wait_for(|l| l.is_self)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(BootstrapError::Stopped(self.reason(&"the node ended"))),
            Err(_) => Err(BootstrapError::NoLeader {
                node: shared.me,
                waited: BOOTSTRAP_DEADLINE,
            }),
        }
    }

    /// Has this node a log, from a bootstrap or from a leader?
    ///
    /// # Errors
    /// The reason why this node has stopped.
    pub async fn is_initialised(&self) -> Result<bool, String> {
        let initialised = self.inner.shared.raft.is_initialized().await;
        initialised.map_err(|e| self.reason(&e))
    }

    /// Replicates a command and waits until it is applied here.
    ///
    /// # Errors
    /// Only after [`ProposeError::OutcomeUnknown`] and [`ProposeError::Stopped`] may the command be applied
    /// nevertheless.
    pub async fn propose(
        &self,
        command: Vec<u8>,
        deadline: Duration,
    ) -> Result<Applied, ProposeError> {
        let shared = &self.inner.shared;
        let until = Instant::now() + deadline;
        let limit = self.inner.max_command_bytes;
        if command.len() > limit {
            return Err(ProposeError::TooLarge {
                bytes: command.len(),
                limit,
            });
        }
        let permit = timeout(deadline, self.inner.proposals.acquire()).await;
        let _permit = permit
            .map_err(|_| ProposeError::Overloaded)?
            .map_err(|_| ProposeError::Overloaded)?;
        if let Some(reason) = shared.fault.reason() {
            return Err(ProposeError::Stopped(reason));
        }
        self.refuse_without_majority()?;
        let left = until.saturating_duration_since(Instant::now());
        let written = timeout(left, shared.raft.client_write(command)).await;
        match written {
            Ok(Ok(response)) => Ok(Applied {
                index: response.log_id.index,
                reply: response.data,
            }),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward)))) => {
                Err(ProposeError::NotLeader {
                    leader: forward.leader_id.filter(|id| *id != shared.me),
                })
            }
            Ok(Err(e)) => Err(ProposeError::Stopped(self.reason(&e))),
            Err(_) => Err(match shared.fault.reason() {
                Some(reason) => ProposeError::Stopped(reason),
                None => ProposeError::OutcomeUnknown { waited: deadline },
            }),
        }
    }

    /// A leader that lost its majority some time ago takes no new commands: they could only pile up.
    fn refuse_without_majority(&self) -> Result<(), ProposeError> {
        let shared = &self.inner.shared;
        let view = shared.view();
        let lost = view.leads
            && shared
                .quorum_time(&view)
                .is_some_and(|at| at.age() > shared.timings.election_max);
        if lost {
            return Err(ProposeError::NotLeader { leader: None });
        }
        Ok(())
    }

    /// Looks at the local machine. It may lag behind the leader; see [`Consensus::barrier`].
    ///
    /// `f` runs under a read lock: it must be short and must not call back into this node.
    pub fn read<R>(&self, f: impl FnOnce(&M) -> R) -> R {
        self.inner.machine.read(f)
    }

    /// Last applied log index; changes after every batch of applied entries.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.inner.machine.watch()
    }

    /// Who leads. A change to `is_self` means that a majority just confirmed this node.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.shared.leadership.subscribe()
    }

    /// On the leader: when the newest request was *sent* that a majority of the voters acknowledged.
    ///
    /// Conservative: not later than the moment when these followers handled it, so any other leader is
    /// elected after it. Counts time while the host is suspended up to this call; use it at once. With this
    /// node as the only voter it is now. `None`: not the leader, or no majority in this term yet.
    pub fn last_quorum_ack(&self) -> Option<Instant> {
        let shared = &self.inner.shared;
        shared.quorum_time(&shared.view())?.to_instant()
    }

    /// Age of [`Consensus::last_quorum_ack`] on CLOCK_BOOTTIME, for callers that count on that clock.
    pub fn quorum_ack_age(&self) -> Option<Duration> {
        let shared = &self.inner.shared;
        shared.quorum_time(&shared.view()).map(BootTime::age)
    }

    /// On the leader: for how long no earlier leader has had a majority, counted from when such a leader *sent* what
    /// this majority answered last; on CLOCK_BOOTTIME. Every lease of an earlier leader has this much behind it. 0 when
    /// it is not known, or this node does not lead.
    pub fn predecessors_silent_for(&self) -> Duration {
        let shared = &self.inner.shared;
        let view = shared.view();
        let since = view.leads.then(|| shared.quiet_since(&view)).flatten();
        since.map_or(Duration::ZERO, BootTime::age)
    }

    /// Confirms the leadership with a majority and waits until everything committed before is applied here.
    ///
    /// Returns the applied index. A [`Consensus::read`] afterwards is linearizable.
    ///
    /// # Errors
    /// If this node does not lead or no majority answers within 2 s.
    pub async fn barrier(&self) -> Result<u64, BarrierError> {
        let shared = &self.inner.shared;
        let work = async {
            loop {
                if let Some(reason) = shared.fault.reason() {
                    return Err(BarrierError::Stopped(reason));
                }
                match shared.raft.get_read_log_id().await {
                    Ok((read, _)) => return Ok(read.map_or(0, |l| l.index)),
                    Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(f))) => {
                        let leader = f.leader_id.filter(|id| *id != shared.me);
                        return Err(BarrierError::NotLeader { leader });
                    }
                    // One round had too few answers; the deadline bounds the rounds.
                    Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_))) => {
                        tokio::time::sleep(shared.timings.heartbeat).await;
                    }
                    Err(RaftError::Fatal(e)) => {
                        return Err(BarrierError::Stopped(self.reason(&e)));
                    }
                }
            }
        };
        let confirmed_and_applied = async {
            let index = work.await?;
            let mut applied = self.applied();
            let reached = applied.wait_for(|a| *a >= index).await;
            reached
                .map(|a| *a)
                .map_err(|_| BarrierError::Stopped(self.reason(&"the node ended")))
        };
        timeout(BARRIER_DEADLINE, confirmed_and_applied)
            .await
            .unwrap_or(Err(BarrierError::NoQuorum {
                waited: BARRIER_DEADLINE,
            }))
    }

    /// Answers a peer's request that arrived over the [`PeerLink`].
    ///
    /// # Errors
    /// To be reported to the peer as a failed call.
    pub async fn handle(&self, method: RaftMethod, body: &[u8]) -> Result<Vec<u8>, HandleError> {
        let inner = &self.inner;
        inner.inbound.handle(&inner.shared, method, body).await
    }

    /// Takes a snapshot soon, whatever the log's length.
    pub async fn take_snapshot(&self) {
        let _ = self.inner.shared.raft.trigger().snapshot().await;
    }

    /// How far the log of this node reaches.
    pub fn log_status(&self) -> LogStatus {
        let metrics = self.inner.shared.raft.data_metrics();
        let m = metrics.borrow();
        LogStatus {
            last: m.last_log.map(|l| l.index),
            applied: m.last_applied.map(|l| l.index),
            snapshot: m.snapshot.map(|l| l.index),
            purged: m.purged.map(|l| l.index),
        }
    }

    /// The fatal error that stopped this node, once there is one. It is never taken back; the process should
    /// report it and end.
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.inner.shared.fault.watch()
    }

    /// How long ago the newest request was sent that each peer answered, in whatever way.
    pub fn heard(&self) -> std::collections::BTreeMap<NodeId, Duration> {
        self.inner.shared.acks.heard()
    }

    /// Identity of this node.
    pub fn node_id(&self) -> NodeId {
        self.inner.shared.me
    }

    /// Stops the node and releases its files. Proposals in flight end with an error.
    pub async fn shutdown(&self) {
        self.inner.stop.send_replace(true);
        if let Err(e) = self.inner.shared.raft.shutdown().await {
            tracing::warn!(error = %e, "the consensus core ended badly");
        }
        let snapshots = Arc::clone(self.inner.machine.snapshots());
        let _ = tokio::task::spawn_blocking(move || snapshots.close()).await;
        self.inner.shared.log.close().await;
    }

    pub(crate) fn reason(&self, otherwise: &impl ToString) -> String {
        let fault = self.inner.shared.fault.reason();
        fault.unwrap_or_else(|| otherwise.to_string())
    }
}

/// Blocking part of [`Consensus::open`].
fn open_files<M: StateMachine>(
    place: Place,
    open_log: impl FnOnce() -> Result<LogFile, OpenError> + Send + 'static,
    machine: M,
    acks: Arc<AckTable>,
    fault: FaultCell,
) -> Result<(LogStore, MachineStore<M>), OpenError> {
    if let Place::Dir(dir) = &place {
        std::fs::create_dir_all(dir).map_err(|source| OpenError::Io {
            path: dir.clone(),
            source,
        })?;
    }
    let log = LogStore::open(open_log, acks, fault.clone())?;
    // Under the lock of the log from here on.
    let restored = SnapshotStore::open_in(place)
        .and_then(|(snapshots, snapshot)| MachineStore::new(machine, snapshots, snapshot, fault));
    match restored {
        Ok(machine) => Ok((log, machine)),
        Err(e) => {
            log.close_blocking();
            Err(e)
        }
    }
}

/// The snapshot must reach at least as far as the log was purged.
async fn check_reach<M: StateMachine>(
    log: &LogStore,
    machine: &MachineStore<M>,
) -> Result<(), OpenError> {
    let purged = log
        .purged()
        .await
        .map_err(|reason| OpenError::Start { reason })?;
    let applied = machine.last_applied();
    match purged {
        Some(purged) if applied < Some(purged) => Err(OpenError::SnapshotBehindLog {
            path: machine.snapshots().path(),
            snapshot: applied.map(|l| l.index),
            purged: purged.index,
        }),
        _ => Ok(()),
    }
}
