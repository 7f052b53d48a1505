//! MAC addresses of NICs: a pure function of what the NIC is, so that a VM has the
//! same address on every host and after every restart, with nothing to remember.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// First octet of the host's side of a tap: locally administered, and higher than any
/// other so that no bridge takes it for its own address.
const TAP_OCTET: u8 = 0xfe;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddr([u8; 6]);

/// The text is not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address: write six hexadecimal pairs, as in 02:5e:10:00:00:01")]
pub struct MacParseError(pub String);

impl MacAddr {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// From its octets.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// Its octets.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Whether frames to it go to one station.
    pub const fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0
    }

    /// Whether it was given out locally and not by a manufacturer.
    pub const fn is_local(self) -> bool {
        self.0[0] & 2 != 0
    }

    /// The address of the host's side of a tap for a guest with this address.
    pub(crate) const fn tap_side(self) -> Self {
        let mut octets = self.0;
        // A guest address that begins with fe would be the tap's own, and the bridge
        // would keep its frames: then another octet tells the two apart.
        if octets[0] == TAP_OCTET {
            octets[1] ^= 0xff;
        }
        octets[0] = TAP_OCTET;
        Self(octets)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacParseError;

    fn try_from(text: String) -> Result<Self, MacParseError> {
        text.parse()
    }
}

impl FromStr for MacAddr {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<Self, MacParseError> {
        let bad = || MacParseError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self(octets))
    }
}

/// The address of NIC number `nic_index` of a VM: `02:` and 40 bits of a hash.
///
/// Two NICs among 10,000 collide with probability 5e-5, so whoever accepts a VM asks
/// [`find_collisions`] and refuses; the operator then writes a `mac` by hand.
pub fn nic_mac(cluster_id: &str, vm: &str, nic_index: u32) -> MacAddr {
    MacAddr(quorate_types::mac::nic_octets(cluster_id, vm, nic_index))
}

/// NICs that have the same address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MacCollision {
    /// The shared address.
    pub mac: MacAddr,
    /// Who has it, in the order given.
    pub nics: Vec<String>,
}

/// Finds addresses that more than one NIC has. Each NIC comes with a name for the
/// message, such as `db/0`. The result is sorted by address.
pub fn find_collisions<I, S>(nics: I) -> Vec<MacCollision>
where
    I: IntoIterator<Item = (S, MacAddr)>,
    S: Into<String>,
{
    let mut by_mac: BTreeMap<MacAddr, Vec<String>> = BTreeMap::new();
    for (name, mac) in nics {
        by_mac.entry(mac).or_default().push(name.into());
    }
    by_mac
        .into_iter()
        .filter(|(_, nics)| nics.len() > 1)
        .map(|(mac, nics)| MacCollision { mac, nics })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_generated_address_is_local_unicast_and_stable() {
        // A released address: guests and DHCP servers remember it.
        assert_eq!(nic_mac("c1", "db", 0).to_string(), "02:28:db:3f:8f:0c");
        for nic in 0..50 {
            let mac = nic_mac("c1", "db", nic);
            assert!(mac.is_unicast() && mac.is_local());
        }
        assert_ne!(nic_mac("c1", "db", 0), nic_mac("c2", "db", 0));
        assert_ne!(nic_mac("c1", "db", 0), nic_mac("c1", "db", 1));
        assert_ne!(nic_mac("c1", "d", 0), nic_mac("c1d", "", 0));
    }

    #[test]
    fn the_taps_side_never_equals_the_guests() {
        for first in 0..=0xff_u8 {
            let guest = MacAddr([first, 0xff, 3, 4, 5, 6]);
            let tap = guest.tap_side();
            assert_ne!(guest, tap);
            assert_eq!(tap.octets()[0], TAP_OCTET);
            assert!(tap.is_unicast() && tap.is_local());
        }
    }

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        let mac: MacAddr = "02:5E:10:00:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:5e:10:00:00:01");
        for bad in [
            "",
            "02:5e:10:00:00",
            "02:5e:10:00:00:01:02",
            "02-5e-10-00-00-01",
            "2:5e:10:0:0:01",
            "+2:5e:10:00:00:01",
            "0g:00:00:00:00:00",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn collisions_are_found_and_named() {
        let a = nic_mac("c", "a", 0);
        let b = nic_mac("c", "b", 0);
        assert!(find_collisions([("a/0", a), ("b/0", b)]).is_empty());
        let found = find_collisions([("a/0", a), ("b/0", b), ("c/1", a)]);
        assert_eq!(
            found,
            [MacCollision {
                mac: a,
                nics: vec!["a/0".into(), "c/1".into()]
            }]
        );
    }
}
