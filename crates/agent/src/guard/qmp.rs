//! The guard's QMP client: non-blocking, one command at a time, no runtime.
//!
//! Always holds: lines that are not understood are skipped; a line longer than the bound ends the connection;
//! losing the connection is no news about the guest.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Longest line.
const LINE_MAX: usize = 256 * 1024;

/// Something QEMU said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The greeting was answered: commands are taken.
    Ready,
    /// The guest's CPUs run again.
    Resumed,
    /// The return of the command under way.
    Return(Value),
    /// Its error class.
    Error(String),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    line: Vec<u8>,
    ready: bool,
    /// Number of the last command; answers to earlier ones are late.
    id: u64,
}

impl Qmp {
    /// Connects without waiting.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self {
            stream: UnixStream::from(socket),
            line: Vec::with_capacity(16 * 1024),
            ready: false,
            id: 0,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    /// Sends a command; its return is the next [`Said::Return`] or [`Said::Error`].
    pub(super) fn send(&mut self, command: &str, arguments: &str) -> io::Result<()> {
        self.id += 1;
        let id = self.id;
        let text =
            format!("{{\"execute\":\"{command}\",\"arguments\":{arguments},\"id\":{id}}}\r\n");
        // The socket is empty but for this: a short write means that QEMU hangs.
        let written = (&self.stream).write(text.as_bytes())?;
        if written < text.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Reads what has come.
    ///
    /// # Errors
    /// When the connection is over.
    pub(super) fn read(&mut self, said: &mut Vec<Said>) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let len = match (&self.stream).read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for byte in &buffer[..len] {
                if *byte == b'\n' {
                    let line = std::mem::take(&mut self.line);
                    let taken = self.take(&line);
                    self.line = line;
                    self.line.clear();
                    said.extend(taken?);
                } else if self.line.len() >= LINE_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                } else {
                    self.line.push(*byte);
                }
            }
        }
    }

    fn take(&mut self, line: &[u8]) -> io::Result<Option<Said>> {
        let Ok(mut value) = serde_json::from_slice::<Value>(line) else {
            return Ok(None);
        };
        if value.get("QMP").is_some() {
            self.send("qmp_capabilities", "{}")?;
            return Ok(None);
        }
        if value["event"] == "RESUME" {
            return Ok(Some(Said::Resumed));
        }
        if value["id"].as_u64() != Some(self.id) {
            return Ok(None);
        }
        if let Some(error) = value.get("error") {
            let class = error["class"].as_str().unwrap_or("GenericError");
            return Ok(Some(Said::Error(class.to_owned())));
        }
        if !self.ready {
            self.ready = true;
            return Ok(Some(Said::Ready));
        }
        let value = value.get_mut("return").map(Value::take);
        Ok(value.map(Said::Return))
    }
}
