//! Frames: made with right checksums, and judged.

use std::net::IpAddr;

pub const SYN: u8 = 2;
pub const ACK: u8 = 16;
pub const RST: u8 = 4;
pub const FIN: u8 = 1;

/// What a frame is made of.
#[derive(Clone)]
pub struct Frame {
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub payload: Vec<u8>,
    pub ttl: u8,
    /// IPv4 options; IPv6: a destination options header of 8 octets, if not empty.
    pub options: Vec<u8>,
    /// Identification, offset in octets, more to come.
    pub fragment: Option<(u32, u16, bool)>,
}

pub fn sum(octets: &[u8]) -> u32 {
    let mut sum = 0_u32;
    for pair in octets.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
    }
    sum
}

pub fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The pseudo header's sum.
fn pseudo(source: &[u8], destination: &[u8], protocol: u8, length: usize) -> u32 {
    sum(source) + sum(destination) + u32::from(protocol) + u32::try_from(length).unwrap()
}

fn checksum_at(protocol: u8) -> Option<usize> {
    match protocol {
        6 => Some(16),
        17 => Some(6),
        1 | 58 => Some(2),
        _ => None,
    }
}

impl Frame {
    pub fn new(source: &str, destination: &str, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            destination_mac: [2, 0x51, 0x56, 0, 0, 7],
            source_mac: super::CLIENT_MAC,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol,
            payload,
            ttl: 63,
            options: Vec::new(),
            fragment: None,
        }
    }

    pub fn tcp(source: &str, destination: &str, from: u16, to: u16, flags: u8) -> Self {
        let mut tcp = vec![0; 20];
        tcp[0..2].copy_from_slice(&from.to_be_bytes());
        tcp[2..4].copy_from_slice(&to.to_be_bytes());
        tcp[12] = 0x50;
        tcp[13] = flags;
        tcp.extend_from_slice(b"some data!");
        Self::new(source, destination, 6, tcp)
    }

    pub fn udp(source: &str, destination: &str, from: u16, to: u16) -> Self {
        let mut udp = vec![0; 8];
        udp[0..2].copy_from_slice(&from.to_be_bytes());
        udp[2..4].copy_from_slice(&to.to_be_bytes());
        udp.extend_from_slice(b"datagram");
        let length = u16::try_from(udp.len()).unwrap();
        udp[4..6].copy_from_slice(&length.to_be_bytes());
        Self::new(source, destination, 17, udp)
    }

    pub fn echo(source: &str, destination: &str) -> Self {
        let v6 = source.contains(':');
        let kind = if v6 { 128 } else { 8 };
        let mut icmp = vec![kind, 0, 0, 0, 0, 1, 0, 2];
        icmp.extend_from_slice(b"ping-pong");
        Self::new(source, destination, if v6 { 58 } else { 1 }, icmp)
    }

    /// An ICMP error that quotes a frame, with `quoted` octets after its IP header.
    pub fn error(source: &str, destination: &str, kind: u8, about: &Self, quoted: usize) -> Self {
        let v6 = source.contains(':');
        let mut icmp = vec![kind, 0, 0, 0, 0, 0, 5, 0];
        let header = if v6 { 40 } else { 20 };
        icmp.extend_from_slice(&about.build()[14..14 + header + quoted]);
        Self::new(source, destination, if v6 { 58 } else { 1 }, icmp)
    }

    pub fn from(mut self, mac: [u8; 6]) -> Self {
        self.source_mac = mac;
        self
    }

    pub fn to(mut self, mac: [u8; 6]) -> Self {
        self.destination_mac = mac;
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let (source, destination) = (octets(self.source), octets(self.destination));
        let v6 = source.len() == 16;
        let mut payload = self.payload.clone();
        let whole = self.fragment.is_none_or(|(_, offset, _)| offset == 0);
        if let Some(at) = checksum_at(self.protocol).filter(|_| whole && payload.len() >= 8) {
            let start = if self.protocol == 1 {
                0
            } else {
                pseudo(&source, &destination, self.protocol, payload.len())
            };
            payload[at..at + 2].fill(0);
            let mut value = !fold(start + sum(&payload));
            if value == 0 && self.protocol == 17 {
                value = 0xffff;
            }
            payload[at..at + 2].copy_from_slice(&value.to_be_bytes());
        }
        let mut frame = [self.destination_mac, self.source_mac].concat();
        if v6 {
            self.ipv6(&mut frame, &source, &destination, &payload);
        } else {
            self.ipv4(&mut frame, &source, &destination, &payload);
        }
        frame.extend_from_slice(&payload);
        frame
    }

    fn ipv4(&self, frame: &mut Vec<u8>, source: &[u8], destination: &[u8], payload: &[u8]) {
        frame.extend_from_slice(&[8, 0]);
        let header = 20 + self.options.len();
        let mut ip = vec![0; header];
        ip[0] = 0x40 | u8::try_from(header / 4).unwrap();
        let length = u16::try_from(header + payload.len()).unwrap();
        ip[2..4].copy_from_slice(&length.to_be_bytes());
        if let Some((id, offset, more)) = self.fragment {
            ip[4..6].copy_from_slice(&u16::try_from(id).unwrap().to_be_bytes());
            let word = (offset / 8) | if more { 0x2000 } else { 0 };
            ip[6..8].copy_from_slice(&word.to_be_bytes());
        }
        ip[8] = self.ttl;
        ip[9] = self.protocol;
        ip[12..16].copy_from_slice(source);
        ip[16..20].copy_from_slice(destination);
        ip[20..].copy_from_slice(&self.options);
        let value = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&value.to_be_bytes());
        frame.extend_from_slice(&ip);
    }

    fn ipv6(&self, frame: &mut Vec<u8>, source: &[u8], destination: &[u8], payload: &[u8]) {
        frame.extend_from_slice(&[0x86, 0xdd]);
        let mut extra = Vec::new();
        let mut next = self.protocol;
        if let Some((id, offset, more)) = self.fragment {
            let word = offset | u16::from(more);
            extra = [
                vec![next, 0],
                word.to_be_bytes().to_vec(),
                id.to_be_bytes().to_vec(),
            ]
            .concat();
            next = 44;
        }
        if !self.options.is_empty() {
            extra = [vec![next, 0, 1, 4, 0, 0, 0, 0], extra].concat();
            next = 60;
        }
        let length = u16::try_from(payload.len() + extra.len()).unwrap();
        frame.extend_from_slice(&[0x60, 0, 0, 0]);
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&[next, self.ttl]);
        frame.extend_from_slice(source);
        frame.extend_from_slice(destination);
        frame.extend_from_slice(&extra);
    }
}

/// An ARP packet.
pub fn arp(operation: u8, sender_mac: [u8; 6], sender: &str, target: &str) -> Vec<u8> {
    let mut frame = [[0xff; 6], sender_mac].concat();
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend_from_slice(&sender_mac);
    frame.extend_from_slice(&octets(sender.parse().unwrap()));
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&octets(target.parse().unwrap()));
    frame.resize(60, 0);
    frame
}

/// A neighbour solicitation (135) or advertisement (136).
pub fn neighbour(
    kind: u8,
    source_mac: [u8; 6],
    source: &str,
    target: &str,
    option: bool,
) -> Vec<u8> {
    let mut icmp = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(&octets(target.parse().unwrap()));
    if option {
        icmp.extend_from_slice(&[1, 1]);
        icmp.extend_from_slice(&source_mac);
    }
    let mut frame = Frame::new(source, "ff02::1:ff00:100", 58, icmp);
    frame.ttl = 255;
    frame
        .from(source_mac)
        .to([0x33, 0x33, 0xff, 0, 1, 0])
        .build()
}

/// A frame that came out of a program.
pub struct Seen<'a>(pub &'a [u8]);

impl<'a> Seen<'a> {
    pub fn destination_mac(&self) -> &[u8] {
        &self.0[0..6]
    }

    pub fn source_mac(&self) -> &[u8] {
        &self.0[6..12]
    }

    pub fn is_v6(&self) -> bool {
        self.0[12..14] == [0x86, 0xdd]
    }

    pub fn source(&self) -> IpAddr {
        if self.is_v6() {
            <[u8; 16]>::try_from(&self.0[22..38]).unwrap().into()
        } else {
            <[u8; 4]>::try_from(&self.0[26..30]).unwrap().into()
        }
    }

    pub fn destination(&self) -> IpAddr {
        if self.is_v6() {
            <[u8; 16]>::try_from(&self.0[38..54]).unwrap().into()
        } else {
            <[u8; 4]>::try_from(&self.0[30..34]).unwrap().into()
        }
    }

    /// The transport header, behind options and extension headers of [`Frame::build`].
    pub fn payload(&self) -> (u8, &'a [u8]) {
        if !self.is_v6() {
            let header = usize::from(self.0[14] & 15) * 4;
            return (self.0[23], &self.0[14 + header..]);
        }
        let (mut next, mut at) = (self.0[20], 54);
        while next == 60 || next == 44 {
            next = self.0[at];
            at += 8;
        }
        (next, &self.0[at..])
    }

    /// Whether all checksums are right.
    pub fn is_right(&self) -> bool {
        let (protocol, payload) = self.payload();
        let header = self.is_v6() || fold(sum(&self.0[14..self.0.len() - payload.len()])) == 0xffff;
        let start = if protocol == 1 {
            0
        } else {
            let (source, destination) = (octets(self.source()), octets(self.destination()));
            pseudo(&source, &destination, protocol, payload.len())
        };
        let none = protocol == 17 && payload[6..8] == [0, 0];
        header && (none || fold(start + sum(payload)) == 0xffff)
    }
}
