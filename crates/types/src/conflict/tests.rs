//! Conflicts in words, and that nothing more than needed is named.

use super::*;
use crate::ByteSize;

fn name<T: std::str::FromStr<Err = crate::NameError>>(text: &str) -> T {
    text.parse().unwrap()
}

/// Hosts by rack, VMs by allowed hosts, rules as JSON; the conflicts in words.
fn conflicts(racks: &[&str], vms: &[(&str, &[&str], u64)], rules: &[(&str, &str)]) -> Vec<String> {
    let hosts: Vec<(HostName, HostSpec)> = racks
        .iter()
        .enumerate()
        .map(|(n, rack)| {
            let spec = HostSpec {
                labels: [(name("rack"), name(rack))].into(),
                resources: [(name("gpu"), 1)].into(),
                ..HostSpec::default()
            };
            (name(&format!("h{}", n + 1)), spec)
        })
        .collect();
    let vms: Vec<(VmName, VmSpec)> = vms
        .iter()
        .map(|(vm, on, gpus)| {
            let mut spec = VmSpec::new(ByteSize::mib(64));
            spec.hosts = on.iter().map(|host| name(host)).collect();
            if *gpus > 0 {
                spec.resources = [(name("gpu"), *gpus)].into();
            }
            (name(vm), spec)
        })
        .collect();
    let rules: Vec<(RuleName, RuleSpec)> = rules
        .iter()
        .map(|(rule, text)| (name(rule), serde_json::from_str(text).unwrap()))
        .collect();
    let found = find(&Site {
        hosts: hosts.iter().map(|(name, spec)| (name, spec)).collect(),
        pools: BTreeMap::new(),
        vms: vms.iter().map(|(name, spec)| (name, spec)).collect(),
        rules: rules.iter().map(|(name, spec)| (name, spec)).collect(),
    });
    found.iter().map(ToString::to_string).collect()
}

#[test]
fn several_rules_that_conflict_only_together_are_named_and_no_others() {
    let found = conflicts(
        &["r1", "r1", "r2"],
        &[
            ("a", &[], 0),
            ("b", &[], 0),
            ("c", &["h3"], 0),
            ("d", &["h3"], 0),
            ("e", &[], 0),
        ],
        &[
            ("pair", r#"{"keep_with":["a","b"]}"#),
            ("racks", r#"{"keep_apart":["b","c"],"across":"rack"}"#),
            ("same", r#"{"keep_with":["a","d"]}"#),
            ("other", r#"{"keep_apart":["d","e"]}"#),
            ("soft", r#"{"keep_apart":["a","b"],"weight":10}"#),
        ],
    );
    assert_eq!(
        found,
        [
            "no placement on the 3 hosts satisfies this together: rule `pair` wants a, b kept together; rule `racks` wants b, c kept apart across every rack; rule `same` wants a, d kept together; `c` may run on h3 only; `d` may run on h3 only"
        ]
    );
}

#[test]
fn too_few_domains_name_as_many_vms_as_it_takes() {
    let apart = r#"{"keep_apart":["a","b","c","d"],"across":"rack"}"#;
    let vms: &[(&str, &[&str], u64)] =
        &[("a", &[], 0), ("b", &[], 0), ("c", &[], 0), ("d", &[], 0)];
    let found = conflicts(&["r1", "r1", "r2", "r2"], vms, &[("apart", apart)]);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].contains("wants b, c, d kept apart across every rack"),
        "{}",
        found[0]
    );
    let two = r#"{"keep_apart":["a","b","c","d"],"across":"rack","max":2}"#;
    assert!(conflicts(&["r1", "r1", "r2", "r2"], vms, &[("apart", two)]).is_empty());
    let even = r#"{"spread":["a","b","c","d"],"across":"rack"}"#;
    assert!(conflicts(&["r1", "r2", "r2"], vms, &[("even", even)]).is_empty());
}

#[test]
fn counted_resources_must_suffice() {
    let found = conflicts(
        &["r1", "r2"],
        &[("a", &[], 1), ("b", &[], 1), ("c", &[], 0)],
        &[],
    );
    assert!(found.is_empty(), "{found:?}");
    let found = conflicts(&["r1", "r2"], &[("a", &[], 2), ("b", &[], 1)], &[]);
    assert_eq!(
        found,
        ["no placement on the 2 hosts satisfies this: the hosts' `gpu` must suffice for a"]
    );
}

#[test]
fn forty_vms_apart_on_thirty_nine_hosts_are_refused_quickly() {
    let racks = vec!["r1"; 39];
    let names: Vec<String> = (0..40).map(|n| format!("v{n}")).collect();
    let vms: Vec<(&str, &[&str], u64)> = names.iter().map(|n| (n.as_str(), &[][..], 0)).collect();
    let rule = format!("{{\"keep_apart\":{names:?}}}");
    assert_eq!(conflicts(&racks, &vms, &[("apart", &rule)]).len(), 1);
    assert!(conflicts(&racks, &vms[1..], &[("apart", &rule)]).is_empty());
}
