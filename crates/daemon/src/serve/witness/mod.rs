//! The disk witness: a third voter whose log lies in a pool, as files ([`files`]) or on a unit of its own ([`raw`]), run by the
//! host that holds the pool's lease for it.
//!
//! ```text
//!   Keeper (thread, lease on the disk) --tenure--> open its log (a new generation) --> Route answers for its node
//!        ^ wants                                              | lost or damaged
//!   Policy (pure) <-- who leads?                              '--> Command::RenewDiskWitness: a newcomer takes its place
//! ```
//!
//! Always holds: the node runs only while the tenure does, and the tenure no longer than the lease; a log is made anew only
//! by a leader who holds the lease, has passed a barrier since, and knows that this node has no vote. A lost
//! or damaged log is never made good under the same number: a vote that was given under it would be forgotten.
//! Why all this: docs/decisions/0015-quorum-for-two-hosts.md.

mod area;
mod check;
mod files;
mod keeper;
mod media;
mod policy;
mod raw;
mod route;

pub(crate) use check::check;
pub(crate) use route::Route;

use super::core::Core;
use super::link::WitnessLink;
use super::machine::Machine;
use area::{Area, AreaError, Prepared};
use files::FileArea;
use keeper::{Keeper, Standing};
use policy::{Moment, Policy};
use quorate_consensus::{Config, Consensus, NodeId, OpenError, Role, Tenure};
use quorate_controller::{Group as _, boot_now};
use quorate_state::{Command, State, Witness};
use quorate_storage::DirectoryConfig;
use quorate_storage::iscsi::session::Peer;
use quorate_types::{HostName, IscsiPool, PoolName, PoolSpec};
use raw::{Peers, RawArea, Source};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::watch;
use tracing::{info, warn};

/// Longest time between two looks at who leads.
const LOOK: Duration = Duration::from_millis(200);
/// A witness that could not be opened is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);
/// Bound for one command to a SAN: shorter than the lease.
const SAN_WITHIN: Duration = Duration::from_millis(1200);
/// Bound for closing the node.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// The disk witness that this host may run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Duty {
    node: NodeId,
    pool: PoolName,
    place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Files { path: String, marker: String },
    Raw { source: Source, slot: u8 },
}

/// What this host may run now, according to the state.
fn duty(state: &State, me: &HostName) -> Option<Duty> {
    let Some(Witness::Disk { node, pool, unit }) = &state.quorum.witness else {
        return None;
    };
    let spec = &state.pools.get(pool)?.spec;
    let host = state.hosts.get(me).filter(|_| spec.is_for(me))?;
    let slot = || unit.as_ref()?.slots.get(&host.node).copied();
    let image = unit.as_ref().map(|unit| unit.image.as_str());
    let place = match (spec, image) {
        (PoolSpec::Directory { path, .. }, None) => Place::Files {
            path: path.clone(),
            marker: state.pool_markers.get(pool)?.clone(),
        },
        (PoolSpec::Block(spec), Some(image)) => Place::Raw {
            source: Source::Device(std::path::Path::new(&spec.path).join(image)),
            slot: slot()?,
        },
        (PoolSpec::Iscsi(spec), Some(image)) => {
            let cluster = &state.cluster.as_ref()?.id;
            let source = Source::Unit {
                peers: peers(state, spec, &spec.initiator(cluster, me)),
                unit: spec.lun_of(image).ok()?,
            };
            Place::Raw {
                source,
                slot: slot()?,
            }
        }
        _ => return None,
    };
    Some(Duty {
        node: *node,
        pool: pool.clone(),
        place,
    })
}

/// The ways to a pool's targets, under this name.
fn peers(state: &State, spec: &IscsiPool, initiator: &str) -> Peers {
    let peer = |portal| Peer {
        portal,
        initiator: initiator.to_owned(),
        login: super::drill::login(state, spec),
        deadline: SAN_WITHIN,
    };
    Peers(spec.portals().map(peer).collect())
}

impl Duty {
    fn area(&self, core: &Core, taken: &Arc<AtomicBool>) -> Area {
        let state = core.state();
        let cluster = state.cluster.as_ref();
        let cluster = cluster.map_or("", |cluster| cluster.id.as_str());
        match &self.place {
            Place::Files { path, marker } => {
                let (pool, me) = (self.pool.as_str(), core.me.as_str());
                let mut pool = DirectoryConfig::new(pool, path, cluster, me);
                pool.expected_id = Some(marker.clone());
                Area::Files(FileArea::new(pool, self.node))
            }
            Place::Raw { source, slot } => {
                let taken = Arc::clone(taken);
                Area::Raw(RawArea::new(
                    source.clone(),
                    cluster,
                    self.node,
                    *slot,
                    taken,
                ))
            }
        }
    }
}

/// Runs until told to stop; then the lease is given back.
pub(crate) async fn run(core: Arc<Core>, mut stop: watch::Receiver<bool>) {
    let mut states = core.states.clone();
    // One writer at a time, whatever changes.
    let taken = Arc::default();
    loop {
        let now = duty(&states.borrow_and_update().clone(), &core.me);
        let Some(now) = now else {
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                _ = stop.wait_for(|stop| *stop) => return,
            }
            continue;
        };
        let mut other = states.clone();
        let changed = async {
            let changed = other.wait_for(|state| duty(state, &core.me).as_ref() != Some(&now));
            changed.await.map(drop).is_ok()
        };
        let go_on = tokio::select! {
            () = attend(&core, &now, &taken) => true,
            go_on = changed => go_on,
            _ = stop.wait_for(|stop| *stop) => false,
        };
        core.route.set_local(None);
        if !go_on {
            return;
        }
    }
}

/// Holds the lease where it should, and runs the node while it is held. Ends never; it may be dropped at any time.
async fn attend(core: &Arc<Core>, duty: &Duty, taken: &Arc<AtomicBool>) {
    let area = duty.area(core, taken);
    let keeper = match Keeper::start(area.clone(), &core.me) {
        Ok(keeper) => keeper,
        Err(error) => {
            warn!(%error, "no thread for the disk witness");
            return std::future::pending().await;
        }
    };
    let mut policy = Policy::default();
    let mut standing = keeper.standing();
    let mut leadership = core.group.leadership();
    let mut running: Option<Running> = None;
    let mut not_before = tokio::time::Instant::now();
    loop {
        let now = standing.borrow_and_update().clone();
        let leader = leadership.borrow_and_update().leader;
        keeper.want(policy.wants(&Moment {
            me: core.group.node(),
            witness: duty.node,
            leader,
            voter: core.group.members().voters.contains(&duty.node),
            holding: now.mine.is_some(),
            vacant: now.vacant,
            now: boot_now(),
        }));
        if running
            .as_ref()
            .is_some_and(|running| !running.goes_on(&now))
        {
            core.route.set_local(None);
            if let Some(running) = running.take() {
                info!(node = duty.node, "the disk witness runs here no more");
                tokio::spawn(running.close());
            }
        }
        if let (None, Some((generation, tenure))) = (&running, &now.mine)
            && tokio::time::Instant::now() >= not_before
        {
            not_before = tokio::time::Instant::now() + AGAIN;
            running = start(core, duty, &area, *generation, tenure).await;
        }
        tokio::select! {
            _ = standing.changed() => {}
            _ = leadership.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// The node, while it runs here.
struct Running {
    consensus: Consensus<Machine>,
    generation: u64,
    tenure: Tenure,
}

impl Running {
    fn goes_on(&self, now: &Standing) -> bool {
        let mine = now.mine.as_ref().map(|(generation, _)| *generation);
        mine == Some(self.generation)
            && self.tenure.holds()
            && self.consensus.failed().borrow().is_none()
    }

    async fn close(self) {
        self.tenure.end();
        // It writes nothing any more: its log is a copy's original by now.
        let _ = tokio::time::timeout(CLOSE_WITHIN, self.consensus.shutdown()).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tenure.end();
    }
}

async fn start(
    core: &Arc<Core>,
    duty: &Duty,
    area: &Area,
    generation: u64,
    tenure: &Tenure,
) -> Option<Running> {
    match open(core, duty, area, generation, tenure).await {
        Ok(Some(consensus)) => {
            info!(node = duty.node, generation, pool = %duty.pool, "the disk witness runs here");
            core.route.set_local(Some(consensus.clone()));
            let old = area.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = old.clean(generation) {
                    warn!(%error, "what the disk witness left behind earlier stays");
                }
            });
            Some(Running {
                consensus,
                generation,
                tenure: tenure.clone(),
            })
        }
        Ok(None) => None,
        Err(Broken::Later(error)) => {
            warn!(error, "the disk witness cannot be opened now");
            None
        }
        Err(Broken::Lost(why)) => {
            warn!(
                why,
                "the disk witness's log is lost: a new one takes its place"
            );
            let command = Command::RenewDiskWitness {
                old: duty.node,
                why,
            };
            if let Err(error) = core.propose("witness", command).await {
                warn!(%error, "that cannot be recorded yet");
            }
            None
        }
    }
}

/// Why the node does not run.
enum Broken {
    /// Perhaps in a moment.
    Later(String),
    /// Never again under this number.
    Lost(String),
}

impl From<AreaError> for Broken {
    fn from(error: AreaError) -> Self {
        match error {
            AreaError::Lost(_) | AreaError::Damaged { .. } => Self::Lost(error.to_string()),
            AreaError::Pool(_)
            | AreaError::Unit(_)
            | AreaError::Io { .. }
            | AreaError::TooSmall { .. }
            | AreaError::Busy(_)
            | AreaError::Over => Self::Later(error.to_string()),
        }
    }
}

impl From<OpenError> for Broken {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Corrupt { .. }
            | OpenError::WrongNode { .. }
            | OpenError::SnapshotCorrupt { .. }
            | OpenError::SnapshotBehindLog { .. } => Self::Lost(error.to_string()),
            _ => Self::Later(error.to_string()),
        }
    }
}

/// Opens the log as the holder of `generation`; `None`: it is for a leader to make it, and this host leads not.
async fn open(
    core: &Arc<Core>,
    duty: &Duty,
    area: &Area,
    generation: u64,
    tenure: &Tenure,
) -> Result<Option<Consensus<Machine>>, Broken> {
    let blocking = |work: Box<dyn FnOnce() -> Result<bool, AreaError> + Send>| async {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| Broken::Later(error.to_string()))?
            .map_err(Broken::from)
    };
    let votes = |core: &Core| core.group.members().voters.contains(&duty.node);
    let at = area.clone();
    let fresh = blocking(Box::new(move || at.is_fresh())).await?;
    if fresh {
        // The lease was held before this barrier: nobody else can have run the node, and got it a vote, since.
        if core.group.barrier().await.is_err() {
            return Ok(None);
        }
        if votes(core) {
            return Err(Broken::Lost("its log is missing".to_owned()));
        }
        if !tenure.holds() {
            return Err(Broken::Later(AreaError::Over.to_string()));
        }
    }
    let (at, right) = (area.clone(), tenure.clone());
    let (tell, told) = tokio::sync::oneshot::channel();
    blocking(Box::new(move || {
        let prepared = at.prepare(generation, &right)?;
        Ok(tell.send(prepared).is_ok())
    }))
    .await?;
    let prepared = told
        .await
        .map_err(|error| Broken::Later(error.to_string()))?;
    let (dir, media) = match prepared {
        Prepared::Dir(dir) => (dir, None),
        Prepared::Media(media, name) => (name, Some(*media)),
    };
    let config = Config {
        role: Role::Witness,
        tenure: Some(tenure.clone()),
        ..Config::new(duty.node, dir)
    };
    let (machine, _states) = Machine::new();
    let link = Arc::new(WitnessLink {
        peers: core.peers.clone(),
        host: core.group.consensus().clone(),
    });
    let consensus = match media {
        None => Consensus::open(config, machine, link).await?,
        Some(media) => Consensus::open_media(config, machine, link, media).await?,
    };
    let known = consensus.is_initialised().await.map_err(Broken::Later)?;
    if !known && votes(core) {
        let _ = tokio::time::timeout(CLOSE_WITHIN, consensus.shutdown()).await;
        return Err(Broken::Lost("its log is empty".to_owned()));
    }
    Ok(Some(consensus))
}
