//! What a device says about its reservations, understood.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::device::{DeviceError, Nexus, ReservationDevice, ReservationHeld, ReservationType};
use super::key::{ClusterTag, ReservationKey};

/// Readings of a device whose registrations change meanwhile, before it counts as an error.
const READINGS: u32 = 5;

/// Between two tries of a question that a disturbed path did not carry.
const AGAIN_AFTER: Duration = Duration::from_millis(25);

/// Asks a device something that changes nothing, again and again while the path to it is disturbed, until `until`. A path is
/// mended by its driver in a moment, and what was asked meanwhile is lost; nobody should have to know.
pub(super) fn patiently<T>(
    until: Instant,
    ask: impl Fn() -> Result<T, DeviceError>,
) -> Result<T, DeviceError> {
    loop {
        match ask() {
            Err(error) if error.may_pass() && Instant::now() + AGAIN_AFTER < until => {
                pause(AGAIN_AFTER);
            }
            done => return done,
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "a thread of its own, and nothing to wait for: the kernel tells neither when a path is mended nor when a device is let go of"
)]
pub(crate) fn pause(span: Duration) {
    std::thread::sleep(span);
}

/// Registrations and reservation of one device at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Grows with each change of the registrations.
    pub generation: u32,
    /// Registered keys, each with the number of its nexuses (paths), in order.
    pub keys: BTreeMap<u64, u32>,
    /// The reservation, if there is one.
    pub held: Option<ReservationHeld>,
}

impl Facts {
    /// Reads keys and reservation: in one command where the device knows it, so that nothing
    /// can change in between; else in two, whose generations must agree.
    ///
    /// # Errors
    /// When the device does not answer usably.
    pub fn read(device: &dyn ReservationDevice) -> Result<Self, DeviceError> {
        match device.read_full_status() {
            Ok((generation, nexuses)) => return Ok(Self::of_nexuses(generation, &nexuses)),
            // Not known, or more than fits: keys alone are shorter.
            Err(
                DeviceError::Unsupported(_)
                | DeviceError::Malformed { .. }
                | DeviceError::AnswerTooLong { .. },
            ) => {}
            Err(error) => return Err(error),
        }
        for _ in 0..READINGS {
            let list = device.read_keys()?;
            let (generation, held) = device.read_reservation()?;
            if generation == list.generation {
                return Ok(Self::new(generation, &list.keys, held));
            }
        }
        Err(DeviceError::Kernel(format!(
            "registrations changed during {READINGS} readings"
        )))
    }

    /// From the list of all registrations. Of a reservation that all registrants hold, READ
    /// RESERVATION says key 0, and so does this.
    fn of_nexuses(generation: u32, nexuses: &[Nexus]) -> Self {
        let keys: Vec<u64> = nexuses.iter().map(|nexus| nexus.key).collect();
        let holder = nexuses.iter().find(|nexus| nexus.holder);
        let held = holder.map(|nexus| {
            let kind = nexus.kind.unwrap_or(ReservationType::Other(0));
            let all = matches!(
                kind,
                ReservationType::WriteExclusiveAllRegistrants
                    | ReservationType::ExclusiveAccessAllRegistrants
            );
            ReservationHeld {
                key: if all { 0 } else { nexus.key },
                kind,
                scope: 0,
            }
        });
        Self::new(generation, &keys, held)
    }

    /// Sorts an answer.
    pub fn new(generation: u32, keys: &[u64], held: Option<ReservationHeld>) -> Self {
        let mut counted = BTreeMap::new();
        for key in keys {
            *counted.entry(*key).or_insert(0) += 1;
        }
        Self {
            generation,
            keys: counted,
            held,
        }
    }

    /// Whether the key is registered, on whatever path.
    pub fn has(&self, key: ReservationKey) -> bool {
        self.keys.contains_key(&key.raw())
    }

    /// The registered keys of this cluster, in order of host and epoch.
    pub fn ours(&self, cluster: ClusterTag) -> impl Iterator<Item = ReservationKey> + '_ {
        self.keys
            .keys()
            .filter_map(move |raw| ReservationKey::decode(*raw, cluster))
    }

    /// The registered keys of strangers, in order.
    pub fn foreign(&self, cluster: ClusterTag) -> Vec<u64> {
        let strange = |raw: &u64| ReservationKey::decode(*raw, cluster).is_none();
        self.keys.keys().copied().filter(strange).collect()
    }

    /// The holder, when it is one of this cluster and the reservation is of our type.
    pub fn holder(&self, cluster: ClusterTag) -> Option<ReservationKey> {
        let held = self.held?;
        let ours = held.kind == ReservationType::WriteExclusiveRegistrantsOnly;
        ReservationKey::decode(held.key, cluster).filter(|_| ours)
    }

    /// Whether somebody holds a reservation that is not one of ours.
    pub fn held_by_stranger(&self, cluster: ClusterTag) -> bool {
        self.held.is_some() && self.holder(cluster).is_none()
    }

    /// Whether of this cluster only that key may write, and the device enforces it.
    pub fn only_writer(&self, mine: ReservationKey) -> bool {
        let cluster = mine.cluster();
        self.holder(cluster) == Some(mine)
            && self.keys.keys().all(|raw| *raw == mine.raw())
            && self.has(mine)
    }
}

/// Everything that can be learned about a device without changing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Registrations and reservation.
    pub facts: Facts,
    /// Keys of this cluster, in order.
    pub ours: Vec<ReservationKey>,
    /// Keys of strangers, in order.
    pub foreign: Vec<u64>,
    /// Whether a stranger holds the reservation, or ours is of another type.
    pub held_by_stranger: bool,
    /// Each registration with its initiator; `None` where the device does not tell.
    pub nexuses: Option<Vec<Nexus>>,
    /// Whether registrations survive a restart of the device; `None`: it does not say.
    pub persistent: Option<bool>,
}

impl Inspection {
    /// Looks at a device.
    ///
    /// # Errors
    /// When keys or reservation cannot be read. What is optional in the standard is left out.
    pub fn of(device: &dyn ReservationDevice, cluster: ClusterTag) -> Result<Self, DeviceError> {
        let facts = Facts::read(device)?;
        Ok(Self {
            ours: facts.ours(cluster).collect(),
            foreign: facts.foreign(cluster),
            held_by_stranger: facts.held_by_stranger(cluster),
            nexuses: device
                .read_full_status()
                .ok()
                .filter(|(generation, _)| *generation == facts.generation)
                .map(|(_, nexuses)| nexuses),
            persistent: device
                .capabilities()
                .ok()
                .map(|able| able.persist_possible && able.persist_active),
            facts,
        })
    }
}
