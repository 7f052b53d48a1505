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
use super::read::MAX_SCORES;
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
    /// Places of the histories of each host and resource.
    histories: BTreeMap<(usize, String), Vec<(usize, usize)>>,
    names: BTreeMap<String, usize>,
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
            histories: BTreeMap::new(),
            names: BTreeMap::new(),
        };
        judged.index(cib);
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

    fn index(&mut self, cib: &Cib) {
        for (at, host) in self.hosts.iter().enumerate() {
            self.names.entry(host.name.to_lowercase()).or_insert(at);
        }
        for (state_at, state) in cib.states.iter().enumerate() {
            let Some(host) = state.name.as_ref().and_then(|name| self.host_named(name)) else {
                continue;
            };
            for (at, history) in state.histories.iter().enumerate() {
                let key = (host, history.resource.clone());
                self.histories.entry(key).or_default().push((state_at, at));
            }
        }
    }

    /// The host with a name.
    pub(super) fn host_named(&self, name: &str) -> Option<usize> {
        self.names.get(&name.to_lowercase()).copied()
    }

    /// Reads the histories of all hosts: first of those that are up.
    fn tell(&mut self, cib: &Cib) {
        let mut index: BTreeMap<String, usize> = BTreeMap::new();
        for (at, thing) in self.things.iter().enumerate() {
            index.entry(thing.id.clone()).or_insert(at);
        }
        let mut told = vec![false; self.hosts.len()];
        let finder = hosts::Finder::new(&self.hosts);
        for up_only in [true, false] {
            if !up_only && !self.options.fencing {
                break;
            }
            for state in &cib.states {
                let Some(host) = finder.find(state) else {
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
                        None if !cib.unsupported.is_empty() || self.is_full() => continue,
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

    /// No more resources can be remembered than there may be scores.
    fn is_full(&self) -> bool {
        self.things.len().saturating_mul(self.hosts.len()) > MAX_SCORES
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
    let key = (host, resource.to_owned());
    let places = judged.histories.get(&key).into_iter().flatten();
    places
        .flat_map(|(state, history)| &cib.states[*state].histories[*history].events)
        .collect()
}
