//! The shape of a manifest as a table.
//!
//! Owns: which fields exist, of which kind, and one line about each. It mirrors `quorate-types`; a
//! test deserialises what the table accepts, so the two cannot drift apart unseen. A table (rather
//! than serde alone) lets one pass find every error, with positions, and writes the JSON schema.

#[path = "schema_pools.rs"]
mod pools;
#[path = "schema_services.rs"]
mod services;

/// What a value must look like.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A name: a DNS label.
    Name,
    /// Any text, not empty.
    Text,
    /// Any text, also empty.
    Line,
    /// A size with a unit.
    Size,
    /// A duration with a unit.
    Duration,
    /// A whole number in this range.
    Int(i64, i64),
    /// Yes or no.
    Bool,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// An IP address.
    Address,
    /// An IPv6 address.
    Address6,
    /// Addresses with equal leading bits, of IPv4 or of IPv6.
    Subnet(bool),
    /// A port or a range of ports.
    Ports,
    /// A list.
    List(&'static Kind),
    /// A list of names without repetition.
    Names(&'static str),
    /// A map from names to something; the text says what the names name.
    Map(&'static str, &'static Kind),
    /// A map of free words to text.
    TextMap,
    /// A map from names, or a plain list of names that all take the defaults.
    MapOrNames(&'static str, &'static Kind),
    /// A map with known fields.
    Struct(&'static Struct),
    /// One of these words, or a map with exactly one of these keys.
    Either(
        &'static [&'static str],
        &'static [(&'static str, &'static Kind)],
    ),
    /// A map with known fields, of which exactly one of these must be there.
    OneOf(&'static Struct, &'static [&'static str]),
    /// A map whose field of this name chooses the other fields.
    Tagged(&'static str, &'static [(&'static str, &'static Struct)]),
}

/// A map with known fields.
#[derive(Debug)]
pub(crate) struct Struct {
    /// What it is, with its article: "a VM".
    pub(crate) what: &'static str,
    pub(crate) fields: &'static [Field],
}

/// A field of a [`Struct`].
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// An example for the hint, where the field must be given.
    pub(crate) required: Option<&'static str>,
    pub(crate) doc: &'static str,
}

const fn optional(name: &'static str, kind: Kind, doc: &'static str) -> Field {
    Field {
        name,
        kind,
        required: None,
        doc,
    }
}

const fn required(
    name: &'static str,
    kind: Kind,
    example: &'static str,
    doc: &'static str,
) -> Field {
    Field {
        name,
        kind,
        required: Some(example),
        doc,
    }
}

const U32: i64 = u32::MAX as i64;

/// The whole manifest.
pub(crate) static MANIFEST: Struct = Struct {
    what: "a manifest",
    fields: &[
        optional(
            "cluster",
            Kind::Struct(&CLUSTER),
            "Settings of the whole cluster; those that are left out stay as they are.",
        ),
        optional(
            "hosts",
            Kind::Map("host", &Kind::Struct(&HOST)),
            "Labels and resources of hosts, by name.",
        ),
        optional(
            "networks",
            Kind::Map("network", &Kind::Struct(&NETWORK)),
            "Networks by name.",
        ),
        optional(
            "pools",
            Kind::Map(
                "pool",
                &Kind::Tagged(
                    "kind",
                    &[
                        ("directory", &DIRECTORY),
                        ("iscsi", &pools::ISCSI),
                        ("block", &pools::BLOCK),
                        ("rbd", &pools::RBD),
                        ("local", &pools::LOCAL),
                        ("mirrored", &pools::MIRRORED),
                    ],
                ),
            ),
            "Storage pools by name.",
        ),
        optional(
            "vms",
            Kind::Map("VM", &Kind::Struct(&VM)),
            "Virtual machines by name.",
        ),
        optional(
            "rules",
            Kind::Map(
                "rule",
                &Kind::OneOf(&RULE, &["keep_apart", "keep_with", "spread"]),
            ),
            "Placement rules by name.",
        ),
        optional(
            "services",
            Kind::Map("service", &Kind::Struct(&services::SERVICE)),
            "Services by name: an address and ports that are spread over VMs.",
        ),
    ],
};

const WEIGHT: i64 = quorate_types::placement::MAX_WEIGHT as i64;
const COUNT: i64 = 1_000_000_000_000;

static RULE: Struct = Struct {
    what: "a rule",
    fields: &[
        optional(
            "keep_apart",
            Kind::Names("VM"),
            "No two of these in one domain (or at most `max`).",
        ),
        optional("keep_with", Kind::Names("VM"), "All of these on one host."),
        optional(
            "spread",
            Kind::Names("VM"),
            "These as evenly over the domains as their number allows.",
        ),
        optional(
            "across",
            Kind::Name,
            "The label of hosts whose values are the domains; absent: each host is one.",
        ),
        optional(
            "max",
            Kind::Int(1, 10_000),
            "Most of these VMs in one domain.",
        ),
        optional(
            "weight",
            Kind::Int(1, WEIGHT),
            "Soft, with this weight (1000: as much as an empty against a full host); absent: hard.",
        ),
    ],
};

static HOST: Struct = Struct {
    what: "a host",
    fields: &[
        optional(
            "labels",
            Kind::Map("label", &Kind::Name),
            "Where and what it is, as in `rack: r1`.",
        ),
        optional(
            "resources",
            Kind::Map("resource", &Kind::Int(0, COUNT)),
            "Countable things that guests use up, as in `gpu: 2`.",
        ),
        optional(
            "cpu_overcommit_percent",
            Kind::Int(0, 100_000),
            "Most virtual CPUs in percent of its threads; 0: no limit; absent: as the cluster.",
        ),
        optional(
            "parallel_migrations",
            Kind::Int(1, 64),
            "Migrations at the same time from or to it; absent: as the cluster.",
        ),
    ],
};

static PREFERENCE: Struct = Struct {
    what: "a preference",
    fields: &[
        optional(
            "hosts",
            Kind::Names("host"),
            "The hosts that it is about; empty: any.",
        ),
        optional(
            "labels",
            Kind::Map("label", &Kind::Names("value")),
            "Labels that these hosts have: label to accepted values.",
        ),
        optional(
            "weight",
            Kind::Int(-WEIGHT, WEIGHT),
            "How much (1000: as much as an empty against a full host); negative: rather not.",
        ),
    ],
};

static CLUSTER: Struct = Struct {
    what: "the cluster section",
    fields: &[
        optional(
            "lease",
            Kind::Struct(&LEASE),
            "Timing of heartbeats and leases.",
        ),
        optional(
            "max_voters",
            Kind::Int(1, 5),
            "Most voters of the consensus group: 1, 3 or 5.",
        ),
        optional(
            "replace_voter_after",
            Kind::Duration,
            "A voter silent for this long is replaced.",
        ),
        optional(
            "parallel_migrations",
            Kind::Int(1, 64),
            "Migrations at the same time from or to one host.",
        ),
        optional(
            "total_migrations",
            Kind::Int(0, 10_000),
            "Migrations at the same time in the whole cluster; 0: unlimited.",
        ),
        optional(
            "cpu_overcommit_percent",
            Kind::Int(0, 100_000),
            "Most virtual CPUs of a host in percent of its threads; 0: no hard limit.",
        ),
        optional(
            "make_room",
            Kind::Bool,
            "Running guests may be moved, live, to make room for a VM that has none.",
        ),
        optional(
            "max_fence_percent",
            Kind::Int(1, 100),
            "Never declare more than this share of the hosts dead at once.",
        ),
        optional(
            "migration_mib_per_s",
            Kind::Int(0, U32),
            "Bandwidth of one migration in MiB/s; 0: unlimited.",
        ),
        optional(
            "fencing",
            Kind::Map("host", &Kind::List(&Kind::Struct(&FENCE_DEVICE))),
            "Power fencing devices by host; hosts that are left out keep theirs, `[]` takes them away.",
        ),
        optional(
            "admission",
            Kind::Struct(&ADMISSION),
            "Room kept for failures of hosts.",
        ),
        optional(
            "preemption",
            Kind::Choice(&["off", "lower_priority"]),
            "Whether a VM that finds no room may have VMs of lower priority stopped.",
        ),
        optional(
            "balancing",
            Kind::Struct(&BALANCING),
            "Evening out load between hosts.",
        ),
    ],
};

static ADMISSION: Struct = Struct {
    what: "the admission control",
    fields: &[
        optional(
            "failures",
            Kind::Int(1, 8),
            "So many hosts may fail at once and every VM still finds a place.",
        ),
        optional(
            "mode",
            Kind::Choice(&["off", "warn", "refuse"]),
            "What happens to a change that would make it fewer.",
        ),
    ],
};

static BALANCING: Struct = Struct {
    what: "the balancing",
    fields: &[
        optional(
            "mode",
            Kind::Choice(&["off", "advise", "auto"]),
            "Whether load is evened out, or only advice is given.",
        ),
        optional(
            "min_gain_percent",
            Kind::Int(2, 100),
            "What a move must take off the fuller host, in percent of a host.",
        ),
        optional(
            "moves_per_hour",
            Kind::Int(1, 1000),
            "Most moves in an hour.",
        ),
    ],
};

static LEASE: Struct = Struct {
    what: "the lease timing",
    fields: &[
        optional(
            "heartbeat",
            Kind::Duration,
            "Time between two heartbeats of a host.",
        ),
        optional(
            "duration",
            Kind::Duration,
            "How long one acknowledged heartbeat lets a host run guests.",
        ),
        optional(
            "freeze_before",
            Kind::Duration,
            "How long before the end of the lease guests are frozen.",
        ),
        optional(
            "watchdog_bound",
            Kind::Duration,
            "Upper bound for the watchdog to end a host.",
        ),
        optional(
            "drift_permille",
            Kind::Int(0, 100),
            "Clock drift allowed for, in parts per thousand.",
        ),
    ],
};

static FENCE_DEVICE: Struct = Struct {
    what: "a fence device",
    fields: &[
        required(
            "agent",
            Kind::Text,
            "agent: fence_ipmilan",
            "The agent's program.",
        ),
        optional(
            "options",
            Kind::TextMap,
            "Parameters as the agent takes them.",
        ),
        optional(
            "timeout",
            Kind::Duration,
            "How long `off` and its confirmation may take.",
        ),
    ],
};

static NETWORK: Struct = Struct {
    what: "a network",
    fields: &[
        required(
            "bridge",
            Kind::Text,
            "bridge: br-lan",
            "The bridge's interface name, the same on every host.",
        ),
        optional(
            "uplink",
            Kind::Text,
            "Interface to enslave when the bridge has to be created.",
        ),
        optional("mtu", Kind::Int(576, 65_535), "MTU of guests' interfaces."),
        optional(
            "parallel_migrations",
            Kind::Int(1, 10_000),
            "Most VMs plugged into it that migrate at the same time.",
        ),
        optional("subnet", Kind::Subnet(true), "Its IPv4 addresses."),
        optional("subnet6", Kind::Subnet(false), "Its IPv6 addresses."),
        optional(
            "guard",
            Kind::Struct(&services::GUARD),
            "What its guests may not do; everything else is left alone.",
        ),
        optional(
            "bgp",
            Kind::Struct(&services::BGP),
            "How its hosts announce addresses of services to routers.",
        ),
    ],
};

static DIRECTORY: Struct = Struct {
    what: "a directory pool",
    fields: &[
        required(
            "path",
            Kind::Text,
            "path: /srv/vms",
            "Absolute path, the same on every host.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts that reach it; empty: all.",
        ),
    ],
};

static VM: Struct = Struct {
    what: "a VM",
    fields: &[
        optional("cpus", Kind::Int(1, 1024), "Virtual CPUs."),
        required("memory", Kind::Size, "memory: 512MiB", "Memory."),
        optional(
            "machine",
            Kind::Choice(&["q35", "microvm"]),
            "Machine type.",
        ),
        optional(
            "boot",
            Kind::Either(&["disk"], &[("kernel", &Kind::Struct(&KERNEL))]),
            "Where the guest boots from.",
        ),
        optional(
            "disks",
            Kind::List(&Kind::Struct(&DISK)),
            "Disks; the first is the boot disk.",
        ),
        optional(
            "nics",
            Kind::List(&Kind::Struct(&NIC)),
            "Network interfaces.",
        ),
        services::VM_LABELS,
        optional(
            "ready",
            Kind::Struct(&READY),
            "When the guest counts as ready.",
        ),
        optional(
            "depends_on",
            Kind::MapOrNames("VM", &Kind::Struct(&DEPENDENCY)),
            "What must be up before this VM starts.",
        ),
        optional(
            "hosts",
            Kind::Names("host"),
            "Hosts it may run on; empty: all.",
        ),
        optional(
            "host_labels",
            Kind::Map("label", &Kind::Names("value")),
            "Labels that its host must have: label to accepted values.",
        ),
        optional(
            "prefer",
            Kind::List(&Kind::Struct(&PREFERENCE)),
            "Hosts that are better, or worse, than others.",
        ),
        optional(
            "resources",
            Kind::Map("resource", &Kind::Int(0, COUNT)),
            "Countable things of its host that it uses up, as in `gpu: 1`.",
        ),
        optional(
            "priority",
            Kind::Int(-1_000_000, 1_000_000),
            "Order of restarts; higher first.",
        ),
        optional(
            "power",
            Kind::Choice(&["running", "stopped"]),
            "Wanted power state.",
        ),
        optional(
            "migration",
            Kind::Choice(&["live", "quick", "cold", "never"]),
            "How the VM may be moved.",
        ),
        optional(
            "shutdown_timeout",
            Kind::Duration,
            "How long a graceful shutdown may take.",
        ),
    ],
};

static KERNEL: Struct = Struct {
    what: "a kernel boot",
    fields: &[
        required(
            "kernel",
            Kind::Text,
            "kernel: /boot/vmlinuz",
            "Absolute path of the kernel on the hosts.",
        ),
        optional(
            "initrd",
            Kind::Text,
            "Absolute path of the initial RAM file system.",
        ),
        optional("append", Kind::Line, "Kernel command line."),
    ],
};

static DISK: Struct = Struct {
    what: "a disk",
    fields: &[
        required(
            "pool",
            Kind::Name,
            "pool: shared",
            "Pool that holds the image.",
        ),
        required(
            "image",
            Kind::Text,
            "image: db.raw",
            "Image file, relative to the pool; in a pool of a SAN the unit's name.",
        ),
        optional("format", Kind::Choice(&["raw", "qcow2"]), "Image format."),
        optional(
            "size",
            Kind::Size,
            "Size for an image that does not exist yet.",
        ),
    ],
};

static NIC: Struct = Struct {
    what: "a NIC",
    fields: &[
        required(
            "network",
            Kind::Name,
            "network: lan",
            "Network it is plugged into.",
        ),
        optional(
            "mac",
            Kind::Text,
            "MAC address; absent: derived, stable for the VM's life.",
        ),
        optional(
            "address",
            Kind::Address,
            "The guest's own address, where it is known.",
        ),
        optional(
            "address6",
            Kind::Address6,
            "Its IPv6 address, beside an IPv4 one.",
        ),
        optional(
            "trusted",
            Kind::Bool,
            "The network's guard does not hold for it.",
        ),
    ],
};

static READY: Struct = Struct {
    what: "a ready check",
    fields: &[
        required(
            "probe",
            Kind::Either(
                &["agent"],
                &[
                    ("tcp", &Kind::Struct(&TCP)),
                    ("http", &Kind::Struct(&HTTP)),
                    ("serial", &Kind::Text),
                ],
            ),
            "probe: {tcp: {address: 10.0.0.5, port: 80}}",
            "How readiness is found out.",
        ),
        optional(
            "timeout",
            Kind::Duration,
            "After this long the VM is reported as not becoming ready.",
        ),
    ],
};

static TCP: Struct = Struct {
    what: "a TCP probe",
    fields: &[
        required(
            "address",
            Kind::Address,
            "address: 10.0.0.5",
            "Address of the guest.",
        ),
        required("port", Kind::Int(1, 65_535), "port: 80", "TCP port."),
    ],
};

static HTTP: Struct = Struct {
    what: "an HTTP probe",
    fields: &[
        required(
            "address",
            Kind::Address,
            "address: 10.0.0.5",
            "Address of the guest.",
        ),
        optional("port", Kind::Int(1, 65_535), "TCP port."),
        optional("path", Kind::Text, "Path of the request."),
    ],
};

static DEPENDENCY: Struct = Struct {
    what: "a dependency",
    fields: &[
        optional(
            "condition",
            Kind::Choice(&["started", "ready"]),
            "What is waited for.",
        ),
        optional(
            "advisory",
            Kind::Bool,
            "Only an order: what shall not run, cannot run or keeps failing is not waited for.",
        ),
        optional("timeout", Kind::Duration, "Longest wait."),
        optional(
            "on_timeout",
            Kind::Choice(&["wait", "start"]),
            "What happens after it: go on waiting (and say so), or start.",
        ),
        optional(
            "tolerates",
            Kind::Choice(&["nothing", "pause", "stop"]),
            "What this VM can bear when the other must move and cannot move live.",
        ),
    ],
};
