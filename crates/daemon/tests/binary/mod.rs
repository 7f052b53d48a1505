//! The real binary, run against the API of a fake daemon.

use crate::common::Site;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// Longest that any command of these tests may take.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// What came of it.
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A command line, without the program, for this site's daemon.
pub(crate) fn command(site: &Site, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command
        .args(line.split_whitespace())
        .env("QUORATE_DIR", site.socket.parent().unwrap())
        .env("KERNEL", "/boot/k")
        .env("USER", "bob")
        .env_remove("SUDO_USER")
        .env("TZ", "UTC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

pub(crate) async fn run_with(site: &Site, line: &str, input: &str) -> Ran {
    let mut child = command(site, line).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command that does not read its input may have ended already.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = tokio::time::timeout(SOON, child.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    Ran {
        status: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) async fn run(site: &Site, line: &str) -> Ran {
    run_with(site, line, "").await
}
