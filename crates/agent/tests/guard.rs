//! The guard as a real process, with real guests to kill and QMP servers that answer, or do not.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use quorate_agent::guard::client::{GuardClient, GuardError, GuardEvent};
use rustix::process::{Pid, Signal};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Not a test: the guard's process, when this very program is started as one.
#[test]
fn guard_process() {
    be_a_guard();
}

#[test]
fn a_killed_guest_leaves_no_process_behind() {
    let mut guest = Guest::spawn(&["-pidfile", "/none"]);
    let group = Pid::from_raw(i32::try_from(guest.child.id()).unwrap()).unwrap();
    let there = || rustix::process::test_kill_process_group(group).is_ok();
    assert!(there());
    rustix::process::kill_process(group, Signal::KILL).unwrap();
    guest.child.wait().unwrap();
    assert!(!there(), "a child of the guest lives on");

    let mut guest = Guest::spawn(&[]);
    drop(guest.child.stdin.take());
    assert!(
        guest.child.wait().unwrap().code().is_some(),
        "as at the end of this program"
    );
}

#[tokio::test]
async fn freezes_what_answers_and_kills_what_does_not() {
    let mut site = Site::new().await;
    let (path, _) = good(&site, "good.sock");
    let end = site.lease(Duration::from_millis(1000));
    let mut frozen = site.guest("good", &path).await;
    let mut deaf = site.guest("deaf", &site.dir.path().join("none.sock")).await;
    assert_eq!(site.event().await, froze("good"));
    let at = Instant::now();
    assert!(at < end, "frozen before the deadline");
    assert!(at > end - Duration::from_millis(260), "and not early");
    assert_eq!(deaf.signal().await, Some(9));
    let at = Instant::now();
    assert!(at >= end, "killed at the deadline, not before");
    let late = at - end;
    assert!(late < Duration::from_millis(400), "{late:?}");
    assert!(matches!(site.event().await, GuardEvent::Killed { vm, .. } if vm == "deaf"));
    assert!(frozen.lives());
    assert!(site.fed_within(SOON), "frozen guests are under control");
}

#[tokio::test]
async fn a_guest_that_keeps_its_disks_is_killed() {
    let site = Site::new().await;
    let path = site.dir.path().join("old.sock");
    serve(path.clone(), Fake::default());
    site.lease(Duration::from_millis(600));
    let mut old = site.guest("old", &path).await;
    assert_eq!(old.signal().await, Some(9));
}

#[tokio::test]
async fn a_migration_is_ended_and_the_guest_stopped_again() {
    let mut site = Site::new().await;
    let path = site.dir.path().join("moving.sock");
    let fake = Fake {
        disks: true,
        migrating: true,
        ..Fake::default()
    };
    serve(path.clone(), fake.clone());
    site.lease(Duration::from_millis(600));
    let mut guest = site.guest("moving", &path).await;
    assert_eq!(site.event().await, froze("moving"));
    assert!(fake.stops.load(Ordering::SeqCst) >= 2);
    assert!(guest.lives());
}

#[tokio::test]
async fn what_resumes_by_itself_is_frozen_again_and_past_the_deadline_killed() {
    let mut site = Site::new().await;
    let (path, fake) = good(&site, "ghost.sock");
    // A wide time to freeze: 2 s before the deadline.
    site.guard.lease(boottime_ns() + 3_000_000_000, 2_000);
    let end = Instant::now() + Duration::from_secs(3);
    let mut guest = site.guest("ghost", &path).await;
    assert_eq!(site.event().await, froze("ghost"));
    fake.resume.notify_one();
    assert_eq!(site.event().await, froze("ghost"));
    tokio::time::sleep_until((end + Duration::from_millis(50)).into()).await;
    assert!(guest.lives());
    fake.resume.notify_one();
    assert_eq!(guest.signal().await, Some(9));
}

#[tokio::test]
async fn leave_to_run_is_given_only_under_a_lease() {
    let mut site = Site::new().await;
    let (path, _) = good(&site, "a.sock");
    let refused = site
        .guard
        .starting("x", 5, "/nowhere/x.pid", u64::MAX)
        .await;
    assert!(matches!(refused, Err(GuardError::Refused(_))), "no lease");
    site.lease(Duration::from_millis(500));
    let mut guest = site.guest("a", &path).await;
    assert_eq!(site.event().await, froze("a"));
    let refused = site.guard.thawing("a", 1, u64::MAX).await;
    assert!(
        matches!(refused, Err(GuardError::Refused(_))),
        "{refused:?}"
    );
    site.lease(Duration::from_secs(30));
    let stale = site.guard.thawing("a", 77, u64::MAX).await;
    assert!(stale.is_err(), "another process");
    assert_eq!(site.guard.thawing("a", 1, u64::MAX).await, Ok(()));
    let refused = site.guard.unregister("a", 1).await;
    assert!(refused.is_err(), "it lives");
    assert!(guest.lives());
}

#[tokio::test]
async fn an_older_lease_shortens_nothing() {
    let mut site = Site::new().await;
    let (path, _) = good(&site, "a.sock");
    let end = site.lease(Duration::from_millis(1500));
    site.guard.lease(boottime_ns(), 250);
    let _guest = site.guest("a", &path).await;
    assert_eq!(site.event().await, froze("a"));
    assert!(Instant::now() > end - Duration::from_millis(260));
}

#[tokio::test]
async fn a_thaw_that_does_not_end_is_no_freeze() {
    let mut site = Site::new().await;
    let (path, _) = good(&site, "a.sock");
    site.lease(Duration::from_millis(400));
    let mut guest = site.guest("a", &path).await;
    assert_eq!(site.event().await, froze("a"));
    site.lease(Duration::from_millis(900));
    assert_eq!(site.guard.thawing("a", 1, u64::MAX).await, Ok(()));
    // The agent hangs between the leave and `cont`, which may still come: the guest must go.
    assert_eq!(guest.signal().await, Some(9));
}

#[tokio::test]
async fn a_guest_that_was_being_made_is_found_by_its_command_line() {
    let site = Site::new().await;
    let needle = site.dir.path().join("made/qemu.pid");
    let needle = needle.to_str().unwrap();
    site.lease(Duration::from_millis(800));
    site.guard
        .starting("made", 3, needle, u64::MAX)
        .await
        .unwrap();
    // The agent hangs after the spawn; nothing was registered.
    let mut guest = Guest::spawn(&["-pidfile", needle]);
    assert_eq!(guest.signal().await, Some(9));
    assert!(site.fed_within(SOON), "nothing is left");
}

#[tokio::test]
async fn a_guest_that_is_made_too_late_is_ended_under_any_lease() {
    let site = Site::new().await;
    let needle = site.dir.path().join("late/qemu.pid");
    let needle = needle.to_str().unwrap();
    site.lease(Duration::from_secs(600));
    let until_ns = boottime_ns() + 300_000_000;
    let granted = site.guard.starting("late", 3, needle, until_ns).await;
    granted.unwrap();
    let refused = site.guard.starting("other", 4, needle, boottime_ns()).await;
    assert!(refused.is_err(), "decided under a lease that has ended");
    // The agent stands still, then goes on under the next lease.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let mut guest = Guest::spawn(&["-pidfile", needle]);
    assert_eq!(guest.signal().await, Some(9));
}

#[tokio::test]
async fn a_guest_that_is_there_in_time_may_take_long_to_get_ready() {
    let site = Site::new().await;
    let needle = site.dir.path().join("slow/qemu.pid");
    let needle = needle.to_str().unwrap();
    site.lease(Duration::from_secs(600));
    let until_ns = boottime_ns() + 500_000_000;
    let granted = site.guard.starting("slow", 5, needle, until_ns).await;
    granted.unwrap();
    let mut guest = Guest::spawn(&["-pidfile", needle]);
    tokio::time::sleep(Duration::from_millis(800)).await;
    site.register("slow", 5, &guest, Path::new("/none")).await;
    assert!(guest.lives());
}

#[tokio::test]
async fn works_without_the_agent_and_meets_the_next_one() {
    let mut site = Site::new().await;
    let (path, _) = good(&site, "a.sock");
    site.lease(Duration::from_millis(1500));
    let mut a = site.guest("a", &path).await;
    let mut deaf = site.guest("deaf", &site.dir.path().join("none.sock")).await;
    let pid = site.guard_pid();
    // The agent's handle goes away: as an agent that was killed, it says nothing more.
    let (events_tx, events) = mpsc::channel(16);
    let next = GuardClient::start(config(site.dir.path()), events_tx);
    drop(std::mem::replace(&mut site.guard, next));
    site.events = events;
    assert_eq!(deaf.signal().await, Some(9));
    site.armed().await;
    assert_eq!(site.guard_pid(), pid, "the same guard");
    // The next agent registers what it adopted, under its own token, and hears at once how it is.
    site.register("a", 9, &a, &path).await;
    let wanted = GuardEvent::Froze {
        vm: "a".into(),
        run: 9,
    };
    while site.event().await != wanted {}
    assert!(a.lives());
}

#[tokio::test]
async fn a_guard_that_died_is_replaced_and_told_everything() {
    let mut site = Site::new().await;
    let (path, _) = good(&site, "a.sock");
    site.lease(Duration::from_secs(3));
    let mut a = site.guest("a", &path).await;
    let first = site.guard_pid();
    rustix::process::kill_process(first, Signal::KILL).unwrap();
    let mut status = site.guard.status();
    let other = Some(first.as_raw_nonzero().get().unsigned_abs());
    let replaced = status.wait_for(|now| now.armed && now.pid.is_some() && now.pid != other);
    let replaced = tokio::time::timeout(SOON, replaced).await.is_ok();
    assert!(replaced);
    assert_eq!(site.event().await, froze("a"), "it knows lease and guest");
    assert!(a.lives());
}

#[tokio::test]
async fn a_guard_that_hangs_feeds_no_watchdog_and_is_not_called_armed() {
    let site = Site::new().await;
    assert!(site.fed_within(SOON), "without guests it is always fed");
    let pid = site.guard_pid();
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    let fed = site.fed_within(Duration::from_millis(600));
    let mut status = site.guard.status();
    site.lease(Duration::from_secs(3));
    // The guard of the value must not be held any longer: it blocks the client.
    let doubted = tokio::time::timeout(SOON, status.wait_for(|status| !status.armed))
        .await
        .is_ok();
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    assert!(!fed, "the host would have ended by now");
    assert!(doubted);
    site.armed().await;
    assert_eq!(site.guard_pid(), pid, "no second guard beside it");
}

#[tokio::test]
async fn ends_when_told_to_and_only_without_guests() {
    let site = Site::new().await;
    site.lease(Duration::from_secs(30));
    let mut guest = site.guest("a", &site.dir.path().join("none.sock")).await;
    let refused = site.guard.exit().await;
    assert!(matches!(refused, Err(GuardError::Refused(text)) if text.contains('a')));
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    let end = Instant::now() + SOON;
    while site.guard.exit().await.is_err() {
        assert!(Instant::now() < end);
    }
    while site.fed.recv_timeout(SOON).unwrap() != b"V" {}
}

#[tokio::test]
async fn one_that_is_told_to_end_while_it_hangs_can_be_told_again() {
    let site = Site::new().await;
    let pid = site.guard_pid();
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    // The signal takes effect a moment later.
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let end = Instant::now() + SOON;
    while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {
        assert!(Instant::now() < end, "it does not stop");
        std::thread::yield_now();
    }
    let unheard = site.guard.exit().await;
    let mut status = site.guard.status();
    // The link is given up while the order to end is under way.
    let doubted = tokio::time::timeout(SOON, status.wait_for(|status| !status.armed))
        .await
        .is_ok();
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(unheard, Err(GuardError::Unreachable));
    assert!(doubted);
    let end = Instant::now() + SOON;
    while let Err(error) = site.guard.exit().await {
        assert!(Instant::now() < end, "{error}");
    }
}

#[tokio::test]
async fn is_small() {
    let site = Site::new().await;
    let pid = site.guard_pid().as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let rss = status.lines().find(|line| line.starts_with("VmRSS"));
    let kib: u64 = rss
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    println!("guard: {kib} KiB resident");
    assert!(kib < 20 * 1024, "{kib} KiB");
}
