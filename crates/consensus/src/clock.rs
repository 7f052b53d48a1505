//! One clock for everything that ages: CLOCK_BOOTTIME, in nanoseconds.
//!
//! It keeps counting while the host is suspended, so an acknowledgement from before a suspension is
//! never taken for a fresh one (CLOCK_MONOTONIC, behind `std::time::Instant`, stands still meanwhile).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A point on CLOCK_BOOTTIME of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BootTime(u64);

impl BootTime {
    pub(crate) fn now() -> Self {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(t.tv_nsec).unwrap_or(0);
        Self(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
    }

    /// The start of the clock: longer ago than anything that is waited for.
    pub(crate) const LONG_AGO: Self = Self(0);

    pub(crate) fn as_nanos(self) -> u64 {
        self.0
    }

    #[cfg(test)]
    pub(crate) fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This much earlier, not before the start of the clock.
    pub(crate) fn minus(self, span: Duration) -> Self {
        let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_sub(nanos))
    }

    pub(crate) fn age(self) -> Duration {
        Self::now().since(self)
    }

    /// The `Instant` of this point, never later than the truth: the `Instant` is taken before the age.
    pub(crate) fn to_instant(self) -> Option<Instant> {
        let now = Instant::now();
        now.checked_sub(self.age())
    }
}

/// The newest point of several tasks.
#[derive(Debug)]
pub(crate) struct Newest(AtomicU64);

impl Newest {
    pub(crate) fn new(at: BootTime) -> Self {
        Self(AtomicU64::new(at.0))
    }

    pub(crate) fn advance(&self, at: BootTime) {
        self.0.fetch_max(at.0, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> BootTime {
        BootTime(self.0.load(Ordering::Relaxed))
    }
}
