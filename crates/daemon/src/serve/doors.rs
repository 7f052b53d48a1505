//! The doors of SANs for the controller, by the drivers of `quorate-fence`.

use super::cut::Cutters;
use async_trait::async_trait;
use quorate_agent::AgentHandle;
use quorate_controller::{Door, Gate, Shut, StorageGate};
use quorate_fence::target::{Ceph, Exec, Lio, TargetAccess, TargetError, Tgt};
use quorate_state::State;
use quorate_transport::Peers;
use quorate_types::{AccessControl, HostName};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Runs the driver that a pool names.
pub(crate) struct Doors {
    /// For units with reservations; absent: there are none.
    cutters: Option<Cutters>,
}

impl Doors {
    /// For all kinds of doors.
    pub(crate) fn new(
        me: &HostName,
        agent: AgentHandle,
        peers: Peers,
        states: watch::Receiver<Arc<State>>,
    ) -> Self {
        let me = me.clone();
        let cutters = Cutters {
            me,
            agent,
            peers,
            states,
        };
        Self {
            cutters: Some(cutters),
        }
    }

    /// For access lists only.
    pub(crate) fn of_lists() -> Self {
        Self { cutters: None }
    }

    /// Opens a door all of whose targets must be there.
    ///
    /// # Errors
    /// A sentence for people.
    pub(crate) async fn let_in(&self, door: &Door, within: Duration) -> Result<(), String> {
        let missing = self.open(door, within).await?;
        missing.into_iter().next().map_or(Ok(()), Err)
    }
}

/// The driver of a SAN with a list of who may log in; units with reservations have none.
fn driver(door: &Door) -> Option<Box<dyn TargetAccess>> {
    let secret = || {
        let secret = door.secret.as_ref();
        secret.map(|secret| secret.expose().to_owned())
    };
    let control = match &door.gate {
        Gate::Target(control) => control,
        Gate::Ceph { conf, user } => return Some(Box::new(Ceph::new(conf, user, secret()))),
        Gate::Reservation { .. } => return None,
    };
    Some(match control {
        AccessControl::Tgt(tgt) => Box::new(Tgt {
            control: tgt.control,
            via: tgt.via.clone(),
        }),
        AccessControl::Lio(lio) => {
            let account = door.account.clone().zip(secret());
            Box::new(Lio::new(lio.tpg, lio.via.clone()).with_account(account))
        }
        AccessControl::Exec(exec) => Box::new(Exec {
            command: exec.command.clone(),
            secret: secret(),
        }),
    })
}

#[async_trait]
impl StorageGate for Doors {
    async fn shut(&self, door: &Door, within: Duration) -> Shut {
        if let (Gate::Reservation { epochs }, Some(cutters)) = (&door.gate, &self.cutters) {
            return cutters.shut(door, epochs.clone(), within).await;
        }
        let Some(driver) = driver(door) else {
            let problem = "nobody is there who could cut a host off".to_owned();
            return door.targets.iter().map(|_| Err(problem.clone())).collect();
        };
        let deadline = Instant::now() + within;
        let removed = driver.cut(&door.targets, &door.initiator, deadline).await;
        let told = |done: Result<quorate_fence::target::AccessRemoved, _>| match done {
            Ok(removed) => Ok((removed.how, removed.took_ms)),
            Err(error) => Err(TargetError::to_string(&error)),
        };
        removed.into_iter().map(told).collect()
    }

    async fn open(&self, door: &Door, within: Duration) -> Result<Vec<String>, String> {
        // A host that is let in again takes its units itself.
        let Some(driver) = driver(door) else {
            return Ok(Vec::new());
        };
        let deadline = Instant::now() + within;
        let allowed = driver.allow(&door.targets, &door.initiator, deadline).await;
        let missing = allowed.map_err(|error| error.to_string())?.into_iter();
        let told = |target| TargetError::NoTarget { target }.to_string();
        Ok(missing.map(told).collect())
    }

    async fn look(&self, door: &Door, within: Duration) -> Result<Vec<bool>, String> {
        let Some(driver) = driver(door) else {
            return Ok(vec![true; door.targets.len()]);
        };
        let deadline = Instant::now() + within;
        let allowed = driver
            .allowed(&door.targets, &door.initiator, deadline)
            .await;
        allowed.map_err(|error| error.to_string())
    }
}
