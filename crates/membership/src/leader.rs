//! The leader's side of the leases: one table, volatile, made anew by every leader.
//!
//! Always holds:
//! * a grant ends no later than `last quorum ack + lease`, so a leader that was cut off from the
//!   majority stops granting at once and its last grants end before a new leader judges;
//! * a new leader assumes that every host got a lease at the last moment at which an earlier leader may have had a
//!   majority: its election, or as long before it as its voters had acknowledged nobody;
//! * from the moment a `LeaseExpired` proof is handed out, the host is *sealed*: it gets no lease
//!   until the caller says that the outcome of the commit that used the proof is applied here;
//! * no more than the configured share of the hosts is declared dead on lease evidence within one lease.

use crate::proof::{Evidence, FenceProof, silence};
use crate::{Instant, ProofError};
use quorate_types::{BootId, ClusterSettings, HostName, LeaseTimings, Millis, Revision};
use std::collections::BTreeMap;

/// A heartbeat as the leader sees it.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    /// Who sends.
    pub host: HostName,
    /// This life of the host.
    pub boot: BootId,
    /// A guard holds all its guests.
    pub guard_armed: bool,
    /// The watchdog's bound, when armed.
    pub watchdog: Option<Millis>,
}

/// What a heartbeat is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// The lease, counted by the host from when it sent the heartbeat.
    pub granted: Millis,
    /// The host must have applied this revision before it starts or thaws anything.
    pub revision: Revision,
}

/// Why a heartbeat got no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoGrant {
    /// This leader has not confirmed a majority lately.
    #[error("the leader has not confirmed a majority within its own lease")]
    NotQuorate,
    /// The host is being declared dead; it gets a lease when that is settled.
    #[error("the host is being fenced; it may come back as soon as that is settled")]
    Sealed,
}

/// How a host looks to the leader.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum HostHealth {
    /// Heard of within the lease.
    Up,
    /// Silent for longer than two heartbeats, its lease may still run.
    Suspect,
    /// Its lease ran out; nothing is proven yet.
    Expired,
    /// Its lease and its watchdog's bound ran out: proof can be made.
    Dead,
}

#[derive(Debug, Clone)]
struct Entry {
    boot: Option<BootId>,
    heard: Option<Instant>,
    last_grant: Instant,
    guard_armed: bool,
    watchdog: Option<Millis>,
    sealed: bool,
}

/// Leases of all hosts as one leader knows them.
#[derive(Debug, Clone)]
pub struct LeaseTable {
    timings: LeaseTimings,
    max_fence_percent: u32,
    predecessors: Instant,
    quorum_ack: Option<Instant>,
    hosts: BTreeMap<HostName, Entry>,
    recent_proofs: BTreeMap<HostName, Instant>,
}

impl LeaseTable {
    /// The table of a new leader; earlier leaders granted nothing that counts from after `granted`: the election, or
    /// as much before it as they are known to have had no majority.
    pub fn new(settings: &ClusterSettings, granted: Instant) -> Self {
        Self {
            timings: settings.lease,
            max_fence_percent: settings.max_fence_percent,
            predecessors: granted,
            quorum_ack: None,
            hosts: BTreeMap::new(),
            recent_proofs: BTreeMap::new(),
        }
    }

    /// Takes over settings and the list of hosts. A lease that was granted under a longer duration
    /// runs to its end: a *shorter* duration counts from now on only.
    pub fn configure<'a>(
        &mut self,
        settings: &ClusterSettings,
        hosts: impl Iterator<Item = &'a HostName>,
        now: Instant,
    ) {
        if settings.lease != self.timings {
            let longest = self.timings.duration.max(settings.lease.duration);
            let slack = Millis(longest.0 - settings.lease.duration.0);
            for entry in self.hosts.values_mut() {
                entry.last_grant = entry.last_grant.plus(slack);
            }
        }
        self.timings = settings.lease;
        self.max_fence_percent = settings.max_fence_percent;
        let mut kept = BTreeMap::new();
        for host in hosts {
            let entry = self.hosts.remove(host).unwrap_or_else(|| self.unknown(now));
            kept.insert(host.clone(), entry);
        }
        self.hosts = kept;
    }

    /// A host nothing is known of: another leader may have granted it a lease up to the election.
    fn unknown(&self, now: Instant) -> Entry {
        Entry {
            boot: None,
            heard: None,
            last_grant: now.max(self.predecessors),
            guard_armed: false,
            watchdog: None,
            sealed: false,
        }
    }

    /// The consensus layer confirmed a majority with messages *sent* at `at`.
    pub fn quorum_confirmed(&mut self, at: Instant) {
        self.quorum_ack = self.quorum_ack.max(Some(at));
    }

    /// Whether this leader may grant anything at `now`.
    pub fn is_quorate(&self, now: Instant) -> bool {
        self.quorum_ack
            .is_some_and(|ack| now < ack.plus(self.timings.duration))
    }

    /// A heartbeat was received at `now`; `revision` is what this leader has applied.
    pub fn heartbeat(
        &mut self,
        beat: &Heartbeat,
        revision: Revision,
        now: Instant,
    ) -> Result<Grant, NoGrant> {
        let unknown = self.unknown(self.predecessors);
        let entry = self.hosts.entry(beat.host.clone()).or_insert(unknown);
        entry.boot = Some(beat.boot.clone());
        entry.heard = Some(now);
        entry.guard_armed = beat.guard_armed;
        // A watchdog that has become slower may have been fed under the old bound: keep the larger
        // until a whole lease has passed is not needed, since the bound counts from the last grant.
        entry.watchdog = beat.watchdog;
        if entry.sealed {
            return Err(NoGrant::Sealed);
        }
        let end = self.quorum_ack.map(|ack| ack.plus(self.timings.duration));
        let granted = end
            .map_or(Millis(0), |end| end.since(now))
            .min(self.timings.duration);
        if granted.0 == 0 {
            return Err(NoGrant::NotQuorate);
        }
        entry.last_grant = now;
        self.recent_proofs.remove(&beat.host);
        Ok(Grant { granted, revision })
    }

    /// The bound after a host's last possible grant, past which its guests are surely ended.
    pub fn bound(&self, host: &HostName) -> Millis {
        let watchdog = self.hosts.get(host).and_then(|entry| entry.watchdog);
        let watchdog = watchdog
            .unwrap_or(Millis(0))
            .max(self.timings.watchdog_bound);
        let span = Millis(self.timings.duration.0 + watchdog.0);
        Millis(span.0 + self.timings.drift(span).0)
    }

    /// How a host looks at `now`.
    pub fn health(&self, host: &HostName, now: Instant) -> HostHealth {
        let Some(entry) = self.hosts.get(host) else {
            return HostHealth::Suspect;
        };
        let silent = now.since(entry.last_grant);
        let heard = entry.heard.map(|at| now.since(at));
        if heard.is_some_and(|span| span.0 <= self.timings.heartbeat.0 * 3) && !entry.sealed {
            return HostHealth::Up;
        }
        let lease = Millis(self.timings.duration.0 + self.timings.drift(self.timings.duration).0);
        if silent > self.bound(host) {
            HostHealth::Dead
        } else if silent > lease {
            HostHealth::Expired
        } else {
            HostHealth::Suspect
        }
    }

    /// When `host` can be declared dead at the earliest, if it stays silent.
    pub fn expiry(&self, host: &HostName) -> Option<Instant> {
        let entry = self.hosts.get(host)?;
        Some(entry.last_grant.plus(self.bound(host)).plus(Millis(1)))
    }

    /// When the lease of `host` has run out at the latest, if it stays silent.
    pub fn lapse(&self, host: &HostName) -> Option<Instant> {
        let entry = self.hosts.get(host)?;
        let lease = Millis(self.timings.duration.0 + self.timings.drift(self.timings.duration).0);
        Some(entry.last_grant.plus(lease).plus(Millis(1)))
    }

    /// The earliest moment at which a host that is silent now lapses or expires, for the controller's timer.
    pub fn next_expiry(&self, now: Instant) -> Option<Instant> {
        let hosts = self.hosts.keys();
        let due = hosts.flat_map(|host| [self.lapse(host), self.expiry(host)]);
        due.flatten().filter(|at| *at > now).min()
    }

    /// Milliseconds of lease left for a host as the leader sees it.
    pub fn lease_left(&self, host: &HostName, now: Instant) -> Millis {
        let entry = self
            .hosts
            .get(host)
            .filter(|entry| entry.heard.is_some() && !entry.sealed);
        entry.map_or(Millis(0), |entry| {
            entry.last_grant.plus(self.timings.duration).since(now)
        })
    }

    /// Last heartbeat of a host, if this leader ever heard it.
    pub fn heard(&self, host: &HostName) -> Option<Instant> {
        self.hosts.get(host).and_then(|entry| entry.heard)
    }

    /// Makes a `LeaseExpired` proof and seals the host, or says what is missing.
    ///
    /// `armed_before` is what the replicated state knows of the host's guard and watchdog, for a
    /// leader that never heard the host itself.
    pub fn lease_expired(
        &mut self,
        host: &HostName,
        armed_before: Option<Millis>,
        now: Instant,
    ) -> Result<FenceProof, LeaseProofError> {
        if !self.is_quorate(now) {
            return Err(LeaseProofError::NotQuorate);
        }
        let Some(entry) = self.hosts.get(host) else {
            return Err(LeaseProofError::UnknownHost { host: host.clone() });
        };
        let reported = entry.heard.is_some();
        let armed = if reported {
            entry.guard_armed.then_some(entry.watchdog).flatten()
        } else {
            armed_before
        };
        let Some(watchdog) = armed else {
            return Err(LeaseProofError::NotArmed { host: host.clone() });
        };
        let watchdog = watchdog.max(self.timings.watchdog_bound);
        let span = Millis(self.timings.duration.0 + watchdog.0);
        let bound = Millis(span.0 + self.timings.drift(span).0);
        let silence = silence(now, entry.last_grant);
        self.check_share(host, now)?;
        let evidence = Evidence::Lease {
            boot: entry.boot.clone(),
            silence,
            bound,
        };
        let proof = FenceProof::from_evidence(host.clone(), evidence)?;
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.sealed = true;
        }
        self.recent_proofs.insert(host.clone(), now);
        Ok(proof)
    }

    /// Seals a host by hand: before power is cut, so that it gets no lease while that goes on.
    pub fn seal(&mut self, host: &HostName) {
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.sealed = true;
        }
    }

    /// The commit that used a proof about `host` is applied here (or was refused for good).
    pub fn unseal(&mut self, host: &HostName) {
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.sealed = false;
        }
    }

    /// Whether the host is sealed.
    pub fn is_sealed(&self, host: &HostName) -> bool {
        self.hosts.get(host).is_some_and(|entry| entry.sealed)
    }

    /// A silent host's power or storage is taken away: for the share rule as much as declaring it dead. Tries that follow do
    /// not count again, or a SAN that does not answer would keep the leader from all other hosts.
    pub fn count_fenced(&mut self, host: &HostName, now: Instant) {
        self.recent_proofs.entry(host.clone()).or_insert(now);
    }

    /// The share rule: correlated silence is more often a fault of the network or of this leader
    /// than the death of most hosts at once.
    ///
    /// # Errors
    /// [`LeaseProofError::TooMany`] when `host` would be one too many.
    pub fn check_share(&self, host: &HostName, now: Instant) -> Result<(), LeaseProofError> {
        let window = self.timings.duration;
        let recent = self
            .recent_proofs
            .iter()
            .filter(|(other, at)| *other != host && now.since(**at) <= window)
            .count();
        let all = self.hosts.len().max(1);
        // One host may always be declared dead: in a cluster of two or three, one is a large share.
        let allowed = (all * self.max_fence_percent as usize / 100).max(1);
        if recent + 1 > allowed {
            return Err(LeaseProofError::TooMany {
                host: host.clone(),
                recent,
                allowed,
            });
        }
        Ok(())
    }
}

/// Why no proof can be made of an expired lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseProofError {
    /// The leader itself is not sure to be the leader.
    #[error("this leader has not confirmed a majority: it judges nobody")]
    NotQuorate,
    /// Not a member.
    #[error("{host} is not a host of this cluster")]
    UnknownHost {
        /// The host.
        host: HostName,
    },
    /// An expired lease proves nothing without a guard and a watchdog.
    #[error(
        "{host} has no armed guard and watchdog, so an expired lease proves nothing: configure power fencing for it, or run `quorate host confirm-dead {host}` once you have switched it off"
    )]
    NotArmed {
        /// The host.
        host: HostName,
    },
    /// The share rule.
    #[error(
        "not declaring {host} dead: {recent} hosts fell silent at once, at most {allowed} may be declared dead within one lease"
    )]
    TooMany {
        /// The host.
        host: HostName,
        /// Declared dead within the window.
        recent: usize,
        /// Most that may be.
        allowed: usize,
    },
    /// It may still hold.
    #[error(transparent)]
    Proof(#[from] ProofError),
}
