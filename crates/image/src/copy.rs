//! The copier: from one served image to another, with a checksum, a limit, and marks from which it can go on.
//!
//! ```text
//! reader: extents of the source --(zeroes | data)--> [4 pieces] --> hash, limit --> write --> every 64 MiB: flush, mark
//! ```
//! Always holds: a mark is given only for what is flushed; the hash covers every byte of the guest-visible content in
//! order, what an earlier run copied included (that part is read again, not written).

use crate::error::ImageError;
use crate::nbd::{Nbd, NbdError};
use sha2::{Digest as _, Sha256};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Bytes of a piece.
pub(crate) const PIECE: u64 = 2 << 20;
/// Bytes between two marks.
const MARK_EVERY: u64 = 64 << 20;
/// Zeroes are passed on in steps of this.
const ZEROES: u64 = 64 << 20;
/// Bytes that one look for holes covers.
const STATUS: u64 = 1 << 30;
/// Pieces on their way.
const QUEUE: usize = 4;

/// A part of the content.
enum Piece {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
}

/// How a copy is to be made.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Bytes to copy.
    pub(crate) size: u64,
    /// Bytes that are there already.
    pub(crate) from: u64,
    /// Most bytes in a second.
    pub(crate) limit: Option<u64>,
    /// The target reads as zeroes where it was not written.
    pub(crate) blank: bool,
    /// The first piece is written last.
    pub(crate) first_last: bool,
}

/// Told of progress; `mark` says that everything before it is durable.
pub(crate) trait Watcher: Send {
    fn progress(&mut self, done: u64);
    fn mark(&mut self, done: u64) -> Result<(), ImageError>;
}

/// Keeps to a limit.
struct Brake {
    limit: Option<u64>,
    begun: Instant,
    passed: u64,
}

impl Brake {
    fn new(limit: Option<u64>) -> Self {
        Self {
            limit: limit.filter(|limit| *limit > 0),
            begun: Instant::now(),
            passed: 0,
        }
    }

    /// Waits as long as the limit asks for, unless the work is taken back: a piece may be due much later.
    async fn pass(&mut self, bytes: u64, stop: &CancellationToken) -> Result<(), ImageError> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        self.passed += bytes;
        let due = Duration::from_millis(self.passed.saturating_mul(1000) / limit);
        let ahead = due.saturating_sub(self.begun.elapsed());
        let waited = stop.run_until_cancelled(tokio::time::sleep(ahead)).await;
        waited.ok_or(ImageError::Cancelled)
    }
}

fn source(source: NbdError) -> ImageError {
    let what = "the source";
    ImageError::Nbd { what, source }
}

fn target(source: NbdError) -> ImageError {
    let what = "the copy";
    ImageError::Nbd { what, source }
}

/// Reads all pieces in order, until nobody takes them.
async fn read_all(nbd: &mut Nbd, size: u64, to: mpsc::Sender<Piece>) -> Result<(), NbdError> {
    let mut at = 0;
    let mut known: Vec<(u64, bool)> = Vec::new();
    while at < size {
        if known.is_empty() {
            let ask = STATUS.min(size - at);
            let ask = u32::try_from(ask).unwrap_or(u32::MAX);
            let extents = nbd.status(at, ask).await?;
            known.extend(
                extents
                    .iter()
                    .rev()
                    .map(|extent| (extent.length, extent.zero)),
            );
        }
        let Some((length, zero)) = known.pop() else {
            continue;
        };
        let most = if zero { ZEROES } else { PIECE };
        // Pieces begin at multiples of their size, so that a first one can be held back whole.
        let edge = PIECE - at % PIECE;
        let take = length
            .min(size - at)
            .min(if zero { most.max(edge) } else { edge });
        let take = if at < PIECE { take.min(edge) } else { take };
        if length > take {
            known.push((length - take, zero));
        }
        let piece = if zero {
            Piece::Zero(at, take)
        } else {
            let mut bytes = vec![0; usize::try_from(take).unwrap_or(0)];
            nbd.read(at, &mut bytes).await?;
            match bytes.iter().all(|byte| *byte == 0) {
                true => Piece::Zero(at, take),
                false => Piece::Data(at, bytes),
            }
        };
        at += take;
        if to.send(piece).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The parts that are to be written: where the target is blank, not the zeroes.
fn runs(bytes: &[u8], blank: bool) -> Vec<(u64, &[u8])> {
    const GRAIN: usize = 64 << 10;
    if !blank {
        return vec![(0, bytes)];
    }
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, grain) in bytes.chunks(GRAIN).enumerate() {
        if grain.iter().all(|byte| *byte == 0) {
            continue;
        }
        let (start, end) = (index * GRAIN, index * GRAIN + grain.len());
        match runs.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => runs.push((start, end)),
        }
    }
    let part = |(start, end): (usize, usize)| (start as u64, &bytes[start..end]);
    runs.into_iter().map(part).collect()
}

fn hash_zeroes(hash: &mut Sha256, mut length: u64) {
    static ZERO: [u8; 64 << 10] = [0; 64 << 10];
    while length > 0 {
        let step = length.min(ZERO.len() as u64);
        hash.update(&ZERO[..usize::try_from(step).unwrap_or(0)]);
        length -= step;
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Copies; returns the checksum of the content.
pub(crate) async fn copy(
    from: &mut Nbd,
    to: &mut Nbd,
    plan: &Plan,
    watcher: &mut dyn Watcher,
    stop: &CancellationToken,
) -> Result<String, ImageError> {
    let (sender, pieces) = mpsc::channel(QUEUE);
    let reader = read_all(from, plan.size, sender);
    let writer = async {
        // Dropped with the writer, so that the reader ends too.
        let mut pieces = pieces;
        let mut hash = Sha256::new();
        let mut brake = Brake::new(plan.limit);
        let mut first: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut marked = plan.from;
        if plan.first_last && plan.from == 0 {
            // Whatever was there must not look like a disk any more.
            let length = PIECE.min(plan.size);
            to.zero(0, u32::try_from(length).unwrap_or(0))
                .await
                .map_err(target)?;
            to.flush().await.map_err(target)?;
        }
        while let Some(piece) = pieces.recv().await {
            if stop.is_cancelled() {
                return Err(ImageError::Cancelled);
            }
            let end = match piece {
                Piece::Zero(at, length) => {
                    hash_zeroes(&mut hash, length);
                    let held = plan.first_last && at < PIECE;
                    if at + length > plan.from && !plan.blank && !held {
                        let length = u32::try_from(length).unwrap_or(0);
                        to.zero(at, length).await.map_err(target)?;
                    }
                    at + length
                }
                Piece::Data(at, bytes) => {
                    hash.update(&bytes);
                    let end = at + bytes.len() as u64;
                    brake.pass(bytes.len() as u64, stop).await?;
                    if plan.first_last && at < PIECE {
                        first.push((at, bytes));
                    } else if end > plan.from {
                        for (start, part) in runs(&bytes, plan.blank) {
                            to.write(at + start, part).await.map_err(target)?;
                        }
                    }
                    end
                }
            };
            watcher.progress(end);
            if end >= marked + MARK_EVERY {
                to.flush().await.map_err(target)?;
                watcher.mark(end)?;
                marked = end;
            }
        }
        Ok((hash, first))
    };
    let (read, written) = tokio::join!(reader, writer);
    let (hash, first) = written?;
    read.map_err(source)?;
    to.flush().await.map_err(target)?;
    for (at, bytes) in first {
        to.write(at, &bytes).await.map_err(target)?;
    }
    to.flush().await.map_err(target)?;
    watcher.mark(plan.size)?;
    Ok(hex(hash))
}

/// The checksum of the first `size` bytes.
pub(crate) async fn checksum(
    of: &mut Nbd,
    size: u64,
    limit: Option<u64>,
    watcher: &mut dyn Watcher,
    stop: &CancellationToken,
) -> Result<String, ImageError> {
    let (sender, pieces) = mpsc::channel(QUEUE);
    let reader = read_all(of, size, sender);
    let hasher = async {
        let mut pieces = pieces;
        let mut hash = Sha256::new();
        let mut brake = Brake::new(limit);
        while let Some(piece) = pieces.recv().await {
            if stop.is_cancelled() {
                return Err(ImageError::Cancelled);
            }
            match piece {
                Piece::Zero(at, length) => {
                    hash_zeroes(&mut hash, length);
                    watcher.progress(at + length);
                }
                Piece::Data(at, bytes) => {
                    hash.update(&bytes);
                    brake.pass(bytes.len() as u64, stop).await?;
                    watcher.progress(at + bytes.len() as u64);
                }
            }
        }
        Ok(hash)
    };
    let (read, hash) = tokio::join!(reader, hasher);
    let hash = hash?;
    read.map_err(target)?;
    Ok(hex(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_taken_back_does_not_wait_for_its_limit() {
        let (stop, mut brake) = (CancellationToken::new(), Brake::new(Some(1)));
        stop.cancel();
        let passed = brake.pass(PIECE, &stop); // due in three weeks
        let passed = tokio::time::timeout(Duration::from_secs(60), passed).await;
        assert!(matches!(passed, Ok(Err(ImageError::Cancelled))));
    }

    #[test]
    fn zeroes_are_left_out_where_that_is_the_same() {
        const GRAIN: usize = 64 << 10;
        let mut bytes = vec![0; 5 * GRAIN + 10];
        bytes[GRAIN] = 1;
        bytes[3 * GRAIN - 1] = 1;
        bytes[5 * GRAIN] = 1;
        let found: Vec<(u64, usize)> = runs(&bytes, true)
            .into_iter()
            .map(|(start, part)| (start, part.len()))
            .collect();
        assert_eq!(found, [(GRAIN as u64, 2 * GRAIN), (5 * GRAIN as u64, 10)]);
        assert_eq!(runs(&bytes, false).len(), 1);
        assert!(runs(&vec![0; 3 * GRAIN], true).is_empty());
    }
}
