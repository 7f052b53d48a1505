//! What a device with persistent reservations does for us, one command at a time.
//!
//! [`ReservationDevice`] is the seam: Linux behind it in production, a model of the standard in
//! tests. Calls block; [`super::Reservation`] gives each a thread and a deadline.

use std::fmt;

/// Types of a persistent reservation (SPC-4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReservationType {
    /// 1: one nexus writes, all read.
    WriteExclusive,
    /// 3: one nexus reads and writes.
    ExclusiveAccess,
    /// 5: who is registered writes, all read. The type we use.
    WriteExclusiveRegistrantsOnly,
    /// 6: who is registered reads and writes.
    ExclusiveAccessRegistrantsOnly,
    /// 7: as 5, and every registrant holds it.
    WriteExclusiveAllRegistrants,
    /// 8: as 6, and every registrant holds it.
    ExclusiveAccessAllRegistrants,
    /// A code that the standard does not name.
    Other(u8),
}

impl ReservationType {
    /// By the code in a device's answer.
    pub const fn from_code(code: u8) -> Self {
        match code {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrantsOnly,
            6 => Self::ExclusiveAccessRegistrantsOnly,
            7 => Self::WriteExclusiveAllRegistrants,
            8 => Self::ExclusiveAccessAllRegistrants,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for ReservationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WriteExclusive => f.write_str("write exclusive (1)"),
            Self::ExclusiveAccess => f.write_str("exclusive access (3)"),
            Self::WriteExclusiveRegistrantsOnly => {
                f.write_str("write exclusive, registrants only (5)")
            }
            Self::ExclusiveAccessRegistrantsOnly => {
                f.write_str("exclusive access, registrants only (6)")
            }
            Self::WriteExclusiveAllRegistrants => {
                f.write_str("write exclusive, all registrants (7)")
            }
            Self::ExclusiveAccessAllRegistrants => {
                f.write_str("exclusive access, all registrants (8)")
            }
            Self::Other(code) => write!(f, "unknown ({code})"),
        }
    }
}

/// Answer of READ KEYS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyList {
    /// Grows with each change of the registrations.
    pub generation: u32,
    /// One entry for each registered nexus: a host with two paths appears twice.
    pub keys: Vec<u64>,
}

/// Answer of READ RESERVATION.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReservationHeld {
    /// The holder's key; 0 when all registrants hold it.
    pub key: u64,
    /// Its type.
    pub kind: ReservationType,
    /// 0: the whole logical unit, the only scope there is.
    pub scope: u8,
}

/// One registration, as READ FULL STATUS lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nexus {
    /// Its key.
    pub key: u64,
    /// Whether it holds the reservation.
    pub holder: bool,
    /// Whether it counts for all ports of the target.
    pub all_ports: bool,
    /// The reservation's type, for a holder.
    pub kind: Option<ReservationType>,
    /// The target's port.
    pub port: u16,
    /// The initiator: iSCSI name and session, Fibre Channel or SAS address.
    pub initiator: String,
}

/// Answer of REPORT CAPABILITIES.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Can keep registrations over a loss of power (APTPL).
    pub persist_possible: bool,
    /// Does so now, since the last registration asked for it.
    pub persist_active: bool,
    /// Knows type 5; `None`: the device does not say.
    pub write_exclusive_registrants_only: Option<bool>,
}

/// A change of the device's registrations. All reservations are of type 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Register this nexus (every path of it) with a key, whatever it had before, asking for
    /// persistence where the device offers it.
    Register {
        /// The new key.
        key: u64,
    },
    /// End this nexus's registration. A conflict unless it has exactly this key, so a late
    /// call cannot end a newer registration.
    Unregister {
        /// The key it has.
        key: u64,
    },
    /// Take the reservation.
    Reserve {
        /// This nexus's key.
        key: u64,
    },
    /// Remove all registrations with the victim's key, and take over its reservation.
    Preempt {
        /// This nexus's key.
        key: u64,
        /// The key to remove.
        victim: u64,
        /// Also abort what the victim has under way.
        abort: bool,
    },
    /// Remove all registrations and the reservation.
    Clear {
        /// This nexus's key.
        key: u64,
    },
}

impl Command {
    /// Its name in the standard.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Register { .. } => "REGISTER AND IGNORE EXISTING KEY",
            Self::Unregister { .. } => "REGISTER (to end it)",
            Self::Reserve { .. } => "RESERVE",
            Self::Preempt { abort: false, .. } => "PREEMPT",
            Self::Preempt { abort: true, .. } => "PREEMPT AND ABORT",
            Self::Clear { .. } => "CLEAR",
        }
    }
}

/// Why a device did not do it: additional information of a CHECK CONDITION.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: u8,
    /// Additional sense code.
    pub code: u8,
    /// Its qualifier.
    pub qualifier: u8,
}

impl Sense {
    /// The device compared what we said with what it has, and they differ.
    pub const fn is_miscompare(&self) -> bool {
        self.key == 0xe
    }

    /// Something happened on the device since the last command; ask again.
    pub const fn is_unit_attention(&self) -> bool {
        self.key == 6
    }

    /// What is over in a moment: a unit attention, a command that was aborted, a device that becomes ready.
    pub const fn may_pass(&self) -> bool {
        const NOT_READY: u8 = 2;
        const ABORTED: u8 = 0xb;
        const BECOMING_READY: u8 = 4;
        self.is_unit_attention()
            || self.key == ABORTED
            || (self.key == NOT_READY && self.code == BECOMING_READY)
    }

    /// The device does not know the command, or a field of it.
    pub const fn is_illegal_request(&self) -> bool {
        self.key == 5
    }
}

impl fmt::Display for Sense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sense {:x}/{:02x}/{:02x}",
            self.key, self.code, self.qualifier
        )
    }
}

/// A command that a device did not carry out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// RESERVATION CONFLICT: this nexus is not registered with that key, or another one holds
    /// the reservation.
    #[error("reservation conflict")]
    Conflict,
    /// The device does not know the command.
    #[error(
        "the device does not support it ({0}): use a LUN with SCSI-3 persistent reservations, or say `reservations: false` in the pool, which then proves nothing of a lost host"
    )]
    Unsupported(String),
    /// The device refused for another reason.
    #[error("the device answered {0}: look at its log")]
    Refused(Sense),
    /// The device is gone.
    #[error("the device is gone: check the paths to the SAN and the kernel log")]
    Gone,
    /// A path that is being mended, a device that is busy or resets itself: the next try may work.
    #[error(
        "the path to the device was disturbed ({0}): check the network to the SAN if it does not pass"
    )]
    Disturbed(String),
    /// The path to it failed or hung.
    #[error("no path to the device answers ({0}): check the network to the SAN and its sessions")]
    Path(String),
    /// The daemon may not.
    #[error("no permission: persistent reservations need CAP_SYS_ADMIN and CAP_SYS_RAWIO")]
    Permission,
    /// The kernel failed in another way.
    #[error("the kernel says: {0}")]
    Kernel(String),
    /// The answer makes no sense.
    #[error("the answer to {answer} is malformed: the device's firmware is at fault")]
    Malformed {
        /// To which command.
        answer: &'static str,
    },
    /// There is more than we asked for.
    #[error(
        "the answer to {answer} has {bytes} bytes, more than is read: remove stale registrations"
    )]
    AnswerTooLong {
        /// To which command.
        answer: &'static str,
        /// Its length in bytes.
        bytes: u32,
    },
}

impl DeviceError {
    /// Whether the same question may be answered a moment later. It says nothing of a change: that may have been made.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Disturbed(_) => true,
            Self::Refused(sense) => sense.may_pass(),
            _ => false,
        }
    }
}

/// One logical unit, seen from one host. Every call blocks, for as long as the kernel does.
pub trait ReservationDevice: Send + Sync + 'static {
    /// How messages call it.
    fn name(&self) -> String;

    /// READ KEYS.
    ///
    /// # Errors
    /// When the device did not answer usably.
    fn read_keys(&self) -> Result<KeyList, DeviceError>;

    /// READ RESERVATION: generation, and who holds it.
    ///
    /// # Errors
    /// When the device did not answer usably.
    fn read_reservation(&self) -> Result<(u32, Option<ReservationHeld>), DeviceError>;

    /// REPORT CAPABILITIES.
    ///
    /// # Errors
    /// When the device did not answer usably; many old ones do not know the command.
    fn capabilities(&self) -> Result<Capabilities, DeviceError>;

    /// READ FULL STATUS.
    ///
    /// # Errors
    /// When the device did not answer usably; many do not know the command.
    fn read_full_status(&self) -> Result<(u32, Vec<Nexus>), DeviceError>;

    /// Changes the registrations.
    ///
    /// # Errors
    /// [`DeviceError::Conflict`] when the device says so, others when it is unknown whether
    /// the change was made.
    fn command(&self, command: Command) -> Result<(), DeviceError>;

    /// Whether this nexus may write now, without changing anything, on a disk in use too.
    ///
    /// # Errors
    /// [`DeviceError::Conflict`] when it may not; [`DeviceError::Unsupported`] when the device
    /// knows no write that changes nothing.
    fn write_nothing(&self) -> Result<(), DeviceError>;

    /// Reads the first block and writes it back, durably: only where nobody else writes.
    ///
    /// # Errors
    /// [`DeviceError::Conflict`] when it may not write.
    fn rewrite_first_block(&self) -> Result<(), DeviceError>;
}
