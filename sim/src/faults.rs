//! What goes wrong, and what operators ask for meanwhile.
//!
//! Always holds: an operator only confirms a host dead that is switched off and stays off until the
//! cluster has acted; everything that was broken is mended when the time of faults is over.

use crate::event::{Event, HostId, W};
use crate::guest::{ProcId, Vcpu};
use crate::leader::Purpose;
use crate::setup::Profile;
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_membership::{Evidence, FenceProof, Instant};
use quorate_state::{Command, HostMode, StopMode};
use quorate_types::spec::Power;
use quorate_types::{HostName, Manifest, VmName};

/// Something that goes wrong for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No packet from one host to another.
    CutOneWay(HostId, HostId),
    /// No packet between two hosts.
    CutLink(HostId, HostId),
    /// No packet to or from a host.
    CutHost(HostId),
    /// Packets between two hosts take this many milliseconds more.
    SlowLink(HostId, HostId, u64),
    /// A tenth of all packets is lost at first.
    Loss,
    /// SIGSTOP of the daemon, for so many milliseconds.
    PauseDaemon(HostId, u64),
    /// SIGSTOP of the guard.
    PauseGuard(HostId, u64),
    /// SIGSTOP of everything on the host.
    PauseHost(HostId, u64),
    /// SIGKILL of the daemon; it is started again.
    KillDaemon(HostId),
    /// SIGKILL of the guard.
    KillGuard(HostId),
    /// The power fails; the host boots again when it is back.
    PowerCut(HostId),
    /// Writes of the ledger take long.
    DiskSlow(HostId),
    /// The replica lags.
    ApplySlow(HostId),
    /// The shared storage cannot be reached from a host.
    StorageLost(HostId),
    /// QEMU of a guest ends.
    CrashQemu(ProcId),
    /// The fence device of a host does not answer.
    BmcDead(HostId),
    /// The SAN cannot be reached from a host.
    CutSan(HostId),
    /// The SAN has no power.
    LoseSan,
    /// The SAN's management is slow.
    SlowSan,
}

/// What an operator asks for.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Command(Box<Command>),
    ConfirmDead(HostName),
    Fence(HostName),
}

impl Op {
    pub(crate) fn command(command: Command) -> Self {
        Self::Command(Box::new(command))
    }
}

/// A fault that waits for a step of a migration.
#[derive(Debug, Clone)]
pub(crate) struct Trigger {
    pub(crate) vm: VmName,
    pub(crate) step: String,
    pub(crate) fault: Fault,
    pub(crate) lasts: u64,
}

/// The source of trouble.
#[derive(Debug, Default)]
pub(crate) struct Chaos {
    pub(crate) until: u64,
    pub(crate) triggers: Vec<Trigger>,
    pub(crate) cancels: Vec<(VmName, String)>,
    next_name: u64,
}

impl World {
    /// A fault begins and is mended after `lasts`.
    pub(crate) fn inject(&mut self, fault: Fault, lasts: u64, delay: u64) {
        self.after(delay, Event::World(W::Fault(fault)));
        self.after(delay + lasts, Event::World(W::Mend(fault)));
    }

    pub(crate) fn begin_fault(&mut self, fault: Fault) {
        let text = self.fault_text(fault);
        self.note(|| format!("fault: {text}"));
        match fault {
            Fault::CutOneWay(a, b) => self.net.hold(a, b, true),
            Fault::CutLink(a, b) => self.cut(a, b, true),
            Fault::CutHost(host) => self.cut_host(host, true),
            Fault::SlowLink(a, b, ms) => self.slow_link(a, b, ms),
            Fault::Loss => {
                self.net.loss_permille = 100;
                self.net.duplicate_permille = 50;
            }
            Fault::PauseDaemon(host, ms) => {
                let until = self.now + ms * MS;
                let at = &mut self.hosts[host];
                at.daemon_stopped_until = at.daemon_stopped_until.max(until);
            }
            Fault::PauseGuard(host, ms) => {
                let until = self.now + ms * MS;
                let at = &mut self.hosts[host];
                at.guard_stopped_until = at.guard_stopped_until.max(until);
            }
            Fault::PauseHost(host, ms) => {
                let until = self.now + ms * MS;
                let at = &mut self.hosts[host];
                // Without a hardware watchdog a machine that stands still is beyond any promise.
                if at.watchdog.is_some() {
                    at.stopped_until = at.stopped_until.max(until);
                }
            }
            Fault::KillDaemon(host) => self.kill_daemon(host),
            Fault::KillGuard(host) => self.hosts[host].guard = None,
            Fault::PowerCut(host) => self.power_cut(host),
            Fault::DiskSlow(host) => self.hosts[host].disk_slow = true,
            Fault::ApplySlow(host) => self.hosts[host].apply_slow = true,
            Fault::StorageLost(host) => {
                self.hosts[host].storage_lost = true;
                self.refresh_report(host);
            }
            Fault::CrashQemu(proc) => self.crash_qemu(proc),
            Fault::BmcDead(host) => self.bmcs[host].dead = true,
            Fault::CutSan(host) => {
                self.san.hold(host, true);
                self.refresh_report(host);
            }
            Fault::LoseSan => {
                let now = self.now;
                self.san.off_since.get_or_insert(now);
                self.refresh_reports();
            }
            Fault::SlowSan => self.san.slow += 1,
        }
    }

    pub(crate) fn mend(&mut self, fault: Fault) {
        match fault {
            Fault::CutOneWay(a, b) => self.net.hold(a, b, false),
            Fault::CutLink(a, b) => self.cut(a, b, false),
            Fault::CutHost(host) => self.cut_host(host, false),
            Fault::SlowLink(a, b, _) => self.slow_link(a, b, 0),
            Fault::Loss => {
                self.net.loss_permille = 0;
                self.net.duplicate_permille = 3;
            }
            Fault::KillDaemon(host) => self.start_daemon(host),
            Fault::PowerCut(host) => self.power_on(host),
            Fault::DiskSlow(host) => self.hosts[host].disk_slow = false,
            Fault::ApplySlow(host) => self.hosts[host].apply_slow = false,
            Fault::StorageLost(host) => {
                self.hosts[host].storage_lost = false;
                self.refresh_report(host);
            }
            Fault::BmcDead(host) => self.bmcs[host].dead = false,
            Fault::CutSan(host) => {
                self.san.hold(host, false);
                self.refresh_report(host);
            }
            Fault::LoseSan => {
                self.san.off_since = None;
                self.refresh_reports();
            }
            Fault::SlowSan => self.san.slow = self.san.slow.saturating_sub(1),
            Fault::PauseDaemon(..)
            | Fault::PauseGuard(..)
            | Fault::PauseHost(..)
            | Fault::KillGuard(_)
            | Fault::CrashQemu(_) => return,
        }
        let text = self.fault_text(fault);
        self.note(|| format!("mended: {text}"));
    }

    fn fault_text(&self, fault: Fault) -> String {
        let h = |host: HostId| self.hosts[host].name.to_string();
        match fault {
            Fault::CutOneWay(a, b) => format!("no packet from {} to {}", h(a), h(b)),
            Fault::CutLink(a, b) => format!("no link between {} and {}", h(a), h(b)),
            Fault::CutHost(host) => format!("{} is cut off", h(host)),
            Fault::SlowLink(a, b, ms) => format!("{ms} ms between {} and {}", h(a), h(b)),
            Fault::Loss => "packets are lost".into(),
            Fault::PauseDaemon(host, ms) => format!("daemon of {} stopped for {ms} ms", h(host)),
            Fault::PauseGuard(host, ms) => format!("guard of {} stopped for {ms} ms", h(host)),
            Fault::PauseHost(host, ms) => format!("{} stands still for {ms} ms", h(host)),
            Fault::KillDaemon(host) => format!("daemon of {} killed", h(host)),
            Fault::KillGuard(host) => format!("guard of {} killed", h(host)),
            Fault::PowerCut(host) => format!("power of {}", h(host)),
            Fault::DiskSlow(host) => format!("slow disk of {}", h(host)),
            Fault::ApplySlow(host) => format!("lagging replica of {}", h(host)),
            Fault::StorageLost(host) => format!("{} has lost the storage", h(host)),
            Fault::BmcDead(host) => format!("fence device of {}", h(host)),
            Fault::CutSan(host) => format!("{} does not reach the SAN", h(host)),
            Fault::LoseSan => "the SAN has no power".into(),
            Fault::SlowSan => "the SAN's management is slow".into(),
            Fault::CrashQemu(proc) => {
                let vm = self.guests.get(&proc).map(|guest| guest.vm.to_string());
                format!("QEMU of {}", vm.unwrap_or_else(|| "nobody".into()))
            }
        }
    }

    fn refresh_reports(&mut self) {
        for host in 0..self.hosts.len() {
            self.refresh_report(host);
        }
    }

    fn cut(&mut self, a: HostId, b: HostId, down: bool) {
        self.net.hold(a, b, down);
        self.net.hold(b, a, down);
    }

    fn cut_host(&mut self, host: HostId, down: bool) {
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.cut(host, other, down);
        }
    }

    fn slow_link(&mut self, a: HostId, b: HostId, ms: u64) {
        let n = self.hosts.len();
        self.net.slow[a * n + b] = ms * MS;
        self.net.slow[b * n + a] = ms * MS;
    }

    /// A migration has come to a step.
    pub(crate) fn step_hook(&mut self, proc: ProcId, step: &str) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let vm = guest.vm.clone();
        let id = self.migration_of_proc(proc);
        self.trace(|| format!("{vm}: migration {id:?}: {step}"));
        let fired = |trigger: &Trigger| trigger.vm == vm && trigger.step == step;
        let due: Vec<Trigger> = self
            .chaos
            .triggers
            .iter()
            .filter(|t| fired(t))
            .cloned()
            .collect();
        self.chaos.triggers.retain(|trigger| !fired(trigger));
        for trigger in due {
            self.inject(trigger.fault, trigger.lasts, MS / 10);
        }
        let cancel = self
            .chaos
            .cancels
            .iter()
            .position(|(v, s)| *v == vm && s == step);
        if let Some(at) = cancel {
            self.chaos.cancels.remove(at);
            self.operate(Op::command(Command::CancelMove { vm: vm.clone() }));
        }
        if self.now < self.chaos.until && self.rng.chance(self.setup.step_fault_permille) {
            let host = self.partner(proc);
            let fault = match self.rng.below(7) {
                0 => Fault::PowerCut(host),
                1 | 2 => Fault::KillDaemon(host),
                3 => Fault::PauseDaemon(host, self.rng.range(50, 8000)),
                4 => Fault::CutHost(host),
                5 => self
                    .any_guest(Some(&vm))
                    .map_or(Fault::Loss, Fault::CrashQemu),
                _ => self.leading().map_or(Fault::Loss, Fault::KillDaemon),
            };
            let delay = self.rng.range(0, 30) * MS;
            let lasts = self.rng.range(100, 9000) * MS;
            self.inject(fault, lasts, delay);
        }
    }

    /// Source or target of a migration.
    fn partner(&mut self, proc: ProcId) -> HostId {
        let Some(guest) = self.guests.get(&proc) else {
            return 0;
        };
        let vm = guest.vm.clone();
        let hosts: Vec<HostId> = self
            .guests
            .values()
            .filter(|guest| guest.vm == vm)
            .map(|guest| guest.host)
            .collect();
        self.rng.pick(&hosts).copied().unwrap_or(0)
    }

    fn any_guest(&mut self, vm: Option<&VmName>) -> Option<ProcId> {
        let guests = self.guests.iter().filter(|(_, guest)| {
            vm.is_none_or(|vm| guest.vm == *vm) && guest.vcpu != Vcpu::Starting
        });
        let guests: Vec<ProcId> = guests.map(|(proc, _)| *proc).collect();
        self.rng.pick(&guests).copied()
    }

    pub(crate) fn next_fault(&mut self) {
        if self.now >= self.chaos.until {
            return;
        }
        let every = self.setup.fault_every;
        // In a calm run one outage is over, and its traces are gone, before the next begins.
        let least = if self.setup.profile == Profile::Calm {
            5 * SEC
        } else {
            every / 10
        };
        let wait = self.rng.range(least, every * 2).max(MS);
        self.after(wait, Event::World(W::NextFault));
        let host = self.rng.index(self.hosts.len());
        let other = (host + 1 + self.rng.index(self.hosts.len() - 1)) % self.hosts.len();
        let (fault, lasts) = match self.setup.profile {
            Profile::Calm => self.calm_fault(host, other),
            Profile::Network => self.network_fault(host, other),
            Profile::Crash => self.crash_fault(host),
            Profile::Slow => self.slow_fault(host, other),
            _ => match self.rng.below(3) {
                0 => self.network_fault(host, other),
                1 => self.crash_fault(host),
                _ => self.slow_fault(host, other),
            },
        };
        let left = (self.chaos.until - self.now).max(100 * MS);
        if self.setup.san && self.setup.profile != Profile::Calm && self.rng.chance(350) {
            return self.san_fault(host, left);
        }
        self.inject(fault, lasts.min(left), 0);
    }

    /// Something at the SAN, or a host that nobody hears and whose own safeguards hang.
    fn san_fault(&mut self, host: HostId, left: u64) {
        let lasts = (self.rng.range(1, 20) * SEC).min(left);
        let ms = lasts / MS;
        let all: &[Fault] = match self.rng.below(9) {
            0 | 1 => &[Fault::CutSan(host)],
            2 => &[Fault::LoseSan],
            3 => &[Fault::SlowSan],
            4 => &[Fault::CutHost(host), Fault::SlowSan],
            5 => &[Fault::CutHost(host), Fault::PauseGuard(host, ms)],
            6 => &[
                Fault::PauseDaemon(host, ms),
                Fault::PauseGuard(host, ms),
                Fault::SlowSan,
            ],
            7 => &[
                Fault::CutHost(host),
                Fault::PauseGuard(host, 2 * ms),
                Fault::PauseDaemon(host, 2 * ms),
            ],
            _ => &[Fault::PauseDaemon(host, ms), Fault::PauseGuard(host, ms)],
        };
        for fault in all {
            self.inject(*fault, lasts, 0);
        }
    }

    /// Shorter than lease - heartbeat - freeze_before, one at a time.
    fn calm_fault(&mut self, host: HostId, other: HostId) -> (Fault, u64) {
        let t = self.setup.timings;
        let longest = (t.duration.0 - t.heartbeat.0 - t.freeze_before.0) * 8 / 10;
        let ms = self.rng.range(50, longest);
        let fault = match self.rng.below(5) {
            0 => Fault::CutHost(host),
            1 => Fault::CutLink(host, other),
            2 => Fault::CutOneWay(host, other),
            3 => Fault::PauseDaemon(host, ms),
            _ => Fault::KillDaemon(host),
        };
        (fault, ms * MS)
    }

    fn network_fault(&mut self, host: HostId, other: HostId) -> (Fault, u64) {
        let short = self.rng.range(50, 2500) * MS;
        let long = self.rng.range(2, 20) * SEC;
        let lasts = if self.rng.chance(500) { short } else { long };
        let fault = match self.rng.below(10) {
            0..=2 => Fault::CutHost(host),
            3 | 4 => Fault::CutLink(host, other),
            5 => Fault::CutOneWay(host, other),
            6 => Fault::SlowLink(host, other, self.rng.range(20, 1200)),
            7 => Fault::Loss,
            8 => self.leading().map_or(Fault::Loss, Fault::CutHost),
            _ => Fault::BmcDead(host),
        };
        (fault, lasts)
    }

    fn crash_fault(&mut self, host: HostId) -> (Fault, u64) {
        let quick = self.rng.range(50, 4000) * MS;
        let slow = self.rng.range(3, 30) * SEC;
        match self.rng.below(10) {
            0 | 1 => (Fault::PowerCut(host), slow),
            2 => {
                let leader = self.leading().unwrap_or(host);
                (Fault::PowerCut(leader), slow)
            }
            3..=5 => (Fault::KillDaemon(host), quick),
            6 => {
                let leader = self.leading().unwrap_or(host);
                (Fault::KillDaemon(leader), quick)
            }
            7 => (Fault::KillGuard(host), quick),
            _ => (
                self.any_guest(None).map_or(Fault::Loss, Fault::CrashQemu),
                quick,
            ),
        }
    }

    fn slow_fault(&mut self, host: HostId, other: HostId) -> (Fault, u64) {
        let lasts = self.rng.range(1, 12) * SEC;
        let ms = self.rng.range(20, 8000);
        let fault = match self.rng.below(9) {
            0 | 1 => Fault::PauseDaemon(host, ms),
            2 => Fault::PauseGuard(host, self.rng.range(20, 3000)),
            3 => Fault::PauseHost(host, self.rng.range(20, 3000)),
            4 => Fault::DiskSlow(host),
            5 | 6 => Fault::ApplySlow(host),
            7 => Fault::StorageLost(host),
            _ => Fault::SlowLink(host, other, self.rng.range(100, 2500)),
        };
        (fault, lasts)
    }

    pub(crate) fn next_op(&mut self) {
        if self.now >= self.chaos.until {
            return;
        }
        let every = self.setup.op_every;
        let wait = self.rng.range(every / 5, every * 2).max(MS);
        self.after(wait, Event::World(W::NextOp));
        if let Some(op) = self.random_op() {
            self.operate(op);
        }
    }

    fn random_op(&mut self) -> Option<Op> {
        let state = self.newest();
        let vms: Vec<VmName> = state.vms.keys().cloned().collect();
        let vm = self.rng.pick(&vms)?.clone();
        let names: Vec<HostName> = state.hosts.keys().cloned().collect();
        let host = self.rng.pick(&names)?.clone();
        let draw = match self.setup.profile {
            Profile::Migration => self.rng.below(16) + 6,
            // Nobody switches a host off here.
            Profile::Calm => self.rng.below(13),
            _ => self.rng.below(20),
        };
        let command = match draw {
            0 | 1 => power(vm, Power::Stopped, StopMode::Graceful),
            2 => power(vm, Power::Stopped, StopMode::Hard),
            3 | 4 => power(vm, Power::Running, StopMode::Graceful),
            5 => Command::DeleteVm { vm },
            6 | 7 => return self.apply_vm(),
            8 => Command::CancelMove { vm },
            9 | 10 => mode(host, HostMode::Draining),
            11 | 12 => mode(host, HostMode::Active),
            13 => return self.dead_host().map(Op::ConfirmDead),
            14 => {
                let device = state.settings().fencing.contains_key(&host);
                return device.then_some(Op::Fence(host));
            }
            _ => {
                let to = self.rng.chance(700).then_some(host);
                Command::RequestMove { vm, to }
            }
        };
        Some(Op::command(command))
    }

    /// A host that is off; it stays off for a while.
    fn dead_host(&mut self) -> Option<HostName> {
        let host = self
            .hosts
            .iter()
            .position(|host| !host.on && !host.witness)?;
        self.hosts[host].held_off = true;
        self.revive_later(host);
        Some(self.hosts[host].name.clone())
    }

    pub(crate) fn revive_later(&mut self, host: HostId) {
        let delay = self.rng.range(10, 40) * SEC;
        self.after(delay, Event::World(W::Revive(host)));
    }

    /// A new VM, or all those that were deleted.
    fn apply_vm(&mut self) -> Option<Op> {
        let mut manifest = Manifest::default();
        if self.rng.chance(400) && self.newest().vms.len() < 9 {
            self.chaos.next_name += 1;
            let name = format!("new{}", self.chaos.next_name);
            let mut spec = crate::setup::vm_spec(&name, 512);
            if self.setup.san && self.rng.chance(500) {
                crate::setup::on_san(&mut spec, &name, 1);
            }
            manifest.vms.insert(VmName::new(name).ok()?, spec);
        } else {
            manifest = self.setup.manifest.clone();
        }
        Some(Op::command(Command::ApplyManifest {
            base: None,
            manifest,
        }))
    }

    pub(crate) fn operate(&mut self, op: Op) {
        let Some(leader) = self.leading() else {
            return self.trace(|| "operator: nobody leads".into());
        };
        match op {
            Op::Command(command) => {
                let what = format!("{command:?}");
                self.trace(|| format!("operator: {what}"));
                self.propose(leader, "operator", *command, Purpose::Operator(what));
            }
            Op::ConfirmDead(name) => self.confirm_dead(leader, &name),
            Op::Fence(name) => {
                let now = self.hosts[leader].local(self.now);
                let Some(host) = self.host_id(&name) else {
                    return;
                };
                if self.seal_on(leader, &name, now) && self.may_fence(leader, host) {
                    self.begin_fencing(leader, host);
                }
            }
        }
    }

    fn seal_on(&mut self, leader: HostId, name: &HostName, now: Instant) -> bool {
        let daemon = self.hosts[leader].daemon.as_mut();
        let Some(leases) = daemon.and_then(|daemon| daemon.leader.leases.as_mut()) else {
            return false;
        };
        leases.table.seal(name);
        leases.sealed_at.insert(name.clone(), now);
        true
    }

    fn confirm_dead(&mut self, leader: HostId, name: &HostName) {
        let now = self.hosts[leader].local(self.now);
        let lease = self.setup.timings.duration;
        let daemon = self.hosts[leader].daemon.as_ref();
        let leases = daemon.and_then(|daemon| daemon.leader.leases.as_ref());
        let heard = leases.and_then(|leases| leases.table.heard(name));
        if heard.is_some_and(|at| now.since(at) <= lease) {
            return;
        }
        let evidence = Evidence::Operator {
            who: "operator".into(),
        };
        let proof = FenceProof::from_evidence(name.clone(), evidence);
        if self.seal_on(leader, name, now)
            && let (Ok(proof), Some(daemon)) = (proof, self.hosts[leader].daemon.as_mut())
        {
            daemon.leader.operator_proofs.insert(name.clone(), proof);
            self.note(|| format!("operator: {name} is confirmed dead"));
            self.request_round(leader, 0);
        }
    }

    /// The time of faults is over: everything is mended.
    pub fn heal(&mut self) {
        self.note(|| "everything is mended".into());
        self.setup.start_fail_permille = 0;
        self.setup.freeze_fail_permille = 0;
        self.setup.ack_lost_permille = 0;
        self.net.heal();
        self.san.heal();
        for host in 0..self.hosts.len() {
            let at = &mut self.hosts[host];
            at.disk_slow = false;
            at.apply_slow = false;
            at.storage_lost = false;
            at.held_off = false;
            self.bmcs[host].dead = false;
            self.bmcs[host].fail_permille = 0;
            self.power_on(host);
            self.start_daemon(host);
            self.refresh_report(host);
        }
    }
}

fn power(vm: VmName, power: Power, mode: StopMode) -> Command {
    Command::SetPower { vm, power, mode }
}

fn mode(host: HostName, mode: HostMode) -> Command {
    Command::SetHostMode { host, mode }
}
