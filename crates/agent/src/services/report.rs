//! What a host says of services.

use super::{Services, lock};
use crate::vm::Shared;
use quorate_balancer::{Applied, Counters, Duplicate, ServiceTable, Wanted};
use quorate_state::State;
use quorate_types::service::{MemberReport, Offences, ServiceReport, UplinkMode};
use quorate_types::{NetworkName, ServiceName, VmName};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A claim that was not heard again for so long is history.
const DUPLICATE_FOR_MS: u64 = 15_000;
/// A flow that was idle for longer is not one that a drain waits for.
const IDLE_MS: u64 = 60_000;

/// What a guest was kept from sending is told for so long after the last time.
const OFFENCE_FOR: Duration = Duration::from_secs(60);

/// Guests that were kept from sending something not long ago.
#[derive(Debug, Default)]
pub(super) struct Recent {
    by_vm: BTreeMap<VmName, (Offences, Instant)>,
}

impl Recent {
    /// Notes what was counted so far.
    pub(super) fn note(&mut self, counters: &Counters) {
        self.by_vm
            .retain(|vm, _| counters.offences.contains_key(vm));
        for (vm, count) in &counters.offences {
            let known = self.by_vm.get(vm).is_some_and(|(known, _)| known == count);
            if !known {
                self.by_vm.insert(vm.clone(), (*count, Instant::now()));
            }
        }
    }

    fn told(&self) -> BTreeMap<VmName, Offences> {
        let recent = self.by_vm.iter();
        let recent = recent.filter(|(_, (_, at))| at.elapsed() < OFFENCE_FOR);
        recent
            .map(|(vm, (count, _))| (vm.clone(), *count))
            .collect()
    }
}

/// The host's report on services.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Reports {
    pub(crate) services: BTreeMap<ServiceName, ServiceReport>,
    pub(crate) uplinks: BTreeMap<NetworkName, UplinkMode>,
    pub(crate) offences: BTreeMap<VmName, Offences>,
}

/// What it is made of.
pub(super) struct Seen<'a> {
    pub(super) state: &'a State,
    pub(super) wanted: &'a Wanted,
    pub(super) applied: &'a Applied,
    /// Why the datapath does not hold what it should.
    pub(super) problem: Option<&'a str>,
    /// Its lease is over because of that; until then it serves by the tables before.
    pub(super) silent: bool,
    pub(super) offences: &'a Recent,
    pub(super) counters: &'a Counters,
    pub(super) services: &'a Services,
    pub(super) lease_good: bool,
}

impl Seen<'_> {
    pub(super) fn report(&self) -> Reports {
        let services = self.wanted.services.iter();
        Reports {
            services: services
                .map(|(name, table)| (name.clone(), self.service(name, table)))
                .collect(),
            offences: self.offences.told(),
            uplinks: match self.problem.filter(|_| self.silent) {
                Some(problem) => {
                    let networks = self.wanted.networks.keys();
                    let bad = |name: &NetworkName| {
                        (name.clone(), UplinkMode::Problem(problem.to_owned()))
                    };
                    networks.map(bad).collect()
                }
                None => self.applied.uplinks.clone(),
            },
        }
    }

    fn service(&self, name: &ServiceName, table: &ServiceTable) -> ServiceReport {
        let members = self.members(name);
        let loaded = self.applied.services.get(name);
        let loaded = loaded.filter(|_| !self.silent);
        let active = loaded.map_or(0, |loaded| loaded.active);
        let prepared = loaded.and_then(|loaded| loaded.prepared);
        let problem = self
            .problem
            .map(|problem| match self.silent {
                true => {
                    format!("{problem} (it serves nothing until that is mended; it tries again)")
                }
                false => format!("{problem} (it tries again, and is silent when its lease ends)"),
            })
            .or_else(|| loaded.and_then(|loaded| loaded.problem.clone()))
            .or_else(|| self.duplicate(table))
            .or_else(|| self.edge_problem(&members))
            .or_else(|| self.attract_problem(table))
            .or_else(|| cannot_check(&members));
        ServiceReport {
            active,
            prepared: prepared.filter(|epoch| self.services.pins.are_done(name, *epoch)),
            members,
            problem,
            holding: table.holder && active > 0 && self.problem.is_none() && self.lease_good,
        }
    }

    /// Members whose guest runs here.
    fn members(&self, name: &ServiceName) -> BTreeMap<VmName, MemberReport> {
        let Some(service) = self.state.services.get(name) else {
            return BTreeMap::new();
        };
        let (lives, checks) = (lock(&self.services.lives), lock(&self.services.checks));
        let members = self.state.members(&service.spec);
        let here = members.filter(|(vm, _, _)| lives.contains_key(*vm));
        here.map(|(vm, _, _)| {
            let checked = checks.get(&(name.clone(), vm.clone()));
            let mut member = checked.cloned().unwrap_or_default();
            member.refused = self.refused(name, vm);
            (vm.clone(), member)
        })
        .collect()
    }

    /// Connections that the service's limits kept from a member, if there were any.
    fn refused(&self, name: &ServiceName, vm: &VmName) -> Option<u64> {
        let counted = self.counters.services.get(name)?.members.get(vm)?;
        Some(counted.refused).filter(|refused| *refused > 0)
    }

    fn duplicate(&self, table: &ServiceTable) -> Option<String> {
        let duplicates = self.counters.duplicates.iter();
        let recent = duplicates
            .filter(|one| table.addresses.contains(&one.address))
            .filter(|one| one.age_ms <= DUPLICATE_FOR_MS);
        let newest = recent.min_by_key(|one| one.age_ms)?;
        let edges = lock(&self.services.edges);
        let vm = edges.get(&newest.ifname).map(|edge| edge.vm.clone());
        Some(describe(newest, vm.as_ref()))
    }

    fn edge_problem(&self, members: &BTreeMap<VmName, MemberReport>) -> Option<String> {
        let (edges, problems) = (
            lock(&self.services.edges),
            lock(&self.services.edge_problems),
        );
        let of_member = |ifname: &String| {
            let edge = edges.get(ifname);
            edge.is_some_and(|edge| members.contains_key(&edge.vm))
        };
        let mut found = problems.iter().filter(|(ifname, _)| of_member(ifname));
        found.next().map(|(_, problem)| problem.clone())
    }

    fn attract_problem(&self, table: &ServiceTable) -> Option<String> {
        let concerned = table.holder || !table.attractor.has_holder();
        let sent = || lock(&self.services.send_problem).clone();
        lock(&self.services.attract_problem)
            .clone()
            .or_else(sent)
            .filter(|_| concerned)
    }
}

/// Who claims an address, and where.
fn describe(duplicate: &Duplicate, vm: Option<&VmName>) -> String {
    let mac = quorate_balancer::mac::text(duplicate.mac);
    let place = match vm {
        Some(vm) => format!("VM {vm} claims it, on its tap {}", duplicate.ifname),
        None => format!("heard on {}", duplicate.ifname),
    };
    format!(
        "address {} is also claimed by {mac} ({place}): clients reach one or the other; take it off that machine, or give \
         the service another address",
        duplicate.address
    )
}

/// A check that could not even be tried.
fn cannot_check(members: &BTreeMap<VmName, MemberReport>) -> Option<String> {
    let cannot = |(vm, member): (&VmName, &MemberReport)| {
        let problem = member
            .problem
            .as_ref()
            .filter(|_| member.healthy.is_none())?;
        Some(format!("{vm} cannot be checked: {problem}"))
    };
    members.iter().find_map(cannot)
}

/// How many connections drained members still have.
pub(super) async fn count_drains(shared: &Shared, state: &State, reports: &mut Reports) {
    for (name, report) in &mut reports.services {
        let Some(service) = state.services.get(name) else {
            continue;
        };
        for (vm, member) in &mut report.members {
            if !service.draining.contains_key(vm) {
                continue;
            }
            let taps: Vec<String> = lock(&shared.services.edges)
                .values()
                .filter(|edge| edge.vm == *vm && edge.network == service.spec.network)
                .map(|edge| edge.ifname.clone())
                .collect();
            let mut count = 0;
            for tap in taps {
                let flows = shared.services.datapath.flows(&tap).await;
                let live = flows.unwrap_or_default().into_iter().filter(|flow| {
                    flow.service == Some(service.id) && !flow.closing && flow.idle_ms < IDLE_MS
                });
                count += u64::try_from(live.count()).unwrap_or(u64::MAX);
            }
            member.flows = Some(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duplicate_is_named_with_its_port() {
        let mut duplicate = Duplicate {
            address: "10.77.0.200".parse().unwrap(),
            mac: [2, 0, 0, 0, 0x0b, 0xad],
            ifname: "lan0".into(),
            age_ms: 10,
            count: 3,
        };
        let text = describe(&duplicate, None);
        assert!(text.contains("10.77.0.200 is also claimed by 02:00:00:00:0b:ad (heard on lan0)"));
        duplicate.ifname = "qt-x".into();
        let vm = VmName::new("rogue").unwrap();
        assert!(describe(&duplicate, Some(&vm)).contains("VM rogue claims it, on its tap qt-x"));
    }
}
