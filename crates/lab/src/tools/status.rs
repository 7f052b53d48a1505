//! Asks a guest how it is, once.

use quorate_guest::log::GuestBoot;
use serde::{Deserialize, Serialize};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(5);

/// Arguments of the tool.
#[derive(Debug, Clone, clap::Args)]
pub struct StatusArgs {
    /// Address and port of the guest's control.
    pub target: SocketAddr,
}

/// What a guest says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its name.
    pub name: String,
    /// Its life: another one after every boot, the same after a live migration.
    pub boot_id: GuestBoot,
    /// Time since its boot.
    pub uptime_ms: u64,
    /// Newest durable record.
    pub last_acked_seq: u64,
    /// It has announced readiness.
    pub ready: bool,
}

/// One line of JSON, as the guest sent it.
pub fn run(args: &StatusArgs) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&args.target, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"status\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.trim().to_owned())
}
