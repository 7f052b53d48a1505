//! Tries a device's reservations, step by step, and says what they are good for.
//!
//! A data sheet proves nothing: boxes exist that accept every command and enforce none, forget
//! a key when a session ends, or do not know type 5. [`alone`] finds out what one host can, on a
//! LUN that nobody uses. [`pair`] needs two nexuses of different hosts and is the real proof: it
//! watches the write access of the one end at the other's hand. Hosts that are apart do
//! the same with [`super::Reservation::acquire`], [`super::Reservation::take_over`] and
//! [`super::Reservation::may_write`].
//!
//! Always holds: a device with a registration of somebody else is not touched, and what the
//! drill registered is gone afterwards, as far as the device allows. No data changes.

use std::fmt;
use std::time::Instant;

use super::device::{Command, DeviceError, ReservationDevice};
use super::facts::{Facts, patiently};
use super::key::ReservationKey;
use super::plan::{Older, Role, Strangers, Wish};
use super::run::fulfil;
use crate::StorageFence;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrillStep {
    /// What was tried.
    pub name: &'static str,
    /// What is wrong and what to do; `None`: it works.
    pub problem: Option<String>,
}

/// What the drill found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrillReport {
    /// The steps in order; the first that failed is the last, except for putting things back.
    pub steps: Vec<DrillStep>,
    /// The proof that this device can give.
    pub proof: Option<StorageFence>,
    /// Whether a cut outlasts a restart of the device. Where it does not, registrations are
    /// made again after each restart, and a host that was cut off can write in between.
    pub persistent: bool,
    /// Whether two hosts took part.
    pub two_hosts: bool,
}

impl DrillReport {
    /// The step that failed.
    pub fn failed(&self) -> Option<&DrillStep> {
        self.steps.iter().find(|step| step.problem.is_some())
    }

    /// What came of it, as sentences for a record: `host` is the one that tried; the last ones say what is wrong.
    pub fn sentences(&self, host: &str) -> Vec<String> {
        let good = self.steps.iter().filter(|step| step.problem.is_none());
        let good: Vec<&str> = good.map(|step| step.name).collect();
        let mut told = Vec::new();
        if !good.is_empty() {
            told.push(format!("{host}: {}", good.join(", ")));
        }
        for step in &self.steps {
            if let Some(problem) = &step.problem {
                told.push(format!("{host}: failed: {}: {problem}", step.name));
            }
        }
        if self.proof.is_some() && !self.persistent {
            told.push(
                "it forgets reservations when it restarts: enable their persistence (APTPL) there"
                    .to_owned(),
            );
        }
        told
    }
}

impl fmt::Display for DrillReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            match &step.problem {
                None => writeln!(f, "ok      {}", step.name)?,
                Some(problem) => writeln!(f, "FAILED  {}: {problem}", step.name)?,
            }
        }
        match (self.proof, self.persistent) {
            (None, _) => f.write_str("proof: none; recovery needs another one"),
            (Some(_), true) => f.write_str("proof: reservation; it outlasts a restart of the SAN"),
            (Some(_), false) => f.write_str(
                "proof: reservation, until the SAN restarts: it does not keep registrations (APTPL), so enable that there",
            ),
        }
    }
}

struct Drill {
    steps: Vec<DrillStep>,
    persistent: bool,
}

type Step = Result<(), String>;

impl Drill {
    const fn new() -> Self {
        Self {
            steps: Vec::new(),
            persistent: false,
        }
    }

    /// Runs a step unless an earlier one failed.
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Step) -> &mut Self {
        if self.steps.iter().all(|step| step.problem.is_none()) {
            self.always(name, work);
        }
        self
    }

    fn always(&mut self, name: &'static str, work: impl FnOnce() -> Step) {
        let problem = work().err();
        self.steps.push(DrillStep { name, problem });
    }

    fn report(self, two_hosts: bool) -> DrillReport {
        let good = self.steps.iter().all(|step| step.problem.is_none());
        DrillReport {
            steps: self.steps,
            proof: good.then_some(StorageFence::Reservation),
            persistent: self.persistent,
            two_hosts,
        }
    }
}

/// What one host can find out by itself. Blocks.
pub fn alone(
    device: &dyn ReservationDevice,
    scratch: ReservationKey,
    until: Instant,
) -> DrillReport {
    let mut drill = Drill::new();
    begin(&mut drill, device, until);
    if drill.steps.iter().any(|step| step.problem.is_some()) {
        return drill.report(false);
    }
    let key = scratch.raw();
    let nobodys = key ^ 0xffff_ffff;
    drill
        .step("register and reserve", || {
            own(device, scratch, Older::Refuse, until)
        })
        .step("write as the owner", || allowed(device, until))
        .step("a key that nobody has is not preempted", || {
            let preempt = Command::Preempt {
                key,
                victim: nobodys,
                abort: true,
            };
            conflicts(device, preempt)
        })
        .step("a registration does not end with a wrong key", || {
            conflicts(device, Command::Unregister { key: nobodys })
        })
        .step("keys and reservation are as before", || {
            let facts = read(device, until)?;
            expect(
                facts.only_writer(scratch),
                "the reservation changed by itself",
            )
        });
    drill.always("put everything back", || let_go(device, scratch, until));
    drill.report(false)
}

/// The real proof: `first` owns the device, `second` cuts it off. They are nexuses of
/// different initiators on the same device, and `second_key` is the newer. Blocks.
pub fn pair(
    (first, first_key): (&dyn ReservationDevice, ReservationKey),
    (second, second_key): (&dyn ReservationDevice, ReservationKey),
    until: Instant,
) -> DrillReport {
    let mut drill = Drill::new();
    begin(&mut drill, first, until);
    if drill.steps.iter().any(|step| step.problem.is_some()) {
        return drill.report(true);
    }
    drill
        .step("the first host registers and reserves", || {
            own(first, first_key, Older::Refuse, until)
        })
        .step("the first host may write", || allowed(first, until))
        .step("the second host may not write", || refused(second, until))
        .step("the second host sees the first one's key", || {
            let facts = read(second, until)?;
            expect(
                facts.only_writer(first_key),
                "it sees another device, or other keys",
            )
        })
        .step("registered beside it, the second host may write", || {
            let wish = wish(second_key, Role::Beside, Older::Refuse);
            fulfil(second, &wish, until).map_err(say)?;
            allowed(second, until)
        })
        .step("the second host preempts the first", || {
            own(second, second_key, Older::PreemptAndAbort, until)
        })
        .step("the first host may not write any more", || {
            refused(first, until)
        })
        .step("the first host cannot take the reservation back", || {
            conflicts(
                first,
                Command::Reserve {
                    key: first_key.raw(),
                },
            )
        })
        .step("the second host may write", || allowed(second, until));
    drill.always("put everything back", || {
        let_go(first, first_key, until)?;
        let_go(second, second_key, until)
    });
    drill.report(true)
}

/// Finds out what the device says of itself, and that nobody uses it.
fn begin(drill: &mut Drill, device: &dyn ReservationDevice, until: Instant) {
    let mut persistent = false;
    drill
        .step("the device answers", || read(device, until).map(drop))
        .step("nobody uses it", || {
            let facts = read(device, until)?;
            let keys: Vec<String> = facts
                .keys
                .keys()
                .map(|key| format!("{key:#018x}"))
                .collect();
            expect(
                keys.is_empty() && facts.held.is_none(),
                &format!(
                    "keys {} are registered: give a scratch LUN",
                    keys.join(", ")
                ),
            )
        })
        .step(
            "it knows the type write exclusive, registrants only",
            || {
                match patiently(until, || device.capabilities()) {
                    Ok(able) => {
                        persistent = able.persist_possible;
                        expect(
                            able.write_exclusive_registrants_only != Some(false),
                            "it does not: use a pool with another fence proof",
                        )
                    }
                    // An old device that does not report; the steps that follow show it.
                    Err(DeviceError::Unsupported(_) | DeviceError::Refused(_)) => Ok(()),
                    Err(error) => Err(say(error)),
                }
            },
        );
    drill.persistent = persistent;
}

fn wish(mine: ReservationKey, role: Role, older: Older) -> Wish {
    Wish {
        mine,
        role,
        older,
        beside: None,
        spent: 0,
        past_cut: false,
        busy: false,
        strangers: Strangers::Refuse,
    }
}

fn read(device: &dyn ReservationDevice, until: Instant) -> Result<Facts, String> {
    patiently(until, || Facts::read(device)).map_err(say)
}

fn own(device: &dyn ReservationDevice, mine: ReservationKey, older: Older, until: Instant) -> Step {
    let outcome = fulfil(device, &wish(mine, Role::Owner, older), until).map_err(say)?;
    expect(
        outcome.after.only_writer(mine),
        "reading back shows other keys: something else manages this LUN",
    )
}

fn let_go(device: &dyn ReservationDevice, mine: ReservationKey, until: Instant) -> Step {
    let wish = wish(mine, Role::Nobody, Older::Refuse);
    let outcome = fulfil(device, &wish, until).map_err(say)?;
    expect(
        !outcome.after.has(mine),
        "a registration of another path stayed: remove it with `sg_persist --out --clear`",
    )
}

/// On a scratch LUN the first block may be written back, where nothing gentler is known.
fn try_write(device: &dyn ReservationDevice, until: Instant) -> Result<(), DeviceError> {
    match patiently(until, || device.write_nothing()) {
        Err(DeviceError::Unsupported(_)) => patiently(until, || device.rewrite_first_block()),
        tried => tried,
    }
}

fn allowed(device: &dyn ReservationDevice, until: Instant) -> Step {
    try_write(device, until).map_err(|error| format!("a write is not let through: {error}"))
}

fn refused(device: &dyn ReservationDevice, until: Instant) -> Step {
    match try_write(device, until) {
        Err(DeviceError::Conflict) => Ok(()),
        Ok(()) => Err(
            "its writes are let through: the device does not enforce the reservation; use a pool with another fence proof".into(),
        ),
        Err(error) => Err(say(error)),
    }
}

fn conflicts(device: &dyn ReservationDevice, command: Command) -> Step {
    match device.command(command) {
        Err(DeviceError::Conflict) => Ok(()),
        Ok(()) => Err(format!(
            "{} was accepted: the device does not check keys; use a pool with another fence proof",
            command.name()
        )),
        Err(error) => Err(say(error)),
    }
}

fn expect(holds: bool, otherwise: &str) -> Step {
    if holds {
        Ok(())
    } else {
        Err(otherwise.to_owned())
    }
}

fn say(error: impl fmt::Display) -> String {
    error.to_string()
}
