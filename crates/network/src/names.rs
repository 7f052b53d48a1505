//! Interface names: pure functions, the same on every host and in every release.

use sha2::{Digest, Sha256};

use crate::NetworkError;

/// What the name of every tap made by Quorate begins with.
pub const TAP_PREFIX: &str = "qt-";

/// Characters of the hash; with the prefix it fills the 15 the kernel allows.
const HASH_CHARS: usize = 12;

/// Longest interface name the kernel takes.
const IFNAME_MAX: usize = 15;

/// The name of the tap of NIC number `nic_index` of a VM: `qt-` and 60 bits of a hash.
///
/// Two NICs of a cluster with 10,000 of them share a name with probability 4e-11; a
/// driver notices by the label it writes on the tap and refuses.
pub fn tap_name(vm: &str, nic_index: u32) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut hash = Sha256::new();
    hash.update(b"quorate tap 1\0");
    hash.update(vm.as_bytes());
    hash.update([0]);
    hash.update(nic_index.to_be_bytes());
    let digest = hash.finalize();
    let mut bits = u64::from_be_bytes(std::array::from_fn(|i| digest[i]));
    let mut name = String::from(TAP_PREFIX);
    for _ in 0..HASH_CHARS {
        name.push(char::from(ALPHABET[(bits >> 59) as usize]));
        bits <<= 5;
    }
    name
}

/// Checks that the kernel would take the name.
///
/// # Errors
/// [`NetworkError::InvalidName`] says what is wrong.
pub fn check_ifname(name: &str) -> Result<(), NetworkError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > IFNAME_MAX {
        "it has more than 15 bytes"
    } else if name == "." || name == ".." {
        "it is reserved"
    } else if name
        .bytes()
        .any(|b| !b.is_ascii_graphic() || matches!(b, b'/' | b':' | b'%'))
    {
        "only letters, digits and punctuation other than / : % are allowed"
    } else {
        return Ok(());
    };
    Err(NetworkError::InvalidName {
        name: name.to_owned(),
        reason,
    })
}

/// Checks that the name is one of ours before something is changed or deleted.
pub(crate) fn check_ours(name: &str) -> Result<(), NetworkError> {
    check_ifname(name)?;
    if name.starts_with(TAP_PREFIX) {
        Ok(())
    } else {
        Err(NetworkError::NotOurs {
            name: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_tap_name_is_stable_and_fits() {
        // A released name: changing it would orphan the taps of running guests.
        assert_eq!(tap_name("db", 0), "qt-4rwvb227g5un");
        for vm in [
            "a",
            "db",
            "a-name-of-sixty-three-characters-that-is-longer-than-any-ifname",
        ] {
            for nic in 0..8 {
                let name = tap_name(vm, nic);
                assert_eq!(name.len(), IFNAME_MAX);
                check_ours(&name).unwrap();
            }
        }
    }

    #[test]
    fn tap_names_differ_by_vm_and_by_nic() {
        let mut seen = std::collections::BTreeSet::new();
        for vm in 0..500 {
            for nic in 0..4 {
                assert!(seen.insert(tap_name(&format!("vm{vm}"), nic)));
            }
        }
        // The separator keeps "a" NIC 1 and "a1" apart.
        assert_ne!(tap_name("a", 1), tap_name("a1", 0));
    }

    #[test]
    fn foreign_and_impossible_names_are_refused() {
        for bad in [
            "",
            "sixteen-bytes-xx",
            "a/b",
            "a b",
            "a:b",
            "..",
            "tap%d",
            "é",
        ] {
            assert!(
                matches!(check_ifname(bad), Err(NetworkError::InvalidName { .. })),
                "{bad}"
            );
        }
        assert!(matches!(
            check_ours("eth0"),
            Err(NetworkError::NotOurs { .. })
        ));
    }
}
