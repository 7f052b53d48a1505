//! This host's heartbeats to the leader, and its links for the report.
//!
//! Always holds: the send time is read before the request leaves, so a lease counted from it never
//! ends after the leader's idea of it. A heartbeat does not wait for the one before it: an answer that
//! hangs in a cut connection must not delay the next.

use super::core::Core;
use super::peer;
use quorate_controller::{Group as _, HeartbeatReply, HeartbeatRequest, boot_now};
use quorate_transport::{Direct, LinkState};
use quorate_types::report::LinkReport;
use quorate_types::{HostName, Millis, NodeId, Revision};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

/// Heartbeats under way at a time.
const IN_FLIGHT: usize = 8;

/// How long the first heartbeat waits for the guard: a host that says `not armed` gets no lease before
/// that is recorded, so a restarted daemon does not say it before it knows.
const GUARD_WITHIN: Duration = Duration::from_secs(1);

/// Sends heartbeats for the life of the daemon.
pub(crate) async fn run(core: Arc<Core>) {
    let mut reports = core.agent.reports();
    let armed = reports.wait_for(|report| report.guard_armed && report.watchdog_ms.is_some());
    // A host without a watchdog never is: it begins after that time.
    let _ = tokio::time::timeout(GUARD_WITHIN, armed)
        .await
        .map(|armed| armed.map(drop));
    let slots = Arc::new(Semaphore::new(IN_FLIGHT));
    let want_report = Arc::new(AtomicBool::new(true));
    let mut last_leader = None;
    let mut leadership = core.group.leadership();
    loop {
        let every = core.state().settings().lease.heartbeat.as_duration();
        let leading = *leadership.borrow_and_update();
        if leading.leader != last_leader {
            last_leader = leading.leader;
            want_report.store(true, Ordering::Relaxed);
        }
        core.agent.set_links(links(&core));
        if let (Some(leader), Ok(permit)) = (leading.leader, Arc::clone(&slots).try_acquire_owned())
        {
            let (core, want_report) = (Arc::clone(&core), Arc::clone(&want_report));
            tokio::spawn(async move {
                send(&core, leader, leading.is_self, &want_report).await;
                drop(permit);
            });
        }
        // A new leader is greeted at once: it grants the first lease of its term.
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            _ = leadership.changed() => {}
            () = core.agent.report_changed() => { want_report.store(true, Ordering::Relaxed); }
        }
    }
}

async fn send(core: &Core, leader: NodeId, is_self: bool, want_report: &AtomicBool) {
    let report = core.agent.report();
    let with_report = want_report.swap(false, Ordering::Relaxed);
    let request = HeartbeatRequest {
        host: core.me.clone(),
        boot: report.boot.clone(),
        guard_armed: report.guard_armed,
        watchdog_ms: report.watchdog_ms,
        applied: core.state().revision,
        sequence: report.sequence,
        report: with_report.then(|| Box::new(report)),
    };
    let timeout = core.state().settings().lease.duration.as_duration() / 2;
    let sent = boot_now();
    let reply = if is_self {
        core.controller.heartbeat(request)
    } else {
        answer(core, leader, &request, timeout).await
    };
    let Some(reply) = reply else {
        want_report.store(true, Ordering::Relaxed);
        return;
    };
    if reply.want_report {
        want_report.store(true, Ordering::Relaxed);
    }
    if let Some(why) = &reply.why {
        warn!(why, "no lease");
    }
    acknowledge(core, sent, &reply);
}

fn acknowledge(core: &Core, sent: quorate_membership::Instant, reply: &HeartbeatReply) {
    let revision: Revision = reply.revision;
    core.agent
        .lease_ack(sent, Millis(reply.granted_ms), revision);
}

async fn answer(
    core: &Core,
    leader: NodeId,
    request: &HeartbeatRequest,
    timeout: Duration,
) -> Option<HeartbeatReply> {
    match peer::heartbeat(&core.peers, leader, request, timeout).await {
        Ok(reply) => Some(reply),
        Err(error) => {
            debug!(%error, "heartbeat");
            None
        }
    }
}

/// The state of the direct links, by host.
fn links(core: &Core) -> BTreeMap<HostName, LinkReport> {
    let state = core.state();
    let name = |node: &NodeId| state.host_of_node(*node).cloned();
    let report = |link: &LinkState| LinkReport {
        up: link.direct == Direct::Up,
        relayed_by: link.relayed_by.as_ref().and_then(name),
        rtt_us: None,
        error: match &link.direct {
            Direct::Up => None,
            Direct::Down { last_error, .. } => Some(last_error.clone()),
        },
    };
    core.peers
        .links()
        .iter()
        .filter_map(|(node, link)| Some((name(node)?, report(link))))
        .collect()
}
