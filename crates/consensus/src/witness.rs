//! A witness that leads: it gives its log to a host and lets go.
//!
//! An entry may be committed on a host that died and on the witness only. Then no other host can be elected, so the
//! witness must lead for once. openraft 0.9 hands no leadership over; what it allows is to fall silent:
//!
//! ```text
//!   SPEAKING --a voter has the whole log, and answered lately--> SILENT --somebody else leads--> (follower)
//!      ^                                                           | nobody took over for a while: the heir is gone
//!      +-----------------------------------------------------------+
//! ```
//!
//! What always holds: a silent witness is no worse than a dead leader, so nothing here can harm; whoever follows it
//! has its whole log, for a majority votes for no shorter one. The witness grants no lease and proposes nothing at any
//! time: that is its owner's part (it runs no controller).

use crate::NodeId;
use crate::clock::BootTime;
use crate::driver::{Shared, View};

/// Whether a leading witness still sends heartbeats.
#[derive(Debug, Default)]
pub(crate) struct Handover {
    /// Silent since then.
    silent: Option<BootTime>,
    /// Answers to what was sent before say nothing about who lives now.
    speaking: Option<BootTime>,
}

impl Handover {
    /// Does the witness, which leads, go on with its heartbeats?
    pub(crate) fn speaks(&mut self, shared: &Shared, view: &View) -> bool {
        let now = BootTime::now();
        let since = *self.speaking.get_or_insert(now);
        match self.silent {
            // Two elections long nobody took over.
            Some(at) if now.since(at) > shared.timings.election_max * 2 => {
                *self = Self {
                    silent: None,
                    speaking: Some(now),
                };
                true
            }
            Some(_) => false,
            None => match heir(shared, view, since) {
                Some(heir) => {
                    tracing::info!(
                        node = shared.me,
                        heir,
                        "the witness has given its log to a host and leads no longer"
                    );
                    self.silent = Some(now);
                    false
                }
                None => true,
            },
        }
    }
}

/// A voter that has this node's whole log and answered since then.
fn heir(shared: &Shared, view: &View, since: BootTime) -> Option<NodeId> {
    let last = shared.last_log_id()?;
    let metrics = shared.raft.data_metrics();
    let metrics = metrics.borrow();
    let replication = metrics.replication.as_ref()?;
    let mut voters = view.membership.membership().voter_ids();
    voters.find(|id| {
        *id != shared.me
            && replication.get(id).copied().flatten() == Some(last)
            && shared.acks.answered_since(*id, since)
    })
}
