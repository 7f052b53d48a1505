//! `qemu-img`, run with a bound, and how images are named to QEMU's tools.

use crate::error::ImageError;
use quorate_storage::DiskSource;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;

/// Most of an answer that is read.
const OUTPUT_MAX: u64 = 64 << 20;
const DETAIL_MAX: usize = 400;
/// The id of the one secret that a tool may get.
const SECRET: &str = "s0";

/// An image as QEMU's tools are told of it.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// For `--image-opts`.
    pub(crate) options: String,
    /// A password, to be passed in a file.
    pub(crate) password: Option<String>,
}

impl Target {
    /// A file in a format.
    pub(crate) fn file(path: &Path, format: &str) -> Self {
        let path = comma(&path.to_string_lossy());
        Self {
            options: format!("driver={format},file.driver=file,file.filename={path}"),
            password: None,
        }
    }

    /// The bytes of a disk.
    pub(crate) fn source(source: &DiskSource, format: &str) -> Self {
        match source {
            DiskSource::File(path) => Self::file(path, format),
            DiskSource::Device(path) => {
                let path = comma(&path.to_string_lossy());
                Self {
                    options: format!("driver=raw,file.driver=host_device,file.filename={path}"),
                    password: None,
                }
            }
            DiskSource::Rbd(image) => {
                let mut options = format!(
                    "driver=raw,file.driver=rbd,file.pool={},file.image={},file.conf={},file.user={}",
                    comma(&image.pool),
                    comma(&image.image),
                    comma(&image.conf),
                    comma(&image.user)
                );
                if image.login.is_some() {
                    options.push_str(&format!(",file.key-secret={SECRET}"));
                }
                Self {
                    options,
                    password: image.login.as_ref().map(|login| login.password.clone()),
                }
            }
            DiskSource::Iscsi(unit) => {
                let mut options = format!(
                    "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={},file.target={},file.lun={},\
                     file.initiator-name={}",
                    comma(&unit.portal),
                    comma(&unit.target),
                    unit.lun,
                    comma(&unit.initiator)
                );
                if let Some(login) = &unit.login {
                    let user = comma(&login.user);
                    options.push_str(&format!(",file.user={user},file.password-secret={SECRET}"));
                }
                Self {
                    options,
                    password: unit.login.as_ref().map(|login| login.password.clone()),
                }
            }
        }
    }

    /// `--object` and `--image-opts` with the password in a file of this folder, which goes when the guard does.
    pub(crate) fn arguments(
        &self,
        folder: &Path,
        name: &str,
    ) -> Result<(Vec<OsString>, SecretFile), ImageError> {
        let mut arguments = Vec::new();
        let mut secret = SecretFile(None);
        if let Some(password) = &self.password {
            let path = folder.join(format!("{name}.secret"));
            write_private(&path, password)
                .map_err(ImageError::io("a password cannot be passed on"))?;
            let path_text = comma(&path.to_string_lossy());
            arguments.push("--object".into());
            arguments.push(format!("secret,id={SECRET},file={path_text}").into());
            secret.0 = Some(path);
        }
        arguments.push("--image-opts".into());
        arguments.push(self.options.clone().into());
        Ok((arguments, secret))
    }
}

/// A password on its way; removed when dropped.
#[derive(Debug)]
pub(crate) struct SecretFile(Option<std::path::PathBuf>);

impl Drop for SecretFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // It may be gone already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    // Left over by a crash; never written through.
    let _ = std::fs::remove_file(path);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())
}

/// QEMU reads `,,` as a comma.
fn comma(text: &str) -> String {
    text.replace(',', ",,")
}

/// What a tool did.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: Vec<u8>,
    pub(crate) err: String,
}

/// Runs `qemu-img`; whatever it answers is for the caller to judge.
pub(crate) async fn qemu_img(
    arguments: Vec<OsString>,
    within: Duration,
) -> Result<Ran, ImageError> {
    const TOOL: &str = "qemu-img";
    let mut command = tokio::process::Command::new(TOOL);
    command.args(arguments).env("LC_ALL", "C");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).kill_on_drop(true);
    let no_tool = |source| ImageError::NoTool { tool: TOOL, source };
    let mut child = command.spawn().map_err(no_tool)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let work = async {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let read_out = async {
            match stdout {
                Some(pipe) => pipe.take(OUTPUT_MAX).read_to_end(&mut out).await,
                None => Ok(0),
            }
        };
        let read_err = async {
            match stderr {
                Some(pipe) => pipe.take(64 << 10).read_to_end(&mut err).await,
                None => Ok(0),
            }
        };
        tokio::try_join!(read_out, read_err)?;
        let status = child.wait().await?;
        std::io::Result::Ok(Ran {
            code: status.code().unwrap_or(-1),
            out,
            err: shorten(&String::from_utf8_lossy(&err)),
        })
    };
    match tokio::time::timeout(within, work).await {
        Ok(ran) => ran.map_err(no_tool),
        Err(_) => Err(ImageError::Tool {
            tool: TOOL,
            detail: format!("it did not end within {} s", within.as_secs()),
        }),
    }
}

/// The same, where anything but success is a failure.
pub(crate) async fn qemu_img_ok(
    arguments: Vec<OsString>,
    within: Duration,
) -> Result<Vec<u8>, ImageError> {
    let ran = qemu_img(arguments, within).await?;
    match ran.code {
        0 => Ok(ran.out),
        _ => Err(ImageError::Tool {
            tool: "qemu-img",
            detail: ran.err,
        }),
    }
}

pub(crate) fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

pub(crate) fn shorten(text: &str) -> String {
    let line = text.trim().replace('\n', "; ");
    match line.char_indices().find(|(at, _)| *at >= DETAIL_MAX) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}
