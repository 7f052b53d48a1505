//! `vm`, `delete` and `explain`.

use super::Context;
use super::args::{DeleteCommand, ExplainCommand, VmCommand, WaitArgs};
use super::error::CliError;
use super::output::say;
use super::progress::Progress;
use super::wait::{Goal, wait};
use super::{console, now_ms, saved, show, status};
use futures_util::StreamExt as _;
use jiff::tz::TimeZone;
use quorate_api::ClientError;
use quorate_api::view::{Changed, Explanation, MigrateRequest, StopHow, StopRequest, VmView};
use quorate_types::{HostName, VmName};
use std::io::Write as _;

pub(crate) async fn run(context: &Context, command: VmCommand) -> Result<(), CliError> {
    let client = &context.client;
    match command {
        VmCommand::List => {
            let vms: Vec<VmView> = client.get("/api/v1/vms").await?;
            context.output.print(&vms, |out| match vms.is_empty() {
                true => "No VMs yet: `quorate apply -f FILE` makes some.".to_owned(),
                false => status::vms(out, &vms),
            })
        }
        VmCommand::Show { name } => {
            let vm: VmView = client.get(&format!("/api/v1/vms/{name}")).await?;
            context
                .output
                .print(&vm, |out| show::vm(out, &vm, now_ms()))
        }
        VmCommand::Start { name, wait } => {
            let path = format!("/api/v1/vms/{name}/start");
            let changed: Changed = client.post(&path, &serde_json::json!({})).await?;
            finish(context, &changed, wait, Goal::vm_as_wanted(name)).await
        }
        VmCommand::Stop { name, hard, wait } => {
            let mode = if hard {
                StopHow::Hard
            } else {
                StopHow::Graceful
            };
            let path = format!("/api/v1/vms/{name}/stop");
            let changed: Changed = client.post(&path, &StopRequest { mode }).await?;
            finish(context, &changed, wait, Goal::vm_as_wanted(name)).await
        }
        VmCommand::Migrate {
            name,
            to,
            yes,
            wait,
        } => migrate(context, name, to, yes, wait).await,
        VmCommand::Cancel { name } => {
            let path = format!("/api/v1/vms/{name}/cancel");
            let changed: Changed = client.post(&path, &serde_json::json!({})).await?;
            context.changed(&changed)
        }
        VmCommand::Console { name } => console::run(client, &name).await,
        VmCommand::Logs {
            name,
            follow,
            lines,
        } => {
            let path = format!("/api/v1/vms/{name}/logs?lines={lines}&follow={follow}");
            let mut stream = client.stream(&path).await?;
            let mut out = std::io::stdout();
            while let Some(chunk) = stream.next().await {
                out.write_all(&chunk?)?;
                out.flush()?;
            }
            Ok(())
        }
    }
}

async fn migrate(
    context: &Context,
    name: VmName,
    to: Option<HostName>,
    yes: bool,
    wait: WaitArgs,
) -> Result<(), CliError> {
    let client = &context.client;
    let before: VmView = client.get(&format!("/api/v1/vms/{name}")).await?;
    let path = format!("/api/v1/vms/{name}/migrate");
    let changed: Changed = client
        .post(
            &path,
            &MigrateRequest {
                to: to.clone(),
                accept_stops: yes,
            },
        )
        .await?;
    let goal = Goal::Moved {
        vm: name.clone(),
        from: before.host,
        to,
    };
    finish(context, &changed, wait, goal).await?;
    // The measured downtime is in the last event about it.
    if wait.wait && context.output.is_table() {
        let explained: Explanation = client.get(&format!("/api/v1/vms/{name}/explain")).await?;
        if let Some(event) = explained
            .events
            .iter()
            .find(|event| event.kind == "migration")
        {
            say(&event.text)?;
        }
    }
    Ok(())
}

/// Prints what a change did, and waits if that is asked for.
pub(crate) async fn finish(
    context: &Context,
    changed: &Changed,
    args: WaitArgs,
    goal: Goal,
) -> Result<(), CliError> {
    context.changed(changed)?;
    if !args.wait {
        return Ok(());
    }
    let mut progress = Progress::new(!context.output.is_table());
    let took = wait(&context.client, &goal, args.timeout, &mut progress).await?;
    drop(progress);
    if context.output.is_table() {
        say(&format!("Done after {:.1} s.", took.as_secs_f32()))?;
    }
    Ok(())
}

pub(crate) async fn delete(context: &Context, command: DeleteCommand) -> Result<(), CliError> {
    let path = match &command {
        DeleteCommand::Vm { name, .. } => format!("/api/v1/vms/{name}"),
        DeleteCommand::Pool { name } => format!("/api/v1/pools/{name}"),
        DeleteCommand::Network { name } => format!("/api/v1/networks/{name}"),
        DeleteCommand::Rule { name } => format!("/api/v1/rules/{name}"),
        DeleteCommand::Service { name } => format!("/api/v1/services/{name}"),
    };
    let changed: Changed = context.client.delete(&path).await?;
    match command {
        DeleteCommand::Vm { name, wait } => finish(context, &changed, wait, Goal::Gone(name)).await,
        _ => context.changed(&changed),
    }
}

pub(crate) async fn explain(context: &Context, command: ExplainCommand) -> Result<(), CliError> {
    let ExplainCommand::Vm { name, at, saved } = command;
    let zone = TimeZone::system();
    let at = at.map(|at| at.resolve(now_ms(), &zone));
    let at = at.transpose().map_err(CliError::Usage)?;
    let (explained, now): (Explanation, u64) = match &saved.state {
        Some(path) => {
            let snapshot = saved::read(path)?;
            let explained = quorate_api::questions::explain(&snapshot, &name, at);
            let explained = explained.map_err(ClientError::from)?;
            (explained, snapshot.saved.0)
        }
        None => {
            let mut path = format!("/api/v1/vms/{name}/explain");
            if let Some(at) = at {
                path.push_str(&format!("?at={}", at.0));
            }
            (context.client.get(&path).await?, now_ms())
        }
    };
    context
        .output
        .print(&explained, |out| match &explained.then {
            Some(then) => show::then(out, &explained.vm.name, then, &zone),
            None => show::explanation(out, &explained, &zone, now),
        })
}
