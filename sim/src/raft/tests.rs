//! The model itself: one leader per term, committed entries stay, a minority commits nothing.

use super::*;
use crate::rng::Rng;
use quorate_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

struct Net {
    nodes: BTreeMap<NodeId, Node>,
    now: u64,
    rng: Rng,
    cut: BTreeSet<NodeId>,
    flying: Vec<(NodeId, NodeId, Msg)>,
    leaders: BTreeMap<u64, NodeId>,
    committed: Vec<Arc<Entry>>,
}

impl Net {
    fn new(seed: u64) -> Self {
        let members: Vec<NodeId> = (1..=5).collect();
        let voters: BTreeSet<NodeId> = (1..=5).collect();
        let make = |id: &NodeId| (*id, Node::new(*id, members.clone(), voters.clone()));
        Self {
            nodes: members.iter().map(make).collect(),
            now: 0,
            rng: Rng::new(seed),
            cut: BTreeSet::new(),
            flying: Vec::new(),
            leaders: BTreeMap::new(),
            committed: Vec::new(),
        }
    }

    fn step(&mut self) {
        self.now += 5 * MS;
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in ids {
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            let out = node.tick(self.now, &mut self.rng);
            self.flying
                .extend(out.into_iter().map(|(to, msg)| (id, to, msg)));
        }
        for (from, to, msg) in std::mem::take(&mut self.flying) {
            let lost = self.cut.contains(&from) != self.cut.contains(&to) || self.rng.chance(50);
            let Some(node) = self.nodes.get_mut(&to).filter(|_| !lost) else {
                continue;
            };
            let out = node.receive(from, msg, self.now, &mut self.rng);
            self.flying
                .extend(out.into_iter().map(|(next, msg)| (to, next, msg)));
        }
        for node in self.nodes.values() {
            if node.role == Role::Leader {
                let leader = self.leaders.entry(node.term).or_insert(node.id);
                assert_eq!(*leader, node.id, "two leaders in term {}", node.term);
            }
            for (at, entry) in node.log[..node.commit].iter().enumerate() {
                match self.committed.get(at) {
                    Some(old) => assert!(Arc::ptr_eq(old, entry), "entry {at} changed"),
                    None => self.committed.push(Arc::clone(entry)),
                }
            }
        }
    }
}

#[test]
fn committed_entries_stay_and_terms_have_one_leader() {
    for seed in 0..20 {
        let mut net = Net::new(seed);
        let mut proposed = 0;
        for round in 0..4000 {
            if round % 400 == 0 {
                let size = net.rng.below(3);
                net.cut = (0..size).map(|_| net.rng.range(1, 5)).collect();
            }
            for node in net.nodes.values_mut() {
                if node.role == Role::Leader && round % 20 == 0 {
                    node.append(Data::Noop);
                    proposed += 1;
                }
            }
            net.step();
        }
        assert!(
            net.committed.len() * 2 > proposed,
            "too little progress in seed {seed}"
        );
    }
}

#[test]
fn a_leader_without_a_majority_says_so() {
    let mut net = Net::new(7);
    for _ in 0..400 {
        net.step();
    }
    let leader = net.nodes.values().find(|node| node.leads(net.now));
    let leader = leader.map(|node| node.id).into_iter().next();
    net.cut = leader.into_iter().collect();
    for _ in 0..400 {
        net.step();
    }
    let old = leader.and_then(|id| net.nodes.get(&id));
    assert!(old.is_some_and(|node| !node.leads(net.now)));
    let leading = net.nodes.values().filter(|node| node.leads(net.now));
    assert_eq!(leading.count(), 1);
}
