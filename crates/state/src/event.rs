//! What happened: a bounded log inside the state, the source of `events` and of audit.
//!
//! Always holds: sequence numbers grow by one and are the same on every host.

use quorate_types::{HostName, Revision, Timestamp, VmName};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Events kept.
pub(crate) const EVENTS_KEPT: usize = 1000;

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The cluster.
    Cluster,
    /// A host.
    Host(HostName),
    /// A VM.
    Vm(VmName),
    /// A pool, network, rule or service, by its kind and name.
    Object(String),
}

/// Kinds of events, for filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Somebody changed what is wanted.
    Changed,
    /// A host joined, left or changed its mode.
    Host,
    /// A VM was started somewhere.
    Start,
    /// A VM was ordered to stop.
    Stop,
    /// Ownership was taken from a host, with proof.
    Release,
    /// A migration began, ended or failed.
    Migration,
    /// A request could not be met.
    Refused,
    /// A copy of a disk was added, is in step, or is not any more.
    Storage,
    /// The ring of a service changed, another host holds its address, a member serves or does not.
    Service,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Position in the log, from 1.
    pub sequence: u64,
    /// When the command was proposed.
    pub at: Timestamp,
    /// The revision that carried it.
    pub revision: Revision,
    /// Who caused it.
    pub by: String,
    /// Kind.
    pub kind: EventKind,
    /// About what.
    pub subject: Subject,
    /// One sentence.
    pub text: String,
}

/// The bounded log.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EventLog {
    last: u64,
    events: VecDeque<Event>,
}

impl EventLog {
    /// Sequence number of the newest event; 0: none yet.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Events after `sequence`, oldest first. Older ones than the log holds are gone.
    pub fn after(&self, sequence: u64) -> impl Iterator<Item = &Event> {
        self.events
            .iter()
            .filter(move |event| event.sequence > sequence)
    }

    /// All events kept, oldest first.
    pub fn all(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.events.iter()
    }

    pub(crate) fn push(&mut self, mut event: Event) -> Event {
        self.last += 1;
        event.sequence = self.last;
        if self.events.len() >= EVENTS_KEPT {
            self.events.pop_front();
        }
        self.events.push_back(event.clone());
        event
    }
}
