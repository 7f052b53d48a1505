//! The words that all of Quorate shares: names, units, tokens of order, what the operator wants
//! ([`spec`]), and what hosts report ([`report`]).
//!
//! Owns: plain data and its validation rules that need no other data. Always holds: a value of a
//! name type is a valid name; everything serialises with serde in one stable form. Must not:
//! do I/O, read a clock, decide anything. Every other crate depends on this one, so it depends on
//! nothing but serde and a hash.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod bgp;
pub mod conflict;
pub mod ids;
pub mod image;
pub mod limits;
pub mod mac;
pub mod name;
pub mod placement;
pub mod policy;
pub mod pool;
pub mod report;
pub mod secret;
pub mod service;
pub mod service_check;
pub mod settings;
pub mod spec;
pub mod subnet;
pub mod units;

pub use ids::{BootId, Epoch, MigrationId, NodeId, Revision};
pub use image::{FileFormat, ImageJob, ImageRef, ImageSnapshot, ImageTask, JobState};
pub use name::{
    HostName, LabelName, NameError, NetworkName, PoolName, ResourceName, RuleName, SecretName,
    ServiceName, VmName,
};
pub use placement::{Dependency, HostSpec, LabelSelector, Preference, RuleKind, RuleSpec};
pub use policy::{Admission, AdmissionMode, Balancing, BalancingMode, Preemption};
pub use pool::{AccessControl, BlockPool, IscsiPool, Lun, Opener, PoolSpec, RbdPool};
pub use report::{HostReport, LinkReport, MigrationReport, PoolReport, VmPhase, VmReport};
pub use secret::Secret;
pub use service::{RingMember, RingVersion, ServiceId, ServiceReport, ServiceSpec, UplinkMode};
pub use settings::{ClusterSettings, LeaseTimings};
pub use spec::{Manifest, NetworkSpec, VmSpec};
pub use units::{ByteSize, Millis, Timestamp};
