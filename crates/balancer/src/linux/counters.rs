//! What the kernel counted, in the words of [`crate::Counters`]; and what a host adds to a trace.

use std::os::fd::AsFd as _;

use super::host::Host;
use super::object::kernel;
use super::sys;
use crate::abi;
use crate::model::{Counters, Duplicate, MemberCounters, ServiceCounters};
use crate::trace::{TraceAnswer, TraceQuery, trace};
use crate::{BalancerError, mac};
use std::net::IpAddr;

/// A claim of an address that was not repeated for so long is history.
const CLAIM_NS: u64 = 600_000_000_000;

impl Host {
    /// See [`crate::Datapath::counters`].
    pub(super) fn counters(&self) -> Result<Counters, BalancerError> {
        let mut counters = Counters::default();
        let cpus = self.tables.cpus.get(&0, 0);
        let cpus = cpus.map_err(kernel("reading", "counters"))?;
        for (index, name) in abi::CAUSES.iter().enumerate() {
            let sum = cpus.iter().map(|cpu| cpu.causes[index]).sum();
            counters.causes.insert((*name).to_owned(), sum);
        }
        let mut counted = None;
        for index in self.services.keys() {
            let Some(name) = self.service_name(*index) else {
                continue;
            };
            let (row, place) = (
                u32::from(*index) / abi::COUNTED,
                u32::from(*index) % abi::COUNTED,
            );
            if counted.as_ref().is_none_or(|(read, _)| *read != row) {
                let counts = self.tables.counts.get(&row, 0);
                counted = Some((row, counts.map_err(kernel("reading", "counts"))?));
            }
            let by_cpu = counted.iter().flat_map(|(_, counts)| counts.iter());
            let by_cpu = by_cpu.map(|counts| counts.of[place as usize]);
            let mut service = ServiceCounters {
                steered: by_cpu.clone().map(|one| one.packets).sum(),
                bytes: by_cpu.map(|one| one.bytes).sum(),
                ..ServiceCounters::default()
            };
            for edge in self.edges.values() {
                let key = abi::PairKey {
                    ifindex: edge.ifindex,
                    service: u32::from(*index),
                };
                // Only members have one.
                let Ok(pair) = self.tables.pairs.get(&key, 0) else {
                    continue;
                };
                let sum = |of: fn(&abi::PairCount) -> u64| pair.iter().map(of).sum();
                let counted = MemberCounters {
                    packets_in: sum(|one| one.packets_in),
                    bytes_in: sum(|one| one.bytes_in),
                    packets_out: sum(|one| one.packets_out),
                    bytes_out: sum(|one| one.bytes_out),
                    flows: sum(|one| one.flows),
                    refused: self.refused(&key),
                };
                service.members.insert(edge.spec.vm.clone(), counted);
            }
            counters.services.insert(name.clone(), service);
        }
        counters.offences = self.offences();
        counters.duplicates = self.duplicates()?;
        Ok(counters)
    }

    fn duplicates(&self) -> Result<Vec<Duplicate>, BalancerError> {
        let now = sys::boottime_ns();
        let all: Vec<(abi::DuplicateKey, abi::Duplicate)> =
            sys::entries(self.tables.duplicates.fd().as_fd())
                .map_err(kernel("reading", "duplicates"))?;
        let recent = all
            .iter()
            .filter(|(_, one)| now.saturating_sub(one.seen_ns) < CLAIM_NS);
        let mut found: Vec<Duplicate> = recent
            .map(|(key, one)| Duplicate {
                address: IpAddr::from(key.address),
                mac: one.mac,
                ifname: self.interface_name(one.ifindex),
                age_ms: now.saturating_sub(one.seen_ns) / 1_000_000,
                count: one.count,
            })
            .collect();
        found.sort_by_key(|one| (one.address, one.mac));
        Ok(found)
    }

    /// See [`crate::Datapath::trace`].
    pub(super) fn trace(
        &self,
        query: &TraceQuery,
        deadline_ns: u64,
    ) -> Result<TraceAnswer, BalancerError> {
        let service = query.service.to_string();
        let not_loaded = || BalancerError::NotLoaded {
            service: service.clone(),
        };
        let table = self
            .wanted
            .services
            .get(&query.service)
            .ok_or_else(not_loaded)?;
        let index = self.indexes.get(&table.id.0).copied();
        let index = index.ok_or_else(not_loaded)?;
        let mut answer = trace(table, query).map_err(|reason| BalancerError::Service {
            service: service.clone(),
            reason,
        })?;
        let lists = table.history.iter().chain(&table.next);
        let members: Vec<_> = lists.flat_map(|list| &list.members).collect();
        if let Some(mac) = self.pinned(index, &answer.flow) {
            answer.pinned = true;
            let member = members.iter().find(|member| member.mac == mac);
            answer.member = member.map(|member| member.vm.clone());
            answer.why.push(format!(
                "pinned here to {}: it knew the connection when the ring changed",
                mac::text(mac)
            ));
        }
        let chosen = answer.member.as_ref();
        let chosen = chosen.and_then(|vm| members.iter().rev().find(|member| member.vm == *vm));
        let mut edges = self.edges.values();
        let edge =
            chosen.and_then(|member| edges.find(|edge| edge.spec.mac == member.mac && edge.open));
        answer.why.push(match edge {
            Some(edge) => format!("its tap {} is on this host", edge.spec.ifname),
            None => {
                "it is not on this host: the frame goes back to the wire with its MAC".to_owned()
            }
        });
        if sys::boottime_ns() >= deadline_ns {
            answer
                .why
                .push("this host holds no lease now: it drops the packet".to_owned());
        }
        Ok(answer)
    }
}
