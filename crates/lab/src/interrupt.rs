//! Ctrl-C and SIGTERM: clean up, then end.

use std::sync::{Mutex, Once, PoisonError};

type Cleanup = Box<dyn FnMut() + Send>;

static CLEANUPS: Mutex<Vec<(u64, Cleanup)>> = Mutex::new(Vec::new());
static INSTALL: Once = Once::new();

/// Runs `cleanup` when the user interrupts the program, which then ends with status 130. The
/// registration ends when the returned value is dropped.
#[must_use = "dropping the registration ends it"]
pub fn on_interrupt(cleanup: impl FnMut() + Send + 'static) -> Registration {
    INSTALL.call_once(|| {
        std::thread::spawn(watch);
    });
    let mut cleanups = CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner);
    let id = cleanups.last().map_or(0, |(last, _)| last + 1);
    cleanups.push((id, Box::new(cleanup)));
    Registration { id }
}

/// See [`on_interrupt`].
#[derive(Debug)]
pub struct Registration {
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut cleanups = CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner);
        cleanups.retain(|(id, _)| *id != self.id);
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "cleanup has run; main may be blocked for minutes"
)]
fn watch() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return;
    };
    let arrived = runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).ok()?;
        let mut hangup = signal(SignalKind::hangup()).ok()?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result.ok(),
            received = terminate.recv() => received,
            received = hangup.recv() => received,
        }
    });
    if arrived.is_some() {
        eprintln!("\ninterrupted: cleaning up");
        // Held until the end, so that no guard cleans up the same lab at the same time.
        let mut cleanups = CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, cleanup) in cleanups.iter_mut().rev() {
            cleanup();
        }
        std::process::exit(130);
    }
}
