//! Leaving in order: a daemon that is told to stop says so to the leader first, which takes its vote where the others
//! could not go on otherwise.
//!
//! Always holds: a stop is delayed by a bounded time, and only where a leader is known.

use super::core::Core;
use super::peer::Ask;
use quorate_controller::Group as _;
use quorate_state::Command;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// Longest that a stop waits for the votes.
const WITHIN: Duration = Duration::from_secs(4);
/// Pause between two tries to say that this host is back.
const AGAIN: Duration = Duration::from_secs(1);

/// Says that this daemon stops.
pub(crate) async fn leave(core: &Core) {
    if core.group.leadership().borrow().leader.is_none() {
        return;
    }
    // The last host of all leaves nobody behind.
    if core.state().hosts.len() < 2 {
        return;
    }
    let ask = Ask::Leave {
        host: core.me.clone(),
    };
    match tokio::time::timeout(WITHIN, core.at_leader(ask, WITHIN)).await {
        Ok(Ok(_)) => info!("the others know that this host leaves"),
        Ok(Err(error)) => warn!(%error, "the others could not be told that this host leaves"),
        Err(_) => warn!("the others could not be told in time that this host leaves"),
    }
}

/// Says that this host is back, whenever the state has it as one that left.
pub(crate) async fn be_back(core: Arc<Core>) {
    let mut states = core.states.clone();
    loop {
        let left = states
            .wait_for(|state| state.quorum.left.contains(&core.me))
            .await;
        if left.map(drop).is_err() {
            return;
        }
        let command = Command::HostLeft {
            host: core.me.clone(),
            left: false,
        };
        if core.propose("daemon", command).await.is_err() {
            tokio::time::sleep(AGAIN).await;
        }
    }
}
