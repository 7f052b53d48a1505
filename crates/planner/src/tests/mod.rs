//! Table tests of each duty, and properties over random clusters.

mod capacity;
mod forecast;
mod migration;
mod moving;
mod placement;
mod properties;
mod recovery;
mod speed;
