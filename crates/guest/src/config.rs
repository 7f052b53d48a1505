//! The guest's settings, read from its kernel command line (`qr.name=db qr.ip=10.77.0.11/24 ...`).
//!
//! Words without `qr.` are the kernel's. An unknown `qr.` word is an error: a typing mistake in a
//! test would otherwise make the test pass for the wrong reason.

use std::fmt;

/// What one guest does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `qr.name`: the VM's name, written into every record.
    pub name: String,
    /// `qr.ip`: address with prefix length for `eth0`; absent: no network.
    pub ip: Option<String>,
    /// `qr.ip6`: an IPv6 address with prefix length besides.
    pub ip6: Option<String>,
    /// `qr.disk`: raw disk for the log; absent: no log.
    pub disk: Option<String>,
    /// `qr.log_hz`: records per second.
    pub log_hz: u32,
    /// `qr.ready_after_ms`: wait this long before announcing readiness.
    pub ready_after_ms: u64,
    /// `qr.ignore_shutdown=1`: ignore the power button and the guest agent's shutdown.
    pub ignore_shutdown: bool,
    /// `qr.shutdown_after_ms`: take this long to shut down.
    pub shutdown_after_ms: u64,
    /// `qr.dirty_mib`: size of the memory that is written over and over; 0: none.
    pub dirty_mib: u64,
    /// `qr.dirty_mib_per_s`: how fast.
    pub dirty_mib_per_s: u64,
    /// `qr.crash_after_ms`: crash the kernel this long after readiness.
    pub crash_after_ms: Option<u64>,
    /// `qr.shell=1`: a shell on the console.
    pub shell: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "guest".to_owned(),
            ip: None,
            ip6: None,
            disk: None,
            log_hz: 50,
            ready_after_ms: 0,
            ignore_shutdown: false,
            shutdown_after_ms: 0,
            dirty_mib: 0,
            dirty_mib_per_s: 50,
            crash_after_ms: None,
            shell: false,
        }
    }
}

/// A `qr.` word that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadWord(String);

impl fmt::Display for BadWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "kernel command line: cannot use `{}`; see crates/guest/src/config.rs for the words that exist",
            self.0
        )
    }
}

impl std::error::Error for BadWord {}

impl Config {
    /// Reads a kernel command line. The second value lists the words that could not be used.
    #[must_use]
    pub fn parse(line: &str) -> (Self, Vec<BadWord>) {
        let mut config = Self::default();
        let mut bad = Vec::new();
        for word in line.split_ascii_whitespace() {
            if let Some(setting) = word.strip_prefix("qr.")
                && config.set(setting).is_none()
            {
                bad.push(BadWord(word.to_owned()));
            }
        }
        (config, bad)
    }

    fn set(&mut self, setting: &str) -> Option<()> {
        let (key, value) = setting.split_once('=')?;
        match key {
            "name" => self.name = value.to_owned(),
            "ip" => self.ip = Some(value.to_owned()),
            "ip6" => self.ip6 = Some(value.to_owned()),
            "disk" => self.disk = Some(value.to_owned()),
            "log_hz" => self.log_hz = value.parse().ok().filter(|hz| (1..=100_000).contains(hz))?,
            "ready_after_ms" => self.ready_after_ms = value.parse().ok()?,
            "ignore_shutdown" => self.ignore_shutdown = flag(value)?,
            "shutdown_after_ms" => self.shutdown_after_ms = value.parse().ok()?,
            "dirty_mib" => self.dirty_mib = value.parse().ok()?,
            "dirty_mib_per_s" => self.dirty_mib_per_s = value.parse().ok()?,
            "crash_after_ms" => self.crash_after_ms = Some(value.parse().ok()?),
            "shell" => self.shell = flag(value)?,
            _ => return None,
        }
        Some(())
    }
}

fn flag(value: &str) -> Option<bool> {
    match value {
        "1" => Some(true),
        "0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_words_are_left_alone() {
        let (config, bad) =
            Config::parse("console=ttyS0 panic=-1 qr.name=db qr.ip=10.77.0.11/24 qr.log_hz=20\n");
        assert!(bad.is_empty());
        assert_eq!(config.name, "db");
        assert_eq!(config.ip.as_deref(), Some("10.77.0.11/24"));
        assert_eq!(config.log_hz, 20);
    }

    #[test]
    fn mistakes_are_reported_and_change_nothing() {
        let (config, bad) = Config::parse("qr.nmae=db qr.log_hz=0 qr.shell=yes qr.disk");
        assert_eq!(bad.len(), 4);
        assert_eq!(config, Config::default());
    }
}
