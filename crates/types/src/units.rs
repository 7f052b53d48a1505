//! Sizes, durations and points in time, with the spellings people write.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// A size in bytes. Written `512MiB`, `4GiB`, `1TiB`, `10GB` or a plain number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// A duration in milliseconds. Written `250ms`, `2s`, `5m`, `1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub u64);

/// A point in time: milliseconds since 1970-01-01 UTC. For people; nothing is decided by it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

/// Why a text is not a size or a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No digits at the start.
    #[error("`{0}` has no number")]
    NoNumber(String),
    /// An unknown unit, with the known ones.
    #[error("`{text}`: unknown unit `{unit}`, use one of {known}")]
    Unit {
        /// The whole text.
        text: String,
        /// The part that is not known.
        unit: String,
        /// Accepted units.
        known: &'static str,
    },
    /// The number does not fit.
    #[error("`{0}` is too large")]
    Overflow(String),
}

fn split(text: &str) -> Result<(u64, &str), UnitError> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    if end == 0 {
        return Err(UnitError::NoNumber(text.to_owned()));
    }
    let number = text[..end]
        .parse()
        .map_err(|_| UnitError::Overflow(text.to_owned()))?;
    Ok((number, text[end..].trim()))
}

fn scale(text: &str, factors: &[(&str, u64)], known: &'static str) -> Result<u64, UnitError> {
    let (number, unit) = split(text)?;
    let factor = factors
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, factor)| *factor)
        .ok_or_else(|| UnitError::Unit {
            text: text.to_owned(),
            unit: unit.to_owned(),
            known,
        })?;
    number
        .checked_mul(factor)
        .ok_or_else(|| UnitError::Overflow(text.to_owned()))
}

impl ByteSize {
    /// A size in MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// Whole MiB, rounded down.
    pub const fn as_mib(self) -> u64 {
        self.0 >> 20
    }
}

impl std::str::FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        const FACTORS: &[(&str, u64)] = &[
            ("", 1),
            ("B", 1),
            ("KiB", 1 << 10),
            ("MiB", 1 << 20),
            ("GiB", 1 << 30),
            ("TiB", 1 << 40),
            ("kB", 1_000),
            ("MB", 1_000_000),
            ("GB", 1_000_000_000),
            ("TB", 1_000_000_000_000),
        ];
        scale(text, FACTORS, "KiB, MiB, GiB, TiB, kB, MB, GB, TB").map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl Millis {
    /// A duration in whole seconds.
    pub const fn secs(n: u64) -> Self {
        Self(n * 1000)
    }

    /// As the standard library's duration.
    pub const fn as_duration(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0)
    }
}

impl std::str::FromStr for Millis {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        const FACTORS: &[(&str, u64)] = &[
            ("ms", 1),
            ("s", 1_000),
            ("m", 60_000),
            ("h", 3_600_000),
            ("d", 86_400_000),
        ];
        scale(text, FACTORS, "ms, s, m, h, d").map(Self)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in [
            ("d", 86_400_000),
            ("h", 3_600_000),
            ("m", 60_000),
            ("s", 1_000),
        ] {
            if self.0 >= size && self.0.is_multiple_of(size) {
                return write!(f, "{}{unit}", self.0 / size);
            }
        }
        write!(f, "{}ms", self.0)
    }
}

/// Accepts the text form, and a bare number where `number` gives it a meaning.
struct UnitVisitor<T> {
    expecting: &'static str,
    number: Option<fn(u64) -> T>,
}

impl<T: std::str::FromStr<Err = UnitError>> serde::de::Visitor<'_> for UnitVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<T, E> {
        match self.number {
            Some(make) => Ok(make(n)),
            None => Err(E::custom(format!("`{n}` needs a unit: {}", self.expecting))),
        }
    }

    fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<T, E> {
        match u64::try_from(n) {
            Ok(n) => self.visit_u64(n),
            Err(_) => Err(E::custom(format!("`{n}` is negative: {}", self.expecting))),
        }
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UnitVisitor {
            expecting: "a size such as 512MiB or 4GiB",
            number: Some(ByteSize),
        })
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UnitVisitor {
            expecting: "a duration such as 250ms, 2s or 5m",
            number: None,
        })
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Timestamp {
    /// As `2026-11-26 08:05:00 UTC`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0 / 1000;
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        // Days since 0000-03-01, in eras of 400 years: leap days come last in a year that begins in March.
        let shifted = days + 719_468;
        let (era, day) = (shifted / 146_097, shifted % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let of_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let of_month = of_year - (153 * month + 2) / 5 + 1;
        let (month, carry) = if month < 10 {
            (month + 3, 0)
        } else {
            (month - 9, 1)
        };
        let year = era * 400 + year + carry;
        let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
        write!(
            f,
            "{year:04}-{month:02}-{of_month:02} {hour:02}:{minute:02}:{second:02} UTC"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_read_as_people_write_them() {
        assert_eq!("256MiB".parse(), Ok(ByteSize::mib(256)));
        assert_eq!("1GB".parse(), Ok(ByteSize(1_000_000_000)));
        assert_eq!("2s".parse(), Ok(Millis(2000)));
        assert_eq!("250ms".parse(), Ok(Millis(250)));
        assert!("256M".parse::<ByteSize>().is_err());
        assert!("MiB".parse::<ByteSize>().is_err());
        assert!("99999999999TiB".parse::<ByteSize>().is_err());
    }

    #[test]
    fn a_duration_without_a_unit_is_refused() {
        assert!(serde_json::from_str::<Millis>("2").is_err());
        assert_eq!(
            serde_json::from_str::<ByteSize>("512").unwrap(),
            ByteSize(512)
        );
    }

    #[test]
    fn text_form_round_trips() {
        for n in [0, 1, 1023, 1 << 20, 3 << 30, (1 << 40) + 1] {
            assert_eq!(ByteSize(n).to_string().parse(), Ok(ByteSize(n)));
        }
        for n in [0, 1, 1500, 2000, 60_000, 86_400_000] {
            assert_eq!(Millis(n).to_string().parse(), Ok(Millis(n)));
        }
    }

    #[test]
    fn timestamps_are_read_by_people() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00 UTC"),
            (1_795_652_749_999, "2026-11-26 00:25:49 UTC"),
            (4_107_542_399_000, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400_000, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(Timestamp(ms).to_string(), text);
        }
    }
}
