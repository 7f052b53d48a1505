//! The doors of SANs for the controller, by the drivers of `quorate-fence`.

use async_trait::async_trait;
use quorate_controller::{Door, Gate, Shut, StorageGate};
use quorate_fence::target::{Ceph, Exec, Lio, TargetAccess, Tgt};
use quorate_types::AccessControl;
use std::time::Duration;
use tokio::time::Instant;

/// Runs the driver that a pool names.
pub(crate) struct Doors;

fn driver(door: &Door) -> Box<dyn TargetAccess> {
    let secret = || {
        let secret = door.secret.as_ref();
        secret.map(|secret| secret.expose().to_owned())
    };
    let control = match &door.gate {
        Gate::Target(control) => control,
        Gate::Ceph { conf, user } => return Box::new(Ceph::new(conf, user, secret())),
    };
    match control {
        AccessControl::Tgt(tgt) => Box::new(Tgt {
            control: tgt.control,
            via: tgt.via.clone(),
        }),
        AccessControl::Lio(lio) => Box::new(Lio::new(lio.tpg, lio.via.clone())),
        AccessControl::Exec(exec) => Box::new(Exec {
            command: exec.command.clone(),
            secret: secret(),
        }),
    }
}

#[async_trait]
impl StorageGate for Doors {
    async fn shut(&self, door: &Door, within: Duration) -> Shut {
        let deadline = Instant::now() + within;
        let removed = driver(door)
            .cut(&door.targets, &door.initiator, deadline)
            .await;
        let told = |done: Result<quorate_fence::target::AccessRemoved, _>| match done {
            Ok(removed) => Ok((removed.how, removed.took_ms)),
            Err(error) => Err(quorate_fence::target::TargetError::to_string(&error)),
        };
        removed.into_iter().map(told).collect()
    }

    async fn open(&self, door: &Door, within: Duration) -> Result<(), String> {
        let deadline = Instant::now() + within;
        let allowed = driver(door)
            .allow(&door.targets, &door.initiator, deadline)
            .await;
        allowed.map_err(|error| error.to_string())
    }

    async fn look(&self, door: &Door, within: Duration) -> Result<Vec<bool>, String> {
        let deadline = Instant::now() + within;
        let allowed = driver(door)
            .allowed(&door.targets, &door.initiator, deadline)
            .await;
        allowed.map_err(|error| error.to_string())
    }
}
