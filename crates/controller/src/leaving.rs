//! A host that leaves in order: its vote is given away before it goes, where the others need that.
//!
//! Always holds: it is recorded that the host left before anything else, so that a later leader knows too; every wait
//! is bounded, for a daemon that is told to stop must stop. Must not: choose the voters; the pure logic does.

use crate::clock::boot_now;
use crate::controller::{Controller, lock};
use crate::operator::ControllerError;
use quorate_controller_logic::before_leaving;
use quorate_state::Command;
use quorate_types::HostName;
use std::time::Duration;
use tracing::{info, warn};

/// Longest that the votes may take.
const WITHIN: Duration = Duration::from_secs(3);
/// Pause between two tries: another change may be under way.
const AGAIN: Duration = Duration::from_millis(200);

impl Controller {
    /// Records that `host`'s daemon stops, and takes its vote where the others could not go on otherwise.
    ///
    /// # Errors
    /// When this host does not lead, or does not know the host.
    pub async fn let_go(&self, host: HostName) -> Result<String, ControllerError> {
        let group = &self.inner.group;
        let leading = *group.leadership().borrow();
        if !leading.is_self {
            return Err(ControllerError::NotLeader);
        }
        let Some(leaver) = group.state().hosts.get(&host).map(|record| record.node) else {
            return Err(ControllerError::UnknownHost(host));
        };
        let command = Command::HostLeft {
            host: host.clone(),
            left: true,
        };
        if let Err(error) = group.propose("controller", command).await {
            warn!(%host, %error, "it cannot be recorded that a host leaves");
        }
        let end = tokio::time::Instant::now() + WITHIN;
        loop {
            let voters = {
                let guard = lock(&self.inner.leases);
                let leases = guard.as_ref().ok_or(ControllerError::NotLeader)?;
                let nodes = (group.node(), leaver);
                before_leaving(&group.members(), nodes, &group.state(), leases, boot_now())
            };
            let Some(voters) = voters else {
                return Ok(format!("{host} may go: the others go on as they are"));
            };
            info!(%host, ?voters, "it leaves in order: its vote goes to others first");
            let error = match group.change_voters(voters).await {
                Ok(()) => return Ok(format!("{host} may go: the others have its vote")),
                Err(error) => error,
            };
            if tokio::time::Instant::now() >= end {
                warn!(%host, error, "its vote could not be given to others");
                return Ok(format!(
                    "the vote of {host} could not be given away: {error}"
                ));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}
