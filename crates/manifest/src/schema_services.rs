//! Services in the manifest's table, and what networks say for them.

use super::{Field, Kind, Struct, optional, required};

const WEIGHT: i64 = quorate_types::service::MAX_MEMBER_WEIGHT as i64;

pub(crate) static SERVICE: Struct = Struct {
    what: "a service",
    fields: &[
        required(
            "network",
            Kind::Name,
            "network: lan",
            "The network that its address is in and that its members are plugged into.",
        ),
        required(
            "address",
            Kind::Address,
            "address: 10.0.0.100",
            "Its address, IPv4 or IPv6.",
        ),
        optional(
            "address6",
            Kind::Address6,
            "Its IPv6 address, beside an IPv4 one.",
        ),
        required(
            "ports",
            Kind::List(&Kind::Ports),
            "ports: [80, 443]",
            "Its ports: `80`, `5000-5010`, `53/udp`.",
        ),
        optional(
            "members",
            Kind::MapOrNames("VM", &Kind::Struct(&MEMBER)),
            "Its members by name.",
        ),
        optional(
            "select",
            Kind::Map("label", &Kind::Names("value")),
            "Every VM with these labels is a member: label to accepted values.",
        ),
        optional(
            "affinity",
            Kind::Struct(&AFFINITY),
            "Which connections of a client go to one member.",
        ),
        optional(
            "health",
            Kind::Struct(&HEALTH),
            "How a member is found to serve; absent: it does while its VM runs and is ready.",
        ),
        optional(
            "drain_timeout",
            Kind::Duration,
            "How long connections of a member that is being drained are kept at most.",
        ),
        optional(
            "attractor",
            Kind::Choice(&["arp", "bgp", "igmp"]),
            "How clients' packets find the cluster.",
        ),
        optional(
            "limits",
            Kind::Struct(&LIMITS),
            "How many connections may begin in a second.",
        ),
    ],
};

static MEMBER: Struct = Struct {
    what: "a member",
    fields: &[optional(
        "weight",
        Kind::Int(1, WEIGHT),
        "Its share of new connections, against the other members.",
    )],
};

const LIMIT: i64 = quorate_types::service::MAX_LIMIT as i64;

static LIMITS: Struct = Struct {
    what: "the limits",
    fields: &[
        optional(
            "new_per_member",
            Kind::Int(1, LIMIT),
            "Connections (UDP: flows) that may begin at each member in a second.",
        ),
        optional(
            "new_per_client",
            Kind::Int(1, LIMIT),
            "The same of one client: an IPv4 address or an IPv6 /64.",
        ),
    ],
};

static AFFINITY: Struct = Struct {
    what: "the affinity",
    fields: &[
        optional(
            "kind",
            Kind::Choice(&["none", "source", "subnet"]),
            "What of a client decides which member it gets.",
        ),
        optional(
            "prefix",
            Kind::Int(1, 32),
            "Leading bits of IPv4 addresses that make a subnet.",
        ),
        optional(
            "prefix6",
            Kind::Int(1, 128),
            "Leading bits of IPv6 addresses that make a subnet.",
        ),
        optional(
            "timeout",
            Kind::Duration,
            "A client that comes back within this time finds the member that it had.",
        ),
    ],
};

static HEALTH: Struct = Struct {
    what: "a health check",
    fields: &[
        required(
            "kind",
            Kind::Choice(&["tcp", "http", "https", "agent"]),
            "kind: tcp",
            "What is tried.",
        ),
        optional(
            "port",
            Kind::Int(1, 65_535),
            "Port of the member; absent: the service's first TCP port.",
        ),
        optional("path", Kind::Text, "Path of an HTTP request."),
        optional("interval", Kind::Duration, "Time between two tries."),
        optional("timeout", Kind::Duration, "How long one try may take."),
        optional(
            "rise",
            Kind::Int(1, 100),
            "So many good tries in a row make a member healthy.",
        ),
        optional(
            "fall",
            Kind::Int(1, 100),
            "So many bad tries in a row make it unhealthy.",
        ),
    ],
};

pub(crate) static GUARD: Struct = Struct {
    what: "a network's guard",
    fields: &[
        optional(
            "source",
            Kind::Bool,
            "Guests may send from their own MAC and IP addresses only.",
        ),
        optional("dhcp", Kind::Bool, "Guests may not answer as DHCP servers."),
        optional(
            "router",
            Kind::Bool,
            "Guests may not announce themselves as IPv6 routers.",
        ),
    ],
};

pub(crate) static BGP: Struct = Struct {
    what: "how hosts speak to routers",
    fields: &[
        optional(
            "daemon",
            Kind::Choice(&["bird", "frr"]),
            "The program that speaks.",
        ),
        required(
            "as",
            Kind::Int(1, 4_294_967_294),
            "as: 65001",
            "The hosts' autonomous system.",
        ),
        required(
            "neighbors",
            Kind::List(&Kind::Struct(&NEIGHBOR)),
            "neighbors: [{address: 10.0.0.254, as: 65000}]",
            "The routers.",
        ),
        optional(
            "hold_time",
            Kind::Duration,
            "A host that is silent for so long is gone; whole seconds, 3 or more.",
        ),
        optional(
            "bfd",
            Kind::Bool,
            "Finds a host that went silent within a second, where the routers can do it.",
        ),
    ],
};

static NEIGHBOR: Struct = Struct {
    what: "a router",
    fields: &[
        required(
            "address",
            Kind::Address,
            "address: 10.0.0.254",
            "Its address.",
        ),
        required(
            "as",
            Kind::Int(1, 4_294_967_294),
            "as: 65000",
            "Its autonomous system.",
        ),
    ],
};

/// Labels of a VM.
pub(crate) const VM_LABELS: Field = optional(
    "labels",
    Kind::Map("label", &Kind::Name),
    "What it is, for services that take their members by label: `tier: web`.",
);
