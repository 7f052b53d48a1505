//! `storage copies`: where the disks of VMs are, and an operator's word about which copy counts.

use super::Context;
use super::error::CliError;
use super::output::{Output, Tone, cell, trimmed};
use clap::Subcommand;
use quorate_api::view::{AcceptCopyRequest, Changed, CopyView, VmView};
use quorate_types::{HostName, VmName};

#[derive(Debug, Subcommand)]
pub(crate) enum CopiesCommand {
    /// Where the disks are that are on particular hosts, and which copies are whole.
    Show {
        /// Of this VM only.
        vm: Option<VmName>,
    },
    /// Start a VM from a copy that is not whole, because the host of the last whole one is lost for good. What the copy
    /// lacks is lost.
    Accept {
        /// Which VM.
        vm: VmName,
        /// Which of its disks, by its image.
        disk: String,
        /// The host of the copy.
        #[arg(long)]
        host: HostName,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

pub(crate) async fn run(context: &Context, command: CopiesCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        CopiesCommand::Show { vm: Some(vm) } => {
            let vm: VmView = client.get(&format!("/api/v1/vms/{vm}")).await?;
            let vms = [vm];
            show(context, &vms)
        }
        CopiesCommand::Show { vm: None } => {
            let vms: Vec<VmView> = client.get("/api/v1/vms").await?;
            show(context, &vms)
        }
        CopiesCommand::Accept {
            vm,
            disk,
            host,
            yes,
        } => {
            let view: VmView = client.get(&format!("/api/v1/vms/{vm}")).await?;
            if !yes {
                let question = warning(&view, &disk, &host);
                super::image::ask(&question, "the VM's name", vm.as_str(), "accept")?;
            }
            let request = AcceptCopyRequest { image: disk, host };
            let path = format!("/api/v1/vms/{vm}/copies/accept");
            let changed: Changed = client.post(&path, &request).await?;
            context.changed(&changed)
        }
    }
}

/// What is at stake.
pub(crate) fn warning(vm: &VmView, disk: &str, host: &HostName) -> String {
    let name = &vm.name;
    let copies: Vec<&CopyView> = vm.copies.iter().filter(|copy| copy.image == disk).collect();
    let mut text = format!(
        "You are about to say that the copy of disk {disk} on {host} is the one that counts, and that {name} starts from it.\n"
    );
    text.push_str(&match copies.iter().find(|copy| copy.host == *host) {
        Some(copy) if copy.in_step => format!(
            "It was in step, since {}; if {host} was booted again since then, what was only in its memory is lost for good.\n",
            copy.since
        ),
        Some(copy) => format!(
            "It is out of step since {}: everything that {name} has written after that is lost for good.\n",
            copy.since
        ),
        None => format!("There is no copy of it on {host}.\n"),
    });
    let whole = copies
        .iter()
        .filter(|copy| copy.in_step && copy.host != *host);
    let whole: Vec<&str> = whole.map(|copy| copy.host.as_str()).collect();
    if !whole.is_empty() {
        text.push_str(&format!(
            "The copy on {} is whole. Bring that host back if you can: after this its copy is overwritten when it returns.\n",
            whole.join(" and ")
        ));
    }
    text.push_str("There is no way back.");
    text
}

fn show(context: &Context, vms: &[VmView]) -> Result<(), CliError> {
    let copies: Vec<_> = vms
        .iter()
        .filter(|vm| !vm.copies.is_empty())
        .map(|vm| (&vm.name, &vm.copies))
        .collect();
    let copies: std::collections::BTreeMap<_, _> = copies.into_iter().collect();
    context.output.print(&copies, |out| page(out, vms))
}

pub(crate) fn page(out: &Output, vms: &[VmView]) -> String {
    let mut table = out.table(&["VM", "DISK", "HOST", "STATE", "SINCE", "PROBLEM"]);
    let mut any = false;
    for vm in vms {
        for copy in &vm.copies {
            any = true;
            let (state, tone) = match (copy.in_step, copy.percent) {
                (true, _) => ("in step".to_owned(), Tone::Good),
                (false, Some(percent)) => (format!("{percent} % up to date"), Tone::Warn),
                (false, None) => ("out of step".to_owned(), Tone::Bad),
            };
            table.add_row([
                cell(&vm.name, Tone::Bold),
                cell(format!("{}/{}", copy.pool, copy.image), Tone::Plain),
                cell(&copy.host, Tone::Plain),
                cell(state, tone),
                cell(copy.since, Tone::Plain),
                cell(copy.problem.as_deref().unwrap_or("-"), Tone::Plain),
            ]);
        }
    }
    let rows = trimmed(&table);
    let stuck = vms
        .iter()
        .filter(|vm| vm.why.contains("storage copies accept"));
    let why = stuck.map(|vm| format!("\n{} waits: {}", vm.name, vm.why));
    match any {
        true => why.fold(rows, |text, why| format!("{text}\n{why}")),
        false => "No disk is in a pool of the kinds `local` or `mirrored`.".to_owned(),
    }
}
