//! `quorate lab san ...`.

use super::{SanStatus, short};
use crate::cli::Output;
use crate::lab::Lab;
use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use comfy_table::{Table, presets};

/// What to do with the SAN's LUNs.
#[derive(Debug, Subcommand)]
pub enum SanCommand {
    /// LUNs, who may log in, who is logged in.
    Show,
    /// Make a LUN of zeroes on a target of its own; nobody may log in yet.
    Create {
        /// Its name.
        name: String,
        /// Its size in MiB.
        mib: u64,
    },
    /// Remove a LUN and what is on it.
    Delete {
        /// Its name.
        name: String,
    },
    /// Let an initiator log in to a LUN.
    Allow {
        /// The LUN's name.
        name: String,
        /// The initiator's iSCSI name.
        initiator: String,
    },
    /// Take that away and end its sessions.
    Deny {
        /// The LUN's name.
        name: String,
        /// The initiator's iSCSI name.
        initiator: String,
    },
    /// Make a CHAP user; the secret comes from the standard input.
    Account {
        /// The user.
        user: String,
        /// LUNs that want the secret from now on.
        #[arg(long)]
        lun: Vec<String>,
    },
}

/// Runs `quorate lab san`.
pub(crate) fn run(lab: &Lab, command: &SanCommand, output: Output) -> Result<()> {
    let san = lab.san()?;
    match command {
        SanCommand::Show => show(&san.status(), output)?,
        SanCommand::Create { name, mib } => {
            let bytes = mib.checked_mul(1024 * 1024).filter(|bytes| *bytes > 0);
            let lun = san.create_lun(name, bytes.context("a LUN has at least 1 MiB")?)?;
            match output {
                Output::Json => println!("{}", serde_json::to_string_pretty(&lun)?),
                Output::Table => println!("{}", lun.url()),
            }
        }
        SanCommand::Delete { name } => san.delete_lun(name)?,
        SanCommand::Allow { name, initiator } => san.allow(name, initiator)?,
        SanCommand::Deny { name, initiator } => san.deny(name, initiator)?,
        SanCommand::Account { user, lun } => {
            let mut secret = String::new();
            std::io::stdin().read_line(&mut secret)?;
            let secret = secret.trim_end_matches('\n');
            if secret.is_empty() {
                bail!("no secret on the standard input");
            }
            san.account(user, secret)?;
            for name in lun {
                san.require_account(name, user)?;
            }
        }
    }
    Ok(())
}

/// One line about the SAN.
pub(crate) fn summary(san: &SanStatus) -> String {
    let state = match (san.running, san.paused) {
        (_, true) => "paused",
        (true, _) => "on",
        _ => "off",
    };
    format!(
        "san: {state}, {}, {} LUNs, tgtadm -C {}",
        san.portal,
        san.targets.len(),
        san.control
    )
}

fn show(san: &SanStatus, output: Output) -> Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(san)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["LUN", "TARGET", "MAY LOG IN", "SESSIONS", "CHAP"]);
    let or_dash = |words: Vec<&str>| {
        if words.is_empty() {
            "-".to_owned()
        } else {
            words.join("\n")
        }
    };
    for target in &san.targets {
        let allowed = target.initiators.iter().chain(&target.addresses);
        let sessions = target.sessions.iter();
        table.add_row([
            short(target),
            target.name.clone(),
            or_dash(allowed.map(String::as_str).collect()),
            or_dash(sessions.map(|one| one.initiator.as_str()).collect()),
            or_dash(target.accounts.iter().map(String::as_str).collect()),
        ]);
    }
    println!("{table}");
    println!("{}", summary(san));
    Ok(())
}
