//! The values that occur in a CIB: scores, truth, durations, numbers, times.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use quorate_planner::engine::{INFINITY, Score, clamp};

/// A score: a whole number or "INFINITY". Numbers beyond infinity are infinity; what is no number, or
/// too long for one, is none.
pub(super) fn score(text: &str) -> Option<Score> {
    let text = text.trim();
    match text.to_ascii_lowercase().as_str() {
        "infinity" | "+infinity" => return Some(INFINITY),
        "-infinity" | "red" => return Some(-INFINITY),
        "yellow" | "green" => return Some(0),
        _ => {}
    }
    let digits = text.strip_prefix('+').unwrap_or(text);
    digits.parse::<i64>().ok().map(clamp)
}

/// A truth value as Pacemaker reads it.
pub(super) fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "y" | "1" => Some(true),
        "false" | "off" | "no" | "n" | "0" => Some(false),
        _ => None,
    }
}

/// Whether a value is there and true.
pub(super) fn is_true(text: Option<&String>) -> bool {
    text.is_some_and(|text| truth(text) == Some(true))
}

/// A whole number at the beginning of a text, for amounts such as utilization.
pub(super) fn amount(text: &str) -> Option<i64> {
    let text = text.trim();
    let digits = text.strip_prefix('+').unwrap_or(text);
    let value: i64 = digits.parse().ok()?;
    Some(value.clamp(i64::from(i32::MIN), i64::from(i32::MAX)))
}

/// A duration in milliseconds: `10`, `10s`, `500ms`, `5min`, `PT5M`.
pub(super) fn duration_ms(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(period) = text.strip_prefix('P') {
        return period_ms(period);
    }
    if text.starts_with('-') {
        return None;
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..end].parse().ok()?;
    let unit = text[end..].trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let (times, by) = match unit.trim() {
        "" | "s" | "sec" => (1000, 1),
        "ms" | "msec" => (1, 1),
        "us" | "usec" => (1, 1000),
        "m" | "min" => (60_000, 1),
        "h" | "hr" => (3_600_000, 1),
        "d" | "day" => (86_400_000, 1),
        _ => return None,
    };
    Some(number.saturating_mul(times) / by)
}

/// The rest of an ISO 8601 period, as leniently as Pacemaker reads it: `T` may be missing.
fn period_ms(period: &str) -> Option<u64> {
    let mut seconds: u64 = 0;
    let mut in_time = false;
    let mut digits = String::new();
    for letter in period.chars() {
        if letter.is_ascii_digit() {
            digits.push(letter);
            continue;
        }
        if letter == 'T' && digits.is_empty() {
            in_time = true;
            continue;
        }
        let unit = match (letter, in_time) {
            ('S', _) => 1,
            ('M', true) => 60,
            ('H', _) => 3600,
            ('D', _) => 86_400,
            ('W', _) => 604_800,
            ('M', false) => 2_592_000,
            ('Y', _) => 31_536_000,
            _ => return None,
        };
        let number: u64 = digits.parse().ok()?;
        digits.clear();
        seconds = seconds.saturating_add(number.saturating_mul(unit));
    }
    (digits.is_empty() && !period.is_empty()).then(|| seconds.saturating_mul(1000))
}

/// A point in time, in seconds since 1970 (UTC where no zone is given).
pub(super) fn time(text: &str) -> Option<i64> {
    let text = text.trim();
    if let Ok(zoned) = text.parse::<jiff::Timestamp>() {
        return Some(zoned.as_second());
    }
    let plain = text.trim_end_matches('Z').trim();
    let (plain, offset) = split_offset(plain);
    let padded = match plain.len() {
        4 => format!("{plain}-01-01"),
        7 => format!("{plain}-01"),
        _ => plain.to_owned(),
    };
    let civil = padded.parse::<DateTime>().ok().or_else(|| {
        let date = padded.parse::<jiff::civil::Date>().ok();
        let date = date
            .or_else(|| ordinal(&padded))
            .or_else(|| week_date(&padded))?;
        Some(date.at(0, 0, 0, 0))
    })?;
    let zoned = civil.to_zoned(TimeZone::UTC).ok()?;
    Some(zoned.timestamp().as_second() - offset)
}

/// `2005-032`: a year and a day of it.
fn ordinal(text: &str) -> Option<jiff::civil::Date> {
    let (year, day) = text.split_once('-').filter(|(_, day)| day.len() == 3)?;
    let first = jiff::civil::Date::new(year.parse().ok()?, 1, 1).ok()?;
    let day: i64 = day.parse().ok().filter(|day| (1..=366).contains(day))?;
    first
        .checked_add(jiff::Span::new().try_days(day - 1).ok()?)
        .ok()
}

/// `2005-W03-2`: a year, a week of it and a day of that.
fn week_date(text: &str) -> Option<jiff::civil::Date> {
    let (year, rest) = text.split_once("-W")?;
    let (week, day) = rest.split_once('-').unwrap_or((rest, "1"));
    let day = jiff::civil::Weekday::from_monday_one_offset(day.parse().ok()?).ok()?;
    let date = jiff::civil::ISOWeekDate::new(year.parse().ok()?, week.parse().ok()?, day);
    Some(date.ok()?.date())
}

/// Splits `2020-01-01 00:00:00 +02:00` into the time and the offset in seconds.
fn split_offset(text: &str) -> (&str, i64) {
    let Some(at) = text.rfind([' ', '+']).filter(|at| *at >= 10) else {
        return (text, 0);
    };
    let tail = text[at..].trim();
    let sign = if tail.starts_with('-') { -1 } else { 1 };
    let digits = tail.trim_start_matches(['+', '-']);
    let Some((hours, minutes)) = digits.split_once(':') else {
        return (text, 0);
    };
    match (
        tail.starts_with(['+', '-']),
        hours.parse::<i64>(),
        minutes.parse::<i64>(),
    ) {
        (true, Ok(hours), Ok(minutes)) if hours.abs() < 24 && minutes.abs() < 60 => {
            (text[..at].trim_end(), sign * (hours * 3600 + minutes * 60))
        }
        _ => (text, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores() {
        for (text, wanted) in [
            ("INFINITY", Some(INFINITY)),
            ("-INFINITY", Some(-INFINITY)),
            ("+INFINITY", Some(INFINITY)),
            ("100", Some(100)),
            ("+5", Some(5)),
            ("-7", Some(-7)),
            ("10000000", Some(INFINITY)),
            ("-10000000", Some(-INFINITY)),
            ("99999999999999999999", None),
            ("NaN", None),
            ("1e3", None),
            ("", None),
        ] {
            assert_eq!(score(text), wanted, "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, wanted) in [
            ("10", Some(10_000)),
            ("10s", Some(10_000)),
            ("500ms", Some(500)),
            ("5min", Some(300_000)),
            ("2h", Some(7_200_000)),
            ("PT5M", Some(300_000)),
            ("P30S", Some(30_000)),
            ("P", None),
            ("P5", None),
            ("P99999999999999999999S", None),
            ("1.5s", Some(1000)),
            ("-1", None),
            ("soon", None),
        ] {
            assert_eq!(duration_ms(text), wanted, "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, wanted) in [
            ("1970-01-01", Some(0)),
            ("1970-01-02 00:00:10Z", Some(86_410)),
            ("2009-02-13T23:31:30Z", Some(1_234_567_890)),
            ("1970-01-01 02:00:00 +02:00", Some(0)),
            ("1970-002", Some(86_400)),
            ("1970-W01-5", Some(86_400)),
            ("1970-400", None),
            ("never", None),
        ] {
            assert_eq!(time(text), wanted, "{text}");
        }
    }
}
