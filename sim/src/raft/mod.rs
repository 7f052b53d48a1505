//! A model of the consensus group: Raft with a pre-vote, joint changes of voters and acknowledgements
//! that are counted from when the request was *sent*. What the openraft facade promises, no more.
//!
//! ```text
//!   Follower --silence--> Candidate{pre-vote} --majority--> Candidate --majority--> Leader
//!      ^______________________ a higher term, or a leader of this term __________________|
//! ```
//! Always holds: term, vote and log are durable before an answer leaves the node (the world delays a
//! message by the time of the disk, and a crash loses the message). Must not: know what a command means.

mod message;
mod node;

pub(crate) use message::{Data, Entry, Msg};
pub(crate) use node::{Node, Out, Role};

use crate::time::MS;

/// Interval of a leader's heartbeats.
pub(crate) const HEARTBEAT: u64 = 100 * MS;
/// Nobody stands or votes earlier than this after it heard the leader.
pub(crate) const ELECTION_MIN: u64 = 600 * MS;
/// A voter that heard no leader for this long has stood for election.
pub(crate) const ELECTION_MAX: u64 = 1000 * MS;

#[cfg(test)]
mod tests;
