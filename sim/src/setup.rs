//! What a run begins with: hosts, VMs, timings and how often things go wrong, all from the seed.

use crate::rng::Rng;
use crate::time::{MS, SEC};
use quorate_types::settings::FenceDevice;
use quorate_types::spec::{
    Boot, Condition, DiskFormat, DiskSpec, Guard, Machine, MigrationPolicy, NicSpec, PoolSpec,
    Power, Probe, ReadyCheck,
};
use quorate_types::{
    Balancing, BalancingMode, ByteSize, ClusterSettings, Dependency, HostName, LeaseTimings,
    Manifest, Millis, NetworkName, NetworkSpec, PoolName, Preemption, RuleName, RuleSpec, VmName,
    VmSpec,
};
use std::collections::{BTreeMap, BTreeSet};

/// What kind of trouble a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Everything.
    Mixed,
    /// Cuts, loss, delays, partial partitions.
    Network,
    /// Hosts, daemons, guards and guests end.
    Crash,
    /// Many migrations, with faults aimed at their steps.
    Migration,
    /// Short outages and restarts only: nothing may be killed or moved.
    Calm,
    /// Two hosts with power fencing, no watchdogs.
    Power,
    /// Pauses, slow disks, replicas that lag.
    Slow,
}

impl Profile {
    const ALL: [Self; 8] = [
        Self::Mixed,
        Self::Network,
        Self::Crash,
        Self::Migration,
        Self::Calm,
        Self::Power,
        Self::Slow,
        Self::Migration,
    ];
}

/// Beginning and habits of a world.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Kind of trouble.
    pub profile: Profile,
    /// Memory of each host, in MiB.
    pub hosts: Vec<u64>,
    /// Clock deviation of each host, in parts per million.
    pub ppm: Vec<i64>,
    /// Watchdog of each host.
    pub watchdogs: Vec<Option<Millis>>,
    /// Time that each host's fence device takes; absent: none.
    pub fences: Vec<Option<u64>>,
    /// Lease timings.
    pub timings: LeaseTimings,
    /// What is applied at the beginning.
    pub manifest: Manifest,
    /// Time of a boot.
    pub boot_ns: u64,
    /// Time that a guest takes to get ready.
    pub ready_ns: (u64, u64),
    /// Time of a migration's copy.
    pub precopy_ns: (u64, u64),
    /// How often a start fails.
    pub start_fail_permille: u64,
    /// How often a freeze cannot be confirmed.
    pub freeze_fail_permille: u64,
    /// How many guests ignore the power button.
    pub ignores_powerdown_permille: u64,
    /// How often the last word of a stream is lost.
    pub ack_lost_permille: u64,
    /// How often a step of a migration draws a fault.
    pub step_fault_permille: u64,
    /// Mean time between two faults, and between two orders of the operator; 0: none.
    pub fault_every: u64,
    /// See above.
    pub op_every: u64,
    /// For how long there are faults.
    pub active_ns: u64,
    /// Ask the planner why VMs wait.
    pub want_waiting: bool,
    /// Load is evened out automatically, eagerly.
    pub balancing: bool,
    /// VMs of lower priority make room.
    pub preemption: bool,
    /// There is a remote witness, on a machine of its own.
    pub witness: bool,
    /// There are disks on a SAN.
    pub san: bool,
    /// Disks are the hosts' own.
    pub own: bool,
}

/// The one pool.
pub(crate) fn pool() -> Option<PoolName> {
    PoolName::new("shared").ok()
}

/// The one network.
pub(crate) fn network() -> Option<NetworkName> {
    NetworkName::new("lan").ok()
}

/// The name of the n-th host, from 0.
pub(crate) fn host_name(at: usize) -> Option<HostName> {
    HostName::new(format!("h{}", at + 1)).ok()
}

/// The name of the witness.
pub(crate) fn witness_name() -> Option<HostName> {
    HostName::new("witness").ok()
}

/// A VM with one disk and one network card.
#[must_use]
pub fn vm_spec(name: &str, memory_mib: u64) -> VmSpec {
    VmSpec {
        cpus: 1,
        memory: ByteSize::mib(memory_mib),
        machine: Machine::Q35,
        boot: Boot::Disk,
        disks: pool()
            .into_iter()
            .map(|pool| DiskSpec {
                pool,
                image: format!("{name}.raw"),
                format: DiskFormat::Raw,
                size: None,
            })
            .collect(),
        nics: network().into_iter().map(NicSpec::new).collect(),
        ready: None,
        depends_on: BTreeMap::new(),
        hosts: BTreeSet::new(),
        host_labels: BTreeMap::new(),
        labels: BTreeMap::new(),
        prefer: Vec::new(),
        resources: BTreeMap::new(),
        priority: 0,
        power: Power::Running,
        migration: MigrationPolicy::Live,
        shutdown_timeout: Millis::secs(10),
    }
}

/// All disks of a VM are on the SAN.
pub(crate) fn on_san(spec: &mut VmSpec, name: &str, disks: usize) {
    let disk = |at: usize| {
        Some(DiskSpec {
            pool: crate::san::pool()?,
            image: if at == 0 {
                name.to_owned()
            } else {
                format!("{name}-{at}")
            },
            format: DiskFormat::Raw,
            size: None,
        })
    };
    spec.disks = (0..disks).filter_map(disk).collect();
}

impl Setup {
    /// A quiet cluster of `hosts` hosts without VMs.
    #[must_use]
    pub fn quiet(hosts: usize) -> Self {
        let mut manifest = Manifest::default();
        if let (Some(pool), Some(network)) = (pool(), network()) {
            let directory = PoolSpec::Directory {
                path: "/srv/shared".into(),
                hosts: BTreeSet::new(),
            };
            manifest.pools.insert(pool, directory);
            let bridge = NetworkSpec {
                bridge: "br0".into(),
                uplink: None,
                mtu: 1500,
                parallel_migrations: None,
                subnet: None,
                subnet6: None,
                guard: Guard::default(),
                bgp: None,
            };
            manifest.networks.insert(network, bridge);
        }
        Self {
            profile: Profile::Mixed,
            hosts: vec![16_384; hosts],
            ppm: vec![0; hosts],
            watchdogs: vec![Some(Millis(500)); hosts],
            fences: vec![None; hosts],
            timings: LeaseTimings::default(),
            manifest,
            boot_ns: 20 * SEC,
            ready_ns: (2 * SEC, 2 * SEC),
            precopy_ns: (2 * SEC, 2 * SEC),
            start_fail_permille: 0,
            freeze_fail_permille: 0,
            ignores_powerdown_permille: 0,
            ack_lost_permille: 0,
            step_fault_permille: 0,
            fault_every: 0,
            op_every: 0,
            active_ns: 0,
            want_waiting: false,
            balancing: false,
            preemption: false,
            witness: false,
            san: false,
            own: false,
        }
    }

    /// What is on files is on the hosts' own ones: with a copy, or in one place.
    pub fn with_own_disks(&mut self, local: bool) {
        self.own = true;
        // A VM that can only start in one place is easily shut out of it by a rule.
        self.manifest.rules.clear();
        let kind = if local { "local" } else { "mirrored" };
        let spec = serde_json::json!({ "kind": kind, "path": "/srv/own" });
        let spec = serde_json::from_value::<PoolSpec>(spec).ok();
        let Some(own) = crate::copies::pool() else {
            return;
        };
        self.manifest.pools.extend(Some(own.clone()).zip(spec));
        for spec in self.manifest.vms.values_mut() {
            let files = spec
                .disks
                .iter()
                .all(|disk| Some(&disk.pool) == pool().as_ref());
            if !files {
                continue;
            }
            for disk in &mut spec.disks {
                disk.pool = own.clone();
            }
            if spec.migration == MigrationPolicy::Quick {
                spec.migration = MigrationPolicy::Live;
            }
        }
    }

    /// There is a SAN, and its pool.
    pub fn with_san(&mut self) {
        self.san = true;
        let pool = serde_json::json!({
            "kind": "iscsi", "portals": ["10.0.9.1"], "target": "iqn.2026-01.sim:san", "lun": 1,
            "access": { "tgt": {} },
        });
        let pool = serde_json::from_value::<PoolSpec>(pool).ok();
        self.manifest.pools.extend(crate::san::pool().zip(pool));
    }

    /// The beginning of a seed's run.
    #[must_use]
    pub fn random(seed: u64, rng: &mut Rng) -> Self {
        let which = usize::try_from(seed % 8).unwrap_or(0);
        let profile = Profile::ALL[which];
        let hosts = if profile == Profile::Power {
            2
        } else {
            usize::try_from(rng.range(2, 5)).unwrap_or(3)
        };
        let mut setup = Self::quiet(hosts);
        setup.profile = profile;
        // Where it can have a vote. Not drawn: the other seeds stay as they are.
        setup.witness = hosts % 2 == 0 && seed / 8 % 2 == 1;
        if rng.chance(200) {
            setup.timings = LeaseTimings::FAST;
        }
        let drift = u64::from(setup.timings.drift_permille) * 1000 / 2;
        setup.ppm = (0..hosts)
            .map(|_| {
                i64::try_from(rng.range(0, 2 * drift)).unwrap_or(0)
                    - i64::try_from(drift).unwrap_or(0)
            })
            .collect();
        setup.dangers(rng);
        setup.random_vms(rng);
        setup.habits(rng);
        if rng.chance(450) {
            setup.random_san(rng);
        }
        // Not drawn, for the sake of the other seeds.
        if seed / 8 % 4 == 3 {
            setup.with_own_disks(seed / 32 % 3 == 2);
        }
        // In calm nothing moves but what an operator moves.
        if setup.profile != Profile::Calm {
            setup.balancing = rng.chance(300);
            setup.preemption = rng.chance(250);
        }
        if setup.preemption && setup.manifest.rules.is_empty() {
            setup.make_scarce();
        }
        // Not drawn: the other seeds stay as they are.
        if seed / 16 % 2 == 1 {
            crate::services::add_services(&mut setup.manifest);
        }
        setup
    }

    /// Just so much memory that every VM finds a place whatever the others have, with all hosts there.
    fn make_scarce(&mut self) {
        let need = |spec: &VmSpec| spec.memory.as_mib() + (quorate_planner::OVERHEAD_BYTES >> 20);
        let needs = self.manifest.vms.values().map(need);
        let (all, largest) = (needs.clone().sum::<u64>(), needs.max().unwrap_or(0));
        let each = all.div_ceil(self.hosts.len().max(1) as u64) + largest;
        self.hosts.fill(each);
    }

    fn dangers(&mut self, rng: &mut Rng) {
        for host in 0..self.hosts.len() {
            let bare = self.profile == Profile::Power || rng.chance(60);
            self.watchdogs[host] = match (bare, rng.chance(100)) {
                (true, _) => None,
                (false, true) => Some(Millis(900)),
                (false, false) => Some(self.timings.watchdog_bound),
            };
            if bare || rng.chance(100) {
                self.fences[host] = Some(rng.range(300, 8000) * MS);
            }
        }
    }

    fn random_vms(&mut self, rng: &mut Rng) {
        let count = usize::try_from(rng.range(2, 8)).unwrap_or(4);
        let mut names: Vec<VmName> = Vec::new();
        for at in 0..count {
            let Ok(name) = VmName::new(format!("vm{}", at + 1)) else {
                continue;
            };
            let mut spec = vm_spec(name.as_str(), 512 * rng.range(1, 3));
            spec.priority = i32::try_from(rng.below(3)).unwrap_or(0) * 10;
            spec.migration = match rng.below(20) {
                0 | 1 => MigrationPolicy::Quick,
                2 | 3 => MigrationPolicy::Cold,
                4 => MigrationPolicy::Never,
                _ => MigrationPolicy::Live,
            };
            if rng.chance(350) {
                spec.ready = Some(ReadyCheck {
                    probe: Probe::Agent,
                    timeout: Millis::secs(300),
                });
            }
            for other in &names {
                if rng.chance(180) {
                    let condition = if rng.chance(300) {
                        Condition::Started
                    } else {
                        Condition::Ready
                    };
                    spec.depends_on.insert(
                        other.clone(),
                        Dependency {
                            condition,
                            ..Dependency::default()
                        },
                    );
                }
            }
            self.manifest.vms.insert(name.clone(), spec);
            names.push(name);
        }
        if rng.chance(500)
            && let (Some(a), Some(b)) = (names.first(), names.last())
            && let Ok(rule) = RuleName::new("apart")
        {
            let both = [a.clone(), b.clone()].into();
            self.manifest.rules.insert(rule, RuleSpec::keep_apart(both));
        }
        if names.len() > 4
            && rng.chance(200)
            && let Ok(rule) = RuleName::new("with")
        {
            let both = [names[1].clone(), names[2].clone()].into();
            self.manifest.rules.insert(rule, RuleSpec::keep_with(both));
        }
    }

    /// Some VMs, or all, have their disks on a SAN; on some hosts nothing else can prove anything.
    fn random_san(&mut self, rng: &mut Rng) {
        self.with_san();
        let share = if rng.chance(500) { 1000 } else { 500 };
        for (name, spec) in &mut self.manifest.vms {
            if !rng.chance(share) {
                continue;
            }
            let shared = std::mem::take(&mut spec.disks);
            on_san(spec, name.as_str(), if rng.chance(200) { 2 } else { 1 });
            if rng.chance(100) {
                spec.disks.extend(shared);
            } else if spec.migration == MigrationPolicy::Quick {
                // A SAN's units take no files.
                spec.migration = MigrationPolicy::Live;
            }
        }
        for host in 0..self.hosts.len() {
            if rng.chance(500) {
                self.watchdogs[host] = None;
                self.fences[host] = self.fences[host].filter(|_| rng.chance(300));
            }
        }
    }

    fn habits(&mut self, rng: &mut Rng) {
        self.boot_ns = rng.range(3, 30) * SEC;
        self.ready_ns = (200 * MS, 5 * SEC);
        self.precopy_ns = (200 * MS, if rng.chance(200) { 30 * SEC } else { 4 * SEC });
        self.active_ns = 150 * SEC;
        self.op_every = rng.range(2, 6) * SEC;
        self.fault_every = rng.range(2, 6) * SEC;
        if self.profile == Profile::Calm {
            self.op_every = 8 * SEC;
            self.fault_every = 7 * SEC;
            return;
        }
        self.start_fail_permille = 30;
        self.freeze_fail_permille = 50;
        self.ignores_powerdown_permille = 100;
        self.ack_lost_permille = 30;
        if self.profile == Profile::Migration {
            self.op_every = rng.range(800, 2500) * MS;
            self.fault_every = 12 * SEC;
            self.step_fault_permille = rng.range(50, 250);
        }
    }

    /// Settings of the cluster.
    #[must_use]
    pub fn settings(&self) -> ClusterSettings {
        let device = || FenceDevice {
            agent: "fence_sim".into(),
            options: BTreeMap::new(),
            timeout: Millis::secs(20),
        };
        let fenced = self
            .fences
            .iter()
            .enumerate()
            .filter(|(_, fence)| fence.is_some());
        ClusterSettings {
            lease: self.timings,
            replace_voter_after: Millis::secs(15),
            fencing: fenced
                .filter_map(|(at, _)| Some((host_name(at)?, vec![device()])))
                .collect(),
            balancing: Balancing {
                mode: match self.balancing {
                    true => BalancingMode::Auto,
                    false => BalancingMode::Advise,
                },
                min_gain_percent: 5,
                moves_per_hour: 60,
            },
            preemption: match self.preemption {
                true => Preemption::LowerPriority,
                false => Preemption::Off,
            },
            ..ClusterSettings::default()
        }
    }
}
