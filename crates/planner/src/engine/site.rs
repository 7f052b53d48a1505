//! What the engine is asked: hosts, things to place, and rules between them. All references are
//! indexes, so that the engine itself compares no names except to break ties.

use super::score::Score;

/// Index of a host in [`Site::hosts`].
pub type HostId = usize;

/// Index of a unit in [`Site::units`].
pub type UnitId = usize;

/// A site: where things are, and what is wanted.
#[derive(Debug, Clone, Default)]
pub struct Site {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Items and groups, in the order in which they were written down. Members of a group are units
    /// of their own, with [`Unit::parent`] set.
    pub units: Vec<Unit>,
    /// Wishes and bans for hosts.
    pub prefer: Vec<Prefer>,
    /// Rules that things run together or apart.
    pub together: Vec<Together>,
    /// Rules about the order of starts and stops.
    pub orders: Vec<Order>,
    /// Rules that one of several must be up first.
    pub any_of: Vec<AnyOf>,
    /// What holds for the whole site.
    pub rules: Rules,
}

/// What holds for a whole site.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// How capacity counts.
    pub strategy: Strategy,
    /// What may be done without a majority; [`Quorum::Held`] with one.
    pub quorum: Quorum,
    /// Lost hosts must be fenced, but nothing could do it: nothing is touched at all.
    pub hands_off: bool,
    /// Stop everything.
    pub stop_all: bool,
    /// A thing may run only where a wish names a host, even if it runs elsewhere now.
    pub opt_in: bool,
}

/// How capacity counts in placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// Capacity is ignored; things are spread by their number.
    #[default]
    Spread,
    /// Capacity is a limit; things are spread by their number.
    Limit,
    /// Capacity is a limit; things go where most of it is free.
    Balanced,
    /// Capacity is a limit; as few hosts as possible are used.
    Dense,
}

/// What may be done without a majority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quorum {
    /// There is a majority, or its absence is to be ignored.
    #[default]
    Held,
    /// Nothing is started that is not running in this part already.
    Freeze,
    /// What needs a majority is stopped.
    Stop,
}

/// A host.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Its name; also the last tie-breaker.
    pub name: String,
    /// It takes orders.
    pub up: bool,
    /// Nobody knows what it does: it must be fenced.
    pub lost: bool,
    /// Fencing it is possible now.
    pub can_fence: bool,
    /// It gives everything away, and takes nothing.
    pub standby: bool,
    /// It wants to leave.
    pub leaving: bool,
    /// Nothing on it is touched, and it takes nothing.
    pub maintenance: bool,
    /// It is joining: it does not take orders yet.
    pub joining: bool,
    /// Capacity by dimension.
    pub capacity: Vec<i64>,
    /// Labels by kind of label, for [`Together::by`].
    pub labels: Vec<Option<String>>,
}

impl Host {
    /// Whether it may take things at all.
    #[must_use]
    pub fn open(&self) -> bool {
        self.up && !self.leaving && !self.lost && !self.standby && !self.maintenance
    }
}

/// An item or a group of items.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// Higher ones are placed first.
    pub priority: Score,
    /// The group that it is a member of.
    pub parent: Option<UnitId>,
    /// What it is.
    pub body: Body,
}

/// What a unit is.
#[derive(Debug, Clone)]
pub enum Body {
    /// A single thing.
    Item(Box<Item>),
    /// Several that belong together.
    Group(Group),
}

/// Several items that belong together.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// In their order.
    pub members: Vec<UnitId>,
    /// They start one after the other, and stop in reverse.
    pub ordered: bool,
    /// They share a host.
    pub colocated: bool,
}

/// One of the two states of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It does not run.
    Stopped,
    /// It runs.
    Started,
}

/// What a start needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Requires {
    /// Nothing.
    #[default]
    Nothing,
    /// A majority.
    Quorum,
    /// A majority, and that lost hosts were fenced.
    Fencing,
}

/// What to do with an item that runs more than once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Multiple {
    /// Stop it everywhere, then start it once.
    #[default]
    Restart,
    /// Stop it where it is not wanted.
    StopOthers,
    /// Something that was decided before the engine is asked.
    Settled,
}

/// A single thing to run.
#[derive(Debug, Clone, Default)]
pub struct Item {
    /// What it takes of each dimension of capacity.
    pub needs: Vec<i64>,
    /// Score of each host before [`Site::prefer`]; `None` where it may not run unless a wish says so.
    pub scores: Vec<Option<Score>>,
    /// Hosts on which it runs now, first found first.
    pub active: Vec<HostId>,
    /// What it is now. May be "started" without an active host when that host is gone.
    pub role: Option<Role>,
    /// What was asked for; `None`: whatever is possible.
    pub wanted: Option<Role>,
    /// It may be touched.
    pub managed: bool,
    /// It must not be touched until somebody has looked.
    pub blocked: bool,
    /// It is held in maintenance by itself.
    pub maintenance: bool,
    /// It runs badly.
    pub failed: bool,
    /// It is cured by a stop and a start.
    pub restart_cures: bool,
    /// It can move while it runs.
    pub live: bool,
    /// A start of it is on its way.
    pub starting: bool,
    /// How much it is worth to stay.
    pub stickiness: Score,
    /// What its start needs.
    pub requires: Requires,
    /// What to do when it runs more than once.
    pub multiple: Multiple,
    /// Its failure may move what it is placed with.
    pub critical: bool,
    /// A live migration is half done: from, to.
    pub half_moved: Option<(HostId, HostId)>,
    /// Hosts where a migration left something to clean up.
    pub strays: Vec<HostId>,
    /// Hosts on which it must be stopped whatever else is decided.
    pub must_stop: Vec<HostId>,
    /// Hosts of which it is known whether it runs there.
    pub known_on: Vec<HostId>,
    /// It may run somewhere that cannot be asked yet: it is not started elsewhere.
    pub may_run_elsewhere: bool,
}

/// A wish for a host, or a ban.
#[derive(Debug, Clone, Copy)]
pub struct Prefer {
    /// Whose.
    pub unit: UnitId,
    /// Which host.
    pub host: HostId,
    /// How much.
    pub score: Score,
}

/// A rule that one thing runs with (or not with) another.
#[derive(Debug, Clone)]
pub struct Together {
    /// The one that follows.
    pub dependent: UnitId,
    /// The one that is followed.
    pub primary: UnitId,
    /// Infinity: must; minus infinity: must not; else a wish.
    pub score: Score,
    /// "Same host" means the same label of this kind; `None`: the same host.
    pub by: Option<usize>,
    /// Where the dependent can run weighs on where a running primary goes.
    pub influence: bool,
    /// Somebody wrote it; not derived from a group.
    pub explicit: bool,
    /// Holds only when the dependent is going to be in this state.
    pub dependent_role: Option<Role>,
    /// Holds only when the primary is going to be in this state.
    pub primary_role: Option<Role>,
}

/// A start or a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Start.
    Start,
    /// Stop.
    Stop,
}

impl Act {
    /// The other one.
    #[must_use]
    pub fn inverse(self) -> Self {
        match self {
            Self::Start => Self::Stop,
            Self::Stop => Self::Start,
        }
    }
}

/// How strictly an order holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// Only if both happen anyway.
    Optional,
    /// The second needs the first.
    Mandatory,
    /// Not at the same time; which comes first does not matter.
    Serialized,
}

/// "First, then".
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// What comes first.
    pub first: UnitId,
    /// What is done to it.
    pub first_act: Act,
    /// What comes then.
    pub then: UnitId,
    /// What is done to it.
    pub then_act: Act,
    /// How strictly.
    pub strength: Strength,
    /// How the rule stands to its counterpart.
    pub side: Side,
}

/// How an order stands to its counterpart (stops in reverse order of starts).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// There is no counterpart.
    Alone,
    /// The rule as it was written; its counterpart is a rule of its own.
    Forward,
    /// The counterpart of another one.
    Backward,
}

/// "At least one of these first, then those".
#[derive(Debug, Clone)]
pub struct AnyOf {
    /// One of these.
    pub first: Vec<UnitId>,
    /// What is done to it.
    pub first_act: Act,
    /// Then all of these.
    pub then: Vec<UnitId>,
    /// What is done to them.
    pub then_act: Act,
    /// How strictly.
    pub strength: Strength,
    /// How the rule stands to its counterpart.
    pub side: Side,
}

impl Site {
    /// The item behind a unit, if it is one.
    #[must_use]
    pub fn item(&self, unit: UnitId) -> Option<&Item> {
        match &self.units[unit].body {
            Body::Item(item) => Some(item),
            Body::Group(_) => None,
        }
    }

    /// The group behind a unit, if it is one.
    #[must_use]
    pub fn group(&self, unit: UnitId) -> Option<&Group> {
        match &self.units[unit].body {
            Body::Group(group) => Some(group),
            Body::Item(_) => None,
        }
    }

    /// Whether all references are within bounds, groups hold items only, and no item is in two groups.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let (hosts, units) = (self.hosts.len(), self.units.len());
        let host = |host: &HostId| *host < hosts;
        let unit = |unit: &UnitId| *unit < units;
        let sound_item = |item: &Item| {
            let half = item
                .half_moved
                .is_none_or(|(from, to)| host(&from) && host(&to));
            let lists = [&item.active, &item.strays, &item.must_stop, &item.known_on];
            half && item.scores.len() <= hosts && lists.into_iter().flatten().all(host)
        };
        let sound_unit = |(at, one): (UnitId, &Unit)| match &one.body {
            Body::Item(item) => {
                let member = one.parent.is_none_or(|parent| {
                    unit(&parent) && self.group(parent).is_some_and(|g| g.members.contains(&at))
                });
                member && sound_item(item)
            }
            Body::Group(group) => {
                one.parent.is_none()
                    && group.members.iter().all(|member| {
                        unit(member)
                            && self.item(*member).is_some()
                            && self.units[*member].parent == Some(at)
                    })
            }
        };
        self.units.iter().enumerate().all(sound_unit)
            && self
                .prefer
                .iter()
                .all(|one| unit(&one.unit) && host(&one.host))
            && self
                .together
                .iter()
                .all(|one| unit(&one.dependent) && unit(&one.primary))
            && self
                .orders
                .iter()
                .all(|one| unit(&one.first) && unit(&one.then))
            && self
                .any_of
                .iter()
                .all(|one| one.first.iter().chain(&one.then).all(unit))
    }

    /// The host from which an item would move: of several, the source of a migration that is half
    /// done, else the first that is well (where lost hosts need no fencing), else the first.
    #[must_use]
    pub fn current(&self, item: &Item) -> Option<HostId> {
        if let Some((from, _)) = item.half_moved
            && item.active.contains(&from)
        {
            return Some(from);
        }
        let well = |host: &&HostId| self.hosts[**host].up && !self.hosts[**host].lost;
        if item.half_moved.is_none()
            && item.requires != Requires::Fencing
            && let Some(host) = item.active.iter().find(well)
        {
            return Some(*host);
        }
        item.active.first().copied()
    }
}
