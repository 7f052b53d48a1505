//! What nodes say to each other and keep.

use quorate_state::Envelope;
use quorate_types::NodeId;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Who votes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) voters: BTreeSet<NodeId>,
    /// While they change: the next ones. Both majorities count.
    pub(crate) next: Option<BTreeSet<NodeId>>,
}

impl Config {
    pub(crate) fn sets(&self) -> impl Iterator<Item = &BTreeSet<NodeId>> {
        std::iter::once(&self.voters).chain(&self.next)
    }

    pub(crate) fn votes(&self, node: NodeId) -> bool {
        self.sets().any(|set| set.contains(&node))
    }

    /// Every configuration in force has a majority in `yes`.
    pub(crate) fn majority(&self, yes: impl Fn(NodeId) -> bool) -> bool {
        self.sets()
            .all(|set| set.iter().filter(|node| yes(**node)).count() > set.len() / 2)
    }
}

/// Content of an entry.
#[derive(Debug)]
pub(crate) enum Data {
    /// The first entry of a leader.
    Noop,
    /// Voters.
    Config(Config),
    /// For the state machine.
    Command(Box<Envelope>),
}

/// An entry of the log.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) term: u64,
    pub(crate) data: Data,
}

/// A message. Its sender is known from the connection.
#[derive(Debug, Clone)]
pub(crate) enum Msg {
    Append {
        term: u64,
        prev: usize,
        prev_term: u64,
        entries: Vec<Arc<Entry>>,
        commit: usize,
        /// By the leader's clock.
        sent: u64,
        /// The leader hears no majority: it is not to be taken for a live one.
        mute: bool,
    },
    Appended {
        term: u64,
        ok: bool,
        matched: usize,
        sent: u64,
    },
    AskVote {
        term: u64,
        pre: bool,
        last: usize,
        last_term: u64,
    },
    Vote {
        term: u64,
        pre: bool,
        granted: bool,
        /// For how long the voter had acknowledged no leader.
        quiet: u64,
    },
}
