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
    /// What it is asked or told: `status`, `sick`, `rogue 10.77.0.9`.
    #[arg(default_value = "status")]
    pub word: String,
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

/// The guest's answer in one line, for `status` JSON.
pub fn run(args: &StatusArgs) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&args.target, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(format!("{}\n", args.word).as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let line = line.trim();
    Ok(match line {
        // What the reader of a tool's report reads.
        "ok" => "true".to_owned(),
        _ => line.to_owned(),
    })
}
