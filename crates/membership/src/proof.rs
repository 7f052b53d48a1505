//! Proof that a host no longer runs a VM.
//!
//! Always holds: a [`FenceProof`] made in this program came out of [`FenceProof::from_evidence`]
//! or the [`crate::LeaseTable`], with the evidence kept inside for `explain`. (Deserialising one
//! is possible, because a committed command carries it; only the leader's own code proposes them.)

use crate::Instant;
use quorate_types::{BootId, Epoch, HostName, Millis, PoolName, VmName};
use serde::{Deserialize, Serialize};

/// Kinds of proof, strongest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofKind {
    /// The owner said, durably, that it stopped the VM.
    StoppedByOwner,
    /// Power is off, confirmed by a status query after the `off`.
    PowerOff,
    /// Write access to every disk of the VM was taken away and verified.
    StorageCut,
    /// The lease ran out on a host whose guard and watchdog are armed.
    LeaseExpired,
    /// A person stood in front of the machine and said so.
    OperatorConfirmed,
}

impl std::fmt::Display for ProofKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::StoppedByOwner => "stopped-by-owner",
            Self::PowerOff => "power-off",
            Self::StorageCut => "storage-cut",
            Self::LeaseExpired => "lease-expired",
            Self::OperatorConfirmed => "operator-confirmed",
        })
    }
}

/// What a fence agent did and said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerOffEvidence {
    /// The agent that was run.
    pub agent: String,
    /// `off` was accepted.
    pub off_accepted: bool,
    /// The status asked for after it.
    pub status_after: String,
    /// How long both took.
    pub took: Millis,
}

/// What was observed about a host or about one VM on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// The host reports that `vm` is closed up to `closed`: durable in its ledger.
    Closed {
        /// Which VM.
        vm: VmName,
        /// Highest epoch it will never run again.
        closed: Epoch,
    },
    /// A fence agent's work.
    Power(PowerOffEvidence),
    /// The lease: `silence` since the last grant, which had to be longer than `bound`.
    Lease {
        /// The life of the host that held it, as far as known.
        boot: Option<BootId>,
        /// Time since the last possible grant.
        silence: Millis,
        /// Lease + watchdog bound + drift.
        bound: Millis,
    },
    /// An operator's word.
    Operator {
        /// Who said it.
        who: String,
    },
    /// The host's access to the disks of one VM was taken away, and looked at afterwards.
    StorageCut {
        /// Which VM.
        vm: VmName,
        /// Its epoch when that was ordered.
        epoch: Epoch,
        /// Every disk of it.
        disks: Vec<DiskCut>,
    },
}

/// One disk that a host can no longer write to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCut {
    /// The disk's pool.
    pub pool: PoolName,
    /// The disk's image in it.
    pub image: String,
    /// How it was done and what was seen afterwards, as a sentence.
    pub how: String,
    /// A look afterwards found neither a right to write nor a session.
    pub verified: bool,
    /// How long it took.
    pub took: Millis,
}

/// Why evidence proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// `off` refused, or the status afterwards is not `off`.
    #[error(
        "fence agent {agent} does not prove that {host} is off: status after `off` is `{status}`"
    )]
    NotOff {
        /// The host.
        host: HostName,
        /// The agent.
        agent: String,
        /// What it said.
        status: String,
    },
    /// Not silent for long enough.
    #[error("the lease of {host} may still be valid: silent for {silence}, proof needs {bound}")]
    LeaseRuns {
        /// The host.
        host: HostName,
        /// Time since the last grant.
        silence: Millis,
        /// Time needed.
        bound: Millis,
    },
    /// A VM without disks, or a disk that was not looked at after the cut.
    #[error("{host} may still write to the disks of {vm}: {why}")]
    NotCut {
        /// The host.
        host: HostName,
        /// The VM.
        vm: VmName,
        /// What is missing.
        why: String,
    },
}

/// Proof that `host` no longer runs guests (or no longer runs one VM) and will not again without
/// a new order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceProof {
    host: HostName,
    kind: ProofKind,
    evidence: Evidence,
}

impl FenceProof {
    /// Weighs the evidence. Fails when it proves nothing.
    pub fn from_evidence(host: HostName, evidence: Evidence) -> Result<Self, ProofError> {
        let kind = match &evidence {
            Evidence::Closed { .. } => ProofKind::StoppedByOwner,
            Evidence::Power(power) => {
                if !power.off_accepted || power.status_after != "off" {
                    return Err(ProofError::NotOff {
                        host,
                        agent: power.agent.clone(),
                        status: power.status_after.clone(),
                    });
                }
                ProofKind::PowerOff
            }
            Evidence::Lease { silence, bound, .. } => {
                if silence <= bound {
                    return Err(ProofError::LeaseRuns {
                        host,
                        silence: *silence,
                        bound: *bound,
                    });
                }
                ProofKind::LeaseExpired
            }
            Evidence::Operator { .. } => ProofKind::OperatorConfirmed,
            Evidence::StorageCut { vm, disks, .. } => {
                if let Some(why) = not_cut(disks) {
                    let vm = vm.clone();
                    return Err(ProofError::NotCut { host, vm, why });
                }
                ProofKind::StorageCut
            }
        };
        Ok(Self {
            host,
            kind,
            evidence,
        })
    }

    /// The host that it is about.
    pub fn host(&self) -> &HostName {
        &self.host
    }

    /// Its kind.
    pub fn kind(&self) -> ProofKind {
        self.kind
    }

    /// What it rests on.
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    /// Whether it proves that `host` does not run `vm` under `epoch` (or an older one).
    pub fn covers(&self, host: &HostName, vm: &VmName, epoch: Epoch) -> bool {
        if self.host != *host {
            return false;
        }
        match &self.evidence {
            Evidence::Closed {
                vm: closed_vm,
                closed,
            } => closed_vm == vm && *closed >= epoch,
            Evidence::Lease { silence, bound, .. } => silence > bound,
            Evidence::Power(power) => power.off_accepted && power.status_after == "off",
            Evidence::Operator { .. } => true,
            Evidence::StorageCut {
                vm: cut_vm,
                epoch: cut_epoch,
                disks,
            } => cut_vm == vm && *cut_epoch >= epoch && not_cut(disks).is_none(),
        }
    }

    /// Whether it holds for a VM that has these disks: a cut must be one of every disk.
    pub fn covers_disks<'d>(
        &self,
        disks: impl IntoIterator<Item = (&'d PoolName, &'d str)>,
    ) -> bool {
        let Evidence::StorageCut { disks: cut, .. } = &self.evidence else {
            return true;
        };
        let mut disks = disks.into_iter();
        disks.all(|(pool, image)| {
            cut.iter()
                .any(|disk| disk.pool == *pool && disk.image == image)
        })
    }

    /// The one VM that it is about; absent: all of the host.
    pub fn vm(&self) -> Option<&VmName> {
        match &self.evidence {
            Evidence::Closed { vm, .. } | Evidence::StorageCut { vm, .. } => Some(vm),
            Evidence::Power(_) | Evidence::Lease { .. } | Evidence::Operator { .. } => None,
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        match &self.evidence {
            Evidence::Closed { closed, .. } => {
                format!(
                    "{} stopped it (epoch {closed} closed in its ledger)",
                    self.host
                )
            }
            Evidence::Power(power) => format!(
                "{} switched {} off and confirmed it in {}",
                power.agent, self.host, power.took
            ),
            Evidence::Lease { silence, bound, .. } => format!(
                "{} was silent for {silence}; its guard and watchdog end its guests within {bound}",
                self.host
            ),
            Evidence::Operator { who } => format!("{who} confirmed that {} is dead", self.host),
            Evidence::StorageCut { disks, .. } => {
                let took = disks.iter().map(|disk| disk.took.0).max();
                let how = disks.first().map_or("", |disk| disk.how.as_str());
                format!(
                    "{} was cut off from all {} of its disks in {} ({how})",
                    self.host,
                    disks.len(),
                    Millis(took.unwrap_or(0))
                )
            }
        }
    }
}

/// Span between two instants as evidence needs it.
pub(crate) fn silence(now: Instant, since: Instant) -> Millis {
    now.since(since)
}

/// Why a cut of these disks proves nothing.
fn not_cut(disks: &[DiskCut]) -> Option<String> {
    if disks.is_empty() {
        return Some("it has none, so nothing can be cut".to_owned());
    }
    let open = disks.iter().find(|disk| !disk.verified)?;
    Some(format!(
        "{} in pool {}: {}",
        open.image, open.pool, open.how
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostName {
        HostName::new("h1").unwrap()
    }

    fn vm() -> VmName {
        VmName::new("db").unwrap()
    }

    #[test]
    fn unknown_power_is_not_off() {
        for (accepted, status) in [(true, "unknown"), (false, "off"), (true, "on"), (true, "")] {
            let evidence = Evidence::Power(PowerOffEvidence {
                agent: "fence_x".into(),
                off_accepted: accepted,
                status_after: status.into(),
                took: Millis(5),
            });
            assert!(
                FenceProof::from_evidence(host(), evidence).is_err(),
                "{accepted} {status}"
            );
        }
    }

    #[test]
    fn a_closed_epoch_covers_only_its_vm_and_older_epochs() {
        let evidence = Evidence::Closed {
            vm: vm(),
            closed: Epoch(4),
        };
        let proof = FenceProof::from_evidence(host(), evidence).unwrap();
        assert!(proof.covers(&host(), &vm(), Epoch(4)));
        assert!(proof.covers(&host(), &vm(), Epoch(3)));
        assert!(!proof.covers(&host(), &vm(), Epoch(5)));
        assert!(!proof.covers(&host(), &VmName::new("app").unwrap(), Epoch(4)));
        assert!(!proof.covers(&HostName::new("h2").unwrap(), &vm(), Epoch(4)));
    }

    #[test]
    fn a_cut_covers_one_vm_and_only_with_every_disk() {
        let disk = |image: &str, verified| DiskCut {
            pool: PoolName::new("san").unwrap(),
            image: image.into(),
            how: "access removed, no session left".into(),
            verified,
            took: Millis(7),
        };
        let evidence = |disks| Evidence::StorageCut {
            vm: vm(),
            epoch: Epoch(4),
            disks,
        };
        for bad in [vec![], vec![disk("a", true), disk("b", false)]] {
            assert!(FenceProof::from_evidence(host(), evidence(bad)).is_err());
        }
        let good = evidence(vec![disk("a", true), disk("b", true)]);
        let proof = FenceProof::from_evidence(host(), good).unwrap();
        assert_eq!(proof.kind(), ProofKind::StorageCut);
        assert!(proof.covers(&host(), &vm(), Epoch(4)));
        assert!(!proof.covers(&host(), &vm(), Epoch(5)));
        assert!(!proof.covers(&host(), &VmName::new("app").unwrap(), Epoch(4)));
        let san = PoolName::new("san").unwrap();
        assert!(proof.covers_disks([(&san, "a"), (&san, "b")]));
        assert!(!proof.covers_disks([(&san, "a"), (&san, "c")]));
    }

    #[test]
    fn a_lease_that_may_run_proves_nothing() {
        let lease = |silence| Evidence::Lease {
            boot: None,
            silence: Millis(silence),
            bound: Millis(2525),
        };
        assert!(FenceProof::from_evidence(host(), lease(2525)).is_err());
        assert!(FenceProof::from_evidence(host(), lease(2526)).is_ok());
    }
}
