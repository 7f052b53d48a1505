//! Power in memory, for tests of the controller and for the simulator.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use crate::{
    DeviceHealth, FenceDevice, FenceError, FencePlan, PowerFence, PowerOffConfirmed, PowerState,
};

/// Hosts whose power is a value in memory. A device's option `plug` names the host.
#[derive(Debug, Default)]
pub struct FakeFence {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    off: BTreeSet<String>,
    unreachable: BTreeSet<String>,
    calls: BTreeMap<String, u32>,
}

impl FakeFence {
    /// All hosts are on and can be fenced.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the host's devices unreachable, or reachable again.
    pub fn set_unreachable(&self, host: &str, unreachable: bool) {
        self.with(|inner| {
            if unreachable {
                inner.unreachable.insert(host.to_owned());
            } else {
                inner.unreachable.remove(host);
            }
        });
    }

    /// Switches a host on again.
    pub fn power_on(&self, host: &str) {
        self.with(|inner| inner.off.remove(host));
    }

    /// Whether the host is off.
    pub fn is_off(&self, host: &str) -> bool {
        self.with(|inner| inner.off.contains(host))
    }

    /// How often fencing of the host was asked for.
    pub fn calls(&self, host: &str) -> u32 {
        self.with(|inner| inner.calls.get(host).copied().unwrap_or(0))
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut Inner) -> T) -> T {
        use_it(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn state_of(&self, host: &str) -> Result<PowerState, FenceError> {
        self.with(|inner| {
            if inner.unreachable.contains(host) {
                return Err(FenceError::Injected {
                    host: host.to_owned(),
                });
            }
            Ok(if inner.off.contains(host) {
                PowerState::Off
            } else {
                PowerState::On
            })
        })
    }
}

#[async_trait::async_trait]
impl PowerFence for FakeFence {
    async fn fence_off(
        &self,
        plan: &FencePlan,
        _deadline: Instant,
    ) -> Result<PowerOffConfirmed, FenceError> {
        let host = plan.host.clone();
        let Some(level) = plan.levels.first() else {
            return Err(FenceError::NoDevices { host });
        };
        self.with(|inner| *inner.calls.entry(host.clone()).or_default() += 1);
        self.state_of(&host)?;
        self.with(|inner| inner.off.insert(host.clone()));
        Ok(PowerOffConfirmed {
            host,
            level: 1,
            agents: level.devices.iter().map(|d| d.agent.clone()).collect(),
            started_unix_ms: 0,
            finished_unix_ms: 0,
            took_ms: 0,
        })
    }

    async fn power_state(
        &self,
        device: &FenceDevice,
        _deadline: Instant,
    ) -> Result<PowerState, FenceError> {
        self.state_of(device.options.get("plug").map_or("", String::as_str))
    }

    async fn health(&self, plan: &FencePlan, _deadline: Instant) -> Vec<DeviceHealth> {
        let state = self.state_of(&plan.host);
        let mut all = Vec::new();
        for (level, devices) in (1..).zip(&plan.levels) {
            all.extend(devices.devices.iter().map(|device| DeviceHealth {
                level,
                agent: device.agent.clone(),
                state: state.as_ref().ok().copied(),
                problem: state.as_ref().err().map(ToString::to_string),
                took_ms: 0,
            }));
        }
        all
    }
}
