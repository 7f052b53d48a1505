//! The possible actions of each unit, once it is decided where it goes.

use super::actions::{ActionId, Graph, Task};
use super::placing::Placing;
use super::site::{Body, HostId, Item, Multiple, Requires, Role, UnitId};

/// What turned out while actions were made.
pub(super) struct Made {
    pub(super) graph: Graph,
    /// Hosts that are lost, those that turned out to be so included.
    pub(super) lost: Vec<bool>,
    /// Live migrations: unit, from, to.
    pub(super) live: Vec<(UnitId, HostId, HostId)>,
}

/// Makes the possible actions of all units.
pub(super) fn create(placing: &mut Placing<'_>) -> Made {
    let mut made = Made {
        graph: Graph::new(placing.site.units.len()),
        lost: placing.site.hosts.iter().map(|host| host.lost).collect(),
        live: Vec::new(),
    };
    for (unit, one) in placing.site.units.iter().enumerate() {
        if one.parent.is_some() {
            continue;
        }
        match &one.body {
            Body::Item(item) => made.item(placing, unit, item),
            Body::Group(group) => {
                for member in &group.members {
                    if let Some(item) = placing.item(*member) {
                        made.item(placing, *member, item);
                    }
                }
                for task in [Task::Start, Task::Running, Task::Stop, Task::Stopped] {
                    let action = made.graph.add(Some(unit), task, None);
                    made.graph.actions[action].implied = true;
                }
            }
        }
    }
    made
}

/// How an item comes down and up.
struct Course {
    current: Option<HostId>,
    to: Option<HostId>,
    moving: bool,
    need_stop: bool,
    live: bool,
    /// The half-done migration goes on.
    goes_on: bool,
    /// A half-done migration is given up.
    given_up: bool,
    multiple: bool,
}

impl Made {
    fn item(&mut self, placing: &mut Placing<'_>, unit: UnitId, item: &Item) {
        for host in &item.must_stop {
            let stop = self.stop(placing, unit, *host);
            self.require(placing, stop);
        }
        let to = placing.assigned[unit];
        if placing.next[unit].is_none() {
            placing.next[unit] = Some(match to {
                None => Role::Stopped,
                Some(_) => Role::Started,
            });
        }
        for host in &item.strays {
            let stop = self.stop(placing, unit, *host);
            self.require(placing, stop);
            self.graph.actions[stop].cleanup = true;
        }
        let course = self.course(placing, unit, item, to);
        if item.starting
            && let Some(to) = to
        {
            self.start(placing, unit, to);
        }
        let failed = item.failed && item.restart_cures;
        let ailing = failed || (item.blocked && !item.failed);
        let need_stop = course.need_stop || (!course.moving && ailing);
        self.restart(placing, unit, item, &course, need_stop);
        self.change_role(placing, unit, item, &course);
        if course.live
            && let (Some(from), Some(to)) = (course.current, to)
        {
            self.migrate(placing, unit, from, to, course.goes_on);
        }
    }

    fn course(
        &self,
        placing: &Placing<'_>,
        unit: UnitId,
        item: &Item,
        to: Option<HostId>,
    ) -> Course {
        let hosts = &placing.site.hosts;
        let current = placing.site.current(item);
        let mut course = Course {
            current,
            to,
            moving: false,
            need_stop: false,
            live: false,
            goes_on: false,
            given_up: false,
            multiple: false,
        };
        let well = |host: &&HostId| hosts[**host].up && !self.lost[**host];
        if let (Some(from), Some(to)) = (current, to)
            && from != to
            && placing.next[unit] == Some(Role::Started)
        {
            course.moving = true;
            course.need_stop = true;
            course.live = item.live
                && placing.managed[unit]
                && !item.failed
                && !item.starting
                && !self.lost[from]
                && !self.lost[to];
        }
        if let Some((from, target)) = item.half_moved {
            let same = current == Some(from) && to == Some(target);
            if course.live && item.active.len() == 2 && same {
                course.goes_on = true;
            } else {
                course.need_stop = true;
                course.live = false;
                course.given_up = true;
            }
        } else {
            let copies = match item.requires {
                Requires::Fencing => item.active.len(),
                _ => item.active.iter().filter(well).count(),
            };
            course.multiple = copies > 1;
            if course.multiple && item.multiple != Multiple::Settled {
                course.need_stop = true;
            }
        }
        course
    }

    /// The actions that bring an item down and up again: needed or only possible.
    fn restart(
        &mut self,
        placing: &Placing<'_>,
        unit: UnitId,
        item: &Item,
        course: &Course,
        need_stop: bool,
    ) {
        let role = placing.role(unit);
        if role != Role::Started {
            return;
        }
        self.stop_everywhere(placing, unit, item, course, need_stop, true);
        if placing.next[unit] >= Some(Role::Started)
            && !item.blocked
            && let Some(to) = course.to
        {
            let start = self.start(placing, unit, to);
            if need_stop && self.graph.actions[start].runnable {
                self.require(placing, start);
            }
            if self.is_expected(placing, unit, item, course, to) {
                self.graph.actions[start].implied = true;
            }
        }
    }

    fn is_expected(
        &self,
        placing: &Placing<'_>,
        unit: UnitId,
        item: &Item,
        course: &Course,
        host: HostId,
    ) -> bool {
        course.multiple
            && item.multiple == Multiple::StopOthers
            && placing.next[unit] == Some(Role::Started)
            && course.to == Some(host)
    }

    fn stop_everywhere(
        &mut self,
        placing: &Placing<'_>,
        unit: UnitId,
        item: &Item,
        course: &Course,
        required: bool,
        restarting: bool,
    ) {
        for host in &item.active {
            if restarting && self.is_expected(placing, unit, item, course, *host) {
                continue;
            }
            let mut required = required;
            if let Some((_, target)) = item.half_moved
                && !course.given_up
            {
                if *host == target && course.to == Some(target) {
                    continue;
                }
                required = true;
            }
            let stop = self.stop(placing, unit, *host);
            if required {
                self.require(placing, stop);
            }
            if !placing.managed[unit] {
                self.graph.actions[stop].runnable = false;
            }
        }
    }

    /// The actions that bring an item from what it is to what it shall be.
    fn change_role(&mut self, placing: &Placing<'_>, unit: UnitId, item: &Item, course: &Course) {
        match (placing.role(unit), placing.next[unit]) {
            (Role::Started, Some(Role::Stopped) | None) => {
                self.stop_everywhere(placing, unit, item, course, true, false);
            }
            (Role::Stopped, Some(Role::Started)) => {
                if let Some(to) = course.to {
                    let start = self.start(placing, unit, to);
                    if self.graph.actions[start].runnable {
                        self.require(placing, start);
                    }
                }
            }
            _ => {}
        }
    }

    fn migrate(
        &mut self,
        placing: &Placing<'_>,
        unit: UnitId,
        from: HostId,
        to: HostId,
        goes_on: bool,
    ) {
        let start = self.start(placing, unit, to);
        let stop = self.stop(placing, unit, from);
        self.graph.actions[start].live = true;
        self.graph.actions[start].implied = true;
        self.graph.actions[stop].live = true;
        if !goes_on {
            let depart = self.graph.add(Some(unit), Task::Depart, Some(from));
            self.graph.actions[depart].live = true;
            self.check_host(placing, depart);
        }
        let arrive = self.graph.add(Some(unit), Task::Arrive, Some(to));
        self.graph.actions[arrive].live = true;
        self.check_host(placing, arrive);
        self.live.push((unit, from, to));
    }

    fn require(&mut self, placing: &Placing<'_>, action: ActionId) {
        let one = &mut self.graph.actions[action];
        let untouched = one.unit.is_some_and(|unit| !placing.managed[unit]);
        if !untouched || one.implied {
            one.optional = false;
        }
    }

    /// The stop of an item on a host.
    fn stop(&mut self, placing: &Placing<'_>, unit: UnitId, host: HostId) -> ActionId {
        let stop = match self.graph.on_host(unit, Task::Stop, host) {
            Some(stop) => stop,
            None => self.graph.add(Some(unit), Task::Stop, Some(host)),
        };
        self.check_host(placing, stop);
        let up = placing.site.hosts[host].up;
        if !up && placing.managed[unit] && !self.lost[host] {
            // A stop that cannot be confirmed: the host must be fenced first.
            self.lost[host] = true;
        }
        stop
    }

    /// The start of an item on a host.
    fn start(&mut self, placing: &Placing<'_>, unit: UnitId, host: HostId) -> ActionId {
        let start = match self.graph.on_host(unit, Task::Start, host) {
            Some(start) => start,
            None => self.graph.add(Some(unit), Task::Start, Some(host)),
        };
        self.check_host(placing, start);
        let unsure = placing
            .item(unit)
            .is_some_and(|item| item.may_run_elsewhere && item.active.is_empty());
        if unsure || !placing.start_allowed(unit) {
            self.graph.actions[start].runnable = false;
        }
        start
    }

    /// An action on a host that takes no orders is impossible.
    fn check_host(&mut self, placing: &Placing<'_>, action: ActionId) {
        let Some(host) = self.graph.actions[action].host else {
            return;
        };
        let host = &placing.site.hosts[host];
        if (!host.up || host.joining) && !self.graph.actions[action].implied {
            self.graph.actions[action].runnable = false;
        }
    }
}
