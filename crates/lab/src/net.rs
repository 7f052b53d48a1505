//! Namespaces, bridges and cables of a site.
//!
//! Always holds: every interface is made inside its namespace, so nothing of the lab is ever in
//! the machine's own; removing the namespaces removes the network.

use crate::process::run_with_input;
use crate::site::{CLIENT, Networks, SAN, Site, namespace};
use crate::{LabError, Result};
use std::fmt::Write as _;
use std::path::Path;

const NAMESPACES: &str = "/run/netns";

/// Path that stands for a namespace.
pub(crate) fn namespace_path(name: &str) -> String {
    format!("{NAMESPACES}/{name}")
}

/// Makes namespaces, bridges and cables.
pub(crate) fn build(site: &Site) -> Result<()> {
    let mut lines = String::new();
    for name in site.namespaces() {
        line(&mut lines, format_args!("netns add {name}"));
    }
    batch(None, &lines)?;
    for name in site.namespaces() {
        quiet_ipv6(&name)?;
    }
    build_switch(site)?;
    build_client(site)?;
    if site.san {
        build_san(site)?;
    }
    for host in &site.hosts {
        build_host(site, host)?;
    }
    Ok(())
}

/// IPv6 would only add noise: the lab's addresses are IPv4.
fn quiet_ipv6(name: &str) -> Result<()> {
    let script = "for d in all default; do echo 1 > /proc/sys/net/ipv6/conf/$d/disable_ipv6; done 2>/dev/null; true";
    let net = format!("--net={}", namespace_path(name));
    crate::process::run("nsenter", &[net.as_str(), "sh", "-c", script]).map(drop)
}

fn build_switch(site: &Site) -> Result<()> {
    let mut lines = String::from("link set lo up\n");
    for network in site.network_names() {
        line(
            &mut lines,
            format_args!(
                "link add sw-{network} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
            ),
        );
        line(&mut lines, format_args!("link set sw-{network} up"));
        for part in site.plugged_into(network) {
            // The host's end is made inside the host's namespace right away.
            line(
                &mut lines,
                format_args!(
                    "link add {network}-{part} type veth peer name {network}0 netns {}",
                    site.namespace(part)
                ),
            );
            line(
                &mut lines,
                format_args!("link set {network}-{part} master sw-{network} up"),
            );
        }
    }
    batch(Some(&site.namespace("switch")), &lines)?;
    cables_as_cards(site)
}

/// See `bpf/pass.bpf.c`.
const PASS: &[u8] = include_bytes!("../bpf/pass.bpf.o");

/// Makes the `lan` cables behave like network cards between machines, which service datapaths count on:
/// - the end of a host or client sends frames with whole checksums: what a program steers, it does not mend;
/// - the switch's end has a program, or the kernel loses what one at the other end sends back the way it came.
fn cables_as_cards(site: &Site) -> Result<()> {
    let object = site.dir.join("pass.bpf.o");
    std::fs::write(&object, PASS).map_err(LabError::file("write", &object))?;
    let mut lines = String::new();
    for part in site.plugged_into("lan") {
        whole_checksums(&site.namespace(part), "lan0")?;
        line(
            &mut lines,
            format_args!(
                "link set dev lan-{part} xdp obj {} sec xdp",
                object.display()
            ),
        );
    }
    batch(Some(&site.namespace("switch")), &lines)
}

fn whole_checksums(space: &str, interface: &str) -> Result<()> {
    let net = format!("--net={}", namespace_path(space));
    let words = ["ethtool", "-K", interface, "tx", "off"];
    let arguments: Vec<&str> = [net.as_str()].into_iter().chain(words).collect();
    crate::process::run("nsenter", &arguments).map(drop)
}

fn build_client(site: &Site) -> Result<()> {
    let mut lines = String::from("link set lo up\n");
    line(
        &mut lines,
        format_args!("addr add {}/24 dev lan0", site.lan_address(CLIENT)?),
    );
    line(&mut lines, format_args!("link set lan0 up"));
    if site.networks == Networks::Separate {
        line(
            &mut lines,
            format_args!("addr add {}/24 dev mgmt0", site.cluster_address(CLIENT)?),
        );
        line(&mut lines, format_args!("link set mgmt0 up"));
    }
    batch(Some(&site.namespace(CLIENT)), &lines)
}

fn build_san(site: &Site) -> Result<()> {
    let mut lines = String::from("link set lo up\n");
    line(
        &mut lines,
        format_args!("addr add {}/24 dev san0", site.san_address(SAN)?),
    );
    line(&mut lines, format_args!("link set san0 up"));
    batch(Some(&site.namespace(SAN)), &lines)
}

fn build_host(site: &Site, host: &str) -> Result<()> {
    let mut lines = String::from(
        "link set lo up\n\
         link add br-lan type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         link set lan0 master br-lan up\n",
    );
    line(
        &mut lines,
        format_args!("addr add {}/24 dev br-lan", site.lan_address(host)?),
    );
    line(&mut lines, format_args!("link set br-lan up"));
    if site.networks == Networks::Separate {
        line(
            &mut lines,
            format_args!("addr add {}/24 dev mgmt0", site.cluster_address(host)?),
        );
        line(&mut lines, format_args!("link set mgmt0 up"));
    }
    if site.san {
        line(
            &mut lines,
            format_args!("addr add {}/24 dev san0", site.san_address(host)?),
        );
        line(&mut lines, format_args!("link set san0 up"));
    }
    batch(Some(&site.namespace(host)), &lines)
}

/// Removes the namespaces of a site, known or not: those that its name stands for.
pub(crate) fn remove(site: &str) -> Result<()> {
    let mut lines = String::new();
    for name in existing(site) {
        line(&mut lines, format_args!("netns del {name}"));
    }
    if lines.is_empty() {
        Ok(())
    } else {
        batch(None, &lines)
    }
}

/// The namespaces of a site that exist.
pub(crate) fn existing(site: &str) -> Vec<String> {
    let is_part = |part: &str| {
        part == "switch"
            || part == CLIENT
            || part == SAN
            || part.strip_prefix('h').is_some_and(|number| {
                !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
            })
    };
    let prefix = namespace(site, "");
    let mut names: Vec<String> = std::fs::read_dir(NAMESPACES)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.strip_prefix(&prefix).is_some_and(is_part))
        .collect();
    names.sort();
    names
}

fn line(lines: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(lines, "{text}");
}

/// Runs `ip` commands in one process.
pub(crate) fn batch(namespace: Option<&str>, lines: &str) -> Result<()> {
    let mut arguments = Vec::new();
    if let Some(name) = namespace {
        arguments.extend(["-n", name]);
    }
    arguments.extend(["-batch", "-"]);
    run_with_input("ip", &arguments, lines).map(drop)
}

/// What a power cut and a boot do to a host's network; run inside the host's namespace.
pub(crate) mod inside {
    use super::*;
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Takes the cables' carrier away, so that no farewell of a dying process leaves the host.
    pub(crate) fn unplug(site: &Site) -> Result<()> {
        all_cables(site, "down")?;
        forget_pins()
    }

    /// Where eBPF programs are pinned. Each life of a host has a file system of its own there, in the host's mount
    /// namespace: what is pinned ends with the power, as everything in a kernel.
    const PINS: &str = "/sys/fs/bpf";
    static HAS_PINS: AtomicBool = AtomicBool::new(false);

    fn forget_pins() -> Result<()> {
        if HAS_PINS.swap(false, Ordering::SeqCst) {
            unmount(PINS, UnmountFlags::DETACH)
                .map_err(|error| LabError::file("unmount", PINS)(error.into()))?;
        }
        Ok(())
    }

    /// A boot: cables up, taps and eBPF programs of the life before gone.
    pub(crate) fn boot(site: &Site) -> Result<()> {
        forget_pins()?;
        // A kernel without it runs no services; everything else of the lab works.
        let made = mount("bpf", PINS, "bpf", MountFlags::empty(), c"mode=0700");
        HAS_PINS.store(made.is_ok(), Ordering::SeqCst);
        let mut lines = String::new();
        let interfaces = Path::new("/sys/class/net");
        for entry in std::fs::read_dir(interfaces)
            .map_err(LabError::file("read", interfaces))?
            .flatten()
        {
            if entry.path().join("tun_flags").exists() {
                line(
                    &mut lines,
                    format_args!("link del {}", entry.file_name().to_string_lossy()),
                );
            }
        }
        if !lines.is_empty() {
            batch(None, &lines)?;
        }
        all_cables(site, "up")
    }

    fn all_cables(site: &Site, state: &str) -> Result<()> {
        let mut lines = String::new();
        for network in site.network_names() {
            line(&mut lines, format_args!("link set {network}0 {state}"));
        }
        batch(None, &lines)
    }
}
