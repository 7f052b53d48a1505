//! Brings up `lo` and `eth0` with busybox.

use crate::console::say;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Gives `eth0` its address.
pub(crate) fn up(address: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Path::new("/sys/class/net/eth0").exists() {
        if Instant::now() > deadline {
            return say("guest: no network interface; is there a virtio NIC?");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for arguments in [
        &["link", "set", "lo", "up"][..],
        &["addr", "add", address, "dev", "eth0"],
        &["link", "set", "eth0", "up"],
    ] {
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
