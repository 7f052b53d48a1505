//! A narrow client for the kernel's link, address and forwarding tables: it asks one
//! thing at a time, always with a deadline, and turns errors into ours.

use std::future::Future;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::{Error, Handle, LinkBridge, LinkUnspec};
use tokio::task::JoinHandle;

use crate::{CALL_TIMEOUT, MacAddr, NetworkError};

const ENODEV: i32 = 19;
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;

/// One link as the kernel reports it.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) carrier: bool,
    pub(super) mtu: u32,
    pub(super) mac: Option<MacAddr>,
    pub(super) kind: Option<String>,
    pub(super) alias: Option<String>,
    pub(super) controller: Option<u32>,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            carrier: false,
            mtu: 0,
            mac: None,
            kind: None,
            alias: None,
            controller: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Carrier(carrier) => link.carrier = carrier != 0,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Address(bytes) => {
                    link.mac = <[u8; 6]>::try_from(bytes).ok().map(MacAddr::new);
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }
}

/// The kind of link that a tap is.
pub(super) fn tap_kind() -> String {
    InfoKind::Tun.to_string()
}

/// The kind of link that a bridge is.
pub(super) fn bridge_kind() -> String {
    InfoKind::Bridge.to_string()
}

/// An open conversation with the kernel. Ends with this value.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetworkError::NoNetlink { source })?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    pub(super) async fn find(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let mut links = self.handle.link().get().match_name(name).execute();
        let found = bounded(name, "looking it up", links.try_next()).await?;
        match found {
            Ok(link) => Ok(link.map(Link::from)),
            Err(error) if is_code(&error, ENODEV) => Ok(None),
            Err(error) => Err(refused(name, "looking it up", &error)),
        }
    }

    pub(super) async fn name_of(&self, index: u32) -> Result<Option<String>, NetworkError> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let label = format!("interface {index}");
        match bounded(&label, "looking it up", links.try_next()).await? {
            Ok(link) => Ok(link.map(|link| Link::from(link).name)),
            Err(error) if is_code(&error, ENODEV) => Ok(None),
            Err(error) => Err(refused(&label, "looking it up", &error)),
        }
    }

    /// Every link of the host.
    pub(super) async fn all(&self) -> Result<Vec<Link>, NetworkError> {
        let links = self.handle.link().get().execute().map_ok(Link::from);
        bounded("all", "listing interfaces", links.try_collect())
            .await?
            .map_err(|error| refused("all", "listing interfaces", &error))
    }

    /// Whether an address other than IPv6 link-local ones is set on the link.
    pub(super) async fn has_addresses(&self, link: &Link) -> Result<bool, NetworkError> {
        const SCOPE_LINK: u8 = 253;
        let addresses = self
            .handle
            .address()
            .get()
            .set_link_index_filter(link.index)
            .execute();
        let all: Vec<_> = bounded(&link.name, "reading its addresses", addresses.try_collect())
            .await?
            .map_err(|error| refused(&link.name, "reading its addresses", &error))?;
        Ok(all
            .iter()
            .any(|address| u8::from(address.header.scope) < SCOPE_LINK))
    }

    /// Creates a bridge; one that appeared meanwhile is fine.
    pub(super) async fn add_bridge(&self, name: &str, mtu: u32) -> Result<(), NetworkError> {
        let message = LinkBridge::new(name).mtu(mtu).build();
        let request = self.handle.link().add(message).execute();
        match bounded(name, "creating the bridge", request).await? {
            Err(error) if !is_code(&error, EEXIST) => {
                Err(refused(name, "creating the bridge", &error))
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn set_up(&self, name: &str, up: bool) -> Result<(), NetworkError> {
        let builder = LinkUnspec::new_with_name(name);
        let (message, operation) = if up {
            (builder.up().build(), "switching it on")
        } else {
            (builder.down().build(), "switching it off")
        };
        self.set(name, operation, message).await
    }

    /// Gives the link an address that stays, whatever becomes of its ports.
    pub(super) async fn pin_address(&self, link: &Link, mac: MacAddr) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index)
            .address(mac.octets().to_vec())
            .build();
        self.set(&link.name, "giving it a lasting address", message)
            .await
    }

    pub(super) async fn set_controller(
        &self,
        link: &Link,
        controller: u32,
    ) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(link.index)
            .controller(controller)
            .build();
        self.set(&link.name, "putting it into the bridge", message)
            .await
    }

    /// Sets what a new tap needs, in one request: its own address, its MTU, the text that
    /// says what it is for, no IPv6 address of its own, and the bridge it belongs to.
    pub(super) async fn dress_tap(
        &self,
        tap: &Link,
        mac: MacAddr,
        mtu: u32,
        alias: &str,
        bridge: u32,
    ) -> Result<(), NetworkError> {
        let message = LinkUnspec::new_with_index(tap.index)
            .address(mac.octets().to_vec())
            .mtu(mtu)
            .alias(alias)
            .controller(bridge)
            .build();
        self.set(&tap.name, "setting it up", message).await?;
        let quiet = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_index(tap.index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![quiet]))
            .build();
        // A kernel without IPv6 refuses this, and has nothing to switch off.
        if let Err(error) = self.set(&tap.name, "keeping IPv6 off it", message).await {
            tracing::debug!(tap = tap.name, %error, "the tap may take an IPv6 address");
        }
        Ok(())
    }

    async fn set(
        &self,
        name: &str,
        operation: &'static str,
        message: LinkMessage,
    ) -> Result<(), NetworkError> {
        let request = self.handle.link().set(message).execute();
        match bounded(name, operation, request).await? {
            Ok(()) => Ok(()),
            Err(error) if is_code(&error, ENODEV) => Err(NetworkError::TapMissing {
                name: name.to_owned(),
            }),
            Err(error) => Err(refused(name, operation, &error)),
        }
    }

    /// Deletes a link. Returns whether there was one.
    pub(super) async fn delete(&self, link: &Link) -> Result<bool, NetworkError> {
        let request = self.handle.link().del(link.index).execute();
        match bounded(&link.name, "deleting it", request).await? {
            Ok(()) => Ok(true),
            Err(error) if is_code(&error, ENODEV) => Ok(false),
            Err(error) => Err(refused(&link.name, "deleting it", &error)),
        }
    }

    /// Tells the bridge that `mac` is behind this port, until traffic shows otherwise.
    pub(super) async fn add_station(&self, port: &Link, mac: MacAddr) -> Result<(), NetworkError> {
        self.station(port, mac, NeighbourFlags::Controller).await
    }

    /// The same, whatever traffic shows.
    pub(super) async fn pin_station(&self, port: &Link, mac: MacAddr) -> Result<(), NetworkError> {
        let flags = NeighbourFlags::Controller | NeighbourFlags::Sticky;
        self.station(port, mac, flags).await
    }

    async fn station(
        &self,
        port: &Link,
        mac: MacAddr,
        flags: NeighbourFlags,
    ) -> Result<(), NetworkError> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(port.index, &mac.octets())
            .state(NeighbourState::Noarp)
            .flags(flags)
            .replace()
            .execute();
        bounded(&port.name, "pointing the bridge at the guest", request)
            .await?
            .map_err(|error| refused(&port.name, "pointing the bridge at the guest", &error))
    }

    /// Undoes [`Self::add_station`]; an absent entry is fine.
    pub(super) async fn drop_station(&self, port: &Link, mac: MacAddr) -> Result<(), NetworkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = port.index;
        message.header.flags = NeighbourFlags::Controller;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
        let request = self.handle.neighbours().del(message).execute();
        match bounded(&port.name, "pointing the bridge away", request).await? {
            Err(error) if !is_code(&error, ENOENT) && !is_code(&error, ENODEV) => {
                Err(refused(&port.name, "pointing the bridge away", &error))
            }
            _ => Ok(()),
        }
    }
}

/// Waits for an answer, but not for ever.
async fn bounded<F: Future>(
    name: &str,
    operation: &'static str,
    request: F,
) -> Result<F::Output, NetworkError> {
    tokio::time::timeout(CALL_TIMEOUT, request)
        .await
        .map_err(|_| NetworkError::Timeout {
            name: name.to_owned(),
            operation,
            timeout_ms: CALL_TIMEOUT.as_millis() as u64,
        })
}

fn is_code(error: &Error, errno: i32) -> bool {
    matches!(error, Error::NetlinkError(message) if message.raw_code() == -errno)
}

fn refused(name: &str, operation: &'static str, error: &Error) -> NetworkError {
    let detail = match error {
        Error::NetlinkError(message) => message.to_io().to_string(),
        other => other.to_string(),
    };
    NetworkError::Netlink {
        name: name.to_owned(),
        operation,
        detail,
    }
}
