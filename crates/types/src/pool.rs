//! Storage pools as the operator defines them.
//!
//! Always holds: a definition has no secret in it, only the name of one (`quorate secret set`), so a
//! manifest can be kept beside the code. Names of targets and initiators follow RFC 7143, section 4.2.7.

use crate::{HostName, PoolName, SecretName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// The port of iSCSI targets (RFC 7143).
pub const ISCSI_PORT: u16 = 3260;
/// Longest iSCSI name, in bytes (RFC 7143, section 4.2.7.1).
pub const MAX_ISCSI_NAME: usize = 223;
/// What initiator names begin with where a pool says nothing else.
pub const INITIATOR_PREFIX: &str = "iqn.2026-01.local.quorate";

/// A storage pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "lowercase")]
pub enum PoolSpec {
    /// A directory that all the listed hosts share (NFS, a cluster file system).
    Directory {
        /// Absolute path, the same on every host.
        path: String,
        /// Hosts that reach it; empty: all.
        #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
        hosts: BTreeSet<HostName>,
    },
    /// LUNs of an iSCSI target, opened by QEMU's own initiator or by the host's.
    Iscsi(IscsiPool),
    /// Block devices of the hosts by stable names (kernel iSCSI, Fibre Channel, multipath).
    Block(BlockPool),
    /// Images of a Ceph pool, opened by QEMU's own client.
    Rbd(RbdPool),
    /// A directory of each host's own: a disk is on one host and stays there.
    Local(LocalPool),
    /// A directory of each host's own: a disk is on its VM's host, with a synchronous copy on another.
    Mirrored(MirroredPool),
}

/// LUNs of an iSCSI target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IscsiPool {
    /// `address` or `address:port` of the target's portals; the first that answers is used.
    pub portals: Vec<String>,
    /// What the names of its targets begin with. A disk's `image` is the rest.
    pub target: String,
    /// LUN of a disk whose image does not say one.
    #[serde(default)]
    pub lun: u32,
    /// How hosts say who they are; absent: by their initiator name only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chap: Option<Chap>,
    /// How a host's access is taken away at the target; absent: it cannot be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<AccessControl>,
    /// What initiator names begin with; absent: [`INITIATOR_PREFIX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initiator: Option<String>,
    /// Whose initiator opens a disk. The same on every host: what one proves does not hold for the other.
    #[serde(default, skip_serializing_if = "Opener::is_qemu")]
    pub opened_by: Opener,
    /// Hosts that reach it; empty: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
}

/// An iSCSI initiator of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Opener {
    /// QEMU's own (libiscsi): nothing has to be set up on the hosts.
    #[default]
    Qemu,
    /// The host's kernel (open-iscsi): a disk is a block device of the host, and its unit can have reservations.
    Kernel,
}

impl Opener {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    fn is_qemu(&self) -> bool {
        *self == Self::Qemu
    }
}

/// An account at an iSCSI target (CHAP, RFC 7143 section 12.1.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chap {
    /// Its name.
    pub user: String,
    /// Which of the cluster's secrets is its password.
    pub secret: SecretName,
}

/// How the SAN is told to let a host in or to keep it out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessControl {
    /// `tgtadm` of the Linux SCSI target framework.
    Tgt(TgtAccess),
    /// The Linux kernel's target (LIO), by `targetcli`.
    Lio(LioAccess),
    /// A command of the operator's, for any array.
    Exec(ExecAccess),
}

impl AccessControl {
    /// Its name in a manifest.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tgt(_) => "tgt",
            Self::Lio(_) => "lio",
            Self::Exec(_) => "exec",
        }
    }
}

/// A `tgtd` and the way to it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TgtAccess {
    /// Its control port (`tgtd -C`).
    pub control: u32,
    /// Words before `tgtadm`, for a target on another machine: `[ssh, root@san]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub via: Vec<String>,
}

/// A LIO target and the way to it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LioAccess {
    /// Target portal group.
    pub tpg: u32,
    /// Words before the shell that is run there, for a target on another machine: `[ssh, root@san]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub via: Vec<String>,
}

/// A command that changes access lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecAccess {
    /// Program (an absolute path) and its first arguments.
    pub command: Vec<String>,
    /// Which of the cluster's secrets it gets as `secret=` on its standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretName>,
}

/// Block devices of the hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockPool {
    /// Directory of stable names: `/dev/disk/by-id`, `/dev/mapper`. A disk's `image` is a name in it.
    #[serde(default = "by_id")]
    pub path: String,
    /// Whether the devices decide who writes, by SCSI persistent reservations.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub reservations: bool,
    /// Hosts that reach the devices; empty: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
}

/// Images of a Ceph pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RbdPool {
    /// Name of the pool in Ceph.
    pub ceph_pool: String,
    /// Ceph user, without `client.`.
    #[serde(default = "ceph_user")]
    pub user: String,
    /// Ceph's configuration on the hosts.
    #[serde(default = "ceph_conf")]
    pub conf: String,
    /// Which of the cluster's secrets is the user's key; absent: the hosts' keyring has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretName>,
    /// Whether a silent host's clients are put on Ceph's block list, which proves that they write no more.
    #[serde(default)]
    pub blocklist: bool,
    /// Hosts that reach it; empty: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
}

fn ceph_user() -> String {
    "admin".to_owned()
}

fn ceph_conf() -> String {
    "/etc/ceph/ceph.conf".to_owned()
}

fn yes() -> bool {
    true
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_true(value: &bool) -> bool {
    *value
}

fn by_id() -> String {
    "/dev/disk/by-id".to_owned()
}

/// Directories of the hosts' own disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalPool {
    /// Absolute path, the same on every host; each host has its own content there.
    pub path: String,
    /// Hosts that have it; empty: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
}

/// Directories of the hosts' own disks, with a copy of each disk on a second host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirroredPool {
    /// Absolute path, the same on every host; each host has its own content there.
    pub path: String,
    /// How fast a copy that is not in step is brought up to date, in MiB per second; 0: as fast as it goes.
    #[serde(default = "resync_speed")]
    pub resync_mib_per_s: u64,
    /// Hosts that have it; empty: all.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hosts: BTreeSet<HostName>,
}

/// A tenth of a 10 Gbit/s link: a resync must not starve guests.
fn resync_speed() -> u64 {
    128
}

/// A logical unit as initiators name it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lun {
    /// Name of the target.
    pub target: String,
    /// Number in it.
    pub lun: u32,
}

impl fmt::Display for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} LUN {}", self.target, self.lun)
    }
}

impl PoolSpec {
    /// The kind, as manifests call it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Directory { .. } => "directory",
            Self::Iscsi(_) => "iscsi",
            Self::Block(_) => "block",
            Self::Rbd(_) => "rbd",
            Self::Local(_) => "local",
            Self::Mirrored(_) => "mirrored",
        }
    }

    /// Hosts that the operator says reach the pool; empty: all.
    pub fn hosts(&self) -> &BTreeSet<HostName> {
        match self {
            Self::Directory { hosts, .. } => hosts,
            Self::Iscsi(pool) => &pool.hosts,
            Self::Block(pool) => &pool.hosts,
            Self::Rbd(pool) => &pool.hosts,
            Self::Local(pool) => &pool.hosts,
            Self::Mirrored(pool) => &pool.hosts,
        }
    }

    /// Whether the operator says that this host reaches the pool.
    pub fn is_for(&self, host: &HostName) -> bool {
        self.hosts().is_empty() || self.hosts().contains(host)
    }

    /// What a disk's image is, by a name that is the same however it is written: two disks with equal names are
    /// one. `pool` is this pool's name.
    pub fn identity(&self, pool: &PoolName, image: &str) -> String {
        match self {
            Self::Directory { .. } | Self::Local(_) | Self::Mirrored(_) => {
                format!("{pool}/{image}")
            }
            Self::Iscsi(spec) => match spec.lun_of(image) {
                Ok(unit) => unit.to_string(),
                Err(_) => format!("{pool}/{image}"),
            },
            Self::Block(spec) => format!("{}/{image}", spec.path.trim_end_matches('/')),
            Self::Rbd(spec) => format!("rbd:{}/{image}", spec.ceph_pool),
        }
    }

    /// Where its images are files of the hosts: the path.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::Directory { path, .. } => Some(path),
            Self::Local(pool) => Some(&pool.path),
            Self::Mirrored(pool) => Some(&pool.path),
            Self::Iscsi(_) | Self::Block(_) | Self::Rbd(_) => None,
        }
    }

    /// Whether each host has a content of its own there, so that it matters which host has a disk.
    pub fn is_hosts_own(&self) -> bool {
        matches!(self, Self::Local(_) | Self::Mirrored(_))
    }

    /// The one name of an image: a unit of a SAN can be written with its target and number, or by a short name.
    #[must_use]
    pub fn canonical(&self, image: &str) -> String {
        let canonical = match self {
            Self::Iscsi(pool) => pool
                .lun_of(image)
                .ok()
                .and_then(|unit| pool.image_of(&unit.target, unit.lun)),
            _ => None,
        };
        canonical.unwrap_or_else(|| image.to_owned())
    }

    /// Whether a disk has a copy on a second host.
    pub fn is_mirrored(&self) -> bool {
        matches!(self, Self::Mirrored(_))
    }

    /// Whether it has room for files beside disks, such as saved memory.
    pub fn holds_files(&self) -> bool {
        matches!(self, Self::Directory { .. })
    }

    /// Secrets that it names.
    pub fn secrets(&self) -> BTreeSet<&SecretName> {
        let pool = match self {
            Self::Iscsi(pool) => pool,
            Self::Rbd(pool) => return pool.secret.iter().collect(),
            Self::Directory { .. } | Self::Block(_) | Self::Local(_) | Self::Mirrored(_) => {
                return BTreeSet::new();
            }
        };
        let chap = pool.chap.as_ref().map(|chap| &chap.secret);
        let exec = match &pool.access {
            Some(AccessControl::Exec(exec)) => exec.secret.as_ref(),
            _ => None,
        };
        chap.into_iter().chain(exec).collect()
    }

    /// How a host's access is taken away at the SAN, if it can be.
    pub fn access(&self) -> Option<&AccessControl> {
        match self {
            Self::Iscsi(pool) => pool.access.as_ref(),
            _ => None,
        }
    }
}

impl IscsiPool {
    /// Whether the units themselves decide who writes, by SCSI persistent reservations: where the host's kernel opens them, and
    /// no access list decides.
    pub fn has_reservations(&self) -> bool {
        self.opened_by == Opener::Kernel && self.access.is_none()
    }

    /// The unit that a disk's image names: `NAME` or `NAME/LUN`, below the pool's prefix. `.` stands for
    /// the target that has the prefix itself as its name.
    ///
    /// # Errors
    /// A sentence about a number that is none, or a name that no target can have.
    pub fn lun_of(&self, image: &str) -> Result<Lun, String> {
        let (name, lun) = match image.rsplit_once('/') {
            Some((name, lun)) => {
                let lun = lun.parse::<u32>().ok().filter(|lun| *lun < 16_384);
                let wrong =
                    || format!("`{image}`: after `/` comes the number of a LUN, 0 to 16383");
                (name, lun.ok_or_else(wrong)?)
            }
            None => (image, self.lun),
        };
        let target = match name {
            "." | "" => self.target.clone(),
            name => format!("{}:{name}", self.target),
        };
        check_iscsi_name(&target)?;
        Ok(Lun { target, lun })
    }

    /// The image that names this target of the pool, if it is one of the pool's.
    pub fn image_of(&self, target: &str, lun: u32) -> Option<String> {
        let rest = target.strip_prefix(&self.target)?;
        let name = match rest.strip_prefix(':') {
            Some(name) if !name.is_empty() => name,
            None if rest.is_empty() => ".",
            _ => return None,
        };
        Some(match lun == self.lun {
            true => name.to_owned(),
            false => format!("{name}/{lun}"),
        })
    }

    /// The name by which a host logs in: one for each host and cluster.
    pub fn initiator(&self, cluster_id: &str, host: &HostName) -> String {
        let prefix = self.initiator.as_deref().unwrap_or(INITIATOR_PREFIX);
        let cluster: String = cluster_id
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .take(12)
            .collect();
        format!("{prefix}:{}.{host}", cluster.to_ascii_lowercase())
    }

    /// The name by which a drill logs in: no host has it.
    pub fn drill_initiator(&self, cluster_id: &str) -> String {
        let prefix = self.initiator.as_deref().unwrap_or(INITIATOR_PREFIX);
        let letters = cluster_id.chars().filter(char::is_ascii_alphanumeric);
        let cluster: String = letters.take(12).collect();
        format!("{prefix}:{}-drill", cluster.to_ascii_lowercase())
    }

    /// Its portals, each with its port.
    pub fn portals(&self) -> impl Iterator<Item = String> + '_ {
        self.portals.iter().map(|portal| with_port(portal))
    }
}

fn with_port(portal: &str) -> String {
    let bare_v6 = portal.matches(':').count() > 1 && !portal.starts_with('[');
    let port = portal
        .rsplit_once(':')
        .filter(|(_, port)| port.parse::<u16>().is_ok());
    match (bare_v6, port) {
        (true, _) => format!("[{portal}]:{ISCSI_PORT}"),
        (false, Some(_)) => portal.to_owned(),
        (false, None) => format!("{portal}:{ISCSI_PORT}"),
    }
}

/// Checks the name of a target or an initiator (RFC 7143, section 4.2.7; RFC 3722).
///
/// # Errors
/// A sentence.
pub fn check_iscsi_name(name: &str) -> Result<(), String> {
    let good =
        |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | ':');
    if name.len() > MAX_ISCSI_NAME {
        return Err(format!(
            "the iSCSI name `{name}` is longer than {MAX_ISCSI_NAME} bytes"
        ));
    }
    let known = ["iqn.", "eui.", "naa."];
    if !known.iter().any(|prefix| name.starts_with(prefix)) {
        return Err(format!(
            "`{name}` is no iSCSI name: it begins with `iqn.`, as in `iqn.2026-01.com.example:san`"
        ));
    }
    if let Some(bad) = name.chars().find(|c| !good(*c)) {
        return Err(format!(
            "the iSCSI name `{name}` has a `{bad}`: use lower-case letters, digits, `-`, `.` and `:`"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> IscsiPool {
        let text = r#"{"portals":["10.0.0.5","10.0.0.6:3261","fd00::5"],"target":"iqn.2026-01.com.example:san","lun":1}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn images_name_units_and_back() {
        let pool = pool();
        for (image, target, lun) in [
            ("db", "iqn.2026-01.com.example:san:db", 1),
            ("db/3", "iqn.2026-01.com.example:san:db", 3),
            (".", "iqn.2026-01.com.example:san", 1),
            ("./7", "iqn.2026-01.com.example:san", 7),
        ] {
            let unit = pool.lun_of(image).unwrap();
            assert_eq!((unit.target.as_str(), unit.lun), (target, lun), "{image}");
            assert_eq!(pool.image_of(&unit.target, unit.lun).unwrap(), image);
        }
        assert_eq!(pool.image_of("iqn.2026-01.com.example:sandbox", 1), None);
        for bad in ["db/x", "db/-1", "db/99999", "DB", "d b", "db/1/2"] {
            assert!(pool.lun_of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_unit_has_one_identity_however_it_is_written() {
        let name = |text| PoolName::new(text).unwrap();
        let spec = PoolSpec::Iscsi(pool());
        let whole = spec.identity(&name("san"), "db/1");
        assert_eq!(whole, spec.identity(&name("other"), "db"));
        assert_ne!(whole, spec.identity(&name("san"), "db/2"));
        let nas: PoolSpec = serde_json::from_str(r#"{"kind":"directory","path":"/p"}"#).unwrap();
        assert_ne!(nas.identity(&name("a"), "x"), nas.identity(&name("b"), "x"));
    }

    #[test]
    fn portals_get_their_port() {
        let portals: Vec<_> = pool().portals().collect();
        assert_eq!(
            portals,
            ["10.0.0.5:3260", "10.0.0.6:3261", "[fd00::5]:3260"]
        );
    }

    #[test]
    fn initiators_differ_by_cluster_and_host() {
        let host = |name| HostName::new(name).unwrap();
        let name = pool().initiator("0A1B2C3D-4E5F-aaaa", &host("h1"));
        assert_eq!(name, "iqn.2026-01.local.quorate:0a1b2c3d4e5f.h1");
        assert!(check_iscsi_name(&name).is_ok());
        assert_ne!(name, pool().initiator("0A1B2C3D-4E5F-aaaa", &host("h2")));
    }

    #[test]
    fn one_thing_decides_who_writes() {
        let with = |more: &str| {
            let text = format!(
                r#"{{"portals":["10.0.0.5"],"target":"iqn.2026-01.com.example:san"{more}}}"#
            );
            serde_json::from_str::<IscsiPool>(&text).unwrap()
        };
        assert!(!with("").has_reservations(), "QEMU's session is nobody's");
        assert!(with(r#","opened_by":"kernel""#).has_reservations());
        let list = with(r#","opened_by":"kernel","access":{"lio":{}}"#);
        assert!(!list.has_reservations());
        let shown = serde_json::to_string(&with("")).unwrap();
        assert!(!shown.contains("opened_by"), "as it was written: {shown}");
    }

    #[test]
    fn definitions_are_strict() {
        let refused = |text: &str| {
            serde_json::from_str::<PoolSpec>(text)
                .unwrap_err()
                .to_string()
        };
        let unknown = refused(r#"{"kind":"iscsi","portals":[],"target":"iqn.x","password":"p"}"#);
        assert!(unknown.contains("password"), "{unknown}");
        let block: PoolSpec = serde_json::from_str(r#"{"kind":"block"}"#).unwrap();
        let PoolSpec::Block(block) = block else {
            unreachable!()
        };
        assert_eq!(block.path, "/dev/disk/by-id");
    }
}
