//! `plan --cib` and `import pacemaker`, as programs use them: standard output, standard error, exit status.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus/cib")
        .join(name)
}

fn quorate(arguments: &[&str], file: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(arguments)
        .arg(file)
        // There is no daemon, and none is needed.
        .env("QUORATE_DIR", "/nonexistent")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_plan_has_exactly_this_shape() {
    let out = quorate(&["plan", "--output", "json", "--cib"], &corpus("lost.xml"));
    assert!(out.status.success(), "{}", text(&out.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let expected = serde_json::json!({
        "actions": [
            {"action": "fence", "from": "alpha"},
            {"action": "stop", "resource": "two", "from": "alpha"},
            {"action": "stop", "resource": "one", "from": "alpha"},
            {"action": "start", "resource": "one", "to": "beta"},
            {"action": "start", "resource": "two", "to": "beta"},
        ],
        "placement": {"one": "beta", "power": "beta", "two": "beta"},
    });
    assert_eq!(plan, expected);
}

#[test]
fn a_chain_moves_live_and_nothing_stops() {
    let out = quorate(&["plan", "--output", "json", "--cib"], &corpus("chain.xml"));
    let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let actions = plan["actions"].as_array().unwrap();
    assert_eq!(actions.len(), 2);
    assert!(
        actions
            .iter()
            .all(|action| action["action"] == "migrate" && action["from"] == "alpha")
    );
}

#[test]
fn people_get_tables() {
    let out = quorate(&["plan", "--cib"], &corpus("chain.xml"));
    let page = text(&out.stdout);
    for word in ["STEP", "migrate", "RESOURCE", "3 resources afterwards"] {
        assert!(page.contains(word), "{page}");
    }
}

#[test]
fn bad_input_is_refused_with_its_place() {
    for (file, words) in [
        ("bomb.xml", "bomb.xml:1:1: a document type declaration"),
        ("scores.xml", "scores.xml:1:83: score=\"NaN\""),
        (
            "unsupported.xml",
            "unsupported.xml:3:5: clone \"everywhere\"",
        ),
        (
            "circle.xml",
            "circle.xml:8:83: order \"o3\" closes a circle",
        ),
        ("missing.xml", "cannot be read"),
    ] {
        let out = quorate(&["plan", "--cib"], &corpus(file));
        assert_eq!(out.status.code(), Some(2), "{file}");
        let message = text(&out.stderr);
        assert!(message.contains(words), "{message}");
        assert!(out.stdout.is_empty());
    }
    let out = quorate(&["plan", "--partial", "--cib"], &corpus("unsupported.xml"));
    assert!(out.status.success());
    assert!(text(&out.stderr).contains("not planned"));
}

#[test]
fn a_manifest_and_its_report() {
    let out = quorate(&["import", "pacemaker"], &corpus("rules.xml"));
    assert!(out.status.success());
    let manifest = text(&out.stdout);
    assert!(manifest.starts_with("# Imported from "), "{manifest}");
    assert!(
        text(&out.stderr).starts_with("3 VMs imported"),
        "{}",
        text(&out.stderr)
    );
    let existing = quorate_manifest::Existing::default();
    let none = std::collections::BTreeMap::new();
    let loaded = quorate_manifest::load(&manifest, "m.yaml", &none, &existing);
    assert_eq!(loaded.unwrap().manifest.vms.len(), 3);
    let out = quorate(
        &["import", "--output", "json", "pacemaker"],
        &corpus("rules.xml"),
    );
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        json["manifest"].as_str().unwrap().trim_end(),
        manifest.trim_end()
    );
    assert!(json["report"][0]["line"].as_u64().unwrap() > 0);
}

#[test]
fn an_import_refuses_names_that_do_not_exist_unless_it_is_partial() {
    let file = corpus("unknown.xml");
    let out = quorate(&["import", "pacemaker"], &file);
    assert_eq!(out.status.code(), Some(2));
    assert!(out.stdout.is_empty());
    let message = text(&out.stderr);
    for words in [
        "unknown.xml:10:1: constraint \"l1\": there is no node \"gamma\"",
        "unknown.xml:11:1: constraint \"o1\": there is no resource \"databse\"\n  help: did you mean \"database\"?",
        "--partial",
    ] {
        assert!(message.contains(words), "{message}");
    }
    let out = quorate(&["import", "pacemaker", "--partial"], &file);
    let (manifest, message) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "{message}");
    assert!(message.contains("left out: ") && message.contains("unknown.xml:11:1"));
    assert!(
        manifest.contains("there is no resource \"databse\": left out"),
        "{manifest}"
    );
    assert!(manifest.contains("  webserver:"), "{manifest}");
}

#[test]
fn a_plan_ignores_names_that_do_not_exist_and_says_so() {
    let out = quorate(
        &["plan", "--output", "json", "--cib"],
        &corpus("unknown.xml"),
    );
    assert!(out.status.success());
    assert!(text(&out.stderr).contains("ignored: "));
    let plan: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let warnings = plan["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 2);
    assert_eq!(warnings[1]["line"], 11);
    assert_eq!(warnings[1]["hint"], "did you mean \"database\"?");
}
