//! What a supervisor is asked and what it answers: one line of JSON each way.

use serde::{Deserialize, Serialize};

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Only the status.
    Status,
    /// Power on: the host boots and starts its daemon.
    On,
    /// Power cut: every process ends at once, cables without carrier.
    Off,
    /// Stops processes (SIGSTOP).
    Pause {
        /// Which.
        who: Who,
    },
    /// Lets them go on (SIGCONT).
    Resume {
        /// Which.
        who: Who,
    },
    /// Starts the daemon, and again whenever it ends.
    StartDaemon,
    /// Ends the daemon and leaves it so; guests go on.
    StopDaemon {
        /// SIGKILL instead of SIGTERM.
        hard: bool,
    },
    /// Ends the daemon and starts it again.
    RestartDaemon {
        /// SIGKILL instead of SIGTERM.
        hard: bool,
    },
    /// Kills some of the host's processes (SIGKILL), the power stays on.
    Kill {
        /// Which.
        who: Who,
    },
    /// Power cut, then the supervisor ends.
    Finish,
}

/// Some of a host's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// All of them.
    #[default]
    All,
    /// The daemon.
    Daemon,
    /// The guard.
    Guard,
    /// The guests.
    Qemu,
}

/// A host's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// Running.
    On,
    /// Without power: what a fence agent's `status` calls off.
    Off,
    /// Ended by its watchdog and hanging: its power is on, but nothing runs.
    Dead,
}

/// Answer to any request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// Why the request was not obeyed.
    pub error: Option<String>,
    /// The host after it.
    pub status: HostStatus,
}

/// A host as its supervisor sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostStatus {
    /// Name.
    pub host: String,
    /// Power.
    pub power: Power,
    /// This life of the host.
    pub boot: String,
    /// The daemon's process.
    pub daemon_pid: Option<i32>,
    /// Times that the daemon ended by itself in this life.
    pub daemon_deaths: u32,
    /// Processes of the host.
    pub processes: usize,
    /// Of these, guests.
    pub guests: usize,
    /// Of all processes, those that are stopped.
    pub paused: usize,
    /// Timeout of the armed watchdog.
    pub watchdog_ms: Option<u64>,
    /// Times that the watchdog ended the host since the lab came up.
    pub watchdog_fired: u32,
}
