//! Threads for calls that may hang in the kernel.
//!
//! A system call on a dead NFS server cannot be cancelled. Each call therefore gets a
//! thread of its own and a deadline; the caller goes on when it passes, and the thread
//! stays behind until the server returns. A hung thread keeps its permit, so a pool that
//! hangs costs at most [`LANES`] threads and then answers `unresponsive` at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::PoolError;

/// Calls that may be under way, or hanging, in one pool.
const LANES: usize = 4;

/// The threads of one pool.
#[derive(Debug, Clone)]
pub(crate) struct Lanes {
    pool: String,
    permits: Arc<Semaphore>,
    deadline: Duration,
}

impl Lanes {
    pub(crate) fn new(pool: &str, deadline: Duration) -> Self {
        Self {
            pool: pool.to_owned(),
            permits: Arc::new(Semaphore::new(LANES)),
            deadline,
        }
    }

    /// Runs a blocking call on a thread of its own and waits for it, but not beyond the
    /// pool's deadline.
    pub(crate) async fn run<T, F>(&self, operation: &'static str, call: F) -> Result<T, PoolError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, PoolError> + Send + 'static,
    {
        let until = Instant::now() + self.deadline;
        let hung = || PoolError::Unresponsive {
            pool: self.pool.clone(),
            operation,
            deadline_ms: self.deadline.as_millis() as u64,
        };
        let permit = timeout_at(until, Arc::clone(&self.permits).acquire_owned())
            .await
            .map_err(|_| hung())?
            .map_err(|_| hung())?;
        let (answer, answered) = oneshot::channel();
        std::thread::Builder::new()
            .name("quorate-pool".into())
            .spawn(move || {
                let result = call();
                drop(permit);
                // Nobody waits any more when the deadline has passed.
                let _ = answer.send(result);
            })
            .map_err(|source| PoolError::Io {
                pool: self.pool.clone(),
                path: "/proc/self/task".into(),
                operation: "starting a thread",
                source,
            })?;
        match timeout_at(until, answered).await {
            Ok(Ok(result)) => result,
            // The thread panicked: its answer will never come.
            Ok(Err(_)) | Err(_) => Err(hung()),
        }
    }
}
