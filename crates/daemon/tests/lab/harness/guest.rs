//! Guests of the tests, and the manifest that asks for them.

use quorate_lab::Site;
use quorate_lab::guest::GuestImage;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

/// When a guest counts as ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ready {
    /// Its control port answers: early in its boot.
    Port,
    /// It says so on its console.
    Says,
    /// As soon as its CPUs run.
    Running,
}

/// A guest.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    address6: Option<Ipv6Addr>,
    memory_mib: u32,
    words: String,
    hosts: Vec<String>,
    depends_on: Vec<String>,
    ready: Ready,
    lines: String,
    kernel: Option<String>,
    pool: String,
    disk_mib: u32,
    /// Its disk is a unit of the SAN.
    pub(crate) lun: bool,
}

impl Guest {
    /// The `number`th guest, from 1: 96 MiB (its kernel does not boot with 64), a log of 50 records a second.
    pub(crate) fn new(name: &str, number: u8) -> Self {
        Self {
            name: name.to_owned(),
            address: Site::guest_address(number),
            address6: None,
            memory_mib: 96,
            words: String::new(),
            hosts: Vec::new(),
            depends_on: Vec::new(),
            ready: Ready::Port,
            lines: String::new(),
            kernel: None,
            pool: "shared".to_owned(),
            disk_mib: 16,
            lun: false,
        }
    }

    /// Its disk is the unit of the SAN that has its name.
    pub(crate) fn on_lun(mut self) -> Self {
        self.lun = true;
        self
    }

    /// It has an IPv6 address besides: `fd77::` and the last number of its IPv4 address.
    pub(crate) fn with_ipv6(mut self) -> Self {
        let [.., last] = self.address.octets();
        let address = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(last));
        self.address6 = Some(address);
        self.words(&format!("qr.ip6={address}/64"))
    }

    pub(crate) fn memory(mut self, mebibytes: u32) -> Self {
        self.memory_mib = mebibytes;
        self
    }

    /// More `qr.` words for its kernel command line.
    pub(crate) fn words(mut self, words: &str) -> Self {
        let _ = write!(self.words, " {words}");
        self
    }

    /// It may run only there.
    pub(crate) fn only_on(mut self, hosts: &[&str]) -> Self {
        self.hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        self
    }

    /// It waits until that one is ready.
    pub(crate) fn after(mut self, other: &str) -> Self {
        self.depends_on.push(other.to_owned());
        self
    }

    pub(crate) fn ready(mut self, ready: Ready) -> Self {
        self.ready = ready;
        self
    }

    /// One more line of its definition, such as `shutdown_timeout: 2s`.
    pub(crate) fn line(mut self, line: &str) -> Self {
        let _ = writeln!(self.lines, "    {line}");
        self
    }

    /// Another pool for its disk.
    pub(crate) fn pool(mut self, name: &str) -> Self {
        name.clone_into(&mut self.pool);
        self
    }

    /// Another size of its disk.
    pub(crate) fn disk(mut self, mebibytes: u32) -> Self {
        self.disk_mib = mebibytes;
        self
    }

    /// Another kernel: for one that does not exist.
    pub(crate) fn kernel(mut self, path: &str) -> Self {
        self.kernel = Some(path.to_owned());
        self
    }

    fn yaml(&self, image: &GuestImage) -> String {
        let mut text = format!("  {}:\n    memory: {}MiB\n", self.name, self.memory_mib);
        let kernel = self
            .kernel
            .clone()
            .unwrap_or_else(|| image.kernel.to_string_lossy().into_owned());
        let append = quorate_lab::guest::command_line(&self.name, self.address, self.words.trim());
        let _ = write!(
            text,
            "    boot:\n      kernel:\n        kernel: {kernel}\n        initrd: {}\n        append: {append}\n",
            image.initrd.display(),
        );
        let disk = match self.lun {
            true => format!("pool: san, image: {}", self.name),
            false => format!(
                "pool: {}, image: {}.raw, size: {}MiB",
                self.pool, self.name, self.disk_mib
            ),
        };
        let _ = write!(
            text,
            "    disks: [{{{disk}}}]\n    nics: [{{network: lan, address: {}{}}}]\n",
            self.address,
            self.address6
                .map_or_else(String::new, |address| format!(", address6: '{address}'")),
        );
        match self.ready {
            Ready::Port => {
                let _ = writeln!(
                    text,
                    "    ready: {{probe: {{tcp: {{address: {}, port: 7001}}}}}}",
                    self.address
                );
            }
            Ready::Says => {
                let _ = writeln!(
                    text,
                    "    ready: {{probe: {{serial: {}}}}}",
                    quorate_guest::READY_LINE
                );
            }
            Ready::Running => {}
        }
        if !self.hosts.is_empty() {
            let _ = writeln!(text, "    hosts: [{}]", self.hosts.join(", "));
        }
        if !self.depends_on.is_empty() {
            text.push_str("    depends_on:\n");
            for other in &self.depends_on {
                let _ = writeln!(text, "      {other}: {{condition: ready}}");
            }
        }
        text.push_str(&self.lines);
        text
    }
}

/// The manifest for these guests, with the `pools:` section.
pub(crate) fn manifest(guests: &[Guest], image: &GuestImage, pools: &str) -> String {
    let mut text = format!("networks:\n  lan: {{bridge: br-lan}}\n{pools}");
    if !guests.is_empty() {
        text.push_str("vms:\n");
        for guest in guests {
            text.push_str(&guest.yaml(image));
        }
    }
    text
}
