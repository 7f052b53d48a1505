//! `storage take`: who else is registered on a unit, and the operator's word that they are gone. Pages are pure.

use super::Context;
use super::error::CliError;
use super::output::{Output, Tone};
use super::show::time;
use clap::Args;
use jiff::tz::TimeZone;
use quorate_api::storage::{StorageView, TakeAnswer, TakeRequest};
use quorate_types::{ImageRef, PoolName};

#[derive(Debug, Args)]
pub(crate) struct TakeArgs {
    /// The unit, a disk of a VM: POOL/IMAGE.
    unit: ImageRef,
    /// Those that are registered on it now are gone for good: the next start pushes them out, and aborts what they have
    /// under way. Somebody who is not gone loses the disk.
    #[arg(long)]
    force: bool,
    /// Take that word back, if the VM has not been started since.
    #[arg(long, conflicts_with = "force")]
    withdraw: bool,
}

pub(super) async fn run(context: &Context, args: TakeArgs) -> Result<(), CliError> {
    let path = format!("/api/v1/pools/{}/take", args.unit.pool);
    let request = TakeRequest {
        image: args.unit.image.clone(),
        force: args.force,
        withdraw: args.withdraw,
    };
    let answer: TakeAnswer = context.client.post(&path, &request).await?;
    context
        .output
        .print(&answer, |out| page(out, &args.unit.pool, &answer))
}

/// What came of it.
pub(crate) fn page(out: &Output, pool: &PoolName, answer: &TakeAnswer) -> String {
    let unit = format!("{pool}/{}", answer.image);
    let vms: Vec<&str> = answer.vms.iter().map(|vm| vm.as_str()).collect();
    let vms = vms.join(", ");
    match &answer.seen {
        None => format!("The word on {unit} is taken back: strangers on it are refused."),
        Some(seen) if !answer.recorded => format!(
            "Nobody else is registered on {unit}, as {} sees it: there is nothing to take.",
            seen.host
        ),
        Some(seen) => {
            let text = format!("The next start of {vms} takes {unit} from");
            let text = out.paint(Tone::Warn, &text);
            format!("{text} {} (seen by {}).", seen.describe(), seen.host)
        }
    }
}

/// On a pool's page: words that have been given and not been used.
pub(super) fn section(out: &Output, pool: &StorageView, zone: &TimeZone) -> Vec<String> {
    let mut lines = Vec::new();
    if !pool.takes.is_empty() {
        lines.push(out.paint(Tone::Bold, "Taken from strangers at the next start"));
    }
    for take in &pool.takes {
        let vms: Vec<&str> = take.vms.iter().map(|vm| vm.as_str()).collect();
        let keys = match take.keys.is_empty() {
            true => "a reservation of another type".to_owned(),
            false => format!("keys {}", take.keys.join(", ")),
        };
        let text = format!("{} of {}: {keys}", take.image, vms.join(", "));
        let said = format!("said by {} at {}", take.by, time(take.at, zone));
        lines.push(format!("  {} ({said})", out.paint(Tone::Warn, &text)));
    }
    lines
}
