//! What became of each migration.
//!
//! ```text
//!                      target says Arrived ------------------------------> Arrived
//!                      source says Failed -------------------------------> StayedAtSource
//!                      both sides proven gone ---------------------------> Release (both proofs)
//!  target said Failed: source before the switchover -> cancel, wait -----> StayedAtSource
//!                      otherwise ----------------------------------------> RefusedByTarget
//!  target proven gone: source before the switchover ---------------------> TargetDead, goes on
//!                      source past it -> TargetDead and power off: its memory may be older than its disk
//!                      source not to be heard ---------------------------> wait
//!                      disks are the hosts' own, source past it ---------> TargetLost, only the target's disk counts
//!                      ..., before it: cancel, wait for its word --------> StayedAtSource
//!  disks are the hosts' own, target silent or copy lost ----------------> cancel: the guest's writes wait for it
//!  source proven gone: target has said nothing -> cancel, wait for its word
//! ```
//! Always holds: only a report that names this migration's id counts; what has arrived is adopted
//! and never undone; ownership goes back to the source only when the target surely does not have it.
//!
//! Why a source past the switchover is not resumed after the death of a target that said nothing:
//! the target may have run for a moment and written to the disk. Resuming older memory on a newer
//! disk loses acknowledged writes (**nothing-lost**), so the guest is started anew from its disk.

use crate::work::{Moving, Own, Work};
use quorate_membership::{FenceProof, HostHealth};
use quorate_state::{MigrationEnd, Reason, StopMode};
use quorate_types::report::{MigrationOutcome, MirrorPhase, MirrorReport};
use quorate_types::{MigrationId, VmPhase, VmReport};

pub(crate) fn run(work: &mut Work<'_>) {
    for vm in 0..work.vms.len() {
        if let Own::Migrating(moving) = work.vms[vm].own {
            let Some(id) = moving.id else { continue };
            let verdict = judge(&Sides::of(work, vm, id, moving));
            settle(work, vm, moving, verdict);
        }
    }
}

/// Everything that is known of both sides.
#[derive(Debug, Default)]
struct Sides {
    source_up: bool,
    source_phase: Option<VmPhase>,
    source_said: Option<MigrationOutcome>,
    /// The source has begun to hand it over.
    switchover: bool,
    source_proof: Option<FenceProof>,
    target_said: Option<MigrationOutcome>,
    target_proof: Option<FenceProof>,
    downtime_ms: Option<u64>,
    cancelled: bool,
    cancel_ignored: bool,
    stuck: Option<&'static str>,
    /// Disks are the hosts' own: a guest that goes back also goes back to another disk.
    own: bool,
    /// Writes wait for the target's copy, which does not answer.
    held_up: Option<&'static str>,
}

/// What follows.
#[derive(Debug, PartialEq)]
enum Verdict {
    Arrived(Option<u64>),
    Stayed,
    Refused,
    TargetLost { proof: FenceProof, anew: bool },
    Release(Vec<FenceProof>),
    Cancel(&'static str),
    Wait(&'static str),
}

impl Sides {
    fn of(work: &Work<'_>, vm: usize, id: MigrationId, moving: Moving) -> Self {
        let (source, target) = (work.report(vm, moving.from), work.report(vm, moving.to));
        let said = |report: Option<&VmReport>| {
            let seen = report?.migration.as_ref()?;
            (seen.id == id).then_some((seen.outcome, seen.downtime_ms))
        };
        let (memory, now) = (work.input.memory, work.input.now);
        let name = work.vms[vm].name;
        let downtime = |report| said(report).and_then(|(_, downtime)| downtime);
        Self {
            source_up: work.hosts[moving.from].up,
            source_phase: source.map(|report| report.phase),
            source_said: said(source).map(|(outcome, _)| outcome),
            switchover: source
                .and_then(|report| report.migration.as_ref())
                .is_some_and(|seen| seen.id == id && seen.switchover),
            source_proof: work.proof(vm, moving.from, moving.epoch),
            target_said: said(target).map(|(outcome, _)| outcome),
            target_proof: work.proof(vm, moving.to, moving.target_epoch),
            downtime_ms: downtime(target).or_else(|| downtime(source)),
            cancelled: moving.cancel,
            cancel_ignored: memory.cancel_ignored(name, id, now),
            stuck: memory.stuck(name, id, now),
            own: work
                .input
                .state
                .own_disks(work.vms[vm].spec)
                .next()
                .is_some(),
            held_up: held_up(work, vm, moving),
        }
    }

    /// The source has handed the guest over and does not resume it by itself.
    fn past_switchover(&self) -> bool {
        (self.own && self.switchover)
            || self.source_phase == Some(VmPhase::HandedOver)
            || self.source_said == Some(MigrationOutcome::Sent)
    }

    /// The source may still be sending: it ends that by itself, and says so.
    fn may_be_sending(&self) -> bool {
        let gone = matches!(self.source_phase, Some(VmPhase::Absent | VmPhase::BackOff));
        !gone && !self.past_switchover()
    }

    fn cancel_or(&self, cancel: &'static str, wait: &'static str) -> Verdict {
        if self.cancelled {
            Verdict::Wait(wait)
        } else {
            Verdict::Cancel(cancel)
        }
    }
}

fn judge(sides: &Sides) -> Verdict {
    if sides.target_said == Some(MigrationOutcome::Arrived) {
        return Verdict::Arrived(sides.downtime_ms);
    }
    if sides.source_said == Some(MigrationOutcome::Failed) {
        return Verdict::Stayed;
    }
    if let (Some(source), Some(target)) = (&sides.source_proof, &sides.target_proof) {
        return Verdict::Release(vec![source.clone(), target.clone()]);
    }
    if sides.target_said == Some(MigrationOutcome::Failed) {
        let waits = sides.source_up && sides.source_proof.is_none() && sides.may_be_sending();
        if waits && !sides.cancel_ignored {
            return sides.cancel_or(
                "its target gave up",
                "the source ends it after its target gave up",
            );
        }
        return Verdict::Refused;
    }
    if let Some(proof) = &sides.target_proof {
        return target_gone(sides, proof);
    }
    if sides.source_proof.is_some() {
        return sides.cancel_or(
            "its source is gone and the target has not said that it arrived",
            "its source is gone; waits for the target to say whether it arrived",
        );
    }
    match sides.stuck.or(sides.held_up) {
        Some(why) => sides.cancel_or(why, "it is being given up"),
        None if sides.cancelled => Verdict::Wait("it is being given up"),
        None => Verdict::Wait("it is under way"),
    }
}

fn target_gone(sides: &Sides, proof: &FenceProof) -> Verdict {
    if !sides.source_up {
        return Verdict::Wait(
            "its target is gone and its source is silent; waits for either's word or proof",
        );
    }
    let lost = |anew| Verdict::TargetLost {
        proof: proof.clone(),
        anew,
    };
    match sides.source_phase {
        None => Verdict::Wait("its target is gone; waits for its source to report it"),
        _ if sides.past_switchover() => lost(true),
        Some(VmPhase::Frozen) => {
            Verdict::Wait("its target is gone; waits for its source to have its lease back")
        }
        Some(VmPhase::Absent | VmPhase::BackOff) if sides.own => lost(true),
        // Whether it has begun the switchover only itself can tell for certain.
        Some(_) if sides.own => sides.cancel_or(
            "its target is gone",
            "its target is gone; waits for its source to say that it goes on there",
        ),
        Some(_) => lost(false),
    }
}

/// Why the guest's writes wait for the target's copy of its disk, if they do: no copy is given up while it may be
/// the one that counts, so the migration ends first.
fn held_up(work: &Work<'_>, vm: usize, moving: Moving) -> Option<&'static str> {
    let (state, to) = (work.input.state, work.hosts[moving.to].name);
    state.own_disks(work.vms[vm].spec).next()?;
    let health = work.input.health.get(to);
    if matches!(health, Some(HostHealth::Expired | HostHealth::Dead)) {
        return Some("its target, which has the copy of its disk, is silent");
    }
    let report = work.report(vm, moving.from)?;
    let failed = |said: &MirrorReport| said.to == *to && said.phase == MirrorPhase::Failed;
    let lost = report.phase == VmPhase::MigratingOut && report.mirrors.iter().any(failed);
    lost.then_some("the copy of its disk on the target cannot be kept in step")
}

fn settle(work: &mut Work<'_>, vm: usize, moving: Moving, verdict: Verdict) {
    let (from, to) = (work.hosts[moving.from].name, work.hosts[moving.to].name);
    let said = |host| {
        let seen = work.report(vm, host)?.migration.as_ref()?;
        let why = seen.reason.clone().filter(|_| Some(seen.id) == moving.id)?;
        Some(format!("{} reports: {why}", work.hosts[host].name))
    };
    let words: Vec<String> = [moving.from, moving.to]
        .into_iter()
        .filter_map(said)
        .collect();
    let reason = |summary: String, evidence: Vec<String>| Reason {
        summary,
        evidence,
        candidates: Vec::new(),
    };
    match verdict {
        Verdict::Arrived(downtime_ms) => {
            let reason = reason(format!("{to} says that it runs there"), words);
            work.finish(vm, MigrationEnd::Arrived { downtime_ms }, reason);
        }
        Verdict::Stayed => {
            let reason = reason(format!("{from} says that it goes on there"), words);
            work.finish(vm, MigrationEnd::StayedAtSource, reason);
        }
        Verdict::Refused => {
            let reason = reason(format!("{to} says that it will not run it"), words);
            work.finish(vm, MigrationEnd::RefusedByTarget, reason);
        }
        Verdict::TargetLost { proof, anew } => {
            let kind = proof.kind();
            let why = reason(
                format!("{to} does not have it ({kind})"),
                vec![proof.describe()],
            );
            let own = work
                .input
                .state
                .own_disks(work.vms[vm].spec)
                .next()
                .is_some();
            let end = match own && anew {
                true => MigrationEnd::TargetLost(proof),
                false => MigrationEnd::TargetDead(proof),
            };
            work.finish(vm, end, why);
            if anew {
                let text = format!(
                    "{to} may have run it before it was lost, so its memory on {from} may be older than its disk: it starts anew"
                );
                work.stop(vm, StopMode::Hard, Reason::new(text));
            }
        }
        Verdict::Release(proofs) => {
            let evidence = proofs.iter().map(FenceProof::describe).collect();
            let why = reason(format!("neither {from} nor {to} has it any more"), evidence);
            work.release(vm, proofs, None, why);
        }
        Verdict::Cancel(why) => work.cancel(vm, reason(why.to_owned(), words)),
        Verdict::Wait(why) => {
            let id = moving.id.unwrap_or_default();
            work.note(vm, |_| format!("migration {id} from {from} to {to}: {why}"));
        }
    }
}
