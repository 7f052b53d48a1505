//! `quorate`: the daemon of a host and the command line, in one binary.
//!
//! Owns: the wiring of all other crates ([`serve`]) and the commands ([`cli`]). Must not: decide
//! anything; decisions are made in the pure crates.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cli;
mod serve;

fn main() -> std::process::ExitCode {
    cli::main()
}
