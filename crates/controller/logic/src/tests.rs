//! What a leader answers to heartbeats, and how it changes the group.

use super::*;
use quorate_membership::Instant;
use quorate_state::{HostMode, HostRecord, State};
use quorate_types::{BootId, HostName, Millis, NodeId, Revision, Timestamp};

fn host(n: u64) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn state(hosts: u64, armed: Option<Millis>) -> State {
    let mut state = State::default();
    for node in 1..=hosts {
        let record = HostRecord {
            node,
            address: format!("192.0.2.{node}:7420"),
            spec: quorate_types::HostSpec::default(),
            mode: HostMode::Active,
            joined: Timestamp(0),
            armed,
            changed: Revision(0),
        };
        state.hosts.insert(host(node), record);
    }
    state
}

fn beat(n: u64, watchdog_ms: Option<u64>) -> HeartbeatRequest {
    HeartbeatRequest {
        host: host(n),
        boot: BootId("b".into()),
        guard_armed: true,
        watchdog_ms,
        applied: Revision(0),
        sequence: 1,
        report: None,
    }
}

const START: Instant = Instant(100_000_000_000);

#[test]
fn grants_only_after_a_majority_has_answered() {
    let state = state(3, Some(Millis(500)));
    let mut leases = Leases::new(7, &state, Millis(0), START);
    let (reply, _) = leases.heartbeat(beat(2, Some(500)), &state, None, START);
    assert_eq!(reply.granted_ms, 0, "{:?}", reply.why);
    assert!(reply.want_report);
    let now = START.plus(Millis(10));
    let (reply, _) = leases.heartbeat(beat(2, Some(500)), &state, Some(now), now);
    assert!(reply.granted_ms > 0, "{:?}", reply.why);
}

#[test]
fn a_host_that_became_less_well_armed_gets_no_lease_before_that_is_recorded() {
    let state = state(3, Some(Millis(500)));
    let mut leases = Leases::new(7, &state, Millis(0), START);
    for watchdog_ms in [None, Some(501)] {
        let (reply, changed) = leases.heartbeat(beat(2, watchdog_ms), &state, Some(START), START);
        assert_eq!(reply.granted_ms, 0);
        assert!(reply.why.is_some_and(|why| why.contains("recorded")));
        assert!(changed, "the controller must look");
    }
}

#[test]
fn a_removed_host_is_told_so() {
    let state = state(2, None);
    let mut leases = Leases::new(7, &state, Millis(0), START);
    let (reply, _) = leases.heartbeat(beat(9, None), &state, Some(START), START);
    assert!(reply.why.is_some_and(|why| why.contains("not a host")));
}

#[test]
fn the_group_follows_the_hosts_one_change_at_a_time() {
    let three = state(3, None);
    let mut leases = Leases::new(7, &three, Millis(0), START);
    for n in 1..=3 {
        let _ = leases.heartbeat(beat(n, None), &three, Some(START), START);
    }
    let mut members = GroupMembers {
        voters: [1].into(),
        ..GroupMembers::default()
    };
    let next =
        |members: &GroupMembers, state: &State| next_change(members, 1, state, &leases, START);
    assert_eq!(next(&members, &three), Some(Change::AddLearner(2)));
    members.learners = [2, 3].into();
    assert_eq!(next(&members, &three), None, "they have to catch up first");
    let caught_up = |node: NodeId| (node, Some(0));
    members.matched = [2, 3].map(caught_up).into();
    assert_eq!(
        next(&members, &three),
        Some(Change::Voters([1, 2, 3].into()))
    );
    let half = GroupMembers {
        changing: true,
        ..members.clone()
    };
    assert_eq!(next(&half, &three), Some(Change::Voters([1].into())));
    let one = state(1, None);
    assert_eq!(next(&members, &one), Some(Change::Remove(2)));
}

#[test]
fn a_witness_is_taken_in_by_what_it_answers_and_goes_with_its_number() {
    let mut two = state(2, None);
    let witness = |node| quorate_state::Witness::Disk {
        node,
        pool: "shared".parse().unwrap(),
        unit: None,
    };
    two.quorum.witness = Some(witness(5));
    let mut leases = Leases::new(7, &two, Millis(0), START);
    for n in 1..=2 {
        let _ = leases.heartbeat(beat(n, None), &two, Some(START), START);
    }
    let mut members = GroupMembers {
        voters: [1].into(),
        learners: [2].into(),
        matched: [(2, Some(0))].into(),
        ..GroupMembers::default()
    };
    let next =
        |members: &GroupMembers, state: &State| next_change(members, 1, state, &leases, START);
    assert_eq!(next(&members, &two), Some(Change::AddLearner(5)));
    members.learners.insert(5);
    assert_eq!(next(&members, &two), None, "nothing was heard of it");
    members.heard = [(5, Millis(100))].into();
    assert_eq!(next(&members, &two), None, "it has nothing yet");
    members.matched.insert(5, Some(0));
    assert_eq!(next(&members, &two), Some(Change::Voters([1, 2, 5].into())));
    members.voters = [1, 2, 5].into();
    members.learners.clear();
    assert_eq!(next(&members, &two), None);
    assert_eq!(
        before_leaving(&members, (1, 2), &two, &leases, START),
        None,
        "1 and the witness go on"
    );
    members.heard = [(5, Millis(2000))].into();
    assert_eq!(
        before_leaving(&members, (1, 2), &two, &leases, START),
        Some([1].into()),
        "it does not answer"
    );
    // A new log has a new number: it takes the old one's place once it is ready.
    two.quorum.witness = Some(witness(6));
    assert_eq!(next(&members, &two), Some(Change::AddLearner(6)));
    members.learners.insert(6);
    assert_eq!(next(&members, &two), None);
    members.heard.insert(6, Millis(0));
    members.matched.insert(6, Some(0));
    assert_eq!(next(&members, &two), Some(Change::Voters([1, 2, 6].into())));
    members.voters = [1, 2, 6].into();
    members.learners = [5].into();
    assert_eq!(next(&members, &two), Some(Change::Remove(5)));
}

#[test]
fn a_new_leader_counts_what_its_voters_know_of_earlier_leases() {
    let state = state(3, Some(Millis(500)));
    let lapse = |silent: u64| {
        let leases = Leases::new(7, &state, Millis(silent), START);
        leases.table.lapse(&host(2)).unwrap().since(START).0
    };
    let whole = lapse(0);
    assert!(whole > 2000, "a whole lease and what clocks may differ by");
    let less = whole - lapse(600);
    assert!(
        (550..600).contains(&less),
        "{less} ms: not more than is known"
    );
    let most = whole - lapse(60_000);
    assert!(
        (900..=1000).contains(&most),
        "{most} ms: whoever is alive has half a lease to say so"
    );
}
