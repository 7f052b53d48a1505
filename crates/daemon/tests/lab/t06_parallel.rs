//! A host dies while another VM's long migration runs: its guests do not wait for that.

use crate::harness::guest::Guest;
use crate::harness::measure::{judge_rounds, measured, seconds};
use crate::harness::{Cluster, LONG, Options, find_vm};
use std::time::Duration;

#[test]
fn recovery_does_not_wait_for_another_vms_migration() {
    let cluster = Cluster::with(Options {
        settings: "  migration_mib_per_s: 1\n".to_owned(),
        ..Options::default()
    });
    let slow = Guest::new("slow", 1).memory(96).only_on(&["h1", "h2"]);
    let quick = Guest::new("quick", 2);
    let guests = [slow, quick];
    cluster.run(&guests);
    let witness = cluster.witness(&guests);
    let mut rounds = Vec::new();
    for _ in 0..3 {
        // The limit of a follower's host: the leader must be another one.
        let leader = cluster.leader();
        let from = cluster.owner("slow");
        let to = if from == "h1" { "h2" } else { "h1" };
        if leader == "h3" {
            cluster.lab.restart_daemon("h3", true).unwrap();
            cluster.wait_healthy();
        }
        bring(&cluster, "quick", "h3");
        cluster.must(&["vm", "migrate", "slow", "--to", to]);
        cluster.wait("a migration under way", LONG, |view| {
            let vm = find_vm(view, "slow")?;
            let under_way = vm
                .migration
                .as_ref()
                .is_some_and(|migration| migration.transferred > 0);
            under_way.then_some(()).ok_or_else(|| format!("{vm:?}"))
        });
        let led_by_victim = cluster.leader() == "h3";
        let old = cluster.copy("quick");
        let begun = cluster.cut_power("h3");
        let new = cluster.new_copy("quick", &[old], Duration::from_secs(15));
        let took = seconds(new.started.saturating_sub(begun));
        let vm = cluster.vm("slow");
        assert!(
            vm.migration.is_some(),
            "the migration was over or was given up: {vm:?}"
        );
        cluster.say(&format!(
            "recovered on {} in {took:.2} s, the migration goes on",
            new.host
        ));
        if !led_by_victim {
            rounds.push(took);
        }
        cluster.must(&["vm", "cancel", "slow"]);
        cluster.wait_ready(&["slow", "quick"], LONG);
        cluster.boot("h3");
    }
    measured(
        "rounds with a follower's host",
        rounds.len() as f64,
        "rounds",
        "3",
    );
    judge_rounds(
        "failover of one VM while another one migrates",
        &rounds,
        "s",
        3.0,
    );
    let reports = cluster.judge(witness);
    assert_eq!(
        reports[0].ranges.len(),
        1,
        "the migrating guest was restarted"
    );
}

/// To another host without the slow network: stopped, kept from the others, started.
fn bring(cluster: &Cluster, vm: &str, host: &str) {
    if cluster.owner(vm) != host {
        let text = std::fs::read_to_string(cluster.lab.site().dir.join("manifest.yaml")).unwrap();
        cluster.must(&["vm", "stop", vm, "--hard", "--wait"]);
        let only = text.replace(
            &format!("  {vm}:\n"),
            &format!("  {vm}:\n    hosts: [{host}]\n"),
        );
        cluster.apply_text(&only).unwrap();
        cluster.must(&["vm", "start", vm, "--wait"]);
        cluster.apply_text(&text).unwrap();
    }
}
