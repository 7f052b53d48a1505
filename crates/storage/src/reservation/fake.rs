//! A logical unit in memory that follows SPC-4, shared by several initiators.
//!
//! Faithful in what the rest relies on: who may write under a reservation of each type, what
//! REGISTER, RESERVE, PREEMPT and CLEAR do and when they conflict, the generation, persistence
//! over a restart. Its weaknesses are switched on one by one: no persistence, a path that is
//! down. One command is one atomic step, so tests can put anything between two of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{
    Capabilities, Command, DeviceError, KeyList, Nexus, ReservationDevice, ReservationHeld,
    ReservationType,
};

#[derive(Debug, Clone, Default)]
struct State {
    generation: u32,
    /// Registrations by nexus: one initiator on one path.
    keys: BTreeMap<u32, u64>,
    /// Nexus that holds it, and the type.
    reservation: Option<(u32, Option<ReservationType>)>,
    cannot_persist: bool,
    down: Vec<u32>,
    /// Commands of a nexus that are lost on their way, each counted down when it is.
    lost: BTreeMap<u32, u32>,
    log: Vec<(u32, Command)>,
}

/// The logical unit.
#[derive(Debug, Clone, Default)]
pub struct FakeLun {
    state: Arc<Mutex<State>>,
}

impl FakeLun {
    /// A fresh one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The unit as one nexus sees it.
    pub fn nexus(&self, nexus: u32) -> FakeDevice {
        FakeDevice {
            lun: self.clone(),
            nexus,
        }
    }

    /// It forgets registrations when it is restarted, and says so.
    pub fn cannot_persist(&self) {
        self.state().cannot_persist = true;
    }

    /// The unit loses its power and comes back.
    pub fn restart(&self) {
        let mut state = self.state();
        if state.cannot_persist {
            state.keys.clear();
            state.reservation = None;
            state.generation = 0;
        }
    }

    /// It loses registrations that it promised to keep: broken firmware, a restored box.
    pub fn forget(&self) {
        let mut state = self.state();
        state.keys.clear();
        state.reservation = None;
        state.generation = 0;
    }

    /// Cuts or mends the path of a nexus.
    pub fn set_down(&self, nexus: u32, down: bool) {
        let mut state = self.state();
        state.down.retain(|other| *other != nexus);
        if down {
            state.down.push(nexus);
        }
    }

    /// The next so many commands of a nexus are lost on their way, then its path is mended.
    pub fn disturb(&self, nexus: u32, commands: u32) {
        self.state().lost.insert(nexus, commands);
    }

    /// Whether a nexus may write now, path or not.
    pub fn may_write(&self, nexus: u32) -> bool {
        self.state().may_write(nexus)
    }

    /// Whether anybody holds a reservation.
    pub fn is_reserved(&self) -> bool {
        self.state().reservation.is_some()
    }

    /// A registration from outside of our code.
    pub fn put_key(&self, nexus: u32, key: u64) {
        let mut state = self.state();
        state.keys.insert(nexus, key);
        state.generation += 1;
    }

    /// A reservation from outside of our code.
    pub fn put_reservation(&self, nexus: u32, kind: ReservationType) {
        self.state().reservation = Some((nexus, Some(kind)));
    }

    /// The commands that changed it, with their nexus.
    pub fn log(&self) -> Vec<(u32, Command)> {
        self.state().log.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere: the state is whole after each command.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn kind(&self) -> Option<ReservationType> {
        self.reservation
            .map(|(_, kind)| kind.unwrap_or(ReservationType::WriteExclusiveRegistrantsOnly))
    }

    fn all_hold(&self) -> bool {
        matches!(
            self.kind(),
            Some(
                ReservationType::WriteExclusiveAllRegistrants
                    | ReservationType::ExclusiveAccessAllRegistrants
            )
        )
    }

    fn may_write(&self, nexus: u32) -> bool {
        match (self.reservation, self.kind()) {
            (None, _) | (_, None) => true,
            (
                Some((holder, _)),
                Some(ReservationType::WriteExclusive | ReservationType::ExclusiveAccess),
            ) => holder == nexus,
            _ => self.keys.contains_key(&nexus),
        }
    }

    fn holds(&self, nexus: u32) -> bool {
        self.reservation
            .is_some_and(|(holder, _)| holder == nexus || self.all_hold())
    }

    /// Ends a registration. With a holder's the reservation goes; of those that all hold, with
    /// the last one.
    fn unregister(&mut self, nexus: u32) {
        self.keys.remove(&nexus);
        let gone = match self.reservation {
            Some(_) if self.all_hold() => self.keys.is_empty(),
            Some((holder, _)) => holder == nexus,
            None => false,
        };
        if gone {
            self.reservation = None;
        }
    }

    fn apply(&mut self, nexus: u32, command: Command) -> Result<(), DeviceError> {
        let registered_as = |key: u64| self.keys.get(&nexus) == Some(&key);
        match command {
            Command::Register { key } => {
                if key == 0 {
                    self.unregister(nexus);
                } else {
                    self.keys.insert(nexus, key);
                }
                self.generation = self.generation.wrapping_add(1);
            }
            Command::Unregister { key } if registered_as(key) => {
                self.unregister(nexus);
                self.generation = self.generation.wrapping_add(1);
            }
            Command::Reserve { key } if registered_as(key) => match self.reservation {
                None => self.reservation = Some((nexus, None)),
                Some(_)
                    if self.holds(nexus)
                        && self.kind() == Some(ReservationType::WriteExclusiveRegistrantsOnly) => {}
                Some(_) => return Err(DeviceError::Conflict),
            },
            Command::Preempt { key, victim, .. } if registered_as(key) => {
                self.preempt(nexus, victim)?;
            }
            Command::Clear { key } if registered_as(key) => {
                self.keys.clear();
                self.reservation = None;
                self.generation = self.generation.wrapping_add(1);
            }
            _ => return Err(DeviceError::Conflict),
        }
        Ok(())
    }

    fn preempt(&mut self, nexus: u32, victim: u64) -> Result<(), DeviceError> {
        let holder_key = self
            .reservation
            .filter(|_| !self.all_hold())
            .and_then(|(holder, _)| self.keys.get(&holder).copied());
        let takes_it = holder_key == Some(victim) || (victim == 0 && self.all_hold());
        if victim == 0 && !takes_it {
            return Err(DeviceError::Conflict);
        }
        let before = self.keys.len();
        self.keys
            .retain(|other, key| *other == nexus || (*key != victim && !(victim == 0 && takes_it)));
        if takes_it {
            self.reservation = Some((nexus, None));
        } else if self.keys.len() == before {
            return Err(DeviceError::Conflict);
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(())
    }
}

/// A [`FakeLun`] as one initiator sees it.
#[derive(Debug, Clone)]
pub struct FakeDevice {
    lun: FakeLun,
    nexus: u32,
}

impl FakeDevice {
    fn reach(&self) -> Result<MutexGuard<'_, State>, DeviceError> {
        let mut state = self.lun.state();
        if let Some(left @ 1..) = state.lost.get_mut(&self.nexus) {
            *left -= 1;
            return Err(DeviceError::Disturbed("by the test".into()));
        }
        if state.down.contains(&self.nexus) {
            return Err(DeviceError::Path("cut by the test".into()));
        }
        Ok(state)
    }
}

impl ReservationDevice for FakeDevice {
    fn name(&self) -> String {
        format!("fake LUN, nexus {}", self.nexus)
    }

    fn read_keys(&self) -> Result<KeyList, DeviceError> {
        let state = self.reach()?;
        Ok(KeyList {
            generation: state.generation,
            keys: state.keys.values().copied().collect(),
        })
    }

    fn read_reservation(&self) -> Result<(u32, Option<ReservationHeld>), DeviceError> {
        let state = self.reach()?;
        let held = state
            .reservation
            .zip(state.kind())
            .map(|((holder, _), kind)| {
                let key = state.keys.get(&holder).copied().unwrap_or(0);
                ReservationHeld {
                    key: if state.all_hold() { 0 } else { key },
                    kind,
                    scope: 0,
                }
            });
        Ok((state.generation, held))
    }

    fn capabilities(&self) -> Result<Capabilities, DeviceError> {
        let persists = !self.reach()?.cannot_persist;
        Ok(Capabilities {
            persist_possible: persists,
            persist_active: persists,
            write_exclusive_registrants_only: Some(true),
        })
    }

    fn read_full_status(&self) -> Result<(u32, Vec<Nexus>), DeviceError> {
        let state = self.reach()?;
        let nexuses = state
            .keys
            .iter()
            .map(|(nexus, key)| Nexus {
                key: *key,
                holder: state.holds(*nexus),
                all_ports: false,
                kind: state.kind().filter(|_| state.holds(*nexus)),
                port: 1,
                initiator: format!("nexus {nexus}"),
            })
            .collect();
        Ok((state.generation, nexuses))
    }

    fn command(&self, command: Command) -> Result<(), DeviceError> {
        let mut state = self.reach()?;
        state.apply(self.nexus, command)?;
        state.log.push((self.nexus, command));
        Ok(())
    }

    fn write_nothing(&self) -> Result<(), DeviceError> {
        if self.reach()?.may_write(self.nexus) {
            Ok(())
        } else {
            Err(DeviceError::Conflict)
        }
    }
    fn rewrite_first_block(&self) -> Result<(), DeviceError> {
        self.write_nothing()
    }
}
