//! PID 1 of the lab guest.
//!
//! Owns: the guest's boot, its services, its shutdown. Always holds: a record is reported as
//! acknowledged only after the disk said that it is durable; every thread and connection is
//! bounded. Must not: return (the kernel would panic) or depend on anything outside its initramfs.
//! Why one program of our own: a guest that boots in two seconds under software emulation and
//! whose every write can be judged afterwards.
//!
//! ```text
//! mount -> modules -> network -> services -> disk log -> wait -> QUORATE-GUEST-READY -> wait for shutdown
//! ```
//!
//! Called with `pack OUTPUT [GUEST_PATH=FILE]...` (not as PID 1) it writes an initramfs instead;
//! the build uses that, so that it needs neither `cpio` nor `mknod` and is reproducible.
#![allow(
    clippy::disallowed_methods,
    reason = "the guest's pace is time itself, and PID 1 may not return"
)]

mod agent;
mod console;
mod disk;
mod network;
mod pack;
mod power;
mod rogue;
mod services;
mod setup;
mod shared;

use console::say;
use quorate_guest::config::Config;
use quorate_guest::{DOWN_LINE, READY_LINE};
use shared::Shared;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        run_guest()
    } else {
        pack::main()
    }
}

fn run_guest() -> ! {
    setup::mount_all();
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (config, bad) = Config::parse(&line);
    for word in bad {
        say(&format!("guest: {word}"));
    }
    setup::load_modules();
    let shared = Arc::new(Shared::new(config));
    if let Some(address) = &shared.config.ip {
        network::up(address, shared.config.ip6.as_deref());
    }
    services::start(&shared);
    power::watch_buttons(&shared);
    agent::start(&shared);
    shared::start_dirtying(&shared);
    disk::start(&shared);
    if shared.config.shell {
        setup::start_shell();
    }
    let waiting = Arc::clone(&shared);
    std::thread::spawn(move || become_ready(&waiting));
    power::serve_shutdown(&shared)
}

fn become_ready(shared: &Arc<Shared>) {
    shared.wait_first_record();
    std::thread::sleep(Duration::from_millis(shared.config.ready_after_ms));
    services::start_http(shared);
    shared.set_ready();
    say(&format!(
        "{READY_LINE} name={} boot={} seq={} uptime_ms={}",
        shared.config.name,
        shared.boot,
        shared.acknowledged(),
        shared::uptime_ns() / 1_000_000
    ));
    if let Some(after) = shared.config.crash_after_ms {
        std::thread::sleep(Duration::from_millis(after));
        say("guest: crashing as asked");
        power::crash();
    }
}

/// The last words of an orderly shutdown.
fn farewell(shared: &Shared) {
    say(&format!(
        "{DOWN_LINE} name={} seq={}",
        shared.config.name,
        shared.acknowledged()
    ));
}
