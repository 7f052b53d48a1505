//! What the first bytes of a file say, before any tool opens it. Pure.

use quorate_types::FileFormat;

/// Bytes from the beginning that are enough.
pub(crate) const HEAD: usize = 4096;
/// Bytes from the end that are enough.
pub(crate) const TAIL: usize = 512;

/// The format whose mark a file carries; plain bytes carry none.
///
/// # Errors
/// A sentence, for formats that are not read.
pub(crate) fn format(head: &[u8], tail: &[u8]) -> Result<FileFormat, String> {
    let vdi = head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]);
    let text_vmdk = head.starts_with(b"# Disk DescriptorFile");
    Ok(match head {
        [b'Q', b'F', b'I', 0xfb, ..] => FileFormat::Qcow2,
        [b'K', b'D', b'M', b'V', ..] => FileFormat::Vmdk,
        _ if text_vmdk => FileFormat::Vmdk,
        _ if head.starts_with(b"COWD") => {
            return Err("it is an old VMware ESX image: convert it there first".to_owned());
        }
        _ if head.starts_with(b"QED\0") => {
            return Err(
                "it is a QED image: run `qemu-img convert -O qcow2` on it first".to_owned(),
            );
        }
        _ if head.starts_with(b"vhdxfile") => FileFormat::Vhdx,
        _ if head.starts_with(b"conectix") || tail.starts_with(b"conectix") => FileFormat::Vpc,
        _ if vdi => FileFormat::Vdi,
        _ => {
            if let Some(what) = packed(head) {
                return Err(format!("it is {what}, not an image: unpack it first"));
            }
            FileFormat::Raw
        }
    })
}

fn packed(head: &[u8]) -> Option<&'static str> {
    match head {
        [0x1f, 0x8b, ..] => Some("packed with gzip"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some("packed with xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("packed with zstd"),
        [b'B', b'Z', b'h', ..] => Some("packed with bzip2"),
        [b'P', b'K', 3, 4, ..] => Some("a zip archive"),
        _ if head.get(257..262) == Some(b"ustar") => Some("a tar archive (an OVA?)"),
        _ => None,
    }
}

/// What a qcow2 header asks for that is not allowed: files beside it.
///
/// # Errors
/// A sentence.
pub(crate) fn alone(format: FileFormat, head: &[u8], tail: &[u8]) -> Result<(), String> {
    let be64 = |at: usize| -> u64 {
        let bytes = head.get(at..at + 8);
        bytes.map_or(0, |bytes| {
            u64::from_be_bytes(bytes.try_into().unwrap_or_default())
        })
    };
    let version = head.get(4..8).map_or(0, |bytes| {
        u32::from_be_bytes(bytes.try_into().unwrap_or_default())
    });
    const EXTERNAL_DATA: u64 = 1 << 2;
    match format {
        FileFormat::Qcow2 if be64(8) != 0 => Err(backing()),
        FileFormat::Qcow2 if version >= 3 && be64(72) & EXTERNAL_DATA != 0 => Err(
            "its data is in another file: run `qemu-img convert -O qcow2` where both are, and import the result"
                .to_owned(),
        ),
        // The type of a VHD is in its footer, of which dynamic ones have a copy at the beginning.
        FileFormat::Vpc => {
            let footer = if head.starts_with(b"conectix") { head } else { tail };
            const DIFFERENCING: &[u8] = &[0, 0, 0, 4];
            match footer.get(60..64) {
                Some(DIFFERENCING) => Err(backing()),
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

pub(crate) fn backing() -> String {
    "it is based on another file: run `qemu-img convert -O qcow2` where both are, and import the result".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_marks() {
        let mut vdi = vec![0; 512];
        vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        for (head, expected) in [
            (&b"QFI\xfb\0\0\0\x03"[..], FileFormat::Qcow2),
            (b"KDMV....", FileFormat::Vmdk),
            (b"# Disk DescriptorFile\nversion=1", FileFormat::Vmdk),
            (b"vhdxfile", FileFormat::Vhdx),
            (b"conectix", FileFormat::Vpc),
            (&vdi, FileFormat::Vdi),
            (b"\xeb\x63\x90", FileFormat::Raw),
            (b"", FileFormat::Raw),
        ] {
            assert_eq!(format(head, &[]), Ok(expected));
        }
        assert_eq!(format(b"\0\0", b"conectix"), Ok(FileFormat::Vpc));
        let packed = format(&[0x1f, 0x8b, 8], &[]).unwrap_err();
        assert!(packed.contains("gzip"), "{packed}");
    }

    #[test]
    fn files_beside_it_are_refused() {
        let mut head = vec![0; 512];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        assert_eq!(alone(FileFormat::Qcow2, &head, &[]), Ok(()));
        head[15] = 0x70;
        assert!(
            alone(FileFormat::Qcow2, &head, &[])
                .unwrap_err()
                .contains("based on")
        );
        head[15] = 0;
        head[79] = 1 << 2;
        assert!(
            alone(FileFormat::Qcow2, &head, &[])
                .unwrap_err()
                .contains("another file")
        );
        let mut vpc = vec![0; 512];
        vpc[..8].copy_from_slice(b"conectix");
        vpc[63] = 4;
        assert!(alone(FileFormat::Vpc, &vpc, &[]).is_err());
        assert!(alone(FileFormat::Vpc, &[], &vpc).is_err());
        vpc[63] = 3;
        assert!(alone(FileFormat::Vpc, &vpc, &[]).is_ok());
    }
}
