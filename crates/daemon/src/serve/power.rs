//! Power fencing for the controller, by standard fence agents.

use async_trait::async_trait;
use quorate_controller::PowerSwitch;
use quorate_fence::{AgentFence, FencePlan, PowerFence as _};
use quorate_membership::PowerOffEvidence;
use quorate_types::settings::FenceDevice;
use quorate_types::{HostName, Millis};
use std::time::Duration;

/// Longest time for all devices of a host together.
const LIMIT: Duration = Duration::from_secs(300);

/// Runs fence agents.
pub(crate) struct Agents(AgentFence);

impl Agents {
    /// Agents found in PATH and the usual folders.
    pub(crate) fn new() -> Self {
        Self(AgentFence::new())
    }
}

#[async_trait]
impl PowerSwitch for Agents {
    async fn off(
        &self,
        host: &HostName,
        devices: &[FenceDevice],
    ) -> Result<PowerOffEvidence, String> {
        let total: Duration = devices
            .iter()
            .map(|device| device.timeout.as_duration())
            .sum();
        let device = |device: &FenceDevice| quorate_fence::FenceDevice {
            agent: device.agent.clone(),
            options: device.options.clone(),
            timeout: device.timeout.as_duration(),
        };
        let plan = FencePlan::in_order(host.as_str(), devices.iter().map(device));
        let deadline = tokio::time::Instant::now() + total.min(LIMIT);
        let confirmed = self
            .0
            .fence_off(&plan, deadline)
            .await
            .map_err(|error| error.to_string())?;
        // `fence_off` returns only after a status query has said off.
        Ok(PowerOffEvidence {
            agent: confirmed.agents.join(" and "),
            off_accepted: true,
            status_after: "off".into(),
            took: Millis(confirmed.took_ms),
        })
    }
}
