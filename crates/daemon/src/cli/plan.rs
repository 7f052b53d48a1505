//! `plan`: what would be done, without doing it.

use super::cib::{self, CibArgs};
use super::error::CliError;
use super::output::Output;
use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) cib: CibArgs,
}

/// Needs no daemon: the question brings its own site.
pub(crate) fn plan(output: &Output, args: &PlanArgs) -> Result<(), CliError> {
    cib::plan(output, &args.cib)
}
