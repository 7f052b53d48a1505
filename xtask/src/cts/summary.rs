//! The summary that Pacemaker prints of a case: what it does, and where everything is afterwards.

use quorate_import::pacemaker::Planned;
use std::collections::{BTreeMap, BTreeSet};

/// An elementary action: what, which resource (or host), where.
type Deed = (&'static str, String, String);

/// A summary, read.
#[derive(Debug, Default)]
pub(super) struct Summary {
    deeds: BTreeSet<Deed>,
    /// Hosts of each resource before.
    before: BTreeMap<String, Vec<String>>,
    /// Hosts of each resource afterwards.
    after: BTreeMap<String, Vec<String>>,
}

impl Summary {
    pub(super) fn new(text: &str) -> Self {
        let mut summary = Self::default();
        let mut section = "";
        for line in text.lines() {
            if !line.starts_with(' ') && line.ends_with(':') {
                section = line;
                continue;
            }
            match section {
                "Transition Summary:" => summary.deed(line),
                "Current cluster status:" => place(line, &mut summary.before),
                "Revised Cluster Status:" => place(line, &mut summary.after),
                _ => {}
            }
        }
        summary
    }

    fn deed(&mut self, line: &str) {
        let Some(rest) = line.trim().strip_prefix("* ") else {
            return;
        };
        // What Pacemaker would like to do but cannot.
        if rest.ends_with("(blocked)") || rest.ends_with(" blocked") {
            return;
        }
        let mut words = rest.split_whitespace();
        let (Some(verb), Some(name)) = (words.next(), words.next()) else {
            return;
        };
        if verb == "Fence" {
            // `Fence (reboot) host 'why'`
            if let Some(host) = words.next() {
                self.deeds.insert(("fence", String::new(), host.to_owned()));
            }
            return;
        }
        if verb == "Shutdown" {
            self.deeds
                .insert(("shutdown", String::new(), name.to_owned()));
            return;
        }
        let inner = rest
            .split_once('(')
            .and_then(|(_, tail)| tail.split_once(')'));
        let inner = inner.map_or("", |(inner, _)| inner.trim());
        let (from, to) = match inner.split_once("->") {
            Some((from, to)) => (last_word(from), last_word(to)),
            None => (last_word(inner), last_word(inner)),
        };
        let mut add = |what: &'static str, host: &str| {
            self.deeds.insert((what, name.to_owned(), host.to_owned()));
        };
        match verb {
            "Start" => add("start", &to),
            "Stop" => add("stop", &from),
            "Migrate" => add("migrate", &format!("{from} -> {to}")),
            "Move" | "Recover" | "Restart" => {
                add("stop", &from);
                add("start", &to);
            }
            "Reload" => add("reload", &to),
            _ => add("other", verb),
        }
    }

    /// What differs; empty when nothing does.
    pub(super) fn compare(&self, planned: &Planned) -> Vec<String> {
        let mut deeds = BTreeSet::new();
        for action in &planned.actions {
            let name = action.resource.clone().unwrap_or_default();
            let host = match (&action.from, &action.to) {
                (Some(from), Some(to)) => format!("{from} -> {to}"),
                (Some(one), None) | (None, Some(one)) => one.clone(),
                (None, None) => String::new(),
            };
            deeds.insert((action.action, name, host));
        }
        let mut differences = Vec::new();
        for (what, name, host) in self.deeds.difference(&deeds) {
            differences.push(format!("missing: {what} {name} {host}"));
        }
        for deed in deeds.difference(&self.deeds) {
            if !self.is_further_copy(deed) && deed.0 != "shutdown" {
                let (what, name, host) = deed;
                differences.push(format!("not expected: {what} {name} {host}"));
            }
        }
        for (name, hosts) in &self.after {
            let ours = planned.placement.get(name);
            let same = match ours {
                None => hosts.is_empty(),
                Some(ours) => hosts.contains(ours),
            };
            if !same {
                let ours = ours.map_or("nowhere", String::as_str);
                let theirs = if hosts.is_empty() {
                    "nowhere".into()
                } else {
                    hosts.join(" ")
                };
                differences.push(format!("{name} is on {ours} afterwards, not {theirs}"));
            }
        }
        differences
    }

    /// The summary names one host of a resource that runs on several; it is stopped on all.
    fn is_further_copy(&self, (what, name, host): &Deed) -> bool {
        *what == "stop"
            && self
                .before
                .get(name)
                .is_some_and(|hosts| hosts.len() > 1 && hosts.contains(host))
            && self
                .deeds
                .iter()
                .any(|(what, other, _)| *what == "stop" && other == name)
    }
}

fn last_word(text: &str) -> String {
    text.split_whitespace()
        .last()
        .unwrap_or_default()
        .to_owned()
}

/// Reads `* name (agent): state host`.
fn place(line: &str, places: &mut BTreeMap<String, Vec<String>>) {
    let Some(rest) = line.trim().strip_prefix("* ") else {
        return;
    };
    let Some((name, rest)) = rest.split_once('\t') else {
        return;
    };
    let Some((_, state)) = rest.split_once("):") else {
        return;
    };
    let states = [
        "Started",
        "Stopped",
        "FAILED",
        "ORPHANED",
        "REMOVED",
        "Promoted",
        "Unpromoted",
        "Starting",
        "Stopping",
        "Migrating",
        "Monitoring",
        "[",
        "]",
    ];
    let mut depth = 0;
    let mut hosts = Vec::new();
    for word in state.split_whitespace() {
        if word.starts_with('(') {
            depth += 1;
        }
        if depth == 0 && !states.contains(&word) {
            hosts.push(word.to_owned());
        }
        if word.ends_with(')') {
            depth -= 1;
        }
    }
    places.insert(name.trim().to_owned(), hosts);
}
