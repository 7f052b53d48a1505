//! What is asked of power fencing and what it reports.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Parts of option names whose values are secret.
const SECRET_WORDS: [&str; 8] = [
    "pass",
    "secret",
    "token",
    "key",
    "community",
    "auth",
    "cookie",
    "credential",
];

/// One agent with its parameters.
#[derive(Clone, PartialEq, Eq)]
pub struct FenceDevice {
    /// The agent: a name such as `fence_ipmilan`, or an absolute path.
    pub agent: String,
    /// Parameters as the agent takes them on its standard input (`ip`, `username`, `plug`, ...);
    /// `action` is not among them.
    pub options: BTreeMap<String, String>,
    /// Longest time for `off` and its confirmation.
    pub timeout: Duration,
}

impl FenceDevice {
    /// The values that must never be shown.
    pub(crate) fn secrets(&self) -> Vec<&str> {
        let secret = |name: &str| SECRET_WORDS.iter().any(|word| name.contains(word));
        let mut secrets: Vec<_> = self
            .options
            .iter()
            .filter(|(name, value)| !value.is_empty() && secret(&name.to_ascii_lowercase()))
            .map(|(_, value)| value.as_str())
            .collect();
        // A longer one first, in case it contains a shorter one.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets
    }
}

impl fmt::Debug for FenceDevice {
    /// Without the values of the options, among which are passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FenceDevice")
            .field("agent", &self.agent)
            .field("options", &self.options.keys().collect::<Vec<_>>())
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// Devices that must *all* confirm, such as the two outlets of a host with two power supplies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FenceLevel {
    /// The devices; they are used at the same time.
    pub devices: Vec<FenceDevice>,
}

/// How one host is switched off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencePlan {
    /// The host.
    pub host: String,
    /// Ways to do it, the preferred one first; the next is tried when one fails.
    pub levels: Vec<FenceLevel>,
}

impl FencePlan {
    /// A plan that tries one device after the other.
    pub fn in_order(host: &str, devices: impl IntoIterator<Item = FenceDevice>) -> Self {
        let level = |device| FenceLevel {
            devices: vec![device],
        };
        Self {
            host: host.to_owned(),
            levels: devices.into_iter().map(level).collect(),
        }
    }
}

/// Whether a host has power, as a device says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PowerState {
    /// It runs.
    On,
    /// It does not.
    Off,
}

/// Evidence that a host is off: `off` was accepted and the status afterwards was off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerOffConfirmed {
    /// The host.
    pub host: String,
    /// Which level of the plan did it, from 1.
    pub level: usize,
    /// The agents that confirmed, all of the level.
    pub agents: Vec<String>,
    /// When fencing began, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// When off was confirmed, in milliseconds since 1970.
    pub finished_unix_ms: u64,
    /// How long it took in all, in milliseconds, on a clock that does not jump.
    pub took_ms: u64,
}

impl PowerOffConfirmed {
    /// The agents in one word, for a report.
    pub fn agent(&self) -> String {
        self.agents.join("+")
    }
}

/// Whether a device would work if it were needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceHealth {
    /// The level it belongs to, from 1.
    pub level: usize,
    /// The agent.
    pub agent: String,
    /// What the device says about the host's power, if it says anything.
    pub state: Option<PowerState>,
    /// What is wrong and what to do about it; `None` when it works.
    pub problem: Option<String>,
    /// How long the answer took, in milliseconds.
    pub took_ms: u64,
}

impl DeviceHealth {
    /// Whether it would work.
    pub fn works(&self) -> bool {
        self.problem.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_known_by_their_names_and_never_printed() {
        let options = [
            ("ip", "10.0.0.1"),
            ("username", "admin"),
            ("password", "hunter2"),
            ("Passwd", "hunter22"),
            ("snmp_priv_passwd", "x1"),
            ("community", "public"),
            ("api_token", "t0k"),
            ("plug", "3"),
            ("password_script", ""),
        ];
        let device = FenceDevice {
            agent: "fence_x".into(),
            options: options.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            timeout: Duration::from_secs(1),
        };
        assert_eq!(
            device.secrets(),
            ["hunter22", "hunter2", "public", "t0k", "x1"]
        );
        let text = format!("{device:?}");
        assert!(text.contains("password") && !text.contains("hunter2"));
    }
}
