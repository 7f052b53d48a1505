//! Waiting for something to become true, with a deadline.

use crate::{LabError, Result};
use std::time::{Duration, Instant};

/// Asks `probe` every `step` until it gives a value; an error after `limit`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    step: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            return Err(LabError::Timeout {
                what: what.to_owned(),
                seconds: limit.as_secs_f64(),
                hint: String::new(),
            });
        }
        pause(step);
    }
}

/// The time between two looks at something that cannot be waited for, or the length of a fault
/// that is measured in time.
#[allow(
    clippy::disallowed_methods,
    reason = "the one place of the lab that sleeps"
)]
pub fn pause(span: Duration) {
    std::thread::sleep(span);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_ends_the_wait_and_a_deadline_too() {
        let mut left = 3;
        let step = Duration::from_millis(1);
        let value = until("countdown", Duration::from_secs(5), step, || {
            left -= 1;
            (left == 0).then_some("done")
        });
        assert_eq!(value.unwrap(), "done");
        let none = until("never", Duration::from_millis(5), step, || None::<()>);
        assert!(
            none.unwrap_err()
                .to_string()
                .starts_with("never did not happen")
        );
    }
}
