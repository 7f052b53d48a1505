//! x
use super::model::Cib;
/// x
#[derive(Debug)]
pub struct Converted;
/// x
pub fn convert(_cib: &Cib) -> Converted { Converted }
