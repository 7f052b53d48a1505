//! Writes an initramfs (cpio, format `newc`): same input, same bytes.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::process::ExitCode;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

pub(crate) fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((word, [output, files @ ..])) if word == "pack" => match pack(files) {
            Ok(archive) => match std::fs::write(output, archive) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&format!("cannot write {output}: {error}")),
            },
            Err(error) => fail(&error.to_string()),
        },
        _ => {
            fail("this is the init program of a lab guest; usage: pack OUTPUT [GUEST_PATH=FILE]...")
        }
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("quorate-guest-init: {message}");
    ExitCode::FAILURE
}

fn pack(files: &[String]) -> io::Result<Vec<u8>> {
    let mut archive = Archive::default();
    // Before devtmpfs is mounted, the kernel opens the console and the Rust runtime /dev/null.
    archive.directories("dev/console");
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    for file in files {
        let (target, source) = file
            .split_once('=')
            .ok_or_else(|| io::Error::other(format!("`{file}` is not GUEST_PATH=FILE")))?;
        let target = target.trim_start_matches('/');
        let content = std::fs::read(source)
            .map_err(|error| io::Error::other(format!("cannot read {source}: {error}")))?;
        archive.directories(target);
        archive.entry(target, PROGRAM, (0, 0), &content);
    }
    archive.entry("TRAILER!!!", 0, (0, 0), &[]);
    Ok(archive.bytes)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    made: BTreeSet<String>,
}

impl Archive {
    fn directories(&mut self, path: &str) {
        let mut parents: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
        parents.reverse();
        for parent in parents {
            let name = parent.to_string_lossy().into_owned();
            if !name.is_empty() && self.made.insert(name.clone()) {
                self.entry(&name, DIRECTORY, (0, 0), &[]);
            }
        }
    }

    fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_length = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            major,
            minor,
            name_length,
            0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
