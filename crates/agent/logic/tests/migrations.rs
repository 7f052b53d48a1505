//! The transition table of `vm`: both sides of a live migration.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use quorate_agent_logic::{
    Act, AskToken, Effect, Exit, GuestEvent, Input, LedgerRecord, Observed, ObservedMigration,
    TargetSays, Token,
};
use quorate_state::StopMode;
use quorate_types::report::MigrationOutcome;
use quorate_types::{Epoch, MigrationId, Millis, VmPhase};

// --- migration, source ---

/// A source that streams; the tokens of its process and of the sending.
fn streaming() -> (Bench, Token, Token) {
    let (mut bench, run) = Bench::running(1);
    bench.order(Some(out(7, 1, false)));
    let ask = bench.effects.iter().find_map(|effect| match effect {
        Effect::AskTarget { token, .. } => Some(*token),
        _ => None,
    });
    bench.effects.clear();
    let address = "10.0.0.2:4444".to_owned();
    bench.event(ask.unwrap(), GuestEvent::TargetReady { address });
    let (send, act) = bench.act();
    assert!(matches!(act, Act::Send { .. }));
    assert_eq!(bench.phase(), VmPhase::MigratingOut);
    (bench, run, send)
}

fn switching() -> (Bench, Token, Token) {
    let (mut bench, run, send) = streaming();
    bench.event(send, GuestEvent::PreSwitchover);
    let first = bench.effects.first();
    assert!(
        matches!(
            first,
            Some(Effect::Ledger(LedgerRecord::SwitchoverBegun { .. }))
        ),
        "durable first"
    );
    assert_eq!(bench.act().1, Act::Continue { send });
    (bench, run, send)
}

#[test]
fn a_source_hands_over_and_ends_when_ownership_moved() {
    let (mut bench, run, send) = switching();
    bench.event(send, GuestEvent::SendCompleted { downtime_ms: 12 });
    assert_eq!(bench.phase(), VmPhase::HandedOver);
    assert_eq!(outcome(&bench), MigrationOutcome::Sent);
    bench.held(Millis::secs(20));
    assert!(bench.acts().is_empty(), "paused for as long as it takes");
    bench.order(None);
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(run, exit("killed"));
    assert_eq!(bench.report().closed, Epoch(1));
}

#[test]
fn a_target_that_never_gets_ready_leaves_the_guest() {
    let (mut bench, _) = Bench::running(1);
    bench.order(Some(out(7, 1, false)));
    for _ in 0..200 {
        let ask = bench.effects.iter().rev().find_map(|effect| match effect {
            Effect::AskTarget { token, .. } => Some(*token),
            _ => None,
        });
        bench.effects.clear();
        if let Some(token) = ask {
            let detail = "connection refused".to_owned();
            bench.event(token, GuestEvent::TargetNotReady { detail });
        }
        bench.held(Millis(100));
    }
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
    assert_eq!(bench.phase(), VmPhase::Running);
    let reason = bench.report().migration.unwrap().reason.unwrap();
    assert!(reason.contains("connection refused"), "{reason}");
    // Final: never begun again under this id, also not by the next agent.
    assert!(bench.acts().is_empty());
    let adopted = adopted(Observed::Running, ObservedMigration::None);
    let mut bench = bench.restart(&[adopted]);
    bench.order(Some(out(7, 1, false)));
    bench.ack();
    bench.held(Millis::secs(2));
    assert!(
        !bench
            .effects
            .iter()
            .any(|e| matches!(e, Effect::AskTarget { .. }))
    );
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
}

#[test]
fn a_failure_before_the_switchover_is_final_and_the_guest_goes_on() {
    let (mut bench, _, send) = streaming();
    let detail = "connection reset".to_owned();
    bench.event(
        send,
        GuestEvent::SendFailed {
            detail,
            begun: false,
            observed: Observed::Running,
        },
    );
    assert_eq!(bench.phase(), VmPhase::Running);
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
    assert!(bench.acts().is_empty());
}

#[test]
fn a_cancel_is_obeyed_before_the_switchover_only() {
    let (mut bench, _, send) = streaming();
    bench.order(Some(out(7, 1, true)));
    assert_eq!(bench.act().1, Act::Cancel);
    bench.event(send, GuestEvent::PreSwitchover);
    assert!(bench.acts().is_empty(), "not continued");
    let (mut bench, _, _) = switching();
    bench.order(Some(out(7, 1, true)));
    assert!(bench.acts().is_empty());
}

#[test]
fn no_switchover_without_a_lease() {
    let (mut bench, _, send) = streaming();
    bench.now = bench.now.plus(Millis(1800));
    bench.event(send, GuestEvent::PreSwitchover);
    assert_eq!(bench.act().1, Act::Cancel);
    assert!(bench.disk.get(&vm()).unwrap().begun().is_none());
}

#[test]
fn the_end_of_the_lease_cancels_a_stream() {
    let (mut bench, _, _) = streaming();
    bench.silent(Millis(1800));
    assert_eq!(bench.act().1, Act::Cancel);
}

/// Other VMs' moves are committed all the time: the replica is behind the lease for moments.
#[test]
fn a_replica_that_is_behind_at_the_pause_delays_the_switchover() {
    for cancelled in [false, true] {
        let (mut bench, _, send) = streaming();
        bench.ack_from(bench.revision + 1);
        bench.event(send, GuestEvent::PreSwitchover);
        assert!(bench.acts().is_empty(), "neither ordered nor given up");
        bench.order(Some(out(7, 1, cancelled)));
        let expected = match cancelled {
            true => Act::Cancel,
            false => Act::Continue { send },
        };
        assert_eq!(bench.act().1, expected);
    }
}

#[test]
fn a_switchover_does_not_wait_for_the_replica_for_long() {
    let (mut bench, _, send) = streaming();
    bench.ack_from(bench.revision + 1);
    bench.event(send, GuestEvent::PreSwitchover);
    bench.held(Millis(900));
    assert!(bench.acts().is_empty(), "it may catch up yet");
    bench.held(Millis(200));
    assert_eq!(bench.act().1, Act::Cancel);
    // Too late: what is being cancelled is not ordered.
    bench.order(Some(out(7, 1, false)));
    bench.held(Millis(400));
    assert!(bench.acts().is_empty());
    let detail = "it was cancelled".to_owned();
    bench.event(
        send,
        GuestEvent::SendFailed {
            detail,
            begun: false,
            observed: Observed::Running,
        },
    );
    assert_eq!(bench.phase(), VmPhase::Running);
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
    let why = bench.report().migration.unwrap().reason.unwrap();
    assert!(
        why.starts_with("this host did not hear for 1s what"),
        "{why}"
    );
}

#[test]
fn a_switchover_that_waits_for_the_replica_ends_with_the_lease() {
    let (mut bench, _, send) = streaming();
    bench.ack_from(bench.revision + 1);
    bench.event(send, GuestEvent::PreSwitchover);
    bench.silent(Millis(1800));
    assert_eq!(bench.act().1, Act::Cancel);
}

/// Also the question to the target.
fn broken_switchover() -> (Bench, Token, Token) {
    let (mut bench, run, send) = switching();
    let detail = "broken pipe".to_owned();
    bench.event(
        send,
        GuestEvent::SendFailed {
            detail,
            begun: true,
            observed: Observed::Running,
        },
    );
    assert_eq!(bench.phase(), VmPhase::HandedOver);
    assert_eq!(outcome(&bench), MigrationOutcome::InProgress);
    let ask = last_outcome_ask(&bench).unwrap();
    let (op, act) = bench.acts().remove(0);
    assert_eq!(act, Act::Freeze, "QEMU resumes such a source by itself");
    bench.event(op, GuestEvent::Paused);
    (bench, run, ask)
}

fn last_outcome_ask(bench: &Bench) -> Option<Token> {
    bench.effects.iter().rev().find_map(|effect| match effect {
        Effect::AskOutcome { token, .. } => Some(*token),
        _ => None,
    })
}

#[test]
fn after_a_broken_switchover_it_goes_on_only_when_the_target_never_ran_it() {
    let (mut bench, _, ask) = broken_switchover();
    bench.event(ask, GuestEvent::TargetSaid(TargetSays::NeverRan));
    bench.held(Millis::secs(5));
    assert!(bench.acts().is_empty(), "ownership has not come back");
    bench.order(Some(run(1)));
    assert_eq!(bench.act().1, Act::Thaw);
    let over = bench.disk.get(&vm()).unwrap().begun();
    assert!(
        over.is_none(),
        "a later agent must not take it for handed over"
    );
}

#[test]
fn without_the_targets_word_its_memory_is_given_up() {
    let (mut bench, old, _) = broken_switchover();
    bench.order(Some(run(1)));
    bench.held(Millis(1900));
    assert!(bench.acts().is_empty());
    bench.held(Millis(200));
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(old, exit("killed"));
    let (_, act) = bench.act();
    assert!(is_start(&act), "from its disks");
    assert_eq!(bench.report().closed, Epoch(0));
}

/// QEMU may wait for a target without power for as long as TCP does.
#[test]
fn a_source_does_not_wait_for_a_target_that_is_proven_dead() {
    let (mut bench, old, _) = switching();
    bench.held(Millis::secs(5));
    assert!(bench.acts().is_empty(), "ownership has not come back");
    bench.order(Some(run(1)));
    let (freeze, act) = bench.acts().remove(0);
    assert_eq!(act, Act::Freeze);
    assert_eq!(bench.phase(), VmPhase::HandedOver);
    bench.event(freeze, GuestEvent::Paused);
    assert!(
        last_outcome_ask(&bench).is_some(),
        "it is asked all the same"
    );
    bench.effects.clear();
    bench.held(Millis(2100));
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(old, exit("killed"));
    assert!(is_start(&bench.act().1), "from its disks");
}

#[test]
fn a_late_failure_of_a_given_up_switchover_pauses_the_source_again() {
    let (mut bench, _, send) = switching();
    bench.order(Some(run(1)));
    let (freeze, _) = bench.acts().remove(0);
    bench.event(freeze, GuestEvent::Paused);
    bench.effects.clear();
    let detail = "connection timed out".to_owned();
    bench.event(
        send,
        GuestEvent::SendFailed {
            detail,
            begun: true,
            observed: Observed::Running,
        },
    );
    assert_eq!(bench.acts().remove(0).1, Act::Freeze);
}

#[test]
fn a_switchover_under_way_ends_with_an_ordered_stop() {
    let (mut bench, _, _) = switching();
    bench.order(Some(stop(1, StopMode::Hard)));
    assert!(bench.acts().iter().any(|(_, act)| *act == Act::Kill));
}

#[test]
fn a_second_migration_shows_that_ownership_came_back() {
    let (mut bench, _, ask) = broken_switchover();
    bench.event(ask, GuestEvent::TargetSaid(TargetSays::NeverRan));
    bench.order(Some(out(9, 1, false)));
    assert_eq!(bench.act().1, Act::Thaw);
}

#[test]
fn a_source_that_cannot_be_paused_is_ended() {
    let (mut bench, _, send) = switching();
    let detail = "broken pipe".to_owned();
    bench.event(
        send,
        GuestEvent::SendFailed {
            detail,
            begun: true,
            observed: Observed::Unknown,
        },
    );
    let (op, _) = bench.acts().remove(0);
    let detail = "no answer".to_owned();
    bench.event(op, GuestEvent::PauseFailed { detail });
    assert_eq!(bench.act().1, Act::Kill);
}

#[test]
fn a_restarted_agent_ends_a_migration_that_had_not_switched_over() {
    let (bench, _, _) = streaming();
    let found = adopted(Observed::Running, ObservedMigration::UnderWay);
    let mut bench = bench.restart(&[found]);
    let acts = bench.acts();
    assert!(acts.iter().any(|(_, act)| *act == Act::Cancel), "{acts:?}");
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
    bench.order(Some(out(7, 1, false)));
    bench.ack();
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
    assert_eq!(bench.phase(), VmPhase::Running);
}

#[test]
fn a_restarted_agent_keeps_a_guest_that_was_handed_over_paused() {
    for (migration, observed) in [
        (ObservedMigration::Completed, Observed::Paused),
        (ObservedMigration::None, Observed::Running),
        (ObservedMigration::SwitchingOver, Observed::Paused),
    ] {
        let (bench, _, _) = switching();
        let mut bench = bench.restart(&[adopted(observed, migration)]);
        assert_eq!(bench.phase(), VmPhase::HandedOver);
        let acts = bench.acts();
        match migration {
            ObservedMigration::None => assert_eq!(acts[0].1, Act::Freeze, "at once"),
            ObservedMigration::SwitchingOver => assert_eq!(acts[0].1, Act::Attach),
            _ => assert!(acts.is_empty()),
        }
        // An old state of the replica shows an order from before the migration.
        bench.order(Some(run(1)));
        bench.step(Input::Tick);
        assert!(bench.acts().is_empty(), "not before a fresh replica");
    }
}

// --- migration, target ---

fn listening() -> (Bench, Token) {
    let mut bench = Bench::new();
    bench.order(Some(incoming(7, 2, false)));
    bench.ack();
    let records = bench.records();
    assert!(matches!(
        records[0],
        LedgerRecord::Told {
            migration: Some(MigrationId(7)),
            ..
        }
    ));
    let (run, act) = bench.act();
    assert!(matches!(act, Act::Prepare { .. }));
    let ask = AskToken(1);
    bench.step(Input::PeerIncoming {
        ask,
        vm: vm(),
        id: MigrationId(7),
        ready: true,
    });
    assert!(bench.effects.is_empty(), "answered when it listens");
    let address = "10.0.0.2:4444".to_owned();
    bench.event(
        run,
        GuestEvent::Listening {
            address: address.clone(),
        },
    );
    let answer = Effect::Answer {
        ask,
        result: Ok(address),
    };
    assert!(bench.effects.contains(&answer));
    bench.effects.clear();
    (bench, run)
}

#[test]
fn a_target_runs_what_arrives() {
    let (mut bench, run) = listening();
    bench.event(run, GuestEvent::Arrived { running: true });
    assert!(matches!(bench.records()[0], LedgerRecord::Arrived { .. }));
    assert_eq!(bench.phase(), VmPhase::Running);
    assert_eq!(outcome(&bench), MigrationOutcome::Arrived);
    assert!(bench.report().ready, "as it was at the source");
    assert_eq!(bench.report().epoch, Epoch(2));
    bench.effects.clear();
    bench.order(Some(common::run(2)));
    bench.held(Millis::secs(3));
    assert!(bench.acts().is_empty());
}

#[test]
fn a_target_that_fails_closes_and_is_never_prepared_again() {
    let (mut bench, run) = listening();
    let detail = "the stream was broken".to_owned();
    bench.event(run, GuestEvent::ArrivalFailed { detail });
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(run, exit("killed"));
    assert_eq!(bench.report().closed, Epoch(2));
    assert_eq!(outcome(&bench), MigrationOutcome::Failed);
    bench.effects.clear();
    bench.held(Millis::secs(3));
    assert!(bench.acts().is_empty());
    bench.step(Input::PeerOutcome {
        ask: AskToken(2),
        vm: vm(),
        id: MigrationId(7),
    });
    let says = TargetSays::NeverRan;
    assert!(bench.effects.contains(&Effect::AnswerOutcome {
        ask: AskToken(2),
        says
    }));
}

/// Host and agent end just after the guest arrived: it may have written to its disk.
#[test]
fn a_target_that_did_not_see_the_end_does_not_say_that_it_never_ran() {
    let (bench, _) = listening();
    let mut bench = bench.restart(&[]);
    bench.order(Some(incoming(7, 2, false)));
    bench.ack();
    assert_eq!(bench.report().closed, Epoch(2));
    assert_eq!(outcome(&bench), MigrationOutcome::InProgress);
    bench.effects.clear();
    let (ask, says) = (AskToken(2), TargetSays::Unknown);
    let id = MigrationId(7);
    bench.step(Input::PeerOutcome { ask, vm: vm(), id });
    let answer = Effect::AnswerOutcome { ask, says };
    assert!(bench.effects.contains(&answer));
    let bench = bench.restart(&[]);
    assert_eq!(outcome(&bench), MigrationOutcome::InProgress);
}

#[test]
fn a_target_without_a_lease_or_an_order_gives_up() {
    for how in ["lease", "cancel", "order"] {
        let (mut bench, run) = listening();
        match how {
            "lease" => bench.silent(Millis(1800)),
            "cancel" => bench.order(Some(incoming(7, 2, true))),
            _ => bench.order(None),
        }
        let (op, act) = bench.act();
        if how == "cancel" {
            assert_eq!(act, Act::Dismiss);
            bench.event(op, GuestEvent::State(Observed::InMigrate));
            assert_eq!(bench.act().1, Act::Kill);
        } else {
            assert_eq!(act, Act::Kill, "{how}");
        }
        bench.event(run, exit("killed"));
        assert_eq!(bench.report().closed, Epoch(2), "{how}");
        assert_eq!(outcome(&bench), MigrationOutcome::Failed, "{how}");
    }
}

/// The cancel comes when the guest has just arrived, before anybody here has heard of it: its memory is not thrown away.
#[test]
fn a_guest_that_arrives_while_it_is_cancelled_stays() {
    let (mut bench, run) = listening();
    bench.order(Some(incoming(7, 2, true)));
    let (op, act) = bench.act();
    assert_eq!(act, Act::Dismiss);
    bench.effects.clear();
    bench.event(run, GuestEvent::Arrived { running: true });
    assert!(bench.acts().is_empty(), "it is being paused");
    bench.event(op, GuestEvent::State(Observed::Paused));
    assert_eq!(outcome(&bench), MigrationOutcome::Arrived);
    let acts: Vec<Act> = bench.acts().into_iter().map(|(_, act)| act).collect();
    assert_eq!(acts, [Act::Open, Act::Thaw]);
}

#[test]
fn a_guest_that_ran_before_its_end_has_arrived() {
    let (mut bench, run) = listening();
    let exit = Exit {
        by_guest: false,
        by_guard: false,
        ran: true,
        detail: "killed by signal 9".into(),
    };
    bench.event(run, GuestEvent::Exited(exit));
    assert_eq!(outcome(&bench), MigrationOutcome::Arrived);
    assert_eq!(bench.report().closed, Epoch(0));
    bench.effects.clear();
    bench.held(Millis::secs(2));
    assert!(
        bench.acts().is_empty(),
        "not made anew before it is committed"
    );
    bench.order(Some(common::run(2)));
    bench.held(Millis::secs(2));
    assert!(bench.acts().iter().any(|(_, act)| is_start(act)));
}

#[test]
fn a_restarted_target_finds_out_whether_the_guest_has_arrived() {
    for (state, arrived) in [(Observed::Running, true), (Observed::InMigrate, false)] {
        let (bench, _) = listening();
        let mut bench = bench.restart(&[adopted(state, ObservedMigration::None)]);
        let (op, act) = bench.act();
        assert_eq!(act, Act::Query);
        bench.event(op, GuestEvent::State(state));
        if arrived {
            assert_eq!(outcome(&bench), MigrationOutcome::Arrived);
            // The agent that would have opened its taps is gone.
            let opened = bench.acts().iter().any(|(_, act)| *act == Act::Open);
            assert!(opened, "nobody reaches the guest");
        } else {
            let dismiss = bench
                .acts()
                .into_iter()
                .find(|(_, act)| *act == Act::Dismiss);
            let (op, _) = dismiss.expect("it may arrive at this very moment");
            bench.event(op, GuestEvent::State(Observed::InMigrate));
            assert_eq!(bench.acts().pop().map(|(_, act)| act), Some(Act::Kill));
            bench.event(Token(1), exit("killed"));
            assert_eq!(bench.report().closed, Epoch(2));
        }
    }
}

#[test]
fn the_next_migration_to_a_host_begins_anew() {
    let (mut bench, run) = listening();
    bench.order(Some(incoming(9, 4, false)));
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(run, exit("killed"));
    let acts = bench.acts();
    assert!(acts.iter().any(|(_, act)| matches!(
        act,
        Act::Prepare {
            id: MigrationId(9),
            ..
        }
    )));
    assert_eq!(bench.report().closed, Epoch(2));
}
