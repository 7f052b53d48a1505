//! The pool kind `rbd`: images of a Ceph pool, opened by QEMU's own client.
//!
//! Always holds: the program `rbd` does what has to be done to images, with its key on standard input and never among
//! its arguments; a new image has the feature `exclusive-lock`, so that Ceph itself lets one client write at a time (a
//! second net: a lock is broken by whoever asks, so it proves nothing).

use crate::{
    DiskFormat, DiskInfo, DiskSource, DiskSpec, ImageEntry, Login, Marker, Pool, PoolError,
    PoolFacts, RbdSource, StorageFence, round_to_sector,
};
use quorate_types::RbdPool;
use serde::Deserialize;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

/// What a pool of Ceph images is told.
#[derive(Debug, Clone)]
pub struct RbdConfig {
    /// The pool's name.
    pub pool: String,
    /// Its definition.
    pub spec: RbdPool,
    /// The cluster that the pool belongs to.
    pub cluster: String,
    /// The user's key, where the definition names one.
    pub login: Option<Login>,
    /// The definition names a secret that the cluster does not have.
    pub missing_secret: Option<String>,
    /// Longest time for one call.
    pub deadline: Duration,
    /// The program `rbd`.
    pub program: String,
}

/// A pool of Ceph images.
#[derive(Debug)]
pub struct RbdPoolDriver {
    config: RbdConfig,
}

#[derive(Debug, Deserialize)]
struct Image {
    #[serde(alias = "image")]
    name: String,
    size: u64,
}

impl RbdPoolDriver {
    /// A pool; nothing is looked at yet.
    pub fn new(config: RbdConfig) -> Self {
        Self { config }
    }

    fn marker(&self) -> Marker {
        Marker {
            version: 1,
            cluster: self.config.cluster.clone(),
            pool: self.config.pool.clone(),
            id: format!("rbd:{}", self.config.spec.ceph_pool),
        }
    }

    fn failed(&self, operation: &'static str, detail: impl ToString) -> PoolError {
        PoolError::Ceph {
            pool: self.config.pool.clone(),
            operation,
            detail: detail.to_string(),
        }
    }

    fn name_in_ceph(&self, image: &str) -> Result<String, PoolError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if image.is_empty() || image.starts_with(['-', '.']) || !image.chars().all(good) {
            return Err(PoolError::BadImageName {
                image: image.to_owned(),
                reason: "an image of Ceph is named by letters, digits, `-`, `_` and `.`",
            });
        }
        Ok(format!("{}/{image}", self.config.spec.ceph_pool))
    }

    async fn run(&self, operation: &'static str, words: &[&str]) -> Result<String, PoolError> {
        if let Some(secret) = &self.config.missing_secret {
            return Err(PoolError::SecretMissing {
                pool: self.config.pool.clone(),
                secret: secret.clone(),
            });
        }
        let spec = &self.config.spec;
        let mut command = Command::new(&self.config.program);
        command.args(["--conf", &spec.conf, "--id", &spec.user]);
        if self.config.login.is_some() {
            command.args(["--keyfile", "/dev/stdin"]);
        }
        command.args(words).kill_on_drop(true);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let work = async {
            let mut child = command.spawn()?;
            if let (Some(mut input), Some(login)) = (child.stdin.take(), &self.config.login) {
                input.write_all(login.password.as_bytes()).await?;
            }
            child.wait_with_output().await
        };
        let done = timeout(self.config.deadline, work).await;
        let output = match done {
            Ok(output) => output.map_err(|error| self.failed(operation, error))?,
            Err(_) => {
                return Err(PoolError::Unresponsive {
                    pool: self.config.pool.clone(),
                    operation,
                    deadline_ms: u64::try_from(self.config.deadline.as_millis())
                        .unwrap_or(u64::MAX),
                });
            }
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty());
        Err(self.failed(operation, last.unwrap_or("it said nothing")))
    }

    fn parse<T: for<'d> Deserialize<'d>>(
        &self,
        operation: &'static str,
        text: &str,
    ) -> Result<T, PoolError> {
        serde_json::from_str(text).map_err(|error| self.failed(operation, error))
    }

    async fn find(&self, image: &str) -> Result<Option<u64>, PoolError> {
        const LOOK: &str = "looking at an image";
        let name = self.name_in_ceph(image)?;
        match self.run(LOOK, &["info", "--format", "json", &name]).await {
            Ok(text) => Ok(Some(self.parse::<Image>(LOOK, &text)?.size)),
            Err(PoolError::Ceph { detail, .. }) if detail.contains("No such file") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn info(&self, image: &str, bytes: u64, created: bool) -> DiskInfo {
        let spec = &self.config.spec;
        DiskInfo {
            source: DiskSource::Rbd(RbdSource {
                pool: spec.ceph_pool.clone(),
                image: image.to_owned(),
                conf: spec.conf.clone(),
                user: spec.user.clone(),
                login: self.config.login.clone(),
            }),
            format: DiskFormat::Raw,
            virtual_bytes: bytes,
            actual_bytes: bytes,
            backing: None,
            created,
        }
    }

    fn raw_only(&self, image: &str, format: DiskFormat) -> Result<(), PoolError> {
        match format {
            DiskFormat::Raw => Ok(()),
            DiskFormat::Qcow2 => Err(PoolError::RawOnly {
                pool: self.config.pool.clone(),
                image: image.to_owned(),
            }),
        }
    }

    fn missing(&self, image: &str) -> PoolError {
        PoolError::ImageMissing {
            pool: self.config.pool.clone(),
            image: image.to_owned(),
        }
    }
}

#[async_trait::async_trait]
impl Pool for RbdPoolDriver {
    fn name(&self) -> &str {
        &self.config.pool
    }

    fn kind(&self) -> &'static str {
        "rbd"
    }

    fn fence_proof(&self) -> Option<StorageFence> {
        self.config
            .spec
            .blocklist
            .then_some(StorageFence::TargetAccess)
    }

    async fn define(&self) -> Result<Marker, PoolError> {
        self.run("defining the pool", &["ls", &self.config.spec.ceph_pool])
            .await?;
        Ok(self.marker())
    }

    async fn check(&self) -> PoolFacts {
        let begun = Instant::now();
        match self
            .run("checking the pool", &["ls", &self.config.spec.ceph_pool])
            .await
        {
            Ok(_) => PoolFacts::answered(self.marker(), begun),
            Err(error) => PoolFacts::failed(&error),
        }
    }

    async fn ensure_disk(&self, spec: &DiskSpec) -> Result<DiskInfo, PoolError> {
        self.raw_only(&spec.image, spec.format)?;
        let mut created = false;
        let mut found = self.find(&spec.image).await?;
        if found.is_none() && spec.create {
            let size = spec.size_bytes.ok_or_else(|| PoolError::SizeMissing {
                pool: self.config.pool.clone(),
                image: spec.image.clone(),
            })?;
            let size = round_to_sector(size);
            let (name, bytes) = (self.name_in_ceph(&spec.image)?, format!("{size}B"));
            let words = [
                "create",
                "--size",
                &bytes,
                "--image-feature",
                "layering,exclusive-lock",
                &name,
            ];
            self.run("making an image", &words).await?;
            (found, created) = (Some(size), true);
        }
        let have_bytes = found.ok_or_else(|| self.missing(&spec.image))?;
        match spec.size_bytes {
            Some(want_bytes) if have_bytes < want_bytes => Err(PoolError::ImageTooSmall {
                image: spec.image.clone(),
                have_bytes,
                want_bytes,
            }),
            _ => Ok(self.info(&spec.image, have_bytes, created)),
        }
    }

    async fn disk_info(&self, image: &str, format: DiskFormat) -> Result<DiskInfo, PoolError> {
        self.raw_only(image, format)?;
        let bytes = self.find(image).await?.ok_or_else(|| self.missing(image))?;
        Ok(self.info(image, bytes, false))
    }

    async fn resize_disk(
        &self,
        image: &str,
        format: DiskFormat,
        size_bytes: u64,
    ) -> Result<DiskInfo, PoolError> {
        let info = self.disk_info(image, format).await?;
        let want_bytes = round_to_sector(size_bytes);
        if want_bytes < info.virtual_bytes {
            return Err(PoolError::WouldShrink {
                image: image.to_owned(),
                have_bytes: info.virtual_bytes,
                want_bytes,
            });
        }
        let (name, bytes) = (self.name_in_ceph(image)?, format!("{want_bytes}B"));
        self.run("enlarging an image", &["resize", "--size", &bytes, &name])
            .await?;
        Ok(self.info(image, want_bytes, false))
    }

    async fn delete_disk(&self, image: &str) -> Result<bool, PoolError> {
        if self.find(image).await?.is_none() {
            return Ok(false);
        }
        let name = self.name_in_ceph(image)?;
        self.run("deleting an image", &["rm", "--no-progress", &name])
            .await?;
        Ok(true)
    }

    async fn list_images(&self) -> Result<Vec<ImageEntry>, PoolError> {
        const LIST: &str = "listing images";
        let words = ["ls", "-l", "--format", "json", &self.config.spec.ceph_pool];
        let found: Vec<Image> = self.parse(LIST, &self.run(LIST, &words).await?)?;
        let entry = |image: Image| ImageEntry {
            image: image.name,
            virtual_bytes: Some(image.size),
            actual_bytes: None,
            format: DiskFormat::Raw,
            problem: None,
        };
        let mut found: Vec<ImageEntry> = found.into_iter().map(entry).collect();
        found.sort_by(|a, b| a.image.cmp(&b.image));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    /// A program that keeps images as files named by their size.
    fn pool(dir: &Path, login: bool) -> RbdPoolDriver {
        let script = r#"#!/bin/sh
cd DIR || exit 1
echo "$@" >> args
shift 4
if [ "$1" = --keyfile ]; then cat > key; shift 2; fi
case $1 in
ls) [ "$2" = -l ] || exit 0; printf '['; sep=; for f in *.size; do [ -e "$f" ] || continue; printf '%s{"image":"%s","size":%s}' "$sep" "${f%.size}" "$(cat "$f")"; sep=,; done; printf ']' ;;
info) f=${4#p/}.size; [ -e "$f" ] || { echo "rbd: error opening image ${4}: (2) No such file or directory" >&2; exit 2; }
   printf '{"name":"%s","size":%s}' "${4#p/}" "$(cat "$f")" ;;
create) printf '%s' "${3%B}" > "${6#p/}.size" ;;
resize) printf '%s' "${3%B}" > "${4#p/}.size" ;;
rm) rm "${3#p/}.size" ;;
esac
"#;
        let path = dir.join("rbd");
        std::fs::write(&path, script.replace("DIR", dir.to_str().unwrap())).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let spec = serde_json::json!({ "ceph_pool": "p", "user": "quorate" });
        RbdPoolDriver::new(RbdConfig {
            pool: "ceph".into(),
            spec: serde_json::from_value(spec).unwrap(),
            cluster: "c1".into(),
            login: login.then(|| Login {
                user: "quorate".into(),
                password: "hush".into(),
            }),
            missing_secret: None,
            deadline: Duration::from_secs(20),
            program: path.to_str().unwrap().to_owned(),
        })
    }

    fn disk(size: Option<u64>) -> DiskSpec {
        DiskSpec {
            image: "db".into(),
            format: DiskFormat::Raw,
            size_bytes: size,
            create: size.is_some(),
        }
    }

    #[tokio::test]
    async fn images_are_made_grown_listed_and_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(dir.path(), true);
        assert!(pool.check().await.usable());
        let missing = pool.ensure_disk(&disk(None)).await.unwrap_err();
        assert!(missing.to_string().contains("is not in pool"), "{missing}");
        let made = pool.ensure_disk(&disk(Some(1000))).await.unwrap();
        assert_eq!((made.virtual_bytes, made.created), (1024, true));
        assert!(!pool.ensure_disk(&disk(Some(1000))).await.unwrap().created);
        let small = pool.ensure_disk(&disk(Some(1 << 20))).await.unwrap_err();
        assert!(small.to_string().contains("has 1024 bytes"), "{small}");
        pool.resize_disk("db", DiskFormat::Raw, 1 << 20)
            .await
            .unwrap();
        assert!(pool.resize_disk("db", DiskFormat::Raw, 512).await.is_err());
        assert_eq!(
            pool.list_images().await.unwrap()[0].virtual_bytes,
            Some(1 << 20)
        );
        assert!(pool.delete_disk("db").await.unwrap());
        assert!(!pool.delete_disk("db").await.unwrap());
        let words = std::fs::read_to_string(dir.path().join("args")).unwrap();
        assert!(
            !words.contains("hush") && words.contains("exclusive-lock"),
            "{words}"
        );
        assert_eq!(
            std::fs::read_to_string(dir.path().join("key")).unwrap(),
            "hush"
        );
    }

    #[tokio::test]
    async fn what_cannot_be_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut pool = pool(dir.path(), false);
        for bad in ["", "a/b", "-x", "a@snap"] {
            assert!(pool.disk_info(bad, DiskFormat::Raw).await.is_err(), "{bad}");
        }
        let format = pool.disk_info("db", DiskFormat::Qcow2).await.unwrap_err();
        assert!(format.to_string().contains("format: raw"));
        pool.config.missing_secret = Some("ceph-key".into());
        let secret = pool.check().await.problem.unwrap();
        assert!(secret.contains("quorate secret set ceph-key"), "{secret}");
    }
}
