//! The state machine behind the replicated log: bytes in, [`State`] changed, bytes out.

use quorate_consensus::StateMachine;
use quorate_state::{Envelope, Outcome, Refusal, State};
use std::sync::Arc;
use tokio::sync::watch;

/// What a proposer gets back.
pub(crate) type Reply = Result<Outcome, Refusal>;

/// Applies commands and publishes each new state.
pub(crate) struct Machine {
    state: Arc<State>,
    publish: watch::Sender<Arc<State>>,
}

impl Machine {
    /// An empty state and where it will be published.
    pub(crate) fn new() -> (Self, watch::Receiver<Arc<State>>) {
        let state = Arc::new(State::default());
        let (publish, published) = watch::channel(Arc::clone(&state));
        (Self { state, publish }, published)
    }

    /// The state as applied.
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state)
    }
}

impl StateMachine for Machine {
    fn apply(&mut self, index: u64, command: &[u8]) -> Vec<u8> {
        // A command that this program cannot read was written by a newer one. To go on without it would
        // make this replica differ from the others, so the node stops (a panic stops it).
        let envelope: Envelope = match serde_json::from_slice(command) {
            Ok(envelope) => envelope,
            Err(error) => panic!(
                "log entry {index} cannot be read ({error}): this host's program is too old, upgrade it"
            ),
        };
        let reply: Reply = Arc::make_mut(&mut self.state).apply(&envelope);
        self.publish.send_replace(Arc::clone(&self.state));
        serde_json::to_vec(&reply).unwrap_or_default()
    }

    fn snapshot(&self) -> Vec<u8> {
        serde_json::to_vec(self.state.as_ref()).unwrap_or_default()
    }

    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String> {
        let state: State = serde_json::from_slice(snapshot).map_err(|error| error.to_string())?;
        self.state = Arc::new(state);
        self.publish.send_replace(Arc::clone(&self.state));
        Ok(())
    }
}
