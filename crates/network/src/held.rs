//! Frames that come for a guest whose CPUs stand still at a switchover: which of them it has not seen, and what they
//! look like when they follow it. Pure; a driver only listens and sends.
//!
//! ```text
//!  watched ------------------> guest stops -----------------------> target's tap is open: passed on, once
//!  (memory is nearly copied)   from here on the guest sees nothing
//! ```
//! Without it each client that sends in that moment waits for its retransmission, 0.2 s and more. What was seen shortly
//! before the stop may be in the guest already, or in a queue that nobody reads any more: TCP segments among it are sent
//! again, since TCP ignores what it has, and nothing else.

use crate::{MacAddr, NetworkError};

/// TCP segments that came so long before the guest stood still follow it too.
const TCP_BEFORE_US: u64 = 5_000;
/// Older frames are forgotten while the guest runs.
const RECENT_US: u64 = 100_000;
/// Most bytes that are kept for one tap.
const KEPT_BYTES: usize = 4 << 20;

/// What comes for the guest of one tap, listened to until this is dropped.
pub trait Held: Send {
    /// The guest goes on here for a while: what is not recent is forgotten.
    fn forget(&mut self);

    /// Sends what came since the guest stood still (microseconds since 1970; 0: all) on its bridge, from `source`; how many
    /// frames. Nothing is sent twice.
    ///
    /// # Errors
    /// When not one frame could be sent.
    fn pass_on(&mut self, since_us: u64, source: MacAddr) -> Result<u32, NetworkError>;
}

/// A frame with what the kernel says beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// When it came, microseconds since 1970.
    pub(crate) at_us: u64,
    /// The kernel's header: unfinished checksums, segments yet to be cut.
    pub(crate) header: Vec<u8>,
    /// From the destination's address on.
    pub(crate) bytes: Vec<u8>,
}

/// Frames in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    frames: std::collections::VecDeque<Frame>,
    bytes: usize,
}

impl Frames {
    /// One more; the oldest go when there is no room.
    pub(crate) fn push(&mut self, frame: Frame) {
        self.bytes += frame.bytes.len();
        self.frames.push_back(frame);
        while self.bytes > KEPT_BYTES {
            self.pop();
        }
    }

    fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.bytes.len();
        Some(frame)
    }

    /// What is not recent goes.
    pub(crate) fn forget(&mut self, now_us: u64) {
        while let Some(oldest) = self.frames.front()
            && oldest.at_us.saturating_add(RECENT_US) < now_us
        {
            self.pop();
        }
    }

    /// What the guest has not seen, as if `source` sent it, but for what `source` has sent. Empty afterwards.
    pub(crate) fn take(&mut self, since_us: u64, source: MacAddr) -> Vec<Frame> {
        self.bytes = 0;
        let mut unseen = Vec::new();
        for mut frame in self.frames.drain(..) {
            let slack = if is_tcp(&frame.bytes) {
                TCP_BEFORE_US
            } else {
                0
            };
            let own = frame.bytes.get(6..12) == Some(&source.octets()[..]);
            if !own
                && frame.at_us.saturating_add(slack) >= since_us
                && let Some(place) = frame.bytes.get_mut(6..12)
            {
                place.copy_from_slice(&source.octets());
                unseen.push(frame);
            }
        }
        unseen
    }
}

fn is_tcp(frame: &[u8]) -> bool {
    const TCP: u8 = 6;
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(23) == Some(&TCP),
        Some([0x86, 0xdd]) => frame.get(20) == Some(&TCP),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: [u8; 6] = [2, 0x5e, 0x10, 0, 0, 1];
    const SOURCE: MacAddr = MacAddr::new([2, 0x51, 0x48, 0, 0, 7]);

    fn frame(at_us: u64, protocol: u8, length: usize) -> Frame {
        let mut bytes = vec![0; length];
        bytes[..6].copy_from_slice(&GUEST);
        bytes[12..14].copy_from_slice(&[8, 0]);
        bytes[23] = protocol;
        Frame {
            at_us,
            header: vec![0; 10],
            bytes,
        }
    }

    fn times(frames: &[Frame]) -> Vec<u64> {
        frames.iter().map(|frame| frame.at_us).collect()
    }

    #[test]
    fn what_came_since_the_stop_follows_and_tcp_from_just_before() {
        let mut frames = Frames::default();
        for at in [90_000, 95_000, 99_000, 100_000, 101_000] {
            frames.push(frame(at, 17, 60));
            frames.push(frame(at + 1, 6, 60));
        }
        let taken = frames.take(100_000, SOURCE);
        assert_eq!(
            times(&taken),
            [95_001, 99_001, 100_000, 100_001, 101_000, 101_001]
        );
        assert!(taken.iter().all(|one| one.bytes[..6] == GUEST));
        assert!(taken.iter().all(|one| one.bytes[6..12] == SOURCE.octets()));
        assert!(frames.take(0, SOURCE).is_empty(), "once");
    }

    #[test]
    fn a_guest_that_goes_on_leaves_little_to_remember() {
        let mut frames = Frames::default();
        for at in 0..10 {
            frames.push(frame(at * 50_000, 6, 60));
        }
        frames.forget(450_000);
        assert_eq!(times(&frames.take(0, SOURCE)), [350_000, 400_000, 450_000]);
        // A flood keeps what came last, and no more than its share of memory.
        for at in 0..200 {
            frames.push(frame(at, 6, 60_000));
        }
        assert!(frames.bytes <= KEPT_BYTES);
        assert_eq!(times(&frames.take(0, SOURCE)).last(), Some(&199));
        assert_eq!(frames.bytes, 0);
    }

    #[test]
    fn short_frames_are_no_tcp() {
        assert!(!is_tcp(&[0; 13]));
        assert!(!is_tcp(&frame(0, 6, 60).bytes[..20]));
        let mut six = frame(0, 17, 60).bytes;
        six[12..14].copy_from_slice(&[0x86, 0xdd]);
        six[20] = 6;
        assert!(is_tcp(&six));
    }
}
