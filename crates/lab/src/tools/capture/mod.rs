//! Notes which ports of the switch receive frames from a source that begins with certain bytes, with the kernel's
//! times: who speaks for a service's address, and until when.
//!
//! Always holds: times are nanoseconds of CLOCK_BOOTTIME, as leases are, and are taken by the kernel when the frame
//! arrives, so a busy machine does not make a frame late; frames that were lost are counted.

mod sys;

use super::end_of_input;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most frames that are noted one by one; more are only counted.
const NOTED: usize = 100_000;
/// What is read of a frame.
const HEAD: usize = 64;

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct CaptureArgs {
    /// Interfaces, such as `lan-h1`.
    #[arg(required = true)]
    pub interfaces: Vec<String>,
    /// Beginning of the source's MAC address; empty: any.
    #[arg(long, default_value = "02:51:56")]
    pub source: String,
}

/// Result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CaptureReport {
    /// What was seen on each interface.
    pub ports: BTreeMap<String, PortReport>,
}

/// Frames that one interface received.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PortReport {
    /// All frames.
    pub frames: u64,
    /// Frames that were lost: what is said here may lack them.
    pub lost: u64,
    /// Frames from such a source.
    pub matching: u64,
    /// Those, in order.
    pub noted: Vec<Noted>,
}

/// A frame from such a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    /// When it arrived, nanoseconds of CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// Its source.
    pub source: String,
    /// Its destination.
    pub destination: String,
    /// Its EtherType, such as `0806` for ARP.
    pub protocol: String,
}

impl PortReport {
    /// Frames from such a source that arrived after that time.
    #[must_use]
    pub fn after(&self, at_ns: u64) -> usize {
        self.noted.iter().filter(|one| one.at_ns > at_ns).count()
    }
}

/// Nanoseconds of CLOCK_BOOTTIME.
#[must_use]
pub fn boot_ns() -> u64 {
    nanoseconds(ClockId::Boottime)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Works until the standard input ends.
pub fn run(args: &CaptureArgs) -> io::Result<CaptureReport> {
    let prefix = prefix(&args.source)?;
    let ended = end_of_input();
    // The wall clock is steady for as long as a test: one look gives the difference.
    let ahead = nanoseconds(ClockId::Realtime).saturating_sub(boot_ns());
    let mut threads = Vec::new();
    for name in &args.interfaces {
        let capture = sys::Capture::open(index(name)?)?;
        let (ended, prefix) = (Arc::clone(&ended), prefix.clone());
        let thread = std::thread::spawn(move || note(&capture, &prefix, ahead, &ended));
        threads.push((name.clone(), thread));
    }
    let mut report = CaptureReport::default();
    for (name, thread) in threads {
        let noted = thread
            .join()
            .map_err(|_| io::Error::other("a capture has panicked"))??;
        report.ports.insert(name, noted);
    }
    Ok(report)
}

/// Asked of the kernel and not of `/sys`, which may show another namespace's interfaces.
pub(super) fn index(name: &str) -> io::Result<u32> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let asked = socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| netdevice::name_to_index(&socket, name));
    asked.map_err(|error| io::Error::other(format!("interface {name}: {error}")))
}

fn prefix(text: &str) -> io::Result<Vec<u8>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let bytes = text.split(':').map(|pair| u8::from_str_radix(pair, 16));
    bytes
        .collect::<Result<_, _>>()
        .map_err(|_| io::Error::other(format!("`{text}` is not the beginning of a MAC address")))
}

fn note(
    capture: &sys::Capture,
    prefix: &[u8],
    ahead: u64,
    ended: &AtomicBool,
) -> io::Result<PortReport> {
    let mut report = PortReport::default();
    let mut buffer = [0; HEAD];
    while !ended.load(Ordering::SeqCst) {
        let Some(frame) = capture.next(&mut buffer)? else {
            continue;
        };
        report.frames += 1;
        if let Some(noted) = look(
            &buffer[..frame.length.min(HEAD)],
            prefix,
            frame.at_ns,
            ahead,
        ) {
            report.matching += 1;
            if report.noted.len() < NOTED {
                report.noted.push(noted);
            }
        }
    }
    report.lost = capture.lost()?;
    Ok(report)
}

fn look(frame: &[u8], prefix: &[u8], at_ns: u64, ahead: u64) -> Option<Noted> {
    let source = frame.get(6..12)?;
    let kind = frame.get(12..14)?;
    source.starts_with(prefix).then(|| {
        let text = |mac: &[u8]| {
            let pairs: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            pairs.join(":")
        };
        Noted {
            at_ns: at_ns.saturating_sub(ahead),
            source: text(source),
            destination: text(&frame[..6]),
            protocol: format!("{:02x}{:02x}", kind[0], kind[1]),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frames_of_such_a_source_are_noted_at_the_time_of_leases() {
        let mut frame = [0; 60];
        frame[6..12].copy_from_slice(&[0x02, 0x51, 0x56, 0, 0, 9]);
        frame[12..14].copy_from_slice(&[8, 6]);
        let wanted = prefix("02:51:56").unwrap();
        let noted = look(&frame, &wanted, 1_000, 400).unwrap();
        assert_eq!(
            (noted.at_ns, noted.source.as_str(), noted.protocol.as_str()),
            (600, "02:51:56:00:00:09", "0806")
        );
        frame[8] = 0x44;
        assert_eq!(look(&frame, &wanted, 1_000, 400), None);
        assert_eq!(look(&frame[..8], &wanted, 1_000, 400), None);
        assert!(prefix("02:5x").is_err());
        let any = look(&frame, &prefix("").unwrap(), 1_000, 400).unwrap();
        assert_eq!(any.destination, "00:00:00:00:00:00");
    }
}
