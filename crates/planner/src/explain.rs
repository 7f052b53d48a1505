//! Answers for people: why a VM is not as wanted, where it would go, whether it can move.
//!
//! Always holds: the answers come out of the very steps that make the plan, so they cannot differ
//! from what is done.

use crate::fit::Query;
use crate::work::{Own, Work};
use crate::{Input, decide};
use quorate_state::{Candidate, OrderKind, Reason};
use quorate_types::{HostName, VmName};
use std::collections::BTreeMap;

/// Where a VM stands and where it would go.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Explanation {
    /// Which VM.
    pub vm: VmName,
    /// Where it is now, one sentence.
    pub now: String,
    /// Why nothing is done for it, if it is not as wanted.
    pub waits: Option<String>,
    /// The host that it would be given to if it were to start or to move now.
    pub best: Option<HostName>,
    /// Every host with its score or its rejection, best first.
    pub candidates: Vec<Candidate>,
}

/// For each VM that is not as wanted: one sentence why nothing is done for it now, or what is.
pub fn waiting(input: &Input<'_>) -> BTreeMap<VmName, String> {
    let mut work = decide(input, true);
    let notes = work.take_notes();
    let mut said: BTreeMap<VmName, String> = notes
        .into_iter()
        .map(|(vm, text)| (work.vms[vm].name.clone(), text))
        .collect();
    for planned in &work.actions {
        if let Some(vm) = planned.action.vm() {
            let text = format!(
                "next: {} ({})",
                planned.action.describe(),
                planned.reason.summary
            );
            said.insert(vm.clone(), text);
        }
    }
    said
}

/// For each host that is being drained: what it waits for.
pub fn waiting_hosts(input: &Input<'_>) -> BTreeMap<HostName, String> {
    let work = decide(input, false);
    let name = |(at, text): (&usize, &String)| (work.hosts[*at].name.clone(), text.clone());
    work.host_notes.iter().map(name).collect()
}

/// Where a VM would go if it were moved now, to `to` or wherever it fits best. `Err` says why it
/// cannot move, with every host that was looked at.
pub fn what_move(
    input: &Input<'_>,
    vm: &VmName,
    to: Option<&HostName>,
) -> Result<HostName, Reason> {
    let work = Work::new(input, false);
    let refuse = |text: String| Err(Reason::new(text));
    let Some(at) = work.vm_index.get(vm) else {
        return refuse(format!("there is no VM `{vm}`"));
    };
    let target = match to {
        Some(to) => match work.host_index.get(to) {
            Some(target) => Some(target),
            None => return refuse(format!("there is no host `{to}`")),
        },
        None => None,
    };
    let Some(unit) = work.unit(at) else {
        return refuse(format!("VM {vm} cannot be moved now: {}", place(&work, at)));
    };
    if target == Some(unit.from) {
        return refuse(format!(
            "VM {vm} is on {} already",
            work.hosts[unit.from].name
        ));
    }
    if let Some(why) = unit.never().or_else(|| unit.waits()) {
        return refuse(format!("VM {vm} cannot be moved now: {why}"));
    }
    let choice = work.choose_for(&unit, target);
    match choice.best {
        Some(best) => Ok(work.hosts[best].name.clone()),
        None => {
            let text = format!("no host can take VM {vm}: {}", choice.rejections(&work));
            Err(choice.reason(&work, text))
        }
    }
}

/// Everything that decides where a VM goes. `None`: there is no such VM.
pub fn explain(input: &Input<'_>, vm: &VmName) -> Option<Explanation> {
    let work = Work::new(input, false);
    let at = work.vm_index.get(vm)?;
    let choice = match work.unit(at) {
        Some(unit) => work.choose_for(&unit, None),
        None if work.vms[at].own == Own::Free => work.choose_start(at, None),
        None => work.choose(&Query {
            vm: at,
            alone: true,
            moves: true,
            ..Query::default()
        }),
    };
    Some(Explanation {
        vm: vm.clone(),
        now: place(&work, at),
        waits: waiting(input).remove(vm),
        best: choice.best.map(|best| work.hosts[best].name.clone()),
        candidates: choice.candidates(&work),
    })
}

fn place(work: &Work<'_>, vm: usize) -> String {
    let name = |host: usize| work.hosts[host].name;
    match work.vms[vm].own {
        Own::Free if work.vms[vm].wanted => "it is not placed on any host".into(),
        Own::Free => "it is stopped".into(),
        Own::Owned {
            host,
            order: OrderKind::Run,
            ..
        } => format!("{} runs it", name(host)),
        Own::Owned { host, .. } => format!("{} is stopping it", name(host)),
        Own::Migrating(moving) => {
            format!(
                "it is migrating from {} to {}",
                name(moving.from),
                name(moving.to)
            )
        }
    }
}
