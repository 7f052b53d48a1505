//! What can go wrong with fencing, in words the operator can act on.

use std::fmt;
use std::io;

/// What an agent was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Switch the host off.
    Off,
    /// Say whether it is off, after `off` was accepted.
    Confirm,
    /// Say whether it is on, at any other time.
    Status,
    /// Say whether the device can be reached.
    Monitor,
    /// Describe the agent.
    Metadata,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Confirm => "status after off",
            Self::Status => "status",
            Self::Monitor => "monitor",
            Self::Metadata => "metadata",
        })
    }
}

/// How an agent failed. Texts are what it wrote, shortened, with secrets masked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It said that the host is still on when time was up.
    StillOn,
    /// It ended with an exit code that does not mean success.
    Failed {
        /// The exit code; `None` when a signal ended it.
        code: Option<i32>,
        /// What it wrote.
        output: String,
    },
    /// It was killed when its time was up.
    TimedOut {
        /// How long it had, in milliseconds.
        after_ms: u64,
        /// What it wrote.
        output: String,
    },
    /// It could not be run.
    NotRun {
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (text, output) = match self {
            Self::StillOn => return f.write_str("the device says that the host is still on"),
            Self::NotRun { reason } => return f.write_str(reason),
            Self::Failed { code, output } => match code {
                Some(code) => (format!("it ended with code {code}"), output),
                None => ("it was ended by a signal".to_owned(), output),
            },
            Self::TimedOut { after_ms, output } => {
                (format!("no answer within {after_ms} ms"), output)
            }
        };
        f.write_str(&text)?;
        if !output.is_empty() {
            write!(f, " ({output})")?;
        }
        Ok(())
    }
}

/// One failed use of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The level it belongs to, from 1.
    pub level: usize,
    /// The agent.
    pub agent: String,
    /// What it was asked.
    pub phase: Phase,
    /// What came of it.
    pub outcome: Outcome,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (agent, phase, outcome) = (&self.agent, self.phase, &self.outcome);
        write!(f, "level {}, {agent}, {phase}: {outcome}", self.level)
    }
}

/// A failed fencing operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// The host has no fence device.
    #[error(
        "host `{host}` has no fence device: configure one, or run `quorate host confirm-dead {host}` once you have switched it off"
    )]
    NoDevices {
        /// The host.
        host: String,
    },
    /// No level confirmed that the host is off.
    #[error(
        "host `{host}` is not confirmed off, so it may be running: {}; switch it off by hand and run `quorate host confirm-dead {host}`",
        list(.attempts)
    )]
    NotConfirmed {
        /// The host.
        host: String,
        /// What was tried and how it failed, in order.
        attempts: Vec<Attempt>,
    },
    /// The agent is not on this host.
    #[error(
        "fence agent `{agent}` is not installed or not executable: install the package that has it (Debian: fence-agents) on every host"
    )]
    AgentMissing {
        /// The agent.
        agent: String,
    },
    /// The agent's name is neither a plain name nor an absolute path.
    #[error(
        "`{agent}` is not a fence agent: write a name such as `fence_ipmilan`, or an absolute path"
    )]
    BadAgentName {
        /// The name.
        agent: String,
    },
    /// An option cannot be passed to an agent.
    #[error("fence agent `{agent}`: option `{option}` {reason}")]
    BadOption {
        /// The agent.
        agent: String,
        /// The option's name.
        option: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A device did not answer a question.
    #[error(
        "fence agent `{agent}`, {phase}: {outcome}: check the device's address, its credentials and the network to it"
    )]
    Device {
        /// The agent.
        agent: String,
        /// What it was asked.
        phase: Phase,
        /// What came of it.
        outcome: Outcome,
    },
    /// A fake device was told to fail.
    #[error("fake fencing of `{host}` was told to fail")]
    Injected {
        /// The host.
        host: String,
    },
}

fn list(attempts: &[Attempt]) -> String {
    let texts: Vec<_> = attempts.iter().map(Attempt::to_string).collect();
    texts.join("; ")
}

impl Outcome {
    pub(crate) fn not_run(error: &io::Error) -> Self {
        Self::NotRun {
            reason: format!("it cannot be run: {error}"),
        }
    }
}
