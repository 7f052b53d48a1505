//! Live migration between two QEMUs on one machine that share a disk.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use common::{Bench, LONG, bench, counts_on, disk_seq, event, eventually, serial_text, ticks};
use quorate_hypervisor::qemu::Guest;
use quorate_hypervisor::{
    Boot, Downtime, GuestConfig, GuestEvent, GuestState, HypervisorError, IncomingMigration,
    IncomingOutcome, ListenRequest, MigrationPhase, MigrationRequest, MigrationStatus,
    OutgoingMigration, StartMode, TlsMaterial,
};
use tokio::time::timeout;

struct Pair {
    from: GuestConfig,
    to: GuestConfig,
    source: Guest,
    target: Guest,
    incoming: IncomingMigration,
}

/// A guest that counts, and a target that listens.
async fn pair(bench: &Bench, kernel_words: &str) -> Pair {
    let mut from = bench.config("source");
    from.disks = vec![bench.raw_disk()];
    if let Boot::Kernel { append, .. } = &mut from.boot {
        append.push_str(kernel_words);
    }
    let source = bench.boot(&from).await;
    let (to, target, incoming) = target(bench, &from).await;
    Pair {
        from,
        to,
        source,
        target,
        incoming,
    }
}

async fn target(bench: &Bench, from: &GuestConfig) -> (GuestConfig, Guest, IncomingMigration) {
    let mut to = bench.config("target");
    to.disks = from.disks.clone();
    to.boot = from.boot.clone();
    let target = bench.start(&to, StartMode::Incoming).await;
    let incoming = again(|| target.listen(listen())).await;
    assert_ne!(incoming.address.port(), 0);
    (to, target, incoming)
}

/// What QEMU did not do in time it is told again, as an agent would: on a busy machine it may take seconds to load
/// certificates.
async fn again<T, F>(mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, HypervisorError>>,
{
    let end = Instant::now() + LONG;
    loop {
        match ask().await {
            Ok(done) => return done,
            Err(error @ HypervisorError::Qmp { .. }) => assert!(Instant::now() < end, "{error:?}"),
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn listen() -> ListenRequest {
    ListenRequest {
        address: Ipv4Addr::LOCALHOST.into(),
        port: 0,
        multifd_channels: None,
        tls: None,
    }
}

async fn next(migration: &mut OutgoingMigration) -> MigrationPhase {
    timeout(LONG, migration.next())
        .await
        .expect("no phase in time")
        .expect("it is over already")
}

/// Reads phases up to one that is no progress.
async fn until(
    migration: &mut OutgoingMigration,
    wanted: impl Fn(&MigrationPhase) -> bool,
) -> MigrationPhase {
    loop {
        let phase = next(migration).await;
        if wanted(&phase) {
            return phase;
        }
        assert!(!phase.is_final(), "it ended early: {phase:?}");
    }
}

fn is_pre_switchover(phase: &MigrationPhase) -> bool {
    *phase == MigrationPhase::PreSwitchover
}

#[tokio::test]
async fn a_guest_moves_with_its_disk_and_pauses_at_the_switchover() {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&bench, "").await;
    let mut migration = pair
        .source
        .migrate(MigrationRequest::new(pair.incoming.address))
        .await
        .unwrap();
    assert_eq!(next(&mut migration).await, MigrationPhase::Setup);
    until(&mut migration, is_pre_switchover).await;
    assert_eq!(
        pair.source.status().await.unwrap(),
        GuestState::FinishMigrate
    );
    assert_eq!(pair.target.status().await.unwrap(), GuestState::InMigrate);
    let at_pause = ticks(&pair.from);
    let begun = Instant::now();
    migration.continue_switchover().await.unwrap();
    migration.continue_switchover().await.unwrap();
    let outcome = timeout(LONG, pair.incoming.wait()).await.unwrap();
    println!("continue to arrival: {:?}", begun.elapsed());
    assert_eq!(outcome, IncomingOutcome::Arrived(GuestState::Running));
    let last = until(&mut migration, MigrationPhase::is_final).await;
    println!("{last:?}");
    assert!(matches!(last, MigrationPhase::Completed { .. }), "{last:?}");
    assert_eq!(migration.next().await, None);
    assert_eq!(pair.source.status().await.unwrap(), GuestState::PostMigrate);
    let error = migration.cancel().await.unwrap_err();
    assert!(error.to_string().contains("over already"), "{error}");

    counts_on(&pair.to).await;
    let moved = serial_text(&pair.to);
    assert!(
        moved.contains(&format!("tick {}", at_pause + 1)),
        "no tick is lost: {moved}"
    );
    eventually("the target writes the disk", || {
        disk_seq(pair.to.disks[0].source.path().unwrap()) > at_pause
    })
    .await;
    // A thaw of the source by mistake cannot write next to the target.
    let error = pair.source.thaw(LONG).await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::DiskLockLost { .. }),
        "{error}"
    );
    pair.source.quit().await.unwrap();
    timeout(LONG, pair.source.exited()).await.unwrap();
    counts_on(&pair.to).await;
    pair.target.kill(LONG).await.unwrap();
}

#[tokio::test]
async fn cancelled_or_abandoned_before_the_switchover_the_source_goes_on() {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&bench, "").await;
    let mut migration = pair
        .source
        .migrate(MigrationRequest::new(pair.incoming.address))
        .await
        .unwrap();
    let early = migration.continue_switchover().await.unwrap_err();
    assert!(
        matches!(early, HypervisorError::Migration { .. }),
        "{early}"
    );
    until(&mut migration, is_pre_switchover).await;
    migration.cancel().await.unwrap();
    let last = until(&mut migration, MigrationPhase::is_final).await;
    assert_eq!(
        last,
        MigrationPhase::Cancelled {
            source: Some(GuestState::Running)
        }
    );
    let outcome = timeout(LONG, pair.incoming.wait()).await.unwrap();
    println!("a target whose source cancelled: {outcome:?}");
    assert!(matches!(outcome, IncomingOutcome::Failed { .. }));
    timeout(LONG, pair.target.exited()).await.unwrap();
    counts_on(&pair.from).await;

    // Nobody orders the switchover.
    let (_, target, incoming) = target(&bench, &pair.from).await;
    let mut request = MigrationRequest::new(incoming.address);
    request.switchover_wait = Duration::from_millis(50);
    let mut migration = pair.source.migrate(request).await.unwrap();
    let last = until(&mut migration, MigrationPhase::is_final).await;
    assert!(
        matches!(&last, MigrationPhase::Failed { reason, switchover_begun: false, source: Some(GuestState::Running) }
            if reason.contains("nobody ordered")),
        "{last:?}"
    );
    timeout(LONG, target.exited()).await.unwrap();

    // The daemon dies in the middle: another takes the migration up, then drops it as well.
    let (_, target, incoming) = self::target(&bench, &pair.from).await;
    let mut request = MigrationRequest::new(incoming.address);
    request.switchover_wait = LONG;
    let mut migration = pair.source.migrate(request).await.unwrap();
    until(&mut migration, is_pre_switchover).await;
    let adopted = bench
        .driver
        .adopt_guest(&pair.from.runtime_dir, Duration::from_millis(300))
        .await;
    drop(adopted); // the first connection holds the socket; this one could only watch the process
    let mut attached = pair.source.attach_migration().await.unwrap().unwrap();
    assert_eq!(
        until(&mut attached, is_pre_switchover).await,
        MigrationPhase::PreSwitchover
    );
    drop(attached);
    let last = until(&mut migration, MigrationPhase::is_final).await;
    assert_eq!(
        last,
        MigrationPhase::Cancelled {
            source: Some(GuestState::Running)
        }
    );
    timeout(LONG, target.exited()).await.unwrap();
    counts_on(&pair.from).await;
    pair.source.kill(LONG).await.unwrap();
}

#[tokio::test]
async fn a_target_that_dies_leaves_the_source_running() {
    let Some(bench) = bench() else { return };
    let pair = pair(&bench, "").await;
    let nobody = pair.incoming.address;
    // While copying.
    let mut request = MigrationRequest::new(pair.incoming.address);
    request.max_bandwidth = Some(4 << 20);
    let mut migration = pair.source.migrate(request).await.unwrap();
    let active = until(
        &mut migration,
        |phase| matches!(phase, MigrationPhase::Active(progress) if progress.transferred_bytes > 0),
    );
    println!("{:?}", active.await);
    pair.target.kill(LONG).await.unwrap();
    let last = until(&mut migration, MigrationPhase::is_final).await;
    println!("target killed while copying: {last:?}");
    let goes_on = |phase: &MigrationPhase| {
        matches!(
            phase,
            MigrationPhase::Failed {
                switchover_begun: false,
                source: Some(GuestState::Running),
                ..
            }
        )
    };
    assert!(goes_on(&last), "{last:?}");
    counts_on(&pair.from).await;

    killed_at_the_pause(&bench, &pair).await;

    // Nobody listens.
    let mut migration = pair
        .source
        .migrate(MigrationRequest::new(nobody))
        .await
        .unwrap();
    let last = until(&mut migration, MigrationPhase::is_final).await;
    println!("nobody listens: {last:?}");
    assert!(goes_on(&last), "{last:?}");
    counts_on(&pair.from).await;
    pair.source.kill(LONG).await.unwrap();
}

/// The switchover is ordered into the void.
async fn killed_at_the_pause(bench: &Bench, pair: &Pair) {
    let (_, target, incoming) = target(bench, &pair.from).await;
    let mut migration = pair
        .source
        .migrate(MigrationRequest::new(incoming.address))
        .await
        .unwrap();
    until(&mut migration, is_pre_switchover).await;
    target.kill(LONG).await.unwrap();
    let mut events = pair.source.events();
    let window = tokio::spawn(async move {
        event(&mut events, |event| *event == GuestEvent::Resume).await;
        let resumed = Instant::now();
        event(&mut events, |event| {
            matches!(event, GuestEvent::Stop { .. })
        })
        .await;
        resumed.elapsed()
    });
    let disk = pair.from.disks[0].source.path().unwrap();
    let before = disk_seq(disk);
    let sent = migration.continue_switchover().await;
    let last = until(&mut migration, MigrationPhase::is_final).await;
    println!("target killed at the pause: {sent:?}, {last:?}");
    println!("QEMU let the source run for {:?}", window.await.unwrap());
    assert_eq!(disk_seq(disk), before, "the source wrote after the pause");
    // The target might have run, for all the source knows: it is frozen until somebody knows better.
    assert!(
        matches!(
            last,
            MigrationPhase::Failed {
                switchover_begun: true,
                source: Some(GuestState::Paused | GuestState::IoError),
                ..
            }
        ),
        "{last:?}"
    );
    let at = ticks(&pair.from);
    tokio::time::sleep(Duration::from_millis(200)).await; // four ticks, if it ran
    assert_eq!(ticks(&pair.from), at);
    pair.source.thaw(LONG).await.unwrap();
    counts_on(&pair.from).await;
}

/// The daemon dies when it has ordered the switchover, and the target dies with the guest's last state. QEMU lets the
/// source go on, and there is nobody to stop it: it must not write all the same.
#[test]
fn a_source_that_qemu_resumes_by_itself_writes_nothing() {
    let Some(bench) = bench() else { return };
    let daemon = || tokio::runtime::Runtime::new().unwrap();
    let first = daemon();
    let Pair {
        from,
        source,
        target,
        incoming,
        ..
    } = first.block_on(pair(&bench, "writes=1"));
    let disk = from.disks[0].source.path().unwrap().to_owned();
    let pid = rustix::process::Pid::from_raw(target.identity().pid).unwrap();
    first.block_on(async {
        let request = MigrationRequest::new(incoming.address);
        let mut migration = source.migrate(request).await.unwrap();
        until(&mut migration, is_pre_switchover).await;
        // It takes in what fits into the socket, and answers nothing.
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        // QEMU may be busy with the silent socket, and then does not answer.
        if let Err(error) = migration.continue_switchover().await {
            println!("{error}");
        }
        std::mem::forget(migration); // a daemon that dies drops nothing
    });
    drop((source, target, incoming));
    first.shutdown_background();
    let (at, ticked) = (disk_seq(&disk), ticks(&from));
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();

    daemon().block_on(async {
        let found = bench.driver.adopt_guest(&from.runtime_dir, LONG).await;
        let guest = found.unwrap().expect("the source has ended");
        let deadline = Instant::now() + LONG;
        while guest.status().await.unwrap() != GuestState::IoError {
            assert!(Instant::now() < deadline, "QEMU did not resume it");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!("it ran from tick {ticked} to {}", ticks(&from));
        assert_eq!(disk_seq(&disk), at, "it wrote");
        // It turned out that the target never ran it.
        guest.freeze(LONG).await.unwrap();
        guest.thaw(LONG).await.unwrap();
        counts_on(&from).await;
        eventually("it writes again", || disk_seq(&disk) > at).await;
        guest.kill(LONG).await.unwrap();
    });
}

#[tokio::test]
async fn a_freeze_wins_over_a_migration() {
    let Some(bench) = bench() else { return };
    let pair = pair(&bench, "").await;
    let mut migration = pair
        .source
        .migrate(MigrationRequest::new(pair.incoming.address))
        .await
        .unwrap();
    until(&mut migration, is_pre_switchover).await;
    let begun = Instant::now();
    let frozen = pair.source.freeze(LONG).await.unwrap();
    println!("freeze at the pause took {:?}", begun.elapsed());
    assert!(frozen.released_disks);
    let last = until(&mut migration, MigrationPhase::is_final).await;
    println!("{last:?}");
    assert!(matches!(
        last,
        MigrationPhase::Failed {
            switchover_begun: false,
            ..
        } | MigrationPhase::Cancelled { .. }
    ));
    assert_eq!(pair.source.status().await.unwrap(), GuestState::Paused);
    let error = pair
        .source
        .migrate(MigrationRequest::new(pair.incoming.address))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("only a running guest"),
        "{error}"
    );
    pair.source.thaw(LONG).await.unwrap();
    counts_on(&pair.from).await;
    pair.source.kill(LONG).await.unwrap();
}

/// A cluster's CA, with a certificate for a source and one for a target in the names QEMU wants.
fn certificates(dir: &std::path::Path) {
    use rcgen::KeyUsagePurpose;
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };
    std::fs::create_dir(dir).unwrap();
    let write = |name: &str, pem: String| std::fs::write(dir.join(name), pem).unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_key = KeyPair::generate().unwrap();
    write("ca-cert.pem", ca.self_signed(&ca_key).unwrap().pem());
    let issuer = Issuer::new(ca, ca_key);
    for (end, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(vec!["h2.quorate".to_owned()]).unwrap();
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        write(&format!("{end}-cert.pem"), certificate.pem());
        write(&format!("{end}-key.pem"), key.serialize_pem());
    }
}

#[tokio::test]
async fn an_encrypted_migration_wants_the_right_certificates() {
    let Some(bench) = bench() else { return };
    let mut from = bench.config("source");
    from.disks = vec![bench.raw_disk()];
    let source = bench.boot(&from).await;
    let (ours, theirs) = (
        bench.dir.path().join("ours"),
        bench.dir.path().join("theirs"),
    );
    certificates(&ours);
    certificates(&theirs);
    let tls = |dir: &std::path::Path, name: &str| {
        Some(TlsMaterial {
            dir: dir.to_path_buf(),
            hostname: Some(name.to_owned()),
        })
    };
    let mut to = bench.config("target");
    to.disks = from.disks.clone();
    for (dir, name, works) in [
        (&theirs, "h2.quorate", false),
        (&ours, "h3.quorate", false),
        (&ours, "h2.quorate", true),
    ] {
        let target = bench.start(&to, StartMode::Incoming).await;
        let mut request = listen();
        request.tls = tls(&ours, "");
        let mut incoming = again(|| target.listen(request.clone())).await;
        let mut request = MigrationRequest::new(incoming.address);
        request.tls = tls(dir, name);
        let mut migration = again(|| source.migrate(request.clone())).await;
        let last = loop {
            match next(&mut migration).await {
                MigrationPhase::PreSwitchover => migration.continue_switchover().await.unwrap(),
                phase if phase.is_final() => break phase,
                _ => {}
            }
        };
        println!("{name}: {last:?}");
        assert_eq!(
            matches!(last, MigrationPhase::Completed { .. }),
            works,
            "{last:?}"
        );
        let outcome = if works {
            timeout(LONG, incoming.wait()).await.unwrap()
        } else {
            target.kill(LONG).await.unwrap();
            incoming.wait().await
        };
        assert_eq!(
            outcome == IncomingOutcome::Arrived(GuestState::Running),
            works,
            "{outcome:?}"
        );
        if works {
            target.kill(LONG).await.unwrap();
        } else {
            counts_on(&from).await;
        }
    }
    source.quit().await.unwrap();
}

#[tokio::test]
async fn a_busy_guest_gets_longer_pauses_and_is_slowed_down() {
    let Some(bench) = bench() else { return };
    let mut pair = pair(&bench, " dirty=16").await;
    let mut request = MigrationRequest::new(pair.incoming.address);
    request.downtime = Downtime {
        start_ms: 1,
        max_ms: 4,
    };
    // So little that also a guest that hardly gets the processor writes faster.
    request.max_bandwidth = Some(16 << 20);
    let mut migration = pair.source.migrate(request).await.unwrap();
    let mut limits = Vec::new();
    loop {
        match next(&mut migration).await {
            MigrationPhase::Active(progress) => {
                if limits.last() != Some(&(progress.downtime_limit_ms, progress.throttle_percent)) {
                    limits.push((progress.downtime_limit_ms, progress.throttle_percent));
                }
                if progress.throttle_percent >= 20 {
                    break;
                }
            }
            MigrationPhase::PreSwitchover => break,
            phase => assert!(!phase.is_final(), "{phase:?}"),
        }
    }
    println!("limits and throttling: {limits:?}");
    assert!(
        limits.iter().any(|(limit, _)| *limit == 4),
        "the limit never rose: {limits:?}"
    );
    assert!(
        limits.iter().any(|(_, percent)| *percent >= 20),
        "it was never slowed down: {limits:?}"
    );
    migration.cancel().await.unwrap();
    let last = until(&mut migration, MigrationPhase::is_final).await;
    assert!(matches!(last, MigrationPhase::Cancelled { .. }), "{last:?}");
    assert_eq!(
        pair.source.migration_status().await.unwrap(),
        MigrationStatus::Cancelled
    );
    assert!(matches!(
        pair.incoming.wait().await,
        IncomingOutcome::Failed { .. }
    ));
    pair.source.kill(LONG).await.unwrap();
}
