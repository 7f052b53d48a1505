//! How much of a service one member or one client may have, and what guests are kept from sending.
//!
//! Always holds: a limit is a rate of *beginnings*: what has begun is never cut, and nothing has to be counted down.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How many connections (of UDP: flows) may begin in a second. So many may also begin at once, after a pause. Those that
/// are one too many are dropped: TCP tries again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// At each member, of all clients together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_per_member: Option<u32>,
    /// At each member, of one client: an IPv4 address or an IPv6 /64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_per_client: Option<u32>,
}

/// Largest limit.
pub const MAX_LIMIT: u32 = 1_000_000;

impl Limits {
    /// Any number may begin.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Frames that the guard of a network kept a guest from sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Offences {
    /// With another's MAC or IP address.
    pub spoofed: u64,
    /// Answers of a DHCP server.
    pub dhcp_server: u64,
    /// Announcements of an IPv6 router, and redirects.
    pub router_advertisement: u64,
}

impl fmt::Display for Offences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            (self.spoofed, "with another's address"),
            (self.dhcp_server, "of a DHCP server"),
            (self.router_advertisement, "of an IPv6 router"),
        ];
        let mut any = false;
        for (count, what) in kinds.into_iter().filter(|(count, _)| *count > 0) {
            let comma = if any { ", " } else { "" };
            write!(f, "{comma}{count} {what}")?;
            any = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offences_are_told_where_there_are_any() {
        let mut offences = Offences::default();
        assert_eq!(offences.to_string(), "");
        (offences.spoofed, offences.router_advertisement) = (2, 1);
        let text = "2 with another's address, 1 of an IPv6 router";
        assert_eq!(offences.to_string(), text);
    }
}
