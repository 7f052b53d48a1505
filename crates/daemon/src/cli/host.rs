//! `host` and `token`.

use super::Context;
use super::args::{HostCommand, TokenCommand};
use super::error::CliError;
use super::vm::finish;
use super::wait::Goal;
use super::{show, status};
use jiff::tz::TimeZone;
use quorate_api::view::{
    Changed, Done, DrainRequest, HostView, JoinToken, LabelRequest, TokenRequest,
};
use quorate_types::{HostName, LabelName};
use std::io::{BufRead as _, IsTerminal as _, Write as _};

pub(crate) async fn run(context: &Context, command: HostCommand) -> Result<(), CliError> {
    let client = &context.client;
    let nothing = serde_json::json!({});
    match command {
        HostCommand::List => {
            let hosts: Vec<HostView> = client.get("/api/v1/hosts").await?;
            context
                .output
                .print(&hosts, |out| status::hosts(out, &hosts))
        }
        HostCommand::Show { name } => {
            let host: HostView = client.get(&format!("/api/v1/hosts/{name}")).await?;
            context.output.print(&host, |out| show::host(out, &host))
        }
        HostCommand::Drain { name, yes, wait } => {
            let request = DrainRequest { accept_stops: yes };
            let changed: Changed = client
                .post(&format!("/api/v1/hosts/{name}/drain"), &request)
                .await?;
            finish(context, &changed, wait, Goal::Drained(name)).await
        }
        HostCommand::Label { name, labels } => {
            let request = label_request(&labels)?;
            let changed: Changed = client
                .post(&format!("/api/v1/hosts/{name}/labels"), &request)
                .await?;
            context.changed(&changed)
        }
        HostCommand::Resume { name } => {
            let changed: Changed = client
                .post(&format!("/api/v1/hosts/{name}/resume"), &nothing)
                .await?;
            context.changed(&changed)
        }
        HostCommand::Fence { name } => {
            let slow = client.clone().timeout(std::time::Duration::from_secs(120));
            let done: Done = slow
                .post(&format!("/api/v1/hosts/{name}/fence"), &nothing)
                .await?;
            context.output.print(&done, |_| done.text.clone())
        }
        HostCommand::ConfirmDead { name, yes } => {
            let host: HostView = client.get(&format!("/api/v1/hosts/{name}")).await?;
            if !yes {
                ask(&warning(&host), &name)?;
            }
            let done: Done = client
                .post(&format!("/api/v1/hosts/{name}/confirm-dead"), &nothing)
                .await?;
            context.output.print(&done, |_| done.text.clone())
        }
        HostCommand::Remove { name } => {
            let changed: Changed = client
                .post(&format!("/api/v1/hosts/{name}/remove"), &nothing)
                .await?;
            context.changed(&changed)
        }
    }
}

/// `rack=r1` sets a label, `rack-` removes it.
pub(crate) fn label_request(labels: &[String]) -> Result<LabelRequest, CliError> {
    let mut request = LabelRequest::default();
    let name =
        |text: &str| LabelName::new(text).map_err(|error| CliError::Usage(error.to_string()));
    for text in labels {
        if let Some((label, value)) = text.split_once('=') {
            request.set.insert(name(label)?, name(value)?);
        } else if let Some(label) = text.strip_suffix('-') {
            request.remove.insert(name(label)?);
        } else {
            let text = format!("`{text}` is neither `LABEL=VALUE` nor `LABEL-`");
            return Err(CliError::Usage(text));
        }
    }
    Ok(request)
}

/// What is at stake.
pub(crate) fn warning(host: &HostView) -> String {
    let name = &host.name;
    let vms: Vec<&str> = host.vms.iter().map(|vm| vm.as_str()).collect();
    let mut text = format!(
        "You are about to say that {name} is dead: powered off, and not coming back by itself.\n"
    );
    if vms.is_empty() {
        text.push_str("It owns no VMs.\n");
    } else {
        text.push_str(&format!(
            "Its VMs ({}) start elsewhere at once.\n",
            vms.join(", ")
        ));
        text.push_str(&format!(
            "If {name} still runs them, two copies write to the same disks and the data is destroyed.\n"
        ));
    }
    if host.state == quorate_api::view::HostState::Up {
        text.push_str(&format!(
            "\nTHE CLUSTER STILL HEARS {name}. It is not dead.\n"
        ));
    }
    text.push_str("Look at the machine, or at its power, before you go on.");
    text
}

fn ask(warning: &str, name: &HostName) -> Result<(), CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(format!(
            "confirm-dead asks before it acts, and standard input is no terminal: give --yes if you are certain that {name} is off"
        )));
    }
    let mut out = std::io::stderr();
    write!(out, "{warning}\n\nType the host's name to confirm: ")?;
    out.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if answer.trim() == name.as_str() {
        Ok(())
    } else {
        Err(CliError::Failed(
            "not confirmed; nothing was done".to_owned(),
        ))
    }
}

pub(crate) async fn token(context: &Context, command: TokenCommand) -> Result<(), CliError> {
    let TokenCommand::Create { ttl } = command;
    let token: JoinToken = context
        .client
        .post(
            "/api/v1/tokens",
            &TokenRequest {
                ttl,
                witness: false,
            },
        )
        .await?;
    // The token alone on standard output, so that a script can take it.
    context.output.print(&token, |_| token.token.clone())?;
    if context.output.is_table() {
        let until = show::time(token.expires, &TimeZone::system());
        eprintln!(
            "\nOn the new host, until {until}:\n  quorate join TOKEN --address ADDRESS:PORT\n  quorate serve"
        );
    }
    Ok(())
}
