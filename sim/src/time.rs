//! Virtual time in nanoseconds, and the clocks of hosts, which drift apart.

use quorate_membership::Instant;

/// One millisecond.
pub(crate) const MS: u64 = 1_000_000;
/// One second.
pub(crate) const SEC: u64 = 1_000 * MS;

/// `  12.345678s`, for traces.
#[must_use]
pub(crate) fn show(at: u64) -> String {
    format!("{:>4}.{:03}s", at / SEC, at % SEC / MS)
}

/// CLOCK_BOOTTIME of one host: begins at 0 with each boot and runs a little too fast or too slow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    /// True time of the boot.
    pub(crate) booted: u64,
    /// Deviation in parts per million.
    pub(crate) ppm: i64,
}

impl Clock {
    /// What the host reads at the true time `at`.
    #[must_use]
    pub(crate) fn local(&self, at: u64) -> Instant {
        let span = i128::from(at.saturating_sub(self.booted));
        let local = span * i128::from(1_000_000 + self.ppm) / 1_000_000;
        Instant(u64::try_from(local).unwrap_or(0))
    }

    /// The first true time at which the host reads at least `local`.
    #[must_use]
    pub(crate) fn true_time(&self, local: Instant) -> u64 {
        let rate = i128::from(1_000_000 + self.ppm);
        let span = (i128::from(local.0) * 1_000_000 + rate - 1) / rate;
        let at = self.booted + u64::try_from(span).unwrap_or(u64::MAX / 4);
        // Rounding down in `local` can leave it one short.
        if self.local(at) < local { at + 1 } else { at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drifting_clock_converts_both_ways() {
        for ppm in [-5000, -1, 0, 7, 5000] {
            let clock = Clock { booted: 3, ppm };
            for local in [0, 1, 999, MS, 1_234_567_891, 900 * SEC] {
                let at = clock.true_time(Instant(local));
                assert!(clock.local(at) >= Instant(local), "{ppm} {local}");
                assert!(
                    at <= 4 || clock.local(at - 2) < Instant(local),
                    "{ppm} {local}"
                );
            }
        }
    }
}
