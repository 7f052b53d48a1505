//! Bytes on disk and on the wire.
//!
//! Owns the layout of a log entry and of the peer RPC bodies. What always holds: every stored or sent
//! entry carries a checksum over its index and content, so a flipped bit or a swapped record is an
//! error and never a different command. It must not do I/O. Layout in docs/decisions/0002.
//!
//! ```text
//! entry    = checksum[8] kind[1] term[8] leader[8] payload       (index is the key / sent in front)
//! rpc body = version[1] header_length[4] header(JSON) tail       (tail: entries or snapshot bytes)
//! ```

use openraft::{EntryPayload, LogId as RaftLogId, Membership};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::types::{Entry, TypeConfig};

/// Version byte in front of every RPC body.
pub(crate) const RPC_VERSION: u8 = 1;

const CHECKSUM: usize = 8;
const ENTRY_HEADER: usize = CHECKSUM + 1 + 8 + 8;
const KIND_BLANK: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;

/// Bytes that are not what they should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum CodecError {
    /// Fewer bytes than the layout needs.
    #[error("cut short: {what} needs {need} bytes, {have} are there")]
    Short {
        what: &'static str,
        need: usize,
        have: usize,
    },
    /// The checksum does not match.
    #[error("checksum of {what} does not match")]
    Checksum { what: String },
    /// An entry kind of a newer release.
    #[error("entry {index} has the unknown kind {kind}")]
    Kind { index: u64, kind: u8 },
    /// An RPC body of another version.
    #[error("peer speaks version {found} of the log protocol, this node speaks {RPC_VERSION}")]
    Version { found: u8 },
    /// JSON that does not parse.
    #[error("malformed {what}: {reason}")]
    Json { what: &'static str, reason: String },
}

/// First 8 bytes of SHA-256 over the parts.
pub(crate) fn checksum(parts: &[&[u8]]) -> [u8; CHECKSUM] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    let digest = hasher.finalize();
    let mut out = [0; CHECKSUM];
    out.copy_from_slice(&digest[..CHECKSUM]);
    out
}

pub(crate) fn to_json<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, CodecError> {
    serde_json::to_vec(value).map_err(|e| CodecError::Json {
        what,
        reason: e.to_string(),
    })
}

pub(crate) fn from_json<T: DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
) -> Result<T, CodecError> {
    serde_json::from_slice(bytes).map_err(|e| CodecError::Json {
        what,
        reason: e.to_string(),
    })
}

/// Encodes an entry without its index.
pub(crate) fn encode_entry(entry: &Entry) -> Result<Vec<u8>, CodecError> {
    let membership;
    let (kind, payload): (u8, &[u8]) = match &entry.payload {
        EntryPayload::Blank => (KIND_BLANK, &[]),
        EntryPayload::Normal(command) => (KIND_COMMAND, command),
        EntryPayload::Membership(m) => {
            membership = to_json("membership", m)?;
            (KIND_MEMBERSHIP, &membership)
        }
    };
    let mut out = vec![0; CHECKSUM];
    out.reserve(ENTRY_HEADER + payload.len());
    out.push(kind);
    out.extend_from_slice(&entry.log_id.leader_id.term.to_be_bytes());
    out.extend_from_slice(&entry.log_id.leader_id.node_id.to_be_bytes());
    out.extend_from_slice(payload);
    let sum = checksum(&[&entry.log_id.index.to_be_bytes(), &out[CHECKSUM..]]);
    out[..CHECKSUM].copy_from_slice(&sum);
    Ok(out)
}

/// Decodes the entry that is stored at `index`.
pub(crate) fn decode_entry(index: u64, bytes: &[u8]) -> Result<Entry, CodecError> {
    if bytes.len() < ENTRY_HEADER {
        return Err(CodecError::Short {
            what: "log entry",
            need: ENTRY_HEADER,
            have: bytes.len(),
        });
    }
    let (sum, rest) = bytes.split_at(CHECKSUM);
    if checksum(&[&index.to_be_bytes(), rest]) != sum {
        return Err(CodecError::Checksum {
            what: format!("log entry {index}"),
        });
    }
    let term = be_u64(&rest[1..9]);
    let node = be_u64(&rest[9..17]);
    let body = &rest[17..];
    let payload = match rest[0] {
        KIND_BLANK => EntryPayload::Blank,
        KIND_COMMAND => EntryPayload::Normal(body.to_vec()),
        KIND_MEMBERSHIP => {
            let m: Membership<u64, openraft::EmptyNode> = from_json("membership", body)?;
            EntryPayload::Membership(m)
        }
        kind => return Err(CodecError::Kind { index, kind }),
    };
    Ok(openraft::Entry::<TypeConfig> {
        log_id: RaftLogId::new(openraft::CommittedLeaderId::new(term, node), index),
        payload,
    })
}

fn be_u64(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .take(8)
        .fold(0, |acc, byte| (acc << 8) | u64::from(*byte))
}

/// Builds an RPC body from its JSON header and its raw tail.
pub(crate) fn frame<T: Serialize>(header: &T, tail: &[u8]) -> Result<Vec<u8>, CodecError> {
    let json = to_json("rpc header", header)?;
    let length = u32::try_from(json.len()).map_err(|e| CodecError::Json {
        what: "rpc header",
        reason: e.to_string(),
    })?;
    let mut out = Vec::with_capacity(5 + json.len() + tail.len());
    out.push(RPC_VERSION);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&json);
    out.extend_from_slice(tail);
    Ok(out)
}

/// Splits an RPC body into its header and its tail.
pub(crate) fn unframe<T: DeserializeOwned>(body: &[u8]) -> Result<(T, &[u8]), CodecError> {
    let short = |need| CodecError::Short {
        what: "rpc body",
        need,
        have: body.len(),
    };
    let (version, rest) = body.split_first().ok_or_else(|| short(5))?;
    if *version != RPC_VERSION {
        return Err(CodecError::Version { found: *version });
    }
    let (length, rest) = rest.split_at_checked(4).ok_or_else(|| short(5))?;
    let length = usize::try_from(be_u64(length)).map_err(|_| short(usize::MAX))?;
    let (json, tail) = rest
        .split_at_checked(length)
        .ok_or_else(|| short(length.saturating_add(5)))?;
    Ok((from_json("rpc header", json)?, tail))
}

/// Entries one after the other: index, length, entry.
pub(crate) fn encode_entries(entries: &[Entry]) -> Result<Vec<u8>, CodecError> {
    let mut out = Vec::new();
    for entry in entries {
        let bytes = encode_entry(entry)?;
        let length = u32::try_from(bytes.len()).map_err(|e| CodecError::Json {
            what: "log entry",
            reason: e.to_string(),
        })?;
        out.extend_from_slice(&entry.log_id.index.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&bytes);
    }
    Ok(out)
}

/// The inverse of [`encode_entries`].
pub(crate) fn decode_entries(mut bytes: &[u8]) -> Result<Vec<Entry>, CodecError> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let short = |need| CodecError::Short {
            what: "log entries",
            need,
            have: bytes.len(),
        };
        let (head, rest) = bytes.split_at_checked(12).ok_or_else(|| short(12))?;
        let index = be_u64(&head[..8]);
        let length = usize::try_from(be_u64(&head[8..])).map_err(|_| short(usize::MAX))?;
        let (entry, rest) = rest.split_at_checked(length).ok_or_else(|| short(length))?;
        out.push(decode_entry(index, entry)?);
        bytes = rest;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeSet;

    fn entry(index: u64, payload: EntryPayload<TypeConfig>) -> Entry {
        Entry {
            log_id: RaftLogId::new(openraft::CommittedLeaderId::new(7, 3), index),
            payload,
        }
    }

    #[test]
    fn entries_survive_the_round_trip() {
        let membership = Membership::new(vec![BTreeSet::from([1, 2])], ());
        let entries = vec![
            entry(4, EntryPayload::Blank),
            entry(5, EntryPayload::Normal(vec![0, 255, 10])),
            entry(6, EntryPayload::Membership(membership)),
        ];
        let bytes = encode_entries(&entries).unwrap();
        assert_eq!(decode_entries(&bytes).unwrap(), entries);
        assert!(decode_entries(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn every_flipped_bit_and_every_wrong_place_is_noticed() {
        let bytes = encode_entry(&entry(9, EntryPayload::Normal(b"start vm db".to_vec()))).unwrap();
        assert!(decode_entry(9, &bytes).is_ok());
        assert!(matches!(
            decode_entry(10, &bytes),
            Err(CodecError::Checksum { .. })
        ));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(decode_entry(9, &bad).is_err(), "flip at {at} was missed");
        }
    }

    #[test]
    fn a_body_of_another_version_or_a_cut_one_is_refused() {
        let body = frame(&vec![1, 2], b"tail").unwrap();
        let (header, tail): (Vec<i32>, _) = unframe(&body).unwrap();
        assert_eq!((header, tail), (vec![1, 2], b"tail".as_slice()));
        let mut newer = body.clone();
        newer[0] = 9;
        assert_eq!(
            unframe::<Vec<i32>>(&newer).unwrap_err(),
            CodecError::Version { found: 9 }
        );
        for cut in 0..5 {
            assert!(unframe::<Vec<i32>>(&body[..cut]).is_err());
        }
    }
}
