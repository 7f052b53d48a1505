//! Power fencing for the controller, by standard fence agents.

use async_trait::async_trait;
use quorate_controller::PowerSwitch;
use quorate_membership::PowerOffEvidence;
use quorate_types::HostName;
use quorate_types::settings::FenceDevice;

/// Runs fence agents.
pub(crate) struct Agents;

#[async_trait]
impl PowerSwitch for Agents {
    async fn off(&self, host: &HostName, devices: &[FenceDevice]) -> Result<PowerOffEvidence, String> {
        super::wiring::power_off(host, devices).await
    }
}
