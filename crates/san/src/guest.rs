//! One guest: QEMU with a console in a file and a control port on a socket. Dropping it is
//! pulling its plug.

use crate::{San, pause};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Guest {
    name: String,
    console: PathBuf,
    control: PathBuf,
    process: Child,
}

impl Guest {
    /// Starts it and waits for its control port.
    pub(crate) fn start(
        san: &San,
        name: &str,
        tap: &str,
        number: u8,
        line: &str,
        disks: &[PathBuf],
    ) -> Result<Self> {
        let console = san.dir.join(format!("{name}.console"));
        let control = san.dir.join(format!("{name}.control"));
        let _ = std::fs::remove_file(&control);
        let _ = std::fs::remove_file(&console);
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "ip", "netns", "exec", &san.namespace])
            .args([
                "qemu-system-x86_64",
                "-M",
                "q35",
                "-accel",
                "tcg",
                "-m",
                "192",
            ])
            .args(["-display", "none", "-nodefaults", "-no-reboot"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args([
                "-serial",
                &format!("unix:{},server=on,wait=off", control.display()),
            ])
            .arg("-kernel")
            .arg(san.image.join("vmlinuz"))
            .arg("-initrd")
            .arg(san.image.join("initrd.img"))
            .args([
                "-append",
                &format!("console=ttyS0 quiet panic=-1 no_timer_check {line}"),
            ])
            .args([
                "-netdev",
                &format!("tap,id=n,ifname={tap},script=no,downscript=no"),
            ])
            .args([
                "-device",
                &format!("virtio-net-pci,netdev=n,mac=52:54:00:79:00:{number:02x},romfile="),
            ])
            .args(["-device", "virtio-rng-pci"]);
        for disk in disks {
            // Its plug is pulled, never this machine's. A target that waits for a busy machine's disk answers no ping.
            let drive = format!("file={},format=raw,if=virtio,cache=unsafe", disk.display());
            command.args(["-drive", &drive]);
        }
        let errors = std::fs::File::create(san.dir.join(format!("{name}.errors")))?;
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .context("setpriv cannot be run (package util-linux)")?;
        let mut guest = Self {
            name: name.to_owned(),
            console,
            control,
            process,
        };
        let errors = san.dir.join(format!("{name}.errors"));
        guest
            .wait("a control port", Duration::from_secs(60), |guest| {
                std::os::unix::net::UnixStream::connect(&guest.control).is_ok()
            })
            .with_context(|| std::fs::read_to_string(errors).unwrap_or_default())?;
        Ok(guest)
    }

    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    pub(crate) fn console(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest says that it is ready.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait("ready", limit, |guest| {
            guest.console().contains("SAN-READY")
        })
    }

    fn wait(&mut self, what: &str, limit: Duration, is: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !is(self) {
            let ended = self.process.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!(
                    "guest {} does not get {what} ({}): {}",
                    self.name,
                    ended.map_or("it runs".into(), |status| status.to_string()),
                    self.console()
                );
            }
            pause(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
