//! What is asked of a network driver and what it reports.

use serde::{Deserialize, Serialize};

use crate::MacAddr;

/// A bridge that should be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeSpec {
    /// Interface name.
    pub name: String,
    /// Interface that connects the bridge to the outside, if any.
    pub uplink: Option<String>,
    /// Smallest acceptable MTU in bytes; a new bridge gets exactly this.
    pub mtu: u32,
}

/// A bridge as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeFacts {
    /// Interface name.
    pub name: String,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether this call created it.
    pub created: bool,
}

/// A tap that should be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapSpec {
    /// Interface name, from [`crate::tap_name`].
    pub ifname: String,
    /// The bridge it is a port of.
    pub bridge: String,
    /// The guest's address.
    pub guest_mac: MacAddr,
    /// Which NIC it serves, such as `db/0`: written on the tap, and proof that a tap
    /// of the same name is the same NIC's. At most 160 bytes.
    pub nic: String,
    /// The user that QEMU runs as; `None` leaves the tap to root.
    pub owner_uid: Option<u32>,
    /// Whether it is cut off until [`crate::NetworkDriver::unmute`].
    pub muted: bool,
}

/// A tap as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapFacts {
    /// Interface name.
    pub ifname: String,
    /// Interface index.
    pub index: u32,
    /// The bridge it is a port of.
    pub bridge: Option<String>,
    /// The guest's address, as written on the tap when it was made.
    pub guest_mac: Option<MacAddr>,
    /// Which NIC it serves, as written on the tap when it was made.
    pub nic: Option<String>,
    /// Whether it is cut off.
    pub muted: bool,
    /// Whether a process (QEMU) holds it open.
    pub attached: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// An interface as it is, for the inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceFacts {
    /// Interface name.
    pub name: String,
    /// Whether there is such an interface; if not, the rest is empty.
    pub exists: bool,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether it has a link.
    pub carrier: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its address.
    pub mac: Option<MacAddr>,
    /// Its kind as the kernel calls it (`bridge`, `tun`, `veth`); `None` for a card.
    pub kind: Option<String>,
    /// The bridge or bond it is a port of.
    pub controller: Option<String>,
}

impl InterfaceFacts {
    /// What is known of an interface that does not exist.
    pub fn missing(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            exists: false,
            up: false,
            carrier: false,
            mtu: 0,
            mac: None,
            kind: None,
            controller: None,
        }
    }
}
