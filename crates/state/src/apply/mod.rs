//! `apply`: one command at a time, all or nothing.
//!
//! Atomicity is by working on a copy of the parts that a command can leave half done: a plan and a
//! manifest are checked while they are applied to a clone, which replaces the state at the end.

mod cluster;
mod copies;
mod manifest;
mod plan;
mod quorum;
mod services;
mod storage;
mod writes;

use crate::command::{Command, Envelope, FORMAT, Outcome, Refusal};
use crate::event::{Event, EventKind, Subject};
use crate::model::State;
use crate::plan::CopyOf;
use quorate_types::{NodeId, Revision, VmName};

/// What a handler collects while it changes the state.
pub(crate) struct Change<'a> {
    pub(crate) state: &'a mut State,
    pub(crate) envelope: &'a Envelope,
    /// The revision that this command makes.
    pub(crate) revision: Revision,
    pub(crate) events: Vec<Event>,
    pub(crate) node: Option<NodeId>,
}

impl Change<'_> {
    pub(crate) fn event(&mut self, kind: EventKind, subject: Subject, text: impl Into<String>) {
        let event = Event {
            sequence: 0,
            at: self.envelope.at,
            revision: self.revision,
            by: self.envelope.by.clone(),
            kind,
            subject,
            text: text.into(),
        };
        let event = self.state.log.push(event);
        self.events.push(event);
    }

    pub(crate) fn vm_event(&mut self, kind: EventKind, vm: &VmName, text: impl Into<String>) {
        self.event(kind, Subject::Vm(vm.clone()), text);
    }

    pub(crate) fn topology_changed(&mut self) {
        self.state.topology_changed = self.revision;
    }
}

impl State {
    /// Applies one committed command. Total and deterministic; a refusal changes nothing but the
    /// revision (so that the revision counts committed commands on every host alike).
    pub fn apply(&mut self, envelope: &Envelope) -> Result<Outcome, Refusal> {
        let revision = self.revision.next();
        let mut next = self.clone();
        next.revision = revision;
        let mut change = Change {
            state: &mut next,
            envelope,
            revision,
            events: Vec::new(),
            node: None,
        };
        let result = dispatch(&mut change);
        let (events, node) = (change.events, change.node);
        match result {
            Ok(()) => {
                *self = next;
                Ok(Outcome {
                    revision,
                    events,
                    node,
                })
            }
            Err(refusal) => {
                self.revision = revision;
                Err(refusal)
            }
        }
    }
}

fn dispatch(change: &mut Change<'_>) -> Result<(), Refusal> {
    let envelope = change.envelope;
    if envelope.format > FORMAT {
        return Err(Refusal::TooNew {
            format: envelope.format,
        });
    }
    let creates = matches!(envelope.command, Command::CreateCluster { .. });
    if change.state.cluster.is_none() && !creates {
        return Err(Refusal::Cluster(
            "there is no cluster yet: run `quorate init`".into(),
        ));
    }
    match &envelope.command {
        Command::CreateCluster { .. } => cluster::create(change),
        Command::CreateToken { hash, expires } => cluster::create_token(change, hash, *expires),
        Command::AdmitHost {
            token,
            host,
            address,
        } => cluster::admit(change, token, host, address),
        Command::RemoveHost { host } => cluster::remove(change, host),
        Command::SetHostMode { host, mode } => cluster::set_mode(change, host, *mode),
        Command::RecordArmed { host, armed } => cluster::record_armed(change, host, *armed),
        Command::RecordPoolMarker { pool, marker } => manifest::record_marker(change, pool, marker),
        Command::ApplyManifest { base, manifest } => manifest::apply(change, *base, manifest),
        Command::DeleteVm { vm } => manifest::delete_vm(change, vm),
        Command::DeletePool { pool } => manifest::delete_pool(change, pool),
        Command::DeleteNetwork { network } => manifest::delete_network(change, network),
        Command::DeleteRule { rule } => manifest::delete_rule(change, rule),
        Command::SetPower { vm, power, mode } => manifest::set_power(change, vm, *power, *mode),
        Command::RequestMove { vm, to } => manifest::request_move(change, vm, to.as_ref()),
        Command::CancelMove { vm } => manifest::cancel_move(change, vm),
        Command::RecordDisk { pool, image, host } => copies::made(change, pool, image, host),
        Command::BeginImageWrite {
            pool,
            image,
            host,
            what,
        } => writes::begin(change, pool, image, host, what),
        Command::EndImageWrite { pool, image, host } => writes::end(change, pool, image, host),
        Command::AcceptCopy {
            vm,
            pool,
            image,
            host,
            since,
        } => {
            let of = CopyOf {
                vm: vm.clone(),
                pool: pool.clone(),
                image: image.clone(),
                host: host.clone(),
            };
            copies::accept(change, &of, *since)
        }
        Command::LabelHost { host, set, remove } => cluster::label(change, host, set, remove),
        Command::CommitPlan(plan) => plan::commit(change, plan),
        Command::CutStorage { host, pools } => storage::cut(change, host, pools),
        Command::RestoreStorage { host, pools } => storage::restore(change, host, pools),
        Command::RecordDrill {
            pool,
            image,
            passed,
            steps,
        } => storage::record_drill(change, pool, image, *passed, steps),
        Command::TakeUnit {
            pool,
            image,
            keys,
            hold,
        } => storage::take(change, pool, image, keys, *hold),
        Command::EndTake { pool, image, given } => storage::end_take(change, pool, image, *given),
        Command::SetSecret { name, secret } => storage::set_secret(change, name, secret),
        Command::DeleteSecret { name } => storage::delete_secret(change, name),
        Command::SetWitness { witness } => quorum::set_witness(change, witness),
        Command::CreateWitnessToken { hash, expires } => {
            quorum::create_token(change, hash, *expires)
        }
        Command::AdmitWitness {
            token,
            name,
            address,
        } => quorum::admit(change, token, name, address),
        Command::RenewDiskWitness { old, why } => quorum::renew_disk(change, *old, why),
        Command::HostLeft { host, left } => quorum::left(change, host, *left),
        Command::ChangeServices { changes } => services::change_all(change, changes),
        Command::DrainMember { service, vm } => services::drain(change, service, vm),
        Command::ResumeMember { service, vm } => services::resume(change, service, vm),
        Command::DeleteService { service } => services::delete(change, service),
    }
}

pub(crate) fn unknown(kind: &str, name: impl std::fmt::Display) -> Refusal {
    Refusal::Unknown {
        kind: kind.to_owned(),
        name: name.to_string(),
    }
}
