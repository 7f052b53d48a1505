//! Links: which program runs at which interface, pinned so that it goes on without a daemon.
//!
//! Always holds: a link that exists is updated in place (the kernel swaps the program between two packets); only a
//! link whose interface is gone is made anew. A pin's name says what is attached where: `xdp-eth0`, `out-eth0`,
//! `in-qt-1234`; `generic-eth0` is an XDP link in generic mode.

use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, TcAttachType, XdpMode};

use super::object::{chain, classifier, errno, kernel, xdp};
use crate::BalancerError;
use quorate_types::service::UplinkMode;

/// The pins of links below one folder.
pub(super) struct Links {
    dir: PathBuf,
}

/// A dot cannot be in the name of a pin.
fn pin_name(place: &str, ifname: &str) -> String {
    format!("{place}-{}", ifname.replace('.', "+"))
}

fn attach_error(
    ifname: &str,
    what: &'static str,
    error: &(dyn std::error::Error + 'static),
) -> BalancerError {
    let detail = match errno(error) {
        Some(libc::EBUSY | libc::EEXIST) => {
            format!(
                "another program is attached there: detach it first ({})",
                chain(error)
            )
        }
        Some(libc::EPERM) => {
            return BalancerError::NotPermitted {
                detail: format!("{what} at `{ifname}`: {}", chain(error)),
            };
        }
        _ => chain(error),
    };
    BalancerError::Attach {
        ifname: ifname.to_owned(),
        what,
        detail,
    }
}

impl Links {
    pub(super) fn new(root: &Path) -> Result<Self, BalancerError> {
        let dir = root.join("links");
        std::fs::create_dir_all(&dir).map_err(kernel("making", dir.display().to_string()))?;
        Ok(Self { dir })
    }

    fn path(&self, place: &str, ifname: &str) -> PathBuf {
        self.dir.join(pin_name(place, ifname))
    }

    /// The director at an uplink: in the driver where it can, else in the generic hook.
    pub(super) fn director(
        &self,
        ebpf: &mut Ebpf,
        ifname: &str,
    ) -> Result<UplinkMode, BalancerError> {
        let program = xdp(ebpf, "director")?;
        for (place, mode) in [
            ("xdp", UplinkMode::Driver),
            ("generic", UplinkMode::Generic),
        ] {
            let path = self.path(place, ifname);
            let Some(link) = pinned(&path)? else { continue };
            let link = XdpLink::try_from(FdLink::from(link)).map_err(kernel("opening", place))?;
            match program.attach_to_link(link) {
                Ok(id) => {
                    // The pin is the link: what is in our hands need not outlive the call.
                    let link = program.take_link(id).map_err(kernel("taking", place))?;
                    drop(FdLink::try_from(link).map_err(kernel("taking", place))?);
                    return Ok(mode);
                }
                Err(error) if gone(&error) => unpin(&path)?,
                Err(error) => return Err(attach_error(ifname, "the director", &error)),
            }
        }
        let bond = Path::new("/sys/class/net").join(ifname).join("bonding");
        let modes = [
            ("xdp", XdpMode::Driver, UplinkMode::Driver),
            ("generic", XdpMode::Skb, UplinkMode::Generic),
        ];
        let mut last = None;
        // At a bond the driver mode runs at its ports, under their names.
        for (place, mode, told) in modes.into_iter().skip(usize::from(bond.exists())) {
            match program.attach(ifname, mode) {
                Ok(id) => {
                    let link = program.take_link(id).map_err(kernel("taking", place))?;
                    let link = FdLink::try_from(link).map_err(kernel("taking", place))?;
                    link.pin(self.path(place, ifname)).map_err(kernel(
                        "pinning",
                        format!("the director's link at `{ifname}`"),
                    ))?;
                    return Ok(told);
                }
                Err(error) => last = Some(attach_error(ifname, "the director", &error)),
            }
        }
        Err(last.unwrap_or_else(|| BalancerError::NoInterface {
            ifname: ifname.to_owned(),
        }))
    }

    /// One of the tcx programs.
    pub(super) fn tcx(
        &self,
        ebpf: &mut Ebpf,
        name: &'static str,
        place: &'static str,
        ifname: &str,
    ) -> Result<(), BalancerError> {
        let program = classifier(ebpf, name)?;
        let path = self.path(place, ifname);
        if let Some(link) = pinned(&path)? {
            let link = SchedClassifierLink::try_from(FdLink::from(link))
                .map_err(kernel("opening", name))?;
            match program.attach_to_link(link) {
                Ok(id) => {
                    let link = program.take_link(id).map_err(kernel("taking", name))?;
                    drop(FdLink::try_from(link).map_err(kernel("taking", name))?);
                    return Ok(());
                }
                Err(error) if gone(&error) => unpin(&path)?,
                Err(error) => return Err(attach_error(ifname, name, &error)),
            }
        }
        let direction = if place == "in" {
            TcAttachType::Ingress
        } else {
            TcAttachType::Egress
        };
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = program
            .attach_with_options(ifname, direction, options)
            .map_err(|error| attach_error(ifname, name, &error))?;
        let link = program.take_link(id).map_err(kernel("taking", name))?;
        let link = FdLink::try_from(link).map_err(kernel("taking", name))?;
        link.pin(path).map_err(kernel(
            "pinning",
            format!("the link of `{name}` at `{ifname}`"),
        ))?;
        Ok(())
    }

    /// Takes the program away, where there is one.
    pub(super) fn detach(&self, place: &str, ifname: &str) -> Result<(), BalancerError> {
        unpin(&self.path(place, ifname))
    }

    /// The interfaces that have a link of this place.
    pub(super) fn attached(&self, place: &str) -> Vec<String> {
        let prefix = format!("{place}-");
        let mut names: Vec<String> = std::fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_prefix(&prefix)?.replace('+', ".")))
            .collect();
        names.sort();
        names
    }
}

/// The interface of the link is no more.
fn gone(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(errno(error), Some(libc::ENOLINK | libc::ENODEV))
}

fn pinned(path: &Path) -> Result<Option<PinnedLink>, BalancerError> {
    if !path.exists() {
        return Ok(None);
    }
    PinnedLink::from_pin(path)
        .map(Some)
        .map_err(kernel("opening", path.display().to_string()))
}

fn unpin(path: &Path) -> Result<(), BalancerError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(kernel("unpinning", path.display().to_string())(error))
        }
        _ => Ok(()),
    }
}
