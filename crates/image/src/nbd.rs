//! A client of the NBD protocol, for images that `qemu-nbd` serves on a socket of this host.
//!
//! ```text
//! greeting -> structured replies? -> base:allocation? -> GO -> requests, one at a time -> disconnect
//! ```
//! Owns: the fixed newstyle negotiation and the commands that a copy needs (read, write, zeroes, flush, status).
//! Always holds: one request at a time; every answer is bounded by what was asked for; a server that says something
//! else ends the connection. Why: through NBD every format of QEMU reads and writes alike, so one copier, with one
//! journal, one checksum and one limit, serves them all.

use std::path::Path;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
const CONTEXT: &[u8] = b"base:allocation";
/// Longest answer to an option.
const OPTION_MAX: u32 = 64 << 10;
/// Longest piece of a structured answer beside data.
const CHUNK_MAX: u32 = 1 << 20;

/// A failed conversation.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection broke.
    #[error("the connection to qemu-nbd broke: {0}")]
    Io(#[from] std::io::Error),
    /// The server refused a request; the number is the system's.
    #[error("{what} failed at byte {offset}: {}", std::io::Error::from_raw_os_error(*errno))]
    Refused {
        /// `reading`, `writing`, ...
        what: &'static str,
        /// Where.
        offset: u64,
        /// System error number.
        errno: i32,
    },
    /// The server says what the protocol does not allow.
    #[error("qemu-nbd speaks another protocol: {0}")]
    Protocol(&'static str),
}

impl NbdError {
    /// There was no room for what was written.
    pub fn is_full(&self) -> bool {
        const ENOSPC: i32 = 28;
        matches!(self, Self::Refused { errno: ENOSPC, .. })
    }
}

/// A part of an image that is alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Its length in bytes.
    pub length: u64,
    /// It reads as zeroes.
    pub zero: bool,
}

/// A connection to one image.
#[derive(Debug)]
pub(crate) struct Nbd {
    stream: UnixStream,
    can_zero: bool,
    context: Option<u32>,
    last: u64,
}

impl Nbd {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When nobody listens, or not an NBD server.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, NbdError> {
        let mut me = Self {
            stream: UnixStream::connect(socket).await?,
            can_zero: false,
            context: None,
            last: 0,
        };
        if me.u64().await? != MAGIC || me.u64().await? != OPTION {
            return Err(NbdError::Protocol("no greeting"));
        }
        let no_zeroes = me.stream.read_u16().await? & 2;
        me.stream.write_u32(1 | u32::from(no_zeroes)).await?;
        const STRUCTURED_REPLY: u32 = 8;
        const SET_CONTEXT: u32 = 10;
        let (kind, _) = me.option(STRUCTURED_REPLY, &[]).await?;
        if kind == 1 {
            let mut body = vec![0, 0, 0, 0, 0, 0, 0, 1];
            body.extend((CONTEXT.len() as u32).to_be_bytes());
            body.extend(CONTEXT);
            let (kind, answer) = me.option(SET_CONTEXT, &body).await?;
            if kind == 4 && answer.len() >= 4 {
                me.context = Some(be32(&answer));
                // The list ends with an acknowledgement.
                me.option_reply(SET_CONTEXT).await?;
            }
        }
        me.go().await?;
        Ok(me)
    }

    async fn u64(&mut self) -> Result<u64, NbdError> {
        Ok(self.stream.read_u64().await?)
    }

    async fn option(&mut self, option: u32, body: &[u8]) -> Result<(u32, Vec<u8>), NbdError> {
        let mut message = OPTION.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((body.len() as u32).to_be_bytes());
        message.extend(body);
        self.stream.write_all(&message).await?;
        self.option_reply(option).await
    }

    async fn option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), NbdError> {
        if self.u64().await? != OPTION_REPLY || self.stream.read_u32().await? != option {
            return Err(NbdError::Protocol("an answer to another option"));
        }
        let kind = self.stream.read_u32().await?;
        let length = self.stream.read_u32().await?;
        if length > OPTION_MAX {
            return Err(NbdError::Protocol("a long answer to an option"));
        }
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).await?;
        Ok((kind, body))
    }

    async fn go(&mut self) -> Result<(), NbdError> {
        const GO: u32 = 7;
        // The export with the empty name; no special questions.
        let mut reply = self.option(GO, &[0; 6]).await?;
        loop {
            match reply {
                (1, _) => return Ok(()),
                (3, body) if body.len() >= 12 && body[..2] == [0, 0] => {
                    let flags = u16::from_be_bytes([body[10], body[11]]);
                    self.can_zero = flags & (1 << 6) != 0;
                }
                (3, _) => {}
                _ => return Err(NbdError::Protocol("it does not serve the image")),
            }
            reply = self.option_reply(GO).await?;
        }
    }

    async fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> Result<(), NbdError> {
        self.last += 1;
        let mut head = [0; 28];
        head[..4].copy_from_slice(&REQUEST.to_be_bytes());
        head[4..6].copy_from_slice(&flags.to_be_bytes());
        head[6..8].copy_from_slice(&command.to_be_bytes());
        head[8..16].copy_from_slice(&self.last.to_be_bytes());
        head[16..24].copy_from_slice(&offset.to_be_bytes());
        head[24..].copy_from_slice(&length.to_be_bytes());
        self.stream.write_all(&head).await?;
        self.stream.write_all(data).await?;
        Ok(())
    }

    /// Takes the pieces of an answer until the last one.
    async fn answer(
        &mut self,
        what: &'static str,
        offset: u64,
        mut into: Into<'_>,
    ) -> Result<(), NbdError> {
        let mut refused = None;
        let refuse = |errno: u32| NbdError::Refused {
            what,
            offset,
            errno: i32::try_from(errno).unwrap_or(5),
        };
        loop {
            match self.stream.read_u32().await? {
                SIMPLE => {
                    let errno = self.stream.read_u32().await?;
                    self.cookie().await?;
                    if errno != 0 {
                        return Err(refuse(errno));
                    }
                    if let Into::Data(buffer) = into {
                        self.stream.read_exact(buffer).await?;
                    }
                    return Ok(());
                }
                STRUCTURED => {
                    let flags = self.stream.read_u16().await?;
                    let kind = self.stream.read_u16().await?;
                    self.cookie().await?;
                    let length = self.stream.read_u32().await?;
                    match (kind, &mut into) {
                        (0, _) => self.skip(length).await?,
                        (1, Into::Data(buffer)) => self.data(buffer, offset, length).await?,
                        (2, Into::Data(buffer)) => self.hole(buffer, offset, length).await?,
                        (5, Into::Extents(extents)) => self.extents(extents, length).await?,
                        (kind, _) if kind & 0x8000 != 0 && length >= 4 => {
                            refused = Some(refuse(self.stream.read_u32().await?));
                            self.skip(length - 4).await?;
                        }
                        _ => return Err(NbdError::Protocol("an unknown piece")),
                    }
                    if flags & 1 != 0 {
                        return refused.map_or(Ok(()), Err);
                    }
                }
                _ => return Err(NbdError::Protocol("no answer")),
            }
        }
    }

    async fn cookie(&mut self) -> Result<(), NbdError> {
        match self.u64().await? == self.last {
            true => Ok(()),
            false => Err(NbdError::Protocol("an answer to another request")),
        }
    }

    async fn skip(&mut self, length: u32) -> Result<(), NbdError> {
        if length > CHUNK_MAX {
            return Err(NbdError::Protocol("a long piece"));
        }
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).await?;
        Ok(())
    }

    async fn data(&mut self, buffer: &mut [u8], base: u64, length: u32) -> Result<(), NbdError> {
        let at = self.u64().await?;
        let length = length.saturating_sub(8) as usize;
        let part = part(buffer, base, at, length)?;
        self.stream.read_exact(part).await?;
        Ok(())
    }

    async fn hole(&mut self, buffer: &mut [u8], base: u64, length: u32) -> Result<(), NbdError> {
        if length != 12 {
            return Err(NbdError::Protocol("a strange hole"));
        }
        let at = self.u64().await?;
        let length = self.stream.read_u32().await? as usize;
        part(buffer, base, at, length)?.fill(0);
        Ok(())
    }

    async fn extents(&mut self, extents: &mut Vec<Extent>, length: u32) -> Result<(), NbdError> {
        if !(4..=CHUNK_MAX).contains(&length) || !(length - 4).is_multiple_of(8) {
            return Err(NbdError::Protocol("strange extents"));
        }
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).await?;
        const ZERO: u32 = 2;
        if Some(be32(&bytes)) == self.context {
            extents.extend(bytes[4..].chunks_exact(8).map(|pair| Extent {
                length: u64::from(be32(pair)),
                zero: be32(&pair[4..]) & ZERO != 0,
            }));
        }
        Ok(())
    }

    /// Reads.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) async fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        let length = u32::try_from(buffer.len()).map_err(|_| NbdError::Protocol("too much"))?;
        self.request(0, 0, offset, length, &[]).await?;
        self.answer("reading", offset, Into::Data(buffer)).await
    }

    /// Writes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        let length = u32::try_from(data.len()).map_err(|_| NbdError::Protocol("too much"))?;
        self.request(1, 0, offset, length, data).await?;
        self.answer("writing", offset, Into::Nothing).await
    }

    /// Makes a part read as zeroes, giving its space back where that is possible.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) async fn zero(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        if !self.can_zero {
            return self.write(offset, &vec![0; length as usize]).await;
        }
        self.request(6, 0, offset, length, &[]).await?;
        self.answer("writing zeroes", offset, Into::Nothing).await
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) async fn flush(&mut self) -> Result<(), NbdError> {
        self.request(3, 0, 0, 0, &[]).await?;
        self.answer("flushing", 0, Into::Nothing).await
    }

    /// What is at this place: the first extent, and perhaps more. A server that cannot tell says that it is data.
    ///
    /// # Errors
    /// When it cannot be found out.
    pub(crate) async fn status(
        &mut self,
        offset: u64,
        length: u32,
    ) -> Result<Vec<Extent>, NbdError> {
        let mut extents = Vec::new();
        if self.context.is_some() {
            self.request(7, 0, offset, length, &[]).await?;
            let into = Into::Extents(&mut extents);
            self.answer("asking for holes", offset, into).await?;
        }
        extents.retain(|extent| extent.length > 0);
        if extents.is_empty() {
            extents.push(Extent {
                length: u64::from(length),
                zero: false,
            });
        }
        Ok(extents)
    }

    /// Says good-bye; `qemu-nbd` ends when its last client has.
    ///
    /// # Errors
    /// When the connection is gone already.
    pub(crate) async fn disconnect(&mut self) -> Result<(), NbdError> {
        self.request(2, 0, 0, 0, &[]).await?;
        Ok(self.stream.shutdown().await?)
    }
}

/// Where an answer goes.
enum Into<'a> {
    Nothing,
    Data(&'a mut [u8]),
    Extents(&'a mut Vec<Extent>),
}

fn be32(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk::<4>()
        .map_or(0, |four| u32::from_be_bytes(*four))
}

fn part(buffer: &mut [u8], base: u64, at: u64, length: usize) -> Result<&mut [u8], NbdError> {
    let outside = NbdError::Protocol("data that was not asked for");
    let Some(start) = at.checked_sub(base).and_then(|at| usize::try_from(at).ok()) else {
        return Err(outside);
    };
    let end = start.checked_add(length);
    end.and_then(|end| buffer.get_mut(start..end))
        .ok_or(outside)
}
