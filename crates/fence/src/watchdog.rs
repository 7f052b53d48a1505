//! Watchdogs: a timer outside of the process that ends the host when it is not fed.
//!
//! Owns: opening, feeding and disarming one, whether the kernel's `/dev/watchdog*` or the
//! datagram socket of a supervisor that plays one. Plain `std`, no runtime, no allocation while
//! feeding: the guard process uses it with its memory locked.
//!
//! Always holds: after [`Watchdog::open`] it is armed, and [`Watchdog::bound`] is the *real*
//! longest time between the last feeding and the host's end, which may be more than was
//! asked for, since hardware counts in seconds. Dropping it without [`Watchdog::disarm`]
//! leaves it armed: a guard that dies takes the host with it. A device that would stop
//! counting by itself when its holder dies is refused, because it protects from nothing.
//!
//! Must not: be fed by anything that does not know that its guests are under control.
//!
//! ## The socket's protocol
//! `unix:/path` names a datagram socket. Each feeding is one datagram of 8 bytes, the timeout
//! in milliseconds, little-endian, counted from its receipt; the datagram `V` disarms. The
//! supervisor reads it with [`Message::decode`].

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the path of a supervisor's socket begins with.
pub const SOCKET_PREFIX: &str = "unix:";

/// The byte that disarms: Linux calls it the magic close.
const DISARM: u8 = b'V';

/// A watchdog that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// The device or socket cannot be opened.
    #[error("watchdog {}: cannot be opened: {source}: load its driver (`modprobe softdog`), end whatever else uses it (systemd: RuntimeWatchdogSec=0), or correct `watchdog`", .path.display())]
    Open {
        /// The device or socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path leads to something else.
    #[error("watchdog {}: is not a watchdog device: correct `watchdog`", .path.display())]
    NotAWatchdog {
        /// The path.
        path: PathBuf,
    },
    /// The device stops when its holder dies.
    #[error("watchdog {}: its driver stops counting when the process that feeds it dies, so it protects from nothing: load the driver with nowayout=1 and magic close, or use another", .path.display())]
    StopsOnClose {
        /// The device.
        path: PathBuf,
    },
    /// The device does not say after which time it fires.
    #[error("watchdog {}: its timeout is unknown: {source}: use another watchdog", .path.display())]
    NoTimeout {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Feeding or disarming failed; the watchdog is armed still.
    #[error("watchdog {}: {operation} failed: {source}: the host ends unless this changes", .path.display())]
    Talk {
        /// The device or socket.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An armed watchdog.
#[derive(Debug)]
pub struct Watchdog {
    path: PathBuf,
    line: Line,
    bound: Duration,
    identity: String,
}

#[derive(Debug)]
enum Line {
    Device(File),
    Socket(UnixDatagram, [u8; 8]),
}

impl Watchdog {
    /// Opens the watchdog (a device's path, or `unix:` and a socket's path), asks for the
    /// timeout and arms it.
    ///
    /// # Errors
    /// When it cannot be opened or does not protect. A device that was refused after it was
    /// opened has been disarmed, as far as its driver lets it.
    pub fn open(spec: &str, timeout: Duration) -> Result<Self, WatchdogError> {
        match spec.strip_prefix(SOCKET_PREFIX) {
            Some(path) => Self::open_socket(Path::new(path), timeout),
            None => Self::open_device(Path::new(spec), timeout),
        }
    }

    fn open_socket(path: &Path, timeout: Duration) -> Result<Self, WatchdogError> {
        let failed = |source| WatchdogError::Open {
            path: path.to_owned(),
            source,
        };
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.connect(path).map_err(failed)?;
        // A supervisor that does not read must not hold the guard up.
        socket.set_nonblocking(true).map_err(failed)?;
        let timeout_ms = u64::try_from(timeout.as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        let watchdog = Self {
            path: path.to_owned(),
            line: Line::Socket(socket, timeout_ms.to_le_bytes()),
            bound: Duration::from_millis(timeout_ms),
            identity: "supervisor".into(),
        };
        watchdog.feed()?;
        Ok(watchdog)
    }

    fn open_device(path: &Path, timeout: Duration) -> Result<Self, WatchdogError> {
        let failed = |source| WatchdogError::Open {
            path: path.to_owned(),
            source,
        };
        // Looked at before it is opened: opening arms it.
        if !std::fs::metadata(path)
            .map_err(failed)?
            .file_type()
            .is_char_device()
        {
            return Err(WatchdogError::NotAWatchdog {
                path: path.to_owned(),
            });
        }
        let device = OpenOptions::new().write(true).open(path).map_err(failed)?;
        Self::arm(path, device, &ioctls::Kernel, timeout)
    }

    /// Sets an open device up and arms it; `controls` are the driver's ioctls.
    fn arm(
        path: &Path,
        device: File,
        controls: &impl Controls,
        timeout: Duration,
    ) -> Result<Self, WatchdogError> {
        match Self::set_up(path, &device, controls, timeout) {
            Ok((bound, identity)) => {
                let watchdog = Self {
                    path: path.to_owned(),
                    line: Line::Device(device),
                    bound,
                    identity,
                };
                watchdog.feed()?;
                Ok(watchdog)
            }
            Err(error) => {
                // Best effort: it was armed by opening it, and nobody would feed it.
                let _ = (&device).write_all(&[DISARM]);
                Err(error)
            }
        }
    }

    fn set_up(
        path: &Path,
        device: &File,
        controls: &impl Controls,
        timeout: Duration,
    ) -> Result<(Duration, String), WatchdogError> {
        let support = controls
            .support(device)
            .map_err(|_| WatchdogError::NotAWatchdog {
                path: path.to_owned(),
            })?;
        if !support.magic_close {
            return Err(WatchdogError::StopsOnClose {
                path: path.to_owned(),
            });
        }
        let wanted_s = whole_seconds(timeout);
        // What counts is what the device then says, whether it took the wish or not.
        let set = controls.set_timeout(device, wanted_s);
        let actual_s = controls.timeout(device).or(set);
        let actual_s = actual_s.map_err(|source| WatchdogError::NoTimeout {
            path: path.to_owned(),
            source,
        })?;
        Ok((Duration::from_secs(u64::from(actual_s)), support.identity))
    }

    /// The longest time from the last feeding to the end of the host.
    pub fn bound(&self) -> Duration {
        self.bound
    }

    /// What the watchdog calls itself.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Starts the time anew. Never blocks for long and allocates nothing when it succeeds.
    ///
    /// # Errors
    /// When the watchdog is not reached; it then fires after the rest of the time.
    pub fn feed(&self) -> Result<(), WatchdogError> {
        let result = match &self.line {
            Line::Device(device) => (&mut &*device).write_all(&[0]),
            Line::Socket(socket, message) => socket.send(message).map(drop),
        };
        result.map_err(|source| self.talk("feeding", source))
    }

    /// Stops the time for good: the guests are under control without it.
    ///
    /// # Errors
    /// When the watchdog is not reached; it stays armed. A kernel built with nowayout stays
    /// armed without saying so.
    pub fn disarm(self) -> Result<(), WatchdogError> {
        let result = match &self.line {
            Line::Device(device) => (&mut &*device).write_all(&[DISARM]),
            Line::Socket(socket, _) => socket.send(&[DISARM]).map(drop),
        };
        result.map_err(|source| self.talk("disarming", source))
    }

    fn talk(&self, operation: &'static str, source: io::Error) -> WatchdogError {
        WatchdogError::Talk {
            path: self.path.clone(),
            operation,
            source,
        }
    }
}

/// What a supervisor that plays a watchdog is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Fire when nothing else comes within this time.
    Feed {
        /// The time.
        timeout: Duration,
    },
    /// Do not fire.
    Disarm,
}

impl Message {
    /// Reads a datagram; `None` when it is none of ours, which changes nothing.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        if datagram == [DISARM] {
            return Some(Self::Disarm);
        }
        let timeout_ms = u64::from_le_bytes(datagram.try_into().ok()?);
        Some(Self::Feed {
            timeout: Duration::from_millis(timeout_ms),
        })
    }
}

/// Hardware counts in seconds; less than was asked for would fire early.
fn whole_seconds(timeout: Duration) -> u32 {
    let seconds = timeout.as_millis().div_ceil(1000).max(1);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

/// What a driver says of itself.
struct Support {
    magic_close: bool,
    identity: String,
}

/// The ioctls of a watchdog's driver. The kernel's, except in tests: no machine has a watchdog that a test
/// may arm.
trait Controls {
    fn support(&self, device: &File) -> io::Result<Support>;
    /// Asks for a timeout and returns the one the driver made of it, in seconds.
    fn set_timeout(&self, device: &File, timeout_s: u32) -> io::Result<u32>;
    /// The timeout in force, in seconds.
    fn timeout(&self, device: &File) -> io::Result<u32>;
}

/// The ioctls of `linux/watchdog.h`.
///
/// A named module with `unsafe`, because ioctls are untyped.
#[allow(unsafe_code)]
mod ioctls {
    use std::fs::File;
    use std::io;

    use super::{Controls, Support};
    use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

    const GETSUPPORT: Opcode = opcode::read::<Info>(b'W', 0);
    const SETTIMEOUT: Opcode = opcode::read_write::<i32>(b'W', 6);
    const GETTIMEOUT: Opcode = opcode::read::<i32>(b'W', 7);
    const MAGICCLOSE: u32 = 0x0100;

    /// The kernel's `struct watchdog_info`.
    #[repr(C)]
    struct Info {
        options: u32,
        firmware: u32,
        identity: [u8; 32],
    }

    /// The real ones.
    pub(super) struct Kernel;

    impl Controls for Kernel {
        fn support(&self, device: &File) -> io::Result<Support> {
            // SAFETY: WDIOC_GETSUPPORT fills a `struct watchdog_info`, which `Info` mirrors.
            let info: Info = unsafe { ioctl(device, Getter::<GETSUPPORT, Info>::new()) }?;
            let identity = info.identity.split(|byte| *byte == 0).next();
            Ok(Support {
                magic_close: info.options & MAGICCLOSE != 0,
                identity: String::from_utf8_lossy(identity.unwrap_or_default()).into_owned(),
            })
        }

        fn set_timeout(&self, device: &File, timeout_s: u32) -> io::Result<u32> {
            let mut value = i32::try_from(timeout_s).unwrap_or(i32::MAX);
            // SAFETY: WDIOC_SETTIMEOUT reads and writes an `int` that lives across the call.
            unsafe { ioctl(device, Updater::<SETTIMEOUT, i32>::new(&mut value)) }?;
            positive(value)
        }

        fn timeout(&self, device: &File) -> io::Result<u32> {
            // SAFETY: WDIOC_GETTIMEOUT fills an `int`.
            let value: i32 = unsafe { ioctl(device, Getter::<GETTIMEOUT, i32>::new()) }?;
            positive(value)
        }
    }

    fn positive(seconds: i32) -> io::Result<u32> {
        match u32::try_from(seconds) {
            Ok(seconds @ 1..) => Ok(seconds),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_opcodes_are_those_of_the_header() {
            // From linux/watchdog.h on x86-64 and arm64.
            assert_eq!(u64::from(GETSUPPORT), 0x8028_5700);
            assert_eq!(u64::from(SETTIMEOUT), 0xc004_5706);
            assert_eq!(u64::from(GETTIMEOUT), 0x8004_5707);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(500);

    fn supervisor() -> (tempfile::TempDir, UnixDatagram, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wd");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let spec = format!("{SOCKET_PREFIX}{}", path.display());
        (dir, socket, spec)
    }

    fn next(socket: &UnixDatagram) -> Option<Message> {
        let mut buffer = [0; 64];
        let len = socket.recv(&mut buffer).unwrap();
        Message::decode(&buffer[..len])
    }

    #[test]
    fn a_supervisor_is_armed_fed_and_disarmed() {
        let (_dir, socket, spec) = supervisor();
        let watchdog = Watchdog::open(&spec, TIMEOUT).unwrap();
        assert_eq!(watchdog.bound(), TIMEOUT);
        let feed = Some(Message::Feed { timeout: TIMEOUT });
        assert_eq!(next(&socket), feed, "opening arms it");
        watchdog.feed().unwrap();
        assert_eq!(next(&socket), feed);
        watchdog.disarm().unwrap();
        assert_eq!(next(&socket), Some(Message::Disarm));
    }

    #[test]
    fn dropping_it_does_not_disarm() {
        let (_dir, socket, spec) = supervisor();
        drop(Watchdog::open(&spec, TIMEOUT).unwrap());
        next(&socket).unwrap();
        socket.set_nonblocking(true).unwrap();
        let error = socket.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_dead_or_deaf_supervisor_is_an_error_and_never_a_wait() {
        let (dir, socket, spec) = supervisor();
        let watchdog = Watchdog::open(&spec, TIMEOUT).unwrap();
        // Nobody reads: the queue fills up.
        let error = (0..100_000).find_map(|_| watchdog.feed().err()).unwrap();
        assert!(matches!(error, WatchdogError::Talk { .. }), "{error}");
        drop(socket);
        let error = watchdog.feed().unwrap_err();
        assert!(matches!(error, WatchdogError::Talk { .. }), "{error}");
        drop(dir);
        let error = Watchdog::open(&spec, TIMEOUT).unwrap_err();
        assert!(matches!(error, WatchdogError::Open { .. }), "{error}");
    }

    #[test]
    fn what_is_no_watchdog_is_refused_before_it_is_touched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let error = Watchdog::open(path, TIMEOUT).unwrap_err();
        assert!(
            matches!(error, WatchdogError::NotAWatchdog { .. }),
            "{error}"
        );
        assert!(std::fs::read(path).unwrap().is_empty());
        // A character device that knows none of the ioctls.
        let error = Watchdog::open("/dev/null", TIMEOUT).unwrap_err();
        assert!(
            matches!(error, WatchdogError::NotAWatchdog { .. }),
            "{error}"
        );
        let error = Watchdog::open("/dev/no-such-watchdog", TIMEOUT).unwrap_err();
        assert!(matches!(error, WatchdogError::Open { .. }), "{error}");
    }

    /// A driver that answers as it is told; the device is the writing end of a pipe.
    struct FakeDriver {
        magic_close: bool,
        set: Option<u32>,
        get: Option<u32>,
    }

    const GOOD: FakeDriver = FakeDriver {
        magic_close: true,
        set: Some(1),
        get: Some(1),
    };

    impl Controls for FakeDriver {
        fn support(&self, _: &File) -> io::Result<Support> {
            Ok(Support {
                magic_close: self.magic_close,
                identity: "fake".into(),
            })
        }
        fn set_timeout(&self, _: &File, timeout_s: u32) -> io::Result<u32> {
            assert_eq!(timeout_s, 1, "rounded up");
            self.set.ok_or(io::ErrorKind::Unsupported.into())
        }
        fn timeout(&self, _: &File) -> io::Result<u32> {
            self.get.ok_or(io::ErrorKind::Unsupported.into())
        }
    }

    /// What the device was told so far, once it is closed.
    fn told(mut pipe: io::PipeReader) -> Vec<u8> {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut pipe, &mut bytes).unwrap();
        bytes
    }

    fn arm(driver: &FakeDriver) -> (Result<Watchdog, WatchdogError>, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let device = File::from(std::os::fd::OwnedFd::from(writer));
        let path = Path::new("/dev/fake");
        (Watchdog::arm(path, device, driver, TIMEOUT), reader)
    }

    #[test]
    fn a_device_is_armed_fed_and_disarmed_by_magic_close() {
        let (watchdog, pipe) = arm(&GOOD);
        let watchdog = watchdog.unwrap();
        assert_eq!(watchdog.identity(), "fake");
        watchdog.feed().unwrap();
        watchdog.disarm().unwrap();
        assert_eq!(told(pipe), b"\0\0V");
    }

    #[test]
    fn a_device_that_is_dropped_stays_armed() {
        let (watchdog, pipe) = arm(&GOOD);
        drop(watchdog.unwrap());
        assert_eq!(told(pipe), b"\0");
    }

    #[test]
    fn the_bound_is_what_the_device_says() {
        for (set, get, bound_s) in [
            (Some(1), Some(10), 10), // A driver with a minimum.
            (None, Some(60), 60),    // A fixed timeout.
            (Some(2), None, 2),      // No way to ask; what it made of the wish counts.
        ] {
            let (watchdog, _pipe) = arm(&FakeDriver { set, get, ..GOOD });
            assert_eq!(watchdog.unwrap().bound(), Duration::from_secs(bound_s));
        }
    }

    #[test]
    fn a_device_that_does_not_protect_is_refused_and_disarmed_again() {
        let (none, pipe) = arm(&FakeDriver {
            magic_close: false,
            ..GOOD
        });
        let error = none.unwrap_err();
        assert!(matches!(error, WatchdogError::StopsOnClose { .. }));
        assert_eq!(told(pipe), b"V");
        let (none, pipe) = arm(&FakeDriver {
            set: None,
            get: None,
            ..GOOD
        });
        let error = none.unwrap_err();
        assert!(matches!(error, WatchdogError::NoTimeout { .. }), "{error}");
        assert_eq!(told(pipe), b"V");
    }

    #[test]
    fn a_device_that_takes_no_feeding_is_an_error() {
        let (watchdog, pipe) = arm(&GOOD);
        let watchdog = watchdog.unwrap();
        drop(pipe);
        let error = watchdog.feed().unwrap_err();
        assert!(matches!(error, WatchdogError::Talk { .. }), "{error}");
    }

    #[test]
    fn odd_datagrams_mean_nothing() {
        for odd in [&b""[..], b"v", b"VV", b"1234567", b"123456789"] {
            assert_eq!(Message::decode(odd), None);
        }
        assert_eq!(
            Message::decode(&500_u64.to_le_bytes()),
            Some(Message::Feed { timeout: TIMEOUT })
        );
    }

    #[test]
    fn seconds_are_never_rounded_down() {
        assert_eq!(whole_seconds(Duration::ZERO), 1);
        assert_eq!(whole_seconds(TIMEOUT), 1);
        assert_eq!(whole_seconds(Duration::from_millis(1001)), 2);
        assert_eq!(whole_seconds(Duration::MAX), u32::MAX);
    }
}
