//! What can go wrong with an operation.

use super::device::DeviceError;
use super::plan::Refusal;

/// A failed operation on a device's reservations.
#[derive(Debug, thiserror::Error)]
pub enum ReservationError {
    /// It must not be done.
    #[error("{device}: {refusal}")]
    Refused {
        /// The device.
        device: String,
        /// Why.
        refusal: Refusal,
    },
    /// The device did not do it.
    #[error("{device}: {operation} failed: {error}")]
    Device {
        /// The device.
        device: String,
        /// The command.
        operation: &'static str,
        /// What it answered.
        error: DeviceError,
    },
    /// Others change the registrations faster than we do.
    #[error(
        "{device}: its registrations changed {rounds} times under our hands: find out who else manages this LUN (multipathd's reservation_key, another cluster)"
    )]
    Unsettled {
        /// The device.
        device: String,
        /// How often it was tried.
        rounds: u32,
    },
    /// No answer in time. What was under way may still happen.
    #[error(
        "{device}: {operation} did not finish within {deadline_ms} ms: check the paths to the SAN; nothing is known about the reservation"
    )]
    Unresponsive {
        /// The device.
        device: String,
        /// What was tried.
        operation: &'static str,
        /// The limit in milliseconds.
        deadline_ms: u64,
    },
}

impl ReservationError {
    /// The refusal, when it is one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(refusal),
            _ => None,
        }
    }
}
