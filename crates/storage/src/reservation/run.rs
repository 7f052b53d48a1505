//! Carries out wishes: reads, decides, gives a command, reads again.
//!
//! [`fulfil`] is the blocking loop. [`Reservation`] gives it a thread and a deadline, and lets one operation
//! at a time touch a device. A thread that hangs in the kernel is left behind; when it
//! returns it gives no further command, because the deadline has passed, but takes back a registration that
//! came so late. What it was doing may have taken effect in between, which is why a failed operation
//! proves nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, oneshot};

use super::device::{Command, DeviceError, ReservationDevice};
use super::drill::{self, DrillReport};
use super::error::ReservationError;
use super::facts::{Facts, Inspection, patiently};
use super::key::{ClusterTag, ReservationKey};
use super::plan::{Here, Next, Older, Role, Strangers, Wish, decide};

/// Commands of one operation. A device with more stale registrations is at fault.
const ROUNDS: u32 = 64;
/// Conflicts of one operation: each means that somebody changed something meanwhile.
const CONFLICTS: u32 = 4;

/// What an owner by commit brings along besides its key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// The highest epoch that was handed out when it became the owner. Newer epochs than its own up to this one belong to
    /// migrations that came to nothing, and are cut off too.
    pub spent: u32,
    /// A cut of this host is over.
    pub past_cut: bool,
    /// Its guest may be reading and writing. Then it only takes back what nobody else has to be cut off for: what a
    /// forgetful unit lost, its own former keys, a cut that is over.
    pub busy: bool,
    /// Strangers that may be pushed out, by the name of the unit ([`super::Units::push`]); of all others none.
    pub taken: BTreeMap<String, Strangers>,
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// As it was before.
    pub before: Facts,
    /// As it was read back at the end.
    pub after: Facts,
    /// What was changed.
    pub commands: Vec<Command>,
}

impl Outcome {
    /// Keys that were registered before and are not any more: who was cut off.
    pub fn cut(&self) -> Vec<u64> {
        let gone = |key: &u64| !self.after.keys.contains_key(key);
        self.before.keys.keys().copied().filter(gone).collect()
    }
}

/// Makes a wish come true, or says why not. Blocks.
///
/// # Errors
/// When it must not come true, the device fails, or the deadline passes.
pub fn fulfil(
    device: &dyn ReservationDevice,
    wish: &Wish,
    until: Instant,
) -> Result<Outcome, ReservationError> {
    fulfil_with(device, wish, None, until)
}

/// The same, with a command that is likely to be what has to be done: given before anything is read, it saves a reading.
/// It must be one that does no harm where it is not.
fn fulfil_with(
    device: &dyn ReservationDevice,
    wish: &Wish,
    first: Option<Command>,
    until: Instant,
) -> Result<Outcome, ReservationError> {
    let failed = |operation, error| ReservationError::Device {
        device: device.name(),
        operation,
        error,
    };
    let read = || {
        let facts = patiently(until, || Facts::read(device));
        facts.map_err(|error| failed("reading its registrations", error))
    };
    let mut here = Here::Unknown;
    let mut commands = Vec::new();
    if let Some(command) = first
        && Instant::now() < until
        && device.command(command).is_ok()
    {
        here = afterwards(command);
        commands.push(command);
    }
    let before = read()?;
    let mut facts = before.clone();
    let mut conflicts = 0;
    for _ in 0..ROUNDS {
        let next = decide(&facts, here, wish).map_err(|refusal| ReservationError::Refused {
            device: device.name(),
            refusal,
        })?;
        let Next::Do(command) = next else {
            return Ok(Outcome {
                before,
                after: facts,
                commands,
            });
        };
        if Instant::now() >= until {
            return Err(failed(
                command.name(),
                DeviceError::Path("the deadline has passed".into()),
            ));
        }
        match device.command(command) {
            Ok(()) => {
                undo_if_late(device, command, &facts, until);
                here = afterwards(command);
                commands.push(command);
            }
            Err(DeviceError::Conflict) => {
                here = Here::NotRegistered;
                conflicts += 1;
                if conflicts == CONFLICTS {
                    return Err(failed(command.name(), DeviceError::Conflict));
                }
            }
            Err(error) => return Err(failed(command.name(), error)),
        }
        facts = read()?;
    }
    Err(ReservationError::Unsettled {
        device: device.name(),
        rounds: ROUNDS,
    })
}

/// A registration that was made after the deadline is ended at once: nobody waits for it, and it
/// is write access that somebody else may have been promised meanwhile. One that was there before stays.
fn undo_if_late(device: &dyn ReservationDevice, command: Command, facts: &Facts, until: Instant) {
    if let Command::Register { key } = command
        && Instant::now() >= until
        && !facts.keys.contains_key(&key)
    {
        // What fails here shows in the device's keys; the next owner preempts it.
        let _ = device.command(Command::Unregister { key });
    }
}

/// Whether this nexus is registered after a command that succeeded.
const fn afterwards(command: Command) -> Here {
    match command {
        Command::Unregister { .. } | Command::Clear { .. } => Here::NotRegistered,
        _ => Here::Registered,
    }
}

/// The reservations of one device, as one host uses them.
#[derive(Clone)]
pub struct Reservation {
    device: Arc<dyn ReservationDevice>,
    cluster: ClusterTag,
    deadline: Duration,
    one_at_a_time: Arc<Mutex<()>>,
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("device", &self.device.name())
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

impl Reservation {
    /// The tag that this cluster's keys carry.
    pub const fn cluster(&self) -> ClusterTag {
        self.cluster
    }

    /// For a device; no operation takes longer than `deadline`.
    pub fn new(
        device: Arc<dyn ReservationDevice>,
        cluster: ClusterTag,
        deadline: Duration,
    ) -> Self {
        Self {
            device,
            cluster,
            deadline,
            one_at_a_time: Arc::new(Mutex::new(())),
        }
    }

    /// Everything that can be learned without changing anything.
    ///
    /// # Errors
    /// When the device does not answer usably in time.
    pub async fn inspect(&self) -> Result<Inspection, ReservationError> {
        let cluster = self.cluster;
        self.run("reading its reservations", move |device, until| {
            let seen = patiently(until, || Inspection::of(device, cluster));
            seen.map_err(|error| ReservationError::Device {
                device: device.name(),
                operation: "reading its reservations",
                error,
            })
        })
        .await
    }

    /// Registrations and reservation, by one reading.
    ///
    /// # Errors
    /// When the device does not answer usably in time.
    pub async fn facts(&self) -> Result<Facts, ReservationError> {
        const OPERATION: &str = "reading its registrations";
        self.run(OPERATION, |device, until| {
            let facts = patiently(until, || Facts::read(device));
            facts.map_err(|error| ReservationError::Device {
                device: device.name(),
                operation: OPERATION,
                error,
            })
        })
        .await
    }

    /// Tries whether this host may write now, without changing anything; `None`: the device
    /// knows no such try. [`Facts`] say who *should* be able to; this asks the device.
    ///
    /// # Errors
    /// When the device does not answer in time.
    pub async fn may_write(&self) -> Result<Option<bool>, ReservationError> {
        const OPERATION: &str = "trying a write";
        self.run(OPERATION, |device, until| {
            match patiently(until, || device.write_nothing()) {
                Ok(()) => Ok(Some(true)),
                Err(DeviceError::Conflict) => Ok(Some(false)),
                Err(DeviceError::Unsupported(_)) => Ok(None),
                Err(error) => Err(ReservationError::Device {
                    device: device.name(),
                    operation: OPERATION,
                    error,
                }),
            }
        })
        .await
    }

    /// Registers beside the owner: the target of a live migration, before it begins.
    ///
    /// # Errors
    /// When a newer key or a stranger is there, or the device fails.
    pub async fn register(&self, mine: ReservationKey) -> Result<Outcome, ReservationError> {
        let wish = self.wish(mine, Role::Beside, Older::Refuse, None);
        self.fulfil("registering", wish).await
    }

    /// Becomes the owner of a device that nobody of the cluster holds.
    ///
    /// # Errors
    /// When its last owner has not let go ([`super::Refusal::OlderOwner`]), a newer key is there, a
    /// stranger is there that `strangers` does not let go, or the device fails.
    pub async fn acquire(
        &self,
        mine: ReservationKey,
        strangers: Strangers,
    ) -> Result<Outcome, ReservationError> {
        let wish = self.wish(mine, Role::Owner, Older::Refuse, None);
        let wish = Wish { strangers, ..wish };
        self.fulfil("acquiring", wish).await
    }

    /// At the pause before the switchover of a live migration: the target, registered
    /// already, preempts the source, which has stopped and flushed. `from`, the source's older key where it is known, saves a
    /// reading while the guest stands still.
    ///
    /// # Errors
    /// As [`Reservation::take_over`].
    pub async fn hand_over(
        &self,
        mine: ReservationKey,
        from: Option<ReservationKey>,
    ) -> Result<Outcome, ReservationError> {
        let wish = self.wish(mine, Role::Owner, Older::Preempt, None);
        let first = from.filter(|from| from.age() < mine.age());
        let first = first.map(|from| Command::Preempt {
            key: mine.raw(),
            victim: from.raw(),
            abort: false,
        });
        self.run("handing over", move |device, until| {
            fulfil_with(device, &wish, first, until)
        })
        .await
    }

    /// Cuts every older owner off, aborts what they have under way, and becomes the owner.
    /// When it succeeds it was read back that of all keys only `mine` is registered: no host
    /// with another key writes this device any more.
    ///
    /// # Errors
    /// When a newer key or a stranger is there, or the device fails: then it is unknown who may write.
    pub async fn take_over(&self, mine: ReservationKey) -> Result<Outcome, ReservationError> {
        let wish = self.wish(mine, Role::Owner, Older::PreemptAndAbort, None);
        self.fulfil("taking over", wish).await
    }

    /// The same for the owner by commit.
    ///
    /// # Errors
    /// As [`Reservation::take_over`], and [`super::Refusal::Busy`].
    pub async fn own(
        &self,
        mine: ReservationKey,
        claim: &Claim,
        strangers: Strangers,
    ) -> Result<Outcome, ReservationError> {
        let wish = Wish {
            spent: claim.spent,
            past_cut: claim.past_cut,
            busy: claim.busy,
            strangers,
            ..self.wish(mine, Role::Owner, Older::PreemptAndAbort, None)
        };
        self.fulfil("owning", wish).await
    }

    /// Cuts one host off from a device that it may write up to `cut`'s epoch, and nobody else. When it succeeds it was
    /// read back that no such key of that host is registered, and that somebody of the cluster holds the reservation.
    ///
    /// # Errors
    /// When a stranger is there, or the device fails: then it is unknown who may write.
    pub async fn cut(&self, cut: ReservationKey, victim: u16) -> Result<Outcome, ReservationError> {
        let role = Role::Cut(victim);
        let wish = self.wish(cut, role, Older::PreemptAndAbort, None);
        self.fulfil("cutting a host off", wish).await
    }

    /// The same device, with no operation longer than `limit`.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Self {
            deadline: self.deadline.min(limit),
            ..self.clone()
        }
    }

    /// Restores the owner's registration after the device has lost it, on all paths. Call it
    /// only with a valid lease: whoever registers may write. `beside`: the target of a live
    /// migration that has not switched over; it may stay.
    ///
    /// # Errors
    /// When the cluster has moved on ([`super::Refusal::Superseded`]), or the device fails.
    pub async fn repair(
        &self,
        mine: ReservationKey,
        beside: Option<ReservationKey>,
    ) -> Result<Outcome, ReservationError> {
        let wish = self.wish(mine, Role::Owner, Older::PreemptAndAbort, beside);
        self.fulfil("repairing", wish).await
    }

    /// Ends this host's registration, and its reservation with it.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn release(&self, mine: ReservationKey) -> Result<Outcome, ReservationError> {
        let wish = self.wish(mine, Role::Nobody, Older::Refuse, None);
        self.fulfil("releasing", wish).await
    }

    /// Tries everything on a scratch device: [`drill::alone`].
    ///
    /// # Errors
    /// When the device does not answer in time. What it cannot do is in the report.
    pub async fn drill(&self, scratch: ReservationKey) -> Result<DrillReport, ReservationError> {
        self.run("the drill", move |device, until| {
            Ok(drill::alone(device, scratch, until))
        })
        .await
    }

    fn wish(
        &self,
        mine: ReservationKey,
        role: Role,
        older: Older,
        beside: Option<ReservationKey>,
    ) -> Wish {
        debug_assert_eq!(mine.cluster(), self.cluster);
        Wish {
            mine,
            role,
            older,
            beside,
            spent: 0,
            past_cut: false,
            busy: false,
            strangers: Strangers::Refuse,
        }
    }

    async fn fulfil(
        &self,
        operation: &'static str,
        wish: Wish,
    ) -> Result<Outcome, ReservationError> {
        self.run(operation, move |device, until| fulfil(device, &wish, until))
            .await
    }

    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        call: impl FnOnce(&dyn ReservationDevice, Instant) -> Result<T, ReservationError>
        + Send
        + 'static,
    ) -> Result<T, ReservationError> {
        let until = Instant::now() + self.deadline;
        let unresponsive = || ReservationError::Unresponsive {
            device: self.device.name(),
            operation,
            deadline_ms: self.deadline.as_millis() as u64,
        };
        let turn = Arc::clone(&self.one_at_a_time).lock_owned();
        let turn = tokio::time::timeout_at(until.into(), turn)
            .await
            .map_err(|_| unresponsive())?;
        let device = Arc::clone(&self.device);
        let (answer, answered) = oneshot::channel();
        std::thread::Builder::new()
            .name("quorate-reserve".into())
            .spawn(move || {
                let result = call(device.as_ref(), until);
                // A thread that hangs keeps its turn: nothing else is tried meanwhile.
                drop(turn);
                let _ = answer.send(result);
            })
            .map_err(|error| ReservationError::Device {
                device: self.device.name(),
                operation: "starting a thread",
                error: DeviceError::Kernel(error.to_string()),
            })?;
        match tokio::time::timeout_at(until.into(), answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(unresponsive()),
        }
    }
}
