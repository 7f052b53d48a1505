//! Which action bears on which: what rules, groups, moves and fencing mean for possible actions.

use super::actions::{ActionId, Graph, Relation, Task};
use super::create::Made;
use super::placing::Placing;
use super::site::{Act, AnyOf, Body, Group, HostId, Order, Requires, Role, Side, Strength, UnitId};

/// Lays all relations.
pub(super) fn relate(placing: &Placing<'_>, made: &mut Made) {
    let mut laying = Laying {
        placing,
        graph: &mut made.graph,
    };
    for order in &placing.site.orders {
        laying.order(order);
    }
    for any in &placing.site.any_of {
        laying.any_of(any);
    }
    for (unit, one) in placing.site.units.iter().enumerate() {
        match &one.body {
            Body::Item(_) if one.parent.is_none() => laying.own(unit),
            Body::Item(_) => {}
            Body::Group(group) => laying.group(unit, group),
        }
    }
    for (unit, from, to) in &made.live {
        laying.migration(*unit, *from, *to);
    }
    for host in 0..placing.site.hosts.len() {
        laying.host(host, made.lost[host]);
    }
}

struct Laying<'a, 'b> {
    placing: &'a Placing<'b>,
    graph: &'a mut Graph,
}

fn task(act: Act) -> Task {
    match act {
        Act::Start => Task::Start,
        Act::Stop => Task::Stop,
    }
}

fn relation(strength: Strength, first: Act, side: Side) -> Relation {
    let mut relation = Relation::ORDER;
    if strength == Strength::Mandatory {
        match side {
            Side::Alone => relation.one_way = true,
            Side::Forward => {
                relation.first_requires_then = true;
                relation.blocks = first == Act::Start;
            }
            Side::Backward => relation.then_binds_first = true,
        }
    }
    relation
}

impl Laying<'_, '_> {
    fn order(&mut self, order: &Order) {
        let relation = relation(order.strength, order.first_act, order.side);
        let (first, then) = (task(order.first_act), task(order.then_act));
        self.lay(order.first, first, order.then, then, relation);
    }

    fn any_of(&mut self, any: &AnyOf) {
        let gate = self.graph.add(None, Task::AnyOf, None);
        self.graph.actions[gate].implied = true;
        self.graph.actions[gate].needs_any = true;
        for first in &any.first {
            let one = Relation {
                any: true,
                ..Relation::ORDER
            };
            for action in self.firsts(*first, task(any.first_act), None) {
                self.graph.relate(action, gate, one);
            }
        }
        let relation = Relation {
            blocks: true,
            ..relation(any.strength, any.first_act, any.side)
        };
        for then in &any.then {
            for action in self.graph.find(*then, task(any.then_act)) {
                self.graph.relate(gate, action, relation);
            }
        }
    }

    /// Lays a relation between all actions of two units with these tasks, and what it means for
    /// live migrations of the two.
    fn lay(
        &mut self,
        first: UnitId,
        first_task: Task,
        then: UnitId,
        then_task: Task,
        relation: Relation,
    ) {
        let firsts = self.firsts(first, first_task, Some(then));
        for first_action in &firsts {
            for then_action in self.graph.find(then, then_task) {
                let mut relation = relation;
                if self.graph.actions[*first_action].cleanup && first == then {
                    relation.first_requires_then = false;
                }
                self.graph.relate(*first_action, then_action, relation);
            }
        }
        self.lay_for_migrations(first, first_task, then, then_task);
    }

    /// The actions that come first. What a group does is done when its last member has done it.
    fn firsts(&mut self, unit: UnitId, task: Task, then: Option<UnitId>) -> Vec<ActionId> {
        let is_group = self.placing.site.group(unit).is_some();
        let parent = then.and_then(|then| self.placing.site.units[then].parent);
        let other = then != Some(unit) && parent != Some(unit);
        let task = match task {
            Task::Start if is_group && other => Task::Running,
            Task::Stop if is_group && other => Task::Stopped,
            task => task,
        };
        let found = self.graph.find(unit, task);
        if !found.is_empty() || then == Some(unit) {
            return found;
        }
        if task == Task::Stop && self.placing.role(unit) == Role::Stopped {
            return found;
        }
        // It will not happen: say so, so that what needs it is not possible either.
        let never = self.graph.add(Some(unit), task, None);
        self.graph.actions[never].runnable = false;
        vec![never]
    }

    fn lay_for_migrations(&mut self, first: UnitId, a: Task, then: UnitId, b: Task) {
        let parent = |unit: UnitId| self.placing.site.units[unit].parent;
        if first == then || parent(then) == Some(first) || parent(first) == Some(then) {
            return;
        }
        let live = |unit: UnitId| self.placing.item(unit).is_some_and(|item| item.live);
        if !live(then) {
            return;
        }
        let unless_live = Relation {
            unless_live: live(first),
            ..Relation::ORDER
        };
        let pairs: &[(Task, Task, Relation)] = match (a, b) {
            (Task::Start, Task::Start) => &[
                (Task::Arrive, Task::Depart, Relation::ORDER),
                (Task::Start, Task::Depart, unless_live),
            ],
            (Task::Stop, Task::Stop) => &[
                (Task::Stop, Task::Depart, unless_live),
                (Task::Stop, Task::Arrive, unless_live),
            ],
            _ => &[],
        };
        for (first_task, then_task, relation) in pairs {
            for first_action in self.graph.find(first, *first_task) {
                for then_action in self.graph.find(then, *then_task) {
                    self.graph.relate(first_action, then_action, *relation);
                }
            }
        }
    }

    /// An item stops before it starts again.
    fn own(&mut self, unit: UnitId) {
        if self.placing.managed[unit] {
            let restart = Relation {
                first_requires_then: true,
                restart: true,
                ..Relation::ORDER
            };
            self.lay(unit, Task::Stop, unit, Task::Start, restart);
        }
    }

    fn group(&mut self, unit: UnitId, group: &Group) {
        let blocks = Relation {
            blocks: true,
            ..Relation::ORDER
        };
        self.lay(unit, Task::Stop, unit, Task::Stopped, blocks);
        self.lay(unit, Task::Stopped, unit, Task::Start, Relation::ORDER);
        self.lay(unit, Task::Start, unit, Task::Running, blocks);
        let mut last_active = None;
        for (place, member) in group.members.iter().enumerate() {
            let previous = place.checked_sub(1).map(|before| group.members[before]);
            self.member(unit, group, *member, previous);
            let active = self.placing.is_active(*member);
            if !active {
                continue;
            }
            if let (true, Some(previous), Some(last)) = (group.ordered, previous, last_active)
                && !self.placing.is_active(previous)
            {
                self.lay(*member, Task::Stop, last, Task::Stop, Relation::ORDER);
            }
            last_active = Some(*member);
        }
    }

    fn member(&mut self, unit: UnitId, group: &Group, member: UnitId, previous: Option<UnitId>) {
        self.own(member);
        let needs = Relation {
            first_requires_then: true,
            ..Relation::ORDER
        };
        let carries = Relation {
            blocks: true,
            ..needs
        };
        self.lay(unit, Task::Stop, member, Task::Stop, Relation::ORDER);
        let down = match previous.is_none() && group.ordered {
            true => needs,
            false => Relation::ORDER,
        };
        self.lay(member, Task::Stop, unit, Task::Stopped, down);
        self.lay(member, Task::Start, unit, Task::Running, carries);
        let Some(previous) = previous.filter(|_| group.ordered) else {
            let up = if group.ordered {
                Relation::ORDER
            } else {
                carries
            };
            self.lay(unit, Task::Start, member, Task::Start, up);
            return;
        };
        self.lay(unit, Task::Start, member, Task::Start, Relation::ORDER);
        self.lay(previous, Task::Start, member, Task::Start, carries);
        let restart = Relation {
            restart: true,
            ..Relation::ORDER
        };
        self.lay(member, Task::Stop, previous, Task::Stop, restart);
        if self.placing.is_active(member) && !self.placing.is_active(previous) {
            let after = Relation {
                then_binds_first: true,
                blocks: true,
                ..Relation::ORDER
            };
            self.lay(member, Task::Stop, previous, Task::Start, after);
        }
    }

    /// The parts of a live migration stand and fall together.
    fn migration(&mut self, unit: UnitId, from: HostId, to: HostId) {
        let part = Relation {
            live_or_not: true,
            ..Relation::ORDER
        };
        let or_start = Relation {
            else_then: true,
            ..part
        };
        let find = |graph: &mut Graph, task, host| graph.on_host(unit, task, host);
        let Some(arrive) = find(self.graph, Task::Arrive, to) else {
            return;
        };
        if let Some(depart) = find(self.graph, Task::Depart, from) {
            self.graph.relate(depart, arrive, part);
        }
        for stop in self.graph.find(unit, Task::Stop) {
            self.graph.relate(arrive, stop, part);
        }
        for start in self.graph.find(unit, Task::Start) {
            self.graph.relate(arrive, start, or_start);
        }
    }

    fn host(&mut self, host: HostId, lost: bool) {
        let any_managed = (0..self.placing.managed.len())
            .any(|unit| self.placing.item(unit).is_some() && self.placing.managed[unit]);
        let one = &self.placing.site.hosts[host];
        if lost && one.can_fence && any_managed {
            self.fence(host);
        } else if one.up && one.leaving {
            self.shut_down(host);
        }
    }

    fn fence(&mut self, host: HostId) {
        let fence = self.graph.add(None, Task::Fence, Some(host));
        self.graph.actions[fence].optional = false;
        for unit in 0..self.placing.site.units.len() {
            let Some(item) = self
                .placing
                .item(unit)
                .filter(|_| self.placing.managed[unit])
            else {
                continue;
            };
            let unknown =
                self.placing.allowed[unit][host].is_some() && !item.known_on.contains(&host);
            for start in self.graph.find(unit, Task::Start) {
                match item.requires {
                    Requires::Fencing => self.graph.relate(fence, start, Relation::ORDER),
                    Requires::Quorum if unknown => self.graph.relate(fence, start, Relation::ORDER),
                    Requires::Quorum | Requires::Nothing => {}
                }
            }
            for stop in self.graph.find(unit, Task::Stop) {
                if self.graph.actions[stop].host != Some(host) {
                    continue;
                }
                // Nobody can do it any more, and nobody needs to.
                self.graph.actions[stop].implied = true;
                self.graph.actions[stop].runnable = true;
                if item.requires == Requires::Fencing {
                    self.graph.relate(fence, stop, Relation::ORDER);
                }
            }
        }
    }

    fn shut_down(&mut self, host: HostId) {
        let leave = self.graph.add(None, Task::Shutdown, Some(host));
        self.graph.actions[leave].optional = false;
        if self.placing.site.hosts[host].maintenance {
            return;
        }
        let blocks = Relation {
            blocks: true,
            ..Relation::ORDER
        };
        for stop in 0..self.graph.actions.len() {
            let action = &self.graph.actions[stop];
            let Some(unit) = action.unit.filter(|_| action.task == Task::Stop) else {
                continue;
            };
            let touched = self.placing.item(unit).is_some_and(|item| {
                !item.maintenance && (self.placing.managed[unit] || item.blocked)
            });
            if action.host == Some(host) && touched {
                self.graph.actions[stop].optional = false;
                self.graph.relate(stop, leave, blocks);
            }
        }
    }
}
