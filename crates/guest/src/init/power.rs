//! Power button, orderly shutdown, crash.

use crate::console::say;
use crate::farewell;
use crate::shared::Shared;
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};
use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const KEY_PRESSED: i32 = 1;
/// `struct input_event` on a 64-bit kernel.
const EVENT_BYTES: usize = 24;

/// Watches every input device for the power button.
pub(crate) fn watch_buttons(shared: &Arc<Shared>) {
    for number in 0..16 {
        if let Ok(device) = File::open(format!("/dev/input/event{number}")) {
            let shared = Arc::clone(shared);
            std::thread::spawn(move || watch(device, &shared));
        }
    }
}

fn watch(mut device: File, shared: &Shared) {
    let mut event = [0; EVENT_BYTES];
    while device.read_exact(&mut event).is_ok() {
        let kind = u16::from_ne_bytes([event[16], event[17]]);
        let code = u16::from_ne_bytes([event[18], event[19]]);
        let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
        if (kind, code, value) == (EV_KEY, KEY_POWER, KEY_PRESSED) {
            ask(shared, "power button");
        }
    }
}

/// Somebody asks for a shutdown; the guest may have been told not to listen.
pub(crate) fn ask(shared: &Shared, who: &str) {
    if shared.config.ignore_shutdown {
        say(&format!(
            "guest: {who} asks for a shutdown; ignored as told"
        ));
    } else {
        say(&format!("guest: {who} asks for a shutdown"));
        shared.request_shutdown();
    }
}

/// PID 1's end: collects dead children until a shutdown is asked for, then powers off.
pub(crate) fn serve_shutdown(shared: &Shared) -> ! {
    while !shared.wait_shutdown() {
        while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {}
    }
    std::thread::sleep(Duration::from_millis(shared.config.shutdown_after_ms));
    shared.wait_writer(Duration::from_secs(5));
    farewell(shared);
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
    // A machine without a power switch: end PID 1, and with it the kernel.
    std::process::exit(0)
}

/// Crashes the kernel; with `panic=-1` and QEMU's `-no-reboot` QEMU ends.
pub(crate) fn crash() -> ! {
    let _ = std::fs::write("/proc/sys/kernel/sysrq", "1");
    let _ = std::fs::write("/proc/sysrq-trigger", "c");
    std::process::abort()
}
