//! Protocol data units of iSCSI, as far as a look at a target needs them (RFC 7143, section 11).
//!
//! Always holds: whatever a target sends is bounded ([`DATA_MAX`]) and read by position with checks; nothing here
//! panics on what comes from outside. Digests are never negotiated, so none are read.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Length of the basic header segment.
pub(super) const HEADER: usize = 48;
/// Most data of one unit that is accepted, in bytes: what we declare as MaxRecvDataSegmentLength.
pub(super) const DATA_MAX: usize = 64 * 1024;

/// Operation codes.
pub(super) mod op {
    pub(crate) const NOP_OUT: u8 = 0x00;
    pub(crate) const SCSI_COMMAND: u8 = 0x01;
    pub(crate) const LOGIN: u8 = 0x03;
    pub(crate) const TEXT: u8 = 0x04;
    pub(crate) const DATA_OUT: u8 = 0x05;
    pub(crate) const LOGOUT: u8 = 0x06;
    pub(crate) const NOP_IN: u8 = 0x20;
    pub(crate) const SCSI_RESPONSE: u8 = 0x21;
    pub(crate) const LOGIN_RESPONSE: u8 = 0x23;
    pub(crate) const TEXT_RESPONSE: u8 = 0x24;
    pub(crate) const DATA_IN: u8 = 0x25;
    /// "Ready to transfer": the target asks for data.
    pub(crate) const R2T: u8 = 0x31;
    pub(crate) const ASYNC: u8 = 0x32;
    pub(crate) const REJECT: u8 = 0x3f;
    /// Delivered at once, outside the order of commands.
    pub(crate) const IMMEDIATE: u8 = 0x40;
}

/// One unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pdu {
    pub(super) header: [u8; HEADER],
    pub(super) data: Vec<u8>,
}

impl Pdu {
    pub(super) fn new(opcode: u8, flags: u8) -> Self {
        let mut header = [0; HEADER];
        header[0] = opcode;
        header[1] = flags;
        Self {
            header,
            data: Vec::new(),
        }
    }

    pub(super) fn opcode(&self) -> u8 {
        self.header[0] & 0x3f
    }

    pub(super) fn flags(&self) -> u8 {
        self.header[1]
    }

    pub(super) fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.header.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_be_bytes());
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        be32(&self.header, at).unwrap_or(0)
    }

    /// Sends it, its data padded to words.
    pub(super) async fn write(&mut self, stream: &mut TcpStream) -> std::io::Result<()> {
        let length = u32::try_from(self.data.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes();
        self.header[4] = 0;
        self.header[5..8].copy_from_slice(&length[1..]);
        let mut bytes = self.header.to_vec();
        bytes.extend_from_slice(&self.data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        stream.write_all(&bytes).await
    }

    /// Reads the next one.
    pub(super) async fn read(stream: &mut TcpStream) -> std::io::Result<Self> {
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).await?;
        let extra = usize::from(header[4]) * 4;
        let length = be32(&[0, header[5], header[6], header[7]], 0).unwrap_or(0) as usize;
        if length > DATA_MAX {
            let text = format!("the target sent {length} bytes where {DATA_MAX} were agreed");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
        }
        let mut rest = vec![0; extra + length.next_multiple_of(4)];
        stream.read_exact(&mut rest).await?;
        rest.truncate(extra + length);
        Ok(Self {
            header,
            data: rest.split_off(extra),
        })
    }
}

/// A big-endian number, if the bytes are there.
pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(four.try_into().ok()?))
}

/// A big-endian number, if the bytes are there.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let eight = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(eight.try_into().ok()?))
}

/// `key=value` pairs, each ended by a zero byte.
pub(super) fn keys(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in pairs {
        data.extend_from_slice(format!("{key}={value}\0").as_bytes());
    }
    data
}

/// Reads such pairs; what is none is left out.
pub(super) fn parse_keys(data: &[u8]) -> Vec<(String, String)> {
    let words = data.split(|byte| *byte == 0);
    let pair = |word: &[u8]| {
        let text = std::str::from_utf8(word).ok()?;
        let (key, value) = text.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    };
    words.filter_map(pair).collect()
}

/// A target behind a portal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub target: String,
    /// Its portals, each with the number of its group: `10.0.0.5:3260,1`.
    pub addresses: Vec<String>,
}

impl Found {
    /// The portal group that this portal (`address:port`) of the target belongs to; 1 where the target does not say.
    pub(super) fn group(&self, portal: &str) -> u16 {
        let groups = self.addresses.iter().filter_map(|address| {
            let (address, group) = address.rsplit_once(',')?;
            Some((address, group.parse::<u16>().ok()?))
        });
        let mut groups: Vec<_> = groups.collect();
        groups.sort_by_key(|(address, _)| *address != portal);
        groups.first().map_or(1, |(_, group)| *group)
    }
}

/// The answer to `SendTargets`: each name is followed by its addresses.
pub(super) fn targets(text: &[u8]) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for (key, value) in parse_keys(text) {
        match (key.as_str(), found.last_mut()) {
            ("TargetName", _) => found.push(Found {
                target: value,
                addresses: Vec::new(),
            }),
            ("TargetAddress", Some(last)) => last.addresses.push(value),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_come_with_their_addresses() {
        let text =
            b"TargetAddress=10.0.0.9:3260,9\0TargetName=iqn.a\0TargetAddress=10.0.0.5:3260,1\0\
            TargetAddress=[fd00::5]:3260,2\0TargetName=iqn.b\0";
        let found = targets(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].group("[fd00::5]:3260"), 2);
        assert_eq!(found[0].group("10.0.0.6:3260"), 1, "the first it names");
        assert_eq!(found[1].group("10.0.0.5:3260"), 1, "it names none");
    }

    #[test]
    fn keys_survive_and_noise_is_left_out() {
        let data = keys(&[("SendTargets", "All"), ("A", "b=c")]);
        let pairs = parse_keys(&data);
        assert_eq!(pairs[0], ("SendTargets".into(), "All".into()));
        assert_eq!(pairs[1], ("A".into(), "b=c".into()));
        assert!(parse_keys(b"\0\xff=\0x\0").is_empty());
    }

    #[test]
    fn numbers_past_the_end_are_none() {
        assert_eq!(be32(&[0, 0, 1, 0], 0), Some(256));
        assert_eq!(be32(&[0, 0, 1], 0), None);
        assert_eq!(be64(&[0; 8], usize::MAX - 1), None);
    }
}
