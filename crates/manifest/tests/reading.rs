//! What is accepted, what it means, and the bounds on what is read.
#![allow(clippy::unwrap_used)]

use quorate_manifest::{
    ChangeKind, Existing, MAX_DIAGNOSTICS, MAX_INPUT, Problem, check, diff, json_schema, load,
    parse, variables_used,
};
use quorate_types::spec::{Boot, Condition, Probe};
use quorate_types::{ByteSize, Manifest, Millis};
use std::collections::BTreeMap;

/// Every field of every object.
const FULL: &str = r#"
cluster:
  lease: {heartbeat: 100ms, duration: 1s, freeze_before: 200ms, watchdog_bound: 300ms, drift_permille: 10}
  max_voters: 3
  replace_voter_after: 2m
  parallel_migrations: 4
  total_migrations: 8
  cpu_overcommit_percent: 400
  make_room: true
  max_fence_percent: 34
  migration_mib_per_s: 100
  admission: {failures: 2, mode: refuse}
  preemption: lower_priority
  balancing: {mode: off, min_gain_percent: 15, moves_per_hour: 3}
  fencing:
    h1:
      - {agent: fence_ipmilan, options: {ip: 10.0.0.1, lanplus: 1, password: secret}, timeout: 10s}
hosts:
  h1: {labels: {rack: r1, room: a}, resources: {gpu: 2}, cpu_overcommit_percent: 100, parallel_migrations: 1}
  h2: {labels: {rack: r2}}
networks:
  lan: {bridge: br-lan, uplink: eth0, mtu: 9000, parallel_migrations: 3, subnet: 10.77.0.0/24, subnet6: "fd77::/64", guard: {source: true, dhcp: true, router: true},
    bgp: {daemon: frr, as: 65001, neighbors: [{address: 10.77.0.254, as: 65000}], hold_time: 9s, bfd: true}}
pools:
  shared: {kind: directory, path: /srv/vms, hosts: [h1, h2]}
vms:
  db:
    cpus: 2
    memory: 512MiB
    machine: q35
    boot: disk
    disks: [{pool: shared, image: db.raw, format: raw, size: 16MiB}]
    labels: {tier: data}
    nics: [{network: lan, mac: "52:54:00:00:00:01", address: 10.77.0.11, address6: "fd77::11", trusted: true}]
    ready: {probe: {tcp: {address: 10.77.0.11, port: 7001}}, timeout: 2m}
    hosts: [h1, h2]
    host_labels: {rack: [r1, r2]}
    prefer: [{hosts: [h1], weight: 10}, {labels: {room: [a]}, weight: -20}]
    resources: {gpu: 1}
    priority: -5
    power: running
    migration: quick
    shutdown_timeout: 90s
  app:
    memory: 1GiB
    machine: microvm
    boot: {kernel: {kernel: /boot/k, initrd: /boot/i, append: console=ttyS0}}
    depends_on: {db: {condition: started}}
    ready: {probe: {http: {address: 10.77.0.12}}}
    power: stopped
  web:
    memory: 1GiB
    boot: {kernel: {kernel: /boot/k}}
    depends_on: [db, app]
    ready: {probe: agent}
  late:
    memory: 1GiB
    boot: {kernel: {kernel: /boot/k}}
    depends_on: {db: {advisory: true, timeout: 5m, on_timeout: start, tolerates: pause}}
  log:
    memory: 1GiB
    boot: {kernel: {kernel: /boot/k}}
    ready: {probe: {serial: READY}}
rules:
  apart: {keep_apart: [db, web]}
  with: {keep_with: [app, web]}
  racks: {keep_apart: [db, log], across: rack, max: 1, weight: 50}
  even: {spread: [db, log, late]}
services:
  web:
    network: lan
    address: 10.77.0.100
    address6: "fd77::100"
    ports: [80, 8000-8010/tcp, 53/udp]
    members: {db: {weight: 2}}
    select: {tier: [data, web]}
    affinity: {kind: subnet, prefix: 20, prefix6: 56, timeout: 10m}
    health: {kind: https, port: 443, path: /health, interval: 5s, timeout: 2s, rise: 1, fall: 2}
    drain_timeout: 1m
    attractor: bgp
    limits: {new_per_member: 200, new_per_client: 20}
"#;

fn none() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn hosts() -> Existing {
    Existing {
        hosts: ["h1", "h2", "h3"].map(|h| h.parse().unwrap()).into(),
        ..Existing::default()
    }
}

#[test]
fn every_field_of_the_types_can_be_written() {
    let parsed = load(FULL, "full.yaml", &none(), &hosts()).unwrap();
    let manifest = parsed.manifest;
    let db = &manifest.vms[&"db".parse().unwrap()];
    assert_eq!(db.memory, ByteSize::mib(512));
    assert_eq!(db.shutdown_timeout, Millis::secs(90));
    assert_eq!(db.boot, Boot::Disk);
    let web = &manifest.vms[&"web".parse().unwrap()];
    assert_eq!(web.ready.as_ref().unwrap().probe, Probe::Agent);
    let dependencies: Vec<_> = web.depends_on.values().map(|d| d.condition).collect();
    assert_eq!(dependencies, [Condition::Ready, Condition::Ready]);
    let fencing = &manifest.cluster.unwrap().fencing[&"h1".parse().unwrap()];
    assert_eq!(fencing[0].options["lanplus"], "1");
}

/// What serde writes, the reader takes: so no field of the types is missing in the reader's table.
#[test]
fn what_the_types_serialise_can_be_read_back() {
    let manifest = parse(FULL, "full.yaml", &none()).unwrap().manifest;
    let written = serde_json::to_string_pretty(&manifest).unwrap();
    let again = parse(&written, "full.json", &none()).unwrap().manifest;
    assert_eq!(again, manifest);
}

#[test]
fn the_schema_knows_every_field() {
    let schema = json_schema().to_string();
    let manifest = parse(FULL, "full.yaml", &none()).unwrap().manifest;
    let value = serde_json::to_value(&manifest).unwrap();
    for field in value["services"]["web"].as_object().unwrap().keys() {
        assert!(schema.contains(&format!("\"{field}\"")), "{field}");
    }
    for field in value["vms"]["db"].as_object().unwrap().keys() {
        assert!(schema.contains(&format!("\"{field}\"")), "{field}");
    }
}

#[test]
fn variables_are_replaced_in_values_and_cannot_change_the_structure() {
    let text = "vms:\n  a:\n    memory: ${M:-64MiB}\n    cpus: ${C}\n    boot: {kernel: {kernel: '${K}'}}\n";
    assert_eq!(
        variables_used(text),
        ["C", "K", "M"].map(str::to_owned).into()
    );
    let variables = BTreeMap::from([
        ("C".to_owned(), "3".to_owned()),
        ("K".to_owned(), "/k}, machine: microvm #".to_owned()),
    ]);
    let manifest = parse(text, "x.yaml", &variables).unwrap().manifest;
    let vm = manifest.vms.values().next().unwrap();
    assert_eq!((vm.cpus, vm.memory), (3, ByteSize::mib(64)));
    let Boot::Kernel(boot) = &vm.boot else {
        panic!("{:?}", vm.boot)
    };
    assert_eq!(boot.kernel, "/k}, machine: microvm #");
}

#[test]
fn input_is_bounded() {
    let huge = "#".repeat(MAX_INPUT + 1);
    assert!(
        parse(&huge, "x", &none())
            .unwrap_err()
            .to_string()
            .contains("at most")
    );
    let deep = format!("vms: {}1{}", "[".repeat(40), "]".repeat(40));
    assert!(
        parse(&deep, "x", &none())
            .unwrap_err()
            .to_string()
            .contains("nested deeper")
    );
    let mut bomb = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let before = level - 1;
        let refs = vec![format!("*a{before}"); 10].join(", ");
        bomb.push_str(&format!("k{level}: &a{level} [{refs}]\n"));
    }
    let said = parse(&bomb, "x", &none()).unwrap_err().to_string();
    assert!(said.contains("aliases expanded"), "{said}");
    let many: String = (0..200).map(|n| format!("bad{n}: 1\n")).collect();
    let refused = parse(&many, "x", &none()).unwrap_err();
    assert_eq!(
        (refused.items.len(), refused.omitted),
        (MAX_DIAGNOSTICS, 150)
    );
}

#[test]
fn many_keys_are_read_in_reasonable_time() {
    let text: String = std::iter::once("vms:\n".to_owned())
        .chain((0..20_000).map(|n| format!("  v{n}: {{memory: 1GiB}}\n")))
        .collect();
    let began = std::time::Instant::now();
    assert_eq!(
        parse(&text, "x", &none()).unwrap().manifest.vms.len(),
        20_000
    );
    assert!(began.elapsed().as_secs() < 20);
}

/// Whatever a prefix of a good manifest says, reading it ends and says where.
#[test]
fn no_truncation_of_a_manifest_panics() {
    for end in (0..FULL.len()).step_by(3) {
        if let Err(refused) = load(&FULL[..end], "x", &none(), &hosts()) {
            assert!(!refused.items.is_empty());
            assert!(refused.to_string().contains("--> x:"));
        }
    }
}

#[test]
fn hosts_are_only_checked_when_they_are_known() {
    let text = "vms: {a: {memory: 1GiB, boot: {kernel: {kernel: /k}}, hosts: [nowhere]}}";
    let manifest = parse(text, "x", &none()).unwrap().manifest;
    assert_eq!(check(&manifest, &Existing::default()), []);
    assert_eq!(check(&manifest, &hosts()).len(), 1);
}

#[test]
fn problems_found_elsewhere_can_be_given_their_place() {
    let parsed = parse("vms:\n  a: {memory: 1GiB}\n", "x", &none()).unwrap();
    let problem = Problem {
        path: ["vms", "a", "disks", "0"].map(str::to_owned).into(),
        message: "not there".to_owned(),
        hint: None,
    };
    let diagnostics = parsed.diagnose(&[problem]);
    let span = diagnostics.items[0].span;
    assert_eq!((span.line, span.column), (2, 3));
}

#[test]
fn a_diff_names_the_fields_and_hides_secrets() {
    let old = parse(FULL, "x", &none()).unwrap().manifest;
    let existing = hosts().with(&old);
    assert_eq!(diff(&existing, &old), []);
    let text = FULL
        .replace("memory: 512MiB", "memory: 768MiB")
        .replace(
            "size: 16MiB}",
            "size: 16MiB}, {pool: shared, image: db2.raw}",
        )
        .replace("password: secret", "password: other")
        .replace("priority: -5", "priority: 7")
        .replace(
            "  log:",
            "  extra: {memory: 1GiB, boot: {kernel: {kernel: /k}}}\n  log:",
        );
    let new: Manifest = parse(&text, "x", &none()).unwrap().manifest;
    let changes = diff(&existing, &new);
    let said: Vec<String> = changes.iter().map(ToString::to_string).collect();
    assert_eq!(
        said[0],
        "~ cluster\n    fencing.h1[0].options.password: (hidden) -> (hidden)"
    );
    assert_eq!(
        said[1],
        "~ vm db\n    disks[1].format: raw\n    disks[1].image: db2.raw\n    disks[1].pool: shared\n    memory: 512MiB -> 768MiB\n    priority: -5 -> 7"
    );
    assert_eq!(changes[2].kind, ChangeKind::Create);
    assert!(said[2].starts_with("+ vm extra\n"), "{}", said[2]);
    assert_eq!(said.len(), 3);
}

#[test]
fn the_shipped_example_is_sound() {
    let text = include_str!("../../../examples/three-tier.yaml");
    let used = variables_used(text);
    assert!(used.contains("QUORATE_POOL"), "{used:?}");
    let parsed = load(text, "three-tier.yaml", &none(), &hosts()).unwrap();
    assert_eq!(parsed.manifest.vms.len(), 4);
}

#[test]
fn the_example_of_two_hosts_is_sound() {
    let text = include_str!("../../../examples/two-hosts.yaml");
    let parsed = load(text, "two-hosts.yaml", &none(), &hosts()).unwrap();
    assert_eq!(parsed.manifest.vms.len(), 1);
}

#[test]
fn the_example_of_racks_is_accepted_and_says_what_it_means() {
    let text = include_str!("../../../examples/racks.yaml");
    let existing = Existing {
        hosts: ["h1", "h2", "h3", "h4", "h5", "h6"]
            .map(|h| h.parse().unwrap())
            .into(),
        ..Existing::default()
    };
    let parsed = load(text, "racks.yaml", &none(), &existing).unwrap();
    let rules = &parsed.manifest.rules;
    assert!(rules[&"db-racks".parse().unwrap()].hard());
    assert!(!rules[&"near-cache".parse().unwrap()].ties());
    let changes = diff(&existing, &parsed.manifest);
    assert!(
        changes
            .iter()
            .any(|change| change.object == "host" && change.name == "h6")
    );
}

#[test]
fn what_the_cluster_has_for_itself_is_refused_where_it_is_written() {
    let text = "\
pools:
  san: {kind: iscsi, portals: [192.0.2.9], target: iqn.2026-01.net.example:a}
vms:
  db:
    cpus: 1
    memory: 64 MiB
    disks:
      - {pool: san, image: data}
      - {pool: san, image: w/0}
";
    let pool = "iqn.2026-01.net.example:a:w LUN 0".to_owned();
    let existing = Existing {
        reserved: [(pool, "the disk witness's".to_owned())].into(),
        ..hosts()
    };
    let said = load(text, "m.yaml", &none(), &existing)
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("`w/0` in pool `san` is the disk witness's"),
        "{said}"
    );
    assert!(said.contains("m.yaml:9:"), "{said}");
}

#[test]
fn the_example_of_services_is_sound_and_its_difference_is_told() {
    let text = include_str!("../../../examples/services.yaml");
    let parsed = load(text, "services.yaml", &none(), &hosts()).unwrap();
    let services = &parsed.manifest.services;
    assert_eq!(services.len(), 2);
    let existing = hosts().with(&parsed.manifest);
    let mut changed = parsed.manifest.clone();
    for service in changed.services.values_mut() {
        service.ports.push("8443".parse().unwrap());
        service.drain_timeout = Millis::secs(60);
    }
    let said: Vec<String> = diff(&existing, &changed)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        said[1],
        "~ service web\n    drain_timeout: 10m -> 1m\n    ports: [80, 443] -> [80, 443, 8443]"
    );
}

#[test]
fn the_example_of_a_san_is_sound() {
    let text = include_str!("../../../examples/san.yaml");
    let parsed = load(text, "san.yaml", &none(), &hosts()).unwrap();
    let pool = &parsed.manifest.pools[&"san".parse().unwrap()];
    let secrets: Vec<&str> = pool.secrets().iter().map(|name| name.as_str()).collect();
    assert_eq!((pool.kind(), &secrets[..]), ("iscsi", &["san-chap"][..]));
    assert_eq!(pool.access().map(|access| access.name()), Some("tgt"));
}
