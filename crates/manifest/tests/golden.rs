//! Bad manifests and exactly what the operator is told, in `tests/bad/NAME.yaml` and `.expected`.
//! `UPDATE_GOLDEN=1` writes the expectations anew; read the difference before committing it.
#![allow(clippy::unwrap_used)]

use quorate_manifest::{Existing, check, load, parse};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn existing() -> Existing {
    let text = r"
pools:
  old-pool: {kind: directory, path: /srv/old}
networks:
  old-net: {bridge: br-old}
vms:
  old: {memory: 1GiB, disks: [{pool: old-pool, image: old.raw}]}
  old-two: {memory: 1GiB, boot: {kernel: {kernel: /k}}, depends_on: [old]}
";
    let parsed = parse(text, "existing.yaml", &BTreeMap::new()).unwrap();
    let hosts = ["h1", "h2", "h3"].map(|h| h.parse().unwrap());
    let mut existing = Existing::default().with(&parsed.manifest);
    existing.hosts = hosts.into();
    existing
}

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    files
}

#[test]
fn bad_manifests_are_refused_with_these_words() {
    let existing = existing();
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut wrong = Vec::new();
    let cases = cases();
    assert!(cases.len() >= 25);
    for path in cases {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let said = match load(&text, name, &BTreeMap::new(), &existing) {
            Ok(_) => panic!("{name} was accepted"),
            Err(diagnostics) => format!("{diagnostics}\n"),
        };
        let golden = path.with_extension("expected");
        if update {
            std::fs::write(&golden, &said).unwrap();
        } else if std::fs::read_to_string(&golden).unwrap_or_default() != said {
            wrong.push(format!("---- {name} now says:\n{said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_existing_cluster_of_these_tests_is_sound() {
    let existing = existing();
    let manifest = quorate_types::Manifest {
        vms: existing.vms.clone(),
        pools: existing.pools.clone(),
        networks: existing.networks.clone(),
        ..Default::default()
    };
    assert_eq!(check(&manifest, &existing), []);
}
