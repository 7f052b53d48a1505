//! A manifest in the making.

use super::super::model::Cib;
use crate::{Place, Problem};
use std::collections::{BTreeMap, BTreeSet};

/// Longest name of an object.
const MAX_NAME: usize = 40;

/// A VM in the making.
#[derive(Debug, Clone, Default)]
pub(super) struct Vm {
    pub(super) place: Place,
    pub(super) cpus: u32,
    pub(super) memory_mib: u64,
    pub(super) priority: i32,
    pub(super) stopped: bool,
    pub(super) live: bool,
    pub(super) shutdown_s: Option<u64>,
    /// Hosts it may run on; empty: all.
    pub(super) hosts: BTreeSet<String>,
    /// What it waits for; true: only if that runs anyway.
    pub(super) depends_on: BTreeMap<String, bool>,
    /// Hosts that are better or worse, with the weight.
    pub(super) prefer: BTreeMap<String, i64>,
    /// Countable things that it uses up.
    pub(super) resources: BTreeMap<String, u64>,
}

/// Together or apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RuleKind {
    With,
    Apart,
}

/// A rule in the making.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub(super) place: Place,
    pub(super) kind: RuleKind,
    pub(super) vms: BTreeSet<String>,
    /// Soft, with this weight; absent: hard.
    pub(super) weight: Option<i64>,
    /// The label of hosts whose values are the domains.
    pub(super) across: Option<String>,
}

/// A fence device in the making.
#[derive(Debug, Clone, Default)]
pub(super) struct Device {
    pub(super) agent: String,
    pub(super) options: BTreeMap<String, String>,
}

/// What is said of a host.
#[derive(Debug, Clone, Default)]
pub(super) struct Host {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) resources: BTreeMap<String, u64>,
}

/// A manifest in the making. Names are Quorate's; resources are found by their ids.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) vms: BTreeMap<String, Vm>,
    pub(super) rules: BTreeMap<String, Rule>,
    known_rules: BTreeSet<(RuleKind, BTreeSet<String>, Option<String>)>,
    pub(super) fencing: BTreeMap<String, Vec<Device>>,
    pub(super) hosts: BTreeMap<String, Host>,
    pub(super) notes: Vec<Problem>,
    /// Constraints that name what does not exist.
    pub(super) unknown: Vec<Problem>,
    /// Last numbers that made a name unique, by name.
    numbers: BTreeMap<String, u32>,
    rule_numbers: BTreeMap<String, u32>,
    /// VM names by resource id.
    pub(super) of_resource: BTreeMap<String, String>,
    /// Host names by node name.
    pub(super) of_node: BTreeMap<String, String>,
    /// Places of clones that were carried over.
    pub(super) carried: Vec<Place>,
    /// Where what was taken out last came from.
    left_out: Option<Place>,
}

impl Draft {
    pub(super) fn new(cib: &Cib) -> Self {
        let mut draft = Self::default();
        let mut taken = BTreeSet::new();
        let mut numbers = BTreeMap::new();
        for node in &cib.nodes {
            let short = node.name.split('.').next().unwrap_or(&node.name);
            let name = unique(short, &mut numbers, |name| taken.contains(name));
            taken.insert(name.clone());
            if name != node.name {
                draft.note(
                    node.place,
                    format!("node \"{}\" is called {name}", node.name),
                    "",
                );
            }
            draft.of_node.insert(node.name.clone(), name);
        }
        draft
    }

    pub(super) fn note(&mut self, place: Place, message: impl Into<String>, hint: &str) {
        let note = Problem::new(place, message);
        self.notes.push(match hint {
            "" => note,
            hint => note.hint(hint),
        });
    }

    /// A free name for a VM.
    pub(super) fn vm_name(&mut self, wanted: &str) -> String {
        let vms = &self.vms;
        unique(wanted, &mut self.numbers, |name| vms.contains_key(name))
    }

    pub(super) fn rule(&mut self, wanted: &str, rule: Rule) {
        let key = (rule.kind, rule.vms.clone(), rule.across.clone());
        if rule.vms.len() < 2 || !self.known_rules.insert(key) {
            return;
        }
        let rules = &self.rules;
        let name = unique(wanted, &mut self.rule_numbers, |name| {
            rules.contains_key(name)
        });
        self.rules.insert(name, rule);
    }

    /// Whether a VM waits for another one, directly or not.
    pub(super) fn waits_for(&self, vm: &str, other: &str) -> bool {
        let mut open = vec![vm];
        let mut seen = BTreeSet::new();
        while let Some(one) = open.pop() {
            if one == other {
                return true;
            }
            if seen.insert(one)
                && let Some(vm) = self.vms.get(one)
            {
                open.extend(vm.depends_on.keys().map(String::as_str));
            }
        }
        false
    }

    /// Takes out what a problem points at. False if nothing can be taken out.
    pub(super) fn leave_out(&mut self, problem: &quorate_manifest::Problem) -> bool {
        let path: Vec<&str> = problem.path.iter().map(String::as_str).collect();
        match path[..] {
            ["rules", rule, ..] => match self.rules.remove(rule) {
                Some(rule) => {
                    self.left_out = Some(rule.place);
                    true
                }
                None => false,
            },
            ["vms", vm, ..] => {
                let Some(vm) = self.vms.get_mut(vm) else {
                    return false;
                };
                let had = !vm.hosts.is_empty();
                vm.hosts.clear();
                self.left_out = Some(vm.place);
                had
            }
            _ => false,
        }
    }

    /// Takes out everything that could conflict.
    pub(super) fn leave_out_all_rules(&mut self) {
        self.rules.clear();
        for vm in self.vms.values_mut() {
            vm.hosts.clear();
        }
        let place = Place { line: 1, column: 1 };
        let hint = "write the rules by hand";
        self.note(
            place,
            "too many conflicts: all rules and lists of hosts are left out",
            hint,
        );
    }

    pub(super) fn note_left_out(&mut self, problem: &quorate_manifest::Problem) {
        let place = self.left_out.take().unwrap_or_default();
        let message = format!("left out: {}", problem.message);
        self.note(place, message, problem.hint.as_deref().unwrap_or_default());
    }
}

/// Makes a valid name.
pub(super) fn valid_name(wanted: &str) -> String {
    unique(wanted, &mut BTreeMap::new(), |_| false)
}

/// Makes a valid name that is not taken yet. Numbers go on where they were for the same name.
fn unique(
    wanted: &str,
    numbers: &mut BTreeMap<String, u32>,
    taken: impl Fn(&str) -> bool,
) -> String {
    let letters = wanted
        .chars()
        .map(|letter| match letter.to_ascii_lowercase() {
            letter if letter.is_ascii_lowercase() || letter.is_ascii_digit() => letter,
            _ => '-',
        });
    let name: String = letters.take(MAX_NAME).collect();
    let name = match name.trim_matches('-') {
        "" => "unnamed",
        name => name,
    };
    if !taken(name) {
        return name.to_owned();
    }
    let number = numbers.entry(name.to_owned()).or_insert(1);
    loop {
        *number += 1;
        let room = MAX_NAME - 1 - number.to_string().len();
        let stem: String = name.chars().take(room).collect();
        let name = format!("{}-{number}", stem.trim_end_matches('-'));
        if !taken(&name) {
            return name;
        }
    }
}
