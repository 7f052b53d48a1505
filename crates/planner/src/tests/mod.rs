//! Table tests of each duty, and properties over random clusters.

mod migration;
mod moving;
mod placement;
mod properties;
mod quality;
mod recovery;
mod wishes;
