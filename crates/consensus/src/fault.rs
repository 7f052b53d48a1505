//! The first fatal error of this node, seen by everybody.
//!
//! Owns one write-once cell. What always holds: after the first report nothing replaces it, and every
//! writer refuses work from then on. A failed write or fsync leaves the file in an unknown state, so the
//! only honest continuation is a restart that reads back what is really on the disk.

use tokio::sync::watch;

use crate::tenure::{Gate, OVER};

/// Write-once cell for the reason why this node stopped.
#[derive(Debug, Clone)]
pub(crate) struct FaultCell {
    sender: watch::Sender<Option<String>>,
    gate: Gate,
}

impl FaultCell {
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self::gated(Gate::default())
    }

    /// The cell of a node whose right to act may end: that is a fault like any other.
    pub(crate) fn gated(gate: Gate) -> Self {
        Self {
            sender: watch::Sender::new(None),
            gate,
        }
    }

    /// Why this node must not act, if so; looks at its tenure too.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self.reason() {
            Some(reason) => Err(reason),
            None if self.gate.open() => Ok(()),
            None => Err(self.report(OVER)),
        }
    }

    /// Records `reason` unless an earlier one is there. Returns the reason that counts.
    pub(crate) fn report(&self, reason: impl Into<String>) -> String {
        let reason = reason.into();
        let first = self.sender.send_if_modified(|cell| {
            if cell.is_some() {
                return false;
            }
            *cell = Some(reason.clone());
            true
        });
        if first && reason == OVER {
            tracing::info!(%reason, "consensus stops here, to go on elsewhere");
        } else if first {
            tracing::error!(%reason, "consensus stops: this node acknowledges nothing until it is restarted");
        }
        self.reason().unwrap_or(reason)
    }

    pub(crate) fn reason(&self) -> Option<String> {
        self.sender.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<String>> {
        self.sender.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stays() {
        let cell = FaultCell::new();
        assert_eq!(cell.reason(), None);
        assert_eq!(cell.report("disk full"), "disk full");
        assert_eq!(cell.report("later"), "disk full");
        assert_eq!(cell.watch().borrow().as_deref(), Some("disk full"));
    }
}
