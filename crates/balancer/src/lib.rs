//! The service datapath: one address over many VMs, decided per packet in the kernel.
//!
//! Owns: the ring that spreads clients over members ([`ring`]), what the kernel's tables look like ([`abi`]), the trait
//! [`Datapath`] with the Linux driver (`linux`: eBPF programs in `bpf/`, loaded, pinned and fed) and a fake one.
//!
//! ```text
//!            XDP, uplink                         bridge              tcx, the member's tap
//! client --> director: dmac = virtual MAC? ----> (or back to the ---> edge: service address --> guest's address
//!            lease? pin? ring slot -> MAC         wire: member is              known flow? else second chance
//!                                                 elsewhere)         <--- edge: guest's address --> service address
//! ```
//!
//! Always holds:
//! - a host steers, answers and serves for a service only before the deadline that [`Datapath::lease`] wrote; past it
//!   the kernel drops by itself, with nothing running in user space;
//! - a table is a pure function of a service's list of [`RingVersion`]s, so all hosts steer alike;
//! - members are steered to by MAC address: a migration changes no table;
//! - programs, maps and links are pinned: a daemon that ends drops no packet.
//!
//! Must not: decide who is a member, healthy or holder; know of consensus. It is told a [`Wanted`] and says what it did.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod abi;
mod error;
pub mod fake;
pub mod flow;
#[cfg(target_os = "linux")]
pub mod linux;
pub mod mac;
pub mod model;
pub mod ring;
pub mod trace;

pub use error::BalancerError;
pub use fake::FakeDatapath;
pub use flow::{Flow, FlowKey, Pin, strays_of};
#[cfg(target_os = "linux")]
pub use linux::{Capacity, LinuxDatapath, LinuxOptions};
pub use model::{
    Applied, Counters, Duplicate, EdgeSpec, Guard, Loaded, MemberCounters, ServiceCounters,
    ServiceTable, UplinkWanted, Wanted,
};
pub use quorate_types::service::{RingMember, RingVersion, UplinkMode};
pub use trace::{TraceAnswer, TraceQuery};

/// What an agent needs from the service datapath of its host. All operations are idempotent.
#[async_trait::async_trait]
pub trait Datapath: Send + Sync + 'static {
    /// Makes the kernel's tables, programs and links what is wanted. What goes wrong with one service or uplink is in
    /// the answer and leaves the others alone.
    ///
    /// # Errors
    /// When the kernel cannot do it at all, or a table of the whole host is full.
    async fn apply(&self, wanted: &Wanted) -> Result<Applied, BalancerError>;

    /// Until when this host may serve, in nanoseconds of `CLOCK_BOOTTIME`. Cheap; 0 silences at once.
    fn lease(&self, deadline_ns: u64);

    /// Attaches the edge to a tap. It forwards to nobody yet: the director takes the member for remote.
    ///
    /// # Errors
    /// When there is no such interface, or the kernel refuses.
    async fn attach_edge(&self, edge: &EdgeSpec) -> Result<(), BalancerError>;

    /// The tap carries the running guest from now on: the director delivers to it here.
    ///
    /// # Errors
    /// When no edge is attached to it.
    async fn open_edge(&self, ifname: &str) -> Result<(), BalancerError>;

    /// The guest has left: the director takes the member for remote again. With `forward_to_wire` frames that still
    /// come to this tap are sent out of the uplink, where the guest is now.
    ///
    /// # Errors
    /// When the kernel refuses. Not: no edge is attached.
    async fn close_edge(&self, ifname: &str, forward_to_wire: bool) -> Result<(), BalancerError>;

    /// Takes the edge away, with its flows.
    ///
    /// # Errors
    /// When the kernel refuses. Not: no edge is attached.
    async fn detach_edge(&self, ifname: &str) -> Result<(), BalancerError>;

    /// The flows that the edge knows, to be shipped with the VM.
    ///
    /// # Errors
    /// When no edge is attached to it.
    async fn flows(&self, ifname: &str) -> Result<Vec<Flow>, BalancerError>;

    /// Makes an edge know flows that came with the VM.
    ///
    /// # Errors
    /// When no edge is attached to it.
    async fn put_flows(&self, ifname: &str, flows: &[Flow]) -> Result<(), BalancerError>;

    /// Flows of this host's members that neither primary nor previous of the table's coming ring would reach. Edges that
    /// are closed count: the guest of one may be at its switchover.
    ///
    /// # Errors
    /// When the kernel does not answer.
    async fn strays(&self, table: &ServiceTable) -> Result<Vec<Pin>, BalancerError>;

    /// Makes this host's director send flows to the member named, whatever the ring says.
    ///
    /// # Errors
    /// When a service or its member is not loaded here, or the table of pins is full.
    async fn pin(&self, pins: &[Pin]) -> Result<(), BalancerError>;

    /// What was counted since the tables were made.
    ///
    /// # Errors
    /// When the kernel does not answer.
    async fn counters(&self) -> Result<Counters, BalancerError>;

    /// Which member a client gets at this host's director, and why.
    ///
    /// # Errors
    /// When the service is not loaded here.
    async fn trace(&self, query: &TraceQuery) -> Result<TraceAnswer, BalancerError>;
}
