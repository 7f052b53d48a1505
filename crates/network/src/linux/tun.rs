//! Persistent taps: the only way to make one is an ioctl on `/dev/net/tun`.
//!
//! A named module with `unsafe`, because ioctls are untyped. It opens, sets and closes;
//! everything else about a tap goes through netlink.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::ioctl::{self, IntegerSetter, Opcode, Updater, opcode};

use crate::NetworkError;

const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
const TUNSETPERSIST: Opcode = opcode::write::<i32>(b'T', 203);
const TUNSETOWNER: Opcode = opcode::write::<i32>(b'T', 204);

const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
/// QEMU asks for this header wherever the kernel has it; the flags of the last process
/// that attaches count, apart from multi-queue, which must match and stays off.
const IFF_VNET_HDR: u16 = 0x4000;

/// The kernel's `struct ifreq`, as TUNSETIFF uses it.
#[repr(C)]
struct Ifreq {
    name: [u8; 16],
    flags: u16,
    /// The rest of the kernel's union, 24 bytes in all on 64-bit machines.
    rest: [u8; 22],
}

/// A tap that is closed stays busy while a process that was being started at that moment has a copy of our descriptor:
/// until it executes its program.
const AGAIN: Duration = Duration::from_millis(5);
const TRIES: u32 = 40;

/// Creates a tap that stays when this process lets go, or changes the owner of one
/// that nobody holds open. Returns with the tap closed again.
pub(super) async fn make_persistent(
    name: &str,
    owner_uid: Option<u32>,
) -> Result<(), NetworkError> {
    for _ in 1..TRIES {
        match try_persistent(name, owner_uid) {
            Err(NetworkError::TapBusy { .. }) => tokio::time::sleep(AGAIN).await,
            made => return made,
        }
    }
    try_persistent(name, owner_uid)
}

fn try_persistent(name: &str, owner_uid: Option<u32>) -> Result<(), NetworkError> {
    let fail = |operation: &'static str| {
        move |errno: Errno| {
            if errno == Errno::BUSY {
                NetworkError::TapBusy {
                    name: name.to_owned(),
                }
            } else {
                NetworkError::Tap {
                    name: name.to_owned(),
                    operation,
                    source: errno.into(),
                }
            }
        }
    };
    let device = attach(name, IFF_VNET_HDR)?;
    if let Some(uid) = owner_uid {
        // SAFETY: TUNSETOWNER takes the user id as the argument itself, not a pointer.
        unsafe {
            ioctl::ioctl(
                &device,
                IntegerSetter::<TUNSETOWNER>::new_usize(uid as usize),
            )
        }
        .map_err(fail("setting its owner"))?;
    }
    // SAFETY: TUNSETPERSIST takes its truth value as the argument itself.
    unsafe { ioctl::ioctl(&device, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }
        .map_err(fail("making it persistent"))
}

/// Opens the tap as QEMU would, creating it when it does not exist.
fn attach(name: &str, extra_flags: u16) -> Result<File, NetworkError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|source| NetworkError::NoTun { source })?;
    let mut request = Ifreq {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | extra_flags,
        rest: [0; 22],
    };
    // `check_ifname` ran before: at most 15 bytes, so a zero follows.
    let bytes = name.as_bytes();
    let len = bytes.len().min(15);
    request.name[..len].copy_from_slice(&bytes[..len]);
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`; `Ifreq` has its size and
    // layout and lives across the call.
    unsafe { ioctl::ioctl(&device, Updater::<TUNSETIFF, Ifreq>::new(&mut request)) }.map_err(
        |errno| match errno {
            Errno::BUSY => NetworkError::TapBusy {
                name: name.to_owned(),
            },
            Errno::PERM | Errno::ACCESS => NetworkError::NoTun {
                source: errno.into(),
            },
            _ => NetworkError::Tap {
                name: name.to_owned(),
                operation: "creating it",
                source: io::Error::from(errno),
            },
        },
    )?;
    Ok(device)
}

/// Opens an existing tap without the virtio header: what a guest would write and read.
/// For tests of this crate and of others; a host's guests are QEMU's business.
///
/// # Errors
/// As [`crate::NetworkDriver::create_tap`].
pub fn attach_plain(name: &str) -> Result<File, NetworkError> {
    crate::check_ifname(name)?;
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match attach(name, 0) {
            Err(NetworkError::TapBusy { .. }) if Instant::now() < end => {
                std::thread::park_timeout(AGAIN)
            }
            attached => return attached,
        }
    }
}
