//! The server on the unix socket.

use axum::Router;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// How long running requests may go on after the server was told to stop.
const GRACE: Duration = Duration::from_secs(3);

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another daemon answers on the socket.
    #[error("{0} is served by another daemon: stop it first, or use another --dir")]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("the socket {path} cannot be made: {source}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Serving failed.
    #[error("the API on {path} failed: {source}")]
    Serve {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Serves until `stopping` becomes true. The router must have been made with the same `stopping`.
/// The socket is made with mode 0600 and removed at the end; a left-over one is replaced.
pub async fn serve(
    router: Router,
    socket: &Path,
    stopping: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let listener = bind(socket).await?;
    let mut stop = stopping.clone();
    let graceful = async move {
        // An error means that the sender is gone: stop too.
        let _ = stop.wait_for(|stopping| *stopping).await;
    };
    let server = axum::serve(listener, router).with_graceful_shutdown(graceful);
    let mut stop = stopping;
    let deadline = async move {
        let _ = stop.wait_for(|stopping| *stopping).await;
        tokio::time::sleep(GRACE).await;
    };
    let result = tokio::select! {
        result = server.into_future() => result,
        () = deadline => Ok(()),
    };
    // Someone else may have removed it already.
    let _ = std::fs::remove_file(socket);
    result.map_err(|source| ServeError::Serve {
        path: socket.to_owned(),
        source,
    })
}

async fn bind(socket: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Bind {
        path: socket.to_owned(),
        source,
    };
    if socket.exists() {
        if UnixStream::connect(socket).await.is_ok() {
            return Err(ServeError::InUse(socket.to_owned()));
        }
        std::fs::remove_file(socket).map_err(failed)?;
    }
    // Made under another name and moved, so that it is never there with wider rights.
    let fresh = socket.with_extension("new");
    if fresh.exists() {
        std::fs::remove_file(&fresh).map_err(failed)?;
    }
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&fresh, socket).map_err(failed)?;
    Ok(listener)
}
