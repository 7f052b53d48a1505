//! What a lab is made of: names, addresses, files. Only data; `lab` makes it real.

use crate::{LabError, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Most hosts of a lab: hosts take .1 to .9, guests .11 and up, the client .250.
pub const MAX_HOSTS: u32 = 9;
/// Port of the cluster's traffic.
pub const CLUSTER_PORT: u16 = 7700;
/// Where labs keep their files.
pub const DEFAULT_ROOT: &str = "/var/lib/quorate-lab";
/// The site when none is named; its namespaces are `qr-h1`, `qr-switch`, ...
pub const DEFAULT_SITE: &str = "lab";
/// Name of the client's namespace and switch ports.
pub const CLIENT: &str = "client";
/// Name of the SAN's namespace and switch port, and of its network.
pub const SAN: &str = "san";

/// How the hosts are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Networks {
    /// Cluster traffic on a network of its own.
    #[default]
    Separate,
    /// Cluster traffic and guests on one network.
    Single,
}

/// What to build.
#[derive(Debug, Clone)]
pub struct SiteSpec {
    /// Name of the site: 1 to 8 lower-case letters and digits.
    pub site: String,
    /// Number of hosts.
    pub hosts: u32,
    /// Networks.
    pub networks: Networks,
    /// With a SAN, on a network of its own.
    pub san: bool,
    /// Where labs keep their files.
    pub root: PathBuf,
    /// The daemon's program and arguments before `serve`; normally the path of `quorate`.
    pub daemon: Vec<String>,
    /// Program and arguments that lead to the lab's tools; normally `quorate lab-tool`.
    pub tool: Vec<String>,
    /// More environment for the daemon.
    pub environment: BTreeMap<String, String>,
    /// Start a host again this long after its watchdog ended it.
    pub reboot_after_ms: Option<u64>,
    /// End all hosts when this process ends: a test that is killed leaves no guests behind.
    pub owner: Option<u32>,
    /// Hold each host's processes in a cgroup where that can be done; otherwise find them by their namespace.
    pub cgroups: bool,
}

impl SiteSpec {
    /// Three hosts of the default site, run by this very program.
    #[must_use]
    pub fn new(program: &Path) -> Self {
        let program = program.to_string_lossy().into_owned();
        Self {
            site: DEFAULT_SITE.to_owned(),
            hosts: 3,
            networks: Networks::default(),
            san: false,
            root: PathBuf::from(DEFAULT_ROOT),
            daemon: vec![program.clone()],
            tool: vec![program, "lab-tool".to_owned()],
            environment: BTreeMap::new(),
            reboot_after_ms: None,
            owner: None,
            cgroups: true,
        }
    }
}

/// A lab as it is recorded in its `lab.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Name of the site.
    pub site: String,
    /// The folder of this lab.
    pub dir: PathBuf,
    /// Host names, in order.
    pub hosts: Vec<String>,
    /// Networks.
    pub networks: Networks,
    /// See [`SiteSpec::san`].
    #[serde(default)]
    pub san: bool,
    /// See [`SiteSpec::daemon`].
    pub daemon: Vec<String>,
    /// See [`SiteSpec::tool`].
    pub tool: Vec<String>,
    /// See [`SiteSpec::environment`].
    pub environment: BTreeMap<String, String>,
    /// See [`SiteSpec::reboot_after_ms`].
    pub reboot_after_ms: Option<u64>,
    /// See [`SiteSpec::owner`].
    pub owner: Option<u32>,
    /// See [`SiteSpec::cgroups`].
    pub cgroups: bool,
}

impl Site {
    /// Checks a specification and gives everything its name.
    pub fn plan(spec: SiteSpec) -> Result<Self> {
        check_name(&spec.site)?;
        if !(1..=MAX_HOSTS).contains(&spec.hosts) {
            return Err(LabError::BadHosts {
                asked: spec.hosts,
                most: MAX_HOSTS,
            });
        }
        Ok(Self {
            dir: spec.root.join(&spec.site),
            hosts: (1..=spec.hosts)
                .map(|number| format!("h{number}"))
                .collect(),
            site: spec.site,
            networks: spec.networks,
            san: spec.san,
            daemon: spec.daemon,
            tool: spec.tool,
            environment: spec.environment,
            reboot_after_ms: spec.reboot_after_ms,
            owner: spec.owner,
            cgroups: spec.cgroups,
        })
    }

    /// Reads the record of a lab.
    pub fn load(root: &Path, site: &str) -> Result<Self> {
        check_name(site)?;
        let path = root.join(site).join("lab.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(LabError::NotUp {
                    site: site.to_owned(),
                });
            }
            Err(error) => return Err(LabError::file("read", path)(error)),
        };
        serde_json::from_slice(&bytes).map_err(|source| LabError::Corrupt { path, source })
    }

    /// Writes the record.
    pub fn save(&self) -> Result<()> {
        std::fs::create_dir_all(&self.dir).map_err(LabError::file("create", &self.dir))?;
        let path = self.record();
        let text = serde_json::to_vec_pretty(self).map_err(|source| LabError::Corrupt {
            path: path.clone(),
            source,
        })?;
        std::fs::write(&path, text).map_err(LabError::file("write", path))
    }

    /// The record's file.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.dir.join("lab.json")
    }

    /// Name of a namespace: `part` is a host, `switch`, `client` or `san`.
    #[must_use]
    pub fn namespace(&self, part: &str) -> String {
        namespace(&self.site, part)
    }

    /// All namespaces.
    #[must_use]
    pub fn namespaces(&self) -> Vec<String> {
        self.parts().map(|part| self.namespace(part)).collect()
    }

    fn parts(&self) -> impl Iterator<Item = &str> {
        ["switch", CLIENT]
            .into_iter()
            .chain(self.san.then_some(SAN))
            .chain(self.hosts.iter().map(String::as_str))
    }

    /// The switch's networks.
    #[must_use]
    pub fn network_names(&self) -> Vec<&'static str> {
        let mut names = match self.networks {
            Networks::Separate => vec!["lan", "mgmt"],
            Networks::Single => vec!["lan"],
        };
        if self.san {
            names.push(SAN);
        }
        names
    }

    /// What is plugged into a network of the switch: hosts, and the client or the SAN.
    pub fn plugged_into(&self, network: &str) -> impl Iterator<Item = &str> {
        let other = if network == SAN { SAN } else { CLIENT };
        self.hosts.iter().map(String::as_str).chain([other])
    }

    /// An error unless the site has this host, client or SAN.
    pub fn check_part(&self, part: &str) -> Result<()> {
        match part {
            CLIENT => Ok(()),
            SAN if self.san => Ok(()),
            SAN => Err(LabError::NoSan {
                site: self.site.clone(),
            }),
            host => self.number(host).map(drop),
        }
    }

    /// The host's files that are the lab's.
    #[must_use]
    pub fn host_dir(&self, host: &str) -> PathBuf {
        self.dir.join(host)
    }

    /// The SAN's files: backing files, configuration, log.
    #[must_use]
    pub fn san_dir(&self) -> PathBuf {
        self.dir.join(SAN)
    }

    /// Address on the SAN's network; `.240` for the SAN.
    pub fn san_address(&self, part: &str) -> Result<Ipv4Addr> {
        self.check_part(SAN)?;
        Ok(Ipv4Addr::new(10, 79, 0, self.last_byte(part)?))
    }

    /// The host's state directory: the daemon's `--dir`.
    #[must_use]
    pub fn data_dir(&self, host: &str) -> PathBuf {
        self.host_dir(host).join("data")
    }

    /// The daemon's log.
    #[must_use]
    pub fn daemon_log(&self, host: &str) -> PathBuf {
        self.host_dir(host).join("daemon.log")
    }

    /// The directory that all hosts share: the lab's storage pool.
    #[must_use]
    pub fn shared_dir(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// The lab guest's kernel and initial RAM file system, when they were built.
    #[must_use]
    pub fn guest_dir(&self) -> PathBuf {
        self.dir.join("guest")
    }

    /// Programs for the hosts: the fence agent, and copies of `quorate`.
    #[must_use]
    pub fn bin_dir(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// Number of a host, from 1.
    pub fn number(&self, host: &str) -> Result<u8> {
        self.hosts
            .iter()
            .position(|name| name == host)
            .and_then(|index| u8::try_from(index + 1).ok())
            .ok_or_else(|| LabError::UnknownHost {
                host: host.to_owned(),
                known: self.hosts.join(", "),
            })
    }

    /// Address on the guests' network; `.250` for the client.
    pub fn lan_address(&self, part: &str) -> Result<Ipv4Addr> {
        Ok(Ipv4Addr::new(10, 77, 0, self.last_byte(part)?))
    }

    /// Address of the cluster's traffic.
    pub fn cluster_address(&self, part: &str) -> Result<Ipv4Addr> {
        match self.networks {
            Networks::Separate => Ok(Ipv4Addr::new(10, 78, 0, self.last_byte(part)?)),
            Networks::Single => self.lan_address(part),
        }
    }

    fn last_byte(&self, part: &str) -> Result<u8> {
        match part {
            CLIENT => Ok(250),
            SAN => Ok(240),
            host => self.number(host),
        }
    }

    /// Address of the `number`th guest, from 1.
    #[must_use]
    pub fn guest_address(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 10 + number)
    }
}

/// Name of a namespace of a site.
#[must_use]
pub fn namespace(site: &str, part: &str) -> String {
    if site == DEFAULT_SITE {
        format!("qr-{part}")
    } else {
        format!("qr-{site}-{part}")
    }
}

fn check_name(site: &str) -> Result<()> {
    let good = (1..=8).contains(&site.len())
        && site
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if good {
        Ok(())
    } else {
        Err(LabError::BadSite {
            site: site.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(name: &str, hosts: u32) -> Result<Site> {
        let mut spec = SiteSpec::new(Path::new("/bin/quorate"));
        spec.site = name.to_owned();
        spec.hosts = hosts;
        Site::plan(spec)
    }

    #[test]
    fn the_default_site_has_short_names() {
        assert_eq!(
            site("lab", 2).unwrap().namespaces(),
            ["qr-switch", "qr-client", "qr-h1", "qr-h2"]
        );
        assert_eq!(site("t1", 1).unwrap().namespace("h1"), "qr-t1-h1");
    }

    #[test]
    fn addresses_do_not_collide() {
        let site = site("lab", 9).unwrap();
        assert_eq!(site.lan_address("h9").unwrap().to_string(), "10.77.0.9");
        assert_eq!(Site::guest_address(1).to_string(), "10.77.0.11");
        assert_eq!(
            site.cluster_address(CLIENT).unwrap().to_string(),
            "10.78.0.250"
        );
    }

    #[test]
    fn bad_names_are_refused_with_what_to_do() {
        assert!(
            site("../etc", 3)
                .unwrap_err()
                .to_string()
                .contains("lower-case")
        );
        assert!(site("lab", 10).unwrap_err().to_string().contains("1 to 9"));
        let error = site("lab", 2)
            .unwrap()
            .number("h7")
            .unwrap_err()
            .to_string();
        assert!(error.contains("h1, h2"), "{error}");
    }
}
