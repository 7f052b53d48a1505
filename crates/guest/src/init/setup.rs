//! File systems, kernel modules, the shell.

use crate::console::say;
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::process::{Command, Stdio};

/// Mounts what every other part needs.
pub(crate) fn mount_all() {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
    ] {
        let _ = fs::create_dir_all(target);
        if let Err(error) = mount(kind, target, kind, MountFlags::empty(), c"") {
            say(&format!("guest: cannot mount {kind} on {target}: {error}"));
        }
    }
}

/// Loads the modules in the order of `/modules/order`.
pub(crate) fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for name in order.lines() {
        let loaded = fs::read(format!("/modules/{name}"))
            .and_then(|image| Ok(rustix::system::init_module(&image, c"")?));
        match loaded {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => say(&format!("guest: cannot load module {name}: {error}")),
        }
    }
}

/// A shell on the serial console, for a look around.
pub(crate) fn start_shell() {
    let console = || {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/console")
    };
    let (Ok(input), Ok(output), Ok(errors)) = (console(), console(), console()) else {
        return say("guest: no console for a shell");
    };
    let shell = Command::new("/bin/busybox")
        .arg("sh")
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::from(errors))
        .spawn();
    if let Err(error) = shell {
        say(&format!("guest: cannot start a shell: {error}"));
    }
}
