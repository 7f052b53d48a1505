//! A time as people write it.

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use quorate_types::{Millis, Timestamp};
use std::str::FromStr;

/// A time in the past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum When {
    /// So long ago.
    Ago(Millis),
    /// Today, or yesterday if that is still to come.
    Time(Time),
    /// On this clock.
    Date(DateTime),
    /// Exactly.
    Exact(jiff::Timestamp),
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let span = text.strip_suffix("ago").map_or(text, str::trim_end);
        let days = span
            .strip_suffix('d')
            .and_then(|days| days.parse::<u64>().ok());
        if let Some(days) = days {
            return Ok(Self::Ago(Millis(days.saturating_mul(86_400_000))));
        }
        if let Ok(span) = span.parse::<Millis>() {
            return Ok(Self::Ago(span));
        }
        if let Ok(exact) = text.parse() {
            return Ok(Self::Exact(exact));
        }
        if let Ok(date) = text.parse() {
            return Ok(Self::Date(date));
        }
        text.parse().map(Self::Time).map_err(|_| {
            format!("`{text}` is no time: write `14:30`, `2026-03-01 14:30` or `20m` (ago)")
        })
    }
}

impl When {
    /// The point in time, where the clock on the wall shows `now`.
    pub(crate) fn resolve(&self, now: u64, zone: &TimeZone) -> Result<Timestamp, String> {
        let wrong = |error: jiff::Error| error.to_string();
        let now_at = jiff::Timestamp::from_millisecond(i64::try_from(now).unwrap_or(i64::MAX));
        let now_at = now_at.map_err(wrong)?.to_zoned(zone.clone());
        let at = match self {
            Self::Ago(span) => return Ok(Timestamp(now.saturating_sub(span.0))),
            Self::Exact(at) => *at,
            Self::Date(date) => date.to_zoned(zone.clone()).map_err(wrong)?.timestamp(),
            Self::Time(time) => {
                let today = now_at.date().to_datetime(*time).to_zoned(zone.clone());
                let today = today.map_err(wrong)?;
                let day = jiff::ToSpan::day(1);
                match today > now_at {
                    true => today.checked_sub(day).map_err(wrong)?.timestamp(),
                    false => today.timestamp(),
                }
            }
        };
        let millis = u64::try_from(at.as_millisecond()).unwrap_or(0);
        if millis > now {
            return Err("that time is still to come: `quorate plan` looks ahead".to_owned());
        }
        Ok(Timestamp(millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood() {
        // 2023-11-14 22:15:00 UTC.
        let now = 1_700_000_100_000;
        let at = |text: &str| text.parse::<When>()?.resolve(now, &TimeZone::UTC);
        let ms = |text: &str| at(text).unwrap().0;
        assert_eq!(ms("20m"), now - 1_200_000);
        assert_eq!(ms("2h ago"), now - 7_200_000);
        assert_eq!(ms("3d"), now - 3 * 86_400_000);
        assert_eq!(ms("22:14"), now - 60_000);
        assert_eq!(ms("23:00"), now + 45 * 60_000 - 86_400_000, "yesterday");
        assert_eq!(ms("2023-11-14 22:14:30"), now - 30_000);
        assert_eq!(ms("2023-11-14T22:14"), now - 60_000);
        assert_eq!(ms("2023-11-14T23:14:00+01:00"), now - 60_000);
        assert!(at("2023-11-15 00:00").unwrap_err().contains("quorate plan"));
        assert!(at("soon").unwrap_err().contains("write `14:30`"));
    }
}
