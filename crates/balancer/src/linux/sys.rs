//! What the BPF library does not have: whole tables in one call, the clock that leases count on.
//!
//! Always holds: every pointer handed to the kernel points to a live buffer of at least the size that is told with it.
#![allow(unsafe_code)]

use crate::abi;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

macro_rules! pod {
    ($($name:ident),*) => {
        $(
            // SAFETY: `repr(C)` of integers and arrays of them, without padding (its size is asserted in `abi`);
            // every pattern of bits is a value.
            unsafe impl aya::Pod for abi::$name {}
        )*
    };
}

pod!(
    Vip4Key,
    Vip6Key,
    Vip,
    Service,
    Opening,
    Door,
    Member,
    Edge,
    FlowKey,
    Flow,
    PinKey,
    Pin,
    DuplicateKey,
    Duplicate,
    ServiceCounts,
    PairKey,
    PairCount,
    Limit,
    Pace,
    Offence,
    Cpu,
    Config,
    Series
);

const LOOKUP_BATCH: libc::c_long = 24;
/// Entries asked for at a time.
const BATCH: usize = 4096;

/// `union bpf_attr` as batch commands use it.
#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// # Safety
/// The addresses in `batch` point to live buffers of `batch.count` entries of the map's sizes.
unsafe fn bpf(command: libc::c_long, batch: &mut Batch) -> io::Result<()> {
    // SAFETY: `batch` is a live structure of the told size; its buffers are the caller's promise.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(batch),
            size_of::<Batch>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The beginning of `union bpf_attr` as the making of a map uses it.
#[repr(C)]
struct Make {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// The beginning of `union bpf_attr` as the change of an element uses it.
#[repr(C)]
struct Update {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Makes an array of one element, which is a ring as [`abi::ring_image`] lays it out.
pub(super) fn ring(image: &[u16]) -> io::Result<OwnedFd> {
    let mut make = Make {
        map_type: 2,
        key_size: 4,
        value_size: u32::try_from(size_of_val(image)).map_err(|_| io::ErrorKind::InvalidInput)?,
        max_entries: 1,
        flags: 0,
    };
    // SAFETY: `make` is a live structure of the told size.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            0 as libc::c_long,
            &raw mut make,
            size_of::<Make>(),
        )
    };
    let map = match i32::try_from(answer) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(descriptor) if descriptor >= 0 => unsafe { OwnedFd::from_raw_fd(descriptor) },
        _ => return Err(io::Error::last_os_error()),
    };
    let key = 0_u32;
    let mut update = Update {
        map_fd: descriptor(map.as_fd()),
        zero: 0,
        key: std::ptr::from_ref(&key).addr() as u64,
        value: image.as_ptr().addr() as u64,
        flags: 0,
    };
    // SAFETY: `update` is a live structure of the told size; key and value live through the call and have the sizes
    // that the map was made with just now.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            2 as libc::c_long,
            &raw mut update,
            size_of::<Update>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(map)
}

fn descriptor(map: BorrowedFd<'_>) -> u32 {
    u32::try_from(map.as_raw_fd()).unwrap_or(u32::MAX)
}

/// Reads a whole hash table or array.
pub(super) fn entries<K: aya::Pod + Default, V: aya::Pod + Default>(
    map: BorrowedFd<'_>,
) -> io::Result<Vec<(K, V)>> {
    let mut all = Vec::new();
    let mut size = BATCH;
    let mut position = 0_u32;
    let mut started = false;
    loop {
        let mut keys = vec![K::default(); size];
        let mut values = vec![V::default(); size];
        let mut next = 0_u32;
        let mut batch = Batch {
            in_batch: if started {
                std::ptr::from_ref(&position).addr() as u64
            } else {
                0
            },
            out_batch: std::ptr::from_mut(&mut next).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: u32::try_from(size).unwrap_or(u32::MAX),
            map_fd: descriptor(map),
            ..Batch::default()
        };
        // SAFETY: the buffers hold `size` entries; positions in hash tables and arrays are 32 bits.
        let result = unsafe { bpf(LOOKUP_BATCH, &mut batch) };
        let end = match result {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // One bucket has more than fits.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && size < 1 << 20 => {
                size *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let got = (batch.count as usize).min(size);
        all.extend(keys.into_iter().zip(values).take(got));
        if end {
            return Ok(all);
        }
        position = next;
        started = true;
    }
}

/// `CLOCK_BOOTTIME` in nanoseconds.
pub(super) fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Index of an interface in this thread's network namespace.
pub(super) fn ifindex(name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: the name is a terminated string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index > 0).then_some(index)
}

/// Name of an interface in this thread's network namespace.
pub(super) fn ifname(index: u32) -> Option<String> {
    let mut name = [0_u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the call is documented to need.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    let text = std::ffi::CStr::from_bytes_until_nul(&name).ok()?;
    text.to_str().ok().map(str::to_owned)
}

/// MAC address of an interface in this thread's network namespace.
pub(super) fn interface_mac(name: &str) -> Option<[u8; 6]> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .ok()?;
    // SAFETY: zeros are a value of `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes())
        .take(libc::IFNAMSIZ - 1)
    {
        *to = from.cast_signed();
    }
    // SAFETY: the request is a live `ifreq`, which SIOCGIFHWADDR fills.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if answer < 0 {
        return None;
    }
    // SAFETY: the call succeeded, so the kernel wrote the address member.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(data) {
        *to = from.cast_unsigned();
    }
    Some(mac)
}
