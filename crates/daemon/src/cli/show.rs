//! One object in full, explanations and events. Pure: data in, text out.

use super::output::{Output, Tone, bytes, count, span};
use super::status::vm_state;
use jiff::tz::TimeZone;
use quorate_api::answers::ThenView;
use quorate_api::view::{CopyView, DecisionView, EventView, Explanation, HostView, VmView};
use quorate_state::Candidate;
use quorate_types::{HostName, Timestamp, VmName};
use std::collections::BTreeSet;

/// Lines of `name: value`, aligned.
pub(crate) fn facts(out: &Output, title: &str, facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut lines = vec![out.paint(Tone::Bold, title)];
    for (name, value) in facts.iter().filter(|(_, value)| !value.is_empty()) {
        let name = out.paint(Tone::Dim, &format!("{name:width$}"));
        lines.push(format!("  {name}  {value}"));
    }
    lines.join("\n")
}

fn join<T: ToString>(items: &[T]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

fn copy(copy: &CopyView) -> String {
    let state = match (copy.in_step, copy.percent, &copy.problem) {
        (true, _, None) => "in step".to_owned(),
        (true, _, Some(problem)) => format!("in step ({problem})"),
        (false, Some(percent), _) => format!("{percent} % up to date"),
        (false, None, Some(problem)) => format!("out of step ({problem})"),
        (false, None, None) => format!("out of step since {}", copy.since),
    };
    format!("{}/{} on {}: {state}", copy.pool, copy.image, copy.host)
}

/// Hosts that have all of its disks in step, when its disks are on particular hosts.
fn restarts_on(vm: &VmView) -> String {
    let disks: BTreeSet<_> = vm.copies.iter().map(|c| (&c.pool, &c.image)).collect();
    let hosts: BTreeSet<_> = vm.copies.iter().map(|copy| &copy.host).collect();
    let whole = |host: &&&HostName| {
        let copies = vm.copies.iter().filter(|copy| copy.in_step);
        copies.filter(|copy| copy.host == ***host).count() == disks.len()
    };
    let hosts: Vec<String> = hosts
        .iter()
        .filter(whole)
        .map(ToString::to_string)
        .collect();
    match (hosts.as_slice(), vm.copies.is_empty()) {
        (_, true) => String::new(),
        ([], false) => "no host: no copy of its disks is in step".to_owned(),
        ([one], false) => format!("{one} only"),
        (many, false) => many.join(" and "),
    }
}

pub(crate) fn vm(out: &Output, vm: &VmView, now: u64) -> String {
    let (state, tone) = vm_state(vm);
    let since = match vm.since {
        Some(since) if since.0 > 0 => format!(" for {}", span(now.saturating_sub(since.0))),
        _ => String::new(),
    };
    let migration = vm.migration.as_ref().map_or_else(String::new, |migration| {
        format!(
            "{} > {}, {} % ({} of {} to go), migration {}",
            migration.from,
            migration.to,
            migration.percent,
            bytes(migration.remaining),
            bytes(migration.transferred + migration.remaining),
            migration.id
        )
    });
    let restarts = if vm.restarts > 0 {
        vm.restarts.to_string()
    } else {
        String::new()
    };
    let copies: Vec<String> = vm.copies.iter().map(copy).collect();
    let pending = if vm.restart_pending {
        "the changed definition takes effect at the next start"
    } else {
        ""
    };
    facts(
        out,
        &format!("VM {}", vm.name),
        &[
            ("state", format!("{}{since}", out.paint(tone, &state))),
            (
                "host",
                vm.host
                    .as_ref()
                    .map_or_else(String::new, ToString::to_string),
            ),
            ("migration", migration),
            ("wanted", format!("{:?}", vm.power).to_lowercase()),
            (
                "size",
                format!("{}, {}", count(vm.cpus as usize, "CPU"), bytes(vm.memory.0)),
            ),
            ("disks", copies.join("; ")),
            ("restarts on", restarts_on(vm)),
            ("addresses", join(&vm.addresses)),
            ("epoch", vm.epoch.to_string()),
            ("restarts", restarts),
            ("problem", vm.problem.clone().unwrap_or_default()),
            ("pending", pending.to_owned()),
            ("why", vm.why.clone()),
        ],
    )
}

pub(crate) fn host(out: &Output, host: &HostView) -> String {
    let capacity = host.capacity.map_or_else(String::new, |all| {
        format!(
            "{} of {} CPUs, {} of {} memory given to guests",
            host.used.cpus,
            all.cpus,
            bytes(host.used.memory.0),
            bytes(all.memory.0)
        )
    });
    let watchdog = match (host.guard, host.watchdog_ms) {
        (true, Some(ms)) => format!("guard and watchdog armed ({ms} ms)"),
        (true, None) => "guard armed, no watchdog".to_owned(),
        (false, _) => "not armed".to_owned(),
    };
    let roles = match (host.leader, host.voter) {
        (true, _) => "leader",
        (false, true) => "voter",
        (false, false) => "learner",
    };
    let links = host.links_down.iter().map(|link| {
        let relay = link
            .relayed_by
            .as_ref()
            .map_or_else(String::new, |relay| format!(" (relayed by {relay})"));
        format!("{}{relay}", link.to)
    });
    let hypervisor = match (&host.qemu, &host.accel) {
        (Some(qemu), Some(accel)) if !qemu.is_empty() => format!("QEMU {qemu}, {accel}"),
        _ => String::new(),
    };
    facts(
        out,
        &format!("Host {}", host.name),
        &[
            (
                "state",
                format!("{:?}, {:?}", host.state, host.mode).to_lowercase(),
            ),
            ("role", roles.to_owned()),
            ("address", host.address.clone()),
            (
                "lease left",
                host.lease_ms_left.map_or_else(String::new, span),
            ),
            ("last resort", watchdog),
            ("fencing", join(&host.fencing)),
            (
                "fencing problem",
                host.fencing_problem.clone().unwrap_or_default(),
            ),
            ("capacity", capacity),
            ("hypervisor", hypervisor),
            ("version", host.version.clone().unwrap_or_default()),
            ("links down", links.collect::<Vec<_>>().join(", ")),
            ("VMs", join(&host.vms)),
        ],
    )
}

pub(crate) fn explanation(
    out: &Output,
    explained: &Explanation,
    zone: &TimeZone,
    now: u64,
) -> String {
    let mut parts = vec![vm(out, &explained.vm, now)];
    if !explained.depends_on.is_empty() {
        parts.push(out.paint(Tone::Bold, "Needs"));
        for dependency in &explained.depends_on {
            let (mark, tone) = if dependency.met {
                ("✓", Tone::Good)
            } else {
                ("✗", Tone::Bad)
            };
            let condition = format!("{:?}", dependency.condition).to_lowercase();
            parts.push(format!(
                "  {} {} {condition}",
                out.paint(tone, mark),
                dependency.vm
            ));
        }
    }
    if !explained.needed_by.is_empty() {
        parts.push(out.paint(Tone::Bold, "Needed by"));
        parts.push(format!("  {}", join(&explained.needed_by)));
    }
    if !explained.rules.is_empty() {
        parts.push(out.paint(Tone::Bold, "Rules"));
        for rule in &explained.rules {
            let kind = rule.spec.describe();
            let vms: Vec<&str> = rule.spec.vms().iter().map(|vm| vm.as_str()).collect();
            parts.push(format!("  {}: {} are {kind}", rule.name, vms.join(", ")));
        }
    }
    if let Some(placement) = &explained.placement {
        let best = match &placement.best {
            Some(best) => format!("If it had to be placed now: {best}"),
            None => "If it had to be placed now: no host can take it".to_owned(),
        };
        parts.push(out.paint(Tone::Bold, &best));
        parts.extend(
            placement
                .candidates
                .iter()
                .map(|candidate| candidate_line(candidate, 2)),
        );
    }
    if !explained.decisions.is_empty() {
        parts.push(out.paint(Tone::Bold, "Decisions, newest first"));
    }
    for shown in &explained.decisions {
        parts.extend(decision(out, shown, zone));
    }
    parts.join("\n")
}

/// A decision with what it rests on.
fn decision(out: &Output, decision: &DecisionView, zone: &TimeZone) -> Vec<String> {
    let when = time(decision.at, zone);
    let mut lines = vec![format!(
        "  {}  {}",
        out.paint(Tone::Dim, &when),
        decision.action
    )];
    if !decision.summary.is_empty() {
        lines.push(format!("      because {}", decision.summary));
    }
    let evidence = decision.evidence.iter();
    lines.extend(evidence.map(|fact| format!("      - {fact}")));
    let candidates = decision.candidates.iter();
    lines.extend(candidates.map(|candidate| candidate_line(candidate, 6)));
    lines
}

/// Where a VM was at a time in the past.
pub(crate) fn then(out: &Output, vm: &VmName, then: &ThenView, zone: &TimeZone) -> String {
    let title = format!("VM {vm} at {}: {}", time(then.at, zone), then.text);
    let mut parts = vec![out.paint(Tone::Bold, &title)];
    if let Some(held) = &then.decision {
        parts.push("The decision that held:".to_owned());
        parts.extend(decision(out, held, zone));
    }
    match &then.next {
        Some(next) => {
            parts.push("The next one:".to_owned());
            parts.extend(decision(out, next, zone));
        }
        None => parts.push(format!(
            "Nothing was decided about it since. `quorate explain vm {vm}` shows where it would go now."
        )),
    }
    parts.join("\n")
}

pub(crate) fn candidate_line(candidate: &Candidate, indent: usize) -> String {
    let Candidate { host, why, .. } = candidate;
    let line = match candidate.score {
        Some(score) => format!("{:indent$}{host} scores {score}: {why}", ""),
        None => format!("{:indent$}{host} rejected: {why}", ""),
    };
    line.trim_end_matches([' ', ':']).to_owned()
}

pub(crate) fn time(at: Timestamp, zone: &TimeZone) -> String {
    let millis = i64::try_from(at.0).unwrap_or(i64::MAX);
    match jiff::Timestamp::from_millisecond(millis) {
        Ok(stamp) => stamp
            .to_zoned(zone.clone())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        Err(_) => "-".to_owned(),
    }
}

pub(crate) fn event(out: &Output, event: &EventView, zone: &TimeZone) -> String {
    let tone = match event.kind.as_str() {
        "start" => Tone::Good,
        "stop" | "migration" => Tone::Busy,
        "release" | "host" => Tone::Warn,
        "refused" => Tone::Bad,
        _ => Tone::Plain,
    };
    let when = out.paint(Tone::Dim, &time(event.at, zone));
    let kind = out.paint(tone, &format!("{:9}", event.kind));
    let by = out.paint(Tone::Dim, &format!("({})", event.by));
    format!("{when}  {kind}  {}  {by}", event.text)
}
