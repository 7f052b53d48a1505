//! The fake keeps the promises of the real one.
#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;

use super::*;
use crate::config::{Accel, Boot, DiskConfig, DiskFormat};
use crate::migration::{
    IncomingOutcome, ListenRequest, MigrationPhase, MigrationRequest, OutgoingMigration,
};

const LONG: Duration = Duration::from_secs(60);

fn config(host: &str) -> GuestConfig {
    GuestConfig {
        name: "db".into(),
        uuid: "6c0f7a52-5d0f-4a43-9d6a-0b8f3d1f5a01".into(),
        cpus: 1,
        memory_mib: 128,
        machine: "pc-q35-10.0".into(),
        accel: Accel::Tcg,
        cpu_model: "max".into(),
        boot: Boot::Kernel {
            kernel: "/k".into(),
            initrd: None,
            append: String::new(),
        },
        disks: vec![DiskConfig::file("root", "/pool/db.img", DiskFormat::Raw)],
        nics: Vec::new(),
        serial_log: "/log".into(),
        guest_agent: true,
        runtime_dir: PathBuf::from("/run").join(host),
        sandbox: true,
    }
}

async fn last(migration: &mut OutgoingMigration, order: bool) -> MigrationPhase {
    loop {
        let phase = migration.next().await.unwrap();
        if phase.is_final() {
            return phase;
        }
        if phase == MigrationPhase::PreSwitchover && order {
            migration.continue_switchover().await.unwrap();
        }
    }
}

async fn pair(site: &FakeSite) -> (Arc<dyn Vm>, Arc<dyn Vm>, crate::IncomingMigration) {
    let source = site
        .host()
        .start(&config("h1"), StartMode::Boot, LONG)
        .await
        .unwrap();
    let target = site
        .host()
        .start(&config("h2"), StartMode::Incoming, LONG)
        .await
        .unwrap();
    let listen = ListenRequest {
        address: Ipv4Addr::LOCALHOST.into(),
        port: 0,
        multifd_channels: None,
        tls: None,
    };
    let incoming = target.listen(listen).await.unwrap();
    (source, target, incoming)
}

#[tokio::test(start_paused = true)]
async fn a_guest_moves_and_runs_once() {
    let site = FakeSite::new();
    let (source, target, mut incoming) = pair(&site).await;
    let mut migration = source
        .migrate(MigrationRequest::new(incoming.address))
        .await
        .unwrap();
    assert!(matches!(
        last(&mut migration, true).await,
        MigrationPhase::Completed { .. }
    ));
    assert_eq!(
        incoming.wait().await,
        IncomingOutcome::Arrived(GuestState::Running)
    );
    assert_eq!(site.executing("db"), [PathBuf::from("/run/h2")]);
    assert_eq!(source.status().await.unwrap(), GuestState::PostMigrate);
    assert!(matches!(
        source.thaw(LONG).await,
        Err(HypervisorError::DiskLockLost { .. })
    ));
    source.quit().await.unwrap();
    assert!(!source.exited().await.is_crash());
    target.kill(LONG).await.unwrap();
    assert!(matches!(
        site.host().adopt(Path::new("/run/h2"), LONG).await.unwrap(),
        Adoption::Gone { config: Some(_) }
    ));
}

#[tokio::test(start_paused = true)]
async fn migrations_fail_at_each_step() {
    for (at, begun, state, arrives) in [
        (FailAt::Setup, false, GuestState::Running, false),
        (FailAt::Active, false, GuestState::Running, false),
        (FailAt::PreSwitchover, false, GuestState::Running, false),
        (FailAt::Device, true, GuestState::Paused, false),
        (FailAt::AfterArrival, true, GuestState::Paused, true),
    ] {
        let site = FakeSite::new();
        let (source, _target, mut incoming) = pair(&site).await;
        site.fault("db", Fault::MigrationFails(at));
        let mut migration = source
            .migrate(MigrationRequest::new(incoming.address))
            .await
            .unwrap();
        let order = matches!(at, FailAt::Device | FailAt::AfterArrival);
        let last = last(&mut migration, order).await;
        assert!(
            matches!(&last, MigrationPhase::Failed { switchover_begun, source: Some(now), .. }
                if *switchover_begun == begun && *now == state),
            "{at:?}: {last:?}"
        );
        let arrived = incoming.wait().await == IncomingOutcome::Arrived(GuestState::Running);
        assert_eq!(arrived, arrives, "{at:?}");
        assert!(site.executing("db").len() <= 1, "{at:?}");
        if !arrives {
            source.thaw(LONG).await.unwrap();
        }
        assert_eq!(site.executing("db").len(), 1, "{at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn cancelled_stalled_frozen_or_without_a_target_the_source_keeps_the_guest() {
    let site = FakeSite::new();
    let (source, _target, incoming) = pair(&site).await;
    let mut migration = source
        .migrate(MigrationRequest::new(incoming.address))
        .await
        .unwrap();
    migration.cancel().await.unwrap();
    let cancelled = MigrationPhase::Cancelled {
        source: Some(GuestState::Running),
    };
    assert_eq!(last(&mut migration, false).await, cancelled);

    let mut migration = source
        .migrate(MigrationRequest::new(incoming.address))
        .await
        .unwrap();
    assert!(matches!(
        last(&mut migration, false).await,
        MigrationPhase::Failed {
            switchover_begun: false,
            source: Some(GuestState::Running),
            ..
        }
    ));

    let site = FakeSite::new();
    let (source, _target, incoming) = pair(&site).await;
    site.fault("db", Fault::MigrationStalls);
    let mut migration = source
        .migrate(MigrationRequest::new(incoming.address))
        .await
        .unwrap();
    source.freeze(LONG).await.unwrap();
    let cancelled = MigrationPhase::Cancelled {
        source: Some(GuestState::Paused),
    };
    assert_eq!(last(&mut migration, false).await, cancelled);
    assert!(site.executing("db").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_restarted_daemon_takes_up_a_migration_at_the_pause() {
    let site = FakeSite::new();
    let (source, _target, mut incoming) = pair(&site).await;
    assert!(source.attach_migration().await.unwrap().is_none());
    let mut request = MigrationRequest::new(incoming.address);
    request.switchover_wait = LONG;
    let mut migration = source.migrate(request).await.unwrap();
    while migration.next().await.unwrap() != MigrationPhase::PreSwitchover {}
    std::mem::forget(migration); // a daemon that dies drops nothing
    let mut attached = source.attach_migration().await.unwrap().unwrap();
    assert!(matches!(
        last(&mut attached, true).await,
        MigrationPhase::Completed { .. }
    ));
    assert_eq!(
        incoming.wait().await,
        IncomingOutcome::Arrived(GuestState::Running)
    );
}

#[tokio::test(start_paused = true)]
async fn faults_strike_as_scripted() {
    let site = FakeSite::new();
    let host = site.host();
    site.fault("db", Fault::StartFails("no memory".into()));
    site.fault("db", Fault::StartHangs);
    site.fault("db", Fault::CrashesAfter(Duration::from_secs(3)));
    let h1 = config("h1");
    let start = || host.start(&h1, StartMode::Boot, LONG);
    assert!(matches!(
        start().await,
        Err(HypervisorError::StartFailed { .. })
    ));
    assert!(matches!(
        start().await,
        Err(HypervisorError::StartTimeout { .. })
    ));
    let vm = start().await.unwrap();
    assert!(matches!(
        start().await,
        Err(HypervisorError::AlreadyRunning { .. })
    ));
    let second = host.start(&config("h2"), StartMode::Boot, LONG).await;
    assert!(
        matches!(second, Err(HypervisorError::StartFailed { .. })),
        "the image is locked"
    );
    assert!(vm.exited().await.is_crash());

    let vm = start().await.unwrap();
    for fault in [
        Fault::FreezeFails,
        Fault::ThawLosesLock,
        Fault::SaveFails,
        Fault::KillHangs,
    ] {
        site.fault("db", fault);
    }
    assert!(matches!(
        vm.freeze(LONG).await,
        Err(HypervisorError::FreezeFailed { .. })
    ));
    assert!(vm.freeze(LONG).await.unwrap().released_disks);
    assert!(matches!(
        vm.thaw(LONG).await,
        Err(HypervisorError::DiskLockLost { .. })
    ));
    vm.thaw(LONG).await.unwrap();
    let path = Path::new("/pool/db.state");
    assert!(matches!(
        vm.save(path, LONG).await,
        Err(HypervisorError::SaveFailed { .. })
    ));
    assert!(matches!(
        vm.kill(LONG).await,
        Err(HypervisorError::KillUnconfirmed { .. })
    ));
    site.fault("db", Fault::IgnoresPowerdown);
    vm.powerdown().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), GuestState::Running);
    assert_eq!(vm.kill(LONG).await.unwrap().signal, Some(9));
}
