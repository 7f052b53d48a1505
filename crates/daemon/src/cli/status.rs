//! `quorate status`: the page people live in. Pure: a view in, text out.

use super::output::{Output, Tone, bytes, cell, count, span, trimmed};
use quorate_api::view::{ClusterView, HostState, HostView, Level, PoolView, VmState, VmView};
use quorate_state::HostMode;

/// The whole page.
pub(crate) fn page(out: &Output, view: &ClusterView) -> String {
    let mut parts = vec![headline(out, view)];
    let problems = &view.cluster.problems;
    // The first is in the headline.
    for problem in problems.iter().skip(1) {
        parts.push(format!("  {} {}", mark(out, problem.level), problem.text));
    }
    if let Some(advice) = &view.cluster.advice {
        parts.push(format!("  {} {advice}", out.paint(Tone::Dim, "·")));
    }
    parts.push(String::new());
    parts.push(hosts(out, &view.hosts));
    if !view.vms.is_empty() {
        parts.push(String::new());
        parts.push(vms(out, &view.vms));
    }
    if !view.services.is_empty() {
        parts.push(String::new());
        parts.push(super::service::table(out, &view.services, false));
    }
    parts.push(String::new());
    parts.push(out.paint(Tone::Dim, &footer(view)));
    parts.join("\n")
}

fn mark(out: &Output, level: Level) -> String {
    match level {
        Level::Error => out.paint(Tone::Bad, "✗"),
        Level::Warning => out.paint(Tone::Warn, "!"),
    }
}

/// One sentence: all is well, or the lowest broken thing and what to do.
pub(crate) fn headline(out: &Output, view: &ClusterView) -> String {
    let name = if view.cluster.name.is_empty() {
        "Cluster".to_owned()
    } else {
        format!("Cluster {}", view.cluster.name)
    };
    let counts = counts(view);
    let Some(first) = view.cluster.problems.first() else {
        let well = out.paint(Tone::Good, "all well");
        return format!("{}: {well}. {counts}", out.paint(Tone::Bold, &name));
    };
    let tone = match first.level {
        Level::Error => Tone::Bad,
        Level::Warning => Tone::Warn,
    };
    let mut text = first.text.clone();
    if !text.ends_with(['.', '!', '?']) {
        text.push('.');
    }
    let text = out.paint(tone, &text);
    format!("{}: {text}\n  {counts}", out.paint(Tone::Bold, &name))
}

fn counts(view: &ClusterView) -> String {
    let up = view
        .hosts
        .iter()
        .filter(|host| host.state == HostState::Up)
        .count();
    let hosts = if up == view.hosts.len() {
        count(up, "host")
    } else {
        format!("{up} of {} up", count(view.hosts.len(), "host"))
    };
    let runs = |vm: &&VmView| matches!(vm.state, VmState::Running | VmState::Migrating);
    let running = view.vms.iter().filter(runs).count();
    let wanted = view
        .vms
        .iter()
        .filter(|vm| vm.state != VmState::Stopped)
        .count();
    let vms = match (running, wanted) {
        _ if view.vms.is_empty() => "no VMs yet: `quorate apply -f FILE`".to_owned(),
        (_, 0) => format!("{}, all stopped", count(view.vms.len(), "VM")),
        (a, b) if a == b => format!("{} running", count(a, "VM")),
        (a, b) => format!("{a} of {} running", count(b, "VM")),
    };
    format!("{hosts}, {vms}.")
}

fn footer(view: &ClusterView) -> String {
    let mut parts = Vec::new();
    match &view.cluster.leader {
        Some(leader) => parts.push(format!("leader {leader}")),
        None => parts.push("no leader".to_owned()),
    }
    let voters: Vec<&str> = view
        .hosts
        .iter()
        .filter(|host| host.voter)
        .map(|host| host.name.as_str())
        .collect();
    if !voters.is_empty() {
        parts.push(format!("voters {}", voters.join(" ")));
    }
    for pool in &view.pools {
        parts.push(format!("pool {}{}", pool.name, free(pool)));
    }
    parts.push(format!("revision {}", view.cluster.revision));
    if view.cluster.leader.as_ref() != Some(&view.cluster.answered_by) {
        parts.push(format!("seen from {}", view.cluster.answered_by));
    }
    parts.join(" · ")
}

fn free(pool: &PoolView) -> String {
    match pool.free {
        Some(free) => format!(" {} free", bytes(free)),
        None => String::new(),
    }
}

/// The table of hosts.
pub(crate) fn hosts(out: &Output, hosts: &[HostView]) -> String {
    let mut table = out.table(&["HOST", "STATE", "LEASE", "CPUS", "MEMORY", "VMS"]);
    for host in hosts {
        let (state, tone) = host_state(host);
        let name = if host.leader {
            format!("{} *", host.name)
        } else {
            host.name.to_string()
        };
        let lease = match (host.lease_ms_left, host.state) {
            (Some(0) | None, _) => cell("-", Tone::Dim),
            (Some(left), HostState::Suspect) => cell(span(left), Tone::Warn),
            (Some(left), _) => cell(span(left), Tone::Plain),
        };
        let (cpus, memory) = match &host.capacity {
            Some(all) => (
                format!("{}/{}", host.used.cpus, all.cpus),
                format!("{} / {}", bytes(host.used.memory.0), bytes(all.memory.0)),
            ),
            None => (host.used.cpus.to_string(), bytes(host.used.memory.0)),
        };
        let names: Vec<&str> = host.vms.iter().map(|vm| vm.as_str()).collect();
        let vms = match names.len() {
            0 => cell("-", Tone::Dim),
            1..=8 => cell(names.join(" "), Tone::Plain),
            n => cell(format!("{} ... ({n})", names[..6].join(" ")), Tone::Plain),
        };
        table.add_row([
            cell(name, Tone::Bold),
            cell(state, tone),
            lease,
            cell(cpus, Tone::Plain),
            cell(memory, Tone::Plain),
            vms,
        ]);
    }
    trimmed(&table)
}

fn host_state(host: &HostView) -> (String, Tone) {
    let (state, tone) = match host.state {
        HostState::Up => ("up", Tone::Good),
        HostState::Suspect => ("silent", Tone::Warn),
        HostState::Down => ("DOWN", Tone::Bad),
        HostState::Joining => ("joining", Tone::Busy),
        HostState::Unknown => ("unknown", Tone::Dim),
    };
    match host.mode {
        HostMode::Active => (state.to_owned(), tone),
        HostMode::Draining if host.state == HostState::Up => ("draining".to_owned(), Tone::Busy),
        HostMode::Maintenance if host.state == HostState::Up => {
            ("maintenance".to_owned(), Tone::Warn)
        }
        HostMode::Draining => (format!("{state}, draining"), tone),
        HostMode::Maintenance => (format!("{state}, maintenance"), tone),
    }
}

/// The table of VMs.
pub(crate) fn vms(out: &Output, vms: &[VmView]) -> String {
    let notes = vms.iter().any(|vm| !note(vm).is_empty());
    let mut headings = vec!["VM", "STATE", "HOST", "ADDRESS"];
    if notes {
        headings.push("NOTE");
    }
    let mut table = out.table(&headings);
    for vm in vms {
        let (state, tone) = vm_state(vm);
        let host = match (&vm.host, &vm.migration) {
            (_, Some(migration)) => format!("{} > {}", migration.from, migration.to),
            (Some(host), None) => host.to_string(),
            (None, None) => "-".to_owned(),
        };
        let address = vm.addresses.first().map_or("-", String::as_str);
        let mut row = vec![
            cell(&vm.name, Tone::Bold),
            cell(state, tone),
            cell(host, Tone::Plain),
            cell(address, Tone::Plain),
        ];
        if notes {
            row.push(cell(note(vm), Tone::Dim));
        }
        table.add_row(row);
    }
    trimmed(&table)
}

pub(crate) fn vm_state(vm: &VmView) -> (String, Tone) {
    match vm.state {
        VmState::Running if vm.ready => ("running".to_owned(), Tone::Good),
        VmState::Running => ("running, not ready".to_owned(), Tone::Busy),
        VmState::Migrating => match &vm.migration {
            Some(migration) if migration.cancelling => {
                ("migrating, cancelled".to_owned(), Tone::Busy)
            }
            Some(migration) if migration.transferred > 0 => {
                (format!("migrating {} %", migration.percent), Tone::Busy)
            }
            _ => ("migrating".to_owned(), Tone::Busy),
        },
        VmState::Starting => ("starting".to_owned(), Tone::Busy),
        VmState::Stopping => ("stopping".to_owned(), Tone::Busy),
        VmState::Deleting => ("deleting".to_owned(), Tone::Busy),
        VmState::Recovering => ("recovering".to_owned(), Tone::Warn),
        VmState::Waiting => ("waiting".to_owned(), Tone::Warn),
        VmState::Frozen => ("frozen".to_owned(), Tone::Warn),
        VmState::Failing => ("FAILING".to_owned(), Tone::Bad),
        VmState::Stopped => ("stopped".to_owned(), Tone::Dim),
        VmState::Unknown => ("unknown".to_owned(), Tone::Dim),
    }
}

/// What is worth a remark: nothing, for a VM that is as wanted.
fn note(vm: &VmView) -> String {
    let mut notes = Vec::new();
    match vm.state {
        VmState::Waiting | VmState::Recovering | VmState::Failing | VmState::Frozen => {
            if !vm.why.is_empty() {
                notes.push(vm.why.clone());
            }
        }
        _ => notes.extend(vm.problem.clone()),
    }
    if vm.restarts > 0 {
        notes.push(count(vm.restarts as usize, "restart"));
    }
    if vm.restart_pending {
        notes.push("changed definition takes effect at its next start".to_owned());
    }
    notes.join("; ")
}
