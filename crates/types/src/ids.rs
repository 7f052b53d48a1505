//! Tokens of order: what is newer than what.
//!
//! Always holds: an [`Epoch`] of a VM only grows; an order with an older one is refused by every
//! host. A [`MigrationId`] is never used twice, so no stale record of a migration can be taken for
//! a newer one's success.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Number of a host inside the consensus group; assigned once, never reused.
pub type NodeId = u64;

macro_rules! counter_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The value after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

counter_type!(
    /// Fencing token of a VM: grows with each change of owner. 0 means never owned.
    Epoch
);
counter_type!(
    /// Count of commands applied to the replicated state. A plan carries the one it was made from.
    Revision
);
counter_type!(
    /// Identity of one migration, unique in the cluster's life (the revision that began it).
    MigrationId
);

/// One life of a host's operating system: `/proc/sys/kernel/random/boot_id`, with the start of the
/// host's supervisor mixed in where several hosts share a kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct BootId(pub String);
