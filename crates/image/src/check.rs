//! Is a file what it says it is, and may it be opened?
//!
//! The format of a file that the operator names is found out on purpose; of images in pools it is what the manifest
//! says. Always holds: QEMU's tools see a file only after its own header has been read here, and never open a second
//! one.

use crate::error::ImageError;
use crate::header;
use crate::tool::{Target, qemu_img, qemu_img_ok, words};
use quorate_types::FileFormat;
use serde::Deserialize;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

const INFO_WITHIN: Duration = Duration::from_secs(60);
/// A check reads all metadata of an image.
const CHECK_WITHIN: Duration = Duration::from_secs(1800);
/// No disk is larger.
const LARGEST: u64 = 1 << 50;

/// A file that may be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Its path without symbolic links.
    pub path: PathBuf,
    /// Its layout.
    pub format: FileFormat,
    /// Size as a guest sees it, in bytes.
    pub virtual_bytes: u64,
    /// Which file it was, and in which state: device, inode, length, time of its last change.
    pub print: String,
    /// What is worth saying.
    pub notes: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Info {
    #[serde(rename = "virtual-size")]
    virtual_bytes: u64,
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
    #[serde(default)]
    encrypted: bool,
    #[serde(rename = "format-specific")]
    specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    data: Option<Data>,
}

#[derive(Debug, Deserialize)]
struct Data {
    #[serde(rename = "data-file")]
    data_file: Option<String>,
    #[serde(default)]
    extents: Vec<ExtentFile>,
}

#[derive(Debug, Deserialize)]
struct ExtentFile {
    filename: String,
}

/// Looks at a file that is to be imported.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub async fn check_file(file: &Path) -> Result<Checked, ImageError> {
    let shown = file.display().to_string();
    let bad = |why: String| ImageError::File {
        file: shown.clone(),
        why,
    };
    let cannot = |error: std::io::Error| bad(format!("it cannot be read: {error}"));
    let path = std::fs::canonicalize(file).map_err(cannot)?;
    let (head, tail, length) = ends(&path).map_err(cannot)?;
    if length == 0 {
        return Err(bad("it is empty".to_owned()));
    }
    let format = header::format(&head, &tail).map_err(bad)?;
    header::alone(format, &head, &tail).map_err(bad)?;
    let print = fingerprint(&path).map_err(cannot)?;
    if format == FileFormat::Raw {
        if length % 512 != 0 {
            return Err(bad(format!(
                "it has {length} bytes, which is no whole number of sectors: it was cut off, or is no disk image"
            )));
        }
        return Ok(Checked {
            path,
            format,
            virtual_bytes: length,
            print,
            notes: Vec::new(),
        });
    }
    let target = Target::file(&path, format.as_str());
    let info: Info = answer(&target, &["info", "--output=json"])
        .await
        .map_err(|error| bad(format!("it is damaged: {error}")))?;
    if info.backing.is_some() {
        return Err(bad(header::backing()));
    }
    if info.encrypted {
        return Err(bad(
            "it is encrypted: decrypt it with `qemu-img convert` first".to_owned(),
        ));
    }
    if info.virtual_bytes == 0 || info.virtual_bytes > LARGEST {
        let size = info.virtual_bytes;
        return Err(bad(format!(
            "it says that it has {size} bytes, which no disk has"
        )));
    }
    let mut files = vec![path.clone()];
    if let Some(data) = info.specific.and_then(|specific| specific.data) {
        if data.data_file.is_some() {
            return Err(bad("its data is in another file".to_owned()));
        }
        files = extents(&path, format, &data.extents).map_err(bad)?;
    }
    let notes = structure(&target, format).await.map_err(bad)?;
    whole(&target, &files).await.map_err(bad)?;
    Ok(Checked {
        path,
        format,
        virtual_bytes: info.virtual_bytes,
        print,
        notes,
    })
}

fn ends(path: &Path) -> std::io::Result<(Vec<u8>, Vec<u8>, u64)> {
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(std::io::Error::other("it is no file"));
    }
    let mut file = File::open(path)?;
    let length = file.seek(SeekFrom::End(0))?;
    let mut read = |from: u64, most: usize| {
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        (&mut file).take(most as u64).read_to_end(&mut bytes)?;
        std::io::Result::Ok(bytes)
    };
    let head = read(0, header::HEAD)?;
    let tail = read(length.saturating_sub(header::TAIL as u64), header::TAIL)?;
    Ok((head, tail, length))
}

/// Changes when the file does.
pub(crate) fn fingerprint(path: &Path) -> std::io::Result<String> {
    let meta = std::fs::metadata(path)?;
    Ok(format!(
        "{}:{}:{}:{}.{:09}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    ))
}

/// The files that an image consists of: itself, and for VMware's split ones files in the same folder.
fn extents(path: &Path, format: FileFormat, named: &[ExtentFile]) -> Result<Vec<PathBuf>, String> {
    if format != FileFormat::Vmdk {
        return Ok(vec![path.to_owned()]);
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut files = vec![path.to_owned()];
    for extent in named {
        let real = std::fs::canonicalize(folder.join(&extent.filename));
        match real {
            Ok(real) if real.parent() == Some(folder) => files.push(real),
            _ => {
                return Err(format!(
                    "it names the file {}, which is not beside it: refused",
                    extent.filename
                ));
            }
        }
    }
    Ok(files)
}

async fn answer<T: serde::de::DeserializeOwned>(
    target: &Target,
    command: &[&str],
) -> Result<T, ImageError> {
    let mut arguments = words(command);
    arguments.extend(words(&["--image-opts", &target.options]));
    let out = qemu_img_ok(arguments, INFO_WITHIN).await?;
    serde_json::from_slice(&out).map_err(|error| ImageError::Tool {
        tool: "qemu-img",
        detail: format!("its answer cannot be read: {error}"),
    })
}

/// The image's own tables, by `qemu-img check`.
async fn structure(target: &Target, format: FileFormat) -> Result<Vec<String>, String> {
    const UNSUPPORTED: i32 = 63;
    const LEAKS: i32 = 3;
    let mut arguments = words(&["check", "--output=json"]);
    arguments.extend(words(&["--image-opts", &target.options]));
    let ran = qemu_img(arguments, CHECK_WITHIN).await;
    let ran = ran.map_err(|error| error.to_string())?;
    match ran.code {
        0 | UNSUPPORTED => Ok(Vec::new()),
        LEAKS => Ok(vec![
            "the source wastes some space (leaked clusters); its content is sound".to_owned(),
        ]),
        _ => {
            let what = match ran.err.is_empty() {
                true => "its tables contradict each other".to_owned(),
                false => ran.err,
            };
            Err(format!(
                "it is damaged or was cut off: qemu-img check of {format}: {what}"
            ))
        }
    }
}

#[derive(Debug, Deserialize)]
struct Mapped {
    length: u64,
    #[serde(default)]
    data: bool,
    #[serde(default)]
    offset: Option<u64>,
    #[serde(default)]
    filename: Option<String>,
}

/// Where the image says that its data is must be inside its files: QEMU reads zeroes beyond the end of a file.
async fn whole(target: &Target, files: &[PathBuf]) -> Result<(), String> {
    let mut arguments = words(&["map", "--output=json"]);
    arguments.extend(words(&["--image-opts", &target.options]));
    let out = qemu_img_ok(arguments, CHECK_WITHIN).await;
    let out = out.map_err(|error| format!("it is damaged: {error}"))?;
    // An answer that is cut off is of a very fragmented image; the copy will meet what is wrong with it.
    let Ok(extents) = serde_json::from_slice::<Vec<Mapped>>(&out) else {
        return Ok(());
    };
    let lengths: Vec<(String, u64)> = files
        .iter()
        .filter_map(|file| {
            let length = std::fs::metadata(file).ok()?.len();
            Some((file.to_string_lossy().into_owned(), length))
        })
        .collect();
    let longest = lengths.iter().map(|(_, length)| *length).max().unwrap_or(0);
    for extent in extents.iter().filter(|extent| extent.data) {
        let Some(offset) = extent.offset else {
            continue;
        };
        let named = extent.filename.as_ref();
        let of = named.and_then(|name| lengths.iter().find(|(file, _)| file == name));
        let has = of.map_or(longest, |(_, length)| *length);
        let needs = offset.saturating_add(extent.length);
        if needs > has.next_multiple_of(512) {
            return Err(format!(
                "it was cut off: its data ends at byte {needs}, the file at byte {has}; get it again"
            ));
        }
    }
    Ok(())
}

#[derive(Debug, Deserialize)]
struct Measured {
    required: u64,
}

/// Space that a copy will take.
pub(crate) async fn measure(target: &Target, format: FileFormat) -> Option<u64> {
    let name = match format {
        FileFormat::Qcow2 => "qcow2",
        _ => "raw",
    };
    let measured: Measured = answer(target, &["measure", "--output=json", "-O", name])
        .await
        .ok()?;
    Some(measured.required)
}
