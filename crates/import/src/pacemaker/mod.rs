//! Pacemaker's cluster information base (CIB): `cib.xml`.
//!
//! ```text
//! text --xml--> document --read--> Cib (what is written)
//!   --judge--> Judged (what holds now: properties, hosts, where everything runs)
//!     --site--> engine::Site --solve--> actions and placement      (`quorate plan --cib`)
//!   --convert--> a manifest and a report                           (`quorate import pacemaker`)
//! ```
//!
//! Always holds: what Quorate cannot represent (clones, bundles, remote nodes, tickets) is listed in
//! [`Cib::unsupported`] with its place; what Pacemaker would ignore is ignored too, with a warning.

mod convert;
mod guard;
mod judge;
mod model;
mod plan;
mod read;
mod rules;
mod site;
mod values;

#[cfg(test)]
mod tests;

pub use convert::{Converted, convert};
pub use guard::{MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_ELEMENTS};
pub use model::Cib;
pub use plan::{Action, Planned, plan};
pub use quorate_planner::engine::Flaw;
pub use read::read;
