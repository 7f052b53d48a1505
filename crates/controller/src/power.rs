//! Power fencing beside the loop: one attempt per host at a time, with back-off.
//!
//! ```text
//!   idle --start--> running --off confirmed--> proof kept until the host owns nothing
//!    ^                 |
//!    '--- back-off <--failed (the reason is shown in `status`)
//! ```
//! Always holds: a result counts only in the leadership that asked for it, and a proof only as long as its host
//! has got no lease since: whoever is switched off can be switched on again.

use async_trait::async_trait;
use quorate_controller_logic::fence_again_after;
use quorate_membership::{Evidence, FenceProof, Instant, PowerOffEvidence};
use quorate_types::HostName;
use quorate_types::settings::FenceDevice;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Switches a host off with its fence devices, in order, and says what they said.
#[async_trait]
pub trait PowerSwitch: Send + Sync + 'static {
    /// Returns evidence only when a status query after the `off` said `off`.
    ///
    /// # Errors
    /// A sentence for people: what was tried and what it said, without secrets.
    async fn off(
        &self,
        host: &HostName,
        devices: &[FenceDevice],
    ) -> Result<PowerOffEvidence, String>;
}

enum Attempt {
    Running,
    Failed {
        at: Instant,
        attempts: u32,
        why: String,
    },
    Off(FenceProof),
}

/// An attempt that ended.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The leadership that began it.
    generation: u64,
    pub(crate) host: HostName,
    result: Result<PowerOffEvidence, String>,
}

/// All hosts' power fencing.
pub(crate) struct Power {
    switch: Arc<dyn PowerSwitch>,
    generation: u64,
    attempts: BTreeMap<HostName, (u32, Attempt)>,
    done: mpsc::Sender<Finished>,
}

impl Power {
    pub(crate) fn new(switch: Arc<dyn PowerSwitch>, done: mpsc::Sender<Finished>) -> Self {
        Self {
            switch,
            generation: 0,
            attempts: BTreeMap::new(),
            done,
        }
    }

    /// Another leadership: attempts that still run belong to the past, and so do their results.
    pub(crate) fn forget_all(&mut self) {
        self.generation += 1;
        self.attempts.clear();
    }

    /// Starts an attempt unless one runs, succeeded, or has just failed. Returns whether it did.
    pub(crate) fn start(&mut self, host: &HostName, devices: &[FenceDevice], now: Instant) -> bool {
        let attempts = match self.attempts.get(host) {
            Some((_, Attempt::Running | Attempt::Off(_))) => return false,
            Some((_, Attempt::Failed { at, attempts, .. })) => {
                if now.since(*at) < fence_again_after(*attempts) {
                    return false;
                }
                *attempts
            }
            None => 0,
        };
        self.attempts
            .insert(host.clone(), (attempts + 1, Attempt::Running));
        let (switch, done) = (Arc::clone(&self.switch), self.done.clone());
        let (host, devices) = (host.clone(), devices.to_vec());
        let generation = self.generation;
        tokio::spawn(async move {
            let result = switch.off(&host, &devices).await;
            let finished = Finished {
                generation,
                host,
                result,
            };
            // The receiver is gone only when the controller has ended.
            let _ = done.send(finished).await;
        });
        true
    }

    /// An attempt ended. Returns what to tell people; `None`: it is of an earlier leadership.
    pub(crate) fn finished(
        &mut self,
        finished: Finished,
        now: Instant,
    ) -> Option<Result<FenceProof, String>> {
        if finished.generation != self.generation {
            return None;
        }
        let host = &finished.host;
        let attempts = self.attempts.get(host).map_or(1, |(attempts, _)| *attempts);
        let outcome = finished.result.and_then(|evidence| {
            FenceProof::from_evidence(host.clone(), Evidence::Power(evidence))
                .map_err(|error| error.to_string())
        });
        let attempt = match &outcome {
            Ok(proof) => Attempt::Off(proof.clone()),
            Err(why) => Attempt::Failed {
                at: now,
                attempts,
                why: why.clone(),
            },
        };
        self.attempts.insert(host.clone(), (attempts, attempt));
        Some(outcome)
    }

    pub(crate) fn running(&self, host: &HostName) -> bool {
        matches!(self.attempts.get(host), Some((_, Attempt::Running)))
    }

    /// Proofs at hand.
    pub(crate) fn proofs(&self) -> impl Iterator<Item = &FenceProof> {
        self.attempts
            .values()
            .filter_map(|(_, attempt)| match attempt {
                Attempt::Off(proof) => Some(proof),
                _ => None,
            })
    }

    /// Why fencing of a host does not get on.
    pub(crate) fn problem(&self, host: &HostName) -> Option<&str> {
        match self.attempts.get(host) {
            Some((_, Attempt::Failed { why, .. })) => Some(why),
            _ => None,
        }
    }

    /// The host is settled or was heard again: a proof of the past says nothing about its future.
    pub(crate) fn forget(&mut self, host: &HostName) {
        if !self.running(host) {
            self.attempts.remove(host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_types::Millis;

    struct Works;

    #[async_trait]
    impl PowerSwitch for Works {
        async fn off(&self, _: &HostName, _: &[FenceDevice]) -> Result<PowerOffEvidence, String> {
            Ok(PowerOffEvidence {
                agent: "fence_test".into(),
                off_accepted: true,
                status_after: "off".into(),
                took: Millis(1),
            })
        }
    }

    #[tokio::test]
    async fn a_result_of_an_earlier_leadership_proves_nothing() {
        let (done, mut results) = mpsc::channel(4);
        let mut power = Power::new(Arc::new(Works), done);
        let host = HostName::new("h1").unwrap();
        assert!(power.start(&host, &[], Instant(0)));
        power.forget_all();
        let late = results.recv().await.unwrap();
        assert!(power.finished(late, Instant(1)).is_none());
        assert_eq!(power.proofs().count(), 0);

        assert!(power.start(&host, &[], Instant(2)));
        let mine = results.recv().await.unwrap();
        assert!(power.finished(mine, Instant(3)).unwrap().is_ok());
        assert_eq!(power.proofs().count(), 1);
        power.forget(&host);
        assert_eq!(power.proofs().count(), 0);
    }
}
