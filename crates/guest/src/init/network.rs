//! Brings up `lo` and `eth0` with busybox.

use crate::console::say;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Gives `eth0` its addresses.
pub(crate) fn up(address: &str, ip6: Option<&str>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Path::new("/sys/class/net/eth0").exists() {
        if Instant::now() > deadline {
            return say("guest: no network interface; is there a virtio NIC?");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // The test's network has no second claimant; without the wait for one the address works at once.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0");
    let mut commands = vec![
        vec!["link", "set", "lo", "up"],
        vec!["addr", "add", address, "dev", "eth0"],
        vec!["link", "set", "eth0", "up"],
    ];
    commands.extend(ip6.map(|address| vec!["-6", "addr", "add", address, "dev", "eth0"]));
    for arguments in &commands {
        let done = Command::new("/bin/busybox")
            .arg("ip")
            .args(arguments)
            .output();
        match done {
            Ok(output) if output.status.success() => {}
            Ok(output) => say(&format!(
                "guest: ip {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )),
            Err(error) => say(&format!("guest: cannot run busybox ip: {error}")),
        }
    }
}
