//! What the lab's tests share: a lab whose daemon is a shell script.
#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod guest;

use quorate_lab::{LabGuard, SiteSpec, wait};
use std::path::Path;
use std::time::Duration;

/// A lab and its folder; in this order, so that the lab is taken down first.
pub(crate) struct Fixture {
    pub(crate) lab: LabGuard,
    pub(crate) dir: tempfile::TempDir,
}

/// Ends when told to, and leaves one process behind as a daemon leaves its guests.
pub(crate) const DAEMON: &str =
    "setsid sleep 1000 & trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";

/// Brings up a site with a shell script for a daemon.
pub(crate) fn up(
    site: &str,
    hosts: u32,
    script: &str,
    change: impl FnOnce(&mut SiteSpec),
) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let tool = Path::new(env!("CARGO_BIN_EXE_quorate-lab-tool"));
    let mut spec = SiteSpec::new(tool);
    spec.site = site.to_owned();
    spec.hosts = hosts;
    spec.root = dir.path().to_owned();
    spec.daemon = ["sh", "-c", script, "daemon"].map(str::to_owned).to_vec();
    change(&mut spec);
    Fixture {
        lab: LabGuard::up(spec).unwrap(),
        dir,
    }
}

/// Waits for something in the lab.
pub(crate) fn eventually(what: &str, mut good: impl FnMut() -> bool) {
    let step = Duration::from_millis(5);
    wait::until(what, Duration::from_secs(120), step, || {
        good().then_some(())
    })
    .unwrap();
}

/// One ping from one part of the site to another one's address.
pub(crate) fn ping(fixture: &Fixture, from: &str, address: std::net::Ipv4Addr) -> bool {
    let mut command = fixture.lab.command(from, "busybox");
    command.args(["ping", "-c", "1", "-W", "1", &address.to_string()]);
    command.output().unwrap().status.success()
}

/// The lines of a host's history.
pub(crate) fn history(fixture: &Fixture, host: &str) -> Vec<serde_json::Value> {
    let path = fixture.lab.site().host_dir(host).join("events.jsonl");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
