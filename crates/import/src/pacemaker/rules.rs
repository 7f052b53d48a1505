//! Whether a rule holds: by attributes of a host, by date, by kind of resource or operation.

use super::model::{AttributeSet, Condition, Rule};
use super::values;
use jiff::Zoned;
use quorate_planner::engine::Score;
use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;

/// What rules are judged by.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Facts<'a> {
    /// Seconds since 1970.
    pub(super) now: i64,
    pub(super) host: Option<&'a BTreeMap<String, String>>,
    pub(super) class: Option<&'a str>,
    pub(super) provider: Option<&'a str>,
    pub(super) kind: Option<&'a str>,
    pub(super) operation: Option<(&'a str, u64)>,
    pub(super) meta: Option<&'a BTreeMap<String, String>>,
    pub(super) parameters: Option<&'a BTreeMap<String, String>>,
    /// What a pattern in a constraint matched: `%0` to `%9` in attribute names.
    pub(super) matches: &'a [String],
}

/// Names and values of all sets whose rules hold. The set with the highest score wins, then the last (so a
/// resource's own come before those of its template); one with the given id comes before all others.
pub(super) fn resolve(
    sets: &[AttributeSet],
    facts: &Facts<'_>,
    first: Option<&str>,
) -> BTreeMap<String, String> {
    let mut sorted: Vec<&AttributeSet> = sets.iter().rev().collect();
    sorted.sort_by_key(|set| {
        let is_first = first.is_some_and(|first| first == set.id);
        (Reverse(is_first), Reverse(set.score))
    });
    let mut values = BTreeMap::new();
    for set in sorted {
        if set.rule.as_ref().is_none_or(|rule| holds(rule, facts)) {
            for (name, value) in &set.pairs {
                values.entry(name.clone()).or_insert_with(|| value.clone());
            }
        }
    }
    values
}

/// Whether a rule holds.
pub(super) fn holds(rule: &Rule, facts: &Facts<'_>) -> bool {
    let one = |condition: &Condition| condition_holds(condition, facts);
    if rule.conditions.is_empty() {
        return true;
    }
    match rule.all {
        true => rule.conditions.iter().all(one),
        false => rule.conditions.iter().any(one),
    }
}

/// Whether a rule depends on the time.
pub(super) fn is_dated(rule: &Rule) -> bool {
    rule.conditions.iter().any(|condition| match condition {
        Condition::Rule(rule) => is_dated(rule),
        Condition::Date { .. } => true,
        _ => false,
    })
}

/// The score of a rule on a host: written, or the value of one of its attributes.
pub(super) fn score(rule: &Rule, facts: &Facts<'_>) -> Option<Score> {
    match &rule.score_attribute {
        None => rule.score,
        Some(name) => {
            let name = expand(name, facts.matches);
            let value = facts.host.and_then(|host| host.get(&name))?;
            values::score(value)
        }
    }
}

fn condition_holds(condition: &Condition, facts: &Facts<'_>) -> bool {
    match condition {
        Condition::Rule(rule) => holds(rule, facts),
        Condition::Attribute {
            attribute,
            operation,
            value,
            kind,
            source,
        } => {
            let name = expand(attribute, facts.matches);
            let actual = facts.host.and_then(|host| host.get(&name));
            let table = match source.as_deref() {
                None | Some("literal") => None,
                Some("param") => Some(facts.parameters),
                Some("meta") => Some(facts.meta),
                Some(_) => return false,
            };
            let reference = match (table, value) {
                (None, value) => value.clone(),
                (Some(table), Some(value)) => table.and_then(|table| table.get(value)).cloned(),
                (Some(_), None) => None,
            };
            let given = value.is_some();
            compare(
                actual,
                reference.as_ref(),
                given,
                operation,
                kind.as_deref(),
            )
        }
        Condition::Date {
            operation,
            start,
            end,
            duration,
            parts,
        } => date_holds(
            facts.now,
            operation,
            *start,
            *end,
            duration.as_ref(),
            parts.as_ref(),
        ),
        Condition::Resource {
            class,
            provider,
            kind,
        } => {
            let fits = |wanted: &Option<String>, actual: Option<&str>| {
                wanted
                    .as_deref()
                    .is_none_or(|wanted| Some(wanted) == actual)
            };
            fits(class, facts.class) && fits(provider, facts.provider) && fits(kind, facts.kind)
        }
        Condition::Operation { name, interval_ms } => {
            facts.operation.is_some_and(|(actual, interval)| {
                actual == name && interval_ms.is_none_or(|wanted| wanted == interval)
            })
        }
        Condition::Unknown => false,
    }
}

/// Replaces `%0` to `%9` by what a pattern matched.
fn expand(text: &str, matches: &[String]) -> String {
    if matches.is_empty() || !text.contains('%') {
        return text.to_owned();
    }
    let mut expanded = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let digit = letters.peek().and_then(|next| next.to_digit(10));
        match digit.filter(|_| letter == '%') {
            None => expanded.push(letter),
            Some(digit) => {
                letters.next();
                let found = usize::try_from(digit).ok().and_then(|at| matches.get(at));
                expanded.push_str(found.map_or("", String::as_str));
            }
        }
    }
    expanded
}

fn compare(
    actual: Option<&String>,
    reference: Option<&String>,
    given: bool,
    operation: &str,
    kind: Option<&str>,
) -> bool {
    let operation = operation.to_ascii_lowercase();
    match operation.as_str() {
        "defined" => return !given && actual.is_some(),
        "not_defined" => return !given && actual.is_none(),
        _ if !given => return false,
        _ => {}
    }
    let relative = !matches!(operation.as_str(), "eq" | "ne");
    let order = match (actual, reference) {
        (Some(actual), Some(reference)) => order(actual, reference, kind, relative),
        (None, None) => Some(Ordering::Equal),
        (None, Some(_)) => Some(Ordering::Less),
        (Some(_), None) => Some(Ordering::Greater),
    };
    let Some(order) = order else { return false };
    if relative && (actual.is_none() || reference.is_none()) {
        return false;
    }
    match operation.as_str() {
        "eq" => order == Ordering::Equal,
        "ne" => order != Ordering::Equal,
        "lt" => order == Ordering::Less,
        "lte" => order != Ordering::Greater,
        "gt" => order == Ordering::Greater,
        "gte" => order != Ordering::Less,
        _ => false,
    }
}

fn order(one: &str, other: &str, kind: Option<&str>, relative: bool) -> Option<Ordering> {
    let text = || Some(one.to_lowercase().cmp(&other.to_lowercase()));
    let dotted = one.contains('.') || other.contains('.');
    let kind = match kind.map(str::to_ascii_lowercase) {
        Some(kind) => kind,
        None if !relative => "string".to_owned(),
        None if dotted => "number".to_owned(),
        None => "integer".to_owned(),
    };
    match kind.as_str() {
        "string" => text(),
        "integer" => match (whole(one), whole(other)) {
            (Some(one), Some(other)) => Some(one.cmp(&other)),
            _ => text(),
        },
        "number" => match (decimal(one), decimal(other)) {
            (Some(one), Some(other)) => Some(one.cmp(&other)),
            _ => text(),
        },
        "version" => Some(versions(one, other)),
        _ => None,
    }
}

/// The whole part of a number.
fn whole(text: &str) -> Option<i64> {
    let text = text.trim();
    let part = text.split('.').next().unwrap_or(text);
    part.strip_prefix('+').unwrap_or(part).parse().ok()
}

/// A decimal number in millionths, so that it can be compared exactly.
fn decimal(text: &str) -> Option<i128> {
    let text = text.trim();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let (before, after) = digits.split_once('.').unwrap_or((digits, ""));
    let before: i128 = if before.is_empty() {
        0
    } else {
        before.parse::<u64>().ok()?.into()
    };
    if !after.bytes().all(|byte| byte.is_ascii_digit()) || (digits == "." || digits.is_empty()) {
        return None;
    }
    let padded: String = after.chars().chain("000000".chars()).take(6).collect();
    let after: i128 = padded.parse().ok()?;
    Some(sign * (before * 1_000_000 + after))
}

fn versions(one: &str, other: &str) -> Ordering {
    let parts = |text: &str| -> Vec<u64> {
        let parts = text.split(['.', '-', '_']);
        parts.map(|part| part.parse().unwrap_or(0)).collect()
    };
    let (mut one, mut other) = (parts(one), parts(other));
    let length = one.len().max(other.len());
    one.resize(length, 0);
    other.resize(length, 0);
    one.cmp(&other)
}

fn date_holds(
    now: i64,
    operation: &str,
    start: Option<i64>,
    end: Option<i64>,
    duration: Option<&BTreeMap<String, String>>,
    parts: Option<&BTreeMap<String, String>>,
) -> bool {
    match operation.to_ascii_lowercase().as_str() {
        "gt" => start.is_some_and(|start| now > start),
        "lt" => end.is_some_and(|end| now < end),
        "date_spec" => parts.is_some_and(|parts| parts_hold(now, parts)),
        "in_range" => {
            let end = match (end, start, duration) {
                (Some(end), _, _) => Some(end),
                (None, Some(start), Some(duration)) => match after(start, duration) {
                    Some(end) => Some(end),
                    None => return false,
                },
                _ => None,
            };
            (start.is_some() || end.is_some())
                && start.is_none_or(|start| now >= start)
                && end.is_none_or(|end| now <= end)
        }
        _ => false,
    }
}

fn zoned(seconds: i64) -> Option<Zoned> {
    let at = jiff::Timestamp::from_second(seconds).ok()?;
    Some(at.to_zoned(jiff::tz::TimeZone::UTC))
}

fn after(start: i64, duration: &BTreeMap<String, String>) -> Option<i64> {
    let mut span = jiff::Span::new();
    for (name, value) in duration {
        let Some(number) = (name != "id").then(|| value.trim().parse::<i64>()) else {
            continue;
        };
        let number = number.ok()?;
        span = match name.as_str() {
            "years" => span.try_years(number),
            "months" => span.try_months(number),
            "weeks" => span.try_weeks(number),
            "days" => span.try_days(number),
            "hours" => span.try_hours(number),
            "minutes" => span.try_minutes(number),
            "seconds" => span.try_seconds(number),
            _ => continue,
        }
        .ok()?;
    }
    let end = zoned(start)?.checked_add(span).ok()?;
    Some(end.timestamp().as_second())
}

fn parts_hold(now: i64, parts: &BTreeMap<String, String>) -> bool {
    let Some(now) = zoned(now) else { return false };
    let week = now.date().iso_week_date();
    let value = |name: &str| -> Option<i64> {
        Some(match name {
            "years" => now.year().into(),
            "months" => now.month().into(),
            "monthdays" => now.day().into(),
            "hours" => now.hour().into(),
            "minutes" => now.minute().into(),
            "seconds" => now.second().into(),
            "yeardays" => now.day_of_year().into(),
            "weekyears" => week.year().into(),
            "weeks" => week.week().into(),
            "weekdays" => now.weekday().to_monday_one_offset().into(),
            _ => return None,
        })
    };
    parts
        .iter()
        .all(|(name, range)| value(name).is_none_or(|value| in_range(value, range)))
}

/// `5`, `5-`, `-7` or `5-7`.
fn in_range(value: i64, range: &str) -> bool {
    let number = |text: &str| text.trim().parse::<i64>().ok();
    match range.split_once('-') {
        None => number(range) == Some(value),
        Some(("", high)) => number(high).is_some_and(|high| value <= high),
        Some((low, "")) => number(low).is_some_and(|low| value >= low),
        Some((low, high)) => match (number(low), number(high)) {
            (Some(low), Some(high)) => low <= value && value <= high,
            _ => false,
        },
    }
}
