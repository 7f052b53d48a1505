//! Persistent reservations of a Linux block device.
//!
//! Changes go through the kernel's own calls (`IOC_PR_*`), because device mapper gives them to
//! *every* path of a multipath device; what the kernel cannot do, reading keys, goes through
//! SG_IO to any one path. The device is opened for reading only, and for each call: closing
//! one that was open for writing makes udev probe it, and an open descriptor would outlive the
//! device that it names.
//!
//! Linux numbers the types of reservations in its own way: its 3 is SPC-4's 5.

mod sys;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::device::{
    Capabilities, Command, DeviceError, KeyList, Nexus, ReservationDevice, ReservationHeld,
};
use super::wire::{self, Ask};

/// A unit attention is reported once for each thing that happened; then the command is done.
const ATTENTIONS: u32 = 5;
/// For one command, in milliseconds. The caller's deadline is usually shorter; this one ends
/// the thread that was left behind.
const COMMAND_TIMEOUT_MS: u32 = 10_000;

/// What the host's SCSI layer says of a path that it mends, or of a command that it gave up meanwhile (`DID_BUS_BUSY`,
/// `DID_ABORT`, `DID_RESET`, `DID_SOFT_ERROR`, `DID_IMM_RETRY`, `DID_REQUEUE`, `DID_TRANSPORT_DISRUPTED`). A path that it gave up
/// (`DID_NO_CONNECT`, `DID_TRANSPORT_FAILFAST`) is not among them.
const PASSING: [u16; 7] = [0x02, 0x05, 0x08, 0x0b, 0x0c, 0x0d, 0x0e];

/// SAM status codes.
const GOOD: u8 = 0x00;
const CHECK_CONDITION: u8 = 0x02;
const BUSY: u8 = 0x08;
const CONFLICT: u8 = 0x18;
const TASK_SET_FULL: u8 = 0x28;
const TASK_ABORTED: u8 = 0x40;

/// A block device of this host: a disk, or a multipath map of it.
#[derive(Debug)]
pub struct LinuxDevice {
    path: PathBuf,
    /// It said so once; asking again would cost time at every reading.
    no_full_status: AtomicBool,
}

impl LinuxDevice {
    /// By path; best a stable one below `/dev/disk/by-id` or `/dev/mapper`. Nothing is opened.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            no_full_status: AtomicBool::new(false),
        }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self) -> Result<File, DeviceError> {
        let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(&self.path)
            .map_err(|error| kernel(&error))?;
        let kind = file.metadata().map_err(|error| kernel(&error))?.file_type();
        if kind.is_block_device() {
            Ok(file)
        } else {
            Err(DeviceError::Unsupported("this is no block device".into()))
        }
    }

    /// One command by SG_IO, repeated while the device wants to tell something first.
    fn pass(&self, cdb: &[u8], data: sys::Data<'_>) -> Result<usize, DeviceError> {
        let file = self.open()?;
        let mut data = data;
        let mut last = DeviceError::Disturbed("busy".into());
        for _ in 0..ATTENTIONS {
            let done = sys::sg_io(&file, cdb, &mut data, COMMAND_TIMEOUT_MS)
                .map_err(|errno| kernel(&errno.into()))?;
            match judge(&done) {
                Verdict::Done => return Ok(done.transferred),
                Verdict::Again(error) => last = error,
                Verdict::Failed(error) => return Err(error),
            }
        }
        Err(last)
    }

    fn ask(&self, what: Ask) -> Result<Vec<u8>, DeviceError> {
        let mut answer = vec![0; wire::ANSWER_BYTES];
        let cdb = wire::cdb_in(what, wire::ANSWER_BYTES as u16);
        let length = self.pass(&cdb, sys::Data::In(&mut answer))?;
        answer.truncate(length);
        Ok(answer)
    }

    /// A change by the kernel's call. It answers with the device's status, without sense data.
    fn change(&self, file: &File, command: Command) -> Result<(), DeviceError> {
        let mut last = DeviceError::Disturbed("busy".into());
        for _ in 0..ATTENTIONS {
            let status = match command {
                Command::Register { key } => sys::register(file, 0, key, true),
                Command::Unregister { key } => sys::register(file, key, 0, false),
                Command::Reserve { key } => sys::reserve(file, key),
                Command::Preempt { key, victim, abort } => sys::preempt(file, key, victim, abort),
                Command::Clear { key } => sys::clear(file, key),
            };
            let status = status.map_err(|errno| kernel(&errno.into()))?;
            match device_status(status) {
                Some(GOOD) => return Ok(()),
                Some(CONFLICT) => return Err(DeviceError::Conflict),
                // Perhaps a unit attention, which is over then; perhaps not.
                Some(CHECK_CONDITION) => {
                    last = DeviceError::Unsupported(format!(
                        "it rejects {}; does it keep registrations over a power loss (APTPL)?",
                        command.name()
                    ));
                }
                Some(BUSY | TASK_SET_FULL) => last = DeviceError::Disturbed("busy".into()),
                _ => {
                    return Err(DeviceError::Path(format!("result {status:#x}")));
                }
            }
        }
        Err(last)
    }

    /// A change that the kernel's call could not make, once more by SG_IO: its answer says why. And
    /// a device that cannot persist registrations rejects the kernel's call, which always asks
    /// for that. Only one path gets the command, so never on a multipath device.
    fn change_by_hand(&self, command: Command) -> Result<(), DeviceError> {
        let persist = self.capabilities()?.persist_possible;
        let (cdb, list) = wire::out(command, persist);
        self.pass(&cdb, sys::Data::Out(&list)).map(drop)
    }
}

impl ReservationDevice for LinuxDevice {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn read_keys(&self) -> Result<KeyList, DeviceError> {
        wire::parse_keys(&self.ask(Ask::Keys)?)
    }

    fn read_reservation(&self) -> Result<(u32, Option<ReservationHeld>), DeviceError> {
        wire::parse_reservation(&self.ask(Ask::Reservation)?)
    }

    fn capabilities(&self) -> Result<Capabilities, DeviceError> {
        wire::parse_capabilities(&self.ask(Ask::Capabilities)?)
    }

    fn read_full_status(&self) -> Result<(u32, Vec<Nexus>), DeviceError> {
        if self.no_full_status.load(Ordering::Relaxed) {
            return Err(DeviceError::Unsupported(
                "it does not know FULL STATUS".into(),
            ));
        }
        let answer = self.ask(Ask::FullStatus);
        if let Err(DeviceError::Unsupported(_)) = answer {
            self.no_full_status.store(true, Ordering::Relaxed);
        }
        wire::parse_full_status(&answer?)
    }

    fn command(&self, command: Command) -> Result<(), DeviceError> {
        match self.change(&self.open()?, command) {
            Err(DeviceError::Unsupported(_)) if !is_multipath(&self.path) => {
                self.change_by_hand(command)
            }
            done => done,
        }
    }

    /// COMPARE AND WRITE, or UNMAP where it is not known. (A WRITE of no blocks would be the
    /// obvious choice, but LIO lets it pass: it looks at the direction of the data.)
    fn write_nothing(&self) -> Result<(), DeviceError> {
        let block_bytes = rustix::fs::ioctl_blksszget(self.open()?)
            .map_err(|errno| kernel(&errno.into()))? as usize;
        let (cdb, data) = wire::compare_and_write_nothing(block_bytes);
        match self.pass(&cdb, sys::Data::Out(&data)) {
            Ok(_) => Ok(()),
            Err(DeviceError::Refused(sense)) if sense.is_miscompare() => Ok(()),
            Err(DeviceError::Unsupported(_)) => {
                let (cdb, list) = wire::unmap_nothing();
                self.pass(&cdb, sys::Data::Out(&list)).map(drop)
            }
            Err(error) => Err(error),
        }
    }

    fn rewrite_first_block(&self) -> Result<(), DeviceError> {
        let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC;
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(&self.path)
            .map_err(|error| kernel(&error))?;
        let mut block = Aligned([0; 4096]);
        disk.read_exact_at(&mut block.0, 0)
            .and_then(|()| disk.write_all_at(&block.0, 0))
            .map_err(|error| kernel(&error))
    }
}

/// `O_DIRECT` wants aligned memory.
#[repr(align(4096))]
struct Aligned([u8; 4096]);

enum Verdict {
    Done,
    Again(DeviceError),
    Failed(DeviceError),
}

fn judge(done: &sys::Done) -> Verdict {
    if PASSING.contains(&done.host_status) {
        return Verdict::Failed(DeviceError::Disturbed(format!(
            "host status {:#x}",
            done.host_status
        )));
    }
    if done.host_status != 0 {
        return Verdict::Failed(DeviceError::Path(format!(
            "host status {:#x}",
            done.host_status
        )));
    }
    match done.status {
        GOOD => Verdict::Done,
        CONFLICT => Verdict::Failed(DeviceError::Conflict),
        BUSY | TASK_SET_FULL => Verdict::Again(DeviceError::Disturbed("busy".into())),
        TASK_ABORTED => Verdict::Failed(DeviceError::Disturbed("it was aborted".into())),
        CHECK_CONDITION => {
            let sense = wire::parse_sense(&done.sense);
            if sense.is_unit_attention() {
                Verdict::Again(DeviceError::Refused(sense))
            } else if sense.is_illegal_request() {
                Verdict::Failed(DeviceError::Unsupported(sense.to_string()))
            } else {
                Verdict::Failed(DeviceError::Refused(sense))
            }
        }
        other => Verdict::Failed(DeviceError::Path(format!("status {other:#x}"))),
    }
}

/// The device's status in what a reservation call returns: the SCSI layer's result. Its second
/// byte is a note of that layer to itself (Linux 6.1 returns 0x118 for a conflict); with a third,
/// the command did not reach the device.
fn device_status(result: i32) -> Option<u8> {
    let [status, _, host, driver] = result.to_le_bytes();
    (host == 0 && driver == 0).then_some(status)
}

fn kernel(error: &io::Error) -> DeviceError {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT | Errno::NXIO | Errno::NODEV) => DeviceError::Gone,
        Some(Errno::ACCESS | Errno::PERM) => DeviceError::Permission,
        Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => {
            DeviceError::Unsupported("the kernel's driver has no persistent reservations".into())
        }
        Some(Errno::BADE) => DeviceError::Conflict,
        Some(Errno::IO | Errno::TIMEDOUT | Errno::NOLINK) => DeviceError::Path(error.to_string()),
        _ => DeviceError::Kernel(error.to_string()),
    }
}

fn is_multipath(path: &Path) -> bool {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("dm-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(status: u8, host_status: u16, sense: &[u8]) -> sys::Done {
        sys::Done {
            status,
            host_status,
            sense: sense.to_vec(),
            transferred: 0,
        }
    }

    #[test]
    fn answers_are_judged() {
        assert!(matches!(judge(&done(GOOD, 0, &[])), Verdict::Done));
        assert!(matches!(
            judge(&done(CONFLICT, 0, &[])),
            Verdict::Failed(DeviceError::Conflict)
        ));
        let attention = [0x72, 6, 0x2a, 3];
        assert!(matches!(
            judge(&done(CHECK_CONDITION, 0, &attention)),
            Verdict::Again(_)
        ));
        let illegal = [0x72, 5, 0x20, 0];
        assert!(matches!(
            judge(&done(CHECK_CONDITION, 0, &illegal)),
            Verdict::Failed(DeviceError::Unsupported(_))
        ));
        for gone in [0x01, 0x03, 0x0f] {
            let Verdict::Failed(error @ DeviceError::Path(_)) = judge(&done(GOOD, gone, &[]))
            else {
                panic!("{gone:#x}")
            };
            assert!(!error.may_pass());
        }
        // Transport disrupted, reset; a task that was aborted.
        for (status, host) in [(GOOD, 0x0e), (GOOD, 0x08), (TASK_ABORTED, 0)] {
            let Verdict::Failed(error) = judge(&done(status, host, &[])) else {
                panic!("{status:#x} {host:#x}")
            };
            assert!(error.may_pass(), "{error}");
        }
    }

    #[test]
    fn the_status_is_found_in_the_kernels_result() {
        for (result, status) in [
            (0, Some(GOOD)),
            (0x18, Some(CONFLICT)),
            (0x118, Some(CONFLICT)),
            (0x02, Some(CHECK_CONDITION)),
            (0x0001_0000, None), // the path failed
            (0x000e_0000, None), // transport disrupted
            (-1, None),
        ] {
            assert_eq!(device_status(result), status, "{result:#x}");
        }
    }

    #[test]
    fn what_is_no_device_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let told = LinuxDevice::new(file.path()).read_keys().unwrap_err();
        assert!(told.to_string().contains("no block device"), "{told}");
        let told = LinuxDevice::new("/dev/disk/by-id/none").read_keys();
        assert_eq!(told.unwrap_err(), DeviceError::Gone);
    }
}
