//! The channel to the agent inside a guest (`qemu-guest-agent`), one short conversation at a time.
//!
//! Owns: the synchronisation that the agent's protocol needs: what an earlier, broken conversation left in
//! the channel is skipped up to the 0xFF that precedes the answer to `guest-sync-delimited`.
//!
//! Must not: trust the guest. An answer is bounded in size and time, and proves only that the guest answers.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// An answer, with what is skipped before it, is not longer.
const ANSWER_MAX_BYTES: usize = 64 << 10;
/// Marks the answer that begins anew.
const DELIMITER: u8 = 0xFF;

static LAST_SYNC: AtomicU32 = AtomicU32::new(0);

/// Asks whether the agent is there.
///
/// # Errors
/// When it does not answer in time, or with an error.
pub async fn ping(socket: &Path, within: Duration) -> io::Result<()> {
    ask(socket, "guest-ping", within).await
}

/// Asks the guest to shut down. A guest that obeys gives no answer.
///
/// # Errors
/// When the agent does not answer the greeting in time.
pub async fn shutdown(socket: &Path, within: Duration) -> io::Result<()> {
    let talk = async {
        let mut channel = Channel::open(socket).await?;
        channel
            .send(&json!({ "execute": "guest-shutdown", "arguments": { "mode": "powerdown" } }))
            .await
    };
    timeout(within, talk).await.map_err(|_| timed_out(within))?
}

/// Makes the guest write out what its file systems hold, and hold them still.
///
/// # Errors
/// When the agent does not answer in time, or refuses. It may have obeyed all the same: thaw.
pub async fn freeze_file_systems(socket: &Path, within: Duration) -> io::Result<()> {
    ask(socket, "guest-fsfreeze-freeze", within).await
}

/// Lets the guest's file systems go on.
///
/// # Errors
/// When the agent does not answer in time, or refuses.
pub async fn thaw_file_systems(socket: &Path, within: Duration) -> io::Result<()> {
    ask(socket, "guest-fsfreeze-thaw", within).await
}

async fn ask(socket: &Path, command: &str, within: Duration) -> io::Result<()> {
    let talk = async {
        let mut channel = Channel::open(socket).await?;
        channel.send(&json!({ "execute": command })).await?;
        let answer = channel.answer().await?;
        match answer.get("return") {
            Some(_) => Ok(()),
            None => Err(io::Error::other(format!("it answered {answer}"))),
        }
    };
    timeout(within, talk).await.map_err(|_| timed_out(within))?
}

fn timed_out(within: Duration) -> io::Error {
    let detail = format!("nothing came within {} ms", within.as_millis());
    io::Error::new(io::ErrorKind::TimedOut, detail)
}

struct Channel {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Channel {
    async fn open(socket: &Path) -> io::Result<Self> {
        let mut channel = Self {
            stream: UnixStream::connect(socket).await?,
            buffer: Vec::new(),
        };
        let id = LAST_SYNC.fetch_add(1, Ordering::Relaxed);
        // The leading delimiter makes the agent drop half a command left by somebody else.
        channel.stream.write_all(&[DELIMITER]).await?;
        channel
            .send(&json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } }))
            .await?;
        loop {
            channel.skip_to_delimiter().await?;
            let answer = channel.answer().await?;
            if answer.get("return").and_then(Value::as_u64) == Some(u64::from(id)) {
                return Ok(channel);
            }
        }
    }

    async fn send(&mut self, command: &Value) -> io::Result<()> {
        self.stream
            .write_all(format!("{command}\n").as_bytes())
            .await
    }

    async fn skip_to_delimiter(&mut self) -> io::Result<()> {
        let mut skipped = 0;
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == DELIMITER) {
                self.buffer.drain(..=at);
                return Ok(());
            }
            skipped += self.buffer.len();
            self.buffer.clear();
            if skipped > ANSWER_MAX_BYTES {
                return Err(io::Error::other("it sends data without end"));
            }
            self.fill().await?;
        }
    }

    async fn answer(&mut self) -> io::Result<Value> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=at).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            if self.buffer.len() > ANSWER_MAX_BYTES {
                return Err(io::Error::other("its answer is too long"));
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk).await? {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the channel was closed",
            )),
            read => {
                self.buffer.extend_from_slice(&chunk[..read]);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn skips_what_an_earlier_conversation_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = async {
            let stream = listener.accept().await.unwrap().0;
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            stream.read_until(b'\n', &mut line).await.unwrap();
            assert_eq!(line[0], DELIMITER);
            let sync: Value = serde_json::from_slice(&line[1..]).unwrap();
            let id = &sync["arguments"]["id"];
            let stale = b"{\"return\": {\"old\": 1}}\nhalf an ans\xff{\"return\": 424242}\n";
            stream.write_all(stale).await.unwrap();
            stream.write_all(&[DELIMITER]).await.unwrap();
            stream
                .write_all(format!("{{\"return\": {id}}}\n").as_bytes())
                .await
                .unwrap();
            line.clear();
            stream.read_until(b'\n', &mut line).await.unwrap();
            assert!(String::from_utf8_lossy(&line).contains("guest-ping"));
            stream.write_all(b"{\"return\": {}}\n").await.unwrap();
        };
        let (ping, ()) = tokio::join!(ping(&path, Duration::from_secs(5)), agent);
        ping.unwrap();
    }

    #[tokio::test]
    async fn file_systems_are_frozen_and_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = tokio::spawn(async move {
            let mut asked = Vec::new();
            for answer in ["{\"return\": 3}", "{\"error\": {\"desc\": \"not frozen\"}}"] {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let mut line = Vec::new();
                stream.read_until(b'\n', &mut line).await.unwrap();
                let sync: Value = serde_json::from_slice(&line[1..]).unwrap();
                let id = &sync["arguments"]["id"];
                let text = format!("\u{ff}{{\"return\": {id}}}\n");
                let bytes: Vec<u8> = text.chars().map(|c| c as u32 as u8).collect();
                stream.write_all(&bytes).await.unwrap();
                line.clear();
                stream.read_until(b'\n', &mut line).await.unwrap();
                let command: Value = serde_json::from_slice(&line).unwrap();
                asked.push(command["execute"].as_str().unwrap().to_owned());
                stream
                    .write_all(format!("{answer}\n").as_bytes())
                    .await
                    .unwrap();
            }
            asked
        });
        let within = Duration::from_secs(5);
        freeze_file_systems(&path, within).await.unwrap();
        let refused = thaw_file_systems(&path, within).await.unwrap_err();
        assert!(refused.to_string().contains("not frozen"), "{refused}");
        let asked = agent.await.unwrap();
        assert_eq!(asked, ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
    }

    #[tokio::test]
    async fn a_silent_agent_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = ping(&path, Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
