//! Save to a file: the sending half of a quick migration.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::{Guest, QUICK};
use crate::error::HypervisorError;
use crate::guest::{GuestEvent, SavedState};
use crate::migration::MigrationStatus;
use crate::qemu::migration::setup;

/// In case the event that ends it is lost with the connection.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

impl Guest {
    /// Pauses the guest and writes its memory to `path`, durably.
    ///
    /// # Errors
    /// [`HypervisorError::SaveFailed`]; the file is removed and the guest runs again.
    pub async fn save(&self, path: &Path, within: Duration) -> Result<SavedState, HypervisorError> {
        let deadline = Instant::now() + within;
        self.pause_confirmed(deadline).await?;
        let saved = self.write_memory(path, deadline).await;
        if saved.is_err() {
            if let Err(error) = tokio::fs::remove_file(path).await
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "an incomplete save stays");
            }
            self.thaw(QUICK).await?;
        }
        saved
    }

    async fn write_memory(
        &self,
        path: &Path,
        deadline: Instant,
    ) -> Result<SavedState, HypervisorError> {
        let failed = |detail: String| HypervisorError::SaveFailed {
            vm: self.config().name.clone(),
            path: path.to_path_buf(),
            detail,
        };
        let uri = path
            .to_str()
            .ok_or_else(|| failed("the path is not UTF-8".into()))?;
        let mut events = self.events();
        let mapped_ram = setup::prepare_file(self, deadline).await?;
        let arguments = json!({ "uri": format!("file:{uri}") });
        self.command("save it", "migrate", arguments, deadline)
            .await
            .map_err(|error| failed(setup::cause(&error)))?;
        loop {
            let reply = self
                .command("watch the save", "query-migrate", Value::Null, deadline)
                .await?;
            let status = MigrationStatus::parse(reply["status"].as_str().unwrap_or("none"));
            match status {
                MigrationStatus::Completed => break,
                MigrationStatus::Failed | MigrationStatus::Cancelled | MigrationStatus::None => {
                    let why = reply["error-desc"]
                        .as_str()
                        .unwrap_or("QEMU gave no reason");
                    return Err(failed(why.to_owned()));
                }
                _ if Instant::now() >= deadline => {
                    let _ = self
                        .command(
                            "stop the save",
                            "migrate_cancel",
                            Value::Null,
                            Instant::now() + QUICK,
                        )
                        .await;
                    return Err(failed("it took too long".into()));
                }
                _ => {}
            }
            let look = deadline.min(Instant::now() + LOOK_AGAIN);
            let _ = timeout_at(look, async {
                while let Ok(event) = events.recv().await {
                    if matches!(event, GuestEvent::Migration(status) if status.is_over()) {
                        return;
                    }
                }
            })
            .await;
        }
        let file = tokio::fs::File::open(path)
            .await
            .map_err(|e| failed(e.to_string()))?;
        file.sync_all()
            .await
            .map_err(|e| failed(format!("it cannot be made durable: {e}")))?;
        Ok(SavedState {
            path: path.to_path_buf(),
            mapped_ram,
        })
    }
}
