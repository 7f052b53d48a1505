//! A world as it begins: one voter, all hosts members, the manifest applied.

use crate::check::Checker;
use crate::event::{Event, W};
use crate::faults::Chaos;
use crate::host::Host;
use crate::mutate::Mutation;
use crate::net::Net;
use crate::power::Bmc;
use crate::queue::Queue;
use crate::raft::{Data, Entry, Node};
use crate::rng::Rng;
use crate::san::San;
use crate::services::{Clients, Datapath};
use crate::setup::{Profile, Setup, host_name, witness_name};
use crate::time::{Clock, MS, SEC};
use crate::world::{Detail, World};
use quorate_agent_logic::Ledger;
use quorate_state::{Command, Envelope, FORMAT};
use quorate_types::{NodeId, Timestamp};
use std::collections::BTreeMap;
use std::sync::Arc;

impl World {
    /// The world of a seed.
    #[must_use]
    pub fn random(seed: u64, mutation: Option<Mutation>, detail: Detail) -> Self {
        let mut rng = Rng::new(seed);
        let setup = Setup::random(seed, &mut rng);
        let mut world = Self::new(setup, rng, mutation, detail);
        world.clients = Clients::new(seed);
        world.begin_chaos();
        world
    }

    /// A world without trouble.
    #[must_use]
    pub fn new(setup: Setup, rng: Rng, mutation: Option<Mutation>, detail: Detail) -> Self {
        let count = setup.hosts.len() + usize::from(setup.witness);
        let nodes: Vec<NodeId> = (1..=count as u64).collect();
        let entries = beginning(&setup);
        let hosts = (0..count)
            .filter_map(|at| host(&setup, at, &nodes, &entries))
            .collect();
        let bmc = |fence: &Option<u64>| Bmc {
            delay: fence.unwrap_or(SEC),
            fail_permille: if setup.fault_every > 0 { 150 } else { 0 },
            dead: fence.is_none(),
        };
        let none = setup.witness.then_some(None);
        let bmcs = setup.fences.iter().chain(&none).map(bmc).collect();
        let calm = setup.profile == Profile::Calm;
        let mut world = Self {
            now: 0,
            queue: Queue::new(),
            rng,
            setup,
            mutation,
            hosts,
            net: Net::new(count),
            bmcs,
            san: San::new(count),
            own: Default::default(),
            guests: BTreeMap::new(),
            next_proc: 1,
            disks: BTreeMap::new(),
            files: BTreeMap::new(),
            history: Vec::new(),
            clients: Clients::new(0),
            check: Checker::new(calm),
            chaos: Chaos::default(),
            detail: Detail::Nothing,
            lines: Vec::new(),
            echo: false,
            coarse: false,
            events: 0,
        };
        world.state_at(0, entries.len());
        world.open_doors();
        world.detail = detail;
        for at in 0..count {
            world.power_on(at);
        }
        world.begin_clients();
        world
    }

    /// The units that there are from the start let every host in.
    fn open_doors(&mut self) {
        let vms: Vec<_> = self.newest().vms.keys().cloned().collect();
        let targets = vms.iter().flat_map(|vm| self.disks_of(vm).0);
        let targets: Vec<String> = targets.collect();
        for target in targets {
            for host in 0..self.hosts.len() {
                self.san.let_in(host, target.clone());
            }
        }
        if self.setup.fault_every > 0 {
            self.san.fail_permille = 40;
            self.san.hang_permille = 40;
        }
    }

    /// Prints lines at once instead of keeping them.
    pub fn print_lines(&mut self) {
        self.echo = true;
        for line in std::mem::take(&mut self.lines) {
            println!("{line}");
        }
    }

    /// Trouble begins when the cluster has come up.
    fn begin_chaos(&mut self) {
        let begin = 8 * SEC;
        self.chaos.until = begin + self.setup.active_ns;
        self.net.duplicate_permille = 3;
        self.after(begin, Event::World(W::NextFault));
        self.after(begin, Event::World(W::NextOp));
    }
}

fn host(setup: &Setup, at: usize, nodes: &[NodeId], entries: &[Arc<Entry>]) -> Option<Host> {
    let node = at as u64 + 1;
    let witness = at >= setup.hosts.len();
    let mut raft = Node::new(node, nodes.to_vec(), [1].into());
    raft.witness = witness;
    raft.log = entries.to_vec();
    raft.term = 1;
    raft.commit = entries.len();
    Some(Host {
        name: if witness {
            witness_name()?
        } else {
            host_name(at)?
        },
        node,
        witness,
        memory_mib: setup.hosts.get(at).copied().unwrap_or_default(),
        clock: Clock {
            booted: 0,
            ppm: setup.ppm.get(at).copied().unwrap_or_default(),
        },
        on: false,
        held_off: false,
        boots: 0,
        daemon_inc: 0,
        guard_inc: 0,
        stopped_until: 0,
        daemon_stopped_until: 0,
        guard_stopped_until: 0,
        daemon: None,
        guard: None,
        watchdog: setup.watchdogs.get(at).copied().flatten(),
        fed: None,
        raft,
        snapshot: entries.len(),
        ledger: Ledger::default(),
        disk_slow: false,
        apply_slow: false,
        storage_lost: false,
        datapath: Datapath::default(),
        ledger_synced: (0, Ledger::default()),
    })
}

/// The log of a cluster that was just made.
fn beginning(setup: &Setup) -> Vec<Arc<Entry>> {
    let mut commands = Vec::new();
    let names: Vec<_> = (0..setup.hosts.len()).filter_map(host_name).collect();
    for (at, name) in names.iter().enumerate() {
        let address = format!("10.0.0.{}:7000", at + 1);
        if at == 0 {
            commands.push(Command::CreateCluster {
                id: "sim".into(),
                name: "sim".into(),
                ca_certificate: String::new(),
                ca_key: String::new(),
                host: name.clone(),
                address,
                settings: setup.settings(),
            });
            continue;
        }
        let token = format!("token{at}");
        commands.push(Command::CreateToken {
            hash: token.clone(),
            expires: Timestamp(1_000_000 * MS),
        });
        commands.push(Command::AdmitHost {
            token,
            host: name.clone(),
            address,
        });
    }
    if let Some(name) = witness_name().filter(|_| setup.witness) {
        let hash = "witness".to_owned();
        let expires = Timestamp(1_000_000 * MS);
        commands.push(Command::CreateWitnessToken { hash, expires });
        commands.push(Command::AdmitWitness {
            token: "witness".into(),
            name,
            address: "10.0.0.250:7000".into(),
        });
    }
    commands.push(Command::ApplyManifest {
        base: None,
        manifest: setup.manifest.clone(),
    });
    let entry = |command| {
        Arc::new(Entry {
            term: 1,
            data: Data::Command(Box::new(Envelope {
                format: FORMAT,
                at: Timestamp(0),
                by: "operator".into(),
                command,
            })),
        })
    };
    commands.into_iter().map(entry).collect()
}
