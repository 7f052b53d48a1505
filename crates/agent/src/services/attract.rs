//! Makes clients' packets find this host: announcements of held addresses, group memberships, the BGP speaker.
//!
//! Always holds: the announcing task sends only while the lease lasts, and begins anew when a lease comes back; the
//! datapath's own check on the uplink stands behind it, for the case that this process hangs in between.

use super::{Services, lock, wanted};
use crate::guard::sys::boottime_ns;
use crate::vm::Shared;
use quorate_balancer::Wanted;
use quorate_network::attract::arp::{Announcer, Held, Sender};
use quorate_network::attract::bgp::{Program, Session, Speaker};
use quorate_network::attract::igmp::Memberships;
use quorate_state::State;
use quorate_types::spec::BgpDaemon;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Sleep when nothing is due; a lease that comes back is noticed after it.
const IDLE: Duration = Duration::from_millis(100);
/// Between two looks for the speaker's watcher.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Tells the tasks what is to be attracted.
pub(super) struct Attract {
    held: watch::Sender<Vec<Held>>,
    groups: Memberships,
    speaker: Option<Speaker>,
    looked: Option<Instant>,
    problems: BTreeMap<&'static str, String>,
}

impl Attract {
    pub(super) fn start(shared: &Arc<Shared>) -> Self {
        let (held, changes) = watch::channel(Vec::new());
        shared.spawn(announce(shared.clone(), changes));
        Self {
            held,
            groups: Memberships::default(),
            speaker: None,
            looked: None,
            problems: BTreeMap::new(),
        }
    }

    /// Takes note of what is in the datapath now.
    pub(super) fn set(&mut self, shared: &Shared, state: &State, wanted: &Wanted) {
        self.held.send_replace(wanted::held(wanted));
        let failed = self.groups.set(wanted::groups(wanted));
        self.problem(
            shared,
            "groups",
            failed.first().map(|(interface, group, error)| {
                format!("the multicast group {group} cannot be joined on {interface}: {error}")
            }),
        );
        let speaker = speaker(state, wanted, shared);
        let services = &shared.services;
        let (speaker, problem) = match speaker {
            Ok(speaker) => (speaker, None),
            Err(problem) => (None, Some(problem)),
        };
        self.problem(shared, "bgp", problem);
        services
            .speaking
            .store(speaker.is_some(), Ordering::Relaxed);
        if self.speaker != speaker || self.looked.is_none() {
            if let Some(desk) = &services.desk
                && let Err(error) = desk.set(speaker.as_ref())
            {
                self.problem(
                    shared,
                    "bgp",
                    Some(format!("the speaker is not told: {error}")),
                );
            }
            self.speaker = speaker;
            self.looked = Some(Instant::now());
            self.start_watcher(shared);
        }
    }

    /// Keeps a watcher at work while there is something to announce.
    pub(super) fn keep_speaker(&mut self, shared: &Shared) {
        if self.speaker.is_some() && self.looked.is_none_or(|at| at.elapsed() >= WATCH_EVERY) {
            self.looked = Some(Instant::now());
            self.start_watcher(shared);
        }
    }

    fn start_watcher(&self, shared: &Shared) {
        let Some(desk) = shared.services.desk.as_ref().filter(|desk| !desk.watched()) else {
            return;
        };
        let mut words = shared.config.speaker_command.iter();
        let (Some(program), Some(_)) = (words.next(), &self.speaker) else {
            return;
        };
        // In a session of its own: it goes on when the daemon is restarted. Its end is collected by a task.
        let spawned = tokio::process::Command::new("setsid")
            .arg(program)
            .args(words)
            .arg(desk.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        match spawned {
            Ok(mut child) => drop(tokio::spawn(async move { child.wait().await })),
            Err(error) => tracing::error!(%error, "the BGP speaker's watcher cannot be started"),
        }
    }

    fn problem(&mut self, shared: &Shared, of: &'static str, problem: Option<String>) {
        match problem {
            Some(problem) => drop(self.problems.insert(of, problem)),
            None => drop(self.problems.remove(of)),
        }
        let first = self.problems.values().next().cloned();
        *lock(&shared.services.attract_problem) = first;
    }
}

/// What this host announces to routers; `None`: nothing.
fn speaker(state: &State, wanted: &Wanted, shared: &Shared) -> Result<Option<Speaker>, String> {
    let routes: BTreeSet<IpAddr> = wanted::routed(wanted).collect();
    if routes.is_empty() {
        return Ok(None);
    }
    let networks = wanted.networks.keys();
    let specs = networks.filter_map(|name| state.networks.get(name)?.spec.bgp.as_ref());
    let mut sessions = Vec::new();
    let mut program = Program::default();
    for spec in specs {
        program = match spec.daemon {
            BgpDaemon::Bird => Program::Bird,
            BgpDaemon::Frr => Program::Frr,
        };
        let hold = spec.hold_time.as_duration().as_secs();
        sessions.extend(spec.neighbors.iter().map(|neighbor| Session {
            neighbor: neighbor.address,
            remote_as: neighbor.asn,
            local_as: spec.asn,
            hold_s: u16::try_from(hold).unwrap_or(u16::MAX),
            bfd: spec.bfd,
        }));
    }
    let router_id = match shared.config.migration_address {
        IpAddr::V4(address) => address,
        // Any number that no other host has: the low bits of its address.
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            [a.max(1), b, c, d].into()
        }
    };
    let speaker = Speaker {
        program,
        router_id,
        sessions,
        routes,
    };
    speaker.check().map_err(|error| error.to_string())?;
    Ok(Some(speaker))
}

async fn announce(shared: Arc<Shared>, mut changes: watch::Receiver<Vec<Held>>) {
    let mut announcer = Announcer::default();
    let mut sender = Sender::default();
    let mut had_lease = false;
    loop {
        let now = || Duration::from_nanos(boottime_ns());
        announcer.hold(changes.borrow_and_update().clone(), now());
        let deadline = Duration::from_nanos(shared.deadline_ns.load(Ordering::Relaxed));
        let lease = now() < deadline;
        if lease && !had_lease {
            announcer.again(now());
        }
        had_lease = lease;
        if lease {
            for held in announcer.due(now()) {
                send(&shared.services, &mut sender, &held);
            }
        }
        let next = announcer.next().filter(|_| lease);
        let wait = next.map_or(IDLE, |at| at.saturating_sub(now())).min(IDLE);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(wait.max(Duration::from_millis(1))) => {}
        }
    }
}

fn send(services: &Services, sender: &mut Sender, held: &Held) {
    let mut failed = None;
    for frame in held.frames() {
        failed = sender.send(&held.uplink, &frame).err().or(failed);
    }
    let mut problem = lock(&services.send_problem);
    match failed {
        Some(error) => {
            let text = format!(
                "{} cannot be announced on {}: {error}",
                held.address, held.uplink
            );
            if problem.as_ref() != Some(&text) {
                tracing::warn!(problem = text, "announcement");
            }
            *problem = Some(text);
        }
        None => *problem = None,
    }
}
