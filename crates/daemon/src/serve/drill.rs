//! A drill of a pool whose units have reservations: [`quorate_storage::reservation::drill`] on a unit that nobody uses.
//! And of a pool's SAN: a scratch initiator is let in, logs in, is shut out, and must be out.
//!
//! ```text
//! shut out: no login --let in: it logs in and sees the unit --shut out while logged in: the session is dead, no login
//! ```
//! Always holds: nothing is written and no host is touched: the initiator is the drill's own; it is shut out in the end,
//! whatever happens. It is run once when a pool gets its first disk, and by hand (`quorate storage drill POOL`).

use super::core::Core;
use super::doors::Doors;
use super::group::wall_clock;
use quorate_api::storage::{DrillView, listed_name, uses};
use quorate_controller::{Door, Gate, StorageGate};
use quorate_state::{Command, State};
use quorate_storage::Login;
use quorate_storage::iscsi::session::{IscsiError, Peer, Session};
use quorate_storage::reservation::ReservationKey;
use quorate_types::{AccessControl, IscsiPool, Lun, PoolName, PoolSpec};
use std::time::Duration;

/// Bound for one call of the SAN's management.
pub(crate) const CALL_WITHIN: Duration = Duration::from_secs(10);
/// Bound for one login.
const LOGIN_WITHIN: Duration = Duration::from_secs(3);

pub(crate) struct Drill {
    pub(crate) door: Door,
    pub(crate) unit: Lun,
    pub(crate) peer: Peer,
    steps: Vec<String>,
}

/// The disk that a pool is tried on when nobody names one: the first of any VM.
pub(crate) fn default_image(state: &State, pool: &PoolName) -> Option<String> {
    let disks = state.vms.values().flat_map(|vm| &vm.spec.disks);
    let mut mine = disks.filter(|disk| disk.pool == *pool);
    mine.next().map(|disk| disk.image.clone())
}

/// Tries the SAN of a pool and records what came of it.
///
/// # Errors
/// A sentence when it cannot be tried at all.
pub(crate) async fn run(
    core: &Core,
    by: &str,
    pool: &PoolName,
    image: Option<String>,
) -> Result<DrillView, String> {
    let state = core.state();
    let object = state.pools.get(pool);
    let spec = &object
        .ok_or_else(|| format!("there is no pool {pool}"))?
        .spec;
    let units = match spec {
        PoolSpec::Block(block) => block.reservations,
        PoolSpec::Iscsi(iscsi) => iscsi.has_reservations(),
        _ => false,
    };
    let (image, (passed, steps)) = if units {
        let image = scratch(&state, pool, spec, image)?;
        if state.is_witness_disk(pool, &image) {
            return Err(format!(
                "{image} has the cluster's disk witness on it: name another unit with --image"
            ));
        }
        let done = unit(core, &state, pool, &image).await?;
        (image, done)
    } else {
        let image = match image.or_else(|| default_image(&state, pool)) {
            Some(image) => image,
            None if spec.access().is_some() => {
                return Err(format!(
                    "no VM has a disk in pool {pool} yet: name a scratch unit with --image"
                ));
            }
            // What is wrong with it is the same whatever is named.
            None => String::new(),
        };
        let done = list(prepare(&state, pool, spec, &image)?).await;
        (image, done)
    };
    let view = DrillView {
        image,
        at: wall_clock(),
        passed,
        steps,
    };
    let command = Command::RecordDrill {
        pool: pool.clone(),
        image: view.image.clone(),
        passed: view.passed,
        steps: view.steps.clone(),
    };
    match core.propose(by, command).await {
        Ok(_) => Ok(view),
        Err(error) => Err(format!("what came of it cannot be recorded: {error}")),
    }
}

/// The unit that reservations are tried on: one that no VM has, because whoever uses it would be in the way.
fn scratch(
    state: &State,
    pool: &PoolName,
    spec: &PoolSpec,
    image: Option<String>,
) -> Result<String, String> {
    let image = image.ok_or_else(|| {
        format!("the units of pool {pool} are tried by their reservations: name one that nobody uses with --image")
    })?;
    let used = uses(state, pool);
    let vms = used.get(&listed_name(spec, &image)).map(|of| &of.vms);
    match vms.and_then(|vms| vms.first()) {
        Some(vm) => Err(format!(
            "`{image}` is a disk of {vm}: name a unit that nobody uses with --image (`quorate storage show {pool}` lists them)"
        )),
        None => Ok(image),
    }
}

/// Tries a SAN's list of who may log in.
async fn list(mut drill: Drill) -> (bool, Vec<String>) {
    let mut passed = true;
    if let Err(problem) = drill.steps().await {
        drill.steps.push(problem);
        passed = false;
    }
    // The scratch initiator stays outside.
    let shut = Doors::of_lists().shut(&drill.door, CALL_WITHIN).await;
    (passed && shut.iter().all(Result::is_ok), drill.steps)
}

/// Tries the reservations of a unit that nobody uses, from this host.
async fn unit(
    core: &Core,
    state: &State,
    pool: &PoolName,
    image: &str,
) -> Result<(bool, Vec<String>), String> {
    let driver = core.agent.pool(pool)?;
    let unit = driver.reservation(image).await;
    let unit = unit.map_err(|error| error.to_string())?;
    let unit = unit.ok_or_else(|| format!("pool {pool} has no reservations"))?;
    let node = state.hosts.get(&core.me).map_or(0, |record| record.node);
    let key = ReservationKey::new(unit.cluster(), node, 1).map_err(|error| error.to_string())?;
    let report = unit.drill(key).await.map_err(|error| error.to_string())?;
    Ok((report.proof.is_some(), report.sentences(core.me.as_str())))
}

pub(crate) fn prepare(
    state: &State,
    pool: &PoolName,
    spec: &PoolSpec,
    image: &str,
) -> Result<Drill, String> {
    if let PoolSpec::Block(_) = spec {
        return Err(format!(
            "pool {pool} has `reservations: false`: its devices shut nobody out, so there is nothing to try, and VMs of a lost \
             host wait for another proof. Leave `reservations` out if its devices have them"
        ));
    }
    let PoolSpec::Iscsi(iscsi) = spec else {
        return Err(format!(
            "pool {pool} is of the kind {}: only a SAN with an access list of initiators can be tried without shutting a host out",
            spec.kind()
        ));
    };
    let control = iscsi.access.clone();
    let control = control
        .ok_or_else(|| format!("pool {pool} has no `access`: nobody can be shut out there"))?;
    let chap = iscsi.chap.as_ref();
    let (secret, account) = match &control {
        AccessControl::Exec(exec) => (exec.secret.as_ref(), None),
        AccessControl::Lio(_) => (
            chap.map(|chap| &chap.secret),
            chap.map(|chap| chap.user.clone()),
        ),
        AccessControl::Tgt(_) => (None, None),
    };
    let cluster = state
        .cluster
        .as_ref()
        .map_or("", |cluster| cluster.id.as_str());
    let unit = iscsi.lun_of(image)?;
    let initiator = iscsi.drill_initiator(cluster);
    Ok(Drill {
        door: Door {
            pool: pool.clone(),
            secret: secret.and_then(|name| state.secrets.get(name)).cloned(),
            account,
            gate: Gate::Target(control),
            initiator: initiator.clone(),
            targets: vec![unit.target.clone()],
        },
        peer: Peer {
            portal: iscsi.portals().next().unwrap_or_default(),
            initiator,
            login: login(state, iscsi),
            deadline: LOGIN_WITHIN,
        },
        unit,
        steps: Vec::new(),
    })
}

/// The account at a pool's targets, where it names one that is known.
pub(crate) fn login(state: &State, pool: &IscsiPool) -> Option<Login> {
    let chap = pool.chap.as_ref()?;
    let secret = state.secrets.get(&chap.secret)?;
    Some(Login {
        user: chap.user.clone(),
        password: secret.expose().to_owned(),
    })
}

impl Drill {
    async fn steps(&mut self) -> Result<(), String> {
        self.shut("shut out").await?;
        self.refused().await?;
        Doors::of_lists().let_in(&self.door, CALL_WITHIN).await?;
        let mut session = self.enter().await?;
        self.steps
            .push("let in: it logged in and saw the unit".to_owned());
        self.shut("shut out while it was logged in").await?;
        if session.unit(self.unit.lun).await.is_ok() {
            return Err("its session still works after it was shut out".to_owned());
        }
        self.steps.push("its session is dead".to_owned());
        self.refused().await
    }

    async fn shut(&mut self, what: &str) -> Result<(), String> {
        for done in Doors::of_lists().shut(&self.door, CALL_WITHIN).await {
            let (how, took) = done?;
            self.steps.push(format!("{what} in {took} ms: {how}"));
        }
        Ok(())
    }

    async fn enter(&self) -> Result<Session, String> {
        let opened = Session::open(&self.peer, &self.unit.target).await;
        let mut session = opened.map_err(|error| error.to_string())?;
        let seen = session.unit(self.unit.lun).await;
        seen.map(|_| session).map_err(|error| error.to_string())
    }

    async fn refused(&mut self) -> Result<(), String> {
        match Session::open(&self.peer, &self.unit.target).await {
            Ok(_) => Err("it can log in although it was shut out".to_owned()),
            Err(IscsiError::Forbidden { .. } | IscsiError::NotFound { .. }) => {
                self.steps.push("its login is refused".to_owned());
                Ok(())
            }
            // Anything else says nothing about the access list.
            Err(error) => Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_state::{Envelope, FORMAT};
    use quorate_types::{ClusterSettings, HostName, Timestamp};

    #[test]
    fn reservations_are_tried_on_a_unit_that_no_vm_has() {
        let mut state = State::default();
        let mut apply = |command| {
            let envelope = Envelope {
                format: FORMAT,
                at: Timestamp(1),
                by: "test".into(),
                command,
            };
            state.apply(&envelope).unwrap();
        };
        apply(Command::CreateCluster {
            id: "c1".into(),
            name: "c".into(),
            ca_certificate: String::new(),
            ca_key: String::new(),
            host: HostName::new("h1").unwrap(),
            address: "192.0.2.1:7".into(),
            settings: ClusterSettings::default(),
        });
        let name = PoolName::new("san").unwrap();
        let spec: PoolSpec = serde_json::from_str(
            r#"{"kind":"iscsi","portals":["10.0.0.5"],"target":"iqn.2026-01.com.example:s","opened_by":"kernel"}"#,
        )
        .unwrap();
        let manifest = serde_json::json!({
            "pools": { "san": spec },
            "vms": { "web": { "memory": "64MiB", "disks": [{ "pool": "san", "image": "db" }] } },
        });
        apply(Command::ApplyManifest {
            base: None,
            manifest: serde_json::from_value(manifest).unwrap(),
        });
        let try_on = |image: Option<&str>| scratch(&state, &name, &spec, image.map(str::to_owned));
        assert!(try_on(None).unwrap_err().contains("--image"));
        // However the unit is written.
        for image in ["db", "db/0"] {
            let told = try_on(Some(image)).unwrap_err();
            assert!(told.contains("a disk of web"), "{told}");
        }
        assert_eq!(try_on(Some("spare")).unwrap(), "spare");
    }
}
