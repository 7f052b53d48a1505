//! Settings of the whole cluster, in the manifest's `cluster:` section.
//!
//! Always holds after [`ClusterSettings::check`]: the timing rules of the lease protocol are
//! consistent, so that a host stops its guests before anyone may start them elsewhere.

use crate::policy::{Admission, Balancing, Preemption};
use crate::{HostName, Millis};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The cluster's settings; every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSettings {
    /// Timing of heartbeats and leases.
    pub lease: LeaseTimings,
    /// Most voters of the consensus group: 1, 3 or 5.
    pub max_voters: u32,
    /// A voter that is silent for this long is replaced by a learner, if there is one.
    pub replace_voter_after: Millis,
    /// Migrations at the same time from or to one host.
    pub parallel_migrations: u32,
    /// Migrations at the same time in the whole cluster: they share its network; 0 means unlimited.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_migrations: u32,
    /// Most virtual CPUs of a host, in percent of its CPU threads: 100 promises each a thread of its own; 0 means
    /// no hard limit (crowded hosts only count as worse).
    #[serde(skip_serializing_if = "is_zero")]
    pub cpu_overcommit_percent: u32,
    /// Running guests may be moved, live, to make room for a VM that has none.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub make_room: bool,
    /// Never declare more than this share of the hosts dead on lease evidence within one lease, in percent.
    pub max_fence_percent: u32,
    /// Migration bandwidth of one migration in MiB/s; 0 means unlimited.
    pub migration_mib_per_s: u64,
    /// Power fencing devices by host.
    pub fencing: BTreeMap<HostName, Vec<FenceDevice>>,
    /// Room kept for failures.
    pub admission: Admission,
    /// Whether a VM that finds no room may have others of lower priority stopped.
    pub preemption: Preemption,
    /// Evening out load between hosts.
    pub balancing: Balancing,
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            lease: LeaseTimings::default(),
            max_voters: 5,
            replace_voter_after: Millis::secs(60),
            parallel_migrations: 2,
            total_migrations: 0,
            cpu_overcommit_percent: 0,
            make_room: false,
            max_fence_percent: 50,
            migration_mib_per_s: 0,
            fencing: BTreeMap::new(),
            admission: Admission::default(),
            preemption: Preemption::default(),
            balancing: Balancing::default(),
        }
    }
}

/// Timing of the lease protocol. See ARCHITECTURE.md, "Leases".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseTimings {
    /// Time between two heartbeats of a host.
    pub heartbeat: Millis,
    /// How long one acknowledged heartbeat lets a host run guests.
    pub duration: Millis,
    /// How long before the end of the lease the guests are frozen.
    pub freeze_before: Millis,
    /// Upper bound for the watchdog to end a host whose guard hangs. A host whose watchdog is slower reports
    /// its own, larger bound, and that one counts.
    pub watchdog_bound: Millis,
    /// Clock drift between hosts that is allowed for, in parts per thousand.
    pub drift_permille: u32,
}

impl Default for LeaseTimings {
    fn default() -> Self {
        Self {
            heartbeat: Millis(200),
            duration: Millis(2000),
            freeze_before: Millis(250),
            watchdog_bound: Millis(500),
            drift_permille: 10,
        }
    }
}

impl LeaseTimings {
    /// The documented `fast` profile: a lease of 1 s. Network outages above about 0.6 s freeze guests.
    pub const FAST: Self = Self {
        heartbeat: Millis(100),
        duration: Millis(1000),
        freeze_before: Millis(200),
        watchdog_bound: Millis(300),
        drift_permille: 10,
    };

    /// Checks the order of the deadlines; the message says which rule is broken and how to mend it.
    pub fn check(&self) -> Result<(), String> {
        let rule = |good: bool, text: &str| if good { Ok(()) } else { Err(text.to_owned()) };
        rule(
            self.heartbeat.0 >= 20,
            "lease.heartbeat must be at least 20ms",
        )?;
        rule(
            self.duration.0 <= 600_000,
            "lease.duration must be at most 10m",
        )?;
        rule(
            self.drift_permille <= 100,
            "lease.drift_permille must be at most 100",
        )?;
        rule(
            self.watchdog_bound.0 >= 100,
            "lease.watchdog_bound must be at least 100ms",
        )?;
        rule(
            self.freeze_before.0 >= 50,
            "lease.freeze_before must be at least 50ms",
        )?;
        rule(
            self.duration.0 >= self.heartbeat.0 * 3 + self.freeze_before.0,
            "lease.duration must be at least 3 heartbeats plus lease.freeze_before, or a single lost heartbeat freezes guests",
        )
    }

    /// The margin for clock drift over `span` (rounded up).
    #[must_use]
    pub fn drift(&self, span: Millis) -> Millis {
        Millis((span.0 * u64::from(self.drift_permille)).div_ceil(1000))
    }
}

impl ClusterSettings {
    /// Checks the settings by themselves; the message names the field and says how to mend it.
    pub fn check(&self) -> Result<(), String> {
        self.lease.check()?;
        if !matches!(self.max_voters, 1 | 3 | 5) {
            return Err(
                "max_voters must be 1, 3 or 5 (an even number survives no more failures)".into(),
            );
        }
        if !(1..=100).contains(&self.max_fence_percent) {
            return Err("max_fence_percent must be from 1 to 100".into());
        }
        if !(1..=64).contains(&self.parallel_migrations) {
            return Err("parallel_migrations must be from 1 to 64".into());
        }
        self.admission.check()?;
        self.balancing.check()
    }
}

/// One way to cut a host's power: a standard fence agent with its parameters.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceDevice {
    /// The agent's program: `fence_ipmilan` (searched in PATH) or an absolute path.
    pub agent: String,
    /// Parameters as the agent takes them on its standard input (`ip`, `username`, `plug`, ...).
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// How long `off` and its confirmation may take.
    #[serde(default = "default_fence_timeout")]
    pub timeout: Millis,
}

fn default_fence_timeout() -> Millis {
    Millis::secs(20)
}

impl std::fmt::Debug for FenceDevice {
    /// Without the options: they hold passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FenceDevice")
            .field("agent", &self.agent)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_profiles_are_consistent() {
        assert_eq!(LeaseTimings::default().check(), Ok(()));
        assert_eq!(LeaseTimings::FAST.check(), Ok(()));
        assert_eq!(ClusterSettings::default().check(), Ok(()));
    }

    #[test]
    fn a_lease_too_short_for_its_heartbeat_is_refused() {
        let bad = LeaseTimings {
            duration: Millis(500),
            ..LeaseTimings::default()
        };
        assert!(bad.check().is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        let device = FenceDevice {
            agent: "fence_x".into(),
            options: [("password".to_owned(), "hunter2".to_owned())].into(),
            timeout: Millis::secs(1),
        };
        assert!(!format!("{device:?}").contains("hunter2"));
    }
}
