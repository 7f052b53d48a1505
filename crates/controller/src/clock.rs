//! The one clock that leases are counted on.

use quorate_membership::Instant;

/// CLOCK_BOOTTIME: goes on while the machine is suspended, never jumps (clock_gettime(2)).
pub fn boot_now() -> Instant {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    Instant(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}
