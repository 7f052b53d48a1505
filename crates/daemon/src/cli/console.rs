//! The serial console: this terminal in raw mode, joined to the guest's.

use super::error::CliError;
use quorate_api::Client;
use quorate_types::VmName;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io::{IsTerminal as _, Write as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Ctrl-] ends the connection.
const ESCAPE: u8 = 0x1d;

/// The terminal as it was before; put back when dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Option<Self>, CliError> {
        if !std::io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(std::io::stdin()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(std::io::Error::from)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal is gone: there is nothing to put back.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

pub(crate) async fn run(client: &Client, vm: &VmName) -> Result<(), CliError> {
    let (mut from_guest, mut to_guest) = tokio::io::split(client.console(vm.as_str()).await?);
    let mut input = keys()?;
    eprintln!("Connected to {vm}. Ctrl-] ends the connection.");
    let raw = RawMode::enter()?;
    let mut buffer = vec![0; 4096];
    let mut typing = true;
    let why = loop {
        tokio::select! {
            read = from_guest.read(&mut buffer) => match read {
                Ok(0) | Err(_) => break "the console was closed",
                Ok(n) => {
                    let mut out = std::io::stdout();
                    out.write_all(&buffer[..n])?;
                    out.flush()?;
                }
            },
            typed = input.recv(), if typing => match typed {
                Some(bytes) => {
                    let end = bytes.iter().position(|byte| *byte == ESCAPE);
                    if to_guest.write_all(&bytes[..end.unwrap_or(bytes.len())]).await.is_err() {
                        break "the console was closed";
                    }
                    if end.is_some() {
                        break "disconnected";
                    }
                }
                // The end of a piped input: the guest's output goes on.
                None => typing = false,
            },
        }
    };
    drop(raw);
    eprintln!("\n{vm}: {why}.");
    Ok(())
}

/// Standard input in pieces, read by a thread of its own: a read of a terminal cannot be cancelled,
/// and must not keep the program from ending.
fn keys() -> Result<tokio::sync::mpsc::Receiver<Vec<u8>>, CliError> {
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    std::thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || {
            use std::io::Read as _;
            let mut stdin = std::io::stdin();
            let mut buffer = [0; 1024];
            while let Ok(n) = stdin.read(&mut buffer) {
                if n == 0 || sender.blocking_send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        })?;
    Ok(receiver)
}
