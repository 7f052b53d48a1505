//! A small number of seeds, and the test of the test: each broken variant is caught.
#![allow(clippy::unwrap_used)]

use quorate_sim::{Detail, Mutation, Verdict, run_seed, run_seeds};

const QUIET: &(dyn Fn(&Verdict) + Sync) = &|_| {};

#[test]
fn no_promise_is_broken() {
    let failed = run_seeds(0, 32, 2, None, 1, QUIET);
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_seed_replays_exactly() {
    let run = |seed| {
        let (verdict, world) = run_seed(seed, None, Detail::Nothing);
        (verdict.events, verdict.virtual_ns, world.events())
    };
    for seed in [3, 12] {
        assert_eq!(run(seed), run(seed));
    }
}

/// A member stood still at its switchover, its source's and its target's replicas lagged, and a ring was made meanwhile that
/// strands its connections: they have to be pinned by one of the two.
#[test]
fn a_ring_that_is_made_during_a_switchover_breaks_no_connection() {
    let (verdict, _) = run_seed(1846, None, Detail::Nothing);
    assert!(verdict.broken.is_none(), "{verdict:#?}");
}

/// 2174: both hosts of a copy are lost within half a second, and the second may not keep the VM for ever.
/// 3387: both are started again, know only what was long ago, and may not write a copy anew that has become the VM's disk.
/// 8671: a hand-over that was begun never came to its target, which is booted again: its copy was in its memory only.
#[test]
fn copies_survive_hosts_that_are_lost_one_after_the_other() {
    for seed in [2174, 3387, 8671] {
        let (verdict, _) = run_seed(seed, None, Detail::Nothing);
        assert!(verdict.broken.is_none(), "seed {seed}: {verdict:?}");
    }
}

/// A cut was proposed by a leader without a majority, which forgot about it; it was committed when the host had a lease again.
#[test]
fn a_cut_that_is_still_under_way_meets_no_lease() {
    let (verdict, _) = run_seed(15382, None, Detail::Nothing);
    assert!(verdict.broken.is_none(), "{verdict:?}");
}

/// A VM was shut down for one that counts for nothing: what needed that one was off itself.
#[test]
fn what_is_off_lends_its_dependents_priority_to_nobody() {
    let (verdict, _) = run_seed(9390, None, Detail::Nothing);
    assert!(verdict.broken.is_none(), "{verdict:?}");
}

/// Within some hundreds of seeds; where to begin is known for those that need rare luck, so that this test is
/// quick also in a debug build.
fn caught(mutation: Mutation, start: u64, count: u64) {
    let failed = run_seeds(start, count, 2, Some(mutation), 1, QUIET);
    assert!(
        !failed.is_empty(),
        "{mutation} was not caught in {count} seeds"
    );
}

#[test]
fn a_start_without_proof_is_caught() {
    caught(Mutation::StartWithoutProof, 0, 50);
}

#[test]
fn a_copy_that_is_dropped_before_the_state_says_so_is_caught() {
    caught(Mutation::CopyDroppedEarly, 0, 400);
}

#[test]
fn a_missing_seal_is_caught() {
    caught(Mutation::NoSeal, 0, 200);
}

#[test]
fn a_missing_look_at_the_age_of_the_replica_is_caught() {
    caught(Mutation::NoFreshnessCheck, 0, 200);
}

#[test]
fn a_ledger_that_forgets_is_caught() {
    caught(Mutation::LedgerNotDurable, 0, 100);
}

#[test]
fn a_stale_migration_taken_for_the_present_one_is_caught() {
    caught(Mutation::StaleMigrationId, 0, 400);
}

#[test]
fn a_guard_that_does_nothing_is_caught() {
    caught(Mutation::GuardOff, 0, 50);
}

#[test]
fn a_leader_that_judges_too_early_is_caught() {
    caught(Mutation::NoWaitAfterElection, 0, 50);
}

#[test]
fn a_leader_that_grants_without_a_majority_is_caught() {
    caught(Mutation::GrantWithoutQuorum, 0, 100);
}

#[test]
fn a_cut_that_nobody_looked_at_is_caught() {
    caught(Mutation::ProofWithoutLook, 0, 300);
}

#[test]
fn a_keeper_with_an_old_state_is_caught() {
    caught(Mutation::KeeperOldState, 0, 50);
}

#[test]
fn a_host_that_is_let_in_with_old_guests_is_caught() {
    caught(Mutation::RestoreDirty, 130, 60);
}

#[test]
fn a_door_opened_without_a_lease_is_caught() {
    caught(Mutation::OpenWithoutLease, 600, 100);
}

#[test]
fn a_source_that_qemu_resumes_with_its_disks_is_caught() {
    caught(Mutation::SanWithoutHold, 60, 50);
}

#[test]
fn a_lease_that_counts_from_the_answer_is_caught() {
    caught(Mutation::LeaseFromAnswer, 0, 400);
}

#[test]
fn a_datapath_that_serves_past_its_lease_is_caught() {
    caught(Mutation::DatapathNoLease, 16, 8);
}

#[test]
fn a_host_that_comes_back_with_old_tables_is_caught() {
    caught(Mutation::DatapathStaleTables, 16, 16);
}

#[test]
fn an_old_replica_that_reaches_the_kernel_is_caught() {
    caught(Mutation::DatapathOldReplica, 16, 48);
}

#[test]
fn a_ring_in_force_that_nobody_prepared_is_caught() {
    caught(Mutation::ActivateUnprepared, 16, 48);
}

#[test]
fn edges_without_second_chance_are_caught() {
    caught(Mutation::NoSecondChance, 16, 8);
}
