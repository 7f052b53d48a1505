//! Waiting for what was asked for, with progress.
//!
//! Always holds: bounded by the caller's timeout; a daemon that restarts meanwhile is waited for;
//! what has failed for good ends the waiting at once. How things stand is judged by pure functions.

use super::error::CliError;
use super::output::count;
use super::progress::Progress;
use super::status::vm_state;
use quorate_api::view::{ClusterView, HostState, VmState, VmView};
use quorate_api::{Client, ClientError};
use quorate_state::HostMode;
use quorate_types::spec::Power;
use quorate_types::{HostName, Millis, ServiceName, VmName};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// What holds something up is told when it has not passed by itself after this.
const SETTLE: Duration = Duration::from_secs(1);

/// How something that is waited for stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Going on, with a word about it.
    Busy(String),
    /// Held up by something that may pass.
    HeldUp {
        /// A word about it.
        state: String,
        /// By what.
        why: String,
    },
    /// As wanted.
    Done(String),
    /// Will not come by waiting.
    Failed(String),
}

/// What is waited for.
#[derive(Debug, Clone)]
pub(crate) enum Goal {
    /// VMs and services as their definitions want them: running and ready, or stopped; served by all of their members.
    AsWanted {
        vms: BTreeSet<VmName>,
        services: BTreeSet<ServiceName>,
    },
    /// A VM away from a host (or on a given one).
    Moved {
        vm: VmName,
        from: Option<HostName>,
        to: Option<HostName>,
    },
    /// A VM forgotten.
    Gone(VmName),
    /// A host without VMs.
    Drained(HostName),
    /// A member of a service without connections.
    MemberDrained { service: ServiceName, vm: VmName },
}

impl Goal {
    /// One VM as its definition wants it.
    pub(crate) fn vm_as_wanted(name: VmName) -> Self {
        Self::AsWanted {
            vms: BTreeSet::from([name]),
            services: BTreeSet::new(),
        }
    }

    /// How each part stands.
    pub(crate) fn standing(&self, view: &ClusterView) -> Vec<(String, Standing)> {
        let find = |name: &VmName| view.vms.iter().find(|vm| vm.name == *name);
        match self {
            Self::AsWanted { vms, services } => {
                let vms = vms
                    .iter()
                    .map(|name| (name.to_string(), as_wanted(find(name))));
                let services = services.iter().map(|name| {
                    let standing = super::service::as_wanted(view, name);
                    (format!("service {name}"), standing)
                });
                vms.chain(services).collect()
            }
            Self::Moved { vm, from, to } => {
                vec![(vm.to_string(), moved(find(vm), from.as_ref(), to.as_ref()))]
            }
            Self::Gone(name) => {
                let standing = match find(name) {
                    None => Standing::Done("gone".to_owned()),
                    Some(vm) => Standing::Busy(vm_state(vm).0),
                };
                vec![(name.to_string(), standing)]
            }
            Self::Drained(host) => vec![(host.to_string(), drained(view, host))],
            Self::MemberDrained { service, vm } => {
                vec![(vm.to_string(), super::service::drained(view, service, vm))]
            }
        }
    }
}

fn as_wanted(vm: Option<&VmView>) -> Standing {
    let Some(vm) = vm else {
        return Standing::Busy("not seen yet".to_owned());
    };
    let state = vm_state(vm).0;
    match (vm.power, vm.state) {
        (Power::Running, VmState::Running) if vm.ready => {
            let place = vm
                .host
                .as_ref()
                .map_or_else(String::new, |host| format!(" on {host}"));
            Standing::Done(format!("ready{place}"))
        }
        (Power::Stopped, VmState::Stopped) => Standing::Done(state),
        (_, VmState::Waiting | VmState::Failing | VmState::Recovering) if !vm.why.is_empty() => {
            let why = vm.why.clone();
            Standing::HeldUp { state, why }
        }
        (_, VmState::Deleting) => Standing::Failed("it is being deleted".to_owned()),
        _ => Standing::Busy(state),
    }
}

fn moved(vm: Option<&VmView>, from: Option<&HostName>, to: Option<&HostName>) -> Standing {
    let Some(vm) = vm else {
        return Standing::Failed("it is gone".to_owned());
    };
    let there = match to {
        Some(to) => vm.host.as_ref() == Some(to),
        None => vm.host.is_some() && vm.host.as_ref() != from,
    };
    let runs = matches!(vm.state, VmState::Running | VmState::Migrating) && vm.migration.is_none();
    if there && runs {
        let host = vm
            .host
            .as_ref()
            .map_or_else(String::new, ToString::to_string);
        return Standing::Done(format!("on {host}"));
    }
    if !vm.move_requested && vm.migration.is_none() && !there && vm.state == VmState::Running {
        let why = vm.problem.clone().unwrap_or_else(|| vm.why.clone());
        return Standing::Failed(format!("it stays where it is: {why}"));
    }
    Standing::Busy(vm_state(vm).0)
}

fn drained(view: &ClusterView, name: &HostName) -> Standing {
    let Some(host) = view.hosts.iter().find(|host| host.name == *name) else {
        return Standing::Failed("it is not in the cluster any more".to_owned());
    };
    let left: Vec<&VmView> = view
        .vms
        .iter()
        .filter(|vm| host.vms.contains(&vm.name))
        .collect();
    match host.mode {
        HostMode::Active => Standing::Failed("it takes VMs again: somebody resumed it".to_owned()),
        HostMode::Maintenance if left.is_empty() => {
            Standing::Done("empty, in maintenance".to_owned())
        }
        _ if host.state == HostState::Down => Standing::Failed("it went down".to_owned()),
        _ => {
            let one = |vm: &&VmView| format!("{} ({})", vm.name, waiting_for(vm));
            let names: Vec<String> = left.iter().map(one).collect();
            Standing::Busy(format!(
                "{} to go: {}",
                count(left.len(), "VM"),
                names.join(", ")
            ))
        }
    }
}

fn waiting_for(vm: &VmView) -> String {
    match vm.state {
        VmState::Running if !vm.why.is_empty() => vm.why.clone(),
        _ => vm_state(vm).0,
    }
}

/// Waits. Returns how long it took.
pub(crate) async fn wait(
    client: &Client,
    goal: &Goal,
    timeout: Millis,
    progress: &mut Progress,
) -> Result<Duration, CliError> {
    let deadline = Instant::now() + timeout.as_duration();
    loop {
        let view = client.get::<ClusterView>("/api/v1/cluster").await;
        let mut open = Vec::new();
        match view {
            Ok(view) => {
                for (name, standing) in goal.standing(&view) {
                    match standing {
                        Standing::Done(text) => progress.set(&name, &text, true),
                        Standing::Busy(text) => {
                            progress.set(&name, &text, false);
                            open.push(format!("{name}: {text}"));
                        }
                        Standing::HeldUp { state, why } => {
                            let text = format!("{state}: {why}");
                            let settles = progress.elapsed() < SETTLE;
                            progress.set(&name, if settles { &state } else { &text }, false);
                            open.push(format!("{name}: {text}"));
                        }
                        Standing::Failed(text) => {
                            progress.set(&name, &text, false);
                            return Err(CliError::Failed(format!("{name}: {text}")));
                        }
                    }
                }
                if open.is_empty() {
                    return Ok(progress.elapsed());
                }
            }
            // It may be restarting.
            Err(error @ (ClientError::Unreachable { .. } | ClientError::Broken(_))) => {
                if Instant::now() >= deadline {
                    return Err(error.into());
                }
                progress.note("the daemon does not answer; waiting for it");
            }
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Err(CliError::TimedOut(format!(
                "not done after {timeout}: {}\n  help: the work goes on; `quorate status` shows how it stands",
                open.join("; ")
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}
