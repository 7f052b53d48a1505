//! A process that is watched through its pidfd: its end is an event.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;

use super::identity::{self, Existence};
use super::sys::watch_readable;
use crate::guest::ProcessIdentity;

/// Exit status and signal, each when known.
pub(super) type Ending = (Option<i32>, Option<i32>);

/// A live (or just ended) process that cannot be mistaken for another one.
#[derive(Debug)]
pub struct Watched {
    identity: ProcessIdentity,
    pidfd: AsyncFd<OwnedFd>,
}

impl Watched {
    /// Opens the process if it still lives; `None` when it has ended.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn open(identity: &ProcessIdentity) -> io::Result<Option<Self>> {
        let Some(process) = Self::open_unreaped(identity)? else {
            return Ok(None);
        };
        if identity::existence(identity)? == Existence::Alive {
            return Ok(Some(process));
        }
        process.reap();
        Ok(None)
    }

    /// Opens the process even if it has ended, as long as nobody has asked for its status.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn open_unreaped(identity: &ProcessIdentity) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(identity.pid) else {
            return Ok(None);
        };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Checked after the pidfd is held: from here on the pid cannot be given to another process
        // without the pidfd saying that ours has ended.
        if identity::existence(identity)? == Existence::Gone {
            return Ok(None);
        }
        let pidfd = watch_readable(pidfd)?;
        Ok(Some(Self {
            identity: identity.clone(),
            pidfd,
        }))
    }

    /// Which process it is.
    #[must_use]
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// A pidfd of the process, for another watcher.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.get_ref().try_clone()
    }

    /// Sends SIGKILL. A process that has ended already is no error.
    ///
    /// # Errors
    /// When it may not be signalled.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the end and reaps the process if it is our child. A later call returns at once, but no
    /// longer knows the status.
    pub async fn ended(&self) -> Ending {
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(pid = self.identity.pid, %error, "cannot watch a process");
            std::future::pending::<()>().await;
        }
        self.reap()
    }

    fn reap(&self) -> Ending {
        let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
        match rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => (status.exit_status(), status.terminating_signal()),
            // ECHILD: not our child, or reaped already.
            Ok(None) | Err(_) => (None, None),
        }
    }
}
