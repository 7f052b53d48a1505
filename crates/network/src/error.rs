//! What can go wrong with the host's network, in words the operator can act on.

/// A failed network operation.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The name cannot be an interface name.
    #[error("`{name}` is not a valid interface name: {reason}")]
    InvalidName {
        /// The refused name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The interface to delete or mute was not made by Quorate.
    #[error("`{name}` was not made by Quorate and is left alone")]
    NotOurs {
        /// The interface.
        name: String,
    },
    /// The bridge's name belongs to another kind of interface.
    #[error(
        "`{name}` is a {kind} and not a bridge: name another bridge in the network's manifest, or rename the interface"
    )]
    NotABridge {
        /// The interface.
        name: String,
        /// Its kind, as the kernel calls it.
        kind: String,
    },
    /// The bridge a tap should join does not exist.
    #[error(
        "bridge `{bridge}` does not exist on this host: create it, or apply the network's manifest again"
    )]
    BridgeMissing {
        /// The bridge.
        bridge: String,
    },
    /// The uplink does not exist.
    #[error(
        "uplink `{uplink}` of bridge `{bridge}` does not exist on this host: correct `uplink`, or plug the card in"
    )]
    UplinkMissing {
        /// The bridge.
        bridge: String,
        /// The interface named as its uplink.
        uplink: String,
    },
    /// The uplink is already a port of something else.
    #[error(
        "uplink `{uplink}` belongs to `{controller}` and not to `{bridge}`: take it out there first"
    )]
    UplinkTaken {
        /// The bridge.
        bridge: String,
        /// The interface named as its uplink.
        uplink: String,
        /// The interface that holds it now.
        controller: String,
    },
    /// The uplink carries addresses, which would stop working inside a bridge.
    #[error(
        "uplink `{uplink}` carries addresses of this host: move them to bridge `{bridge}` first, or the host loses its network"
    )]
    UplinkHasAddresses {
        /// The bridge.
        bridge: String,
        /// The interface named as its uplink.
        uplink: String,
    },
    /// What comes for a guest cannot be listened to, or sent after it.
    #[error("what comes for the guest of tap `{name}` cannot follow it")]
    Held {
        /// The tap.
        name: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// An existing interface has too small an MTU.
    #[error(
        "`{name}` has MTU {have}, the network needs {want}: raise it there, or lower `mtu` in the manifest"
    )]
    MtuTooSmall {
        /// The interface.
        name: String,
        /// Its MTU in bytes.
        have: u32,
        /// The wanted MTU in bytes.
        want: u32,
    },
    /// There is no tap of that name.
    #[error("tap `{name}` does not exist: create it before it is muted or opened")]
    TapMissing {
        /// The tap.
        name: String,
    },
    /// A tap of that name serves another NIC, or the interface is no tap.
    #[error(
        "`{name}` already exists and serves {found}: delete it (`ip link del {name}`) if nothing uses it"
    )]
    TapConflict {
        /// The tap.
        name: String,
        /// What the existing interface says it is for.
        found: String,
    },
    /// Another process holds the tap open while its properties should change.
    #[error("tap `{name}` is in use by another process: end the guest that holds it first")]
    TapBusy {
        /// The tap.
        name: String,
    },
    /// The host cannot make taps.
    #[error(
        "/dev/net/tun cannot be opened ({source}): load the `tun` module and run the daemon as root"
    )]
    NoTun {
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel refused an operation on a tap.
    #[error("tap `{name}`: {operation} failed: {source}")]
    Tap {
        /// The tap.
        name: String,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("`{name}`: {operation} failed: {detail}")]
    Netlink {
        /// The interface.
        name: String,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        detail: String,
    },
    /// The netlink socket could not be opened.
    #[error("no netlink socket: {source}: the daemon needs CAP_NET_ADMIN")]
    NoNetlink {
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel did not answer in time.
    #[error(
        "`{name}`: {operation} took longer than {timeout_ms} ms: look for a hung network driver in the kernel log"
    )]
    Timeout {
        /// The interface.
        name: String,
        /// What was tried.
        operation: &'static str,
        /// The limit in milliseconds.
        timeout_ms: u64,
    },
    /// No announcement left the host.
    #[error(
        "`{interface}`: the address of the guest could not be announced: {source}: check that the bridge is up"
    )]
    Announce {
        /// The interface the frames were sent on.
        interface: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A fake driver was told to fail.
    #[error("fake network: {operation} was told to fail")]
    Injected {
        /// What was tried.
        operation: &'static str,
    },
}
