//! The transition table of `vm`, row by row.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use quorate_agent_logic::{
    Act, Exit, GuestEvent, Input, Ledger, LedgerRecord, Observed, ObservedMigration,
};
use quorate_membership::Instant;
use quorate_state::StopMode;
use quorate_types::spec::{Probe, ReadyCheck};
use quorate_types::{Epoch, Millis, VmPhase};

#[test]
fn starts_only_with_a_lease_and_a_fresh_replica() {
    let mut bench = Bench::new();
    bench.order(Some(run(1)));
    assert!(bench.acts().is_empty(), "no lease");
    bench.ack_from(2);
    assert!(bench.acts().is_empty(), "the replica is behind");
    bench.order(Some(run(1)));
    let records = bench.records();
    assert!(matches!(records[..], [LedgerRecord::Told { .. }]));
    assert!(is_start(&bench.act().1));
    assert_eq!(bench.phase(), VmPhase::Starting);
}

#[test]
fn a_crash_is_restarted_at_once_then_later_and_later() {
    let (mut bench, mut run) = Bench::running(1);
    for wait in [0, 1, 2, 4, 8, 16, 32, 60, 60] {
        bench.event(run, exit("killed by signal 11"));
        if wait > 0 {
            assert_eq!(bench.phase(), VmPhase::BackOff);
            bench.held(Millis(wait * 1000 - 1));
            assert!(bench.acts().iter().all(|(_, act)| !is_start(act)), "{wait}");
            bench.held(Millis(1));
        }
        let (token, act) = bench.acts().pop().unwrap();
        assert!(is_start(&act), "after {wait} s");
        run = token;
        bench.event(run, GuestEvent::Started);
        bench.effects.clear();
    }
    assert_eq!(bench.report().restarts, 9);
    assert_eq!(bench.report().error.as_deref(), Some("killed by signal 11"));
    // Ten minutes of running forgive.
    bench.held(Millis::secs(600));
    bench.event(run, exit("again"));
    assert!(bench.acts().iter().any(|(_, act)| is_start(act)));
}

#[test]
fn a_start_that_fails_is_tried_again_and_never_given_up() {
    let mut bench = Bench::new();
    bench.order(Some(run(1)));
    bench.ack();
    for _ in 0..12 {
        let (token, act) = bench.acts().pop().unwrap();
        assert!(is_start(&act));
        let detail = "no such image".to_owned();
        bench.event(
            token,
            GuestEvent::StartFailed {
                detail,
                refused: false,
            },
        );
        assert_eq!(bench.phase(), VmPhase::BackOff);
        bench.held(Millis::secs(60));
    }
    assert!(bench.acts().iter().any(|(_, act)| is_start(act)));
}

#[test]
fn a_guest_that_shuts_itself_down_is_started_again() {
    let (mut bench, run) = Bench::running(1);
    let by_guest = Exit {
        by_guest: true,
        by_guard: false,
        ran: false,
        detail: "shutdown: guest-shutdown".into(),
    };
    bench.event(run, GuestEvent::Exited(by_guest));
    assert!(bench.report().guest_shutdown);
    assert!(is_start(&bench.acts().pop().unwrap().1));
}

#[test]
fn a_saved_memory_is_used_once() {
    let mut bench = Bench::new();
    bench.order(Some(restore(3)));
    bench.ack();
    let records = bench.records();
    assert!(matches!(
        records[1],
        LedgerRecord::Restored {
            epoch: Epoch(3),
            ..
        }
    ));
    let (token, act) = bench.act();
    assert!(matches!(
        act,
        Act::Start {
            restore: Some(_),
            ..
        }
    ));
    // The guard refused it: nothing was tried, so it is still good.
    let detail = "no lease".to_owned();
    bench.event(
        token,
        GuestEvent::StartFailed {
            detail,
            refused: true,
        },
    );
    bench.held(Millis(200));
    let (token, act) = bench.act();
    assert!(matches!(
        act,
        Act::Start {
            restore: Some(_),
            ..
        }
    ));
    bench.event(token, GuestEvent::Started);
    bench.effects.clear();
    bench.event(token, exit("crash"));
    let (token, act) = bench.act();
    assert!(matches!(act, Act::Start { restore: None, .. }));
    // Refused again, but the memory was used before: it is older than the disk now.
    let detail = "no lease".to_owned();
    let refused = true;
    bench.event(token, GuestEvent::StartFailed { detail, refused });
    bench.held(Millis(200));
    let (_, act) = bench.act();
    assert!(matches!(act, Act::Start { restore: None, .. }));
    let mut bench = bench.restart(&[]);
    bench.order(Some(restore(3)));
    bench.ack();
    let (_, act) = bench.act();
    assert!(matches!(act, Act::Start { restore: None, .. }));
}

#[test]
fn frozen_by_the_guard_and_thawed_when_the_lease_returns() {
    let (mut bench, run) = Bench::running(1);
    bench.silent(Millis(1800));
    bench.step(Input::GuardFroze { vm: vm(), run });
    assert_eq!(bench.phase(), VmPhase::Frozen);
    bench.silent(Millis(5000));
    assert!(bench.acts().is_empty());
    bench.ack();
    let (op, act) = bench.act();
    assert_eq!(act, Act::Thaw);
    let detail = "freeze time".to_owned();
    bench.event(op, GuestEvent::ThawRefused { detail });
    bench.held(Millis(200));
    let (op, act) = bench.act();
    assert_eq!(act, Act::Thaw);
    bench.event(op, GuestEvent::Thawed);
    assert_eq!(bench.phase(), VmPhase::Running);
    assert!(bench.report().ready, "readiness stays over a freeze");
}

#[test]
fn a_late_answer_to_an_older_thaw_changes_nothing() {
    let (mut bench, run) = Bench::running(1);
    bench.step(Input::GuardFroze { vm: vm(), run });
    let (old, _) = bench.act();
    bench.silent(Millis(3000));
    bench.step(Input::GuardFroze { vm: vm(), run });
    bench.event(old, GuestEvent::Thawed);
    assert_eq!(bench.phase(), VmPhase::Frozen);
}

#[test]
fn a_frozen_copy_whose_epoch_moved_is_ended_and_closed() {
    let (mut bench, run) = Bench::running(1);
    bench.silent(Millis(3000));
    bench.step(Input::GuardFroze { vm: vm(), run });
    bench.order(None);
    let (_, act) = bench.act();
    assert_eq!(act, Act::Kill, "no lease is needed to end it");
    assert_eq!(bench.report().closed, Epoch(0), "not yet gone");
    bench.event(run, exit("killed by signal 9"));
    assert_eq!(bench.disk.get(&vm()).unwrap().closed, Epoch(1));
    assert_eq!(bench.report().closed, Epoch(1));
    bench.ack();
    bench.order(Some(common::run(1)));
    assert!(bench.acts().iter().all(|(_, act)| !is_start(act)), "closed");
    bench.order(Some(common::run(2)));
    assert!(is_start(&bench.acts().pop().unwrap().1));
}

#[test]
fn disks_in_other_hands_end_the_copy() {
    let (mut bench, run) = Bench::running(1);
    bench.step(Input::GuardFroze { vm: vm(), run });
    let (op, _) = bench.act();
    let detail = "Failed to get \"write\" lock".to_owned();
    bench.event(op, GuestEvent::DiskLost { detail });
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(run, exit("killed"));
    assert_eq!(bench.report().closed, Epoch(1));
}

/// Events and answers come by different ways: the error may overtake the answer.
#[test]
fn a_disk_error_that_overtakes_the_answer_to_a_thaw_is_not_lost() {
    let (mut bench, run) = Bench::running(1);
    let detail = "disk 0: no space".to_owned();
    bench.event(
        run,
        GuestEvent::IoError {
            detail: detail.clone(),
        },
    );
    bench.effects.clear();
    bench.held(Millis::secs(6));
    let (thaw, act) = bench.act();
    assert_eq!(act, Act::Thaw);
    bench.event(run, GuestEvent::IoError { detail });
    bench.event(thaw, GuestEvent::Thawed);
    let (query, act) = bench.act();
    assert_eq!(act, Act::Query);
    bench.event(query, GuestEvent::State(Observed::IoError));
    assert_eq!(bench.phase(), VmPhase::IoError);
}

#[test]
fn a_disk_error_while_it_waits_for_the_target_is_not_lost() {
    let (mut bench, run) = Bench::running(1);
    bench.order(Some(out(7, 1, false)));
    bench.effects.clear();
    let detail = "disk 0: no space".to_owned();
    bench.event(run, GuestEvent::IoError { detail });
    bench.order(Some(out(7, 1, true)));
    let (query, act) = bench.act();
    assert_eq!(act, Act::Query);
    bench.event(query, GuestEvent::State(Observed::IoError));
    assert_eq!(bench.phase(), VmPhase::IoError);
}

#[test]
fn a_disk_error_pauses_it_until_the_disk_works() {
    let (mut bench, run) = Bench::running(1);
    let detail = "disk0: write: no space".to_owned();
    bench.event(run, GuestEvent::IoError { detail });
    assert_eq!(bench.phase(), VmPhase::IoError);
    bench.held(Millis(4900));
    assert!(bench.acts().is_empty());
    bench.held(Millis(200));
    assert_eq!(bench.act().1, Act::Thaw);
}

#[test]
fn a_graceful_stop_presses_again_and_ends_hard() {
    let (mut bench, run) = Bench::running(1);
    bench.order(Some(stop(1, StopMode::Graceful)));
    assert_eq!(bench.act().1, Act::Powerdown);
    assert_eq!(bench.phase(), VmPhase::Stopping);
    bench.held(Millis::secs(59));
    assert!(bench.acts().iter().all(|(_, act)| *act == Act::Powerdown));
    bench.held(Millis::secs(1));
    assert_eq!(bench.act().1, Act::Kill);
    bench.event(run, exit("killed"));
    assert_eq!(bench.report().closed, Epoch(1));
    assert_eq!(bench.phase(), VmPhase::Absent);
}

#[test]
fn a_guest_that_cannot_be_asked_is_ended_at_once() {
    let (mut bench, _) = Bench::running(1);
    bench.order(Some(stop(1, StopMode::Graceful)));
    let (op, _) = bench.act();
    let detail = "no power button".to_owned();
    bench.event(op, GuestEvent::PowerdownFailed { detail });
    assert_eq!(bench.act().1, Act::Kill);
}

#[test]
fn a_shutdown_as_ordered_is_closed_without_a_restart() {
    let (mut bench, run) = Bench::running(1);
    bench.order(Some(stop(1, StopMode::Graceful)));
    bench.acts();
    bench.event(run, exit("shutdown"));
    assert_eq!(bench.act().1, Act::Clean);
    assert_eq!(bench.report().closed, Epoch(1));
}

#[test]
fn a_stop_of_what_does_not_run_closes_at_once() {
    let mut bench = Bench::new();
    bench.order(Some(stop(4, StopMode::Hard)));
    bench.ack();
    assert_eq!(bench.report().closed, Epoch(4));
}

#[test]
fn a_save_is_durable_before_it_is_reported() {
    let (mut bench, run) = Bench::running(1);
    bench.order(Some(stop(1, StopMode::Save)));
    let (op, act) = bench.act();
    let Act::Save { file, .. } = act else {
        panic!("{act:?}")
    };
    bench.event(op, GuestEvent::Saved);
    assert_eq!(bench.act().1, Act::Kill);
    assert_eq!(bench.report().saved, None);
    bench.event(run, exit("killed"));
    assert_eq!(bench.report().saved.unwrap().file, file);
    let bench = bench.restart(&[]);
    assert_eq!(bench.report().saved.unwrap().file, file);
}

#[test]
fn a_save_that_fails_is_tried_three_times_and_the_guest_goes_on() {
    let (mut bench, _) = Bench::running(1);
    bench.order(Some(stop(1, StopMode::Save)));
    for (n, wait) in [(1, 10), (2, 20), (3, 0)] {
        let (op, act) = bench.act();
        assert!(matches!(act, Act::Save { .. }), "{act:?}");
        bench.event(
            op,
            GuestEvent::SaveFailed {
                detail: "no space".into(),
            },
        );
        let (query, act) = bench.act();
        assert_eq!(act, Act::Query);
        bench.event(query, GuestEvent::State(Observed::Running));
        let report = bench.report();
        assert_eq!((report.save_failures, report.phase), (n, VmPhase::Running));
        let error = report.error.unwrap();
        assert!(
            error.contains("of 3") && error.contains("no space"),
            "{error}"
        );
        if wait > 0 {
            bench.held(Millis(wait * 1000 - 1));
            assert!(bench.acts().is_empty(), "{n}");
            bench.held(Millis(1));
        }
    }
    bench.held(Millis::secs(600));
    assert!(bench.acts().is_empty(), "now the cluster decides");
    bench.order(Some(run(1)));
    assert_eq!(bench.report().save_failures, 0);
    bench.order(Some(stop(1, StopMode::Save)));
    assert!(
        matches!(bench.act().1, Act::Save { .. }),
        "another order, another try"
    );
}

#[test]
fn what_has_no_disk_is_not_shut_down_instead_of_saved() {
    let (mut bench, _) = Bench::running(1);
    let mut order = stop(1, StopMode::Save);
    if let quorate_state::Order::Stop { spec, .. } = &mut order {
        spec.disks.clear();
    }
    bench.order(Some(order));
    assert!(bench.acts().is_empty());
    let report = bench.report();
    assert_eq!(report.save_failures, 3);
    assert!(report.error.unwrap().contains("no disk"));
}

#[test]
fn a_ready_check_counts_again_after_each_start() {
    let mut bench = Bench::new();
    let mut spec = spec();
    spec.ready = Some(ReadyCheck {
        probe: Probe::Agent,
        timeout: Millis::secs(30),
    });
    bench.order(Some(quorate_state::Order::Run {
        epoch: Epoch(1),
        spec,
        abi: abi(),
        restore: None,
    }));
    bench.ack();
    let (run, _) = bench.act();
    bench.event(run, GuestEvent::Started);
    assert!(matches!(bench.act().1, Act::Probe(_)));
    assert!(!bench.report().ready);
    bench.event(run, GuestEvent::Ready);
    assert!(bench.report().ready);
    bench.effects.clear();
    bench.event(run, exit("crash"));
    assert!(!bench.report().ready);
    let (again, _) = bench.act();
    bench.event(again, GuestEvent::Started);
    bench.event(run, GuestEvent::Ready);
    assert!(!bench.report().ready, "of the earlier process");
}

// --- restart of the agent ---

#[test]
fn a_restarted_agent_disturbs_nobody_on_an_old_replica() {
    let (bench, _) = Bench::running(5);
    let found = adopted(Observed::Running, ObservedMigration::None);
    let mut bench = bench.restart(&[found]);
    bench.revision = 0;
    bench.order(None);
    bench.step(Input::Tick);
    assert!(bench.acts().is_empty(), "no lease yet");
    bench.ack_from(9);
    assert!(bench.acts().is_empty(), "the replica is behind");
    bench.revision = 8;
    bench.order(Some(run(5)));
    bench.ack_from(9);
    assert!(bench.acts().is_empty());
    assert_eq!(bench.phase(), VmPhase::Running);
}

#[test]
fn a_guest_that_does_not_answer_is_asked_again_then_restarted() {
    let (bench, _) = Bench::running(5);
    let found = adopted(Observed::Unknown, ObservedMigration::None);
    let mut bench = bench.restart(&[found]);
    bench.order(Some(run(5)));
    bench.ack();
    bench.held(Millis::secs(29));
    let acts = bench.acts();
    assert!(acts.len() >= 10 && acts.iter().all(|(_, act)| *act == Act::Query));
    bench.held(Millis::secs(3));
    assert!(bench.acts().iter().any(|(_, act)| *act == Act::Kill));
}

#[test]
fn a_guest_that_ended_meanwhile_is_started_under_its_epoch() {
    let (bench, _) = Bench::running(5);
    let mut bench = bench.restart(&[]);
    bench.order(Some(run(5)));
    bench.ack();
    assert!(matches!(
        bench.act().1,
        Act::Start {
            epoch: Epoch(5),
            ..
        }
    ));
}

#[test]
fn an_unknown_process_is_ended() {
    let found = adopted(Observed::Running, ObservedMigration::None);
    let mut bench = Bench::with(Ledger::default(), &[found]);
    bench.order(Some(run(1)));
    assert!(bench.acts().is_empty());
    bench.ack();
    assert_eq!(bench.act().1, Act::Kill);
}

#[test]
fn a_vm_that_left_the_cluster_is_forgotten() {
    let (mut bench, run) = Bench::running(1);
    bench.order(Some(stop(1, StopMode::Hard)));
    bench.event(run, exit("killed"));
    bench.revision += 1;
    bench.step(Input::Orders {
        revision: quorate_types::Revision(bench.revision),
        orders: Default::default(),
        known: Default::default(),
    });
    assert!(bench.disk.get(&vm()).is_none());
    assert!(bench.logic.report(quorate_types::Timestamp(0)).is_empty());
}

#[test]
fn an_unconfirmed_kill_is_repeated_and_nothing_is_closed() {
    let (mut bench, _) = Bench::running(1);
    bench.order(None);
    bench.ack();
    let (op, _) = bench.act();
    let detail = "stuck in the kernel".to_owned();
    bench.event(op, GuestEvent::KillFailed { detail });
    bench.held(Millis::secs(7));
    assert!(bench.acts().iter().any(|(_, act)| *act == Act::Kill));
    assert_eq!(bench.report().closed, Epoch(0));
    assert!(bench.now > Instant(0));
}
