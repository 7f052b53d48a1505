//! The promise between both sides: when the leader has a proof, the host's guests have ended.

use crate::*;
use quorate_types::{BootId, ClusterSettings, HostName, LeaseTimings, Millis, Revision};

const MS: u64 = 1_000_000;

fn at(ms: u64) -> Instant {
    Instant(ms * MS)
}

fn h(n: u32) -> HostName {
    HostName::new(format!("h{n}")).unwrap()
}

fn beat(host: &HostName) -> Heartbeat {
    Heartbeat {
        host: host.clone(),
        boot: BootId("b".into()),
        guard_armed: true,
        watchdog: Some(Millis(500)),
    }
}

fn table(hosts: u32) -> LeaseTable {
    let settings = ClusterSettings::default();
    let mut table = LeaseTable::new(&settings, at(0));
    let names: Vec<_> = (1..=hosts).map(h).collect();
    table.configure(&settings, names.iter(), at(0));
    table
}

#[test]
fn a_leader_without_a_majority_grants_and_judges_nothing() {
    let mut table = table(3);
    assert_eq!(
        table.heartbeat(&beat(&h(1)), Revision(1), at(10)),
        Err(NoGrant::NotQuorate)
    );
    table.quorum_confirmed(at(10));
    assert!(table.heartbeat(&beat(&h(1)), Revision(1), at(20)).is_ok());
    assert_eq!(
        table.heartbeat(&beat(&h(1)), Revision(1), at(2010)),
        Err(NoGrant::NotQuorate)
    );
    assert_eq!(
        table.lease_expired(&h(1), None, at(9000)),
        Err(LeaseProofError::NotQuorate)
    );
}

#[test]
fn a_grant_ends_with_the_leaders_own_confirmation() {
    let mut table = table(3);
    table.quorum_confirmed(at(0));
    let grant = table
        .heartbeat(&beat(&h(1)), Revision(1), at(1500))
        .unwrap();
    assert_eq!(grant.granted, Millis(500));
}

#[test]
fn a_proof_needs_the_whole_bound_and_an_armed_watchdog_and_seals() {
    let mut table = table(3);
    table.quorum_confirmed(at(0));
    table.heartbeat(&beat(&h(1)), Revision(1), at(0)).unwrap();
    table.quorum_confirmed(at(9000));
    assert!(matches!(
        table.lease_expired(&h(1), None, at(2525)),
        Err(LeaseProofError::Proof(_))
    ));
    assert_eq!(table.health(&h(1), at(2525)), HostHealth::Expired);
    let proof = table.lease_expired(&h(1), None, at(2526)).unwrap();
    assert_eq!(proof.kind(), ProofKind::LeaseExpired);
    assert_eq!(
        table.heartbeat(&beat(&h(1)), Revision(1), at(2600)),
        Err(NoGrant::Sealed)
    );
    table.unseal(&h(1));
    assert!(table.heartbeat(&beat(&h(1)), Revision(1), at(2700)).is_ok());

    let mut bare = beat(&h(2));
    bare.watchdog = None;
    table.heartbeat(&bare, Revision(1), at(2700)).unwrap();
    assert!(matches!(
        table.lease_expired(&h(2), Some(Millis(1)), at(8999)),
        Err(LeaseProofError::NotArmed { .. })
    ));
}

#[test]
fn a_new_leader_waits_a_whole_bound_from_its_election() {
    let settings = ClusterSettings::default();
    let mut table = LeaseTable::new(&settings, at(5000));
    table.configure(&settings, [h(1)].iter(), at(5000));
    table.quorum_confirmed(at(7500));
    assert!(
        table
            .lease_expired(&h(1), Some(Millis(500)), at(7525))
            .is_err()
    );
    assert!(
        table
            .lease_expired(&h(1), Some(Millis(500)), at(7526))
            .is_ok()
    );
}

#[test]
fn correlated_silence_does_not_fence_a_whole_cluster() {
    let mut table = table(4);
    table.quorum_confirmed(at(9000));
    let dead = (1..=4)
        .filter(|n| {
            table
                .lease_expired(&h(*n), Some(Millis(500)), at(9000))
                .is_ok()
        })
        .count();
    assert_eq!(dead, 2);
}

#[test]
fn taking_power_or_storage_away_counts_as_declaring_dead() {
    let mut table = table(4);
    table.quorum_confirmed(at(9000));
    for n in [1, 2] {
        assert_eq!(table.check_share(&h(n), at(9000)), Ok(()));
        table.count_fenced(&h(n), at(9000));
    }
    let third = table.lease_expired(&h(3), Some(Millis(500)), at(9000));
    assert!(
        matches!(third, Err(LeaseProofError::TooMany { recent: 2, .. })),
        "{third:?}"
    );
    assert!(table.check_share(&h(4), at(9000)).is_err());
    // Their own leases are no one more.
    assert!(
        table
            .lease_expired(&h(1), Some(Millis(500)), at(9000))
            .is_ok()
    );
    // Another try at the second does not hold the others up for longer.
    table.count_fenced(&h(2), at(10_900));
    table.quorum_confirmed(at(11_001));
    assert_eq!(table.check_share(&h(4), at(11_001)), Ok(()));
}

/// Whatever the delays of heartbeat, ack and quorum confirmation: at the leader's proof the host's
/// watchdog has fired, with clocks that drift apart by the allowed margin.
#[test]
fn proof_never_precedes_the_hosts_end() {
    let timings = LeaseTimings::default();
    for out in [0, 1, 40, 300, 1900] {
        for quorum_age in [0, 100, 1999] {
            let mut table = table(3);
            let received = 10_000 + out;
            table.quorum_confirmed(at(received - quorum_age));
            let Ok(grant) = table.heartbeat(&beat(&h(1)), Revision(1), at(received)) else {
                continue;
            };
            let mut lease = HostLease::new(timings);
            lease.acknowledged(at(10_000), grant.granted, grant.revision);
            let host_end = lease.deadline().unwrap().plus(timings.watchdog_bound);
            table.quorum_confirmed(at(50_000));
            let proof_at =
                (10_000..20_000).find(|ms| table.lease_expired(&h(1), None, at(*ms)).is_ok());
            let proof_at = at(proof_at.unwrap());
            // The host's clock runs slower than the leader's by the whole margin.
            let span = host_end.since(at(10_000)).0;
            let slow_end = at(10_000 + span + span * u64::from(timings.drift_permille) / 1000);
            assert!(proof_at > slow_end, "out {out} quorum age {quorum_age}");
        }
    }
}
