//! When to allow a longer pause, and when to slow the guest down. Pure.
//!
//! ```text
//! limit = start --pass that did not converge--> limit x 2 ... --> limit = max --2 more--> throttle
//! ```
//! A pass over the memory that is followed by another one did not converge: what the guest dirtied
//! meanwhile could not be sent within the limit. The first pass copies everything and says nothing.

use crate::migration::Downtime;

/// Passes at the highest limit before the guest is slowed down.
const PATIENCE_PASSES: u64 = 2;

/// What to change now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Allow a pause of this many milliseconds.
    Limit(u64),
    /// Slow the guest down.
    Throttle,
}

/// Follows the passes of one migration.
#[derive(Debug, Clone)]
pub struct Stepper {
    limit_ms: u64,
    max_ms: u64,
    last_pass: u64,
    passes_at_max: u64,
    throttled: bool,
}

impl Stepper {
    /// Starts at the lowest limit.
    #[must_use]
    pub fn new(downtime: Downtime) -> Self {
        let max_ms = downtime.max_ms.max(1);
        let limit_ms = downtime.start_ms.clamp(1, max_ms);
        Self {
            limit_ms,
            max_ms,
            last_pass: 0,
            passes_at_max: 0,
            throttled: false,
        }
    }

    /// The present limit.
    #[must_use]
    pub fn limit_ms(&self) -> u64 {
        self.limit_ms
    }

    /// Pass number `pass` (1 is the full copy) has begun.
    pub fn pass_began(&mut self, pass: u64) -> Option<Step> {
        if pass <= self.last_pass {
            return None;
        }
        self.last_pass = pass;
        // Pass 1 is the full copy, pass 2 sends what was dirtied in it; from 3 on it did not converge.
        if pass < 3 {
            return None;
        }
        if self.limit_ms < self.max_ms {
            self.limit_ms = (self.limit_ms * 2).min(self.max_ms);
            return Some(Step::Limit(self.limit_ms));
        }
        self.passes_at_max += 1;
        if self.passes_at_max > PATIENCE_PASSES && !self.throttled {
            self.throttled = true;
            return Some(Step::Throttle);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit_then_throttles_once() {
        let mut stepper = Stepper::new(Downtime {
            start_ms: 30,
            max_ms: 200,
        });
        let steps: Vec<_> = (1..=12).map(|pass| stepper.pass_began(pass)).collect();
        let limit = |ms| Some(Step::Limit(ms));
        let mut expected = vec![None, None, limit(60), limit(120), limit(200), None, None];
        expected.push(Some(Step::Throttle));
        expected.extend([None, None, None, None]);
        assert_eq!(steps, expected);
    }

    #[test]
    fn a_repeated_or_skipped_pass_steps_once() {
        let mut stepper = Stepper::new(Downtime::default());
        assert_eq!(stepper.pass_began(3), Some(Step::Limit(60)));
        assert_eq!(stepper.pass_began(3), None);
        assert_eq!(stepper.pass_began(2), None);
        assert_eq!(stepper.pass_began(9), Some(Step::Limit(120)));
    }

    #[test]
    fn odd_limits_are_made_usable() {
        let stepper = Stepper::new(Downtime {
            start_ms: 900,
            max_ms: 100,
        });
        assert_eq!(stepper.limit_ms(), 100);
        assert_eq!(
            Stepper::new(Downtime {
                start_ms: 0,
                max_ms: 0
            })
            .limit_ms(),
            1
        );
    }
}
