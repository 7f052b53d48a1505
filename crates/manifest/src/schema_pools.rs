//! The shape of pools other than directories.

use super::{Kind, Struct, optional, required};

const LUNS: i64 = 16_383;
const U16: i64 = 65_535;
/// `tgtd` refuses larger control ports.
const CONTROL: i64 = 32_766;

pub(super) static ISCSI: Struct = Struct {
    what: "an iSCSI pool",
    fields: &[
        required(
            "portals",
            Kind::List(&Kind::Text),
            "portals: [10.0.0.5]",
            "Addresses of the target, with a port if it is not 3260; the first that answers is used.",
        ),
        required(
            "target",
            Kind::Text,
            "target: iqn.2026-01.com.example:san",
            "What the names of its targets begin with; a disk's image is the rest.",
        ),
        optional(
            "lun",
            Kind::Int(0, LUNS),
            "LUN of a disk whose image does not say one.",
        ),
        optional(
            "chap",
            Kind::Struct(&CHAP),
            "Account at the target; absent: hosts log in by name only.",
        ),
        optional(
            "access",
            Kind::Either(
                &[],
                &[
                    ("tgt", &Kind::Struct(&TGT)),
                    ("lio", &Kind::Struct(&LIO)),
                    ("exec", &Kind::Struct(&EXEC)),
                ],
            ),
            "How a host's access is taken away at the target.",
        ),
        optional(
            "initiator",
            Kind::Text,
            "What the names begin with by which hosts log in.",
        ),
        optional(
            "opened_by",
            Kind::Choice(&["qemu", "kernel"]),
            "Whose initiator opens a disk: QEMU's own, or the host's (open-iscsi), whose units have reservations; absent: qemu.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts that reach it; empty: all.",
        ),
    ],
};

static CHAP: Struct = Struct {
    what: "an account",
    fields: &[
        required("user", Kind::Text, "user: quorate", "Its name."),
        required(
            "secret",
            Kind::Name,
            "secret: san",
            "Name of its password (`quorate secret set san`).",
        ),
    ],
};

static TGT: Struct = Struct {
    what: "the access to a tgtd",
    fields: &[
        optional(
            "control",
            Kind::Int(0, CONTROL),
            "Its control port (`tgtd -C`).",
        ),
        optional(
            "via",
            Kind::List(&Kind::Text),
            "Words before `tgtadm`, for a target on another machine: [ssh, root@san].",
        ),
    ],
};

static LIO: Struct = Struct {
    what: "the access to a LIO target",
    fields: &[
        optional("tpg", Kind::Int(0, U16), "Target portal group; 0: 1."),
        optional(
            "via",
            Kind::List(&Kind::Text),
            "Words before the shell, for a target on another machine: [ssh, root@san].",
        ),
    ],
};

static EXEC: Struct = Struct {
    what: "a command",
    fields: &[
        required(
            "command",
            Kind::List(&Kind::Text),
            "command: [/usr/local/sbin/san-access]",
            "Program (an absolute path) and its first arguments.",
        ),
        optional(
            "secret",
            Kind::Name,
            "Name of the password that it gets on its standard input.",
        ),
    ],
};

pub(super) static BLOCK: Struct = Struct {
    what: "a pool of block devices",
    fields: &[
        optional(
            "path",
            Kind::Text,
            "Directory of the devices' names; absent: /dev/disk/by-id.",
        ),
        optional(
            "reservations",
            Kind::Bool,
            "Whether the devices decide who writes, by SCSI persistent reservations; absent: true.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts that reach the devices; empty: all.",
        ),
    ],
};

pub(super) static RBD: Struct = Struct {
    what: "a pool of Ceph images",
    fields: &[
        required(
            "ceph_pool",
            Kind::Text,
            "ceph_pool: vms",
            "Name of the pool in Ceph.",
        ),
        optional(
            "user",
            Kind::Text,
            "Ceph user, without `client.`; absent: admin.",
        ),
        optional(
            "conf",
            Kind::Text,
            "Ceph's configuration on the hosts; absent: /etc/ceph/ceph.conf.",
        ),
        optional(
            "secret",
            Kind::Name,
            "Name of the user's key (`quorate secret set`); absent: the hosts' keyring has it.",
        ),
        optional(
            "blocklist",
            Kind::Bool,
            "Put a silent host's address on Ceph's block list: proves that it writes no more.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts that reach it; empty: all.",
        ),
    ],
};

pub(super) static LOCAL: Struct = Struct {
    what: "a local pool",
    fields: &[
        required(
            "path",
            Kind::Text,
            "path: /srv/vms",
            "Absolute path, the same on every host; each host has its own content there.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts that have it; empty: all.",
        ),
    ],
};

pub(super) static MIRRORED: Struct = Struct {
    what: "a mirrored pool",
    fields: &[
        required(
            "path",
            Kind::Text,
            "path: /srv/vms",
            "Absolute path, the same on every host; each host has its own content there.",
        ),
        optional(
            "resync_mib_per_s",
            Kind::Int(0, 1_000_000),
            "How fast a copy is brought up to date, in MiB per second (default 128); 0: as fast as it goes.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts that have it, two at least; empty: all.",
        ),
    ],
};
