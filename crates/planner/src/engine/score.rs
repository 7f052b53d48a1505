//! Scores: whole numbers that saturate at infinity.
//!
//! Always holds: every score lies between `-INFINITY` and `INFINITY`; minus infinity plus anything is
//! minus infinity (a ban outweighs every wish); infinity plus anything else is infinity.

/// A score: how much a host is wanted.
pub type Score = i64;

/// The score that no sum of others reaches: "must", or with a minus sign "must not".
pub const INFINITY: Score = 1_000_000;

/// Brings any number into the range of scores.
#[must_use]
pub fn clamp(value: i64) -> Score {
    value.clamp(-INFINITY, INFINITY)
}

/// Adds two scores.
#[must_use]
pub fn add(one: Score, other: Score) -> Score {
    if one <= -INFINITY || other <= -INFINITY {
        -INFINITY
    } else if one >= INFINITY || other >= INFINITY {
        INFINITY
    } else {
        clamp(one + other)
    }
}

/// A share of a score, in millionths of a millionth: 1 is [`Factor::ONE`]. Whole numbers, so that
/// every machine comes to the same result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Factor(i64);

impl Factor {
    const UNIT: i64 = 1_000_000_000_000;
    /// The whole.
    pub(super) const ONE: Self = Self(Self::UNIT);

    /// The share that a rule of this score passes on: infinity passes on everything.
    pub(super) fn of(score: Score) -> Self {
        Self(clamp(score) * (Self::UNIT / INFINITY))
    }

    /// This share of another share. Never becomes nothing unless one of the two is.
    pub(super) fn times(self, score: Score) -> Self {
        let product = i128::from(self.0) * i128::from(clamp(score));
        let scaled = product / i128::from(INFINITY);
        let scaled = if scaled == 0 {
            product.signum()
        } else {
            scaled
        };
        Self(i64::try_from(scaled).unwrap_or(i64::MAX))
    }

    /// The part of a score that this share is: rounded half away from zero, but never to nothing.
    pub(super) fn part(self, score: Score) -> Score {
        let product = i128::from(self.0) * i128::from(score);
        let half = i128::from(Self::UNIT / 2) * product.signum();
        let rounded = (product + half) / i128::from(Self::UNIT);
        if rounded == 0 && score != 0 {
            return self.0.signum();
        }
        i64::try_from(rounded).map_or(INFINITY, clamp)
    }

    pub(super) fn is_negative(self) -> bool {
        self.0 < 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ban_outweighs_everything() {
        assert_eq!(add(-INFINITY, INFINITY), -INFINITY);
        assert_eq!(add(INFINITY, -5), INFINITY);
        assert_eq!(add(INFINITY - 1, 5), INFINITY);
        assert_eq!(add(i64::MAX, i64::MIN), -INFINITY);
        assert_eq!(add(2, -5), -3);
    }

    #[test]
    fn a_share_keeps_its_sign_however_small() {
        assert_eq!(Factor::of(500_000).part(100), 50);
        assert_eq!(Factor::of(1).part(1), 1);
        assert_eq!(Factor::of(-1).part(1), -1);
        assert_eq!(Factor::of(1).times(1).times(1).part(7), 1);
        assert_eq!(Factor::ONE.part(-INFINITY), -INFINITY);
        assert_eq!(Factor::of(-300_000).part(5), -2);
    }
}
