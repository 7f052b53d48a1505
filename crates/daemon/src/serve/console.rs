//! Serial consoles and their logs: read from the file that QEMU writes, written to the socket that
//! QEMU listens on; from another host by polling it.

use super::core::Core;
use super::peer::{self, Answer, Ask};
use quorate_api::{ApiError, Console, ErrorCode, LogOptions, LogStream};
use quorate_controller::Group as _;
use quorate_transport::RpcStatus;
use quorate_types::VmName;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

/// Most bytes of a log in one answer.
const PIECE: u64 = 64 * 1024;
/// How far back a log is searched for its last lines.
const TAIL: u64 = 256 * 1024;
/// How often the log of a followed console is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Bound for one question to another host.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// Consoles of the guests on this host.
pub(crate) struct Consoles {
    /// `VM -> serial log`, by the agent's layout.
    pub(crate) log: Box<dyn Fn(&VmName) -> PathBuf + Send + Sync>,
    /// `VM -> serial socket`.
    pub(crate) socket: Box<dyn Fn(&VmName) -> PathBuf + Send + Sync>,
}

impl Consoles {
    /// A piece of a log from `offset`; `u64::MAX` asks for the size only.
    pub(crate) async fn read(
        &self,
        vm: &VmName,
        offset: u64,
        limit: u64,
    ) -> Result<Answer, RpcStatus> {
        let path = (self.log)(vm);
        let work = move || -> std::io::Result<Answer> {
            let mut file = std::fs::File::open(&path)?;
            let size = file.metadata()?.len();
            let offset = offset.min(size);
            file.seek(SeekFrom::Start(offset))?;
            let mut bytes = Vec::new();
            file.take(limit.min(PIECE)).read_to_end(&mut bytes)?;
            Ok(Answer::Log {
                offset,
                size,
                bytes,
            })
        };
        let failed = |error: std::io::Error| {
            RpcStatus::new(
                404,
                format!("the serial log of {vm} cannot be read: {error}"),
            )
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(answer) => answer.map_err(failed),
            Err(error) => Err(RpcStatus::new(500, error.to_string())),
        }
    }

    /// Input for a console.
    pub(crate) async fn write(&self, vm: &VmName, input: &[u8]) -> Result<Answer, RpcStatus> {
        let path = (self.socket)(vm);
        let send = async {
            let mut socket = tokio::net::UnixStream::connect(&path).await?;
            socket.write_all(input).await?;
            socket.shutdown().await
        };
        match tokio::time::timeout(ASK_TIMEOUT, send).await {
            Ok(Ok(())) => Ok(Answer::Done("written".into())),
            Ok(Err(error)) => Err(RpcStatus::new(
                404,
                format!("the console of {vm} cannot be written: {error}"),
            )),
            Err(_) => Err(RpcStatus::new(
                503,
                format!("the console of {vm} takes no input: somebody else is connected"),
            )),
        }
    }
}

async fn ask_host(core: &Core, vm: &VmName, ask: Ask) -> Result<Answer, ApiError> {
    let state = core.state();
    let record = state.vms.get(vm);
    let record = record.ok_or_else(|| {
        ApiError::unknown("VM", vm.as_str(), state.vms.keys().map(VmName::as_str))
    })?;
    let host = record.ownership.host().or(record.last_host.as_ref());
    let host = host.ok_or_else(|| {
        ApiError::new(
            ErrorCode::Conflict,
            format!("VM {vm} has never run: it has no console"),
        )
    })?;
    if *host == core.me {
        let answer = match ask {
            Ask::ConsoleRead { vm, offset, limit } => core.consoles.read(&vm, offset, limit).await,
            Ask::ConsoleWrite { vm, input } => core.consoles.write(&vm, &input).await,
            _ => Err(RpcStatus::new(500, "not a question about a console")),
        };
        return answer.map_err(|status| ApiError::new(ErrorCode::NotFound, status.message));
    }
    let node = state.hosts.get(host).map(|record| record.node);
    let node =
        node.ok_or_else(|| ApiError::new(ErrorCode::Unreachable, format!("host {host} is gone")))?;
    debug_assert_ne!(node, core.group.node());
    peer::ask(&core.peers, node, &ask, ASK_TIMEOUT)
        .await
        .map_err(|error| ApiError::new(ErrorCode::Unreachable, error.to_string()))
}

async fn read(
    core: &Core,
    vm: &VmName,
    offset: u64,
    limit: u64,
) -> Result<(u64, u64, Vec<u8>), ApiError> {
    match ask_host(
        core,
        vm,
        Ask::ConsoleRead {
            vm: vm.clone(),
            offset,
            limit,
        },
    )
    .await?
    {
        Answer::Log {
            offset,
            size,
            bytes,
        } => Ok((offset, size, bytes)),
        _ => Err(super::core::wrong_answer()),
    }
}

/// Where the last `lines` lines begin, and the bytes from there.
async fn tail(core: &Core, vm: &VmName, lines: u32) -> Result<(u64, Vec<u8>), ApiError> {
    let (_, size, _) = read(core, vm, u64::MAX, 0).await?;
    let mut at = size.saturating_sub(TAIL);
    let mut bytes = Vec::new();
    while at < size {
        let (offset, _, piece) = read(core, vm, at, PIECE).await?;
        if piece.is_empty() {
            break;
        }
        at = offset + piece.len() as u64;
        bytes.extend(piece);
    }
    let mut wanted = lines as usize + usize::from(bytes.ends_with(b"\n"));
    let start = bytes.iter().rposition(|byte| {
        wanted -= usize::from(*byte == b'\n' && wanted > 0);
        wanted == 0
    });
    let start = start.map_or(0, |newline| newline + 1);
    bytes.drain(..start.min(bytes.len()));
    Ok((at, bytes))
}

/// The log, optionally followed.
pub(crate) async fn logs(
    core: Arc<Core>,
    vm: VmName,
    options: LogOptions,
) -> Result<LogStream, ApiError> {
    let (at, first) = tail(&core, &vm, options.lines).await?;
    let (mut ours, theirs) = tokio::io::duplex(PIECE as usize);
    tokio::spawn(async move {
        if ours.write_all(&first).await.is_err() || !options.follow {
            return;
        }
        follow(&core, &vm, at, &mut ours).await;
    });
    Ok(Box::pin(futures_util::stream::unfold(
        theirs,
        |mut theirs| async move {
            let mut buffer = vec![0; 8192];
            match theirs.read(&mut buffer).await {
                Ok(0) => None,
                Ok(n) => {
                    buffer.truncate(n);
                    Some((Ok(buffer.into()), theirs))
                }
                Err(error) => Some((Err(error), theirs)),
            }
        },
    )))
}

/// Waits a moment. Returns whether the reader is still there: a log to which nothing is added for long must not be
/// polled for ever for somebody who has gone.
async fn pause(reader: &mut DuplexStream) -> bool {
    let mut nothing = [0; 1];
    let gone = tokio::time::timeout(POLL, reader.read(&mut nothing)).await;
    !matches!(gone, Ok(Ok(0) | Err(_)))
}

/// Copies what comes until the reader goes away. A guest that moves goes on in another host's log.
async fn follow(core: &Core, vm: &VmName, mut at: u64, out: &mut DuplexStream) {
    loop {
        match read(core, vm, at, PIECE).await {
            Ok((_, size, _)) if size < at => at = 0,
            Ok((offset, _, bytes)) if !bytes.is_empty() => {
                at = offset + bytes.len() as u64;
                if out.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            _ if pause(out).await => {}
            _ => return,
        }
    }
}

/// Both directions of a console.
pub(crate) async fn console(core: Arc<Core>, vm: VmName) -> Result<Console, ApiError> {
    let (at, first) = tail(&core, &vm, 20).await?;
    let (ours, theirs) = tokio::io::duplex(PIECE as usize);
    let (mut from_user, to_user) = tokio::io::split(ours);
    let reader = Arc::clone(&core);
    let name = vm.clone();
    let copy = tokio::spawn(async move {
        let mut to_user = to_user;
        if to_user.write_all(&first).await.is_err() {
            return;
        }
        let mut at = at;
        loop {
            match read(&reader, &name, at, PIECE).await {
                Ok((_, size, _)) if size < at => at = 0,
                Ok((offset, _, bytes)) if !bytes.is_empty() => {
                    at = offset + bytes.len() as u64;
                    if to_user.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                _ => tokio::time::sleep(POLL).await,
            }
        }
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok(n) = from_user.read(&mut buffer).await {
            if n == 0 {
                break;
            }
            let ask = Ask::ConsoleWrite {
                vm: vm.clone(),
                input: buffer[..n].to_vec(),
            };
            if ask_host(&core, &vm, ask).await.is_err() {
                break;
            }
        }
        copy.abort();
    });
    Ok(Box::new(theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_that_has_gone_is_noticed_although_nothing_is_written() {
        let (mut ours, theirs) = tokio::io::duplex(64);
        assert!(pause(&mut ours).await);
        drop(theirs);
        assert!(!pause(&mut ours).await);
    }
}
