//! Figures: printed one per line, so that the summary of a test run can show them.
//!
//! A figure of the issue is held against the *median* of its rounds; a single round may be worse by
//! [`SLACK`], since two shared cores that also emulate the guests are noisy.

use std::time::Duration;

/// What a single round may exceed its limit by.
pub(crate) const SLACK: f64 = 1.5;

/// How often a scenario is gone through: enough for a limit, or what `QUORATE_ROUNDS` asks for.
pub(crate) fn rounds(enough: usize) -> usize {
    let wanted = std::env::var("QUORATE_ROUNDS").ok();
    wanted.and_then(|text| text.parse().ok()).unwrap_or(enough)
}

/// Prints a figure.
pub(crate) fn measured(name: &str, value: f64, unit: &str, target: &str) {
    println!("MEASURED {name}: {value:.2} {unit} (target: {target})");
}

/// Says that a time limit was missed, and nothing else is wrong: the test run may try such a test once more.
pub(crate) fn missed(what: &str) {
    println!("MISSED LIMIT {what}");
}

/// The middle one; of an even number, the lower of the two.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

/// Prints the rounds of a figure and holds them against the limit.
pub(crate) fn judge_rounds(name: &str, rounds: &[f64], unit: &str, limit: f64) {
    let middle = median(rounds);
    let list: Vec<String> = rounds.iter().map(|value| format!("{value:.2}")).collect();
    measured(
        name,
        middle,
        unit,
        &format!("<= {limit} {unit}; rounds {}", list.join(" ")),
    );
    let worst = rounds.iter().copied().fold(0.0, f64::max);
    if middle > limit || worst > limit * SLACK {
        missed(&format!("{name}: {rounds:.3?} {unit}, limit {limit}"));
    }
    assert!(
        middle <= limit,
        "{name}: median {middle:.3} {unit} of {list:?}, the limit is {limit}"
    );
    assert!(
        worst <= limit * SLACK,
        "{name}: one round took {worst:.3} {unit}, more than {SLACK} times the limit of {limit}"
    );
}

/// Seconds.
pub(crate) fn seconds(span: Duration) -> f64 {
    span.as_secs_f64()
}
