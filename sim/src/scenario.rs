//! Scenarios: a readable script of events and the transcript that it must give.
//!
//! ```text
//! # A host dies: its VMs start elsewhere.        comments
//! hosts 3                                        setup, see [`setup_line`]
//! vm app depends=db
//! steps prepared streaming                       run once for each, `$step` replaced
//! at 10s power-cut h2 for 60s                    see [`event_line`]
//! on db $step power-cut h3 for 60s               when a migration of db comes to that step
//! at 14s expect app on h1
//! run 40s
//! ---
//! expected transcript
//! ```
//! Always holds: the same file gives the same transcript; a broken promise or expectation is in it.

use crate::faults::{Fault, Op, Trigger};
use crate::guest::Vcpu;
use crate::rng::Rng;
use crate::setup::{Setup, vm_spec};
use crate::time::{MS, SEC};
use crate::world::{Detail, World};
use quorate_state::{Command, HostMode, StopMode};
use quorate_types::spec::{Condition, MigrationPolicy, Power, Probe, ReadyCheck};
use quorate_types::{Dependency, HostName, LeaseTimings, Millis, RuleName, RuleSpec, VmName};
use std::collections::BTreeSet;

/// Between script and transcript.
const SEPARATOR: &str = "\n---\n";
/// What happens before is not written down: the cluster comes up.
const SHOWN_FROM: u64 = 5 * SEC;

/// A script that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("line `{line}`: {why}")]
pub struct ScriptError {
    line: String,
    why: String,
}

/// What a scenario came to.
#[derive(Debug)]
pub struct Outcome {
    /// The script part of the file.
    pub script: String,
    /// The transcript that the file expects.
    pub expected: String,
    /// The transcript that it gave.
    pub actual: String,
    /// Broken promises and expectations.
    pub failures: Vec<String>,
}

struct Script {
    setup: Setup,
    seed: u64,
    events: Vec<(u64, String)>,
    triggers: Vec<String>,
    end: u64,
}

/// Runs the text of a scenario file.
///
/// # Errors
/// The line that cannot be read.
pub fn run_scenario(text: &str, echo: bool) -> Result<Outcome, ScriptError> {
    let (script, expected) = text.split_once(SEPARATOR).unwrap_or((text.trim_end(), ""));
    let steps = script.lines().find_map(|line| line.strip_prefix("steps "));
    let steps: Vec<&str> = steps.map_or(vec![""], |steps| steps.split_whitespace().collect());
    let mut actual = String::new();
    let mut failures = Vec::new();
    for step in steps {
        if !step.is_empty() {
            actual.push_str(&format!("[{step}]\n"));
        }
        let parsed = parse(&script.replace("$step", step))?;
        run_one(&parsed, echo, &mut actual, &mut failures)?;
    }
    Ok(Outcome {
        script: script.to_owned(),
        expected: expected.to_owned(),
        actual,
        failures,
    })
}

/// The whole file with the transcript that the run gave.
#[must_use]
pub fn rendered(outcome: &Outcome) -> String {
    format!("{}{SEPARATOR}{}", outcome.script, outcome.actual)
}

fn run_one(
    script: &Script,
    echo: bool,
    actual: &mut String,
    failures: &mut Vec<String>,
) -> Result<(), ScriptError> {
    let rng = Rng::new(script.seed);
    let mut world = World::new(script.setup.clone(), rng, None, Detail::Nothing);
    world.coarse();
    for line in &script.triggers {
        trigger_line(&mut world, line)?;
    }
    world.run_until(SHOWN_FROM);
    world.detail = Detail::Events;
    let vms = script.setup.manifest.vms.keys();
    let places: Vec<String> = vms
        .map(|vm| format!("{vm} {}", world.describe_vm(vm)))
        .collect();
    world.note(|| format!("it begins: {}", places.join(", ")));
    if echo {
        world.print_lines();
    }
    let mut events = script.events.clone();
    events.sort_by_key(|(at, _)| *at);
    for (at, line) in &events {
        world.run_until(*at);
        event_line(&mut world, line)?;
    }
    world.run_until(script.end);
    for line in world.lines() {
        actual.push_str(line);
        actual.push('\n');
    }
    failures.extend(
        world
            .lines()
            .iter()
            .filter(|line| line.contains("FAILED"))
            .cloned(),
    );
    if let Some(broken) = world.broken() {
        failures.push(format!("{}: {}", broken.promise, broken.text));
    }
    Ok(())
}

fn bad(line: &str, why: impl Into<String>) -> ScriptError {
    ScriptError {
        line: line.to_owned(),
        why: why.into(),
    }
}

fn parse(text: &str) -> Result<Script, ScriptError> {
    let hosts = text.lines().find_map(|line| line.strip_prefix("hosts "));
    let hosts = hosts.and_then(|n| n.trim().parse().ok()).unwrap_or(3);
    let mut script = Script {
        setup: Setup::quiet(hosts),
        seed: 1,
        events: Vec::new(),
        triggers: Vec::new(),
        end: 60 * SEC,
    };
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix("at ") {
            let (at, event) = rest
                .split_once(' ')
                .ok_or_else(|| bad(line, "what happens?"))?;
            script.events.push((span(line, at)?, event.to_owned()));
        } else if line.starts_with("on ") {
            script.triggers.push(line.to_owned());
        } else {
            setup_line(&mut script, line)?;
        }
    }
    Ok(script)
}

fn span(line: &str, text: &str) -> Result<u64, ScriptError> {
    let millis: Millis = text
        .parse()
        .map_err(|error| bad(line, format!("{error}")))?;
    Ok(millis.0 * MS)
}

fn host(line: &str, text: &str) -> Result<usize, ScriptError> {
    let number: Option<usize> = text.strip_prefix('h').and_then(|n| n.parse().ok());
    number
        .and_then(|n| n.checked_sub(1))
        .ok_or_else(|| bad(line, format!("`{text}` is no host")))
}

fn host_name(line: &str, text: &str) -> Result<HostName, ScriptError> {
    HostName::new(text).map_err(|error| bad(line, error.to_string()))
}

fn vm_name(line: &str, text: &str) -> Result<VmName, ScriptError> {
    VmName::new(text).map_err(|error| bad(line, error.to_string()))
}

/// `hosts N`, `seed N`, `fast`, `precopy SPAN`, `boot SPAN`, `no-watchdog HOST`, `fence HOST SPAN`,
/// `apart VM VM`, `run SPAN`, `vm NAME [memory=MIB] [depends=VM,VM] [ready] [policy=live|quick|cold|never]
/// [hosts=HOST,HOST] [priority=N] [san=DISKS]`: disks on the SAN instead of one that is shared.
fn setup_line(script: &mut Script, line: &str) -> Result<(), ScriptError> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let setup = &mut script.setup;
    match words[..] {
        ["hosts", _] | ["steps", ..] => {}
        ["seed", n] => script.seed = n.parse().map_err(|_| bad(line, "a number"))?,
        ["fast"] => {
            setup.timings = LeaseTimings::FAST;
            setup.watchdogs = vec![Some(LeaseTimings::FAST.watchdog_bound); setup.hosts.len()];
        }
        ["precopy", time] => setup.precopy_ns = (span(line, time)?, span(line, time)?),
        ["boot", time] => setup.boot_ns = span(line, time)?,
        ["no-watchdog", name] => setup.watchdogs[host(line, name)?] = None,
        ["fence", name, time] => setup.fences[host(line, name)?] = Some(span(line, time)?),
        ["run", time] => script.end = span(line, time)?,
        // Over the VMs before this line.
        ["services"] => crate::services::add_services(&mut setup.manifest),
        ["apart", ref vms @ ..] => {
            let vms: Result<BTreeSet<VmName>, _> = vms.iter().map(|vm| vm_name(line, vm)).collect();
            let name = RuleName::new(format!("rule{}", setup.manifest.rules.len() + 1));
            let name = name.map_err(|error| bad(line, error.to_string()))?;
            setup
                .manifest
                .rules
                .insert(name, RuleSpec::keep_apart(vms?));
        }
        ["vm", name, ref options @ ..] => {
            let mut spec = vm_spec(name, 1024);
            for option in options {
                if let Some(disks) = option.strip_prefix("san=") {
                    let disks = disks.parse().map_err(|_| bad(line, "a number of disks"))?;
                    setup.with_san();
                    crate::setup::on_san(&mut spec, name, disks);
                    continue;
                }
                vm_option(&mut spec, line, option)?;
            }
            setup.manifest.vms.insert(vm_name(line, name)?, spec);
        }
        _ => return Err(bad(line, "not known")),
    }
    Ok(())
}

fn vm_option(
    spec: &mut quorate_types::VmSpec,
    line: &str,
    option: &str,
) -> Result<(), ScriptError> {
    let (key, value) = option.split_once('=').unwrap_or((option, ""));
    match key {
        "memory" => {
            let mib = value.parse().map_err(|_| bad(line, "memory in MiB"))?;
            spec.memory = quorate_types::ByteSize::mib(mib);
        }
        "priority" => spec.priority = value.parse().map_err(|_| bad(line, "a number"))?,
        "ready" => {
            spec.ready = Some(ReadyCheck {
                probe: Probe::Agent,
                timeout: Millis::secs(300),
            });
        }
        "policy" => {
            spec.migration = match value {
                "live" => MigrationPolicy::Live,
                "quick" => MigrationPolicy::Quick,
                "cold" => MigrationPolicy::Cold,
                "never" => MigrationPolicy::Never,
                _ => return Err(bad(line, "live, quick, cold or never")),
            }
        }
        "depends" => {
            for other in value.split(',') {
                let condition = Condition::Ready;
                let other = vm_name(line, other)?;
                spec.depends_on.insert(
                    other,
                    Dependency {
                        condition,
                        ..Dependency::default()
                    },
                );
            }
        }
        "hosts" => {
            for name in value.split(',') {
                spec.hosts.insert(host_name(line, name)?);
            }
        }
        _ => return Err(bad(line, format!("`{option}` is not known"))),
    }
    Ok(())
}

/// A fault with its duration: `power-cut HOST for SPAN`, `kill-daemon`, `kill-guard`, `cut HOST [HOST]`,
/// `one-way HOST HOST`, `pause-daemon`, `pause-guard`, `pause-host`, `slow-disk`, `lag`, `lose-storage`,
/// `bmc-dead`, `cut-san HOST`, `lose-san`, `slow-san`.
fn fault(line: &str, words: &[&str]) -> Result<Option<(Fault, u64)>, ScriptError> {
    let (what, lasts) = match words {
        [what @ .., "for", time] => (what, span(line, time)?),
        what => (what, 3600 * SEC),
    };
    let ms = lasts / MS;
    let fault = match *what {
        ["power-cut", a] => Fault::PowerCut(host(line, a)?),
        ["kill-daemon", a] => Fault::KillDaemon(host(line, a)?),
        ["kill-guard", a] => Fault::KillGuard(host(line, a)?),
        ["cut", a] => Fault::CutHost(host(line, a)?),
        ["cut", a, b] => Fault::CutLink(host(line, a)?, host(line, b)?),
        ["one-way", a, b] => Fault::CutOneWay(host(line, a)?, host(line, b)?),
        ["pause-daemon", a] => Fault::PauseDaemon(host(line, a)?, ms),
        ["pause-guard", a] => Fault::PauseGuard(host(line, a)?, ms),
        ["pause-host", a] => Fault::PauseHost(host(line, a)?, ms),
        ["slow-disk", a] => Fault::DiskSlow(host(line, a)?),
        ["lag", a] => Fault::ApplySlow(host(line, a)?),
        ["lose-storage", a] => Fault::StorageLost(host(line, a)?),
        ["bmc-dead", a] => Fault::BmcDead(host(line, a)?),
        ["cut-san", a] => Fault::CutSan(host(line, a)?),
        ["lose-san"] => Fault::LoseSan,
        ["slow-san"] => Fault::SlowSan,
        _ => return Ok(None),
    };
    Ok(Some((fault, lasts)))
}

/// `on VM STEP FAULT` or `on VM STEP cancel`.
fn trigger_line(world: &mut World, line: &str) -> Result<(), ScriptError> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["on", vm, step, ref what @ ..] = words[..] else {
        return Err(bad(line, "on VM STEP what?"));
    };
    let vm = vm_name(line, vm)?;
    if what == ["cancel"] {
        world.chaos.cancels.push((vm, step.to_owned()));
        return Ok(());
    }
    let Some((fault, lasts)) = fault(line, what)? else {
        return Err(bad(line, "not a fault"));
    };
    let step = step.to_owned();
    world.chaos.triggers.push(Trigger {
        vm,
        step,
        fault,
        lasts,
    });
    Ok(())
}

/// A fault, or `migrate VM [HOST]`, `cancel VM`, `start VM`, `stop VM`, `delete VM`, `drain HOST`,
/// `resume HOST`, `confirm-dead HOST`, `fence HOST`, `crash VM`, `expect VM on HOST | frozen | stopped`.
fn event_line(world: &mut World, line: &str) -> Result<(), ScriptError> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if let Some((fault, lasts)) = fault(line, &words)? {
        world.inject(fault, lasts, 0);
        return Ok(());
    }
    let command = match words[..] {
        ["migrate", vm] => Command::RequestMove {
            vm: vm_name(line, vm)?,
            to: None,
        },
        ["migrate", vm, to] => Command::RequestMove {
            vm: vm_name(line, vm)?,
            to: Some(host_name(line, to)?),
        },
        ["cancel", vm] => Command::CancelMove {
            vm: vm_name(line, vm)?,
        },
        ["start", vm] => Command::SetPower {
            vm: vm_name(line, vm)?,
            power: Power::Running,
            mode: StopMode::Graceful,
        },
        ["stop", vm] => Command::SetPower {
            vm: vm_name(line, vm)?,
            power: Power::Stopped,
            mode: StopMode::Graceful,
        },
        ["delete", vm] => Command::DeleteVm {
            vm: vm_name(line, vm)?,
        },
        ["drain", name] => Command::SetHostMode {
            host: host_name(line, name)?,
            mode: HostMode::Draining,
        },
        ["resume", name] => Command::SetHostMode {
            host: host_name(line, name)?,
            mode: HostMode::Active,
        },
        ["confirm-dead", name] => {
            world.operate(Op::ConfirmDead(host_name(line, name)?));
            return Ok(());
        }
        ["fence", name] => {
            world.operate(Op::Fence(host_name(line, name)?));
            return Ok(());
        }
        ["crash", vm] => {
            world.crash_vm(&vm_name(line, vm)?);
            return Ok(());
        }
        ["expect-answers", service, ref hosts @ ..] => {
            let now = world.answering(service);
            let verdict = match now == hosts.join(" ") {
                true => "as expected".to_owned(),
                false => format!("FAILED, expected {}", hosts.join(" ")),
            };
            world.note(|| format!("{service} is answered for by {now}: {verdict}"));
            return Ok(());
        }
        ["expect", vm, ref what @ ..] => {
            let vm = vm_name(line, vm)?;
            let now = world.describe_vm(&vm);
            let verdict = if now == what.join(" ") {
                "as expected".to_owned()
            } else {
                format!("FAILED, expected {}", what.join(" "))
            };
            world.note(|| format!("{vm} is {now}: {verdict}"));
            return Ok(());
        }
        _ => return Err(bad(line, "not known")),
    };
    world.operate(Op::command(command));
    Ok(())
}

impl World {
    fn crash_vm(&mut self, vm: &VmName) {
        let runs = |guest: &crate::guest::Guest| guest.vm == *vm && guest.vcpu == Vcpu::Running;
        let proc = self
            .guests
            .iter()
            .find(|(_, guest)| runs(guest))
            .map(|(proc, _)| *proc);
        if let Some(proc) = proc {
            self.inject(Fault::CrashQemu(proc), 0, 0);
        }
    }

    /// `on h1`, `frozen on h1`, `on h1 and frozen on h2`, or `stopped`.
    fn describe_vm(&self, vm: &VmName) -> String {
        let mut parts: Vec<String> = Vec::new();
        for guest in self.guests.values().filter(|guest| guest.vm == *vm) {
            let host = &self.hosts[guest.host].name;
            parts.push(match guest.vcpu {
                Vcpu::Running => format!("on {host}"),
                Vcpu::Paused => format!("frozen on {host}"),
                Vcpu::IoError => format!("stuck on {host}"),
                Vcpu::Starting => format!("starting on {host}"),
                Vcpu::InMigrate => format!("expected by {host}"),
            });
        }
        if parts.is_empty() {
            "stopped".into()
        } else {
            parts.join(" and ")
        }
    }
}
