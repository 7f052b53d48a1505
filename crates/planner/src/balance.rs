//! Evening out load: moves that nobody needs, but that make the fullest host less full.
//!
//! ```text
//! calm? --no--> nothing, and why
//!   yes --> fullest host first: gain = its load now - the fuller of the two afterwards
//!           gain >= min_gain + cost, soft wishes not worse --> one move (auto) or all of them as advice
//! ```
//! Always holds: a move takes at least `min_gain_percent` of a host off the fuller one, beside what it
//! costs (one percent for each minute that it will take), so no move is ever undone by the next; only
//! live migrations, at most one unit at a time, so many in an hour; no rule is broken, hard or soft;
//! nothing is moved while a host is silent, draining or unheard, or while any VM is on its way. It
//! comes to rest: each move makes the sorted list of loads smaller, the fullest host first.
//!
//! Load is what guests are defined with: memory, or virtual CPUs against
//! [`crate::CPU_OVERCOMMIT`] for each thread, whichever is more.

use crate::fit::Query;
use crate::moves::Unit;
use crate::room::{CPUS, MEMORY};
use crate::work::{Own, Work};
use crate::{CPU_OVERCOMMIT, Input};
use quorate_membership::HostHealth;
use quorate_state::{HostMode, OrderKind, Reason};
use quorate_types::{BalancingMode, HostName, Millis, VmName, VmPhase};
use serde::{Deserialize, Serialize};

/// How the reason of a balancing move begins: the leader counts them by it.
pub(crate) const PREFIX: &str = "balancing: ";
/// Memory sent in a second, for the cost of a move.
const MIB_PER_S: u64 = 110;
/// Most moves that are advised at once.
const MAX_ADVICE: usize = 20;
/// Hosts that are looked at as the fuller side, and as the emptier side, of one move.
const SIDES: usize = 8;

/// What would even out load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// Whether it is done.
    pub mode: BalancingMode,
    /// Why nothing is moved now; absent: it would be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked: Option<String>,
    /// Moves left of this hour's budget.
    pub left_this_hour: u32,
    /// Moves worth making, one after the other.
    pub moves: Vec<Advice>,
    /// Load of each host now and after these moves.
    pub hosts: Vec<HostLoad>,
}

/// A move worth making.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// The VM, and those that are kept with it.
    pub vms: Vec<VmName>,
    /// From here.
    pub from: HostName,
    /// To here.
    pub to: HostName,
    /// What it takes off the fuller host, in percent of a host.
    pub gain_percent: u32,
    /// How long it will take.
    pub takes: Millis,
    /// Why, one sentence.
    pub why: String,
}

/// How full a host is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLoad {
    /// Which.
    pub host: HostName,
    /// Now, in percent.
    pub now_percent: u32,
    /// After the moves, in percent.
    pub then_percent: u32,
}

impl Balance {
    /// One sentence for the status page, where advice is asked for and there is any.
    #[must_use]
    pub fn headline(&self) -> Option<String> {
        if self.mode != BalancingMode::Advise || self.moves.is_empty() {
            return None;
        }
        let fullest = self.hosts.iter().max_by_key(|host| host.now_percent)?;
        let moves = match self.moves.len() {
            1 => "1 live migration".to_owned(),
            n => format!("{n} live migrations"),
        };
        Some(format!(
            "{} is {} % full; {moves} would even that out: `quorate plan --balance`",
            fullest.host, fullest.now_percent
        ))
    }
}

/// What would even out load now, whatever the mode.
#[must_use]
pub fn balance(input: &Input<'_>) -> Balance {
    let mut work = Work::new(input, false);
    let now: Vec<(usize, u64)> = hosts(&work).map(|at| (at, load(&work, at, 0, 0))).collect();
    let mut moves = Vec::new();
    let blocked = not_calm(&work);
    if blocked.is_none() {
        while moves.len() < MAX_ADVICE {
            let Some(found) = best(&work, false) else {
                break;
            };
            moves.push(advice(&work, &found));
            for vm in found.unit.vms() {
                let own = Own::Owned {
                    host: found.to,
                    epoch: owned_epoch(&work, vm),
                    order: OrderKind::Run,
                };
                work.set_own(vm, own, |vm| vm.touched = true);
            }
        }
    }
    let percent = |permille: u64| u32::try_from(permille.div_ceil(10)).unwrap_or(u32::MAX);
    let loads = now.into_iter().map(|(at, permille)| HostLoad {
        host: work.hosts[at].name.clone(),
        now_percent: percent(permille),
        then_percent: percent(load(&work, at, 0, 0)),
    });
    Balance {
        mode: work.settings.balancing.mode,
        blocked,
        left_this_hour: left(&work),
        moves,
        hosts: loads.collect(),
    }
}

/// The planner's last step: one move, when nothing else is to be done.
pub(crate) fn run(work: &mut Work<'_>) {
    let wanted = work.settings.balancing.mode == BalancingMode::Auto;
    if !wanted || !work.actions.is_empty() || left(work) == 0 || not_calm(work).is_some() {
        return;
    }
    let Some(found) = best(work, true) else {
        return;
    };
    if work.no_slots(&found.unit, found.to).is_some() {
        return;
    }
    let told = advice(work, &found);
    let reason = Reason {
        evidence: vec![format!(
            "it takes {} % off the fuller host and about {} s; {} more moves in this hour",
            told.gain_percent,
            told.takes.0.div_ceil(1000),
            left(work).saturating_sub(1)
        )],
        ..Reason::new(format!("{PREFIX}{}", told.why))
    };
    work.depart(&found.unit, found.to, &reason);
}

fn owned_epoch(work: &Work<'_>, vm: usize) -> Option<quorate_types::Epoch> {
    match work.vms[vm].own {
        Own::Owned { epoch, .. } => epoch,
        _ => None,
    }
}

fn left(work: &Work<'_>) -> u32 {
    let made = work.input.memory.balanced(work.input.now);
    work.settings.balancing.moves_per_hour.saturating_sub(made)
}

fn hosts<'w>(work: &'w Work<'_>) -> impl Iterator<Item = usize> + 'w {
    (0..work.hosts.len()).filter(|at| work.hosts[*at].good())
}

/// Why this is no time to move anything, if it is not.
fn not_calm(work: &Work<'_>) -> Option<String> {
    if !work.may_place() {
        return Some("this leader is new and waits to hear from all hosts".to_owned());
    }
    for host in work.hosts.iter() {
        let Some(record) = host.record else { continue };
        match record.mode {
            HostMode::Maintenance => {}
            HostMode::Draining => return Some(format!("{} is being drained", host.name)),
            HostMode::Active if host.health != Some(HostHealth::Up) => {
                return Some(format!("{} is not up", host.name));
            }
            HostMode::Active if host.report.is_none() => {
                return Some(format!("{} has not reported yet", host.name));
            }
            HostMode::Active => {}
        }
    }
    (0..work.vms.len()).find_map(|vm| not_settled(work, vm))
}

/// Why a VM is on its way, if it is.
fn not_settled(work: &Work<'_>, vm: usize) -> Option<String> {
    let seen = &work.vms[vm];
    let name = seen.name;
    let asked = seen.record.move_request.is_some();
    match seen.own {
        Own::Free if seen.wanted => Some(format!("{name} shall run and does not")),
        Own::Free => None,
        Own::Migrating(_) => Some(format!("{name} is moving")),
        _ if asked => Some(format!("{name} is to be moved")),
        Own::Owned {
            order: OrderKind::Stop(_),
            ..
        } => Some(format!("{name} is being stopped")),
        Own::Owned { host, epoch, .. } => {
            let report = work.report(vm, host);
            let here = report.filter(|report| Some(report.epoch) == epoch || seen.touched);
            let starts = here.is_none_or(|report| {
                matches!(
                    report.phase,
                    VmPhase::Absent | VmPhase::Starting | VmPhase::Frozen
                )
            });
            starts.then(|| format!("{name} is being started"))
        }
    }
}

/// Load of a host in permille, with so much more (or, negative, less) on it.
fn load(work: &Work<'_>, at: usize, bytes: i128, cpus: i128) -> u64 {
    let share =
        |used: i128, all: i128| u64::try_from(used.max(0) * 1000 / all.max(1)).unwrap_or(u64::MAX);
    let (used, have) = (work.room.used(at), work.room.have(at));
    let memory = share(i128::from(used[MEMORY]) + bytes, i128::from(have[MEMORY]));
    let all = i128::from(work.hosts[at].threads) * i128::from(CPU_OVERCOMMIT);
    memory.max(share(i128::from(used[CPUS]) + cpus, all))
}

struct Found {
    unit: Unit,
    to: usize,
    gain: u64,
    cost: u64,
    /// Loads of both sides, before and after.
    loads: [(u64, u64); 2],
}

/// The move that gains most beside its cost. `paced`: leave alone what was moved within the hour.
fn best(work: &Work<'_>, paced: bool) -> Option<Found> {
    let mut by_load: Vec<(u64, usize)> = hosts(work).map(|at| (load(work, at, 0, 0), at)).collect();
    by_load.sort_by_key(|(load, at)| (std::cmp::Reverse(*load), *at));
    let min = u64::from(work.settings.balancing.min_gain_percent) * 10;
    for (full, from) in by_load.iter().copied().take(SIDES) {
        let empty = by_load.iter().rev().copied().take(SIDES);
        let targets: Vec<usize> = empty
            .filter(|(load, at)| *at != from && load + min <= full)
            .map(|(_, at)| at)
            .collect();
        let mut found: Option<Found> = None;
        for vm in (0..work.vms.len()).filter(|vm| work.vms[*vm].own.on(from)) {
            let Some(unit) = movable(work, vm, paced) else {
                continue;
            };
            for to in &targets {
                let Some(new) = judge(work, &unit, full, *to, min) else {
                    continue;
                };
                let better = |old: &Found| {
                    let worth = |found: &Found| found.gain.saturating_sub(found.cost);
                    worth(&new) > worth(old)
                };
                if found.as_ref().is_none_or(better) {
                    found = Some(new);
                }
            }
        }
        if found.is_some() {
            return found;
        }
    }
    None
}

/// A unit that may be moved just to even out load.
fn movable(work: &Work<'_>, vm: usize, paced: bool) -> Option<Unit> {
    let unit = work.unit(vm)?;
    let (memory, now) = (work.input.memory, work.input.now);
    let first = unit.with.iter().all(|other| *other > vm);
    let wanted = unit
        .vms()
        .all(|vm| work.vms[vm].wanted && !work.vms[vm].touched);
    let rests = unit.vms().all(|vm| {
        let name = work.vms[vm].name;
        let failed = memory.move_after(name).is_some_and(|at| at > now);
        let lately = paced && memory.balanced_lately(name, now);
        !failed && !lately
    });
    (first && wanted && rests && unit.live()).then_some(unit)
}

/// What a unit would gain on a host; `None`: not enough, or it may not go there.
fn judge(work: &Work<'_>, unit: &Unit, full: u64, to: usize, min: u64) -> Option<Found> {
    let needs = work.room.sum(unit.vms());
    let bytes = needs[MEMORY];
    let cpus = i128::from(needs[CPUS]);
    let (bytes, seconds) = (i128::from(bytes), (bytes >> 20) / MIB_PER_S);
    let (left, there) = (
        load(work, unit.from, -bytes, -cpus),
        load(work, to, bytes, cpus),
    );
    let gain = full.saturating_sub(left.max(there));
    // A minute of copying is worth one percent of a host.
    let cost = seconds / 6;
    if gain < min + cost {
        return None;
    }
    let query = Query {
        vm: unit.vm,
        with: &unit.with,
        from: Some(unit.from),
        live: true,
        moves: true,
        ..Query::default()
    };
    work.fit(&query, to).ok()?;
    // Soft wishes: where it would be placed now it must not be worse off.
    let ask = work.ask(&query);
    let value = |at: usize| work.score(&query, &ask, at).total;
    if value(to) < value(unit.from) {
        return None;
    }
    Some(Found {
        unit: work.unit(unit.vm)?,
        to,
        gain,
        cost,
        loads: [(full, left), (load(work, to, 0, 0), there)],
    })
}

fn advice(work: &Work<'_>, found: &Found) -> Advice {
    let (from, to) = (work.hosts[found.unit.from].name, work.hosts[found.to].name);
    let vms: Vec<VmName> = found
        .unit
        .vms()
        .map(|vm| work.vms[vm].name.clone())
        .collect();
    let bytes = work.room.sum(found.unit.vms())[MEMORY];
    let [(full, left), (empty, there)] = found.loads;
    let percent = |permille: u64| permille.div_ceil(10);
    Advice {
        why: format!(
            "{from} is {} % full and {to} {} %; then they are {} % and {} %",
            percent(full),
            percent(empty),
            percent(left),
            percent(there)
        ),
        vms,
        from: from.clone(),
        to: to.clone(),
        gain_percent: u32::try_from(found.gain / 10).unwrap_or(u32::MAX),
        takes: Millis(1000 + (bytes >> 20) * 1000 / MIB_PER_S),
    }
}
