//! Hosts: their attributes, and what the cluster knows about them.

use super::super::model::{Cib, NodeState};
use super::super::rules::{Facts, resolve};
use super::super::values;
use super::options::{NoQuorum, Options};
use quorate_planner::engine::{Score, add};
use std::collections::BTreeMap;

/// A host as it is now.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostNow {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) score: Score,
    pub(crate) attributes: BTreeMap<String, String>,
    pub(crate) utilization: BTreeMap<String, String>,
    /// A member of the cluster that takes orders.
    pub(crate) up: bool,
    /// Nobody knows what it does.
    pub(crate) lost: bool,
    pub(crate) standby: bool,
    pub(crate) leaving: bool,
    pub(crate) maintenance: bool,
    pub(crate) joining: bool,
    /// What its health adds to every score; nothing where health does not count.
    pub(crate) health: Score,
}

/// All hosts, in the order of their names in the text.
pub(super) fn judge(cib: &Cib, options: &Options, now: i64) -> Vec<HostNow> {
    let mut hosts: Vec<HostNow> = cib
        .nodes
        .iter()
        .map(|node| {
            let facts = Facts {
                now,
                ..Facts::default()
            };
            let mut attributes = resolve(&node.attributes, &facts, None);
            attributes.insert("#uname".to_owned(), node.name.clone());
            attributes.insert("#id".to_owned(), node.id.clone());
            attributes.insert("#kind".to_owned(), "cluster".to_owned());
            let decides = cib.coordinator.as_deref() == Some(node.id.as_str());
            attributes.insert("#is_dc".to_owned(), decides.to_string());
            if let Some(name) = &options.cluster_name {
                attributes.insert("#cluster-name".to_owned(), name.clone());
                let site = attributes.get("site-name").unwrap_or(name).clone();
                attributes.insert("#site-name".to_owned(), site);
            }
            HostNow {
                id: node.id.clone(),
                name: node.name.clone(),
                score: node.score,
                utilization: resolve(&node.utilization, &facts, None),
                lost: options.startup_fencing,
                standby: values::is_true(attributes.get("standby")),
                maintenance: values::is_true(attributes.get("maintenance")),
                attributes,
                ..HostNow::default()
            }
        })
        .collect();
    let finder = Finder::new(&hosts);
    for state in &cib.states {
        let Some(at) = finder.find(state) else {
            continue;
        };
        Judge {
            host: &mut hosts[at],
            state,
            options,
            now,
        }
        .run(cib.has_quorum);
    }
    for host in &mut hosts {
        host.health = options.health.map_or(0, |health| {
            let own = host.attributes.iter();
            let values = own.filter(|(name, _)| name.starts_with("#health"));
            values.fold(health.base, |sum, (_, value)| {
                add(
                    sum,
                    match value.to_ascii_lowercase().as_str() {
                        "red" => health.red,
                        "yellow" => health.yellow,
                        "green" => health.green,
                        other => values::score(other).unwrap_or(0),
                    },
                )
            })
        });
    }
    hosts
}

/// Finds the host that a state is about.
pub(super) struct Finder {
    ids: BTreeMap<String, usize>,
    names: BTreeMap<String, usize>,
}

impl Finder {
    pub(super) fn new(hosts: &[HostNow]) -> Self {
        let mut finder = Self {
            ids: BTreeMap::new(),
            names: BTreeMap::new(),
        };
        for (at, host) in hosts.iter().enumerate() {
            finder.ids.entry(host.id.to_lowercase()).or_insert(at);
            finder.names.entry(host.name.to_lowercase()).or_insert(at);
        }
        finder
    }

    pub(super) fn find(&self, state: &NodeState) -> Option<usize> {
        let by_id = self.ids.get(&state.id.to_lowercase()).copied();
        by_id.or_else(|| {
            self.names
                .get(&state.name.as_ref()?.to_lowercase())
                .copied()
        })
    }
}

struct Judge<'a> {
    host: &'a mut HostNow,
    state: &'a NodeState,
    options: &'a Options,
    now: i64,
}

impl Judge<'_> {
    fn run(&mut self, has_quorum: bool) {
        let facts = Facts {
            now: self.now,
            ..Facts::default()
        };
        let transient = resolve(&self.state.attributes, &facts, None);
        self.host.attributes.extend(transient);
        for (name, value) in resolve(&self.state.utilization, &facts, None) {
            self.host.utilization.entry(name).or_insert(value);
        }
        self.host.standby = values::is_true(self.host.attributes.get("standby"));
        self.host.maintenance = values::is_true(self.host.attributes.get("maintenance"));
        let shutdown = self.host.attributes.get("shutdown");
        self.host.leaving = shutdown.is_some_and(|value| value != "0");
        self.host.lost = false;
        self.host.up = match self.options.fencing {
            true => self.up_with_fencing(),
            false => self.up_without_fencing(),
        };
        if !has_quorum && self.host.up && self.options.no_quorum == NoQuorum::Fence {
            self.host.lost = true;
        }
    }

    /// Since when it is a member: -1 if never, 0 if not.
    fn member_since(&self) -> i64 {
        match self.state.in_ccm.as_deref() {
            None => -1,
            Some(text) => match values::truth(text) {
                Some(true) => self.now.max(1),
                Some(false) => 0,
                None => text.trim().parse().ok().filter(|at| *at >= 0).unwrap_or(-1),
            },
        }
    }

    /// Since when its process answers: 0 if it does not.
    fn online_since(&self) -> i64 {
        match self.state.crmd.as_deref() {
            None => 0,
            Some(text) if text.eq_ignore_ascii_case("offline") => 0,
            Some(text) if text.eq_ignore_ascii_case("online") => 1,
            Some(text) => text.trim().parse().ok().filter(|at| *at >= 0).unwrap_or(0),
        }
    }

    fn join(&self) -> &str {
        self.state.join.as_deref().unwrap_or_default()
    }

    fn up_without_fencing(&mut self) -> bool {
        let (member, online) = (self.member_since(), self.online_since());
        let expected = self.state.expected.as_deref().unwrap_or_default();
        let expected_up = !self.host.leaving && expected.eq_ignore_ascii_case("member");
        if member <= 0 {
            return false;
        }
        if online > 0 {
            return self.join().eq_ignore_ascii_case("member");
        }
        self.host.lost |= expected_up;
        false
    }

    fn up_with_fencing(&mut self) -> bool {
        let (member, online) = (self.member_since(), self.online_since());
        if self.host.leaving {
            return online > 0;
        }
        if member < 0 {
            self.host.lost = true;
            return false;
        }
        let terminate = self.host.attributes.get("terminate").is_some_and(|value| {
            values::truth(value).unwrap_or_else(|| value.parse::<i64>().is_ok_and(|at| at > 0))
        });
        let expected = self.state.expected.as_deref();
        match self.join() {
            "banned" => self.host.lost = true,
            join if terminate => {
                if member <= 0 && online <= 0 && join == "down" {
                    return false;
                }
                self.host.lost = true;
            }
            _ if expected.is_none_or(|expected| expected == "down") => {
                if self.pending_too_long(member, online) {
                    self.host.lost = true;
                } else if member > 0 || online > 0 {
                    self.host.standby = true;
                    self.host.joining = true;
                }
            }
            _ if member <= 0 || online <= 0 => self.host.lost = true,
            "member" => {}
            "pending" | "down" => {
                self.host.standby = true;
                self.host.joining = true;
            }
            _ => self.host.lost = true,
        }
        member > 0
    }

    fn pending_too_long(&self, member: i64, online: i64) -> bool {
        let limit_s = i64::try_from(self.options.node_pending_ms / 1000).unwrap_or(i64::MAX);
        limit_s > 0 && member > 0 && online <= 0 && self.now >= member.saturating_add(limit_s)
    }
}
