//! Table tests of `apply`, by what they are about. Here is the world that they begin with.

mod copies;
mod definitions;
mod formats;
mod ownership;
mod quorum;
mod services;
mod takes;
mod writes;

use crate::*;
use quorate_membership::{Evidence, FenceProof};
use quorate_types::spec::{Manifest, Power, RuleSpec, VmSpec};
use quorate_types::{
    ByteSize, ClusterSettings, Epoch, HostName, MigrationId, Millis, Revision, RuleName, Timestamp,
    VmName,
};

fn host(n: u32) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn vm(name: &str) -> VmName {
    VmName::new(name).unwrap()
}

fn spec() -> VmSpec {
    serde_json::from_value(serde_json::json!({ "memory": "64MiB" })).unwrap()
}

fn envelope(command: Command) -> Envelope {
    Envelope {
        format: FORMAT,
        at: Timestamp(1000),
        by: "test".into(),
        command,
    }
}

fn abi() -> GuestAbi {
    GuestAbi {
        machine: "pc-q35-10.0".into(),
        cpu_model: "qemu64".into(),
    }
}

struct World(State);

impl World {
    /// Three hosts and the VMs named.
    fn new(vms: &[&str]) -> Self {
        let mut world = Self(State::default());
        world.ok(Command::CreateCluster {
            id: "c1".into(),
            name: "lab".into(),
            ca_certificate: "cert".into(),
            ca_key: "key".into(),
            host: host(1),
            address: "10.0.0.1:7".into(),
            settings: ClusterSettings::default(),
        });
        for n in 2..=3 {
            world.ok(Command::CreateToken {
                hash: format!("t{n}"),
                expires: Timestamp(9999),
            });
            let outcome = world.ok(Command::AdmitHost {
                token: format!("t{n}"),
                host: host(n),
                address: format!("10.0.0.{n}:7"),
            });
            assert_eq!(outcome.node, Some(u64::from(n)));
        }
        let manifest = Manifest {
            vms: vms.iter().map(|name| (vm(name), spec())).collect(),
            ..Manifest::default()
        };
        world.ok(Command::ApplyManifest {
            base: None,
            manifest,
        });
        world
    }

    fn ok(&mut self, command: Command) -> Outcome {
        self.0.apply(&envelope(command)).unwrap()
    }

    /// Refused, and nothing but the revision changed.
    fn refused(&mut self, command: Command) -> Refusal {
        let before = self.0.clone();
        let refusal = self.0.apply(&envelope(command)).unwrap_err();
        let after = State {
            revision: before.revision,
            ..self.0.clone()
        };
        assert_eq!(before, after, "a refusal changed something");
        refusal
    }

    fn plan(&self, actions: Vec<Action>) -> Command {
        let actions = actions
            .into_iter()
            .map(|action| PlannedAction {
                action,
                reason: Reason::new("test"),
            })
            .collect();
        Command::CommitPlan(Plan {
            base: self.0.revision,
            actions,
        })
    }

    fn act(&mut self, actions: Vec<Action>) {
        let command = self.plan(actions);
        self.ok(command);
    }

    fn act_refused(&mut self, actions: Vec<Action>) -> Refusal {
        let command = self.plan(actions);
        self.refused(command)
    }

    fn start(&mut self, name: &str, on: u32) {
        self.act(vec![Action::Start {
            vm: vm(name),
            host: host(on),
            abi: abi(),
        }]);
    }

    fn ownership(&self, name: &str) -> &Ownership {
        &self.0.vms[&vm(name)].ownership
    }

    fn migration(&self, name: &str) -> MigrationId {
        let Ownership::Migrating { id, .. } = self.ownership(name) else {
            panic!("not migrating")
        };
        *id
    }
}

fn dead(on: u32) -> FenceProof {
    let evidence = Evidence::Lease {
        boot: None,
        silence: Millis(9000),
        bound: Millis(2525),
    };
    FenceProof::from_evidence(host(on), evidence).unwrap()
}

fn closed(on: u32, name: &str, epoch: u64) -> FenceProof {
    let evidence = Evidence::Closed {
        vm: vm(name),
        closed: Epoch(epoch),
    };
    FenceProof::from_evidence(host(on), evidence).unwrap()
}

fn release(name: &str, proofs: Vec<FenceProof>) -> Action {
    Action::Release {
        vm: vm(name),
        proofs,
        saved: None,
    }
}
