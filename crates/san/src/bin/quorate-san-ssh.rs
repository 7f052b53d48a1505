//! Stands for `ssh root@san`: runs a command in the target's guest, over its serial port.
//!
//! `quorate-san-ssh SOCKET COMMAND...`, with the command's input on the standard input. It is what a pool's `access` names in
//! `via`, so the driver that is tried is the real one.

use serde_json::{Value, json};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("quorate-san-ssh: {error}");
            ExitCode::from(255)
        }
    }
}

fn run() -> io::Result<u8> {
    let mut words = std::env::args().skip(1);
    let socket = words
        .next()
        .ok_or_else(|| io::Error::other("usage: quorate-san-ssh SOCKET COMMAND..."))?;
    let words: Vec<String> = words.collect();
    let mut input = String::new();
    io::stdin().read_to_string(&mut input)?;
    let mut port = UnixStream::connect(socket)?;
    let asked = json!({ "words": words, "input": input });
    port.write_all(format!("{asked}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(port).read_line(&mut line)?;
    let told: Value = serde_json::from_str(&line)?;
    io::stdout().write_all(told["out"].as_str().unwrap_or_default().as_bytes())?;
    io::stderr().write_all(told["err"].as_str().unwrap_or_default().as_bytes())?;
    Ok(told["code"].as_u64().map_or(255, |code| code as u8))
}
