//! The driver that runs standard fence agents.
//!
//! The contract (FenceAgentAPI): options as `name=value` lines on standard input, among them
//! `action`; `off` ends with 0 when the agent believes that the host is off; `status` ends
//! with 0 for on, 2 for off, and anything else for "I do not know"; `monitor` ends with 0 when
//! the device answers.
//!
//! ```text
//!  level 1: every device at once:  off --0--> status --2--> confirmed   (all: done)
//!                                   |          | 0: ask again, a little later
//!                                   |          `-- else: ask again, a little later
//!                                   `-- else: again, at most OFF_TRIES times
//!  time of the level over, or a device failed --> level 2 ...
//! ```
//! A level may use its devices' timeout, but never so much that the levels after it would get
//! less than their share of the deadline.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::runner::{self, Run};
use crate::{
    AgentMetadata, Attempt, DeviceHealth, FenceDevice, FenceError, FencePlan, Outcome, Phase,
    PowerFence, PowerOffConfirmed, PowerState,
};

/// How often `off` is asked of one device, at most.
const OFF_TRIES: u32 = 3;

/// The pause after a failed `off`.
const OFF_PAUSE: Duration = Duration::from_millis(300);

/// The first and the longest pause between two questions for the status.
const POLL_FIRST: Duration = Duration::from_millis(50);
const POLL_LONGEST: Duration = Duration::from_secs(1);

const EXIT_OK: i32 = 0;
const EXIT_STATUS_OFF: i32 = 2;

/// Runs the fence agents that are installed on this host.
#[derive(Debug, Clone)]
pub struct AgentFence {
    folders: Vec<PathBuf>,
}

/// An agent found on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstalledAgent {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

impl Default for AgentFence {
    fn default() -> Self {
        Self::new()
    }
}

impl AgentFence {
    /// Looks for agents in PATH, and where packages put them in any case.
    pub fn new() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let usual = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
        Self::with_folders(std::env::split_paths(&path).chain(usual))
    }

    /// Looks for agents in these folders, in this order.
    pub fn with_folders(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut unique = Vec::new();
        for folder in folders {
            if folder.is_absolute() && !unique.contains(&folder) {
                unique.push(folder);
            }
        }
        Self { folders: unique }
    }

    /// The agents that are installed, by name.
    pub fn installed(&self) -> Vec<InstalledAgent> {
        let mut found = BTreeMap::new();
        for folder in &self.folders {
            let Ok(entries) = fs::read_dir(folder) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name();
                if let Some(name) = name.to_str()
                    && name.starts_with("fence_")
                    && is_executable(&entry.path())
                {
                    // The first folder wins, as it does when the agent is run.
                    found.entry(name.to_owned()).or_insert(entry.path());
                }
            }
        }
        let agent = |(name, path)| InstalledAgent { name, path };
        found.into_iter().map(agent).collect()
    }

    /// Asks an agent what it is and which options it takes.
    ///
    /// # Errors
    /// When it is missing or does not answer.
    pub async fn metadata(
        &self,
        agent: &str,
        deadline: Instant,
    ) -> Result<AgentMetadata, FenceError> {
        let device = FenceDevice {
            agent: agent.to_owned(),
            options: BTreeMap::new(),
            timeout: Duration::MAX,
        };
        let run = self.ask(&device, "metadata", deadline).await?;
        match failure(&run, deadline_ms(deadline)) {
            None => Ok(AgentMetadata::parse(&run.stdout)),
            Some(outcome) => Err(device_error(&device, Phase::Metadata, outcome)),
        }
    }

    fn find(&self, agent: &str) -> Result<PathBuf, FenceError> {
        let missing = || FenceError::AgentMissing {
            agent: agent.to_owned(),
        };
        let path = Path::new(agent);
        if path.is_absolute() {
            return is_executable(path)
                .then(|| path.to_owned())
                .ok_or_else(missing);
        }
        if path.file_name() != Some(OsStr::new(agent)) {
            return Err(FenceError::BadAgentName {
                agent: agent.to_owned(),
            });
        }
        let mut candidates = self.folders.iter().map(|folder| folder.join(agent));
        candidates
            .find(|path| is_executable(path))
            .ok_or_else(missing)
    }

    /// Runs the agent once. An error means that it was not run.
    async fn ask(
        &self,
        device: &FenceDevice,
        action: &str,
        deadline: Instant,
    ) -> Result<Run, FenceError> {
        let program = self.find(&device.agent)?;
        let input = input(device, action)?;
        let secrets = device.secrets();
        runner::run(&program, &[], input, &secrets, runner::KEPT_MAX, deadline)
            .await
            .map_err(|error| device_error(device, phase_of(action), Outcome::not_run(&error)))
    }

    /// As [`Self::ask`], where whatever goes wrong is an outcome.
    async fn attempt(
        &self,
        device: &FenceDevice,
        action: &str,
        deadline: Instant,
    ) -> Result<Run, Outcome> {
        self.ask(device, action, deadline)
            .await
            .map_err(|error| match error {
                FenceError::Device { outcome, .. } => outcome,
                other => Outcome::NotRun {
                    reason: other.to_string(),
                },
            })
    }

    /// Switches one device off and waits until it says so.
    async fn device_off(
        &self,
        device: &FenceDevice,
        until: Instant,
    ) -> Result<(), (Phase, Outcome)> {
        let budget_ms = deadline_ms(until);
        let mut last = Outcome::TimedOut {
            after_ms: budget_ms,
            output: String::new(),
        };
        let mut accepted = false;
        for try_number in 1..=OFF_TRIES {
            let run = self
                .attempt(device, "off", until)
                .await
                .map_err(|outcome| (Phase::Off, outcome))?;
            match failure(&run, budget_ms) {
                None => {
                    accepted = true;
                    break;
                }
                Some(outcome) => last = outcome,
            }
            if try_number == OFF_TRIES || Instant::now() + OFF_PAUSE >= until {
                break;
            }
            sleep(OFF_PAUSE).await;
        }
        if !accepted {
            return Err((Phase::Off, last));
        }
        self.confirm_off(device, until)
            .await
            .map_err(|outcome| (Phase::Confirm, outcome))
    }

    /// Asks for the status until it is off or time is up. What it last answered is the outcome, not that the question
    /// after that was cut short.
    async fn confirm_off(&self, device: &FenceDevice, until: Instant) -> Result<(), Outcome> {
        let budget_ms = deadline_ms(until);
        let mut pause = POLL_FIRST;
        let mut answered = None;
        loop {
            let run = self.attempt(device, "status", until).await?;
            let outcome = match state(&run) {
                Some(PowerState::Off) => return Ok(()),
                Some(PowerState::On) => Outcome::StillOn,
                None => unknown(&run, budget_ms),
            };
            let outcome = match (&outcome, answered) {
                (Outcome::TimedOut { .. }, Some(earlier)) => earlier,
                _ => outcome,
            };
            answered = Some(outcome.clone());
            if Instant::now() + pause >= until {
                return Err(outcome);
            }
            sleep(pause).await;
            pause = (pause * 2).min(POLL_LONGEST);
        }
    }

    /// Uses all devices of a level at once; every one must confirm.
    async fn level_off(
        &self,
        devices: &[FenceDevice],
        level: usize,
        until: Instant,
    ) -> Result<(), Vec<Attempt>> {
        let mut tasks = JoinSet::new();
        for device in devices.iter().cloned() {
            let fence = self.clone();
            tasks.spawn(async move {
                let until = until.min(Instant::now() + device.timeout);
                let result = fence.device_off(&device, until).await;
                (device.agent, result)
            });
        }
        let mut failed = Vec::new();
        while let Some(joined) = tasks.join_next().await {
            let (agent, phase, outcome) = match joined {
                Ok((_, Ok(()))) => continue,
                Ok((agent, Err((phase, outcome)))) => (agent, phase, outcome),
                Err(error) => {
                    let reason = format!("its task failed: {error}");
                    (String::from("?"), Phase::Off, Outcome::NotRun { reason })
                }
            };
            failed.push(Attempt {
                level,
                agent,
                phase,
                outcome,
            });
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(failed)
        }
    }

    async fn device_health(
        &self,
        device: &FenceDevice,
        level: usize,
        deadline: Instant,
    ) -> DeviceHealth {
        let begin = Instant::now();
        let until = deadline.min(begin + device.timeout);
        let result = self.state_within(device, until).await;
        let mut problem = result.as_ref().err().map(ToString::to_string);
        // Without a status nothing is ever confirmed, so the device is broken either way;
        // but whether it answers at all tells the operator where to look.
        if let (Err(FenceError::Device { outcome, .. }), Some(problem)) = (&result, &mut problem)
            && matches!(outcome, Outcome::Failed { .. })
            && let Ok(run) = self.attempt(device, "monitor", until).await
            && run.code == Some(EXIT_OK)
        {
            problem.push_str("; it does answer `monitor`, so look at `plug` first");
        }
        DeviceHealth {
            level,
            agent: device.agent.clone(),
            state: result.ok(),
            problem,
            took_ms: begin.elapsed().as_millis() as u64,
        }
    }

    async fn state_within(
        &self,
        device: &FenceDevice,
        until: Instant,
    ) -> Result<PowerState, FenceError> {
        let budget_ms = deadline_ms(until);
        let run = self.ask(device, "status", until).await?;
        state(&run).ok_or_else(|| device_error(device, Phase::Status, unknown(&run, budget_ms)))
    }
}

#[async_trait::async_trait]
impl PowerFence for AgentFence {
    async fn fence_off(
        &self,
        plan: &FencePlan,
        deadline: Instant,
    ) -> Result<PowerOffConfirmed, FenceError> {
        let begin = Instant::now();
        let started_unix_ms = unix_ms();
        // A level without devices would confirm by saying nothing.
        let levels: Vec<_> = (1..)
            .zip(&plan.levels)
            .filter(|(_, level)| !level.devices.is_empty())
            .collect();
        if levels.is_empty() {
            return Err(FenceError::NoDevices {
                host: plan.host.clone(),
            });
        }
        let mut attempts = Vec::new();
        for (done, (number, level)) in levels.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / u32::try_from(levels.len() - done).unwrap_or(1);
            let until = Instant::now() + share;
            match self.level_off(&level.devices, *number, until).await {
                Ok(()) => {
                    return Ok(PowerOffConfirmed {
                        host: plan.host.clone(),
                        level: *number,
                        agents: level.devices.iter().map(|d| d.agent.clone()).collect(),
                        started_unix_ms,
                        finished_unix_ms: unix_ms(),
                        took_ms: begin.elapsed().as_millis() as u64,
                    });
                }
                Err(failed) => {
                    for attempt in &failed {
                        tracing::warn!(host = plan.host, %attempt, "fencing failed");
                    }
                    attempts.extend(failed);
                }
            }
        }
        Err(FenceError::NotConfirmed {
            host: plan.host.clone(),
            attempts,
        })
    }

    async fn power_state(
        &self,
        device: &FenceDevice,
        deadline: Instant,
    ) -> Result<PowerState, FenceError> {
        let until = deadline.min(Instant::now() + device.timeout);
        self.state_within(device, until).await
    }

    async fn health(&self, plan: &FencePlan, deadline: Instant) -> Vec<DeviceHealth> {
        let mut tasks = JoinSet::new();
        let mut place = 0_usize;
        for (number, level) in (1..).zip(&plan.levels) {
            for device in &level.devices {
                let (fence, device) = (self.clone(), device.clone());
                tasks.spawn(async move {
                    (place, fence.device_health(&device, number, deadline).await)
                });
                place += 1;
            }
        }
        let mut all: BTreeMap<usize, DeviceHealth> = BTreeMap::new();
        while let Some(joined) = tasks.join_next().await {
            all.extend(joined.ok());
        }
        all.into_values().collect()
    }
}

/// What the agent reads.
fn input(device: &FenceDevice, action: &str) -> Result<String, FenceError> {
    let bad = |option: &str, reason| FenceError::BadOption {
        agent: device.agent.clone(),
        option: option.to_owned(),
        reason,
    };
    let mut text = format!("action={action}\n");
    for (name, value) in &device.options {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(bad(
                name,
                "has a name with other characters than letters, digits, `_`, `-` and `.`",
            ));
        }
        if matches!(name.as_str(), "action" | "option") {
            return Err(bad(name, "is chosen by Quorate: remove it"));
        }
        if value.contains(['\n', '\r', '\0']) {
            return Err(bad(name, "has a value with a line break"));
        }
        text.push_str(&format!("{name}={value}\n"));
    }
    Ok(text)
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn phase_of(action: &str) -> Phase {
    match action {
        "off" => Phase::Off,
        "monitor" => Phase::Monitor,
        "metadata" => Phase::Metadata,
        _ => Phase::Status,
    }
}

/// What a run for `status` says; `None` is "unknown", which is never off.
fn state(run: &Run) -> Option<PowerState> {
    match run.code {
        Some(EXIT_OK) => Some(PowerState::On),
        Some(EXIT_STATUS_OFF) => Some(PowerState::Off),
        _ => None,
    }
}

fn failure(run: &Run, budget_ms: u64) -> Option<Outcome> {
    (run.code != Some(EXIT_OK)).then(|| unknown(run, budget_ms))
}

fn unknown(run: &Run, budget_ms: u64) -> Outcome {
    let output = run.shown.clone();
    if run.timed_out {
        Outcome::TimedOut {
            after_ms: budget_ms,
            output,
        }
    } else {
        Outcome::Failed {
            code: run.code,
            output,
        }
    }
}

fn device_error(device: &FenceDevice, phase: Phase, outcome: Outcome) -> FenceError {
    FenceError::Device {
        agent: device.agent.clone(),
        phase,
        outcome,
    }
}

/// Milliseconds from now until the deadline.
fn deadline_ms(deadline: Instant) -> u64 {
    deadline
        .saturating_duration_since(Instant::now())
        .as_millis() as u64
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}
