//! Synthetic sites: as many hosts and VMs as asked for, with everything that makes placement hard.
//!
//! Owns: the generator, and hosts that do as they are told. Always holds: the same numbers give the
//! same site. What a site has: racks of ten hosts; VMs of four sizes that use about 60 % of the
//! memory; chains of five that depend on each other; in every ten VMs three that are kept apart by
//! host or by rack and two that are kept together; a GPU for one VM in fifty.

use anyhow::Context as _;
use quorate_membership::{Evidence, FenceProof, HostHealth, Instant};
use quorate_planner::{Input, Memory};
use quorate_state::{Command, Envelope, FORMAT, Ownership, Plan, State};
use quorate_types::report::{Capacity, HypervisorFacts, PoolReport};
use quorate_types::{
    BootId, ByteSize, ClusterSettings, Epoch, HostName, HostReport, Manifest, Millis, Timestamp,
    VmPhase, VmReport,
};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Rounds until a site is at rest: chains of five start link by link.
const ROUNDS: usize = 20;
/// Hosts of a rack.
const RACK: usize = 10;
/// Memory of the VMs, in MiB, in turn.
pub(crate) const SIZES_MIB: [u64; 4] = [2048, 4096, 8192, 4096];
/// Virtual CPUs of the VMs, in turn.
pub(crate) const CPUS: [u64; 3] = [1, 2, 4];

/// A site and what its hosts say.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) state: State,
    pub(crate) reports: BTreeMap<HostName, HostReport>,
    health: BTreeMap<HostName, HostHealth>,
    proofs: Vec<FenceProof>,
    memory: Memory,
    now: Instant,
}

/// Memory of each host, so that the VMs use about 60 % of it. Whole GiB.
pub(crate) fn host_mib(hosts: usize, vms: usize) -> u64 {
    let mean = SIZES_MIB.iter().sum::<u64>() / 4 + 64;
    let each = mean * vms as u64 / hosts.max(1) as u64;
    (each * 10 / 6).div_ceil(1024) * 1024
}

/// The manifest of a site.
pub(crate) fn manifest(hosts: usize, vms: usize) -> Value {
    let mut host_specs = Map::new();
    // Half as many again as are used, on every fifth host.
    let gpus_each = (vms * 3 / 2 / 50).div_ceil(hosts.div_ceil(5)) + 1;
    for n in 0..hosts {
        let gpus = if n % 5 == 0 { gpus_each } else { 0 };
        let spec = json!({
            "labels": { "rack": format!("r{}", n / RACK) }, "resources": { "gpu": gpus },
        });
        host_specs.insert(host_name(n), spec);
    }
    let mut specs = Map::new();
    for n in 0..vms {
        let mut spec = json!({
            "memory": format!("{}MiB", SIZES_MIB[n % 4]), "cpus": CPUS[n % 3],
            "disks": [{ "pool": "shared", "image": format!("v{n}.raw") }],
            "nics": [{ "network": "lan" }],
        });
        if n % 5 != 0 {
            spec["depends_on"][format!("v{}", n - 1)] = json!({});
        }
        if n % 50 == 7 {
            spec["resources"] = json!({ "gpu": 1 });
        }
        specs.insert(format!("v{n}"), spec);
    }
    let mut rules = Map::new();
    for n in (0..vms.saturating_sub(9)).step_by(10) {
        let some = |offsets: &[usize]| -> Vec<String> {
            offsets
                .iter()
                .map(|offset| format!("v{}", n + offset))
                .collect()
        };
        let mut apart = json!({ "keep_apart": some(&[0, 3, 6]) });
        if n % 20 == 0 && hosts > 3 * RACK {
            apart["across"] = "rack".into();
        }
        rules.insert(format!("apart-{n}"), apart);
        rules.insert(format!("with-{n}"), json!({ "keep_with": some(&[1, 2]) }));
    }
    json!({
        "hosts": host_specs, "vms": specs, "rules": rules,
        "pools": { "shared": { "kind": "directory", "path": "/srv/shared" } },
        "networks": { "lan": { "bridge": "br-lan" } },
    })
}

pub(crate) fn host_name(n: usize) -> String {
    format!("h{n}")
}

fn report(name: &HostName, mib: u64) -> anyhow::Result<HostReport> {
    let pool = PoolReport {
        usable: true,
        marker: Some("m1".into()),
        ..PoolReport::default()
    };
    Ok(HostReport {
        host: name.clone(),
        boot: BootId("b1".into()),
        sequence: 1,
        version: "0.1.0".into(),
        applied: Default::default(),
        guard_armed: true,
        watchdog_ms: Some(500),
        capacity: Capacity {
            cpus: 64,
            memory: ByteSize::mib(mib),
        },
        hypervisor: HypervisorFacts {
            qemu: "10.0.2".into(),
            accel: "kvm".into(),
            cpu_models: BTreeSet::from(["qemu64".to_owned()]),
            machines: [("q35".to_owned(), "pc-q35-10.0".to_owned())].into(),
        },
        networks: ["lan".parse()?].into(),
        pools: BTreeMap::from([("shared".parse()?, pool)]),
        links: BTreeMap::new(),
        vms: BTreeMap::new(),
        services: BTreeMap::new(),
        uplinks: BTreeMap::new(),
        offences: BTreeMap::new(),
    })
}

impl Site {
    pub(crate) fn new(hosts: usize, vms: usize) -> anyhow::Result<Self> {
        let mut site = Self {
            state: State::default(),
            reports: BTreeMap::new(),
            health: BTreeMap::new(),
            proofs: Vec::new(),
            memory: Memory::default(),
            now: Instant(1_000_000_000_000),
        };
        let name = |n: usize| -> anyhow::Result<HostName> { Ok(host_name(n).parse()?) };
        site.command(Command::CreateCluster {
            id: "c1".into(),
            name: "bench".into(),
            ca_certificate: String::new(),
            ca_key: String::new(),
            host: name(0)?,
            address: "host-0:7".into(),
            settings: ClusterSettings::default(),
        })?;
        let mib = host_mib(hosts, vms);
        for n in 0..hosts {
            if n > 0 {
                site.command(Command::CreateToken {
                    hash: format!("t{n}"),
                    expires: Timestamp(u64::MAX),
                })?;
                site.command(Command::AdmitHost {
                    token: format!("t{n}"),
                    host: name(n)?,
                    address: format!("host-{n}:7"),
                })?;
            }
            site.health.insert(name(n)?, HostHealth::Up);
            site.reports.insert(name(n)?, report(&name(n)?, mib)?);
        }
        let manifest: Manifest = serde_json::from_value(manifest(hosts, vms))?;
        site.command(Command::ApplyManifest {
            base: None,
            manifest,
        })?;
        site.look();
        Ok(site)
    }

    pub(crate) fn command(&mut self, command: Command) -> anyhow::Result<()> {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "bench".into(),
            command,
        };
        self.state
            .apply(&envelope)
            .context("a command was refused")?;
        Ok(())
    }

    pub(crate) fn input(&self) -> Input<'_> {
        Input {
            state: &self.state,
            reports: &self.reports,
            health: &self.health,
            proofs: &self.proofs,
            now: self.now,
            memory: &self.memory,
            settled: true,
        }
    }

    fn look(&mut self) {
        self.memory.observe(&self.state, &self.reports, self.now);
    }

    /// Commits a plan; every host does at once what it was told to.
    pub(crate) fn commit(&mut self, plan: Plan) -> anyhow::Result<()> {
        self.command(Command::CommitPlan(plan))?;
        for (name, vm) in &self.state.vms {
            if let Ownership::Owned { host, epoch, .. } = &vm.ownership
                && let Some(report) = self.reports.get_mut(host)
            {
                report.vms.insert(name.clone(), running(*epoch));
            }
        }
        self.look();
        Ok(())
    }

    /// Plans and commits until everything runs.
    pub(crate) fn start_all(&mut self, mut plan: impl FnMut(&Self) -> Plan) -> anyhow::Result<()> {
        for _ in 0..ROUNDS {
            let made = plan(self);
            if made.actions.is_empty() {
                break;
            }
            self.commit(made)?;
        }
        let placed = self.state.vms.values();
        let placed = placed.filter(|vm| !vm.ownership.hosts().is_empty()).count();
        anyhow::ensure!(placed == self.state.vms.len(), "not every VM was placed");
        Ok(())
    }

    /// Looks once at every name and number that a plan rests on.
    pub(crate) fn walk(&self) -> u64 {
        let text = |text: &str| text.bytes().map(u64::from).sum::<u64>();
        let vms = self.state.vms.iter().map(|(name, vm)| {
            let needs = vm.spec.depends_on.keys().map(|other| text(other.as_str()));
            let disks = vm.spec.disks.iter().map(|disk| text(disk.pool.as_str()));
            let nics = vm.spec.nics.iter().map(|nic| text(nic.network.as_str()));
            let owner = vm.ownership.host().map_or(0, |host| text(host.as_str()));
            let lists = needs.chain(disks).chain(nics).sum::<u64>();
            text(name.as_str()) + vm.spec.memory.0 + owner + lists
        });
        let rules = self.state.rules.values();
        let rules = rules.map(|rule| {
            let vms = rule.spec.vms().iter();
            vms.map(|vm| text(vm.as_str())).sum::<u64>()
        });
        let said = self.reports.values().flat_map(|report| &report.vms);
        let said = said.map(|(name, said)| text(name.as_str()) + said.epoch.0);
        let sum = |all: u64, one: u64| all.wrapping_add(one);
        vms.chain(rules).chain(said).fold(0, sum)
    }

    /// A host dies, and there is a proof of it.
    pub(crate) fn kill(&mut self, n: usize) -> anyhow::Result<()> {
        let host: HostName = host_name(n).parse()?;
        let evidence = Evidence::Lease {
            boot: None,
            silence: Millis(9000),
            bound: Millis(2525),
        };
        self.proofs
            .push(FenceProof::from_evidence(host.clone(), evidence)?);
        self.health.insert(host, HostHealth::Dead);
        Ok(())
    }
}

fn running(epoch: Epoch) -> VmReport {
    VmReport {
        epoch,
        phase: VmPhase::Running,
        ready: true,
        closed: Epoch(0),
        saved: None,
        save_failures: 0,
        guest_shutdown: false,
        restarts: 0,
        since: Timestamp(0),
        error: None,
        handed_over: None,
        migration: None,
        resident: ByteSize(0),
        mirrors: Vec::new(),
    }
}
