//! The one queue of events, ordered by time, then by the order of scheduling.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Future events.
#[derive(Debug)]
pub(crate) struct Queue<E> {
    heap: BinaryHeap<Reverse<Item<E>>>,
    next: u64,
}

#[derive(Debug)]
struct Item<E> {
    at: u64,
    seq: u64,
    event: E,
}

impl<E> Item<E> {
    fn key(&self) -> (u64, u64) {
        (self.at, self.seq)
    }
}

impl<E> PartialEq for Item<E> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<E> Eq for Item<E> {}

impl<E> PartialOrd for Item<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Item<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl<E> Queue<E> {
    pub(crate) fn new() -> Self {
        Self {
            heap: BinaryHeap::new(),
            next: 0,
        }
    }

    pub(crate) fn push(&mut self, at: u64, event: E) {
        let seq = self.next;
        self.next += 1;
        self.heap.push(Reverse(Item { at, seq, event }));
    }

    /// Puts an event off, ahead of everything that is scheduled later for the same time.
    pub(crate) fn put_off(&mut self, at: u64, seq: u64, event: E) {
        self.heap.push(Reverse(Item { at, seq, event }));
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, u64, E)> {
        let Reverse(item) = self.heap.pop()?;
        Some((item.at, item.seq, item.event))
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse(item)| item.at)
    }
}
