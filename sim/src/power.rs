//! Fence devices.

use quorate_membership::{FenceProof, Instant};

/// The device that can switch one host off.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bmc {
    /// Time that `off` and its confirmation take.
    pub(crate) delay: u64,
    /// How often it fails.
    pub(crate) fail_permille: u64,
    /// It does not answer at all.
    pub(crate) dead: bool,
}

/// How fencing a host stands on a leader.
#[derive(Debug, Clone)]
pub(crate) enum Attempt {
    Running,
    Failed { at: Instant },
    Off(FenceProof),
}
