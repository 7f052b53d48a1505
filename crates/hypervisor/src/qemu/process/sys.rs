//! The few steps that need `unsafe`: those between fork and exec, and the watch on a descriptor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Makes the command's process leave our session and drop every descriptor it would inherit from us
/// or from whoever started us.
pub(in crate::qemu) fn detach(command: &mut Command) {
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls
    // are allowed. It makes two system calls (setsid, close_range) and touches no memory of ours; the
    // error values are plain integers, so nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid().map_err(io::Error::from)?;
            // Close-on-exec rather than close: the standard library reports a failed exec through a
            // descriptor of its own.
            let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            if libc::close_range(3, libc::c_uint::MAX, flags) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Watches a descriptor for becoming readable.
pub(super) fn watch_readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor, always returns the same one, and nobody else closes it: it
    // stays open for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(Into::into)
}
