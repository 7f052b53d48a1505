//! Drawing the conclusions: which possible actions are needed, which are impossible.
//!
//! Always holds: marks are only ever taken away (optional, possible, live), so that it comes to an
//! end, whatever the rules; and the result does not depend on the order of the steps.

use super::actions::{ActionId, Graph, Relation, Task};
use super::placing::Placing;
use super::score::INFINITY;
use super::site::{HostId, Role, UnitId};
use std::collections::{BTreeSet, VecDeque};

/// What is known of an action at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marks {
    optional: bool,
    runnable: bool,
    live: bool,
    implied: bool,
}

/// Settles all marks.
pub(super) fn settle(placing: &Placing<'_>, graph: &mut Graph) {
    let mut settling = Settling {
        placing,
        open: VecDeque::new(),
        queued: vec![false; graph.actions.len()],
        graph,
    };
    for action in 0..settling.graph.actions.len() {
        settling.queue(action);
        settling.block_dependents(action);
    }
    while let Some(action) = settling.open.pop_front() {
        settling.queued[action] = false;
        settling.revisit(action);
    }
}

/// Draws the conclusions from arrivals that turned out to be impossible.
pub(super) fn forbid(
    placing: &Placing<'_>,
    graph: &mut Graph,
    arrivals: &BTreeSet<(UnitId, HostId)>,
) {
    for (unit, host) in arrivals {
        for action in graph.of_unit[*unit].clone() {
            let one = &mut graph.actions[action];
            let arrives = matches!(one.task, Task::Start | Task::Arrive);
            if arrives && one.host == Some(*host) {
                (one.runnable, one.implied) = (false, false);
            }
        }
    }
    settle(placing, graph);
}

struct Settling<'a, 'b> {
    placing: &'a Placing<'b>,
    graph: &'a mut Graph,
    open: VecDeque<ActionId>,
    queued: Vec<bool>,
}

impl Settling<'_, '_> {
    fn queue(&mut self, action: ActionId) {
        if !self.queued[action] {
            self.queued[action] = true;
            self.open.push_back(action);
        }
    }

    fn marks(&self, action: ActionId) -> Marks {
        let one = &self.graph.actions[action];
        Marks {
            optional: one.optional,
            runnable: one.runnable,
            live: one.live,
            implied: one.implied,
        }
    }

    /// Notes that an action's marks may have changed.
    fn changed(&mut self, action: ActionId, before: Marks) {
        let now = self.marks(action);
        if now == before {
            return;
        }
        self.queue(action);
        for after in self.graph.actions[action].after.clone() {
            self.queue(after);
        }
        // What comes before may be part of the same restart or group.
        let firsts: Vec<ActionId> = self.graph.actions[action]
            .before
            .iter()
            .map(|(first, _)| *first)
            .collect();
        for first in firsts {
            self.queue(first);
        }
        if before.runnable && !now.runnable {
            self.block_dependents(action);
        }
    }

    fn revisit(&mut self, then: ActionId) {
        self.derive(then);
        if self.graph.actions[then].needs_any {
            let before = self.marks(then);
            let possible = self.graph.actions[then]
                .before
                .iter()
                .any(|(first, relation)| relation.any && self.graph.actions[*first].runnable);
            self.graph.actions[then].runnable = possible;
            self.changed(then, before);
        }
        for (first, relation) in self.graph.actions[then].before.clone() {
            let flags = self.derive(first);
            let mut targets = vec![then];
            targets.extend(self.member_actions(then));
            for target in targets {
                let (first_before, then_before) = (self.marks(first), self.marks(target));
                self.apply(first, target, relation, flags);
                self.changed(first, first_before);
                self.changed(target, then_before);
            }
        }
    }

    /// The members' actions that a group's action stands for.
    fn member_actions(&self, action: ActionId) -> Vec<ActionId> {
        let one = &self.graph.actions[action];
        let group = one.unit.and_then(|unit| self.placing.site.group(unit));
        group.map_or_else(Vec::new, |group| {
            let members = group.members.iter();
            members
                .filter_map(|member| self.graph.newest(*member, one.task))
                .collect()
        })
    }

    /// A group's action is needed if a member's is; it is possible if all members' are.
    fn derive(&mut self, action: ActionId) -> Marks {
        let before = self.marks(action);
        let one = &self.graph.actions[action];
        let Some(group) = one.unit.and_then(|unit| self.placing.site.group(unit)) else {
            return before;
        };
        let task = match one.task {
            Task::Start | Task::Running => Task::Start,
            _ => Task::Stop,
        };
        let sums_up = task != one.task;
        let mut flags = Marks {
            optional: true,
            runnable: true,
            live: false,
            implied: true,
        };
        for member in &group.members {
            let Some(part) = self.graph.newest(*member, task) else {
                flags.runnable &= task == Task::Stop;
                continue;
            };
            let part = self.marks(part);
            if !part.optional {
                flags.optional = false;
                self.graph.actions[action].optional = false;
            }
            if sums_up && !part.runnable {
                flags.runnable = false;
                self.graph.actions[action].runnable = false;
            }
        }
        self.changed(action, before);
        flags
    }

    fn apply(&mut self, first: ActionId, then: ActionId, relation: Relation, flags: Marks) {
        if relation.first_requires_then && !flags.optional && !self.graph.actions[first].live {
            self.graph.actions[then].optional = false;
        }
        if relation.restart {
            self.apply_restart(first, then);
        }
        if relation.then_binds_first
            && !self.graph.actions[then].optional
            && flags.live
            && !self.graph.actions[then].live
        {
            self.graph.actions[first].live = false;
        }
        if relation.then_binds_first
            && !self.graph.actions[then].optional
            && !self.graph.actions[then].live
        {
            self.bind_members(first);
        }
        if relation.blocks && !flags.runnable && self.graph.actions[then].runnable {
            self.graph.actions[then].runnable = false;
            self.graph.actions[then].live = false;
        }
        if relation.live_or_not {
            let then = self.marks(then);
            let first = &mut self.graph.actions[first];
            first.runnable &= then.live && then.runnable;
            first.optional &= then.optional;
        }
        if relation.else_then && !self.graph.actions[first].runnable {
            self.graph.actions[then].live = false;
            self.graph.actions[then].implied = false;
        }
        if relation.one_way && !self.graph.actions[first].runnable {
            self.apply_one_way(then);
        }
        if (relation.first_requires_then || relation.then_binds_first || relation.restart)
            && self.is_blocked_stop(first)
        {
            self.graph.actions[then].runnable = false;
        }
    }

    /// What a whole group needs comes down: none of its members stays up by moving live.
    fn bind_members(&mut self, group_stop: ActionId) {
        let one = &self.graph.actions[group_stop];
        let group = one.unit.and_then(|unit| self.placing.site.group(unit));
        for member in group.iter().flat_map(|group| &group.members) {
            for stop in self.graph.find(*member, Task::Stop) {
                let before = self.marks(stop);
                self.graph.actions[stop].live = false;
                self.changed(stop, before);
            }
        }
    }

    /// A stop that is impossible because nobody may touch the item until somebody has looked.
    fn is_blocked_stop(&self, action: ActionId) -> bool {
        let action = &self.graph.actions[action];
        action.task == Task::Stop
            && !action.runnable
            && action.unit.is_some_and(|unit| {
                let blocked = self.placing.item(unit).is_some_and(|item| item.blocked);
                blocked && !self.placing.managed[unit]
            })
    }

    fn apply_restart(&mut self, first: ActionId, then: ActionId) {
        let after = self.graph.actions[then].clone();
        let same = after.unit == self.graph.actions[first].unit;
        // Nothing comes down because what it needs moves while it runs.
        if after.live && !same {
            return;
        }
        let managed = after.unit.is_some_and(|unit| self.placing.managed[unit]);
        let cannot_come_back = !after.runnable && managed && same;
        if after.optional && !cannot_come_back {
            return;
        }
        let stop = &mut self.graph.actions[first];
        if stop.runnable || !after.optional {
            stop.optional = false;
        }
        stop.live &= after.live;
        if !stop.optional && !stop.runnable {
            self.graph.actions[then].runnable = false;
        }
    }

    fn apply_one_way(&mut self, then: ActionId) {
        let action = &self.graph.actions[then];
        let Some(unit) = action.unit else { return };
        if action.optional {
            let role = self.placing.role(unit);
            let only_here = self.placing.item(unit).is_some_and(|item| {
                item.active.len() == 1 && item.active.first().copied() == action.host
            });
            if role == Role::Stopped && action.task == Task::Stop {
                return;
            }
            if role == Role::Started && action.task == Task::Start && only_here {
                return;
            }
        }
        let action = &mut self.graph.actions[then];
        action.optional = false;
        action.runnable = false;
    }

    /// What must run with something that cannot start cannot start either.
    fn block_dependents(&mut self, action: ActionId) {
        let one = &self.graph.actions[action];
        let Some(unit) = one
            .unit
            .filter(|_| one.task == Task::Start && !one.runnable)
        else {
            return;
        };
        let top = self.placing.site.units[unit].parent.unwrap_or(unit);
        if top != unit {
            self.block_followers(unit);
        }
        if let Some(group) = self.placing.site.group(top) {
            let some_starts = group.members.iter().any(|member| {
                let start = self.graph.newest(*member, Task::Start);
                start.is_none_or(|start| self.graph.actions[start].runnable)
            });
            // What follows a group follows its last member.
            if some_starts && group.members.last() != Some(&unit) {
                return;
            }
        }
        for rule in self.placing.rules_with(top) {
            let rule = &self.placing.together[rule];
            if rule.score >= INFINITY {
                self.block_starts(rule.dependent);
            }
        }
    }

    /// What must run with a member of a group, by a rule about just that member.
    fn block_followers(&mut self, unit: UnitId) {
        for rule in &self.placing.with_this[unit] {
            let rule = &self.placing.together[*rule];
            if rule.explicit && rule.score >= INFINITY {
                self.block_starts(rule.dependent);
            }
        }
    }

    fn block_starts(&mut self, unit: UnitId) {
        for start in self.graph.find(unit, Task::Start) {
            if self.graph.actions[start].runnable {
                let before = self.marks(start);
                self.graph.actions[start].runnable = false;
                self.changed(start, before);
            }
        }
        if let Some(group) = self.placing.site.group(unit) {
            for member in group.members.clone() {
                self.block_starts(member);
            }
        }
    }
}
