//! System calls of the guard and of its client: clock, scheduling, memory, pidfds, `/proc`, packets with
//! descriptors.
//!
//! Why `unsafe` here: `sched_setscheduler` is not wrapped by any library in use, and tokio asks for a promise
//! about descriptors.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::mm::MlockAllFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::time::ClockId;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest packet of the control socket.
pub(crate) const PACKET_MAX: usize = 64 * 1024;
/// Real-time priority: above ordinary work, below the kernel's own threads.
const PRIORITY: i32 = 40;

/// Nanoseconds of CLOCK_BOOTTIME.
pub(crate) fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let rest = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + rest
}

/// What this process could get for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) locked: bool,
    pub(crate) realtime: bool,
}

/// Leaves the agent's session, locks memory as it is touched, takes a real-time priority.
pub(crate) fn settle() -> Settled {
    // Fails only for a session leader, which is what is wanted.
    let _ = rustix::process::setsid();
    // On fault: locking the whole program would cost its full size in memory; `rehearse` touches what
    // is needed in an emergency.
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    let locked = rustix::mm::mlockall(flags).is_ok();
    Settled {
        locked,
        realtime: take_priority(),
    }
}

#[allow(unsafe_code)]
fn take_priority() -> bool {
    let param = libc::sched_param {
        sched_priority: PRIORITY,
    };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the pointer is to a live, initialised `sched_param`; 0 means this thread.
    unsafe { libc::sched_setscheduler(0, policy, &raw const param) == 0 }
}

/// A pidfd of a process.
pub(crate) fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// SIGKILL; a process that has ended is no error.
pub(crate) fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => Ok(()),
        other => Ok(other?),
    }
}

/// Whether the process behind a pidfd has ended.
pub(crate) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
}

/// Processes with `needle` in one of their arguments, this one excepted.
pub(crate) fn find_by_argument(needle: &str) -> io::Result<Vec<i32>> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process that ends while it is looked at has no command line.
        let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline")) else {
            continue;
        };
        let hit = line
            .split(|byte| *byte == 0)
            .any(|argument| argument == needle.as_bytes());
        if hit && pid != own {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Sends one packet, with a descriptor if there is one.
pub(crate) fn send_packet(
    socket: impl AsFd,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

/// Receives one packet; the length 0 means that the other side has gone.
pub(crate) fn recv_packet(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut slices = [IoSliceMut::new(buffer)];
    let received = rustix::net::recvmsg(socket, &mut slices, &mut control, flags)?;
    let mut first = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for fd in fds {
                first.get_or_insert(fd); // the others are closed here
            }
        }
    }
    Ok((received.bytes, first))
}

/// Puts a socket under tokio's watch.
#[allow(unsafe_code)]
pub(crate) fn watch_readable(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor; `OwnedFd` always returns the same one, and nobody else
    // closes it.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(Into::into)
}

/// When a process was started, in clock ticks since the boot.
pub(crate) fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything; field 22 is the 20th after it.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}
