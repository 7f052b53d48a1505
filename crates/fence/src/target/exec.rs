//! Any array, by a command of the operator's.
//!
//! The command gets `key=value` lines on its standard input, as fence agents do: `action=` (`cut`, `allow`,
//! `status`), `initiator=`, `target=`, and `secret=` where the pool names one. It succeeds by exit status 0. `status`
//! prints `allowed` or `cut`: only that word, asked for after the change, counts.

use super::{AccessRemoved, TargetAccess, TargetError, call, few_at_a_time, millis};
use tokio::time::Instant;

/// A command and its password.
#[derive(Clone)]
pub struct Exec {
    /// Program and first arguments.
    pub command: Vec<String>,
    /// What it gets as `secret=`.
    pub secret: Option<String>,
}

impl std::fmt::Debug for Exec {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exec")
            .field("command", &self.command)
            .finish_non_exhaustive()
    }
}

impl Exec {
    async fn act(
        &self,
        action: &str,
        target: &str,
        initiator: &str,
        deadline: Instant,
    ) -> Result<String, TargetError> {
        let mut input = format!("action={action}\ninitiator={initiator}\ntarget={target}\n");
        if let Some(secret) = &self.secret {
            input.push_str(&format!("secret={secret}\n"));
        }
        let secrets: Vec<&str> = self.secret.as_deref().into_iter().collect();
        call(&self.command, input, &secrets, deadline).await
    }

    async fn is_allowed(
        &self,
        target: &str,
        initiator: &str,
        deadline: Instant,
    ) -> Result<bool, TargetError> {
        let text = self.act("status", target, initiator, deadline).await?;
        match text.trim() {
            "allowed" => Ok(true),
            "cut" => Ok(false),
            other => Err(TargetError::Answer {
                program: self.command.first().cloned().unwrap_or_default(),
                detail: format!(
                    "`{}` where `allowed` or `cut` was expected",
                    other.chars().take(100).collect::<String>()
                ),
            }),
        }
    }

    async fn cut_one(
        &self,
        target: &str,
        initiator: &str,
        deadline: Instant,
    ) -> Result<AccessRemoved, TargetError> {
        let begun = Instant::now();
        self.act("cut", target, initiator, deadline).await?;
        if self.is_allowed(target, initiator, deadline).await? {
            return Err(TargetError::StillOpen {
                target: target.to_owned(),
                initiator: initiator.to_owned(),
                detail: "its status after the cut is `allowed`".to_owned(),
            });
        }
        let program = self.command.first().map_or("", String::as_str);
        Ok(AccessRemoved {
            target: target.to_owned(),
            how: format!("{program} cut it and its status said so"),
            took_ms: millis(begun.elapsed()),
        })
    }
}

#[async_trait::async_trait]
impl TargetAccess for Exec {
    async fn cut(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Vec<Result<AccessRemoved, TargetError>> {
        let cuts = targets
            .iter()
            .map(|target| self.cut_one(target, initiator, deadline));
        futures_util::future::join_all(cuts).await
    }

    async fn allow(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<String>, TargetError> {
        let open = targets.iter().map(|target| async move {
            let done = self.act("allow", target, initiator, deadline).await;
            done.map(drop)
        });
        few_at_a_time(open.collect()).await?;
        Ok(Vec::new())
    }

    async fn allowed(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<bool>, TargetError> {
        let looks = targets
            .iter()
            .map(|target| self.is_allowed(target, initiator, deadline));
        futures_util::future::try_join_all(looks).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    fn script(dir: &std::path::Path, body: &str) -> Exec {
        let path = dir.join("san-access");
        std::fs::write(&path, format!("#!/bin/sh\n{body}")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        Exec {
            command: vec![path.to_str().unwrap().to_owned()],
            secret: Some("hush".to_owned()),
        }
    }

    async fn cut(exec: &Exec) -> Result<AccessRemoved, TargetError> {
        let deadline = Instant::now() + Duration::from_secs(20);
        exec.cut(&["t".to_owned()], "i", deadline).await.remove(0)
    }

    #[tokio::test]
    async fn only_the_word_cut_after_the_cut_counts() {
        let dir = tempfile::tempdir().unwrap();
        let good = script(
            dir.path(),
            "while read l; do case $l in action=status) echo cut;; esac; done",
        );
        assert!(cut(&good).await.is_ok());
        for (body, want) in [
            (
                "while read l; do case $l in action=status) echo allowed;; esac; done",
                "`allowed`",
            ),
            ("exit 0", "was expected"),
            ("cat; exit 3", "exit status 3"),
        ] {
            let error = cut(&script(dir.path(), body))
                .await
                .unwrap_err()
                .to_string();
            assert!(error.contains(want), "{error}");
            assert!(!error.contains("hush"), "{error}");
        }
    }
}
