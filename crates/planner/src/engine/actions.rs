//! The graph of what might be done: possible actions, and how each bears on others.
//!
//! An action begins as possible; it is *optional* until something requires it, and *possible* until
//! something makes it impossible. [`settle`](super::settle) draws the conclusions along the relations.

use super::site::{HostId, UnitId};
use std::collections::BTreeSet;

/// Index of an action.
pub(super) type ActionId = usize;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Task {
    Fence,
    Stop,
    /// All members of a group have stopped.
    Stopped,
    /// The part of a live migration on the source.
    Depart,
    /// The part of a live migration on the target.
    Arrive,
    Start,
    /// All members of a group have started.
    Running,
    Shutdown,
    /// One of several has started.
    AnyOf,
}

/// One possible action.
#[derive(Debug, Clone)]
pub(super) struct Action {
    pub(super) unit: Option<UnitId>,
    pub(super) task: Task,
    pub(super) host: Option<HostId>,
    /// Nothing needs it (yet).
    pub(super) optional: bool,
    /// Nothing stands against it (yet).
    pub(super) runnable: bool,
    /// It is part of a live migration.
    pub(super) live: bool,
    /// It happens by itself: implied by another action.
    pub(super) implied: bool,
    /// It cleans up after a migration.
    pub(super) cleanup: bool,
    /// So many of those before it must be possible.
    pub(super) needs_any: bool,
    pub(super) before: Vec<(ActionId, Relation)>,
    pub(super) after: Vec<ActionId>,
}

/// How a first action bears on a second one. Several may hold at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Relation {
    /// The first requires the second.
    pub(super) first_requires_then: bool,
    /// What stops the second from being part of a migration stops the first, too.
    pub(super) then_binds_first: bool,
    /// Without the first the second is impossible.
    pub(super) blocks: bool,
    /// The first is the stop within a restart of which the second is part.
    pub(super) restart: bool,
    /// If the second cannot be part of a live migration, the first is impossible.
    pub(super) live_or_not: bool,
    /// If the first is impossible, the second becomes a real one.
    pub(super) else_then: bool,
    /// A one-sided order: as `blocks`, unless the second is already as it should be.
    pub(super) one_way: bool,
    /// The first is one of several of which one is enough.
    pub(super) any: bool,
    /// Only if the first is no part of a live migration.
    pub(super) unless_live: bool,
}

impl Relation {
    /// An order only.
    pub(super) const ORDER: Self = Self {
        first_requires_then: false,
        then_binds_first: false,
        blocks: false,
        restart: false,
        live_or_not: false,
        else_then: false,
        one_way: false,
        any: false,
        unless_live: false,
    };
}

/// All possible actions.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub(super) actions: Vec<Action>,
    /// Actions of each unit, newest last.
    pub(super) of_unit: Vec<Vec<ActionId>>,
    /// Relations that are laid already.
    laid: BTreeSet<(ActionId, ActionId, Relation)>,
}

impl Graph {
    pub(super) fn new(units: usize) -> Self {
        Self {
            actions: Vec::new(),
            of_unit: vec![Vec::new(); units],
            laid: BTreeSet::new(),
        }
    }

    pub(super) fn add(
        &mut self,
        unit: Option<UnitId>,
        task: Task,
        host: Option<HostId>,
    ) -> ActionId {
        let id = self.actions.len();
        self.actions.push(Action {
            unit,
            task,
            host,
            optional: true,
            runnable: true,
            live: false,
            implied: false,
            cleanup: false,
            needs_any: false,
            before: Vec::new(),
            after: Vec::new(),
        });
        if let Some(unit) = unit {
            self.of_unit[unit].push(id);
        }
        id
    }

    /// The actions of a unit with this task.
    pub(super) fn find(&self, unit: UnitId, task: Task) -> Vec<ActionId> {
        let own = self.of_unit[unit].iter().copied();
        own.filter(|id| self.actions[*id].task == task).collect()
    }

    /// The newest action of a unit with this task.
    pub(super) fn newest(&self, unit: UnitId, task: Task) -> Option<ActionId> {
        let mut own = self.of_unit[unit].iter().rev().copied();
        own.find(|id| self.actions[*id].task == task)
    }

    /// The action of a unit with this task on this host. One that has no host yet takes it.
    pub(super) fn on_host(&mut self, unit: UnitId, task: Task, host: HostId) -> Option<ActionId> {
        let found = self.of_unit[unit].iter().copied().find(|id| {
            let action = &self.actions[*id];
            action.task == task && action.host.is_none_or(|at| at == host)
        })?;
        self.actions[found].host = Some(host);
        Some(found)
    }

    pub(super) fn relate(&mut self, first: ActionId, then: ActionId, relation: Relation) {
        if first == then || !self.laid.insert((first, then, relation)) {
            return;
        }
        self.actions[then].before.push((first, relation));
        self.actions[first].after.push(then);
    }
}
