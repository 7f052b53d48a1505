//! Cases in which Quorate deliberately decides otherwise, each with its reason.

/// Name of the case, and why Quorate differs.
const DIFFERENCES: &[(&str, &str)] = &[];

/// Why Quorate differs in a case, if it does so on purpose.
pub(super) fn reason(name: &str) -> Option<&'static str> {
    let mut table = DIFFERENCES.iter();
    table.find(|(case, _)| *case == name).map(|(_, why)| *why)
}
