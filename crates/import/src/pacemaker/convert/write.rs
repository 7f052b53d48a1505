//! Writing the manifest: YAML that reads like one written by hand.

use super::draft::{Draft, RuleKind};
use crate::Problem;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The report as comments.
pub(super) fn head(notes: &[Problem], file: &str) -> String {
    let mut text = format!("# Imported from {}.\n", one_line(file));
    if !notes.is_empty() {
        text.push_str("#\n# Not carried over, or guessed:\n");
    }
    for note in notes {
        for line in note.render(&one_line(file)).lines() {
            let _ = writeln!(text, "#   {}", one_line(line));
        }
    }
    text.push('\n');
    text
}

fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The manifest.
pub(super) fn manifest(draft: &Draft) -> String {
    let mut text = String::new();
    fencing(draft, &mut text);
    hosts(draft, &mut text);
    if draft.vms.is_empty() {
        text.push_str("vms: {}\n");
        return text;
    }
    text.push_str("pools:\n  imported:\n    kind: directory\n    path: /var/lib/libvirt/images\n");
    text.push_str("\nvms:\n");
    for (name, vm) in &draft.vms {
        let _ = writeln!(text, "  {}:", quoted(name));
        let _ = writeln!(text, "    cpus: {}", vm.cpus);
        let _ = writeln!(text, "    memory: {}MiB", vm.memory_mib);
        let _ = writeln!(text, "    disks:");
        let _ = writeln!(text, "      - pool: imported");
        let _ = writeln!(text, "        image: {}", quoted(&format!("{name}.qcow2")));
        let _ = writeln!(text, "        format: qcow2");
        let migration = if vm.live { "live" } else { "cold" };
        let _ = writeln!(text, "    migration: {migration}");
        if vm.priority != 0 {
            let _ = writeln!(text, "    priority: {}", vm.priority);
        }
        if vm.stopped {
            text.push_str("    power: stopped\n");
        }
        if let Some(seconds) = vm.shutdown_s {
            let _ = writeln!(text, "    shutdown_timeout: {seconds}s");
        }
        if !vm.hosts.is_empty() {
            let hosts: Vec<String> = vm.hosts.iter().map(|host| quoted(host)).collect();
            let _ = writeln!(text, "    hosts: [{}]", hosts.join(", "));
        }
        if !vm.depends_on.is_empty() {
            text.push_str("    depends_on:\n");
            for (other, advisory) in &vm.depends_on {
                let advisory = if *advisory { ", advisory: true" } else { "" };
                let _ = writeln!(
                    text,
                    "      {}: {{condition: started{advisory}}}",
                    quoted(other)
                );
            }
        }
        if !vm.prefer.is_empty() {
            text.push_str("    prefer:\n");
        }
        for (host, weight) in &vm.prefer {
            let _ = writeln!(
                text,
                "      - {{hosts: [{}], weight: {weight}}}",
                quoted(host)
            );
        }
        amounts(&vm.resources, "    ", &mut text);
    }
    rules(draft, &mut text);
    text
}

fn fencing(draft: &Draft, text: &mut String) {
    if draft.fencing.is_empty() {
        return;
    }
    text.push_str("cluster:\n  fencing:\n");
    for (host, devices) in &draft.fencing {
        let _ = writeln!(text, "    {}:", quoted(host));
        for device in devices {
            let _ = writeln!(text, "      - agent: {}", quoted(&device.agent));
            if !device.options.is_empty() {
                text.push_str("        options:\n");
            }
            for (name, value) in &device.options {
                let _ = writeln!(text, "          {}: {}", quoted(name), quoted(value));
            }
        }
    }
    text.push('\n');
}

fn hosts(draft: &Draft, text: &mut String) {
    if draft.hosts.is_empty() {
        return;
    }
    text.push_str("hosts:\n");
    for (name, host) in &draft.hosts {
        let _ = writeln!(text, "  {}:", quoted(name));
        if !host.labels.is_empty() {
            text.push_str("    labels:\n");
        }
        for (label, value) in &host.labels {
            let _ = writeln!(text, "      {}: {}", quoted(label), quoted(value));
        }
        amounts(&host.resources, "    ", text);
    }
    text.push('\n');
}

fn amounts(amounts: &BTreeMap<String, u64>, indent: &str, text: &mut String) {
    if !amounts.is_empty() {
        let _ = writeln!(text, "{indent}resources:");
    }
    for (name, amount) in amounts {
        let _ = writeln!(text, "{indent}  {}: {amount}", quoted(name));
    }
}

fn rules(draft: &Draft, text: &mut String) {
    if draft.rules.is_empty() {
        return;
    }
    text.push_str("\nrules:\n");
    for (name, rule) in &draft.rules {
        let vms: Vec<String> = rule.vms.iter().map(|vm| quoted(vm)).collect();
        let word = match rule.kind {
            RuleKind::With => "keep_with",
            RuleKind::Apart => "keep_apart",
        };
        let _ = writeln!(text, "  {}:", quoted(name));
        let _ = writeln!(text, "    {word}: [{}]", vms.join(", "));
        if let Some(label) = &rule.across {
            let _ = writeln!(text, "    across: {}", quoted(label));
        }
        if let Some(weight) = rule.weight {
            let _ = writeln!(text, "    weight: {weight}");
        }
    }
}

/// Text in double quotes; `$` doubled, so that it is not taken for a variable.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c == '-' || c == '_';
    let words = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let begins = text.chars().next().is_some_and(|c| c.is_ascii_lowercase());
    if begins && text.chars().all(|c| plain(c) || c.is_ascii_digit()) && !words.contains(&text) {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => {
                quoted.push('\\');
                quoted.push(letter);
            }
            '$' => quoted.push_str("$$"),
            letter if letter.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(letter));
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}
