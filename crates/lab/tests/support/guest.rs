//! Lab guests under QEMU processes that the hosts start by themselves.

use super::Fixture;
use quorate_lab::guest::{GuestImage, command_line};
use quorate_lab::{Site, wait};
use std::path::PathBuf;
use std::time::Duration;

/// Starts the host's guest, if it has one, and waits.
pub(crate) const DAEMON: &str =
    "[ -f $3/run ] && setsid sh $3/run & trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";

/// Lets `host` start a guest whenever it boots; `drive` is for QEMU's `-drive`.
pub(crate) fn place(fixture: &Fixture, host: &str, drive: &str) {
    let image = GuestImage::find().unwrap();
    let site = fixture.lab.site();
    let line = command_line("db", Site::guest_address(1), "");
    let script = format!(
        "ip tuntap add dev tap0 mode tap\nip link set tap0 master br-lan up\n\
         exec qemu-system-x86_64 -M q35 -accel tcg -m 128 -display none -nodefaults -no-reboot \
         -serial file:{serial} -kernel {kernel} -initrd {initrd} -append '{line}' \
         -drive {drive},if=virtio,cache=none,werror=stop,rerror=stop \
         -netdev tap,id=n,ifname=tap0,script=no,downscript=no \
         -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:11,romfile= -device virtio-rng-pci\n",
        serial = serial(fixture, host).display(),
        kernel = image.kernel.display(),
        initrd = image.initrd.display(),
    );
    std::fs::write(site.data_dir(host).join("run"), script).unwrap();
}

fn serial(fixture: &Fixture, host: &str) -> PathBuf {
    fixture.lab.site().data_dir(host).join("serial")
}

/// Waits until the host's guest says that it is ready.
pub(crate) fn wait_ready(fixture: &Fixture, host: &str) {
    let file = serial(fixture, host);
    let limit = Duration::from_secs(90);
    wait::until("ready guest", limit, Duration::from_millis(20), || {
        let text = std::fs::read(&file).unwrap_or_default();
        String::from_utf8_lossy(&text)
            .contains(quorate_guest::READY_LINE)
            .then_some(())
    })
    .unwrap();
}
