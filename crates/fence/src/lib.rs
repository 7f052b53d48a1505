//! Power fencing: making sure that a host is off, and saying so only when it is.
//!
//! Owns: the trait [`PowerFence`], the driver [`AgentFence`] that runs standard `fence_*`
//! agents, a fake one, storage fencing at a SAN ([`target`]), and [`watchdog`]s, which end a host that no longer looks after
//! itself.
//!
//! Always holds:
//! - **unknown is not off.** [`PowerOffConfirmed`] exists only after an agent accepted `off`
//!   *and afterwards* reported the status off, for every device of a level; a timeout, an
//!   odd exit code or an unreachable device is an error that says what happened;
//! - an agent gets its parameters on standard input, never as arguments, and no secret among
//!   them appears in an error, a log line or a debug print;
//! - an agent that outlives its time is killed with everything it started, and what it
//!   writes is bounded.
//!
//! Must not: build a fence proof. It returns evidence; the crate `membership` judges it.

mod agent;
mod error;
pub mod fake;
mod metadata;
mod model;
mod runner;
pub mod target;
pub mod watchdog;

use tokio::time::Instant;

pub use agent::{AgentFence, InstalledAgent};
pub use error::{Attempt, FenceError, Outcome, Phase};
pub use fake::FakeFence;
pub use metadata::{AgentMetadata, AgentParameter};
pub use model::{DeviceHealth, FenceDevice, FenceLevel, FencePlan, PowerOffConfirmed, PowerState};

/// Cuts the power of hosts and asks for it.
#[async_trait::async_trait]
pub trait PowerFence: Send + Sync + 'static {
    /// Switches the host off and confirms it: level by level, until one has succeeded with
    /// all its devices or the deadline is near.
    ///
    /// # Errors
    /// When off was not confirmed; the host must then be taken for running.
    async fn fence_off(
        &self,
        plan: &FencePlan,
        deadline: Instant,
    ) -> Result<PowerOffConfirmed, FenceError>;

    /// Asks one device whether its outlet is on.
    ///
    /// # Errors
    /// When the device cannot say.
    async fn power_state(
        &self,
        device: &FenceDevice,
        deadline: Instant,
    ) -> Result<PowerState, FenceError>;

    /// Checks that every device of the plan can be reached, in order, without changing
    /// anything: a device that is found broken only when it is needed has no worth.
    async fn health(&self, plan: &FencePlan, deadline: Instant) -> Vec<DeviceHealth>;
}
