//! A second opinion on what the engine decides: plays the steps through and checks them against the site,
//! sharing nothing with the code that made them.
//!
//! ```text
//! Site, Outcome --replay--> where every copy is before each step --checks--> flaws
//! ```
//! [`places`] knows hosts, bans, rules and capacity; [`orders`] what comes before what.
//!
//! Owns: the test oracle of the engine, and the last look before a plan is shown. Always holds: it reads
//! the site and the outcome only, and re-derives every fact with code of its own; time is bounded by
//! the size of the input. Not judged: wishes (a worse host is no flaw), what the plan neither gives nor
//! could change (unmanaged things, things that cannot be stopped), rules with groups that do not share a
//! host, and orders that go round in a circle.

mod orders;
mod places;

use super::site::{Body, HostId, Item, Quorum, Requires, Site, UnitId};
use super::{Outcome, Step};
use std::collections::{BTreeMap, BTreeSet};

/// Most pairs of items that are looked at.
const MAX_PAIRS: usize = 5_000_000;

/// A promise that a plan of the engine would break. Names are those of the site.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Flaw {
    /// The steps lead elsewhere than the placement says.
    #[error("{unit}: the steps lead to {steps}, the placement says {placement}")]
    Placement {
        /// Which.
        unit: String,
        /// Where the steps lead.
        steps: String,
        /// Where it is said to be.
        placement: String,
    },
    /// A step about something that must not be touched.
    #[error("{unit} is touched though it is not to be: {why}")]
    Untouchable {
        /// Which.
        unit: String,
        /// What stands against it.
        why: &'static str,
    },
    /// A host that cannot take it.
    #[error("{unit} goes to {host}, which cannot take it: it {why}")]
    BadTarget {
        /// Which.
        unit: String,
        /// The host.
        host: String,
        /// What is wrong with the host.
        why: &'static str,
    },
    /// A live migration from where it does not run or nobody can do it.
    #[error("{unit} migrates from {host}, which {why}")]
    BadSource {
        /// Which.
        unit: String,
        /// The host.
        host: String,
        /// What is wrong with the host.
        why: &'static str,
    },
    /// It would run twice.
    #[error("{unit} would run on {host} while it still runs on {other}")]
    SecondCopy {
        /// Which.
        unit: String,
        /// Where it arrives.
        host: String,
        /// Where it is.
        other: String,
    },
    /// A lost host may still run it.
    #[error("{unit} is {act} before {lost} is fenced, which may still run it")]
    Unfenced {
        /// Which.
        unit: String,
        /// `started` or `stopped`.
        act: &'static str,
        /// The lost host.
        lost: String,
    },
    /// A start without a majority.
    #[error("{unit} is started without a majority")]
    NoQuorum {
        /// Which.
        unit: String,
    },
    /// It is banned from the host.
    #[error("{unit} is on {host} afterwards, where it must not run")]
    Banned {
        /// Which.
        unit: String,
        /// The host.
        host: String,
    },
    /// A rule that things run together.
    #[error("{unit} is on {host} afterwards, not with {other} ({at})")]
    Apart {
        /// The one that follows.
        unit: String,
        /// Where it is.
        host: String,
        /// The one that it follows.
        other: String,
        /// Where that is.
        at: String,
    },
    /// A rule that things do not run together.
    #[error("{unit} and {other} are both on {host} afterwards")]
    Together {
        /// The one that keeps away.
        unit: String,
        /// The one that it keeps away from.
        other: String,
        /// Where they are.
        host: String,
    },
    /// More than there is.
    #[error("{host} would need {need} of its capacity number {dimension} and has {have}")]
    Capacity {
        /// The host.
        host: String,
        /// Which kind of capacity, from 0.
        dimension: usize,
        /// What is needed.
        need: i64,
        /// What is there.
        have: i64,
    },
    /// Done too early.
    #[error("{then} {then_act} before {first} {first_act}")]
    Order {
        /// What should come first.
        first: String,
        /// `starts` or `stops`.
        first_act: &'static str,
        /// What comes too early.
        then: String,
        /// `starts` or `stops`.
        then_act: &'static str,
    },
    /// Started without what it needs.
    #[error("{unit} is started and {needs} does not run")]
    Dependency {
        /// Which.
        unit: String,
        /// What it needs.
        needs: String,
    },
    /// Left without what it needs.
    #[error("{first} is stopped while {unit}, which needs it, runs")]
    LeftBehind {
        /// What is stopped.
        first: String,
        /// What needs it.
        unit: String,
    },
    /// **dependents-stay-up**.
    #[error("{unit} is restarted though neither it nor what it needs is stopped or started")]
    NeedlessRestart {
        /// Which.
        unit: String,
    },
    /// Nobody looked.
    #[error("nobody checked the plan: its rules come to {pairs} pairs, more than {MAX_PAIRS}")]
    Unchecked {
        /// So many pairs of items.
        pairs: usize,
    },
    /// A host is let go too early.
    #[error("{host} is let go while {unit} runs there")]
    Released {
        /// The host.
        host: String,
        /// What runs there.
        unit: String,
    },
}

/// Checks what [`super::solve`] decided. Empty: nothing found.
#[must_use]
pub fn lint(site: &Site, outcome: &Outcome) -> Vec<Flaw> {
    let unsound = !site.is_sound() || outcome.placement.len() != site.units.len();
    if unsound {
        return Vec::new();
    }
    let pairs = pairs(site);
    if pairs > MAX_PAIRS {
        return vec![Flaw::Unchecked { pairs }];
    }
    let mut found = BTreeSet::new();
    let mut lint = Lint::new(site, outcome);
    for (number, step) in outcome.steps.iter().enumerate() {
        lint.step(number, *step, &mut found);
    }
    lint.placement(outcome, &mut found);
    lint.places(&mut found);
    lint.orders(&mut found);
    found.into_iter().collect()
}

/// Pairs of items that the rules of a site come to.
fn pairs(site: &Site) -> usize {
    let items = |unit: UnitId| site.group(unit).map_or(1, |group| group.members.len());
    let all = |units: &[UnitId]| units.iter().map(|unit| items(*unit)).sum::<usize>();
    let orders = site.orders.iter();
    let orders = orders.map(|order| items(order.first).saturating_mul(items(order.then)));
    let rules = site.together.iter();
    let rules = rules.map(|rule| items(rule.dependent).saturating_mul(items(rule.primary)));
    let any = site.any_of.iter();
    let any = any.map(|any| all(&any.first).saturating_mul(all(&any.then)));
    orders
        .chain(rules)
        .chain(any)
        .fold(0, usize::saturating_add)
}

/// A site while its steps are played.
struct Lint<'a> {
    site: &'a Site,
    /// Hosts of each item, as of the step that is looked at.
    at: Vec<BTreeSet<HostId>>,
    /// Hosts that were fenced so far.
    fenced: BTreeSet<HostId>,
    /// When each item is started and stopped, by number of step; a live migration is neither.
    starts: BTreeMap<UnitId, usize>,
    stops: BTreeMap<UnitId, Vec<(usize, HostId)>>,
    migrations: BTreeMap<UnitId, usize>,
    fences: BTreeMap<HostId, usize>,
    /// What is needed to start each item, by mandatory orders and ordered groups.
    needs: Vec<Vec<UnitId>>,
    /// What needs each item; true: it must be stopped before that is.
    needed_by: Vec<Vec<(UnitId, bool)>>,
    /// What each item comes after for any reason that could restart it.
    moved_by: Vec<Vec<UnitId>>,
    /// Items on orders that go round in a circle.
    circular: BTreeSet<UnitId>,
    /// Items that cannot be stopped: nobody may, or what must be stopped before cannot be.
    held: BTreeSet<UnitId>,
}

impl<'a> Lint<'a> {
    fn new(site: &'a Site, outcome: &Outcome) -> Self {
        let at = site.units.iter().map(|unit| match &unit.body {
            Body::Item(item) => item.active.iter().copied().collect(),
            Body::Group(_) => BTreeSet::new(),
        });
        let mut lint = Self {
            site,
            at: at.collect(),
            fenced: BTreeSet::new(),
            starts: BTreeMap::new(),
            stops: BTreeMap::new(),
            migrations: BTreeMap::new(),
            fences: BTreeMap::new(),
            needs: vec![Vec::new(); site.units.len()],
            needed_by: vec![Vec::new(); site.units.len()],
            moved_by: vec![Vec::new(); site.units.len()],
            circular: BTreeSet::new(),
            held: BTreeSet::new(),
        };
        for (number, step) in outcome.steps.iter().enumerate() {
            match *step {
                Step::Start { unit, .. } => {
                    lint.starts.insert(unit, number);
                }
                Step::Stop { unit, host } => {
                    lint.stops.entry(unit).or_default().push((number, host));
                }
                Step::Migrate { unit, .. } => {
                    lint.migrations.insert(unit, number);
                }
                Step::Fence { host } => {
                    lint.fences.insert(host, number);
                }
                Step::Release { .. } => {}
            }
        }
        lint.learn_needs();
        lint
    }

    fn unit(&self, unit: UnitId) -> String {
        self.site.units[unit].name.clone()
    }

    fn host(&self, host: HostId) -> String {
        self.site.hosts[host].name.clone()
    }

    fn hosts(&self, hosts: impl IntoIterator<Item = HostId>) -> String {
        let names: Vec<String> = hosts.into_iter().map(|host| self.host(host)).collect();
        match names.is_empty() {
            true => "nowhere".to_owned(),
            false => names.join(" and "),
        }
    }

    /// The items that a unit stands for.
    fn items(&self, unit: UnitId) -> Vec<UnitId> {
        match &self.site.units[unit].body {
            Body::Item(_) => vec![unit],
            Body::Group(group) => group.members.clone(),
        }
    }

    fn runs(&self, unit: UnitId) -> bool {
        let items = self.items(unit);
        !items.is_empty() && items.iter().all(|item| !self.at[*item].is_empty())
    }

    /// Nobody may touch it, or nobody can.
    fn untouchable(&self, item: &Item) -> Option<&'static str> {
        let rules = &self.site.rules;
        let maintained = |host: &HostId| self.site.hosts[*host].maintenance;
        if rules.hands_off {
            Some("lost hosts cannot be fenced, so nothing is touched")
        } else if !item.managed {
            Some("it is not managed")
        } else if item.active.iter().any(maintained) {
            Some("its host is in maintenance")
        } else {
            None
        }
    }

    fn step(&mut self, number: usize, step: Step, found: &mut BTreeSet<Flaw>) {
        match step {
            Step::Fence { host } => {
                self.fenced.insert(host);
                for hosts in &mut self.at {
                    hosts.remove(&host);
                }
            }
            Step::Stop { unit, host } => {
                self.touch(unit, found);
                self.stop(unit, host, found);
                self.at[unit].remove(&host);
            }
            Step::Start { unit, host } => {
                self.touch(unit, found);
                self.arrive(unit, host, None, found);
                self.start(unit, host, found);
                self.start_in_order(number, unit, found);
                self.at[unit].insert(host);
            }
            Step::Migrate { unit, from, to } => {
                self.touch(unit, found);
                self.depart(unit, from, found);
                self.arrive(unit, to, Some(from), found);
                self.at[unit].remove(&from);
                self.at[unit].insert(to);
            }
            Step::Release { host } => self.release(host, found),
        }
    }

    fn touch(&self, unit: UnitId, found: &mut BTreeSet<Flaw>) {
        let why = self.site.item(unit).and_then(|item| self.untouchable(item));
        if let Some(why) = why {
            let unit = self.unit(unit);
            found.insert(Flaw::Untouchable { unit, why });
        }
    }

    fn stop(&self, unit: UnitId, host: HostId, found: &mut BTreeSet<Flaw>) {
        let Some(item) = self.site.item(unit) else {
            return;
        };
        let lost = self.site.hosts[host].lost || !self.site.hosts[host].up;
        if lost && item.requires == Requires::Fencing && !self.fenced.contains(&host) {
            found.insert(Flaw::Unfenced {
                unit: self.unit(unit),
                act: "stopped",
                lost: self.host(host),
            });
        }
        if !self.fenced.contains(&host) {
            self.left_behind(unit, found);
        }
    }

    fn depart(&self, unit: UnitId, from: HostId, found: &mut BTreeSet<Flaw>) {
        let host = &self.site.hosts[from];
        let live = self.site.item(unit).is_some_and(|item| item.live);
        let why = if !self.at[unit].contains(&from) {
            "does not run it"
        } else if !host.up || host.lost || self.fenced.contains(&from) {
            "is lost"
        } else if !live {
            "runs it, but it cannot move while it runs"
        } else {
            return;
        };
        found.insert(Flaw::BadSource {
            unit: self.unit(unit),
            host: self.host(from),
            why,
        });
    }

    /// Whether the host can take it, and it runs nowhere else.
    fn arrive(&self, unit: UnitId, to: HostId, from: Option<HostId>, found: &mut BTreeSet<Flaw>) {
        let host = &self.site.hosts[to];
        let tests = [
            (!host.up, "is not up"),
            (host.lost || self.fenced.contains(&to), "is lost"),
            (host.joining, "is joining"),
            (host.standby, "is on standby"),
            (host.leaving, "wants to leave"),
            (host.maintenance, "is in maintenance"),
        ];
        for (_, why) in tests.into_iter().filter(|(holds, _)| *holds) {
            found.insert(Flaw::BadTarget {
                unit: self.unit(unit),
                host: self.host(to),
                why,
            });
        }
        let copies = self.at[unit].iter().copied();
        for other in copies.filter(|at| *at != to && Some(*at) != from) {
            found.insert(Flaw::SecondCopy {
                unit: self.unit(unit),
                host: self.host(to),
                other: self.host(other),
            });
        }
    }

    /// A start: no lost host may still run it, and there is a majority.
    fn start(&self, unit: UnitId, to: HostId, found: &mut BTreeSet<Flaw>) {
        let Some(item) = self.site.item(unit) else {
            return;
        };
        for (lost, host) in self.site.hosts.iter().enumerate() {
            let gone = host.lost || !host.up;
            let may_run = match item.requires {
                Requires::Fencing => {
                    item.active.contains(&lost) || (host.lost && !item.known_on.contains(&lost))
                }
                Requires::Quorum | Requires::Nothing => false,
            };
            if gone && may_run && lost != to && !self.fenced.contains(&lost) {
                found.insert(Flaw::Unfenced {
                    unit: self.unit(unit),
                    act: "started",
                    lost: self.host(lost),
                });
            }
        }
        let allowed = match self.site.rules.quorum {
            Quorum::Held => true,
            Quorum::Freeze => !item.active.is_empty(),
            Quorum::Stop => false,
        };
        if !allowed && item.requires != Requires::Nothing {
            let unit = self.unit(unit);
            found.insert(Flaw::NoQuorum { unit });
        } else if self.site.rules.stop_all {
            let why = "everything is to stop";
            let unit = self.unit(unit);
            found.insert(Flaw::Untouchable { unit, why });
        } else if item.may_run_elsewhere && item.active.is_empty() {
            let why = "it may run on a host that cannot be asked yet";
            let unit = self.unit(unit);
            found.insert(Flaw::Untouchable { unit, why });
        }
    }

    fn release(&self, host: HostId, found: &mut BTreeSet<Flaw>) {
        if self.site.hosts[host].maintenance {
            return;
        }
        for unit in 0..self.site.units.len() {
            let here = self.at[unit].contains(&host);
            let touched = self.site.item(unit).is_some_and(|item| {
                !item.maintenance && !item.blocked && self.untouchable(item).is_none()
            });
            if here && touched {
                found.insert(Flaw::Released {
                    host: self.host(host),
                    unit: self.unit(unit),
                });
            }
        }
    }

    /// The steps lead to the placement.
    fn placement(&self, outcome: &Outcome, found: &mut BTreeSet<Flaw>) {
        for (unit, said) in outcome.placement.iter().enumerate() {
            let said: BTreeSet<HostId> = said.iter().copied().collect();
            if self.site.item(unit).is_some() && said != self.at[unit] {
                found.insert(Flaw::Placement {
                    unit: self.unit(unit),
                    steps: self.hosts(self.at[unit].iter().copied()),
                    placement: self.hosts(said),
                });
            }
        }
    }
}
