//! A machine that claims an address that is not its own: the negative control of everything that is said about
//! addresses of services.
//!
//! It announces the address with a MAC of its own (gratuitous ARP) again and again, and answers whoever asks for it.

use super::end_of_input;
use quorate_network::linux::packet::PacketSocket;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Between two looks for frames.
const STEP: Duration = Duration::from_millis(2);

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct ImpostorArgs {
    /// Interface that it speaks on.
    pub interface: String,
    /// Address that it claims.
    pub address: Ipv4Addr,
    /// MAC address that it claims it with.
    #[arg(long, default_value = "02:00:00:00:0b:ad")]
    pub mac: String,
    /// Announces it so often; 0: only answers.
    #[arg(long, default_value_t = 200)]
    pub every_ms: u64,
}

/// Result.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImpostorReport {
    /// Announcements sent.
    pub announced: u64,
    /// Questions answered.
    pub answered: u64,
    /// Frames of clients that came here instead.
    pub stolen: u64,
}

/// Works until the standard input ends.
pub fn run(args: &ImpostorArgs) -> io::Result<ImpostorReport> {
    let ended = end_of_input();
    let bad = || io::Error::other(format!("`{}` is not a MAC address", args.mac));
    let mac: quorate_network::MacAddr = args.mac.parse().map_err(|_| bad())?;
    let (mac, address) = (mac.octets(), args.address.octets());
    let socket = PacketSocket::capture(super::capture::index(&args.interface)?)?;
    let mut report = ImpostorReport::default();
    let every = Duration::from_millis(args.every_ms);
    let mut next = Instant::now();
    let mut buffer = [0; 2048];
    while !ended.load(Ordering::SeqCst) {
        if args.every_ms > 0 && Instant::now() >= next {
            next = Instant::now() + every;
            socket.send(&arp(1, mac, address, [0xff; 6], address))?;
            report.announced += 1;
        }
        match socket.receive(&mut buffer) {
            Ok(length) => {
                let frame = &buffer[..length];
                if let Some((asker, from)) = question(frame, address) {
                    socket.send(&arp(2, mac, address, asker, from))?;
                    report.answered += 1;
                } else if frame.len() > 34 && frame[..6] == mac && frame[12..14] == [8, 0] {
                    report.stolen += 1;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => crate::wait::pause(STEP),
            Err(error) => return Err(error),
        }
    }
    Ok(report)
}

fn arp(operation: u8, mac: [u8; 6], address: [u8; 4], to: [u8; 6], target: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(60);
    frame.extend(to);
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(mac);
    frame.extend(address);
    // In an announcement nobody is asked.
    frame.extend(if to == [0xff; 6] { [0; 6] } else { to });
    frame.extend(target);
    frame.resize(60, 0);
    frame
}

/// Who asks for the address: MAC and address.
fn question(frame: &[u8], address: [u8; 4]) -> Option<([u8; 6], [u8; 4])> {
    let asks = frame.len() >= 42
        && frame[12..14] == [8, 6]
        && frame[20..22] == [0, 1]
        && frame[38..42] == address
        && frame[28..32] != address;
    asks.then(|| {
        let (mut mac, mut from) = ([0; 6], [0; 4]);
        mac.copy_from_slice(&frame[22..28]);
        from.copy_from_slice(&frame[28..32]);
        (mac, from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_answers_questions_for_its_address_and_nothing_else() {
        let (asker, impostor) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let mut ask = arp(1, asker, [10, 0, 0, 1], [0xff; 6], [10, 0, 0, 9]);
        assert_eq!(question(&ask, [10, 0, 0, 9]), Some((asker, [10, 0, 0, 1])));
        assert_eq!(question(&ask, [10, 0, 0, 8]), None);
        let announcement = arp(1, impostor, [10, 0, 0, 9], [0xff; 6], [10, 0, 0, 9]);
        assert_eq!(question(&announcement, [10, 0, 0, 9]), None);
        ask[21] = 2;
        assert_eq!(question(&ask, [10, 0, 0, 9]), None);
    }
}
