//! The order of what is done, and where everything is afterwards.
//!
//! Always holds: a step comes after all that it must wait for; of those that could come next, the one
//! that was thought of first does. A host is left before something else arrives that needs the room or
//! must not meet it, unless the two wait for each other.

use super::actions::{ActionId, Graph, Task};
use super::create::Made;
use super::placing::Placing;
use super::score::INFINITY;
use super::site::{HostId, Strategy, UnitId};
use std::collections::{BTreeMap, BTreeSet};

/// Something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Make sure that a host is off.
    Fence {
        /// Which.
        host: HostId,
    },
    /// Stop an item. On a host that is fenced this is done by fencing.
    Stop {
        /// Which item.
        unit: UnitId,
        /// Where.
        host: HostId,
    },
    /// Move an item while it runs.
    Migrate {
        /// Which item.
        unit: UnitId,
        /// From where.
        from: HostId,
        /// To where.
        to: HostId,
    },
    /// Start an item.
    Start {
        /// Which item.
        unit: UnitId,
        /// Where.
        host: HostId,
    },
    /// Let a host go that wants to leave.
    Release {
        /// Which.
        host: HostId,
    },
}

/// The steps in their order, and where each item is afterwards.
pub(super) fn sequence(placing: &Placing<'_>, made: &Made) -> (Vec<Step>, Vec<Vec<HostId>>) {
    let steps = Steps::new(placing, made);
    let order = steps.sort();
    let after = steps.outcome();
    (order, after)
}

struct Steps<'a, 'b> {
    placing: &'a Placing<'b>,
    graph: &'a Graph,
    live: BTreeMap<UnitId, (HostId, HostId)>,
    /// The node of the order that an action belongs to: parts of one migration share one.
    node: Vec<Option<usize>>,
    /// What is done at each node; `None` for what only marks a point in time.
    steps: Vec<Option<Step>>,
}

/// What arrivals had better wait for.
struct Wishes {
    /// Room is scarce: a host is left by all that leave before anything arrives.
    tight: bool,
    /// The steps by which units leave hosts.
    leaving: BTreeMap<(UnitId, HostId), usize>,
    /// How many are still to leave each host.
    left: BTreeMap<HostId, usize>,
    /// Per step: those of units that must not meet its unit.
    clashes: Vec<Vec<usize>>,
}

impl<'a, 'b> Steps<'a, 'b> {
    fn new(placing: &'a Placing<'b>, made: &'a Made) -> Self {
        let graph = &made.graph;
        let possible = |unit: UnitId, task: Task, host: HostId| {
            let mut parts = graph.find(unit, task).into_iter();
            parts
                .find(|id| graph.actions[*id].host == Some(host))
                .is_none_or(|id| graph.actions[id].runnable)
        };
        let live = made.live.iter().filter(|(unit, from, to)| {
            possible(*unit, Task::Arrive, *to) && possible(*unit, Task::Depart, *from)
        });
        let mut steps = Self {
            placing,
            graph,
            live: live.map(|(unit, from, to)| (*unit, (*from, *to))).collect(),
            node: vec![None; graph.actions.len()],
            steps: Vec::new(),
        };
        steps.collect();
        steps
    }

    fn collect(&mut self) {
        let mut migrations: BTreeMap<UnitId, usize> = BTreeMap::new();
        for (id, action) in self.graph.actions.iter().enumerate() {
            let Some(unit) = action.unit else {
                let step = match (action.task, action.host) {
                    (Task::Fence, Some(host)) => Some(Step::Fence { host }),
                    (Task::Shutdown, Some(host)) if action.runnable => Some(Step::Release { host }),
                    _ => None,
                };
                self.add(id, step);
                continue;
            };
            if self.placing.item(unit).is_none() {
                self.add(id, None);
                continue;
            }
            if let Some((from, to)) = self.live.get(&unit).copied()
                && self.is_part(id, from, to)
            {
                let next = self.steps.len();
                let node = *migrations.entry(unit).or_insert(next);
                if node == next {
                    self.steps.push(Some(Step::Migrate { unit, from, to }));
                }
                self.node[id] = Some(node);
                continue;
            }
            // What others would require of something that nobody may touch does not happen.
            if action.optional || !action.runnable || !self.placing.managed[unit] {
                continue;
            }
            let step = match (action.task, action.host) {
                (Task::Stop, Some(host)) => Step::Stop { unit, host },
                (Task::Start, Some(host)) if !self.runs_on(unit, host, action.implied) => {
                    Step::Start { unit, host }
                }
                _ => continue,
            };
            self.add(id, Some(step));
        }
    }

    /// A start that is implied because the item runs there already.
    fn runs_on(&self, unit: UnitId, host: HostId, implied: bool) -> bool {
        let item = self.placing.item(unit);
        implied && item.is_some_and(|item| item.active.contains(&host))
    }

    fn is_part(&self, id: ActionId, from: HostId, to: HostId) -> bool {
        let action = &self.graph.actions[id];
        match action.task {
            Task::Depart | Task::Arrive => true,
            Task::Stop => action.host == Some(from),
            Task::Start => action.host == Some(to),
            _ => false,
        }
    }

    fn add(&mut self, id: ActionId, step: Option<Step>) {
        self.node[id] = Some(self.steps.len());
        self.steps.push(step);
    }

    fn edges(&self) -> Vec<BTreeSet<usize>> {
        let mut before = vec![BTreeSet::new(); self.steps.len()];
        for (id, action) in self.graph.actions.iter().enumerate() {
            let Some(then) = self.node[id] else { continue };
            for (first, relation) in &action.before {
                let Some(node) = self.node[*first].filter(|node| *node != then) else {
                    continue;
                };
                let by_migration = matches!(self.steps[node], Some(Step::Migrate { .. }));
                if !(relation.unless_live && by_migration) {
                    before[then].insert(node);
                }
            }
        }
        before
    }

    /// What arrivals had better wait for: leaving where the two would clash.
    fn wishes(&self) -> Wishes {
        let mut wishes = Wishes {
            tight: self.placing.site.rules.strategy != Strategy::Spread,
            leaving: BTreeMap::new(),
            left: BTreeMap::new(),
            clashes: vec![Vec::new(); self.steps.len()],
        };
        for (node, step) in self.steps.iter().enumerate() {
            if let Some(
                Step::Stop { unit, host }
                | Step::Migrate {
                    unit, from: host, ..
                },
            ) = step
            {
                wishes.leaving.insert((*unit, *host), node);
                *wishes.left.entry(*host).or_default() += 1;
            }
        }
        for (node, step) in self.steps.iter().enumerate() {
            if let Some(Step::Start { unit, host } | Step::Migrate { unit, to: host, .. }) = step {
                wishes.clashes[node] = self
                    .repelled_by(*unit)
                    .filter_map(|other| wishes.leaving.get(&(other, *host)).copied())
                    .collect();
            }
        }
        wishes
    }

    /// Units that must not meet this one.
    fn repelled_by(&self, unit: UnitId) -> impl Iterator<Item = UnitId> {
        let own = self.placing.this_with[unit].iter();
        own.chain(&self.placing.with_this[unit])
            .filter_map(move |rule| {
                let rule = &self.placing.together[*rule];
                let other = match rule.dependent == unit {
                    true => rule.primary,
                    false => rule.dependent,
                };
                (rule.score <= -INFINITY).then_some(other)
            })
    }

    /// Whether nothing is left that this step had better wait for.
    fn is_free(&self, node: usize, wishes: &Wishes, open: &BTreeSet<usize>) -> bool {
        let (Some(Step::Start { unit, host }) | Some(Step::Migrate { unit, to: host, .. })) =
            &self.steps[node]
        else {
            return true;
        };
        let own = wishes.leaving.get(&(*unit, *host));
        let own = usize::from(own.is_some_and(|node| open.contains(node)));
        let left = wishes.left.get(host).copied().unwrap_or(0);
        (!wishes.tight || left <= own) && wishes.clashes[node].iter().all(|n| !open.contains(n))
    }

    fn sort(&self) -> Vec<Step> {
        let mut before = self.edges();
        let mut wishes = self.wishes();
        let mut after = vec![Vec::new(); self.steps.len()];
        for (then, firsts) in before.iter().enumerate() {
            for first in firsts {
                after[*first].push(then);
            }
        }
        let rank = |node: usize| (self.rank(node), node);
        let mut open: BTreeSet<usize> = (0..self.steps.len()).collect();
        let mut ready: BTreeSet<((u8, usize), usize)> = (0..self.steps.len())
            .filter(|node| before[*node].is_empty())
            .map(|node| (rank(node), node))
            .collect();
        let mut order = Vec::new();
        while let Some(first) = open.first().copied() {
            let free = |(_, node): &&((u8, usize), usize)| self.is_free(*node, &wishes, &open);
            let next = ready.iter().find(free).or_else(|| ready.first()).copied();
            // Nothing is ready: the rules go round in a circle. Begin somewhere on it.
            let node = next.map_or_else(|| on_circle(&before, first), |(_, node)| node);
            ready.remove(&(rank(node), node));
            open.remove(&node);
            order.extend(self.steps[node]);
            if let Some(Step::Stop { host, .. } | Step::Migrate { from: host, .. }) =
                self.steps[node]
                && let Some(left) = wishes.left.get_mut(&host)
            {
                *left -= 1;
            }
            for then in &after[node] {
                before[*then].remove(&node);
                if before[*then].is_empty() && open.contains(then) {
                    ready.insert((rank(*then), *then));
                }
            }
        }
        order
    }

    fn rank(&self, node: usize) -> u8 {
        match self.steps[node] {
            None => 0,
            Some(Step::Fence { .. }) => 1,
            Some(Step::Stop { .. }) => 2,
            Some(Step::Migrate { .. }) => 3,
            Some(Step::Start { .. }) => 4,
            Some(Step::Release { .. }) => 5,
        }
    }

    fn outcome(&self) -> Vec<Vec<HostId>> {
        let units = &self.placing.site.units;
        let mut after: Vec<Vec<HostId>> = (0..units.len())
            .map(|unit| {
                self.placing
                    .item(unit)
                    .map_or_else(Vec::new, |i| i.active.clone())
            })
            .collect();
        let arrivals = self.steps.iter().flatten();
        for step in self.steps.iter().flatten() {
            match step {
                // Nothing runs on a host that is off.
                Step::Fence { host } => {
                    for hosts in &mut after {
                        hosts.retain(|at| at != host);
                    }
                }
                Step::Stop { unit, host }
                | Step::Migrate {
                    unit, from: host, ..
                } => {
                    after[*unit].retain(|at| at != host);
                }
                _ => {}
            }
        }
        for step in arrivals {
            let (Step::Start { unit, host } | Step::Migrate { unit, to: host, .. }) = step else {
                continue;
            };
            if !after[*unit].contains(host) {
                after[*unit].push(*host);
            }
        }
        after
    }
}

/// A node on a circle: from a node that waits back to what it waits for, until one comes again.
fn on_circle(before: &[BTreeSet<usize>], from: usize) -> usize {
    let mut seen = BTreeSet::new();
    let mut node = from;
    while seen.insert(node) {
        node = before[node].first().copied().unwrap_or(node);
    }
    node
}
