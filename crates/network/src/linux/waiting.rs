//! Listens at a tap for what comes for its guest: see [`crate::held`].
//!
//! A named module with `unsafe`: the library knows neither the options that it takes nor the times that come beside a
//! frame.
//!
//! Always holds: the kernel keeps only frames to the guest's own address, and no more than [`BUFFER_BYTES`]; whoever does
//! not read costs nothing more.
#![allow(unsafe_code)]

use super::packet::PacketSocket;
use crate::held::{Frame, Frames, Held};
use crate::{MacAddr, NetworkError};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{SystemTime, UNIX_EPOCH};

/// Room in the kernel.
const BUFFER_BYTES: libc::c_int = 4 << 20;
/// `struct virtio_net_hdr`.
const HEADER: usize = 10;
/// The largest frame, segments not cut, and its header.
const LARGEST: usize = HEADER + 65_536 + 64;
/// Not in `libc` for every target: from the kernel's `if_packet.h`.
const PACKET_VNET_HDR: libc::c_int = 15;

/// The Linux driver's.
pub(super) struct Waiting {
    ifname: String,
    tap: PacketSocket,
    bridge: PacketSocket,
    frames: Frames,
    buffer: Vec<u8>,
}

impl Waiting {
    /// Listens from the return on.
    pub(super) fn open(ifname: &str, tap: u32, bridge: u32, guest: MacAddr) -> io::Result<Self> {
        // The filter and the options come before it is bound: nothing else gets in.
        let listener = PacketSocket::unbound()?;
        only_to(&listener, guest)?;
        set(&listener, libc::SOL_PACKET, PACKET_VNET_HDR, &1)?;
        set(&listener, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1)?;
        set(
            &listener,
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            &BUFFER_BYTES,
        )?;
        listener.listen(tap)?;
        let sender = PacketSocket::sender(bridge)?;
        set(&sender, libc::SOL_PACKET, PACKET_VNET_HDR, &1)?;
        Ok(Self {
            ifname: ifname.to_owned(),
            tap: listener,
            bridge: sender,
            frames: Frames::default(),
            buffer: vec![0; LARGEST],
        })
    }

    /// Takes what the kernel has.
    fn read(&mut self) {
        // An interface that has gone has no frames.
        while let Ok((length, at_us)) = receive(&self.tap, &mut self.buffer) {
            if let Some((header, bytes)) = self.buffer[..length].split_at_checked(HEADER) {
                self.frames.push(Frame {
                    at_us,
                    header: header.to_vec(),
                    bytes: bytes.to_vec(),
                });
            }
        }
    }
}

impl Held for Waiting {
    fn forget(&mut self) {
        self.read();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |span| span.as_micros());
        self.frames.forget(u64::try_from(now).unwrap_or(u64::MAX));
    }

    fn pass_on(&mut self, since_us: u64, source: MacAddr) -> Result<u32, NetworkError> {
        self.read();
        let (mut sent, mut failed) = (0, None);
        for frame in self.frames.take(since_us, source) {
            let bytes = [frame.header, frame.bytes].concat();
            match self.bridge.send(&bytes) {
                Ok(()) => sent += 1,
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(source) if sent == 0 => Err(NetworkError::Held {
                name: self.ifname.clone(),
                source,
            }),
            _ => Ok(sent),
        }
    }
}

fn set<T>(
    socket: &PacketSocket,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of one value, which outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0),
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Of what passes only frames to this address are kept.
fn only_to(socket: &PacketSocket, guest: MacAddr) -> io::Result<()> {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const LOAD_HALF: u16 = 0x28; // BPF_LD | BPF_H | BPF_ABS
    const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let [a, b, c, d, e, f] = guest.octets();
    let line = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut program = [
        line(LOAD_WORD, 0, 0),
        line(IF_EQUAL, 3, u32::from_be_bytes([a, b, c, d])),
        line(LOAD_HALF, 0, 4),
        line(IF_EQUAL, 1, u32::from(u16::from_be_bytes([e, f]))),
        line(RETURN, 0, u32::MAX),
        line(RETURN, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(0),
        filter: program.as_mut_ptr(),
    };
    // The kernel copies the program during the call, which `program` outlives.
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

/// The next frame: its length, and when the kernel had it. Where nobody on this host had asked for times yet, the kernel
/// begins to note them some moments after the first one did, and says of frames before that when they were read.
fn receive(socket: &PacketSocket, buffer: &mut [u8]) -> io::Result<(usize, u64)> {
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
    let got = unsafe {
        libc::recvmsg(
            socket.as_fd().as_raw_fd(),
            &raw mut message,
            libc::MSG_DONTWAIT,
        )
    };
    let length = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let mut at_us = 0;
    // SAFETY: the kernel has filled the control buffer as its length says; the macros stay inside it, and a time is
    // read unaligned.
    unsafe {
        let mut head = libc::CMSG_FIRSTHDR(&raw const message);
        while !head.is_null() {
            if (*head).cmsg_level == libc::SOL_SOCKET && (*head).cmsg_type == libc::SCM_TIMESTAMPNS
            {
                let time: libc::timespec = std::ptr::read_unaligned(libc::CMSG_DATA(head).cast());
                at_us = time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1000;
            }
            head = libc::CMSG_NXTHDR(&raw const message, head);
        }
    }
    Ok((length, at_us))
}
