//! How the hosts of a network speak to its routers.
//!
//! Owns: what the operator says of it. Must not: know which addresses are announced; that is with the services.

use crate::Millis;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// How every host of a network announces addresses of services whose attractor is `bgp`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BgpSpec {
    /// The program that speaks.
    #[serde(default)]
    pub daemon: BgpDaemon,
    /// The hosts' autonomous system.
    #[serde(rename = "as")]
    pub asn: u32,
    /// The routers.
    pub neighbors: Vec<BgpNeighbor>,
    /// A host that is silent for so long is gone; whole seconds, 3 or more.
    #[serde(default = "default_hold")]
    pub hold_time: Millis,
    /// Finds a host that went silent within a second, where the routers can do it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bfd: bool,
}

fn default_hold() -> Millis {
    Millis::secs(3)
}

/// A router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BgpNeighbor {
    /// Its address.
    pub address: IpAddr,
    /// Its autonomous system.
    #[serde(rename = "as")]
    pub asn: u32,
}

/// A program that speaks BGP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BgpDaemon {
    /// BIRD 2.
    #[default]
    Bird,
    /// FRR's bgpd.
    Frr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_people_write_it() {
        let text = r#"{"as": 65001, "neighbors": [{"address": "10.77.0.254", "as": 65000}]}"#;
        let spec: BgpSpec = serde_json::from_str(text).unwrap();
        assert_eq!(
            (spec.daemon, spec.asn, spec.bfd),
            (BgpDaemon::Bird, 65001, false)
        );
        assert_eq!(spec.hold_time, Millis::secs(3));
        assert_eq!(spec.neighbors[0].asn, 65000);
    }
}
