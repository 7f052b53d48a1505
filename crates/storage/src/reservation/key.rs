//! The key a host registers with: who it is, and for which epoch it may write.
//!
//! ```text
//!  63     56 55          44 43          32 31                             0
//! | 0x51 'Q' | cluster tag  | host number  | epoch                          |
//!   2 digits    3 digits       3 digits      8 digits of the hexadecimal form
//! ```
//! The fields end on hexadecimal digits, so that a key can be read in the output of
//! `sg_persist`: `0x51abc00200000007` is host 2 of cluster `abc`, epoch 7. Everything that
//! does not begin with `Q` and our tag is a stranger's, zero included: no key of ours is zero.

use std::fmt;

const MAGIC: u64 = 0x51;

/// Twelve bits that tell one cluster's keys from another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterTag(u16);

impl ClusterTag {
    /// The largest tag.
    pub const MAX: u16 = 0xfff;

    /// A given tag; bits above the twelfth are cut off.
    pub const fn new(tag: u16) -> Self {
        Self(tag & Self::MAX)
    }

    /// The tag of a cluster, made of its id: FNV-1a, folded. Two clusters have the same one
    /// with a chance of 1 in 4096, so it is a second net behind the pool's own marker.
    pub fn of(cluster_id: &str) -> Self {
        let sum = cluster_id
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
                (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let folded = sum ^ (sum >> 12) ^ (sum >> 24) ^ (sum >> 36) ^ (sum >> 48) ^ (sum >> 60);
        Self((folded & u64::from(Self::MAX)) as u16)
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for ClusterTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:03x}", self.0)
    }
}

/// A key of ours, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReservationKey {
    epoch: u32,
    host: u16,
    cluster: ClusterTag,
}

/// Why there is no key for a host or an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Twelve bits, and zero is nobody.
    #[error(
        "host number {host} has no reservation key (1 to 4094 have): let this host leave and join a fresh cluster"
    )]
    HostOutOfRange {
        /// The number.
        host: u64,
    },
    /// Thirty-two bits, and zero is no epoch.
    #[error("epoch {epoch} has no reservation key (1 to 4294967295 have)")]
    EpochOutOfRange {
        /// The epoch.
        epoch: u64,
    },
}

impl ReservationKey {
    /// The largest host number.
    pub const MAX_HOST: u64 = 0xffe;
    /// The number that stands for no host: a key that only keeps others out.
    const FENCE: u16 = 0xfff;

    /// The key of a host (by its number in the cluster) for an epoch.
    ///
    /// # Errors
    /// When one of them does not fit.
    pub fn new(cluster: ClusterTag, host: u64, epoch: u64) -> Result<Self, KeyError> {
        if host == 0 || host > Self::MAX_HOST {
            return Err(KeyError::HostOutOfRange { host });
        }
        match u32::try_from(epoch) {
            Ok(small) if small > 0 => Ok(Self {
                epoch: small,
                host: host as u16,
                cluster,
            }),
            _ => Err(KeyError::EpochOutOfRange { epoch }),
        }
    }

    /// The key of a cut: nobody writes by it. It is newer than every host's of that epoch, and older than the next.
    ///
    /// # Errors
    /// When the epoch does not fit.
    pub fn fence(cluster: ClusterTag, epoch: u64) -> Result<Self, KeyError> {
        Self::new(cluster, 1, epoch).map(|key| Self {
            host: Self::FENCE,
            ..key
        })
    }

    /// Whether it is the key of a cut.
    pub const fn is_fence(self) -> bool {
        self.host == Self::FENCE
    }

    /// How new it is.
    pub(super) const fn age(self) -> (u32, bool) {
        (self.epoch, self.is_fence())
    }

    /// Takes a key apart; `None` when it is not one of this cluster.
    pub fn decode(raw: u64, cluster: ClusterTag) -> Option<Self> {
        let tag = (raw >> 44 & 0xfff) as u16;
        if raw >> 56 != MAGIC || tag != cluster.get() {
            return None;
        }
        let (host, epoch) = (raw >> 32 & 0xfff, raw & 0xffff_ffff);
        match host == u64::from(Self::FENCE) {
            true => Self::fence(cluster, epoch).ok(),
            false => Self::new(cluster, host, epoch).ok(),
        }
    }

    /// Takes a key of any cluster apart.
    pub fn decode_any(raw: u64) -> Option<Self> {
        Self::decode(raw, ClusterTag::new((raw >> 44 & 0xfff) as u16))
    }

    /// The 64 bits that the device sees.
    pub const fn raw(self) -> u64 {
        MAGIC << 56 | (self.cluster.0 as u64) << 44 | (self.host as u64) << 32 | self.epoch as u64
    }

    /// The host's number.
    pub const fn host(self) -> u16 {
        self.host
    }

    /// The epoch.
    pub const fn epoch(self) -> u32 {
        self.epoch
    }

    /// The cluster's tag.
    pub const fn cluster(self) -> ClusterTag {
        self.cluster
    }
}

impl fmt::Display for ReservationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_fence() {
            return write!(f, "{:#018x} (a cut, epoch {})", self.raw(), self.epoch);
        }
        write!(
            f,
            "{:#018x} (host {}, epoch {})",
            self.raw(),
            self.host,
            self.epoch
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_reads_well_in_hexadecimal() {
        let key = ReservationKey::new(ClusterTag::new(0xabc), 2, 7).unwrap();
        assert_eq!(key.raw(), 0x51ab_c002_0000_0007);
        assert_eq!(key.to_string(), "0x51abc00200000007 (host 2, epoch 7)");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let tag = ClusterTag::new(1);
        for (host, epoch, fits) in [
            (1, 1, true),
            (4094, 0xffff_ffff, true),
            (4095, 1, false),
            (0, 1, false),
            (4096, 1, false),
            (1, 0, false),
            (1, 0x1_0000_0000, false),
        ] {
            assert_eq!(ReservationKey::new(tag, host, epoch).is_ok(), fits);
        }
    }

    #[test]
    fn a_cut_is_newer_than_the_hosts_of_its_epoch_only() {
        let tag = ClusterTag::new(7);
        let cut = ReservationKey::fence(tag, 5).unwrap();
        assert_eq!(ReservationKey::decode(cut.raw(), tag), Some(cut));
        assert!(cut.is_fence() && cut.to_string().ends_with("(a cut, epoch 5)"));
        let host = |epoch| ReservationKey::new(tag, 4094, epoch).unwrap();
        assert!(host(5).age() < cut.age() && cut.age() < host(6).age());
        assert!(ReservationKey::fence(tag, 0).is_err());
    }

    #[test]
    fn keys_of_others_are_recognised() {
        let tag = ClusterTag::new(0xabc);
        for stranger in [
            0,
            1,
            0xabcd_0002,           // a small number, as fence_scsi uses
            0x51ab_d002_0000_0007, // another cluster
            0x52ab_c002_0000_0007, // another magic
            0x51ab_c000_0000_0007, // no host
            0x51ab_c002_0000_0000, // no epoch
        ] {
            assert_eq!(ReservationKey::decode(stranger, tag), None, "{stranger:x}");
        }
        let other = ReservationKey::decode_any(0x51ab_d002_0000_0007).unwrap();
        assert_eq!((other.cluster().get(), other.host()), (0xabd, 2));
        assert_eq!(ReservationKey::decode_any(0xabcd_0002), None);
    }

    #[test]
    fn tags_of_similar_clusters_differ() {
        let tags: std::collections::BTreeSet<u16> = (0..100)
            .map(|n| ClusterTag::of(&format!("cluster-{n}")).get())
            .collect();
        assert!(tags.len() > 90, "{} of 100", tags.len());
    }

    proptest! {
        #[test]
        fn a_key_reads_back(tag in 0_u16..=0xfff, host in 1_u64..=4094, epoch in 1_u64..=0xffff_ffff) {
            let tag = ClusterTag::new(tag);
            let key = ReservationKey::new(tag, host, epoch).unwrap();
            prop_assert_eq!(ReservationKey::decode(key.raw(), tag), Some(key));
            prop_assert_eq!((u64::from(key.host()), u64::from(key.epoch())), (host, epoch));
        }

        #[test]
        fn any_number_decodes_to_itself_or_to_nothing(raw: u64, tag in 0_u16..=0xfff) {
            if let Some(key) = ReservationKey::decode(raw, ClusterTag::new(tag)) {
                prop_assert_eq!(key.raw(), raw);
            }
        }
    }
}
