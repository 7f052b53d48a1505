//! `tgtadm`, and what it says.
//!
//! Owns: the words of `tgtadm`'s language. Always holds: a call has an end, also when the SAN is
//! stopped. Must not: remember anything.

use crate::process::run_with_environment;
use crate::{LabError, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where `tgtd` makes its management socket, with `.NUMBER` behind it.
pub(super) const SOCKET: &str = "/var/run/tgtd/socket";
/// Seconds for one call; a stopped `tgtd` would let it wait for ever.
const LIMIT: &str = "10";

/// A target as `tgtd` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// `tgtd`'s number for it.
    pub id: u32,
    /// Its iSCSI name.
    pub name: String,
    /// Its LUNs, without the controller at LUN 0.
    pub luns: Vec<Unit>,
    /// Initiator names that may log in.
    pub initiators: Vec<String>,
    /// Addresses that may log in; `ALL` for every one.
    pub addresses: Vec<String>,
    /// CHAP users of whom one must log in.
    pub accounts: Vec<String>,
    /// Who is logged in.
    pub sessions: Vec<Session>,
}

/// A LUN of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Its number.
    pub number: u32,
    /// Its serial number.
    pub serial: String,
    /// Its backing file.
    pub file: PathBuf,
}

/// A session: an initiator that is logged in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// `tgtd`'s number for it.
    pub id: u32,
    /// The initiator's name.
    pub initiator: String,
    /// Its connections.
    pub connections: Vec<u32>,
    /// Where it comes from.
    pub addresses: Vec<String>,
}

/// The management path to one `tgtd`.
#[derive(Debug, Clone)]
pub(super) struct Tgt {
    control: u16,
    socket: PathBuf,
}

impl Tgt {
    pub(super) fn new(control: u16) -> Self {
        Self {
            control,
            socket: PathBuf::from(SOCKET),
        }
    }

    /// The same `tgtd`, by its socket under another name, where nobody else finds it.
    pub(super) fn aside(&self) -> Self {
        Self {
            control: self.control,
            socket: self.socket.with_file_name("closing"),
        }
    }

    /// The management socket.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("{}.{}", self.socket.display(), self.control))
    }

    /// Runs `tgtadm` with words that are separated by spaces; `more` are words as they are.
    pub(super) fn run(&self, words: &str, more: &[&str]) -> Result<String> {
        let control = self.control.to_string();
        let mut arguments = vec![LIMIT, "tgtadm", "-C", &control, "--lld", "iscsi"];
        arguments.extend(words.split(' ').chain(more.iter().copied()));
        let environment = [("TGT_IPC_SOCKET", self.socket.as_os_str())];
        run_with_environment("timeout", &arguments, "", &environment)
    }

    /// All targets.
    pub(super) fn targets(&self) -> Result<Vec<Target>> {
        let text = self.run("--mode target --op show", &[])?;
        parse(&text).ok_or(LabError::Answer {
            tool: "tgtadm".to_owned(),
            output: text,
        })
    }

    /// Makes a target with all that belongs to it. Who may log in comes last.
    pub(super) fn make(&self, target: &Target) -> Result<()> {
        let id = target.id.to_string();
        let on = |words: &str, more: &[&str]| {
            let mut all = vec!["--tid", id.as_str()];
            all.extend(more);
            self.run(words, &all).map(drop)
        };
        on("--mode target --op new", &["-T", &target.name])?;
        for unit in &target.luns {
            let number = unit.number.to_string();
            let file = unit.file.to_string_lossy();
            let serial = format!("vendor_id=QUORATE,product_id=LAB,scsi_sn={}", unit.serial);
            on(
                "--mode logicalunit --op new",
                &["--lun", &number, "-b", &file],
            )?;
            on(
                "--mode logicalunit --op update",
                &["--lun", &number, "--params", &serial],
            )?;
        }
        for user in &target.accounts {
            on("--mode account --op bind", &["--user", user])?;
        }
        for address in &target.addresses {
            on("--mode target --op bind", &["-I", address])?;
        }
        for initiator in &target.initiators {
            // A cluster that looks after its doors may be faster.
            match on("--mode target --op bind", &["-Q", initiator]) {
                Err(error) if !error.to_string().contains("already exists") => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends a session.
    pub(super) fn drop_session(&self, target: u32, session: &Session) -> Result<()> {
        for connection in &session.connections {
            let words = format!(
                "--mode conn --op delete --tid {target} --sid {} --cid {connection}",
                session.id
            );
            self.run(&words, &[])?;
        }
        Ok(())
    }
}

/// The sections of a target in `tgtadm --mode target --op show`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    System,
    Sessions,
    Units,
    Accounts,
    Access,
}

fn parse(text: &str) -> Option<Vec<Target>> {
    let mut targets: Vec<Target> = Vec::new();
    let mut section = Section::System;
    for line in text.lines().map(str::trim) {
        let (key, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.trim();
        if let Some(id) = key.strip_prefix("Target ") {
            targets.push(Target {
                id: id.parse().ok()?,
                name: value.to_owned(),
                ..Target::default()
            });
            section = Section::System;
            continue;
        }
        let target = targets.last_mut()?;
        match key {
            "System information" => section = Section::System,
            "I_T nexus information" => section = Section::Sessions,
            "LUN information" => section = Section::Units,
            "Account information" => section = Section::Accounts,
            "ACL information" => section = Section::Access,
            _ => match section {
                Section::System => {}
                Section::Sessions => session_line(target, key, value)?,
                Section::Units => unit_line(target, key, value)?,
                // `NAME (outgoing)` is who the target says it is, not who may come in.
                Section::Accounts if line.ends_with("(outgoing)") => {}
                Section::Accounts => target.accounts.push(line.to_owned()),
                Section::Access if is_address(line) => {
                    target.addresses.push(line.to_owned());
                }
                Section::Access => target.initiators.push(line.to_owned()),
            },
        }
    }
    for target in &mut targets {
        target.luns.retain(|unit| unit.number != 0);
    }
    Some(targets)
}

fn is_address(word: &str) -> bool {
    let network = word.split('/').next().unwrap_or_default();
    word == "ALL" || network.parse::<std::net::IpAddr>().is_ok()
}

fn session_line(target: &mut Target, key: &str, value: &str) -> Option<()> {
    if key == "I_T nexus" {
        target.sessions.push(Session {
            id: value.parse().ok()?,
            ..Session::default()
        });
        return Some(());
    }
    let session = target.sessions.last_mut()?;
    match key {
        "Initiator" => {
            let name = value.split(" alias:").next().unwrap_or_default();
            name.trim().clone_into(&mut session.initiator);
        }
        "Connection" => session.connections.push(value.parse().ok()?),
        "IP Address" => session.addresses.push(value.to_owned()),
        _ => {}
    }
    Some(())
}

fn unit_line(target: &mut Target, key: &str, value: &str) -> Option<()> {
    if key == "LUN" {
        target.luns.push(Unit {
            number: value.parse().ok()?,
            ..Unit::default()
        });
        return Some(());
    }
    let unit = target.luns.last_mut()?;
    match key {
        "SCSI SN" => value.clone_into(&mut unit.serial),
        "Backing store path" => unit.file = PathBuf::from(value),
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "Target 1: iqn.2025-01.lab.quorate:db
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
        I_T nexus: 3
            Initiator: iqn.2025-01.lab.quorate:h1 alias: none
            Connection: 0
                IP Address: 10.79.0.1
    LUN information:
        LUN: 0
            Type: controller
            SCSI ID: IET     00010000
            SCSI SN: beaf10
            Backing store path: None
        LUN: 1
            Type: disk
            SCSI SN: db
            Size: 67 MB, Block size: 512
            Backing store path: /lab/san/db.img
            Backing store flags:
    Account information:
        bob
        target (outgoing)
    ACL information:
        10.79.0.0/24
        ALL
        iqn.2025-01.lab.quorate:h1
Target 12: iqn.2025-01.lab.quorate:web
    ACL information:
";

    #[test]
    fn targets_are_read() {
        let targets = parse(SHOWN).unwrap();
        assert_eq!((targets[0].id, targets[1].id), (1, 12));
        assert_eq!(targets[0].name, "iqn.2025-01.lab.quorate:db");
        assert_eq!(targets[0].luns.len(), 1);
        assert_eq!(targets[0].luns[0].serial, "db");
        assert_eq!(targets[0].luns[0].file, PathBuf::from("/lab/san/db.img"));
        assert_eq!(targets[0].accounts, ["bob"]);
        assert_eq!(targets[0].initiators, ["iqn.2025-01.lab.quorate:h1"]);
        assert_eq!(targets[0].addresses, ["10.79.0.0/24", "ALL"]);
        let session = &targets[0].sessions[0];
        assert_eq!(session.initiator, "iqn.2025-01.lab.quorate:h1");
        assert_eq!((session.id, &session.connections[..]), (3, &[0][..]));
        assert_eq!(session.addresses, ["10.79.0.1"]);
        assert_eq!(parse(""), Some(vec![]));
        assert_eq!(parse("nonsense"), None);
    }
}
