//! This host's certificate in the files that QEMU wants for encrypted migrations
//! (qemu(1), `tls-creds-x509`).
//!
//! Always holds: the directory is readable by the owner only; a file is replaced in one step.

use anyhow::{Context as _, Result, bail};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Where the files are.
pub(crate) fn directory(dir: &Path) -> PathBuf {
    dir.join("migration-tls")
}

/// Writes them from the identity that `dir` holds.
pub(crate) fn write(dir: &Path) -> Result<()> {
    let source = dir.join("identity.pem");
    let text = std::fs::read_to_string(&source)
        .with_context(|| format!("cannot read {}", source.display()))?;
    let mut blocks = Vec::new();
    for line in text.lines() {
        if line.starts_with("-----BEGIN ") {
            blocks.push(String::new());
        }
        if let Some(block) = blocks.last_mut() {
            block.push_str(line);
            block.push('\n');
        }
    }
    let [key, certificate, authority @ ..] = blocks.as_slice() else {
        bail!(
            "{} does not hold a key, a certificate and an authority",
            source.display()
        );
    };
    let target = directory(dir);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&target)?;
    for (name, content) in [
        ("ca-cert.pem", &authority.concat()),
        ("server-cert.pem", certificate),
        ("server-key.pem", key),
        ("client-cert.pem", certificate),
        ("client-key.pem", key),
    ] {
        replace(&target.join(name), content)?;
    }
    Ok(())
}

fn replace(path: &Path, content: &str) -> Result<()> {
    let temporary = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content.as_bytes())?;
    std::fs::rename(&temporary, path).with_context(|| format!("cannot write {}", path.display()))
}
