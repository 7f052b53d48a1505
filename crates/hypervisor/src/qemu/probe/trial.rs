//! The trial boot: does this accelerator really run guest code?
//!
//! With a kernel: it must get as far as its file system layer, which no broken virtualisation survives.
//! Without: a boot sector, started by the firmware, must end QEMU with a code that nothing else gives.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use super::{ProbeOptions, Scratch};
use crate::config::Accel;

/// `cli; mov al, 0x21; out 0xf4, al; hlt; jmp -3`
const BOOT_CODE: [u8; 8] = [0xFA, 0xB0, 0x21, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD];
/// QEMU's debug port ends it with (value x 2) + 1.
const BOOT_CODE_STATUS: i32 = 0x21 * 2 + 1;
/// The firmware boots no smaller disk.
const IMAGE_BYTES: usize = 1 << 20;
/// What a kernel says when it has brought up its CPU, memory and devices.
const KERNEL_MARKS: [&str; 2] = ["VFS: ", "Run /"];
/// A kernel that says more than this without one of the marks is broken.
const KERNEL_LINES_MAX: usize = 10_000;
/// How much of QEMU's messages is quoted.
const STDERR_MAX_BYTES: usize = 512;

pub(super) async fn boot(options: &ProbeOptions, accel: Accel) -> Result<String, String> {
    let begun = tokio::time::Instant::now();
    let trial = async {
        match &options.kernel {
            Some(kernel) => boot_kernel(options, accel, kernel).await,
            None => boot_sector(options, accel).await,
        }
    };
    let within = options.trial_within;
    match timeout(within, trial).await {
        Ok(Ok(what)) => Ok(format!("{what} after {} ms", begun.elapsed().as_millis())),
        Ok(Err(reason)) => Err(reason),
        Err(_) => Err(format!(
            "the guest did not come up within {} ms",
            within.as_millis()
        )),
    }
}

fn command(options: &ProbeOptions, accel: Accel) -> Command {
    let mut command = Command::new(&options.binary);
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-machine",
            "q35",
            "-cpu",
            "max",
            "-m",
            "128",
            "-accel",
            accel.as_str(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn boot_kernel(
    options: &ProbeOptions,
    accel: Accel,
    kernel: &std::path::Path,
) -> Result<String, String> {
    let mut command = command(options, accel);
    command
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", "console=ttyS0 panic=-1"]);
    command.args(["-serial", "stdio"]);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let mut said = child
        .stdout
        .take()
        .map(|out| BufReader::new(out).split(b'\n'));
    for _ in 0..KERNEL_LINES_MAX {
        let line = match &mut said {
            Some(lines) => lines
                .next_segment()
                .await
                .map_err(|error| error.to_string())?,
            None => None,
        };
        let Some(line) = line else {
            return Err(ended(&mut child).await);
        };
        let line = String::from_utf8_lossy(&line);
        if KERNEL_MARKS.iter().any(|mark| line.contains(mark)) {
            return Ok("a kernel came up".to_owned());
        }
    }
    Err("the kernel talks without end".to_owned())
}

async fn boot_sector(options: &ProbeOptions, accel: Accel) -> Result<String, String> {
    let image = Scratch::new(&options.scratch_dir, "boot.img");
    let mut bytes = vec![0; IMAGE_BYTES];
    bytes[..BOOT_CODE.len()].copy_from_slice(&BOOT_CODE);
    bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
    tokio::fs::write(&image.path, bytes)
        .await
        .map_err(|error| error.to_string())?;
    let mut command = command(options, accel);
    command
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .arg("-blockdev")
        .arg(format!(
            "driver=raw,node-name=boot,read-only=on,file.driver=file,file.filename={}",
            image.path_escaped()
        ))
        .args(["-device", "virtio-blk-pci,drive=boot,bootindex=0"]);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let status = child.wait().await.map_err(|error| error.to_string())?;
    if status.code() == Some(BOOT_CODE_STATUS) {
        return Ok("a boot sector ran".to_owned());
    }
    Err(ended(&mut child).await)
}

/// How QEMU ended, with its own words.
async fn ended(child: &mut tokio::process::Child) -> String {
    let status = match child.wait().await {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let mut words = vec![0; STDERR_MAX_BYTES];
    let read = match &mut child.stderr {
        Some(stderr) => stderr.read(&mut words).await.unwrap_or(0),
        None => 0,
    };
    let words = String::from_utf8_lossy(&words[..read]);
    let words: Vec<&str> = words.split_whitespace().collect();
    format!("QEMU ended ({status}): {}", words.join(" "))
}
