//! The emulated hardware watchdog: a datagram socket that must be fed.
//!
//! A datagram of 8 bytes is a feed and arms the watchdog: the timeout in milliseconds, little endian. The datagram
//! `V` disarms it, as closing a hardware watchdog in order does. Anything else is ignored, and so
//! feeds nothing.

use super::host::Host;
use crate::{LabError, Result};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest timeout that is taken; hardware has a limit too.
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);
/// How often an idle watchdog looks whether the supervisor is to end.
const IDLE: Duration = Duration::from_millis(200);

/// A datagram's meaning.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Feed(Duration),
    Disarm,
    Noise,
}

fn understand(datagram: &[u8]) -> Word {
    if datagram == b"V" {
        return Word::Disarm;
    }
    match <[u8; 8]>::try_from(datagram) {
        Ok(bytes) => {
            let timeout = Duration::from_millis(u64::from_le_bytes(bytes));
            if timeout.is_zero() {
                Word::Noise
            } else {
                Word::Feed(timeout.min(MAX_TIMEOUT))
            }
        }
        Err(_) => Word::Noise,
    }
}

/// The watchdog's socket.
pub(super) struct Watchdog {
    socket: UnixDatagram,
}

impl Watchdog {
    pub(super) fn bind(dir: &Path) -> Result<Self> {
        let path = dir.join("watchdog.sock");
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).map_err(LabError::file("bind", &path))?;
        Ok(Self { socket })
    }

    /// Watches until the supervisor is told to end.
    pub(super) fn run(&self, host: &Host) {
        let mut armed: Option<(Duration, Instant)> = None;
        while !host.told_to_finish() {
            if host.power_was_cut() {
                // A machine without power has no watchdog running; what it sent before is void.
                armed = None;
                self.drain();
            }
            let left = armed.map_or(IDLE, |(_, due)| {
                due.saturating_duration_since(Instant::now())
            });
            match self.next(left.min(IDLE)) {
                Some(Word::Feed(timeout)) => armed = Some((timeout, Instant::now() + timeout)),
                Some(Word::Disarm) => armed = None,
                Some(Word::Noise) => {}
                None => {
                    if let Some((timeout, due)) = armed
                        && Instant::now() >= due
                    {
                        armed = None;
                        host.watchdog_fires(timeout, due);
                        self.drain();
                    }
                }
            }
            host.watchdog_armed(armed.map(|(timeout, _)| timeout));
        }
    }

    /// The next word, waiting at most `limit` for it. A feed that arrived before the deadline counts even if
    /// this process was late to read it.
    fn next(&self, limit: Duration) -> Option<Word> {
        // Zero would mean no limit.
        let limit = limit.max(Duration::from_micros(100));
        self.socket.set_read_timeout(Some(limit)).ok()?;
        let mut buffer = [0; 64];
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(understand(&buffer[..length]))
    }

    fn drain(&self) {
        for _ in 0..1024 {
            if self.next(Duration::ZERO).is_none() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_feeds_feed() {
        assert_eq!(
            understand(&750_u64.to_le_bytes()),
            Word::Feed(Duration::from_millis(750))
        );
        assert_eq!(understand(b"V"), Word::Disarm);
        assert_eq!(understand(&0_u64.to_le_bytes()), Word::Noise);
        assert_eq!(understand(b"V\n"), Word::Noise);
        assert_eq!(understand(b""), Word::Noise);
        assert_eq!(understand(&u64::MAX.to_le_bytes()), Word::Feed(MAX_TIMEOUT));
    }
}
