//! Records what a guest acknowledges: the client's memory of the records that must not be lost.
//!
//! Always holds: a range in the report was acknowledged by that boot of the guest; sequence numbers
//! of a boot are contiguous, so a range says it all. Reconnects for ever: the guest may be dead and
//! restarted elsewhere.

use super::end_of_input;
use quorate_guest::log::GuestBoot;
use quorate_guest::verify::AckRange;
use serde::{Deserialize, Serialize};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The guest says something every second; silence for longer means frozen or gone.
const SILENCE: Duration = Duration::from_millis(2500);
const CONNECT: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(50);

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct AcksArgs {
    /// Address and port of the guest's control.
    pub target: SocketAddr,
}

/// Result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AckReport {
    /// What was acknowledged, boot by boot.
    pub ranges: Vec<AckRange>,
    /// Connections that ended.
    pub disconnects: u64,
    /// Longest time without an acknowledgement, in microseconds, counted from the first one.
    pub longest_gap_us: u64,
}

impl AckReport {
    /// Number of acknowledged records.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.ranges
            .iter()
            .map(|range| range.last - range.first + 1)
            .sum()
    }

    /// Puts two reports about the same guest together.
    pub fn merge(&mut self, other: &Self) {
        for range in &other.ranges {
            note(&mut self.ranges, range.boot, range.first, range.last);
        }
        self.disconnects += other.disconnects;
        self.longest_gap_us = self.longest_gap_us.max(other.longest_gap_us);
    }
}

/// Collects until the standard input ends.
pub fn run(args: &AcksArgs) -> AckReport {
    let ended = end_of_input();
    let mut report = AckReport::default();
    let mut newest: Option<Instant> = None;
    while !ended.load(Ordering::SeqCst) {
        match TcpStream::connect_timeout(&args.target, CONNECT) {
            Ok(stream) => {
                let _ = listen(stream, &ended, &mut report, &mut newest);
                report.disconnects += u64::from(!ended.load(Ordering::SeqCst));
            }
            Err(_) => crate::wait::pause(RETRY),
        }
    }
    if let Some(newest) = newest {
        report.longest_gap_us = report.longest_gap_us.max(micros(newest.elapsed()));
    }
    report
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

fn listen(
    mut stream: TcpStream,
    ended: &AtomicBool,
    report: &mut AckReport,
    newest: &mut Option<Instant>,
) -> std::io::Result<()> {
    // Short, so that the end of the input is noticed; silence is added up.
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    stream.write_all(b"stream\n")?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    let mut boot: Option<(GuestBoot, u64)> = None;
    let mut heard = Instant::now();
    while !ended.load(Ordering::SeqCst) && heard.elapsed() < SILENCE {
        match lines.read_line(&mut line) {
            Ok(0) => return Ok(()),
            // A time-out in the middle of a line keeps what has arrived of it.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        heard = Instant::now();
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("boot"), Some(id), Some(first)) => {
                boot = id.parse().ok().zip(first.parse().ok());
            }
            (Some("ack"), Some(seq), None) => {
                if let (Some((boot, first)), Ok(seq)) = (boot, seq.parse()) {
                    if let Some(before) = newest.replace(heard) {
                        report.longest_gap_us = report.longest_gap_us.max(micros(heard - before));
                    }
                    note(&mut report.ranges, boot, first, seq);
                }
            }
            _ => {}
        }
        line.clear();
    }
    Ok(())
}

fn note(ranges: &mut Vec<AckRange>, boot: GuestBoot, first: u64, last: u64) {
    match ranges.iter_mut().rev().find(|range| range.boot == boot) {
        Some(range) => {
            range.first = range.first.min(first);
            range.last = range.last.max(last);
        }
        None => ranges.push(AckRange { boot, first, last }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_by_boot() {
        let (a, b) = (GuestBoot([1; 16]), GuestBoot([2; 16]));
        let mut one = AckReport::default();
        note(&mut one.ranges, a, 1, 5);
        note(&mut one.ranges, a, 1, 9);
        let mut two = AckReport::default();
        note(&mut two.ranges, a, 1, 7);
        note(&mut two.ranges, b, 10, 12);
        one.merge(&two);
        assert_eq!(one.ranges.len(), 2);
        assert_eq!(one.records(), 12);
    }
}
