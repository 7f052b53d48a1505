//! What can go wrong with a lab, and what to do about it.

use std::path::PathBuf;

/// An error of the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Namespaces need root.
    #[error("the lab makes network namespaces and needs root: run it with sudo")]
    NotRoot,
    /// A program is missing.
    #[error("`{tool}` cannot be run ({source}): install the lab's packages with `make deps`")]
    MissingTool {
        /// The program.
        tool: String,
        /// Why.
        source: std::io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed: {output}")]
    Command {
        /// What was run.
        command: String,
        /// What it said.
        output: String,
    },
    /// A file could not be used.
    #[error("cannot {verb} {path}")]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file that the lab wrote cannot be read back.
    #[error("{path} cannot be read: remove the lab with `quorate lab down` and bring it up again")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// There is no such lab.
    #[error("lab `{site}` is not up: start it with `quorate lab up`")]
    NotUp {
        /// The site.
        site: String,
    },
    /// There is one already.
    #[error("lab `{site}` is up already: use it, or end it with `quorate lab down`")]
    AlreadyUp {
        /// The site.
        site: String,
    },
    /// There is no such host.
    #[error("the lab has no host `{host}`; it has {known}")]
    UnknownHost {
        /// The name given.
        host: String,
        /// The names that exist.
        known: String,
    },
    /// Two parts that are not on one network.
    #[error("no cable of the chosen network joins {from} and {to}")]
    NoCable {
        /// One part.
        from: String,
        /// The other one.
        to: String,
    },
    /// There is no SAN.
    #[error("lab `{site}` has no SAN: bring it up with `quorate lab up --san`")]
    NoSan {
        /// The site.
        site: String,
    },
    /// There is no such network.
    #[error("the switch has no network `{network}`; it has {known}")]
    UnknownNetwork {
        /// The name given.
        network: String,
        /// The names that exist.
        known: String,
    },
    /// There is no such LUN.
    #[error("the SAN has no LUN `{name}`; it has {known}")]
    UnknownLun {
        /// The name given.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// A LUN's name is taken or cannot be part of a target's name.
    #[error("`{name}` cannot name a new LUN: {problem}")]
    BadLun {
        /// The name given.
        name: String,
        /// Why.
        problem: &'static str,
    },
    /// The SAN does not work.
    #[error("the SAN {problem}; its log is {log}")]
    San {
        /// What is wrong.
        problem: String,
        /// Where to look.
        log: PathBuf,
    },
    /// A name that cannot be part of an interface's name.
    #[error("`{site}` cannot name a lab: use 1 to 8 lower-case letters and digits")]
    BadSite {
        /// The name given.
        site: String,
    },
    /// A number of hosts out of range.
    #[error("a lab has 1 to {most} hosts, not {asked}")]
    BadHosts {
        /// Wanted.
        asked: u32,
        /// Most.
        most: u32,
    },
    /// A host's supervisor does not answer or refuses.
    #[error("the supervisor of host `{host}`: {problem}; its log is {log}")]
    Supervisor {
        /// The host.
        host: String,
        /// What is wrong.
        problem: String,
        /// Where to look.
        log: PathBuf,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds:.1} s{hint}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: f64,
        /// Where to look; empty or starting with `: `.
        hint: String,
    },
    /// A tool's answer makes no sense.
    #[error("{tool} answered something unexpected: {output}")]
    Answer {
        /// The tool.
        tool: String,
        /// What it said.
        output: String,
    },
}

impl LabError {
    /// For `map_err` on file operations.
    pub(crate) fn file(
        verb: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { verb, path, source }
    }
}
