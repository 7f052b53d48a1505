//! What the cluster may do by itself: how much room it keeps for failures, whether it evens out
//! load, whether a VM may push another one out.
//!
//! Always holds: every default is the careful one. Nothing is refused, moved or stopped for the
//! sake of these settings unless somebody asked for it.

use serde::{Deserialize, Serialize};

/// Room kept for failures (`cluster.admission`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admission {
    /// So many hosts may fail at once and every VM still finds a place.
    pub failures: u32,
    /// What happens to a change that would make it fewer.
    pub mode: AdmissionMode,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            failures: 1,
            mode: AdmissionMode::Warn,
        }
    }
}

/// What happens to a change that takes the room for failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdmissionMode {
    /// Nobody looks.
    Off,
    /// It is made, with a warning.
    #[default]
    Warn,
    /// It is refused.
    Refuse,
}

/// Evening out load between hosts (`cluster.balancing`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Balancing {
    /// Whether it is done.
    pub mode: BalancingMode,
    /// A move must take at least this much off the fuller host, in percent of a host, beside what
    /// the move itself costs.
    pub min_gain_percent: u32,
    /// Most moves in an hour.
    pub moves_per_hour: u32,
}

impl Default for Balancing {
    fn default() -> Self {
        Self {
            mode: BalancingMode::Advise,
            min_gain_percent: 10,
            moves_per_hour: 6,
        }
    }
}

/// Whether load is evened out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BalancingMode {
    /// Nobody looks.
    Off,
    /// `quorate status` says which moves would help.
    #[default]
    Advise,
    /// The moves are made, live, one at a time.
    Auto,
}

/// Whether a VM may push others out (`cluster.preemption`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preemption {
    /// Never.
    #[default]
    Off,
    /// A VM that shall start and finds no room has VMs of lower priority stopped.
    LowerPriority,
}

impl Balancing {
    /// Checks the numbers.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(2..=100).contains(&self.min_gain_percent) {
            return Err(
                "balancing.min_gain_percent must be from 2 to 100: with less, VMs would move for nothing"
                    .into(),
            );
        }
        if !(1..=1000).contains(&self.moves_per_hour) {
            return Err(
                "balancing.moves_per_hour must be from 1 to 1000 (`mode: off` ends balancing)"
                    .into(),
            );
        }
        Ok(())
    }
}

impl Admission {
    /// Checks the numbers.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(1..=8).contains(&self.failures) {
            return Err(
                "admission.failures must be from 1 to 8 (`mode: off` ends admission control)"
                    .into(),
            );
        }
        Ok(())
    }
}
