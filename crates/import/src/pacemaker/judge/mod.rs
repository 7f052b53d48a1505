//! What holds now: properties, hosts, and where every resource runs, from what the status section
//! records.

mod failures;
mod history;
mod hosts;
mod migrations;
mod options;
mod things;

pub(super) use hosts::HostNow;
pub(super) use options::{NoQuorum, Options};
pub(super) use things::{GroupNow, Thing};

use super::model::{Cib, Event};
use history::Telling;
use std::collections::BTreeMap;
use things::Maker;

/// A CIB with its status interpreted.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) options: Options,
    pub(super) hosts: Vec<HostNow>,
    pub(super) things: Vec<Thing>,
    pub(super) groups: Vec<GroupNow>,
    pub(super) now: i64,
    pub(super) has_fence_device: bool,
    pub(super) quorate: bool,
}

impl Judged {
    /// Judges what is written, at a time in seconds since 1970.
    pub(super) fn new(cib: &Cib, now: i64) -> Self {
        let options = Options::new(cib, now);
        let hosts = hosts::judge(cib, &options, now);
        let maker = Maker {
            cib,
            options: &options,
            hosts: &hosts,
            now,
        };
        let (things, groups) = maker.all();
        let mut judged = Self {
            has_fence_device: options.watchdog || cib.has_fence_device,
            options,
            hosts,
            things,
            groups,
            now,
            quorate: cib.has_quorum,
        };
        judged.tell(cib);
        judged.ban_after_failures();
        judged
    }

    /// Whether a host can be fenced.
    pub(super) fn can_fence(&self, host: usize) -> bool {
        self.options.fencing
            && self.has_fence_device
            && (self.quorate || self.options.no_quorum == NoQuorum::Ignore || self.hosts[host].up)
    }

    /// Reads the histories of all hosts: first of those that are up.
    fn tell(&mut self, cib: &Cib) {
        let mut index: BTreeMap<String, usize> = BTreeMap::new();
        for (at, thing) in self.things.iter().enumerate() {
            index.entry(thing.id.clone()).or_insert(at);
        }
        let mut told = vec![false; self.hosts.len()];
        for up_only in [true, false] {
            if !up_only && !self.options.fencing {
                break;
            }
            for state in &cib.states {
                let Some(host) = hosts::find(&self.hosts, state) else {
                    continue;
                };
                let wait = up_only && !self.options.fencing && !self.hosts[host].up;
                if told[host] || wait || state.name.is_none() {
                    continue;
                }
                told[host] = true;
                for history in &state.histories {
                    if history.events.is_empty() {
                        continue;
                    }
                    let thing = match index.get(&history.resource) {
                        Some(thing) => *thing,
                        // It may belong to what is not understood.
                        None if !cib.unsupported.is_empty() => continue,
                        None => {
                            let thing = self.remember(cib, history);
                            index.insert(history.resource.clone(), thing);
                            thing
                        }
                    };
                    Telling::new(self, cib, thing, host).run(&history.events);
                }
            }
        }
    }

    /// One copy of a clone.
    pub(super) fn copy_of(&self, cib: &Cib, clone: &super::model::CloneOf) -> Thing {
        let maker = Maker {
            cib,
            options: &self.options,
            hosts: &self.hosts,
            now: self.now,
        };
        maker.copy(clone)
    }

    /// A resource that was removed from the configuration but may still run.
    fn remember(&mut self, cib: &Cib, history: &super::model::History) -> usize {
        let maker = Maker {
            cib,
            options: &self.options,
            hosts: &self.hosts,
            now: self.now,
        };
        let thing = maker.removed(Thing {
            place: history.place,
            id: history.resource.clone(),
            class: history.class.clone(),
            provider: history.provider.clone(),
            kind: history.kind.clone(),
            ..Thing::default()
        });
        self.things.push(thing);
        self.things.len() - 1
    }
}

/// The events of a resource on a host.
fn events_of<'a>(cib: &'a Cib, judged: &Judged, resource: &str, host: usize) -> Vec<&'a Event> {
    let name = &judged.hosts[host].name;
    cib.states
        .iter()
        .filter(|state| state.name.as_ref() == Some(name))
        .flat_map(|state| &state.histories)
        .filter(|history| history.resource == resource)
        .flat_map(|history| &history.events)
        .collect()
}
