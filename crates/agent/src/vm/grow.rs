//! More room for a disk that is mirrored: asked for here, done by the task that keeps its copy.
//!
//! ```text
//! asked --> copy in step: said to fail --> dropped by commit --> mirror let go of --> disk grown --> brought up to date
//! ```
//! Always holds: the disk grows only when no copy of it counts or is written to; whoever asked gets one answer.

use super::{Live, Shared, text};
use quorate_types::VmName;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Longest that a copy takes to be dropped.
const WITHIN: Duration = Duration::from_secs(60);

struct Wish {
    bytes: u64,
    done: oneshot::Sender<Result<(), String>>,
}

type Wishes = BTreeMap<(VmName, usize), Wish>;

/// Disks that shall become larger, by VM and number.
#[derive(Default)]
pub(crate) struct Growing {
    wishes: Mutex<Wishes>,
    news: Notify,
}

impl Growing {
    fn lock(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a disk shall become larger.
    pub(super) fn wanted(&self, vm: &VmName, disk: usize) -> bool {
        let wishes = self.lock();
        let wish = wishes.get(&(vm.clone(), disk));
        wish.is_some_and(|wish| !wish.done.is_closed())
    }

    /// Waits until it shall.
    pub(super) async fn asked(&self, vm: &VmName, disk: usize) {
        loop {
            let news = self.news.notified();
            if self.wanted(vm, disk) {
                return;
            }
            news.await;
        }
    }

    /// Asks for it, and waits until it is done.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) async fn ask(&self, vm: &VmName, disk: usize, bytes: u64) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        let wish = Wish { bytes, done };
        self.lock().insert((vm.clone(), disk), wish);
        self.news.notify_waiters();
        match tokio::time::timeout(WITHIN, answer).await {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err("another size was asked for meanwhile".to_owned()),
            Err(_) => Err(format!(
                "its copy was not dropped within {} s, which is needed for it: try again",
                WITHIN.as_secs()
            )),
        }
    }
}

/// No copy is in the way.
pub(super) async fn now(shared: &Shared, vm: &VmName, live: &Live, disk: usize) {
    let wish = shared.growing.lock().remove(&(vm.clone(), disk));
    let Some(wish) = wish else {
        return;
    };
    let grown = live.guest.resize_disk(disk, wish.bytes).await;
    match &grown {
        Ok(()) => tracing::info!(%vm, disk, bytes = wish.bytes, "a disk is larger now"),
        Err(error) => tracing::warn!(%vm, disk, error = text(error), "a disk does not grow"),
    }
    let _ = wish.done.send(grown.map_err(|error| text(&error)));
}
