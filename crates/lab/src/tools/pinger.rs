//! Measures blackouts: a datagram every millisecond to the guest's echo port.
//!
//! The blackout is the longest time between two answers. The report says, too, how late the pinger
//! itself was: on a busy machine a gap that the sender made is no gap of the guest.

use super::end_of_input;
use serde::{Deserialize, Serialize};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Gaps that are reported, the longest ones.
const GAPS: usize = 10;
/// Round-trip times kept for the median; after that, every new one replaces an old one.
const SAMPLES: usize = 100_000;

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct PingerArgs {
    /// Address and port of the guest's echo.
    pub target: SocketAddr,
    /// Time between two datagrams, in microseconds.
    #[arg(long, default_value_t = 1000)]
    pub interval_us: u64,
}

/// Result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PingReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Answers received.
    pub received: u64,
    /// Longest time between two answers, in microseconds; up to the end when answers stopped.
    pub longest_gap_us: u64,
    /// Longest time between two datagrams sent, in microseconds: the measurement's own error.
    pub sender_gap_us: u64,
    /// Median round trip in microseconds.
    pub rtt_median_us: u64,
    /// The longest gaps, longest first.
    pub gaps: Vec<Gap>,
}

/// One gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Gap {
    /// Length in microseconds.
    pub length_us: u64,
    /// When it ended, milliseconds since 1970.
    pub until_ms: u64,
}

/// Pings until the standard input ends.
pub fn run(args: &PingerArgs) -> std::io::Result<PingReport> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(args.target)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let ended = end_of_input();
    let begun = Instant::now();
    let sender = {
        let (socket, ended) = (socket.try_clone()?, Arc::clone(&ended));
        let interval = Duration::from_micros(args.interval_us.max(100));
        std::thread::spawn(move || send(&socket, begun, interval, &ended))
    };
    let mut report = receive(&socket, begun, &ended);
    if let Ok((sent, gap)) = sender.join() {
        report.sent = sent;
        report.sender_gap_us = gap;
    }
    Ok(report)
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

fn send(socket: &UdpSocket, begun: Instant, interval: Duration, ended: &AtomicBool) -> (u64, u64) {
    let number = AtomicU64::new(0);
    let (mut last, mut longest) = (begun, Duration::ZERO);
    while !ended.load(Ordering::SeqCst) {
        let now = Instant::now();
        let sent = number.fetch_add(1, Ordering::SeqCst);
        if sent > 0 {
            longest = longest.max(now - last);
        }
        last = now;
        let mut datagram = [0; 16];
        datagram[..8].copy_from_slice(&sent.to_le_bytes());
        datagram[8..].copy_from_slice(&micros(now - begun).to_le_bytes());
        // Errors (no neighbour, for example) are lost datagrams like any other.
        let _ = socket.send(&datagram);
        crate::wait::pause((now + interval).saturating_duration_since(Instant::now()));
    }
    (number.into_inner(), micros(longest))
}

fn receive(socket: &UdpSocket, begun: Instant, ended: &AtomicBool) -> PingReport {
    let mut report = PingReport::default();
    let mut times: Vec<u64> = Vec::new();
    let mut last: Option<Instant> = None;
    let mut buffer = [0; 64];
    while !ended.load(Ordering::SeqCst) {
        let Ok(16) = socket.recv(&mut buffer) else {
            continue;
        };
        let now = Instant::now();
        let mut sent_at = [0; 8];
        sent_at.copy_from_slice(&buffer[8..16]);
        let rtt = micros(now - begun).saturating_sub(u64::from_le_bytes(sent_at));
        match times.len() {
            SAMPLES => times[usize::try_from(report.received).unwrap_or(0) % SAMPLES] = rtt,
            _ => times.push(rtt),
        }
        report.received += 1;
        if let Some(last) = last {
            note_gap(&mut report.gaps, now - last);
        }
        last = Some(now);
    }
    // Silence until the end counts too.
    note_gap(&mut report.gaps, last.unwrap_or(begun).elapsed());
    report.longest_gap_us = report.gaps.first().map_or(0, |gap| gap.length_us);
    times.sort_unstable();
    report.rtt_median_us = times.get(times.len() / 2).copied().unwrap_or(0);
    report
}

fn note_gap(gaps: &mut Vec<Gap>, length: Duration) {
    let length_us = micros(length);
    if gaps.len() == GAPS
        && gaps
            .last()
            .is_some_and(|least| least.length_us >= length_us)
    {
        return;
    }
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let until_ms = u64::try_from(wall.map_or(0, |span| span.as_millis())).unwrap_or(0);
    gaps.push(Gap {
        length_us,
        until_ms,
    });
    gaps.sort_unstable_by(|a, b| b.cmp(a));
    gaps.truncate(GAPS);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gaps_are_kept() {
        let mut gaps = Vec::new();
        for length in 1..=50 {
            note_gap(&mut gaps, Duration::from_micros(length * 7 % 51));
        }
        assert_eq!(gaps.len(), GAPS);
        assert_eq!(gaps[0].length_us, 50);
        assert!(gaps.is_sorted_by(|a, b| a.length_us >= b.length_us));
    }
}
