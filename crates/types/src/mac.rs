//! Ethernet addresses of guests' NICs: a pure function of what the NIC is.
//!
//! Always holds: a VM has the same address on every host and after every restart, with nothing to remember; the
//! network driver, the agent and the ring of a service compute the very same one.

use crate::spec::VmSpec;
use crate::{NetworkName, VmName};
use sha2::{Digest, Sha256};

/// First octet of generated addresses: unicast, locally administered.
const NIC_OCTET: u8 = 0x02;

/// Second octet of the service datapath's own addresses (`02:51:...`), which no guest may use.
const DATAPATH_OCTET: u8 = 0x51;

/// The address of NIC number `nic_index` of a VM: `02:` and 40 bits of a hash, never one of the service datapath's.
#[must_use]
pub fn nic_octets(cluster_id: &str, vm: &str, nic_index: u32) -> [u8; 6] {
    let mut hash = Sha256::new();
    hash.update(b"quorate mac 1\0");
    hash.update(cluster_id.as_bytes());
    hash.update([0]);
    hash.update(vm.as_bytes());
    hash.update([0]);
    hash.update(nic_index.to_be_bytes());
    let digest = hash.finalize();
    let second = match digest[0] {
        DATAPATH_OCTET => !DATAPATH_OCTET,
        other => other,
    };
    [
        NIC_OCTET, second, digest[1], digest[2], digest[3], digest[4],
    ]
}

/// Six hexadecimal pairs with colons between them.
#[must_use]
pub fn parse_octets(text: &str) -> Option<[u8; 6]> {
    let mut octets = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(octets)
}

impl VmSpec {
    /// The address of its first NIC in a network.
    #[must_use]
    pub fn mac_in(&self, cluster_id: &str, vm: &VmName, network: &NetworkName) -> Option<[u8; 6]> {
        let index = self.nics.iter().position(|nic| nic.network == *network)?;
        match &self.nics[index].mac {
            Some(text) => parse_octets(text),
            None => Some(nic_octets(
                cluster_id,
                vm.as_str(),
                u32::try_from(index).ok()?,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ByteSize;
    use crate::spec::NicSpec;

    #[test]
    fn no_guest_gets_an_address_of_the_datapath() {
        let all = (0..4000).map(|nic| nic_octets("c1", "db", nic));
        let seconds: std::collections::BTreeSet<u8> = all.map(|mac| mac[1]).collect();
        assert_eq!(seconds.len(), 255);
        assert!(!seconds.contains(&DATAPATH_OCTET));
    }

    #[test]
    fn the_first_nic_in_the_network_counts() {
        let (vm, lan) = (VmName::new("db").unwrap(), NetworkName::new("lan").unwrap());
        let mut spec = VmSpec::new(ByteSize::mib(64));
        assert_eq!(spec.mac_in("c1", &vm, &lan), None);
        let mut nic = NicSpec::new(NetworkName::new("san").unwrap());
        spec.nics.push(nic.clone());
        nic.network = lan.clone();
        spec.nics.push(nic.clone());
        assert_eq!(
            spec.mac_in("c1", &vm, &lan),
            Some(nic_octets("c1", "db", 1))
        );
        spec.nics[1].mac = Some("52:54:00:00:00:0a".into());
        assert_eq!(
            spec.mac_in("c1", &vm, &lan),
            Some([0x52, 0x54, 0, 0, 0, 0x0a])
        );
        // A released address: guests and DHCP servers remember it.
        assert_eq!(
            nic_octets("c1", "db", 0),
            [0x02, 0x28, 0xdb, 0x3f, 0x8f, 0x0c]
        );
    }
}
