//! The Linux driver: bridges and taps through rtnetlink, tap creation through
//! `/dev/net/tun`, announcements through AF_PACKET.
//!
//! ## How a tap is mute
//! ```text
//!            create(muted)              unmute                    mute
//!   absent ---------------> port, DOWN --------> port, UP + FDB --------> port, DOWN
//!      ^                         |                    |
//!      +------------- delete ----+--------------------+
//! ```
//! A mute tap is a port of its bridge that is administratively **down**. Then the
//! kernel refuses every frame the guest writes (EIO, inside the tun driver), so neither
//! the bridge nor the host's own network stack sees it, and nothing queues up towards
//! the guest that would be stale later. The state is in the kernel, so a restarted
//! daemon reads it back, and QEMU does not touch it when started with `script=no`.
//!
//! The tempting alternative, a port in the bridge state `disabled`, is *unsound*: the
//! moment QEMU opens the tap its carrier rises and the bridge moves the port to
//! `forwarding` by itself. `tests/linux.rs` shows both.
//!
//! Unmuting is one netlink request, after which frames pass; a second one puts the
//! guest's MAC into the bridge's table, because a silent guest would otherwise be sought
//! where it was before. The entry does not age, but moves with the first frame the guest
//! sends from elsewhere. Muting takes the entry out again, or the bridge would go on
//! sending the guest's frames into a dead port.
//!
//! Must not: change an uplink that carries addresses, or delete anything that is not ours.

mod netlink;
pub mod packet;
pub mod tun;
mod waiting;

use std::io;

use crate::announce::{Announcement, Schedule};
use crate::held::Held;
use crate::names::{TAP_PREFIX, check_ifname, check_ours};
use crate::{
    BridgeFacts, BridgeSpec, InterfaceFacts, MacAddr, NetworkDriver, NetworkError, TapFacts,
    TapSpec,
};
use netlink::{Link, Netlink};
use packet::PacketSocket;
use waiting::Waiting;

/// Longest NIC label that fits beside the MAC into the kernel's 255 bytes.
const LABEL_MAX: usize = 160;

/// The network of the namespace in which it was opened.
#[derive(Debug)]
pub struct LinuxNetwork {
    netlink: Netlink,
    schedule: Schedule,
}

impl LinuxNetwork {
    /// Opens the driver in the network namespace of the calling thread. Must be called
    /// inside a tokio runtime, whose threads must all be in that namespace.
    ///
    /// # Errors
    /// When there is no netlink socket to be had.
    pub fn open() -> Result<Self, NetworkError> {
        Ok(Self {
            netlink: Netlink::open()?,
            schedule: Schedule::default(),
        })
    }

    async fn bridge(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let Some(link) = self.netlink.find(name).await? else {
            return Ok(None);
        };
        if link.kind.as_deref() != Some(&netlink::bridge_kind()) {
            return Err(NetworkError::NotABridge {
                name: name.to_owned(),
                kind: link.kind.unwrap_or_else(|| "network card".into()),
            });
        }
        Ok(Some(link))
    }

    async fn tap(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        check_ours(name)?;
        match self.netlink.find(name).await? {
            Some(link) if link.kind.as_deref() != Some(&netlink::tap_kind()) => {
                Err(NetworkError::TapConflict {
                    name: name.to_owned(),
                    found: format!("as a {}", link.kind.unwrap_or_else(|| "card".into())),
                })
            }
            other => Ok(other),
        }
    }

    async fn existing_tap(&self, name: &str) -> Result<Link, NetworkError> {
        self.tap(name)
            .await?
            .ok_or_else(|| NetworkError::TapMissing {
                name: name.to_owned(),
            })
    }

    async fn ensure_uplink(&self, spec: &BridgeSpec, bridge: &Link) -> Result<(), NetworkError> {
        let Some(uplink) = &spec.uplink else {
            return Ok(());
        };
        check_ifname(uplink)?;
        let Some(link) = self.netlink.find(uplink).await? else {
            return Err(NetworkError::UplinkMissing {
                bridge: spec.name.clone(),
                uplink: uplink.clone(),
            });
        };
        if link.mtu < spec.mtu {
            return Err(NetworkError::MtuTooSmall {
                name: uplink.clone(),
                have: link.mtu,
                want: spec.mtu,
            });
        }
        match link.controller {
            Some(index) if index == bridge.index => {}
            Some(index) => {
                let controller = self.netlink.name_of(index).await?;
                return Err(NetworkError::UplinkTaken {
                    bridge: spec.name.clone(),
                    uplink: uplink.clone(),
                    controller: controller.unwrap_or_else(|| format!("interface {index}")),
                });
            }
            None if self.netlink.has_addresses(&link).await? => {
                return Err(NetworkError::UplinkHasAddresses {
                    bridge: spec.name.clone(),
                    uplink: uplink.clone(),
                });
            }
            None => self.netlink.set_controller(&link, bridge.index).await?,
        }
        if !link.up {
            self.netlink.set_up(uplink, true).await?;
        }
        Ok(())
    }

    /// Makes the address that a new bridge has (its uplink's, where it has one) its own for good. Without this the kernel
    /// gives a bridge the lowest address of its ports, which is a tap's when the uplink's is higher still: the bridge
    /// would change its address as guests come and go.
    async fn keep_address(&self, name: &str) -> Result<(), NetworkError> {
        match self.bridge(name).await? {
            Some(bridge) => match bridge.mac {
                Some(mac) => self.netlink.pin_address(&bridge, mac).await,
                None => Ok(()),
            },
            None => Err(NetworkError::BridgeMissing {
                bridge: name.to_owned(),
            }),
        }
    }

    /// Brings the tap into the kernel, or finds out that it is already there and ours.
    async fn ensure_tap_link(&self, spec: &TapSpec) -> Result<(Link, bool), NetworkError> {
        if let Some(link) = self.tap(&spec.ifname).await? {
            let label = Label::read(&link);
            if label.nic.as_deref() != Some(&spec.nic) {
                return Err(NetworkError::TapConflict {
                    name: spec.ifname.clone(),
                    found: label
                        .nic
                        .map_or_else(|| "something unknown".into(), |nic| format!("`{nic}`")),
                });
            }
            // A tap held by a running guest keeps its owner; any other gets the new one.
            if !link.carrier {
                tun::make_persistent(&spec.ifname, spec.owner_uid).await?;
            }
            return Ok((link, false));
        }
        tun::make_persistent(&spec.ifname, spec.owner_uid).await?;
        let link = self.existing_tap(&spec.ifname).await?;
        Ok((link, true))
    }

    async fn finish_tap(&self, spec: &TapSpec, tap: &Link) -> Result<(), NetworkError> {
        let bridge =
            self.bridge(&spec.bridge)
                .await?
                .ok_or_else(|| NetworkError::BridgeMissing {
                    bridge: spec.bridge.clone(),
                })?;
        if spec.muted {
            self.cut(tap, Some(spec.guest_mac)).await?;
        }
        let label = Label {
            mac: Some(spec.guest_mac),
            nic: Some(spec.nic.clone()),
        };
        self.netlink
            .dress_tap(
                tap,
                spec.guest_mac.tap_side(),
                bridge.mtu,
                &label.write(),
                bridge.index,
            )
            .await?;
        if !spec.muted {
            self.open_port(tap, Some(spec.guest_mac)).await?;
        }
        Ok(())
    }

    async fn cut(&self, tap: &Link, guest: Option<MacAddr>) -> Result<(), NetworkError> {
        if tap.up {
            self.netlink.set_up(&tap.name, false).await?;
        }
        if let (Some(mac), Some(_)) = (guest, tap.controller) {
            self.netlink.drop_station(tap, mac).await?;
        }
        Ok(())
    }

    async fn open_port(&self, tap: &Link, guest: Option<MacAddr>) -> Result<(), NetworkError> {
        if !tap.up {
            self.netlink.set_up(&tap.name, true).await?;
        }
        if let Some(mac) = guest {
            self.netlink.add_station(tap, mac).await?;
        }
        Ok(())
    }

    /// Sends one round; returns the frames sent and the first error.
    fn send_round(socket: &PacketSocket, what: &Announcement) -> (u32, Option<io::Error>) {
        let mut sent = 0;
        let mut first_error = None;
        for frame in what.frames() {
            match socket.send(&frame) {
                Ok(()) => sent += 1,
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        (sent, first_error)
    }
}

#[async_trait::async_trait]
impl NetworkDriver for LinuxNetwork {
    async fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<BridgeFacts, NetworkError> {
        check_ifname(&spec.name)?;
        let existing = self.bridge(&spec.name).await?;
        let created = existing.is_none();
        if created {
            self.netlink.add_bridge(&spec.name, spec.mtu).await?;
        }
        let bridge = self
            .bridge(&spec.name)
            .await?
            .ok_or_else(|| NetworkError::BridgeMissing {
                bridge: spec.name.clone(),
            })?;
        if bridge.mtu < spec.mtu {
            return Err(NetworkError::MtuTooSmall {
                name: spec.name.clone(),
                have: bridge.mtu,
                want: spec.mtu,
            });
        }
        self.ensure_uplink(spec, &bridge).await?;
        if created {
            self.keep_address(&spec.name).await?;
        }
        if !bridge.up {
            self.netlink.set_up(&spec.name, true).await?;
        }
        Ok(BridgeFacts {
            name: spec.name.clone(),
            mtu: bridge.mtu,
            created,
        })
    }

    async fn create_tap(&self, spec: &TapSpec) -> Result<TapFacts, NetworkError> {
        check_ours(&spec.ifname)?;
        check_ifname(&spec.bridge)?;
        Label::check(&spec.nic)?;
        let (tap, created) = self.ensure_tap_link(spec).await?;
        if let Err(error) = self.finish_tap(spec, &tap).await {
            if created {
                // Half a tap would be taken for somebody else's the next time.
                if let Err(also) = self.netlink.delete(&tap).await {
                    tracing::warn!(tap = tap.name, error = %also, "half-made tap stays behind");
                }
            }
            return Err(error);
        }
        let link = self.existing_tap(&spec.ifname).await?;
        Ok(tap_facts(link, Some(spec.bridge.clone())))
    }

    async fn mute(&self, ifname: &str) -> Result<(), NetworkError> {
        let tap = self.existing_tap(ifname).await?;
        let guest = Label::read(&tap).mac;
        self.cut(&tap, guest).await
    }

    async fn unmute(&self, ifname: &str) -> Result<(), NetworkError> {
        let tap = self.existing_tap(ifname).await?;
        if tap.controller.is_none() {
            return Err(NetworkError::BridgeMissing {
                bridge: format!("of tap {ifname}"),
            });
        }
        let guest = Label::read(&tap).mac;
        self.open_port(&tap, guest).await
    }

    async fn delete_tap(&self, ifname: &str) -> Result<bool, NetworkError> {
        match self.tap(ifname).await? {
            Some(link) => self.netlink.delete(&link).await,
            None => Ok(false),
        }
    }

    async fn list_taps(&self) -> Result<Vec<TapFacts>, NetworkError> {
        let links = self.netlink.all().await?;
        let name_of = |index: u32| {
            let bridge = links.iter().find(|link| link.index == index);
            bridge.map(|bridge| bridge.name.clone())
        };
        let mut taps: Vec<_> = links
            .iter()
            .filter(|link| link.name.starts_with(TAP_PREFIX))
            .filter(|link| link.kind.as_deref() == Some(&netlink::tap_kind()))
            .map(|link| tap_facts(link.clone(), link.controller.and_then(name_of)))
            .collect();
        taps.sort_by(|a, b| a.ifname.cmp(&b.ifname));
        Ok(taps)
    }

    async fn announce(&self, what: &Announcement) -> Result<u32, NetworkError> {
        let failed = |source: io::Error| NetworkError::Announce {
            interface: what.bridge.clone(),
            source,
        };
        let bridge =
            self.netlink
                .find(&what.bridge)
                .await?
                .ok_or_else(|| NetworkError::BridgeMissing {
                    bridge: what.bridge.clone(),
                })?;
        let socket = PacketSocket::sender(bridge.index).map_err(failed)?;
        let mut sent = 0;
        let mut first_error = None;
        for wait in self.schedule.waits() {
            tokio::time::sleep(wait).await;
            let (round, error) = Self::send_round(&socket, what);
            sent += round;
            first_error = first_error.or(error);
        }
        match first_error {
            Some(error) if sent == 0 => Err(failed(error)),
            _ => Ok(sent),
        }
    }

    async fn announce_once(&self, what: &Announcement) -> Result<(), NetworkError> {
        let failed = |source: io::Error| NetworkError::Announce {
            interface: what.bridge.clone(),
            source,
        };
        let bridge = self.netlink.find(&what.bridge).await?;
        let bridge = bridge.ok_or_else(|| NetworkError::BridgeMissing {
            bridge: what.bridge.clone(),
        })?;
        let socket = PacketSocket::sender(bridge.index).map_err(failed)?;
        match Self::send_round(&socket, what) {
            (0, Some(error)) => Err(failed(error)),
            _ => Ok(()),
        }
    }

    async fn hold(&self, ifname: &str) -> Result<Box<dyn Held>, NetworkError> {
        let tap = self.existing_tap(ifname).await?;
        let failed = |source: io::Error| NetworkError::Held {
            name: ifname.to_owned(),
            source,
        };
        let (Some(bridge), Some(guest)) = (tap.controller, Label::read(&tap).mac) else {
            return Err(NetworkError::BridgeMissing {
                bridge: format!("of tap {ifname}"),
            });
        };
        let waiting = Waiting::open(ifname, tap.index, bridge, guest).map_err(failed)?;
        // The target's announcement must not lead frames away before they are let go.
        self.netlink.pin_station(&tap, guest).await?;
        Ok(Box::new(waiting))
    }

    async fn let_go(&self, ifname: &str) -> Result<(), NetworkError> {
        let tap = self.existing_tap(ifname).await?;
        match Label::read(&tap).mac {
            Some(guest) => self.netlink.drop_station(&tap, guest).await,
            None => Ok(()),
        }
    }

    async fn interface(&self, name: &str) -> Result<InterfaceFacts, NetworkError> {
        check_ifname(name)?;
        let Some(link) = self.netlink.find(name).await? else {
            return Ok(InterfaceFacts::missing(name));
        };
        let controller = match link.controller {
            Some(index) => self.netlink.name_of(index).await?,
            None => None,
        };
        Ok(InterfaceFacts {
            name: link.name,
            exists: true,
            up: link.up,
            carrier: link.carrier,
            mtu: link.mtu,
            mac: link.mac,
            kind: link.kind,
            controller,
        })
    }
}

fn tap_facts(link: Link, bridge: Option<String>) -> TapFacts {
    let label = Label::read(&link);
    TapFacts {
        ifname: link.name,
        index: link.index,
        bridge,
        guest_mac: label.mac,
        nic: label.nic,
        muted: !link.up,
        attached: link.carrier,
        mtu: link.mtu,
    }
}

/// What a tap says about itself, kept by the kernel as the interface's alias: so that
/// a restarted daemon, and a person with `ip link`, see whose tap it is.
#[derive(Debug, PartialEq, Eq)]
struct Label {
    mac: Option<MacAddr>,
    nic: Option<String>,
}

impl Label {
    const WORD: &'static str = "quorate";

    fn check(nic: &str) -> Result<(), NetworkError> {
        let reason = if nic.is_empty() || nic.len() > LABEL_MAX {
            "the label of its NIC must have 1 to 160 bytes"
        } else if nic.bytes().any(|b| b.is_ascii_control() || b == b' ') {
            "the label of its NIC must not contain spaces or control characters"
        } else {
            return Ok(());
        };
        Err(NetworkError::InvalidName {
            name: nic.to_owned(),
            reason,
        })
    }

    fn write(&self) -> String {
        let mut text = Self::WORD.to_owned();
        if let Some(mac) = self.mac {
            text.push_str(&format!(" mac={mac}"));
        }
        if let Some(nic) = &self.nic {
            text.push_str(&format!(" nic={nic}"));
        }
        text
    }

    /// Unknown words are skipped, so that a later release may add some.
    fn read(link: &Link) -> Self {
        let mut label = Self {
            mac: None,
            nic: None,
        };
        let mut words = link.alias.as_deref().unwrap_or("").split(' ');
        if words.next() != Some(Self::WORD) {
            return label;
        }
        for word in words {
            if let Some(mac) = word.strip_prefix("mac=") {
                label.mac = mac.parse().ok();
            } else if let Some(nic) = word.strip_prefix("nic=") {
                label.nic = Some(nic.to_owned());
            }
        }
        label
    }
}
