//! Membership of the multicast groups of `igmp` services: with it, switches that snoop on IGMP deliver the services'
//! frames to the hosts of the cluster and to nobody else.
//!
//! What a network must be for this: see `docs/services.md`. Always holds: a membership lasts as long as its socket, so
//! a daemon that ends leaves the groups.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

/// Groups that this host is a member of, by interface.
#[derive(Debug, Default)]
pub struct Memberships {
    /// One socket each: the kernel allows twenty groups on one.
    sockets: BTreeMap<(String, Ipv4Addr), OwnedFd>,
}

impl Memberships {
    /// Joins what is wanted and leaves everything else. What could not be joined is in the answer, and is tried again
    /// the next time.
    pub fn set(
        &mut self,
        wanted: impl IntoIterator<Item = (String, Ipv4Addr)>,
    ) -> Vec<(String, Ipv4Addr, io::Error)> {
        let mut before = std::mem::take(&mut self.sockets);
        let mut failed = Vec::new();
        for (interface, group) in wanted {
            let key = (interface, group);
            let joined = match before.remove(&key) {
                Some(socket) => Ok(socket),
                None => join(&key.0, group),
            };
            match joined {
                Ok(socket) => drop(self.sockets.insert(key, socket)),
                Err(error) => failed.push((key.0, group, error)),
            }
        }
        failed
    }
}

fn join(interface: &str, group: Ipv4Addr) -> io::Result<OwnedFd> {
    let index = super::arp::index(interface)?;
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_ip_add_membership_with_ifindex(&socket, &group, &Ipv4Addr::UNSPECIFIED, index)?;
    Ok(socket)
}
