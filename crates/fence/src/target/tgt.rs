//! `tgtd`, the Linux SCSI target framework in user space, by `tgtadm`.
//!
//! What was found out by trying: a login is checked against addresses *and* names, and a target without names
//! lets in every name that has an address. So the last name is never taken away without another in its place
//! (a name that nobody has). An initiator that is refused is told that there is no such target; sessions that exist go on
//! until they are deleted, connection by connection.
//!
//! A deleted connection executes nothing more, but its session is listed until its last command has ended, and also
//! as long as `tgtd` has unsent data for it: minutes, for a host that was cut off while it was reading. Only a session that is
//! gone proves that its writes have ended, so such a connection is taken away from under `tgtd` with `ss -K`, which
//! must run where `tgtd` does: behind the same words (`via`).

use super::{AccessRemoved, TargetAccess, TargetError, all, call, few_at_a_time, millis};
use std::collections::{BTreeMap, BTreeSet};
use tokio::time::Instant;

/// A name that no initiator has: it keeps a list from being empty.
const NOBODY: &str = "iqn.2026-01.local.quorate:nobody";
/// Looks at a target until its sessions are gone.
const ROUNDS: u32 = 20;
/// Looks after which a session that is still there is waited for no longer.
const PATIENCE: u32 = 2;
/// Between two looks: a session ends when its last command has.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

/// One `tgtd`.
#[derive(Debug, Clone)]
pub struct Tgt {
    /// Its control port.
    pub control: u32,
    /// Words before `tgtadm`.
    pub via: Vec<String>,
}

/// A target as `tgtd` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TgtTarget {
    /// `tgtd`'s number for it.
    pub id: u32,
    /// Its iSCSI name.
    pub name: String,
    /// Initiator names and addresses (`ALL` for every one) that may log in.
    pub access: Vec<String>,
    /// Who is logged in.
    pub sessions: Vec<TgtSession>,
}

/// A session of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TgtSession {
    /// `tgtd`'s number for it.
    pub id: u32,
    /// The initiator's name.
    pub initiator: String,
    /// Its connections.
    pub connections: Vec<u32>,
    /// Addresses that they come from.
    pub addresses: Vec<String>,
}

impl TgtTarget {
    fn names(&self) -> impl Iterator<Item = &String> {
        self.access.iter().filter(|entry| !is_address(entry))
    }

    fn lets_in(&self, initiator: &str) -> bool {
        let mut names = self.names().peekable();
        match names.peek() {
            Some(_) => names.any(|name| name == initiator),
            None => !self.access.is_empty(),
        }
    }

    fn sessions_of<'t>(&'t self, initiator: &'t str) -> impl Iterator<Item = &'t TgtSession> {
        self.sessions
            .iter()
            .filter(move |session| session.initiator == initiator)
    }
}

fn is_address(word: &str) -> bool {
    let network = word.split('/').next().unwrap_or_default();
    word == "ALL" || network.parse::<std::net::IpAddr>().is_ok()
}

impl Tgt {
    async fn run(&self, words: &[&str], deadline: Instant) -> Result<String, TargetError> {
        let control = self.control.to_string();
        let base = ["tgtadm", "-C", &control, "--lld", "iscsi"];
        let own = base.iter().chain(words).map(ToString::to_string);
        let all: Vec<String> = self.via.iter().cloned().chain(own).collect();
        let done = call(&all, String::new(), &[], deadline).await;
        done.map_err(|error| match error {
            // Without a daemon behind its socket.
            TargetError::Failed { program, detail } if detail.contains("tgt daemon") => {
                TargetError::Unreachable { program, detail }
            }
            other => other,
        })
    }

    async fn targets(&self, deadline: Instant) -> Result<BTreeMap<String, TgtTarget>, TargetError> {
        let text = self
            .run(&["--mode", "target", "--op", "show"], deadline)
            .await?;
        let targets = parse_targets(&text).ok_or_else(|| TargetError::Answer {
            program: "tgtadm".to_owned(),
            detail: text.chars().take(200).collect(),
        })?;
        Ok(targets
            .into_iter()
            .map(|target| (target.name.clone(), target))
            .collect())
    }

    async fn bind(
        &self,
        op: &str,
        id: u32,
        initiator: &str,
        deadline: Instant,
    ) -> Result<(), TargetError> {
        let id = id.to_string();
        let words = [
            "--mode", "target", "--op", op, "--tid", &id, "-Q", initiator,
        ];
        self.run(&words, deadline).await.map(drop)
    }

    /// Takes what is seen of the initiator away; what is gone already is no failure.
    async fn shut(
        &self,
        target: &TgtTarget,
        initiator: &str,
        deadline: Instant,
    ) -> Result<(), TargetError> {
        if target.names().all(|name| name == initiator) {
            self.bind("bind", target.id, NOBODY, deadline).await?;
        }
        if target.names().any(|name| name == initiator) {
            self.bind("unbind", target.id, initiator, deadline).await?;
        }
        for session in target.sessions_of(initiator) {
            for connection in &session.connections {
                let (tid, sid, cid) = (
                    target.id.to_string(),
                    session.id.to_string(),
                    connection.to_string(),
                );
                let words = [
                    "--mode", "conn", "--op", "delete", "--tid", &tid, "--sid", &sid, "--cid", &cid,
                ];
                // It may have ended meanwhile; the look that follows decides.
                let _ = self.run(&words, deadline).await;
            }
        }
        Ok(())
    }

    /// Resets the initiator's connections to these targets, where `tgtd` runs. Best effort: the look that follows
    /// decides.
    async fn reset(&self, targets: &[&TgtTarget], initiator: &str, deadline: Instant) {
        let sessions = targets
            .iter()
            .flat_map(|target| target.sessions_of(initiator));
        let addresses: BTreeSet<&String> = sessions.flat_map(|one| &one.addresses).collect();
        for address in addresses {
            let words = ["ss", "-K", "dst", address, "sport", "=", ":3260"];
            let words = words.map(str::to_owned);
            let all: Vec<String> = self.via.iter().cloned().chain(words).collect();
            let _ = call(&all, String::new(), &[], deadline).await;
        }
    }

    async fn cut_all(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<Option<String>>, TargetError> {
        let mut open = Vec::new();
        for round in 0..ROUNDS {
            let seen = self.targets(deadline).await?;
            open = targets
                .iter()
                .map(|name| still_open(seen.get(name), initiator))
                .collect();
            let left = targets.iter().zip(&open).filter(|(_, open)| open.is_some());
            let left: Vec<&TgtTarget> = left.filter_map(|(name, _)| seen.get(name)).collect();
            if left.is_empty() || Instant::now() >= deadline {
                break;
            }
            let shut = left
                .iter()
                .map(|target| self.shut(target, initiator, deadline));
            futures_util::future::try_join_all(shut).await?;
            if round >= PATIENCE {
                self.reset(&left, initiator, deadline).await;
            }
            if round > 0 {
                tokio::time::sleep(PAUSE).await;
            }
        }
        Ok(open)
    }
}

/// What of the initiator is left at a target; a target that is not there is shut.
fn still_open(target: Option<&TgtTarget>, initiator: &str) -> Option<String> {
    let target = target?;
    let sessions = target.sessions_of(initiator).count();
    match (target.lets_in(initiator), sessions) {
        (true, _) => Some("its access list lets it in".to_owned()),
        (false, 0) => None,
        (false, count) => Some(format!(
            "{count} sessions have not ended (`ss -K` must work where tgtd runs, see `via`)"
        )),
    }
}

#[async_trait::async_trait]
impl TargetAccess for Tgt {
    async fn cut(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Vec<Result<AccessRemoved, TargetError>> {
        let begun = Instant::now();
        let open = match self.cut_all(targets, initiator, deadline).await {
            Ok(open) => open,
            Err(error) => return all(targets, &error),
        };
        let took_ms = millis(begun.elapsed());
        let verdict = |(target, open): (&String, Option<String>)| match open {
            None => Ok(AccessRemoved {
                target: target.clone(),
                how: "tgtd took it off the access list; no session is left".to_owned(),
                took_ms,
            }),
            Some(detail) => Err(TargetError::StillOpen {
                target: target.clone(),
                initiator: initiator.to_owned(),
                detail,
            }),
        };
        targets.iter().zip(open).map(verdict).collect()
    }

    async fn allow(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<String>, TargetError> {
        let seen = self.targets(deadline).await?;
        let (mut missing, mut closed) = (Vec::new(), Vec::new());
        for name in targets {
            match seen.get(name) {
                None => missing.push(name.clone()),
                Some(target) if target.names().any(|name| name == initiator) => {}
                Some(target) => closed.push(target.id),
            }
        }
        let open = |id| self.bind("bind", id, initiator, deadline);
        few_at_a_time(closed.into_iter().map(open).collect()).await?;
        Ok(missing)
    }

    async fn allowed(
        &self,
        targets: &[String],
        initiator: &str,
        deadline: Instant,
    ) -> Result<Vec<bool>, TargetError> {
        let seen = self.targets(deadline).await?;
        let may = |name: &String| {
            let target = seen.get(name);
            target.is_some_and(|target| target.names().any(|name| name == initiator))
        };
        Ok(targets.iter().map(may).collect())
    }
}

/// Reads `tgtadm --mode target --op show`; `None`: it is something else.
pub fn parse_targets(text: &str) -> Option<Vec<TgtTarget>> {
    let mut targets: Vec<TgtTarget> = Vec::new();
    let mut section = "";
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (key, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.trim();
        if let Some(id) = key.strip_prefix("Target ") {
            targets.push(TgtTarget {
                id: id.parse().ok()?,
                name: value.to_owned(),
                ..TgtTarget::default()
            });
            section = "";
            continue;
        }
        let target = targets.last_mut()?;
        match (section, key) {
            (
                _,
                "System information"
                | "I_T nexus information"
                | "LUN information"
                | "Account information"
                | "ACL information",
            ) => {
                section = key;
            }
            ("I_T nexus information", "I_T nexus") => target.sessions.push(TgtSession {
                id: value.parse().ok()?,
                ..TgtSession::default()
            }),
            ("I_T nexus information", "Initiator") => {
                let name = value.split(" alias:").next().unwrap_or_default().trim();
                name.clone_into(&mut target.sessions.last_mut()?.initiator);
            }
            ("I_T nexus information", "Connection") => {
                let number = value.parse().ok()?;
                target.sessions.last_mut()?.connections.push(number);
            }
            ("I_T nexus information", "IP Address") => {
                let address = value.to_owned();
                target.sessions.last_mut()?.addresses.push(address);
            }
            ("ACL information", _) => target.access.push(line.to_owned()),
            _ => {}
        }
    }
    Some(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "Target 1: iqn.2026-01.com.example:db
    System information:
        Driver: iscsi
    I_T nexus information:
        I_T nexus: 3
            Initiator: iqn.2026-01.com.example:h1 alias: none
            Connection: 0
                IP Address: 10.79.0.1
    LUN information:
        LUN: 1
            Type: disk
    Account information:
        bob
    ACL information:
        ALL
        iqn.2026-01.com.example:h1
Target 12: iqn.2026-01.com.example:web
    ACL information:
        ALL
Target 13: iqn.2026-01.com.example:new
    ACL information:
";

    #[test]
    fn targets_are_read_and_open_doors_are_seen() {
        let targets = parse_targets(SHOWN).unwrap();
        let (db, web, new) = (&targets[0], &targets[1], &targets[2]);
        assert_eq!(
            (db.id, db.sessions[0].id, &db.sessions[0].connections[..]),
            (1, 3, &[0][..])
        );
        assert_eq!(db.sessions[0].addresses, ["10.79.0.1"]);
        let (h1, h2) = ("iqn.2026-01.com.example:h1", "iqn.2026-01.com.example:h2");
        assert!(still_open(Some(db), h1).unwrap().contains("lets it in"));
        assert_eq!(still_open(Some(db), h2), None);
        // Without names every address is enough.
        assert!(still_open(Some(web), h2).is_some());
        assert_eq!(still_open(Some(new), h2), None);
        assert_eq!(still_open(None, h2), None);
        assert_eq!(parse_targets("nonsense"), None);
        assert_eq!(parse_targets(""), Some(vec![]));
    }

    #[test]
    fn a_session_that_goes_on_is_an_open_door() {
        let mut target = parse_targets(SHOWN).unwrap().remove(0);
        target.access = vec![NOBODY.to_owned(), "ALL".to_owned()];
        let open = still_open(Some(&target), "iqn.2026-01.com.example:h1");
        assert!(open.unwrap().contains("1 sessions"));
    }

    /// Stands for the SAN's machine: `tgtadm` answers with success, the session goes only with its connection.
    const STUBBORN: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 1
echo "$*" >> calls
case "$*" in
"ss -K dst 10.79.0.1 "*) touch reset ;;
*"--op show") cat shown; [ -e reset ] || cat session; echo "    ACL information:"; cat access ;;
*"--op bind"*) echo "        ${*##* }" >> access ;;
*"--op unbind"*) grep -v " ${*##* }\$" access > left; mv left access ;;
esac
"#;
    const SESSION: &str = "    I_T nexus information:
        I_T nexus: 3
            Initiator: iqn.h1 alias: none
            Connection: 0
                IP Address: 10.79.0.1
";

    #[tokio::test]
    async fn a_target_that_is_missing_keeps_nobody_from_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("tool", STUBBORN);
        let target = |id: u32| format!("Target {id}: iqn.t{id:02}\n");
        put("shown", &(1..=20).map(target).collect::<String>());
        put("session", "");
        put("access", "        ALL\n");
        let tool = dir.path().join("tool").to_string_lossy().into_owned();
        let tgt = Tgt {
            control: 1,
            via: vec!["/bin/sh".to_owned(), tool],
        };
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        let targets: Vec<String> = (0..=20).map(|id| format!("iqn.t{id:02}")).collect();
        let missing = tgt.allow(&targets, "iqn.h1", deadline).await.unwrap();
        assert_eq!(missing, ["iqn.t00"]);
        let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
        for id in 1..=20 {
            let bound = format!("--op bind --tid {id} -Q iqn.h1");
            assert!(calls.contains(&bound), "{bound}: {calls}");
        }
    }

    /// What is not in the answer counts as shut: so the answer must be whole.
    #[tokio::test]
    async fn the_last_of_very_many_targets_is_shut_too() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("tool", STUBBORN);
        let filler = "    LUN information:\n".to_owned() + &"        Type: disk\n".repeat(60);
        let target = |id: u32| format!("Target {id}: iqn.t{id}\n{filler}");
        put("shown", &(1..=200).map(target).collect::<String>());
        put("session", "");
        put("access", "        iqn.h1\n");
        let tool = dir.path().join("tool").to_string_lossy().into_owned();
        let tgt = Tgt {
            control: 1,
            via: vec!["/bin/sh".to_owned(), tool],
        };
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        let last = ["iqn.t200".to_owned()];
        tgt.cut(&last, "iqn.h1", deadline).await.remove(0).unwrap();
        let access = std::fs::read_to_string(dir.path().join("access")).unwrap();
        assert_eq!(access.trim(), NOBODY, "it is off the list");
    }

    #[tokio::test]
    async fn a_session_that_waits_for_its_unsent_data_loses_its_connection() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("tool", STUBBORN);
        put("shown", "Target 1: iqn.db\n");
        put("session", SESSION);
        put("access", "        iqn.h1\n");
        let tool = dir.path().join("tool").to_string_lossy().into_owned();
        let tgt = Tgt {
            control: 1,
            via: vec!["/bin/sh".to_owned(), tool],
        };
        let deadline = Instant::now() + std::time::Duration::from_secs(20);
        let done = tgt.cut(&["iqn.db".to_owned()], "iqn.h1", deadline).await;
        assert!(done[0].is_ok(), "{done:?}");
        let calls = std::fs::read_to_string(dir.path().join("calls")).unwrap();
        let at = |words: &str| calls.find(words).unwrap();
        assert!(at("--op unbind") < at("--mode conn") && at("--mode conn") < at("ss -K"));
        let access = std::fs::read_to_string(dir.path().join("access")).unwrap();
        assert_eq!(access.trim(), NOBODY);
    }
}
