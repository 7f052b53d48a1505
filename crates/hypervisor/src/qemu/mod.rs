//! The QEMU driver.
//!
//! Owns: the command line ([`command_line()`]), the process ([`process`]), the control connection
//! ([`qmp`]), the operations on a running guest ([`guest`]), live migration ([`migration`]) and what the
//! host's QEMU can do ([`probe`]).
//!
//! ```text
//! QemuDriver::start --> process (spawn, pidfd, record) --> Guest --> QmpClient --> qmp.sock  --> QEMU
//! QemuDriver::adopt --> record, /proc, pidfd  ---------^                guard  --> guard.sock ---^
//! ```

pub mod agent_channel;
pub mod command_line;
mod driver;
pub mod export;
pub mod guest;
pub mod migration;
pub mod probe;
pub mod process;
pub mod qmp;
mod relay;
mod storage_daemon;

pub use command_line::command_line;
pub use driver::QemuDriver;
pub use guest::Guest;
