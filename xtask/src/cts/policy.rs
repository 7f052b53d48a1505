//! Cases in which Quorate deliberately decides otherwise, each with its reason.

/// Name of the case, and why Quorate differs.
const DIFFERENCES: &[(&str, &str)] = &[
    ("bug-5025-1", DEFINITION),
    ("bug-5025-3", DEFINITION),
    ("bug-5025-4", DEFINITION),
    ("order-serialize", DEFINITION),
    ("order-serialize-set", DEFINITION),
    ("params-1", DEFINITION),
    ("params-2", DEFINITION),
    ("params-3", DEFINITION),
    ("params-4", DEFINITION),
    ("params-5", DEFINITION),
    ("restart-with-extra-op-params", DEFINITION),
    ("shutdown-lock", LOCK),
    ("shutdown-lock-expiration", LOCK),
    ("stop-unexpected", UNEXPECTED),
    ("stop-unexpected-2", UNEXPECTED),
    ("unfence-device", UNFENCE),
];

const DEFINITION: &str = "only the digest that the status section keeps of an agent's parameters says that something \
    changed; Quorate knows the definitions it runs itself and does not restart on foreign digests";

const LOCK: &str = "shutdown-lock holds resources back for a host that was shut down; \
    Quorate starts a VM elsewhere as soon as its host has given it up";

const UNEXPECTED: &str = "of a resource that runs twice only the copy that is not wanted is stopped; Pacemaker does the same, \
    but its summary calls it a restart of the copy that stays";

const UNFENCE: &str =
    "hosts are not unfenced by an agent: access to storage is part of starting a VM";

/// Why Quorate differs in a case, if it does so on purpose.
pub(super) fn reason(name: &str) -> Option<&'static str> {
    let mut table = DIFFERENCES.iter();
    table.find(|(case, _)| *case == name).map(|(_, why)| *why)
}
