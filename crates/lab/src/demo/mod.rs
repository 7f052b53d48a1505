//! The tour.
use std::process::ExitCode;
/// Arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {}
/// Runs it.
pub fn run(_args: &DemoArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::FAILURE)
}
