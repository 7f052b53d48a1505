//! The host's network as Quorate sees it: bridges, one tap per NIC, and the
//! announcement that tells the switches where a guest went.
//!
//! Owns: the trait [`NetworkDriver`], the pure parts every driver shares (stable
//! names and addresses, announcement frames and their schedule), the Linux driver
//! and a fake one.
//!
//! Always holds:
//! - every interface this crate creates or deletes is called `qt-...`; nothing else
//!   on the host is ever deleted;
//! - a tap is born **mute** and only [`NetworkDriver::unmute`] opens it, so a guest
//!   that waits for its switchover puts no frame on the wire (see [`linux`] for how,
//!   and for the ways that do not work);
//! - the tap's own MAC is never the guest's, and is never the lowest on a bridge, so
//!   a bridge does not change its address when a guest comes or goes;
//! - every call is idempotent and ends within [`CALL_TIMEOUT`].
//!
//! Must not: move an address, a route or an uplink that something else uses. It
//! refuses and says what the operator should do instead.

pub mod announce;
pub mod attract;
mod error;
pub mod fake;
pub mod held;
pub mod linux;
mod mac;
mod model;
mod names;

use std::time::Duration;

pub use announce::{Announcement, Schedule};
pub use error::NetworkError;
pub use fake::FakeNetwork;
pub use held::Held;
pub use linux::LinuxNetwork;
pub use mac::{MacAddr, MacCollision, MacParseError, find_collisions, nic_mac};
pub use model::{BridgeFacts, BridgeSpec, InterfaceFacts, TapFacts, TapSpec};
pub use names::{TAP_PREFIX, check_ifname, tap_name};

/// Longest time one call to the kernel may take before it is reported as failed.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// What an agent needs from the network of its host.
///
/// All operations are idempotent: repeating one that has succeeded changes nothing.
#[async_trait::async_trait]
pub trait NetworkDriver: Send + Sync + 'static {
    /// Makes sure that the bridge exists, is up, has the MTU and holds the uplink.
    /// An existing bridge is used as it is; a missing one is created.
    ///
    /// # Errors
    /// When the name belongs to something else, the uplink is missing or in use, or
    /// the MTU of an existing bridge is too small.
    async fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<BridgeFacts, NetworkError>;

    /// Makes sure that the tap exists, belongs to the owner, is a port of the bridge,
    /// and is mute or not as the spec says.
    ///
    /// # Errors
    /// When the bridge is missing, the name belongs to another NIC, or the host
    /// cannot create taps.
    async fn create_tap(&self, spec: &TapSpec) -> Result<TapFacts, NetworkError>;

    /// Cuts the tap off: from the return on no frame passes in either direction.
    ///
    /// # Errors
    /// When there is no such tap.
    async fn mute(&self, ifname: &str) -> Result<(), NetworkError>;

    /// Opens the tap: from the return on frames pass in both directions, and the
    /// local bridge knows that the guest is here.
    ///
    /// # Errors
    /// When there is no such tap or it is not a port of a bridge.
    async fn unmute(&self, ifname: &str) -> Result<(), NetworkError>;

    /// Removes the tap. Returns whether there was one.
    ///
    /// # Errors
    /// When the name is not one of ours, or the kernel refuses.
    async fn delete_tap(&self, ifname: &str) -> Result<bool, NetworkError>;

    /// Every tap of ours on this host, by name.
    ///
    /// # Errors
    /// When the kernel does not answer.
    async fn list_taps(&self) -> Result<Vec<TapFacts>, NetworkError>;

    /// Tells the switches where the guest is. Sends the first round at once and the
    /// rest on [`Schedule`]; returns the number of frames sent.
    ///
    /// # Errors
    /// When not one frame could be sent.
    async fn announce(&self, what: &Announcement) -> Result<u32, NetworkError>;

    /// One round of an announcement, sent on the return.
    ///
    /// # Errors
    /// When not one frame could be sent.
    async fn announce_once(&self, what: &Announcement) -> Result<(), NetworkError>;

    /// From the return on, listens to what comes for the guest of a tap, so that it can follow a guest that leaves:
    /// see [`held`]. The local bridge delivers to the tap, wherever the guest is said to be, until
    /// [`NetworkDriver::let_go`]; [`NetworkDriver::unmute`] makes it believe again what it sees.
    ///
    /// # Errors
    /// When there is no such tap, or the kernel refuses.
    async fn hold(&self, ifname: &str) -> Result<Box<dyn Held>, NetworkError>;

    /// The local bridge does not know any more that the guest is behind this tap.
    ///
    /// # Errors
    /// When there is no such tap, or the kernel refuses.
    async fn let_go(&self, ifname: &str) -> Result<(), NetworkError>;

    /// Facts about one interface, for the inventory. A missing one is a fact too.
    ///
    /// # Errors
    /// When the kernel does not answer.
    async fn interface(&self, name: &str) -> Result<InterfaceFacts, NetworkError>;
}
