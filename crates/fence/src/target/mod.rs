//! Storage fencing at the target: the SAN lets a host in, or keeps it out.
//!
//! Owns: the trait [`TargetAccess`] and its drivers [`Tgt`] (`tgtadm`), [`Lio`] (the kernel's target, through
//! its configfs), [`Exec`] (a command of the operator's, for any array), [`Ceph`] (the block list).
//!
//! Always holds:
//! - **unknown is not cut.** [`AccessRemoved`] exists only after a look *after* the change found the initiator
//!   neither on the access list nor in a session, and the list not open to everybody;
//! - taking away is idempotent and complete: a target that is not there any more is cut;
//! - every program has a deadline and is killed at it, no secret is among its arguments.
//!
//! Must not: decide who is kept out, or build a fence proof.

mod ceph;
mod exec;
mod lio;
mod tgt;

use crate::runner;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

pub use ceph::Ceph;
pub use exec::Exec;
pub use lio::Lio;
pub use tgt::{Tgt, TgtSession, TgtTarget, parse_targets};

/// A host was shut out of a target, and that was looked at afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRemoved {
    /// The target.
    pub target: String,
    /// What was done and seen, as a sentence.
    pub how: String,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
}

/// Why a host is not surely shut out, or not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The program cannot be run.
    #[error(
        "{program} cannot be run here ({detail}): install it on the hosts, or correct the pool's `access`"
    )]
    Program {
        /// Which.
        program: String,
        /// What the kernel said.
        detail: String,
    },
    /// It did not end in time.
    #[error(
        "{program} did not answer within {limit_ms} ms: is the SAN's management reachable from here?"
    )]
    Timeout {
        /// Which.
        program: String,
        /// The limit.
        limit_ms: u64,
    },
    /// The SAN's management is not there.
    #[error(
        "the SAN's management cannot be reached ({program}: {detail}): is it running, and is the pool's `access` right?"
    )]
    Unreachable {
        /// Which program says so.
        program: String,
        /// What it said.
        detail: String,
    },
    /// It failed.
    #[error("{program} failed: {detail}")]
    Failed {
        /// Which.
        program: String,
        /// What it said.
        detail: String,
    },
    /// Its answer cannot be read.
    #[error("{program} answered something unexpected: {detail}")]
    Answer {
        /// Which.
        program: String,
        /// What it said.
        detail: String,
    },
    /// There is no such target.
    #[error("the SAN has no target {target}: create it there, or correct the disk's `image`")]
    NoTarget {
        /// Its name.
        target: String,
    },
    /// After the change it still looks open.
    #[error("{initiator} can still reach {target}: {detail}")]
    StillOpen {
        /// The target.
        target: String,
        /// The initiator.
        initiator: String,
        /// What was seen.
        detail: String,
    },
}

/// The door of a SAN.
#[async_trait::async_trait]
pub trait TargetAccess: Send + Sync + 'static {
    /// Shuts an initiator out of these targets and ends its sessions; one answer for each target, in order.
    async fn cut(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Vec<Result<AccessRemoved, TargetError>>;

    /// Lets an initiator in to these targets, as many as there are; returns those that the SAN does not have, which
    /// are in nobody's way.
    ///
    /// # Errors
    /// The first failure, after all were tried; what was let in stays so.
    async fn allow(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<String>, TargetError>;

    /// Which of these targets the initiator may log in to.
    ///
    /// # Errors
    /// When the SAN does not say.
    async fn allowed(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<bool>, TargetError>;
}

/// Largest answer of a SAN's management, in bytes: `tgtadm` tells about a kilobyte of each target, and more with each session.
const ANSWER_MAX: usize = 16 << 20;
/// Calls of a SAN's management at a time: each is a process, perhaps with a way to another machine.
const CALLS: usize = 8;

/// Makes calls, a few at a time: the first failure, after all have ended.
async fn few_at_a_time<F>(calls: Vec<F>) -> Result<(), TargetError>
where
    F: Future<Output = Result<(), TargetError>>,
{
    use futures_util::StreamExt as _;
    let calls = futures_util::stream::iter(calls).buffer_unordered(CALLS);
    let done: Vec<Result<(), TargetError>> = calls.collect().await;
    done.into_iter().collect()
}

/// Runs a program to its end and returns what it wrote.
async fn call(
    words: &[String],
    input: String,
    secrets: &[&str],
    deadline: Instant,
) -> Result<String, TargetError> {
    let (program, arguments) = match words.split_first() {
        Some((program, arguments)) => (program.clone(), arguments),
        None => {
            return Err(TargetError::Program {
                program: "(nothing)".to_owned(),
                detail: "no command is given".to_owned(),
            });
        }
    };
    let begun = Instant::now();
    let run = runner::run(
        Path::new(&program),
        arguments,
        input,
        secrets,
        ANSWER_MAX,
        deadline,
    )
    .await;
    let run = run.map_err(|error| TargetError::Program {
        program: program.clone(),
        detail: error.to_string(),
    })?;
    if run.timed_out {
        let limit_ms = millis(begun.elapsed());
        return Err(TargetError::Timeout { program, limit_ms });
    }
    if run.code != Some(0) {
        let code = run
            .code
            .map_or("a signal".to_owned(), |code| format!("exit status {code}"));
        let detail = format!("{code}: {}", run.shown);
        return Err(TargetError::Failed { program, detail });
    }
    // A target that is not in an answer counts as one that is not there, and so as shut.
    if !run.complete {
        return Err(TargetError::Answer {
            program,
            detail: format!("the answer has no end, or more than {ANSWER_MAX} bytes"),
        });
    }
    Ok(run.stdout)
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The same failure for every target.
fn all(targets: &[String], error: &TargetError) -> Vec<Result<AccessRemoved, TargetError>> {
    targets.iter().map(|_| Err(error.clone())).collect()
}
