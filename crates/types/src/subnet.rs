//! Subnets of networks, and what guests may not do there.
//!
//! Always holds: a [`Subnet`] has no bit set behind its prefix.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::IpAddr;

/// Addresses with equal leading bits. Written `10.77.0.0/24`, `fd77::/64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is not a subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Not an address, a slash and a number of bits.
    #[error("`{0}` is not a subnet: write for example `10.77.0.0/24` or `fd77::/64`")]
    Form(String),
    /// Bits behind the prefix.
    #[error("`{text}` has bits behind its prefix: write `{instead}`")]
    Bits {
        /// The text.
        text: String,
        /// The subnet that it is in.
        instead: Subnet,
    },
}

/// The address with everything behind the prefix set to zero.
#[must_use]
pub fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32)));
            IpAddr::V4((u32::from(v4) & mask.unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128)));
            IpAddr::V6((u128::from(v6) & mask.unwrap_or(0)).into())
        }
    }
}

impl Subnet {
    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && masked(address, self.prefix) == self.address
    }

    /// Its first address.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// Its leading bits.
    #[must_use]
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }
}

impl std::str::FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let bad = || SubnetError::Form(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= most);
        let prefix = prefix.ok_or_else(bad)?;
        let whole = masked(address, prefix);
        let subnet = Self {
            address: whole,
            prefix,
        };
        match whole == address {
            true => Ok(subnet),
            false => Err(SubnetError::Bits {
                text: text.to_owned(),
                instead: subnet,
            }),
        }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Serialize for Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What guests of a network may not do. Everything is off unless it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// Send from a MAC address, or an IP address, that is not theirs (IP only where their addresses are known).
    pub source: bool,
    /// Answer as a DHCP server.
    pub dhcp: bool,
    /// Announce themselves as an IPv6 router.
    pub router: bool,
}

impl Guard {
    /// Nothing is guarded.
    #[must_use]
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_read_strictly() {
        for text in [
            "10.77.0.0/24",
            "0.0.0.0/0",
            "10.0.0.1/32",
            "fd77::/64",
            "::/0",
            "fd77::1/128",
        ] {
            assert_eq!(text.parse::<Subnet>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "10.77.0.0",
            "10.77.0.0/33",
            "fd77::/129",
            "a/24",
            "10.77.0.0/",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        let error = "10.77.0.5/24".parse::<Subnet>().unwrap_err();
        assert!(error.to_string().ends_with("write `10.77.0.0/24`"));
    }

    #[test]
    fn families_are_apart() {
        let lan: Subnet = "10.77.0.0/24".parse().unwrap();
        assert!(lan.contains("10.77.0.255".parse().unwrap()));
        assert!(!lan.contains("10.77.1.0".parse().unwrap()));
        assert!(!lan.contains("::10.77.0.1".parse().unwrap()));
        let all: Subnet = "::/0".parse().unwrap();
        assert!(all.contains("fd77::1".parse().unwrap()));
        assert!(!all.contains("10.77.0.1".parse().unwrap()));
    }
}
