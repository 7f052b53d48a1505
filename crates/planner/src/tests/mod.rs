//! Table tests of each duty, and properties over random clusters.

mod balance;
mod capacity;
mod copies;
mod forecast;
mod migration;
mod moving;
mod placement;
mod preemption;
mod properties;
mod quality;
mod recovery;
mod storage;
mod wishes;
