//! This host's certificate in the files that QEMU wants for encrypted migrations
//! (qemu(1), `tls-creds-x509`).
//!
//! Always holds: the directory is readable by the owner only; a file is replaced in one step.

use anyhow::{Context as _, Result, bail};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// The group ffdhe2048 of RFC 7919. Without this file QEMU looks for a prime of its own for every target, which takes
/// up to several seconds of a CPU.
const DH_PARAMS: &str = "-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
";

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
        ("dh-params.pem", &DH_PARAMS.to_owned()),
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
