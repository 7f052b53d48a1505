//! What operators ask the leader for: to fence a host now, or to believe that it is dead.
//!
//! Always holds: an operator's word is taken only about a host that was silent for a lease, and only by a leader that
//! has waited for its predecessor's leases; whatever is done seals the host first.

use crate::clock::boot_now;
use crate::controller::{Loop, lock};
use crate::power::Finished;
use quorate_membership::{Evidence, FenceProof};
use quorate_types::{HostName, Millis};
use tokio::sync::oneshot;
use tracing::{info, warn};

/// Where the end of a fencing that an operator asked for is told.
pub(crate) type FenceAnswer = oneshot::Sender<Result<String, ControllerError>>;

/// Why the controller does not do what an operator asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControllerError {
    /// Ask the leader.
    #[error("this host does not lead the cluster")]
    NotLeader,
    /// Not a member.
    #[error("there is no host `{0}`; `quorate host list` shows them")]
    UnknownHost(HostName),
    /// Nothing to fence it with.
    #[error(
        "host {0} has no fence device: add one under `cluster.fencing.{0}` in the manifest, or use `quorate host confirm-dead {0}` once it is switched off"
    )]
    NoDevice(HostName),
    /// It is alive.
    #[error(
        "host {host} is alive (heard {ago} ago): it cannot be confirmed dead; drain it, or switch it off first"
    )]
    Alive {
        /// Which.
        host: HostName,
        /// Last sign of life.
        ago: Millis,
    },
    /// Its lease from an earlier leader may run on.
    #[error(
        "host {host} may still hold a lease of the leader before this one: try again in {wait}"
    )]
    TooSoon {
        /// Which.
        host: HostName,
        /// Until the lease surely has ended.
        wait: Millis,
    },
    /// The fence agent failed.
    #[error("fencing {host} failed: {why}")]
    Fencing {
        /// Which.
        host: HostName,
        /// What it said.
        why: String,
    },
}

/// What operators ask for.
pub(crate) enum Operator {
    Fence(
        HostName,
        String,
        oneshot::Sender<Result<String, ControllerError>>,
    ),
    ConfirmDead(
        HostName,
        String,
        oneshot::Sender<Result<(), ControllerError>>,
    ),
}

impl Loop {
    /// A fencing ended: whoever asked for it is told.
    pub(crate) fn fence_finished(&mut self, finished: Finished) {
        let host = &finished.host.clone();
        let Some(outcome) = self.power.finished(finished, boot_now()) else {
            info!(%host, "power fencing that an earlier leadership began has ended");
            return;
        };
        let answer = match &outcome {
            Ok(proof) => {
                info!(%host, "{}", proof.describe());
                Ok(proof.describe())
            }
            Err(why) => {
                warn!(%host, why, "power fencing failed");
                Err(ControllerError::Fencing {
                    host: host.clone(),
                    why: why.clone(),
                })
            }
        };
        for waiter in self.fence_waiters.remove(host).unwrap_or_default() {
            // A caller that went away does not need the answer.
            let _ = waiter.send(answer.clone());
        }
    }

    /// Carries an operator's order out, or says why not.
    pub(crate) fn operator(&mut self, order: Operator) {
        match order {
            Operator::Fence(host, who, answer) => match self.operator_fence(&host, &who) {
                Ok(()) => self.fence_waiters.entry(host).or_default().push(answer),
                Err(error) => drop(answer.send(Err(error))),
            },
            Operator::ConfirmDead(host, who, answer) => {
                drop(answer.send(self.operator_confirm(&host, who)))
            }
        }
    }

    fn operator_fence(&mut self, host: &HostName, who: &str) -> Result<(), ControllerError> {
        let state = self.inner.group.state();
        if !state.hosts.contains_key(host) {
            return Err(ControllerError::UnknownHost(host.clone()));
        }
        let settings = state.settings();
        let devices = settings
            .fencing
            .get(host)
            .ok_or_else(|| ControllerError::NoDevice(host.clone()))?;
        let mut guard = lock(&self.inner.leases);
        let leases = guard.as_mut().ok_or(ControllerError::NotLeader)?;
        leases.table.seal(host);
        leases.sealed_at.insert(host.clone(), boot_now());
        self.power.forget(host);
        self.power.start(host, devices, boot_now());
        warn!(%host, who, "its power is being cut, as an operator asked for");
        Ok(())
    }

    fn operator_confirm(&mut self, host: &HostName, who: String) -> Result<(), ControllerError> {
        let state = self.inner.group.state();
        if !state.hosts.contains_key(host) {
            return Err(ControllerError::UnknownHost(host.clone()));
        }
        let now = boot_now();
        let mut guard = lock(&self.inner.leases);
        let leases = guard.as_mut().ok_or(ControllerError::NotLeader)?;
        let lease = state.settings().lease.duration;
        if let Some(heard) = leases
            .table
            .heard(host)
            .filter(|heard| now.since(*heard) <= lease)
        {
            return Err(ControllerError::Alive {
                host: host.clone(),
                ago: now.since(heard),
            });
        }
        // A new leader has not heard it yet, and its predecessor may have granted it a lease.
        let wait = leases.elected.plus(lease).since(now);
        if leases.table.heard(host).is_none() && wait > Millis(0) {
            return Err(ControllerError::TooSoon {
                host: host.clone(),
                wait,
            });
        }
        let evidence = Evidence::Operator { who };
        let proof = FenceProof::from_evidence(host.clone(), evidence).map_err(|error| {
            ControllerError::Fencing {
                host: host.clone(),
                why: error.to_string(),
            }
        })?;
        leases.table.seal(host);
        leases.sealed_at.insert(host.clone(), now);
        self.operator_proofs.insert(host.clone(), proof);
        Ok(())
    }
}
