//! Start, stop, freeze, crash, adoption and restore with a real QEMU under software emulation.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{LONG, bench, counts_on, disk_seq, event, serial, ticks};
use quorate_hypervisor::{
    Adoption, Boot, GuestEvent, GuestState, Hypervisor, HypervisorError, Quiesced, StartMode,
};
use tokio::time::timeout;

#[tokio::test]
async fn boots_freezes_thaws_and_shuts_down() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    config.disks = vec![bench.raw_disk()];
    let guest = bench.boot(&config).await;
    assert_eq!(guest.status().await.unwrap(), GuestState::Running);

    let begun = Instant::now();
    let frozen = guest.freeze(LONG).await.unwrap();
    println!("freeze took {:?}", begun.elapsed());
    assert!(frozen.released_disks);
    assert_eq!(guest.status().await.unwrap(), GuestState::Paused);
    assert!(
        guest.freeze(LONG).await.unwrap().released_disks,
        "freezing twice is no error"
    );
    let (seq, tick) = (
        disk_seq(config.disks[0].source.path().unwrap()),
        ticks(&config),
    );
    tokio::time::sleep(Duration::from_millis(300)).await; // six ticks, if it ran
    assert_eq!(
        (
            disk_seq(config.disks[0].source.path().unwrap()),
            ticks(&config)
        ),
        (seq, tick)
    );

    let begun = Instant::now();
    guest.thaw(LONG).await.unwrap();
    println!("thaw took {:?}", begun.elapsed());
    guest.thaw(LONG).await.unwrap();
    counts_on(&config).await;
    guest.announce().await.unwrap();
    let error = guest
        .ping_agent(Duration::from_millis(100))
        .await
        .unwrap_err();
    assert!(
        matches!(error, HypervisorError::Agent { .. }),
        "no agent is in this guest: {error}"
    );

    let mut events = guest.events();
    guest.powerdown().await.unwrap();
    event(&mut events, |e| {
        matches!(e, GuestEvent::Shutdown { by_guest: true, .. })
    })
    .await;
    let exit = timeout(LONG, guest.exited()).await.unwrap();
    assert!(
        exit.by_guest() && !exit.is_crash() && exit.code == Some(0),
        "{exit:?}"
    );
    assert!(matches!(
        guest.status().await,
        Err(HypervisorError::Gone { .. })
    ));
    guest.quit().await.unwrap();
}

/// The facts on which freezing rests; see the documentation of the module `guest`.
#[tokio::test]
async fn a_frozen_guest_gives_up_its_image_locks() {
    let Some(bench) = bench() else { return };
    for disk in [bench.raw_disk(), bench.qcow2_disk()] {
        let mut first = bench.config("first");
        first.disks = vec![disk.clone()];
        let mut second = bench.config("second");
        second.disks = vec![disk];
        let guest = bench.start(&first, StartMode::Boot).await;
        let start_second = || bench.driver.start_guest(&second, StartMode::Boot, LONG);
        let error = start_second().await.unwrap_err();
        assert!(
            matches!(&error, HypervisorError::StartFailed { stderr, .. } if stderr.contains("lock")),
            "{error}"
        );
        assert!(guest.freeze(LONG).await.unwrap().released_disks);
        let other = start_second().await.unwrap();
        let error = guest.thaw(LONG).await.unwrap_err();
        assert!(
            matches!(error, HypervisorError::DiskLockLost { .. }),
            "{error}"
        );
        assert_eq!(guest.status().await.unwrap(), GuestState::Paused);
        let exit = other.kill(LONG).await.unwrap();
        assert_eq!(exit.signal, Some(9));
        guest.thaw(LONG).await.unwrap();
        guest.quit().await.unwrap();
        let exit = timeout(LONG, guest.exited()).await.unwrap();
        assert!(!exit.is_crash() && !exit.by_guest(), "{exit:?}");
    }
}

#[tokio::test]
async fn a_crash_is_noticed_within_100_ms() {
    let Some(bench) = bench() else { return };
    let config = bench.config("vm");
    let guest = bench.start(&config, StartMode::Boot).await;
    let waiting = tokio::spawn({
        let guest = guest.clone();
        async move { (guest.exited().await, Instant::now()) }
    });
    let pid = rustix::process::Pid::from_raw(guest.identity().pid).unwrap();
    let begun = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::SEGV).unwrap();
    let (exit, noticed) = timeout(LONG, waiting).await.unwrap().unwrap();
    println!("a crash was noticed after {:?}", noticed - begun);
    assert!(
        noticed - begun < Duration::from_millis(100),
        "{:?}",
        noticed - begun
    );
    assert!(exit.is_crash() && exit.signal == Some(11), "{exit:?}");
    assert!(
        !std::path::Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists(),
        "not reaped"
    );
}

#[tokio::test]
async fn a_guest_panic_is_an_event_and_a_crash() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    if let Boot::Kernel { append, .. } = &mut config.boot {
        append.push_str(" panic_at=3");
    }
    let guest = bench.start(&config, StartMode::Boot).await;
    let mut events = guest.events();
    event(&mut events, |e| matches!(e, GuestEvent::Panicked { .. })).await;
    let exit = timeout(LONG, guest.exited()).await.unwrap();
    assert!(exit.is_crash(), "{exit:?}");
}

#[tokio::test]
async fn a_start_that_fails_says_why_and_leaves_nothing() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    config.cpu_model = "no-such-cpu".into();
    let error = bench
        .driver
        .start_guest(&config, StartMode::Boot, LONG)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, HypervisorError::StartFailed { stderr, .. } if stderr.contains("no-such-cpu")),
        "{error}"
    );
    let gone = bench.driver.adopt(&config.runtime_dir, LONG).await.unwrap();
    assert!(matches!(gone, Adoption::Gone { config: Some(_) }));

    let config = bench.config("late");
    let begun = Instant::now();
    let within = Duration::from_millis(20);
    let error = bench
        .driver
        .start_guest(&config, StartMode::Boot, within)
        .await
        .unwrap_err();
    assert!(
        matches!(error, HypervisorError::StartTimeout { after_ms: 20, .. }),
        "{error}"
    );
    assert!(begun.elapsed() < LONG / 4);
    let gone = bench.driver.adopt(&config.runtime_dir, LONG).await.unwrap();
    assert!(matches!(gone, Adoption::Gone { .. }));

    let driver = quorate_hypervisor::qemu::QemuDriver::new("/no/such/qemu");
    let error = driver
        .start_guest(&bench.config("none"), StartMode::Boot, LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/no/such/qemu"), "{error}");
}

#[tokio::test]
async fn a_guest_outlives_its_handle_and_is_adopted() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    config.disks = vec![bench.raw_disk()];
    let guest = bench.boot(&config).await;
    let identity = guest.identity().clone();
    let error = bench
        .driver
        .start_guest(&config, StartMode::Boot, LONG)
        .await
        .unwrap_err();
    assert!(
        matches!(error, HypervisorError::AlreadyRunning { .. }),
        "{error}"
    );
    guest.freeze(LONG).await.unwrap();
    drop(guest);

    let adoption = bench.driver.adopt(&config.runtime_dir, LONG).await.unwrap();
    let Adoption::Alive { vm, state, .. } = adoption else {
        panic!("it is gone")
    };
    assert_eq!(
        (vm.identity(), state),
        (&identity, Some(GuestState::Paused))
    );
    assert_eq!(
        vm.config().disks[0].direct,
        Some(true),
        "the resolved configuration is kept"
    );
    vm.thaw(LONG).await.unwrap();
    counts_on(&config).await;
    drop(vm);

    // As if the daemon had died between the spawn and the record of it.
    let record = config.paths().record();
    let mut text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    text["identity"] = serde_json::Value::Null;
    std::fs::write(&record, text.to_string()).unwrap();
    let adopted = bench
        .driver
        .adopt_guest(&config.runtime_dir, LONG)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(adopted.identity(), &identity);

    // QEMU hangs: it is adopted all the same, so that it can be killed.
    let pid = rustix::process::Pid::from_raw(identity.pid).unwrap();
    drop(adopted);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let adoption = bench
        .driver
        .adopt(&config.runtime_dir, Duration::from_millis(200))
        .await
        .unwrap();
    let Adoption::Alive {
        vm, state: None, ..
    } = adoption
    else {
        panic!("a hung QEMU is not gone")
    };
    let begun = Instant::now();
    let error = vm.freeze(Duration::from_millis(100)).await.unwrap_err();
    println!("freezing a hung QEMU: {error}");
    assert!(begun.elapsed() < LONG / 4);
    vm.kill(LONG).await.unwrap();
    let gone = bench.driver.adopt(&config.runtime_dir, LONG).await.unwrap();
    assert!(matches!(gone, Adoption::Gone { .. }));
}

#[tokio::test]
async fn memory_is_saved_and_restored() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    config.disks = vec![bench.qcow2_disk()];
    let guest = bench.boot(&config).await;

    let nowhere = bench.dir.path().join("missing").join("state");
    let error = guest.save(&nowhere, LONG).await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::SaveFailed { .. }),
        "{error}"
    );
    counts_on(&config).await;

    let begun = Instant::now();
    let saved = guest
        .save(&bench.dir.path().join("vm.state"), LONG)
        .await
        .unwrap();
    println!(
        "save took {:?}, mapped-ram: {}",
        begun.elapsed(),
        saved.mapped_ram
    );
    let before = ticks(&config);
    let mut target = bench.config("moved");
    target.disks = config.disks.clone();
    guest.quit().await.unwrap();
    timeout(LONG, guest.exited()).await.unwrap();
    let begun = Instant::now();
    let restored = bench
        .start(&target, StartMode::Restore(saved.clone()))
        .await;
    println!("restore took {:?}", begun.elapsed());
    assert_eq!(restored.status().await.unwrap(), GuestState::Running);
    serial(&target, &format!("tick {}", before + 3)).await;
    restored.kill(LONG).await.unwrap();

    let mut bad = saved;
    bad.path = bench.dir.path().join("bad.state");
    std::fs::write(&bad.path, b"not a saved guest").unwrap();
    let error = bench
        .driver
        .start_guest(&target, StartMode::Restore(bad), LONG)
        .await
        .unwrap_err();
    println!("restoring garbage: {error}");
    assert!(
        matches!(error, HypervisorError::StartFailed { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_microvm_runs_and_explains_that_it_has_no_power_button() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    config.machine = "microvm".into();
    config.guest_agent = false;
    config.disks = vec![bench.raw_disk()];
    let guest = bench.boot(&config).await;
    assert!(guest.freeze(LONG).await.unwrap().released_disks);
    guest.thaw(LONG).await.unwrap();
    let error = guest.powerdown().await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::NoPowerdown { .. }),
        "{error}"
    );
    guest.kill(LONG).await.unwrap();
}

#[tokio::test]
async fn a_running_disk_grows_and_keeps_snapshots() {
    let Some(bench) = bench() else { return };
    let mut config = bench.config("vm");
    config.disks = vec![bench.raw_disk(), bench.qcow2_disk()];
    config.disks[1].id = "data".into();
    let guest = bench.boot(&config).await;
    let info = |index: usize| -> serde_json::Value {
        let path = config.disks[index].source.path().unwrap();
        let mut command = std::process::Command::new("qemu-img");
        let format = config.disks[index].format.as_str();
        command.args(["info", "-U", "--output=json", "-f", format]);
        let output = command.arg(path).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    for index in [0, 1] {
        guest.resize_disk(index, 4 << 20).await.unwrap();
        assert_eq!(info(index)["virtual-size"], 4 << 20);
    }
    // No agent is in this guest: that is said, and the snapshot is made all the same.
    let quiesced = guest.snapshot_disk(1, "before").await.unwrap();
    assert!(matches!(quiesced, Quiesced::No(_)), "{quiesced:?}");
    assert_eq!(info(1)["snapshots"][0]["name"], "before");
    let raw = guest.snapshot_disk(0, "before").await.unwrap_err();
    assert!(matches!(raw, HypervisorError::Qmp { .. }), "{raw}");
    let none = guest.resize_disk(2, 8 << 20).await.unwrap_err();
    assert!(
        matches!(none, HypervisorError::Disk { disk: 2, .. }),
        "{none}"
    );
    guest.delete_disk_snapshot(1, "before").await.unwrap();
    assert_eq!(info(1).get("snapshots"), None);
    assert_eq!(guest.status().await.unwrap(), GuestState::Running);
    counts_on(&config).await;
    guest.kill(LONG).await.unwrap();
}
