//! Scored placement, and the steps from a present placement to a wanted one.
//!
//! ```text
//! Site{hosts, units, wishes, rules, what runs where}
//!   -> placing: a host for each unit (scores, capacity, together / apart, priority)
//!      -> mend: what hard rules in a circle broke
//!   -> create, relate, settle: which stops, starts and live migrations follow from it
//!   -> sequence: in which order; clash: what cannot arrive after all -> Outcome{steps, placement} -> lint: is it sound?
//! ```
//!
//! Owns: the decision for a whole site that is described in scores. Knows nothing of where the site came
//! from: everything is an index, names only break ties. Always holds: equal input gives an equal
//! outcome; time and memory are bounded by the size of the input, also for rules that go round in
//! circles; a live migration keeps what depends on the moving item satisfied (**dependents-stay-up**).

mod actions;
mod assign;
mod attract;
mod clash;
mod create;
mod lint;
mod mend;
mod placing;
mod relate;
mod score;
mod sequence;
mod settle;
mod site;

#[cfg(test)]
mod tests;

pub use lint::{Flaw, lint};
pub use score::{INFINITY, Score, add, clamp};
pub use sequence::Step;
pub use site::{
    Act, AnyOf, Body, Group, Host, HostId, Item, Multiple, Order, Prefer, Quorum, Requires, Role,
    Rules, Side, Site, Strategy, Strength, Together, Unit, UnitId,
};

use placing::Placing;
use std::collections::BTreeSet;

/// Most arrivals that are made to wait because something else does not leave.
const MAX_CLASHES: usize = 1_000;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The steps, in an order in which they can be carried out.
    pub steps: Vec<Step>,
    /// Per unit: the hosts on which it runs when the steps are done.
    pub placement: Vec<Vec<HostId>>,
}

/// Decides what to do.
///
/// A site whose references lead nowhere ([`Site::is_sound`]) gets an empty outcome.
#[must_use]
pub fn solve(site: &Site) -> Outcome {
    if !site.is_sound() {
        return Outcome {
            steps: Vec::new(),
            placement: vec![Vec::new(); site.units.len()],
        };
    }
    let mut placing = Placing::new(site);
    placing.assign_all();
    let mut made = create::create(&mut placing);
    relate::relate(&placing, &mut made);
    settle::settle(&placing, &mut made.graph);
    let mut waits: BTreeSet<(UnitId, HostId)> = BTreeSet::new();
    loop {
        let (steps, placement) = sequence::sequence(&placing, &made);
        let clashes = clash::clashes(&placing, &steps, &placement);
        let before = waits.len();
        waits.extend(&clashes);
        // Each round something more waits, or it is the last one.
        if waits.len() == before || waits.len() > MAX_CLASHES {
            return Outcome { steps, placement };
        }
        settle::forbid(&placing, &mut made.graph, &clashes);
    }
}
