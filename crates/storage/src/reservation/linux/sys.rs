//! The system calls: `IOC_PR_*` of `linux/pr.h`, and SG_IO of `scsi/sg.h`.
//!
//! A named module with `unsafe`, because ioctls are untyped. Nothing else is here.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::ptr;

use rustix::io::{Errno, Result};
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode};

/// Linux's number for SPC-4's type 5.
const WRITE_EXCLUSIVE_REGISTRANTS_ONLY: u32 = 3;
const IGNORE_KEY: u32 = 1;

/// `struct pr_reservation`; `struct pr_clear` has its flags where the type is here.
#[repr(C)]
struct PrReservation {
    key: u64,
    kind: u32,
    flags: u32,
}

/// `struct pr_registration`.
#[repr(C)]
struct PrRegistration {
    old_key: u64,
    new_key: u64,
    flags: u32,
    pad: u32,
}

/// `struct pr_preempt`. In spite of its documentation, drivers send the old key as the caller's and
/// the new one as the victim's.
#[repr(C)]
struct PrPreempt {
    old_key: u64,
    new_key: u64,
    kind: u32,
    flags: u32,
}

const REGISTER: Opcode = opcode::write::<PrRegistration>(b'p', 200);
const RESERVE: Opcode = opcode::write::<PrReservation>(b'p', 201);
const PREEMPT: Opcode = opcode::write::<PrPreempt>(b'p', 203);
const PREEMPT_ABORT: Opcode = opcode::write::<PrPreempt>(b'p', 204);
const CLEAR: Opcode = opcode::write::<PrReservation>(b'p', 205);
const SG_IO: Opcode = 0x2285;

/// A call whose argument is read, and whose result is the number that it returns: the
/// device's status, which is positive, so the library's own patterns would lose it.
struct Call<T> {
    opcode: Opcode,
    argument: T,
}

// SAFETY: `as_ptr` points to a live `T`, which for each opcode above is the type that the
// kernel reads; the kernel changes it only for SG_IO, and only inside of it.
unsafe impl<T> Ioctl for Call<&mut T> {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self.argument).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> Result<i32> {
        Ok(out)
    }
}

/// Gives a kernel call its argument.
fn call<T>(file: &File, opcode: Opcode, argument: &mut T) -> Result<i32> {
    // SAFETY: callers in this module pair each opcode with its own type.
    unsafe { ioctl::ioctl(file, Call { opcode, argument }) }
}

/// Registers; returns the device's status.
pub(super) fn register(file: &File, old_key: u64, new_key: u64, ignore_old: bool) -> Result<i32> {
    let mut argument = PrRegistration {
        old_key,
        new_key,
        flags: if ignore_old { IGNORE_KEY } else { 0 },
        pad: 0,
    };
    call(file, REGISTER, &mut argument)
}

/// Reserves; returns the device's status.
pub(super) fn reserve(file: &File, key: u64) -> Result<i32> {
    let mut argument = PrReservation {
        key,
        kind: WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
        flags: 0,
    };
    call(file, RESERVE, &mut argument)
}

/// Preempts; returns the device's status.
pub(super) fn preempt(file: &File, key: u64, victim: u64, abort: bool) -> Result<i32> {
    let mut argument = PrPreempt {
        old_key: key,
        new_key: victim,
        kind: WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
        flags: 0,
    };
    let opcode = if abort { PREEMPT_ABORT } else { PREEMPT };
    call(file, opcode, &mut argument)
}

/// Clears; returns the device's status.
pub(super) fn clear(file: &File, key: u64) -> Result<i32> {
    let mut argument = PrReservation {
        key,
        kind: 0,
        flags: 0,
    };
    call(file, CLEAR, &mut argument)
}

/// `struct sg_io_hdr`.
#[repr(C)]
struct SgIoHeader {
    interface_id: i32,
    direction: i32,
    command_length: u8,
    sense_length: u8,
    iovec_count: u16,
    data_length: u32,
    data: *mut c_void,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration_ms: u32,
    info: u32,
}

/// What goes along with a command.
pub(super) enum Data<'a> {
    /// To the device.
    Out(&'a [u8]),
    /// From the device.
    In(&'a mut [u8]),
}

/// What came of a command.
pub(super) struct Done {
    /// The device's status.
    pub(super) status: u8,
    /// What the path says; 0 is good.
    pub(super) host_status: u16,
    /// Sense data.
    pub(super) sense: Vec<u8>,
    /// Bytes that were transferred.
    pub(super) transferred: usize,
}

/// Sends a command to a device, and waits.
pub(super) fn sg_io(
    file: &File,
    command: &[u8],
    data: &mut Data<'_>,
    timeout_ms: u32,
) -> Result<Done> {
    const TO_DEVICE: i32 = -2;
    const FROM_DEVICE: i32 = -3;
    let mut sense = [0_u8; 64];
    let (direction, pointer, length) = match data {
        // The kernel only reads it: the direction says so.
        Data::Out(bytes) => (TO_DEVICE, bytes.as_ptr().cast_mut(), bytes.len()),
        Data::In(bytes) => (FROM_DEVICE, bytes.as_mut_ptr(), bytes.len()),
    };
    let mut header = SgIoHeader {
        interface_id: i32::from(b'S'),
        direction,
        command_length: u8::try_from(command.len()).map_err(|_| Errno::INVAL)?,
        sense_length: sense.len() as u8,
        iovec_count: 0,
        data_length: u32::try_from(length).map_err(|_| Errno::INVAL)?,
        data: pointer.cast(),
        command: command.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms,
        flags: 0,
        pack_id: 0,
        user: ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sense_written: 0,
        host_status: 0,
        driver_status: 0,
        residual: 0,
        duration_ms: 0,
        info: 0,
    };
    // The header's pointers are to `command`, `data` and `sense`, which outlive the call: SG_IO
    // returns only when the kernel is done with them.
    call(file, SG_IO, &mut header)?;
    let written = usize::from(header.sense_written).min(sense.len());
    let rest = usize::try_from(header.residual).unwrap_or(0);
    Ok(Done {
        status: header.status,
        host_status: header.host_status,
        sense: sense[..written].to_vec(),
        transferred: length.saturating_sub(rest),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!(size_of::<PrReservation>(), 16);
        assert_eq!(size_of::<PrRegistration>(), 24);
        assert_eq!(size_of::<PrPreempt>(), 24);
        assert_eq!(size_of::<SgIoHeader>(), 88);
    }

    #[test]
    fn calls_have_the_kernels_numbers() {
        assert_eq!(REGISTER, 0x4018_70c8);
        assert_eq!(RESERVE, 0x4010_70c9);
        assert_eq!(PREEMPT, 0x4018_70cb);
        assert_eq!(PREEMPT_ABORT, 0x4018_70cc);
        assert_eq!(CLEAR, 0x4010_70cd);
    }
}
