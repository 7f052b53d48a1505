//! One member of the group.

use super::message::{Config, Data, Entry, Msg};
use super::{ELECTION_MAX, ELECTION_MIN, HEARTBEAT};
use crate::rng::Rng;
use crate::time::MS;
use quorate_types::{Millis, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Most entries of one message.
const BATCH: usize = 64;

/// What a node is in its term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Follower,
    Candidate { pre: bool },
    Leader,
}

/// A member; what is below `commit` of its fields survives a crash.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) members: Vec<NodeId>,
    pub(crate) term: u64,
    voted: Option<NodeId>,
    pub(crate) log: Vec<Arc<Entry>>,
    pub(crate) role: Role,
    pub(crate) leader: Option<NodeId>,
    /// When a leader was heard, by the local clock.
    heard: Option<u64>,
    /// When it acknowledged a leader, or counted on a majority as the leader.
    acked: Option<u64>,
    /// When those who voted for this node heard a leader, at the latest.
    voters_heard: u64,
    /// When something is due next, by the local clock.
    pub(crate) due: u64,
    pub(crate) commit: usize,
    votes: BTreeSet<NodeId>,
    acks: BTreeMap<NodeId, u64>,
    pub(crate) matched: BTreeMap<NodeId, usize>,
    next: BTreeMap<NodeId, usize>,
    /// Index of the first entry of its own term, as a leader.
    pub(crate) first: usize,
    initial: Config,
    /// It leads only to give its log to a host.
    pub(crate) witness: bool,
    /// A leading witness: silent since then, and speaking since then.
    silent: Option<u64>,
    speaking: u64,
}

pub(crate) type Out = Vec<(NodeId, Msg)>;

impl Node {
    pub(crate) fn new(id: NodeId, members: Vec<NodeId>, voters: BTreeSet<NodeId>) -> Self {
        Self {
            id,
            members,
            term: 0,
            voted: None,
            log: Vec::new(),
            role: Role::Follower,
            leader: None,
            heard: None,
            acked: None,
            voters_heard: 0,
            due: 0,
            commit: 0,
            votes: BTreeSet::new(),
            acks: BTreeMap::new(),
            matched: BTreeMap::new(),
            next: BTreeMap::new(),
            first: 0,
            initial: Config { voters, next: None },
            witness: false,
            silent: None,
            speaking: 0,
        }
    }

    /// The process was started again: what is not durable is gone.
    pub(crate) fn restart(&mut self, now: u64, committed: usize, rng: &mut Rng) {
        self.role = Role::Follower;
        self.leader = None;
        // A restarted node may have heard a leader just before.
        self.heard = Some(now);
        self.acked = Some(now);
        self.commit = committed.min(self.log.len());
        self.votes.clear();
        self.acks.clear();
        self.matched.clear();
        self.next.clear();
        self.rest(now, rng);
    }

    pub(crate) fn config(&self) -> Config {
        let found = self.log.iter().rev().find_map(|entry| match &entry.data {
            Data::Config(config) => Some(config.clone()),
            _ => None,
        });
        found.unwrap_or_else(|| self.initial.clone())
    }

    /// The newest configuration that is committed, and whether one that is not exists.
    pub(crate) fn changing(&self) -> bool {
        let open = self.log[self.commit..]
            .iter()
            .any(|entry| matches!(entry.data, Data::Config(_)));
        open || self.config().next.is_some()
    }

    fn term_at(&self, index: usize) -> u64 {
        match index.checked_sub(1) {
            Some(at) => self.log.get(at).map_or(0, |entry| entry.term),
            None => 0,
        }
    }

    fn rest(&mut self, now: u64, rng: &mut Rng) {
        // A witness lets the hosts stand first.
        let (low, high) = match self.witness {
            false => (ELECTION_MIN, ELECTION_MAX),
            true => (ELECTION_MAX, ELECTION_MAX + ELECTION_MIN),
        };
        self.due = now + rng.range(low / MS, high / MS) * MS;
    }

    /// Send time of the newest request that a majority acknowledged, if it leads.
    pub(crate) fn quorum_ack(&self, now: u64) -> Option<u64> {
        if self.role != Role::Leader {
            return None;
        }
        let mut oldest = Some(now);
        for set in self.config().sets() {
            let at = |node: &NodeId| {
                if *node == self.id {
                    Some(now)
                } else {
                    self.acks.get(node).copied()
                }
            };
            let mut times: Vec<Option<u64>> = set.iter().map(at).collect();
            times.sort_unstable_by(|a, b| b.cmp(a));
            let majority = times.get(set.len() / 2).copied().flatten();
            oldest = oldest.min(majority);
            majority?;
        }
        oldest
    }

    /// As the leader: no earlier leader had a majority that answered anything sent after this.
    pub(crate) fn quiet_since(&self) -> u64 {
        self.acked.unwrap_or(0).max(self.voters_heard)
    }

    /// It leads, and a majority has said so lately.
    pub(crate) fn leads(&self, now: u64) -> bool {
        self.quorum_ack(now)
            .is_some_and(|at| now.saturating_sub(at) <= ELECTION_MAX)
    }

    /// The leader that this node would send its heartbeat to.
    pub(crate) fn known_leader(&self, now: u64) -> Option<NodeId> {
        if self.role == Role::Leader {
            return self.leads(now).then_some(self.id);
        }
        let fresh = self
            .heard
            .is_some_and(|at| now.saturating_sub(at) <= ELECTION_MAX);
        self.leader.filter(|_| fresh)
    }

    /// Adds an entry as the leader. Returns its index.
    pub(crate) fn append(&mut self, data: Data) -> usize {
        self.log.push(Arc::new(Entry {
            term: self.term,
            data,
        }));
        self.log.len()
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: u64, rng: &mut Rng) -> Out {
        if now < self.due {
            return Vec::new();
        }
        if self.role == Role::Leader {
            self.due = now + HEARTBEAT;
            if self.witness && self.hands_over(now) {
                return Vec::new();
            }
            return self.broadcast(now);
        }
        self.rest(now, rng);
        if !self.config().votes(self.id) {
            return Vec::new();
        }
        self.role = Role::Candidate { pre: true };
        self.votes = BTreeSet::from([self.id]);
        let mut out = Vec::new();
        if self.config().majority(|node| node == self.id) {
            return self.stand(now);
        }
        self.ask_votes(self.term + 1, true, &mut out);
        out
    }

    /// A leading witness falls silent when a host has its whole log, so that this one is elected.
    fn hands_over(&mut self, now: u64) -> bool {
        match self.silent {
            Some(at) if now.saturating_sub(at) > 2 * ELECTION_MAX => {
                self.silent = None;
                self.speaking = now;
                false
            }
            Some(_) => true,
            None => {
                let config = self.config();
                let heir = |node: &NodeId| {
                    *node != self.id
                        && config.votes(*node)
                        && self.matched.get(node) == Some(&self.log.len())
                        && self.acks.get(node).is_some_and(|at| *at >= self.speaking)
                };
                if self.members.iter().any(heir) {
                    self.silent = Some(now);
                }
                self.silent.is_some()
            }
        }
    }

    /// Age of the newest answer of each member, on the leader.
    pub(crate) fn heard(&self, now: u64) -> BTreeMap<NodeId, Millis> {
        let age = |at: &u64| Millis(now.saturating_sub(*at) / MS);
        self.acks
            .iter()
            .map(|(node, at)| (*node, age(at)))
            .collect()
    }

    fn ask_votes(&self, term: u64, pre: bool, out: &mut Out) {
        let config = self.config();
        let (last, last_term) = (self.log.len(), self.term_at(self.log.len()));
        for node in self.members.iter().filter(|node| **node != self.id) {
            if config.votes(*node) {
                let ask = Msg::AskVote {
                    term,
                    pre,
                    last,
                    last_term,
                };
                out.push((*node, ask));
            }
        }
    }

    /// Stands for election in a new term.
    fn stand(&mut self, now: u64) -> Out {
        self.term += 1;
        self.voted = Some(self.id);
        self.leader = None;
        self.role = Role::Candidate { pre: false };
        self.votes = BTreeSet::from([self.id]);
        self.voters_heard = 0;
        if self.config().majority(|node| node == self.id) {
            return self.lead(now);
        }
        let mut out = Vec::new();
        self.ask_votes(self.term, false, &mut out);
        out
    }

    fn lead(&mut self, now: u64) -> Out {
        self.role = Role::Leader;
        self.leader = Some(self.id);
        self.silent = None;
        self.speaking = now;
        self.acks.clear();
        self.matched.clear();
        let next = self.log.len() + 1;
        self.next = self.members.iter().map(|node| (*node, next)).collect();
        self.first = self.append(Data::Noop);
        self.due = now + HEARTBEAT;
        self.advance();
        self.broadcast(now)
    }

    /// Sends everything that followers lack.
    pub(crate) fn broadcast(&mut self, now: u64) -> Out {
        let mut out = Vec::new();
        for node in self.members.clone() {
            if node != self.id {
                out.push((node, self.append_for(node, now)));
            }
        }
        out
    }

    fn append_for(&self, node: NodeId, now: u64) -> Msg {
        let next = self.next.get(&node).copied().unwrap_or(1).max(1);
        let from = next - 1;
        let to = (from + BATCH).min(self.log.len());
        let heard = self.quorum_ack(now);
        let mute = heard.is_none_or(|at| now.saturating_sub(at) > ELECTION_MIN)
            && self.commit >= self.first;
        Msg::Append {
            term: self.term,
            prev: from,
            prev_term: self.term_at(from),
            entries: self.log.get(from..to).unwrap_or(&[]).to_vec(),
            commit: self.commit,
            sent: now,
            mute,
        }
    }

    /// A message arrived.
    pub(crate) fn receive(&mut self, from: NodeId, msg: Msg, now: u64, rng: &mut Rng) -> Out {
        match msg {
            Msg::Append { .. } => self.on_append(from, msg, now, rng),
            Msg::Appended {
                term,
                ok,
                matched,
                sent,
            } => self.on_appended(from, term, ok, matched, sent, now, rng),
            Msg::AskVote {
                term,
                pre,
                last,
                last_term,
            } => self.on_ask(from, term, pre, (last_term, last), now, rng),
            Msg::Vote {
                term,
                pre,
                granted,
                quiet,
            } => {
                if granted && !pre {
                    self.voters_heard = self.voters_heard.max(now.saturating_sub(quiet));
                }
                self.on_vote(from, term, pre, granted, now, rng)
            }
        }
    }

    fn yield_to(&mut self, term: u64, now: u64, rng: &mut Rng) {
        if term > self.term {
            // What it counted on as the leader.
            self.acked = self.acked.max(self.quorum_ack(now));
            self.term = term;
            self.voted = None;
            self.leader = None;
            self.role = Role::Follower;
            self.rest(now, rng);
        }
    }

    fn on_append(&mut self, from: NodeId, msg: Msg, now: u64, rng: &mut Rng) -> Out {
        let Msg::Append {
            term,
            prev,
            prev_term,
            entries,
            commit,
            sent,
            mute,
        } = msg
        else {
            return Vec::new();
        };
        self.yield_to(term, now, rng);
        let answer = |node: &Self, ok, matched| {
            let term = node.term;
            vec![(
                from,
                Msg::Appended {
                    term,
                    ok,
                    matched,
                    sent,
                },
            )]
        };
        if term < self.term {
            // Acknowledges nothing: the time is that of an earlier leader, or of an earlier life of this one.
            let (term, sent) = (self.term, 0);
            let (ok, matched) = (false, 0);
            return vec![(
                from,
                Msg::Appended {
                    term,
                    ok,
                    matched,
                    sent,
                },
            )];
        }
        self.acked = self.acked.max(Some(now));
        self.role = Role::Follower;
        self.leader = Some(from);
        if !mute {
            self.heard = Some(now);
            self.rest(now, rng);
        }
        if prev > self.log.len() || self.term_at(prev) != prev_term {
            return answer(self, false, self.log.len().min(prev.saturating_sub(1)));
        }
        let matched = prev + entries.len();
        for (at, entry) in entries.into_iter().enumerate() {
            let index = prev + at;
            if self
                .log
                .get(index)
                .is_some_and(|mine| mine.term != entry.term)
            {
                self.log.truncate(index);
            }
            if index >= self.log.len() {
                self.log.push(entry);
            }
        }
        self.commit = self.commit.max(commit.min(matched));
        answer(self, true, matched)
    }

    #[allow(clippy::too_many_arguments)] // the fields of one message
    fn on_appended(
        &mut self,
        from: NodeId,
        term: u64,
        ok: bool,
        matched: usize,
        sent: u64,
        now: u64,
        rng: &mut Rng,
    ) -> Out {
        self.yield_to(term, now, rng);
        if self.role != Role::Leader || term != self.term {
            return Vec::new();
        }
        let ack = self.acks.entry(from).or_insert(sent);
        *ack = sent.max(*ack);
        if ok {
            let known = self.matched.entry(from).or_insert(0);
            *known = matched.max(*known);
            let known = *known;
            self.next.insert(from, known + 1);
            let before = self.commit;
            self.advance();
            if self.silent.is_some() {
                return Vec::new();
            }
            if self.commit > before || known < self.log.len() {
                return if self.commit > before {
                    self.broadcast(now)
                } else {
                    vec![(from, self.append_for(from, now))]
                };
            }
            return Vec::new();
        }
        self.next.insert(from, matched + 1);
        vec![(from, self.append_for(from, now))]
    }

    /// Commits what a majority has, of its own term.
    pub(crate) fn advance(&mut self) {
        let config = self.config();
        for index in (self.commit + 1..=self.log.len()).rev() {
            if self.term_at(index) != self.term {
                break;
            }
            let has = |node: NodeId| {
                node == self.id || self.matched.get(&node).is_some_and(|m| *m >= index)
            };
            if config.majority(has) {
                self.commit = index;
                break;
            }
        }
        let done = self.commit == self.log.len();
        if let (true, Some(next)) = (done && self.first <= self.commit, config.next) {
            let voters = next;
            self.append(Data::Config(Config { voters, next: None }));
            if self.config().majority(|node| node == self.id) {
                self.commit = self.log.len();
            }
        }
    }

    /// Begins a change of voters, as the leader.
    pub(crate) fn change(&mut self, next: BTreeSet<NodeId>) {
        let voters = self.config().voters;
        if voters != next && !self.changing() {
            let next = Some(next);
            self.append(Data::Config(Config { voters, next }));
        }
    }

    fn on_ask(
        &mut self,
        from: NodeId,
        term: u64,
        pre: bool,
        last: (u64, usize),
        now: u64,
        rng: &mut Rng,
    ) -> Out {
        let heard = if self.role == Role::Leader {
            self.quorum_ack(now)
        } else {
            self.heard
        };
        let lease = heard.is_some_and(|at| now.saturating_sub(at) < ELECTION_MIN);
        let mine = (self.term_at(self.log.len()), self.log.len());
        let good = last >= mine && !lease;
        if pre {
            if self.witness && last < mine && !lease && self.role != Role::Leader {
                // Nobody but this one can lead: no reason to wait.
                self.due = now;
            }
            let granted = good && term > self.term;
            return vec![(
                from,
                Msg::Vote {
                    term,
                    pre,
                    granted,
                    quiet: 0,
                },
            )];
        }
        if lease {
            return Vec::new();
        }
        self.yield_to(term, now, rng);
        let free = self.voted.is_none_or(|voted| voted == from);
        let granted = good && term == self.term && free && self.role == Role::Follower;
        if granted {
            self.voted = Some(from);
            self.rest(now, rng);
        }
        let term = self.term;
        let quiet = self.acked.map_or(now, |at| now.saturating_sub(at));
        vec![(
            from,
            Msg::Vote {
                term,
                pre,
                granted,
                quiet,
            },
        )]
    }

    fn on_vote(
        &mut self,
        from: NodeId,
        term: u64,
        pre: bool,
        granted: bool,
        now: u64,
        rng: &mut Rng,
    ) -> Out {
        if !pre {
            self.yield_to(term, now, rng);
        }
        let asked = if pre { self.term + 1 } else { self.term };
        if self.role != (Role::Candidate { pre }) || term != asked || !granted {
            return Vec::new();
        }
        self.votes.insert(from);
        let votes = std::mem::take(&mut self.votes);
        let won = self.config().majority(|node| votes.contains(&node));
        self.votes = votes;
        match (won, pre) {
            (false, _) => Vec::new(),
            (true, true) => self.stand(now),
            (true, false) => self.lead(now),
        }
    }
}
