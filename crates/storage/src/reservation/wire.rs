//! PERSISTENT RESERVE IN and OUT as bytes (SPC-4): command blocks and parameter lists built,
//! answers parsed.
//!
//! Pure. Whatever the bytes are, parsing ends with an answer or an error and never panics: they
//! come from storage boxes of many makers. An answer that is cut short is an error where the
//! missing part matters, because a key that is not seen would be taken for one that is gone.

use super::device::{
    Capabilities, Command, DeviceError, KeyList, Nexus, ReservationHeld, ReservationType, Sense,
};

/// Bytes asked for in each answer: room for a thousand keys, or some 150 full descriptors.
pub(crate) const ANSWER_BYTES: usize = 8192;

const IN: u8 = 0x5e;
const OUT: u8 = 0x5f;
const COMPARE_AND_WRITE: u8 = 0x89;
const UNMAP: u8 = 0x42;

/// Service actions of PERSISTENT RESERVE IN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    Keys = 0,
    Reservation = 1,
    Capabilities = 2,
    FullStatus = 3,
}

/// The command block of PERSISTENT RESERVE IN.
pub(crate) fn cdb_in(ask: Ask, answer_bytes: u16) -> [u8; 10] {
    let [high, low] = answer_bytes.to_be_bytes();
    [IN, ask as u8, 0, 0, 0, 0, 0, high, low, 0]
}

/// PERSISTENT RESERVE OUT: command block and parameter list. `persist` asks that registrations
/// outlast a loss of power (APTPL).
pub(crate) fn out(command: Command, persist: bool) -> ([u8; 10], [u8; 24]) {
    const TYPE: u8 = 5;
    let (action, kind, key, service_key) = match command {
        Command::Register { key } => (6, 0, 0, key),
        Command::Unregister { key } => (0, 0, key, 0),
        Command::Reserve { key } => (1, TYPE, key, 0),
        Command::Clear { key } => (3, 0, key, 0),
        Command::Preempt { key, victim, abort } => (if abort { 5 } else { 4 }, TYPE, key, victim),
    };
    let mut list = [0; 24];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&service_key.to_be_bytes());
    list[20] = u8::from(persist);
    ([OUT, action, kind, 0, 0, 0, 0, 0, 24, 0], list)
}

/// COMPARE AND WRITE of one block at the start, with the same block to compare and to write: whatever
/// the device holds, it holds the same afterwards, and it is refused like any other write.
/// Command block and data.
pub(crate) fn compare_and_write_nothing(block_bytes: usize) -> ([u8; 16], Vec<u8>) {
    let mut cdb = [0; 16];
    (cdb[0], cdb[13]) = (COMPARE_AND_WRITE, 1);
    let block = b"quorate: may this host write? ".iter().copied().cycle();
    let block: Vec<u8> = block.take(block_bytes).collect();
    (cdb, block.repeat(2))
}

/// UNMAP of an empty list. Command block and parameter list.
pub(crate) fn unmap_nothing() -> ([u8; 10], [u8; 8]) {
    ([UNMAP, 0, 0, 0, 0, 0, 0, 0, 8, 0], [0, 6, 0, 0, 0, 0, 0, 0])
}

/// READ KEYS.
pub(crate) fn parse_keys(answer: &[u8]) -> Result<KeyList, DeviceError> {
    let (generation, list) = header(answer, "READ KEYS")?;
    Ok(KeyList {
        generation,
        keys: list
            .chunks_exact(8)
            .map(|key| long(key, 0).unwrap_or(0))
            .collect(),
    })
}

/// READ RESERVATION: generation, and the reservation if there is one.
pub(crate) fn parse_reservation(
    answer: &[u8],
) -> Result<(u32, Option<ReservationHeld>), DeviceError> {
    const WHAT: &str = "READ RESERVATION";
    let (generation, list) = header(answer, WHAT)?;
    if list.is_empty() {
        return Ok((generation, None));
    }
    let (Some(key), Some(scope_type)) = (long(list, 0), list.get(13)) else {
        return Err(malformed(WHAT));
    };
    let held = ReservationHeld {
        key,
        kind: ReservationType::from_code(scope_type & 0xf),
        scope: scope_type >> 4,
    };
    Ok((generation, Some(held)))
}

/// REPORT CAPABILITIES.
pub(crate) fn parse_capabilities(answer: &[u8]) -> Result<Capabilities, DeviceError> {
    const WHAT: &str = "REPORT CAPABILITIES";
    let (Some(length), Some(first), Some(second)) =
        (short(answer, 0), answer.get(2), answer.get(3))
    else {
        return Err(malformed(WHAT));
    };
    if length < 4 {
        return Err(malformed(WHAT));
    }
    // The type mask counts only when its own bit says so.
    let mask = match (second & 0x80 != 0, answer.get(4)) {
        (true, Some(mask)) => Some(*mask),
        _ => None,
    };
    Ok(Capabilities {
        persist_possible: first & 1 != 0,
        persist_active: second & 1 != 0,
        write_exclusive_registrants_only: mask.map(|mask| mask & 0x20 != 0),
    })
}

/// READ FULL STATUS: every registration with the initiator that made it.
pub(crate) fn parse_full_status(answer: &[u8]) -> Result<(u32, Vec<Nexus>), DeviceError> {
    const WHAT: &str = "READ FULL STATUS";
    let (generation, mut rest) = header(answer, WHAT)?;
    let mut nexuses = Vec::new();
    while !rest.is_empty() {
        let (Some(key), Some(flags), Some(scope_type), Some(port), Some(more)) = (
            long(rest, 0),
            rest.get(12),
            rest.get(13),
            short(rest, 18),
            word(rest, 20),
        ) else {
            return Err(malformed(WHAT));
        };
        let end = 24_usize.saturating_add(more as usize);
        let Some(transport_id) = rest.get(24..end) else {
            return Err(malformed(WHAT));
        };
        let holder = flags & 1 != 0;
        nexuses.push(Nexus {
            key,
            holder,
            all_ports: flags & 2 != 0,
            kind: holder.then(|| ReservationType::from_code(scope_type & 0xf)),
            port,
            initiator: initiator(transport_id),
        });
        rest = &rest[end..];
    }
    Ok((generation, nexuses))
}

/// The initiator's name in a TransportID, as people write it.
fn initiator(id: &[u8]) -> String {
    let hex = |bytes: &[u8]| -> String {
        bytes
            .iter()
            .take(64)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    match id.first().map(|byte| byte & 0xf) {
        // iSCSI: name, or name,i,0xISID, ended by zeros.
        Some(5) => {
            let name = id.get(4..).unwrap_or_default();
            let end = name
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(name.len());
            String::from_utf8_lossy(&name[..end]).into_owned()
        }
        // Fibre Channel: the port's name; SAS: the address.
        Some(0) => format!("fc {}", hex(id.get(8..16).unwrap_or_default())),
        Some(6) => format!("sas {}", hex(id.get(4..12).unwrap_or_default())),
        Some(_) => hex(id),
        None => String::new(),
    }
}

/// Sense data, fixed or descriptor format.
pub(crate) fn parse_sense(bytes: &[u8]) -> Sense {
    let at = |index: usize| bytes.get(index).copied().unwrap_or(0);
    match at(0) & 0x7f {
        0x72 | 0x73 => Sense {
            key: at(1) & 0xf,
            code: at(2),
            qualifier: at(3),
        },
        _ => Sense {
            key: at(2) & 0xf,
            code: at(12),
            qualifier: at(13),
        },
    }
}

/// Generation and the list that follows, which must be there in full.
fn header<'a>(answer: &'a [u8], what: &'static str) -> Result<(u32, &'a [u8]), DeviceError> {
    let (Some(generation), Some(length)) = (word(answer, 0), word(answer, 4)) else {
        return Err(malformed(what));
    };
    let end = 8_usize.saturating_add(length as usize);
    match answer.get(8..end) {
        Some(list) => Ok((generation, list)),
        None => Err(DeviceError::AnswerTooLong {
            answer: what,
            bytes: length,
        }),
    }
}

fn malformed(answer: &'static str) -> DeviceError {
    DeviceError::Malformed { answer }
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: u64 = 0x51ab_c002_0000_0007;

    fn keys_answer(generation: u32, keys: &[u64]) -> Vec<u8> {
        let mut bytes = generation.to_be_bytes().to_vec();
        bytes.extend_from_slice(&((keys.len() * 8) as u32).to_be_bytes());
        keys.iter()
            .for_each(|key| bytes.extend_from_slice(&key.to_be_bytes()));
        bytes
    }

    /// As LIO of Linux 6.1 answers for one iSCSI registration that holds the reservation.
    fn full_status_answer() -> Vec<u8> {
        let mut name = b"iqn.2026-01.net.example:host-a,i,0x00023d000001\0".to_vec();
        name.resize(name.len().next_multiple_of(4), 0);
        let mut bytes = vec![0, 0, 0, 9];
        bytes.extend_from_slice(&((24 + 4 + name.len()) as u32).to_be_bytes());
        bytes.extend_from_slice(&KEY.to_be_bytes());
        bytes.extend_from_slice(&[0, 0, 0, 0, 1, 5, 0, 0, 0, 0, 0, 1]);
        bytes.extend_from_slice(&((4 + name.len()) as u32).to_be_bytes());
        bytes.extend_from_slice(&[0x45, 0]);
        bytes.extend_from_slice(&(name.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&name);
        bytes
    }

    #[test]
    fn keys_are_read() {
        let list = parse_keys(&keys_answer(3, &[KEY, 1])).unwrap();
        assert_eq!((list.generation, list.keys), (3, vec![KEY, 1]));
        assert!(parse_keys(&keys_answer(0, &[])).unwrap().keys.is_empty());
    }

    #[test]
    fn a_list_that_was_cut_short_is_an_error() {
        let whole = keys_answer(3, &[KEY, 1]);
        for length in 0..whole.len() {
            assert!(parse_keys(&whole[..length]).is_err(), "{length} bytes");
        }
        let whole = full_status_answer();
        for length in 0..whole.len() {
            assert!(
                parse_full_status(&whole[..length]).is_err(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn a_reservation_is_read() {
        let mut bytes = vec![0, 0, 0, 2, 0, 0, 0, 16];
        bytes.extend_from_slice(&KEY.to_be_bytes());
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0x05, 0, 0]);
        let (generation, held) = parse_reservation(&bytes).unwrap();
        assert_eq!(generation, 2);
        let held = held.unwrap();
        assert_eq!((held.key, held.scope), (KEY, 0));
        assert_eq!(held.kind, ReservationType::WriteExclusiveRegistrantsOnly);
        assert_eq!(
            parse_reservation(&[0, 0, 0, 2, 0, 0, 0, 0]).unwrap(),
            (2, None)
        );
        assert!(parse_reservation(&[0, 0, 0, 2, 0, 0, 0, 4, 1, 2, 3, 4]).is_err());
    }

    #[test]
    fn capabilities_are_read() {
        let able = parse_capabilities(&[0, 8, 0x05, 0x81, 0xea, 0x01, 0, 0]).unwrap();
        assert!(able.persist_possible && able.persist_active);
        assert_eq!(able.write_exclusive_registrants_only, Some(true));
        let bare = parse_capabilities(&[0, 8, 0, 0, 0xff, 0xff, 0, 0]).unwrap();
        assert!(!bare.persist_possible);
        assert_eq!(
            bare.write_exclusive_registrants_only, None,
            "the mask is not valid"
        );
        assert!(parse_capabilities(&[0, 8]).is_err());
    }

    #[test]
    fn full_status_names_the_initiator() {
        let (generation, nexuses) = parse_full_status(&full_status_answer()).unwrap();
        assert_eq!(generation, 9);
        let [nexus] = &nexuses[..] else {
            panic!("{nexuses:?}")
        };
        assert_eq!(
            nexus.initiator,
            "iqn.2026-01.net.example:host-a,i,0x00023d000001"
        );
        assert_eq!((nexus.key, nexus.holder, nexus.port), (KEY, true, 1));
        assert_eq!(
            nexus.kind,
            Some(ReservationType::WriteExclusiveRegistrantsOnly)
        );
    }

    #[test]
    fn sense_is_read_in_both_formats() {
        let fixed = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x26, 0];
        let descriptor = [0x72, 6, 0x2a, 0x05];
        let told = |sense: Sense| (sense.key, sense.code, sense.qualifier);
        assert_eq!(told(parse_sense(&fixed)), (5, 0x26, 0));
        assert_eq!(told(parse_sense(&descriptor)), (6, 0x2a, 5));
        assert_eq!(told(parse_sense(&[])), (0, 0, 0));
    }

    #[test]
    fn commands_have_their_published_form() {
        assert_eq!(
            cdb_in(Ask::FullStatus, 8192),
            [0x5e, 3, 0, 0, 0, 0, 0, 0x20, 0, 0]
        );
        let (cdb, list) = out(Command::Register { key: KEY }, false);
        assert_eq!(cdb, [0x5f, 6, 0, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(
            (&list[..8], &list[8..16]),
            (&[0; 8][..], &KEY.to_be_bytes()[..])
        );
        assert_eq!(list[20], 0, "no APTPL");
        let preempt = Command::Preempt {
            key: 1,
            victim: 2,
            abort: true,
        };
        let (cdb, list) = out(preempt, true);
        assert_eq!(cdb, [0x5f, 5, 5, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!((list[7], list[15], list[20]), (1, 2, 1));
        let ended = out(Command::Unregister { key: 3 }, false);
        assert_eq!((ended.0[1], ended.1[7], ended.1[15]), (0, 3, 0));
        let (cdb, data) = compare_and_write_nothing(512);
        assert_eq!((cdb[0], cdb[13], data.len()), (0x89, 1, 1024));
        assert_eq!(data[..512], data[512..], "what is written is what is there");
        assert_eq!(unmap_nothing().1[2..4], [0, 0], "no descriptors");
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_keys(&bytes);
            let _ = parse_reservation(&bytes);
            let _ = parse_capabilities(&bytes);
            let _ = parse_full_status(&bytes);
            let _ = parse_sense(&bytes);
        }

        #[test]
        fn no_damage_makes_it_panic(at in 0_usize..100, value: u8) {
            let mut bytes = full_status_answer();
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            let _ = parse_full_status(&bytes);
        }

        #[test]
        fn keys_read_back(keys in proptest::collection::vec(any::<u64>(), 0..40), generation: u32) {
            let list = parse_keys(&keys_answer(generation, &keys)).unwrap();
            prop_assert_eq!((list.generation, list.keys), (generation, keys));
        }
    }
}
