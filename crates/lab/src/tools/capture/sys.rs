//! A packet socket with the kernel's own times.
//!
//! A named module with `unsafe`: the library has neither the address of a packet socket nor the times that come
//! beside a frame.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// Not in `libc` for every target: from the kernel's `if_packet.h`.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const PACKET_STATISTICS: libc::c_int = 6;
/// Room for frames while this process does not run.
const BUFFER_BYTES: libc::c_int = 16 << 20;
/// How long one call waits for a frame.
const WAIT_US: libc::suseconds_t = 50_000;

/// Frames that one interface *receives*, of any protocol.
pub(super) struct Capture {
    socket: OwnedFd,
}

/// One frame.
pub(super) struct Frame {
    /// Bytes that were read; the rest is cut off.
    pub(super) length: usize,
    /// When the kernel received it, nanoseconds since 1970.
    pub(super) at_ns: u64,
}

impl Capture {
    pub(super) fn open(ifindex: u32) -> io::Result<Self> {
        let every = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers are passed.
        let raw = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                // Protocol 0 until it is bound: a frame of another interface never gets in.
                0,
            )
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just returned this descriptor, which nobody else owns.
        let capture = Self {
            socket: unsafe { OwnedFd::from_raw_fd(raw) },
        };
        capture.set(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1)?;
        capture.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1)?;
        capture.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER_BYTES)?;
        let wait = libc::timeval {
            tv_sec: 0,
            tv_usec: WAIT_US,
        };
        capture.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
        // SAFETY: all-zero is a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex =
            i32::try_from(ifindex).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a whole, initialised address of the length that is passed.
        let bound = unsafe {
            libc::bind(
                capture.socket.as_raw_fd(),
                (&raw const address).cast(),
                length_of::<libc::sockaddr_ll>(),
            )
        };
        match bound {
            0 => Ok(capture),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: the pointer and the length are those of one value, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                length_of::<T>(),
            )
        };
        match set {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The next frame; `None` when none came for a while.
    pub(super) fn next(&self, buffer: &mut [u8]) -> io::Result<Option<Frame>> {
        let mut part = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // Aligned as control messages are, and large enough for one time.
        let mut control = [0_u64; 16];
        // SAFETY: all-zero is a valid `msghdr`.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<[u64; 16]>();
        // SAFETY: every pointer of the message is to memory of the stated length that outlives the call.
        let got = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        let Ok(length) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            };
        };
        let mut at_ns = 0;
        // SAFETY: the kernel has filled the control buffer as its length says; the macros stay inside it, and a
        // time is read unaligned.
        unsafe {
            let mut head = libc::CMSG_FIRSTHDR(&raw const message);
            while !head.is_null() {
                let is_time = (*head).cmsg_level == libc::SOL_SOCKET
                    && (*head).cmsg_type == libc::SCM_TIMESTAMPNS;
                if is_time {
                    let time: libc::timespec =
                        std::ptr::read_unaligned(libc::CMSG_DATA(head).cast());
                    at_ns =
                        time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs();
                }
                head = libc::CMSG_NXTHDR(&raw const message, head);
            }
        }
        Ok(Some(Frame { length, at_ns }))
    }

    /// Frames that were lost because this process was too slow.
    pub(super) fn lost(&self) -> io::Result<u64> {
        let mut counts = [0_u32; 2];
        let mut length = length_of::<[u32; 2]>();
        // SAFETY: the pointer is to as many bytes as the length says.
        let got = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_STATISTICS,
                counts.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        match got {
            0 => Ok(u64::from(counts[1])),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0)
}
