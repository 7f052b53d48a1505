//! When power fencing that failed is tried again: it never gives up, and it never hammers a power controller.

use quorate_types::Millis;

/// First wait.
const FIRST: Millis = Millis(4_000);
/// Longest time between two attempts.
const LONGEST: Millis = Millis(60_000);

/// The wait after this many failed attempts: doubled each time, up to a minute.
#[must_use]
pub fn fence_again_after(attempts: u32) -> Millis {
    let doublings = attempts.saturating_sub(1).min(4);
    Millis((FIRST.0 << doublings).min(LONGEST.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_a_minute() {
        let waits: Vec<u64> = (0..8).map(|n| fence_again_after(n).0 / 1000).collect();
        assert_eq!(waits, [4, 4, 8, 16, 32, 60, 60, 60]);
    }
}
