//! The heartbeat between host and leader.

use quorate_types::{BootId, HostName, HostReport, Revision};
use serde::{Deserialize, Serialize};

/// A host's heartbeat. It keeps its send time to itself: the lease counts from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HeartbeatRequest {
    /// Who sends.
    pub host: HostName,
    /// This life of the host.
    pub boot: BootId,
    /// Guard armed.
    pub guard_armed: bool,
    /// The watchdog's bound in milliseconds, when armed.
    pub watchdog_ms: Option<u64>,
    /// Revision applied on the host.
    pub applied: Revision,
    /// Sequence number of the host's newest report.
    pub sequence: u64,
    /// The report itself, when the leader may not have it.
    pub report: Option<Box<HostReport>>,
}

/// The leader's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HeartbeatReply {
    /// Lease in milliseconds from when the heartbeat was sent; 0: none.
    pub granted_ms: u64,
    /// Nothing starts or thaws before this revision is applied.
    pub revision: Revision,
    /// Send the report with the next heartbeat.
    pub want_report: bool,
    /// Why there is no lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}
