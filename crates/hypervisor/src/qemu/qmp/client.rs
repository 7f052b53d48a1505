//! The connection: one task owns the socket, replies find their caller by id.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OnceCell, broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::schema::Schema;

/// Commands in flight on one connection.
const PENDING_MAX: usize = 64;
/// Events kept for a slow reader.
const EVENTS_MAX: usize = 512;
/// The longest line QEMU sends is its schema, about 300 KB.
const LINE_MAX_BYTES: usize = 16 << 20;

/// Why a QMP command, or the connection, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket cannot be opened.
    #[error("cannot connect to QEMU at {}", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Whoever listens there does not greet as QEMU does.
    #[error("no QMP greeting at {}: {detail}", .path.display())]
    Greeting {
        /// The socket.
        path: PathBuf,
        /// What was seen.
        detail: String,
    },
    /// The connection is lost; the guest may well be alive.
    #[error("the QMP connection was lost before `{command}` was answered")]
    Closed {
        /// The command.
        command: String,
    },
    /// QEMU did not answer in time. The command may still take effect.
    #[error("QEMU did not answer `{command}` within {after_ms} ms")]
    Timeout {
        /// The command.
        command: String,
        /// The deadline.
        after_ms: u64,
    },
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error, e.g. `GenericError`, `CommandNotFound`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// Too many commands wait for an answer.
    #[error("`{command}` was not sent: {PENDING_MAX} commands wait for an answer already")]
    Busy {
        /// The command.
        command: String,
    },
}

impl QmpError {
    /// QEMU's own words, when it answered.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { desc, .. } => Some(desc),
            _ => None,
        }
    }
}

/// An event, as it came.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// Its name, e.g. `STOP`.
    pub name: String,
    /// Its payload; `Null` when it has none.
    pub data: Value,
    /// When QEMU said it, microseconds since 1970; 0 when it did not say.
    pub at_us: u64,
}

/// What QEMU said when the connection was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Version: major, minor, micro.
    pub version: (u64, u64, u64),
    /// The distribution's name for the build.
    pub package: String,
}

/// One QMP connection; cheap to clone. It is closed when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct QmpClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    greeting: Greeting,
    calls: Arc<Mutex<Calls>>,
    lines: mpsc::Sender<String>,
    events: broadcast::Sender<QmpEvent>,
    closed: watch::Receiver<bool>,
    schema: OnceCell<Arc<Schema>>,
}

type Reply = Result<Value, Refusal>;

#[derive(Debug)]
struct Refusal {
    class: String,
    desc: String,
}

/// Who waits for which answer.
#[derive(Debug, Default)]
struct Calls {
    waiting: BTreeMap<u64, oneshot::Sender<Reply>>,
    last_id: u64,
    closed: bool,
}

/// Forgets the call when its caller gives up, so that the map stays bounded.
struct Forget<'a> {
    calls: &'a Mutex<Calls>,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.calls).waiting.remove(&self.id);
    }
}

fn lock(calls: &Mutex<Calls>) -> std::sync::MutexGuard<'_, Calls> {
    // Nothing in a critical section can leave the map half changed.
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QmpClient {
    /// Connects, reads the greeting and leaves negotiation mode, all within `within`.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::Greeting`], or that of the first command.
    pub async fn connect(path: &Path, within: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + within;
        let greeting_error = |detail: String| QmpError::Greeting {
            path: path.to_path_buf(),
            detail,
        };
        let stream = match timeout_at(deadline, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => {
                return Err(QmpError::Connect {
                    path: path.to_path_buf(),
                    source,
                });
            }
            Err(_) => return Err(greeting_error("its queue of connections is full".into())),
        };
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let mut line = Vec::new();
        let greeting = match timeout_at(deadline, read_line(&mut read, &mut line)).await {
            Ok(Ok(true)) => serde_json::from_slice(&line)
                .ok()
                .and_then(|value| parse_greeting(&value))
                .ok_or_else(|| greeting_error("the first line is no greeting".into()))?,
            Ok(Ok(false)) => return Err(greeting_error("the connection was closed".into())),
            Ok(Err(error)) => return Err(greeting_error(error.to_string())),
            Err(_) => {
                let detail = format!(
                    "nothing came within {} ms; another client may hold the socket, or QEMU hangs",
                    within.as_millis()
                );
                return Err(greeting_error(detail));
            }
        };
        let client = Self::run(greeting, read, write);
        let left = deadline.saturating_duration_since(Instant::now());
        client
            .execute("qmp_capabilities", Value::Null, left)
            .await?;
        Ok(client)
    }

    fn run(greeting: Greeting, read: BufReader<OwnedReadHalf>, write: OwnedWriteHalf) -> Self {
        let calls = Arc::new(Mutex::new(Calls::default()));
        let (lines, line_rx) = mpsc::channel(PENDING_MAX);
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let (closed_tx, closed) = watch::channel(false);
        let (task_calls, task_events) = (calls.clone(), events.clone());
        tokio::spawn(async move {
            // Both directions in one task: neither waits for the other, and the end of one ends both.
            tokio::select! {
                () = read_all(read, &task_calls, &task_events) => {}
                () = write_all(write, line_rx) => {}
            }
            let mut calls = lock(&task_calls);
            calls.closed = true;
            calls.waiting.clear();
            drop(calls);
            closed_tx.send_replace(true);
        });
        let inner = Inner {
            greeting,
            calls,
            lines,
            events,
            closed,
            schema: OnceCell::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// What QEMU said when the connection was made.
    #[must_use]
    pub fn greeting(&self) -> &Greeting {
        &self.inner.greeting
    }

    /// Events from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.inner.events.subscribe()
    }

    /// Resolves when the connection is lost.
    pub async fn closed(&self) {
        let mut closed = self.inner.closed.clone();
        // An error means that the task has ended, which is the same.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Whether the connection is lost.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.inner.closed.borrow()
    }

    /// Runs a command. `arguments` is an object, or `Null` for none.
    ///
    /// # Errors
    /// See [`QmpError`]. After [`QmpError::Timeout`] or [`QmpError::Closed`] the command may have worked.
    pub async fn execute(
        &self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + within;
        let closed = || QmpError::Closed {
            command: command.to_owned(),
        };
        let (reply, answer) = oneshot::channel();
        let id = {
            let mut calls = lock(&self.inner.calls);
            if calls.closed {
                return Err(closed());
            }
            if calls.waiting.len() >= PENDING_MAX {
                return Err(QmpError::Busy {
                    command: command.to_owned(),
                });
            }
            calls.last_id += 1;
            let id = calls.last_id;
            calls.waiting.insert(id, reply);
            id
        };
        let _forget = Forget {
            calls: &self.inner.calls,
            id,
        };
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let sent = timeout_at(deadline, self.inner.lines.send(format!("{request}\n"))).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(closed()),
            Err(_) => return Err(timed_out(command, within)),
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(Refusal { class, desc }))) => Err(QmpError::Refused {
                command: command.to_owned(),
                class,
                desc,
            }),
            Ok(Err(_)) => Err(closed()),
            Err(_) => Err(timed_out(command, within)),
        }
    }

    /// What this QEMU can do; asked once per connection.
    ///
    /// # Errors
    /// That of the command `query-qmp-schema`.
    pub async fn schema(&self, within: Duration) -> Result<Arc<Schema>, QmpError> {
        let ask = async || {
            let reply = self
                .execute("query-qmp-schema", Value::Null, within)
                .await?;
            Ok(Arc::new(Schema::parse(&reply)))
        };
        self.inner.schema.get_or_try_init(ask).await.cloned()
    }
}

fn timed_out(command: &str, within: Duration) -> QmpError {
    let after_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
    QmpError::Timeout {
        command: command.to_owned(),
        after_ms,
    }
}

fn parse_greeting(value: &Value) -> Option<Greeting> {
    let version = value.get("QMP")?.get("version")?;
    let part = |name: &str| version.get("qemu")?.get(name)?.as_u64();
    let package = version
        .get("package")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    Some(Greeting {
        version: (part("major")?, part("minor")?, part("micro")?),
        package,
    })
}

/// Reads one line into `line`; false at the end of the stream.
async fn read_line<R: AsyncBufRead + Unpin>(
    read: &mut R,
    line: &mut Vec<u8>,
) -> std::io::Result<bool> {
    line.clear();
    loop {
        let chunk = read.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(false);
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(chunk.len(), |at| at + 1);
        line.extend_from_slice(&chunk[..used]);
        read.consume(used);
        if end.is_some() {
            return Ok(true);
        }
        if line.len() > LINE_MAX_BYTES {
            return Err(std::io::Error::other("a line without end"));
        }
    }
}

async fn read_all(
    mut read: BufReader<OwnedReadHalf>,
    calls: &Mutex<Calls>,
    events: &broadcast::Sender<QmpEvent>,
) {
    let mut line = Vec::new();
    loop {
        match read_line(&mut read, &mut line).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::debug!(%error, "QMP connection lost");
                return;
            }
        }
        match serde_json::from_slice::<Value>(&line) {
            Ok(value) => dispatch(value, calls, events),
            Err(error) => tracing::warn!(%error, "skipped a QMP line that is not JSON"),
        }
    }
}

fn dispatch(mut value: Value, calls: &Mutex<Calls>, events: &broadcast::Sender<QmpEvent>) {
    if let Some(name) = value.get("event").and_then(Value::as_str) {
        let name = name.to_owned();
        let data = value.get_mut("data").map(Value::take).unwrap_or_default();
        let at_us = stamp(&value["timestamp"]);
        // No subscriber is no error.
        let _ = events.send(QmpEvent { name, data, at_us });
        return;
    }
    let Some(id) = value.get("id").and_then(Value::as_u64) else {
        tracing::warn!(%value, "skipped a QMP message that is neither event nor reply");
        return;
    };
    let caller = lock(calls).waiting.remove(&id);
    let Some(caller) = caller else {
        tracing::debug!(id, "a QMP reply came after its caller had given up");
        return;
    };
    let reply = if let Some(value) = value.get_mut("return") {
        Ok(value.take())
    } else {
        let text = |name: &str| {
            let field = value.get("error").and_then(|error| error.get(name));
            field
                .and_then(Value::as_str)
                .unwrap_or("unknown")
                .to_owned()
        };
        Err(Refusal {
            class: text("class"),
            desc: text("desc"),
        })
    };
    let _ = caller.send(reply);
}

/// Both parts are -1 where QEMU has no clock.
fn stamp(timestamp: &Value) -> u64 {
    let part = |name: &str| timestamp.get(name).and_then(Value::as_u64);
    match (part("seconds"), part("microseconds")) {
        (Some(seconds), Some(micros)) => seconds.saturating_mul(1_000_000).saturating_add(micros),
        _ => 0,
    }
}

async fn write_all(mut write: OwnedWriteHalf, mut lines: mpsc::Receiver<String>) {
    while let Some(line) = lines.recv().await {
        if let Err(error) = write.write_all(line.as_bytes()).await {
            tracing::debug!(%error, "QMP connection lost");
            return;
        }
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
