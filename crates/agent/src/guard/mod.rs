//! The guard: a small process that enforces this host's lease on its guests, whatever the agent does.
//!
//! ```text
//!            lease held                 freeze_at                    deadline
//!  ------------------------------------|----------------------------|------------------------->
//!  guests run; Thawing is granted      stop, end migrations,        SIGKILL what is not
//!                                      give up the disks            confirmed frozen
//!
//!  guest:  Running --freeze_at--> Freezing --confirmed--> Frozen --Thawing granted--> Running
//!             ^                       |                     |
//!             +------- RESUME --------+---------------------+     any --deadline--> Killed --> gone
//! ```
//!
//! Owns: a pidfd and a QMP connection of its own per guest, the deadline, the watchdog.
//!
//! Always holds:
//! - a guest counts as running unless this process itself saw it paused *and* its disks given up, and has
//!   not seen it resume since;
//! - past the deadline everything else is killed, again and again until it is gone;
//! - the watchdog is not fed while, past the deadline, any guest is neither frozen nor gone; otherwise it is;
//! - the agent asks before it makes or resumes a guest ([`wire::ToGuard::Starting`], `Thawing`), and is
//!   refused when the lease is about to end. A guest being made is known by its command line, so that one
//!   made by an agent that hangs in between is found and killed too.
//!
//! Must not: depend on the agent, the network or a disk once it runs: no runtime, one thread, memory locked as
//! it is touched, real-time priority where allowed. It survives the agent, and ends only when told to with no
//! guest left. Why a process and not a thread: an agent that is stopped, swapped out or stuck stops all its
//! threads.

pub mod client;
mod guest;
mod qmp;
mod server;
pub(crate) mod sys;
pub mod wire;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What the guard is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardOptions {
    /// Its control socket.
    pub socket: PathBuf,
    /// The watchdog: a device's path or `unix:/path`.
    pub watchdog: Option<String>,
    /// The time that is asked of it.
    pub watchdog_timeout: Duration,
}

impl GuardOptions {
    /// As arguments of `quorate guard`.
    #[must_use]
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args = vec!["--socket".into(), self.socket.clone().into_os_string()];
        if let Some(watchdog) = &self.watchdog {
            args.extend(["--watchdog".into(), watchdog.into()]);
        }
        args.push("--watchdog-ms".into());
        args.push(self.watchdog_timeout.as_millis().to_string().into());
        args
    }

    /// From the arguments of `quorate guard`.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut args = args.into_iter();
        let (mut socket, mut watchdog, mut timeout_ms) = (None, None, 500_u64);
        while let Some(name) = args.next() {
            let value = args
                .next()
                .ok_or_else(|| format!("{} needs a value", name.to_string_lossy()))?;
            match name.to_str() {
                Some("--socket") => socket = Some(PathBuf::from(value)),
                Some("--watchdog") => watchdog = Some(value.to_string_lossy().into_owned()),
                Some("--watchdog-ms") => {
                    let number = value.to_str().and_then(|text| text.parse().ok());
                    timeout_ms = number
                        .filter(|ms| *ms > 0)
                        .ok_or("--watchdog-ms needs a number above 0")?;
                }
                _ => return Err(format!("unknown option {}", name.to_string_lossy())),
            }
        }
        Ok(Self {
            socket: socket
                .ok_or("--socket is missing: the agent starts the guard, not a person")?,
            watchdog,
            watchdog_timeout: Duration::from_millis(timeout_ms),
        })
    }
}

/// The entry of `quorate guard`; `args` without the program and the word `guard`. Returns only at the
/// end of the guard.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match GuardOptions::from_args(args) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("quorate guard: {problem}");
            return ExitCode::from(2);
        }
    };
    let own = sys::settle();
    match server::Server::open(&options, own) {
        Ok(mut server) => {
            server.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!(
                "quorate guard: cannot serve {}: {error}",
                options.socket.display()
            );
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_the_command_line() {
        let options = GuardOptions {
            socket: "/run/q/guard.sock".into(),
            watchdog: Some("unix:/run/wd".into()),
            watchdog_timeout: Duration::from_millis(300),
        };
        assert_eq!(GuardOptions::from_args(options.to_args()), Ok(options));
    }

    #[test]
    fn wrong_options_say_what_is_wrong() {
        let parse = |args: &[&str]| GuardOptions::from_args(args.iter().map(OsString::from));
        assert!(parse(&[]).is_err_and(|text| text.contains("--socket")));
        assert!(parse(&["--socket"]).is_err_and(|text| text.contains("needs a value")));
        assert!(parse(&["--sockt", "x"]).is_err_and(|text| text.contains("--sockt")));
        assert!(parse(&["--watchdog-ms", "0"]).is_err());
    }
}
