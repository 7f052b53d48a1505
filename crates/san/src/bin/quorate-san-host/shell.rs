//! The target's side: runs commands that come on the serial port, as an administrator's shell at the SAN does.
//!
//! One line of JSON in (`words`, `input`), one out (`code`, `out`, `err`).

use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

/// Until the port is closed.
pub(super) fn serve(mut tty: File) -> io::Result<()> {
    for line in BufReader::new(tty.try_clone()?).lines() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let answer = run(&line)
            .unwrap_or_else(|error| json!({ "code": 127, "out": "", "err": error.to_string() }));
        tty.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn run(line: &str) -> io::Result<Value> {
    let asked: Value = serde_json::from_str(line)?;
    let words = asked["words"].as_array().into_iter().flatten();
    let words: Vec<&str> = words.filter_map(Value::as_str).collect();
    let (program, arguments) = words
        .split_first()
        .ok_or_else(|| io::Error::other("no command"))?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(asked["input"].as_str().unwrap_or_default().as_bytes())?;
    }
    let done = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(json!({ "code": done.status.code(), "out": text(&done.stdout), "err": text(&done.stderr) }))
}
