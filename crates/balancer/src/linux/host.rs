//! What one host has loaded, and the steps to what is wanted.
//!
//! Always holds: what packets find first is written last: members, rings, services, edges, then addresses and doors; taking away
//! goes the other way round. An index given to a member or a service is not given to another one in the same step that
//! frees it. What an earlier process left in the tables is read first and kept where it is still right.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::doors::Doors;
use super::edges::Edge;
use super::links::Links;
use super::object::{self, Capacity, Tables, chain, kernel};
use super::rings::RingMark;
use super::services::Known;
use super::sys;
use crate::abi;
use crate::model::{Applied, Loaded, UplinkWanted, Wanted};
use crate::{BalancerError, mac};
use quorate_types::service::{Attractor, UplinkMode};
use quorate_types::{NetworkName, NodeId, ServiceName};

/// Where a network's packets are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scope {
    /// Interface index of the uplink; of the bridge where there is none. Key of addresses.
    pub(super) scope: u32,
    /// Of the uplink, or 0.
    pub(super) uplink: u32,
    /// Of the bridge.
    pub(super) bridge: u32,
    /// The bridge's MAC: where routers send to.
    pub(super) host_mac: [u8; 6],
}

/// A host's datapath.
pub(super) struct Host {
    pub(super) root: PathBuf,
    pub(super) node: NodeId,
    pub(super) capacity: Capacity,
    pub(super) ebpf: aya::Ebpf,
    pub(super) tables: Tables,
    pub(super) doors: Doors,
    pub(super) links: Links,
    pub(super) wanted: Wanted,
    pub(super) scopes: BTreeMap<NetworkName, Scope>,
    /// By index into `services`.
    pub(super) services: BTreeMap<u16, Known>,
    /// Number of a service -> its index.
    pub(super) indexes: BTreeMap<u32, u16>,
    /// Number of a service -> its name.
    pub(super) names: BTreeMap<u32, ServiceName>,
    /// Rings by what tells most of them apart.
    pub(super) rings: BTreeMap<RingMark, Vec<u16>>,
    /// MAC -> index into `members`.
    pub(super) members: BTreeMap<[u8; 6], u16>,
    pub(super) edges: BTreeMap<String, Edge>,
    pub(super) vips: BTreeMap<(u32, abi::Address), abi::Vip>,
    /// Indexes of services that the running step has freed.
    pub(super) freed: BTreeSet<u16>,
    /// Number of pins by index of their service.
    pub(super) pins: BTreeMap<u32, u64>,
    pub(super) applied: bool,
}

impl Host {
    /// Takes over what an earlier process left in the tables.
    pub(super) fn new(
        root: PathBuf,
        node: NodeId,
        capacity: Capacity,
        ebpf: aya::Ebpf,
        tables: Tables,
        doors: Doors,
    ) -> Result<Self, BalancerError> {
        let mut host = Self {
            links: Links::new(&root)?,
            root,
            node,
            capacity,
            ebpf,
            tables,
            doors,
            wanted: Wanted::default(),
            scopes: BTreeMap::new(),
            services: BTreeMap::new(),
            indexes: BTreeMap::new(),
            names: BTreeMap::new(),
            rings: BTreeMap::new(),
            members: BTreeMap::new(),
            edges: BTreeMap::new(),
            vips: BTreeMap::new(),
            freed: BTreeSet::new(),
            pins: BTreeMap::new(),
            applied: false,
        };
        host.read_back()?;
        Ok(host)
    }

    fn read_back(&mut self) -> Result<(), BalancerError> {
        for index in 0..self.capacity.services {
            let entry = self.tables.services.get(&index, 0);
            let entry = entry.map_err(kernel("reading", "services"))?;
            if entry.id > 0 {
                self.indexes.insert(entry.id, narrow(index));
                self.services.insert(narrow(index), Known::found(entry));
            }
        }
        for index in 0..self.capacity.members {
            let entry = self.tables.members.get(&index, 0);
            let entry = entry.map_err(kernel("reading", "members"))?;
            if entry.used > 0 {
                self.members.insert(entry.mac, narrow(index));
            }
        }
        for entry in self.tables.vips4.iter() {
            let (key, vip) = entry.map_err(kernel("reading", "vips4"))?;
            let address = u32::from_be(key.address);
            let address = std::net::IpAddr::V4(std::net::Ipv4Addr::from_bits(address));
            self.vips.insert((key.scope, address.into()), vip);
        }
        for entry in self.tables.vips6.iter() {
            let (key, vip) = entry.map_err(kernel("reading", "vips6"))?;
            self.vips.insert((key.scope, key.address), vip);
        }
        self.count_pins()?;
        self.write_doors()
    }

    /// The networks as this host has them; a network without its interfaces is left out.
    fn find_networks(&mut self, wanted: &Wanted, applied: &mut Applied) {
        self.scopes.clear();
        for (name, network) in &wanted.networks {
            match scope_of(network) {
                Ok(scope) => {
                    self.scopes.insert(name.clone(), scope);
                    applied.uplinks.insert(name.clone(), UplinkMode::None);
                }
                Err(problem) => {
                    applied
                        .uplinks
                        .insert(name.clone(), UplinkMode::Problem(problem));
                }
            }
        }
    }

    /// See [`crate::Datapath::apply`].
    pub(super) fn apply(&mut self, wanted: &Wanted) -> Result<Applied, BalancerError> {
        let mut applied = Applied::default();
        self.find_networks(wanted, &mut applied);
        let unusual = wanted
            .services
            .values()
            .any(|service| service.attractor != Attractor::Arp);
        let config = abi::Config {
            director_mac: mac::director_mac(self.node),
            bounced_mac: mac::bounced_mac(self.node),
            final_mac: mac::final_mac(self.node),
            unusual: u8::from(unusual),
            zero: 0,
            doors: self.doors.places(),
        };
        self.tables
            .settings
            .set(0, config, 0)
            .map_err(kernel("writing", "settings"))?;
        self.expire_pins()?;
        let here: BTreeSet<u32> = self.scopes.values().map(|scope| scope.scope).collect();
        self.remove_vips(wanted, &here)?;
        self.freed.clear();
        self.retire_services(wanted)?;
        for (name, table) in &wanted.services {
            let loaded = match self.load_service(table) {
                Ok(()) => Loaded {
                    active: table.active().map_or(0, |list| list.epoch),
                    prepared: table.next.as_ref().map(|list| list.epoch),
                    problem: None,
                },
                Err(problem) => {
                    self.unload_service(table.id)?;
                    Loaded {
                        problem: Some(chain(&problem)),
                        ..Loaded::default()
                    }
                }
            };
            applied.services.insert(name.clone(), loaded);
        }
        self.wanted = wanted.clone();
        let named = wanted.services.iter();
        self.names = named
            .map(|(name, table)| (table.id.0, name.clone()))
            .collect();
        self.applied = true;
        self.retire_members()?;
        self.refresh_edges()?;
        self.write_vips(wanted, &mut applied)?;
        self.attach_uplinks(wanted, &mut applied);
        self.forget_old_maps();
        Ok(applied)
    }

    fn attach_uplinks(&mut self, wanted: &Wanted, applied: &mut Applied) {
        let mut attached = BTreeSet::new();
        for (name, network) in &wanted.networks {
            let Some(uplink) = network
                .uplink
                .as_ref()
                .filter(|_| self.scopes.contains_key(name))
            else {
                continue;
            };
            attached.insert(uplink.clone());
            let mode = self.attach_uplink(uplink).unwrap_or_else(|error| {
                tracing::warn!(%uplink, %error, "no director");
                UplinkMode::Problem(error.to_string())
            });
            applied.uplinks.insert(name.clone(), mode);
        }
        for place in ["xdp", "generic", "up"] {
            for uplink in self.links.attached(place) {
                if !attached.contains(&uplink)
                    && let Err(error) = self.links.detach(place, &uplink)
                {
                    tracing::warn!(%uplink, %error, "a program stays attached");
                }
            }
        }
    }

    fn attach_uplink(&mut self, uplink: &str) -> Result<UplinkMode, BalancerError> {
        self.links
            .tcx(&mut self.ebpf, "announcements", "up", uplink)?;
        self.links.director(&mut self.ebpf, uplink)
    }

    /// Maps of another ABI version, once everything runs on these.
    fn forget_old_maps(&self) {
        let keep = object::maps_dir(&self.root);
        let folders = std::fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .flatten();
        for folder in folders.map(|entry| entry.path()) {
            let name = folder.file_name().and_then(|name| name.to_str());
            let is_maps = name.is_some_and(|name| name.starts_with("maps-"));
            if is_maps && folder != keep {
                let _ = std::fs::remove_dir_all(&folder);
            }
        }
    }

    /// The service's name, for people.
    pub(super) fn service_name(&self, index: u16) -> Option<&ServiceName> {
        self.names.get(&self.services.get(&index)?.entry.id)
    }
}

/// Indexes are below 65,535: capacities are cut to that.
pub(super) fn narrow(index: u32) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// Index of an interface.
pub(super) fn ifindex(name: &str) -> Result<u32, BalancerError> {
    sys::ifindex(name).ok_or_else(|| BalancerError::NoInterface {
        ifname: name.to_owned(),
    })
}

fn scope_of(network: &UplinkWanted) -> Result<Scope, String> {
    let bridge = sys::ifindex(&network.bridge)
        .ok_or_else(|| format!("bridge `{}` does not exist on this host", network.bridge))?;
    let uplink = match &network.uplink {
        None => 0,
        Some(name) => sys::ifindex(name)
            .ok_or_else(|| format!("uplink `{name}` does not exist on this host"))?,
    };
    Ok(Scope {
        scope: if uplink > 0 { uplink } else { bridge },
        uplink,
        bridge,
        host_mac: sys::interface_mac(&network.bridge).unwrap_or_default(),
    })
}
