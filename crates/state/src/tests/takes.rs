//! Units that may be taken from strangers.

use crate::*;
use quorate_types::spec::Manifest;
use quorate_types::{ClusterSettings, HostName, PoolName, Revision, Timestamp};

fn apply(state: &mut State, by: &str, command: Command) -> Result<Outcome, Refusal> {
    let envelope = Envelope {
        format: FORMAT,
        at: Timestamp(1_000),
        by: by.into(),
        command,
    };
    state.apply(&envelope)
}

fn pool() -> PoolName {
    "san".parse().unwrap()
}

fn define(state: &mut State, target: &str) {
    let manifest: Manifest = serde_json::from_value(serde_json::json!({
        "pools": { "san": { "kind": "iscsi", "portals": ["10.0.0.9"], "target": target, "opened_by": "kernel" } },
    }))
    .unwrap();
    let base = None;
    apply(state, "operator", Command::ApplyManifest { base, manifest }).unwrap();
}

fn world() -> State {
    let mut state = State::default();
    let first = Command::CreateCluster {
        id: "c1".into(),
        name: "lab".into(),
        ca_certificate: String::new(),
        ca_key: String::new(),
        host: HostName::new("h1").unwrap(),
        address: "10.0.0.1:7".into(),
        settings: ClusterSettings::default(),
    };
    apply(&mut state, "operator", first).unwrap();
    define(&mut state, "iqn.2026-01.example:a");
    state
}

fn take(state: &mut State, by: &str, image: &str, key: u64) -> Result<Outcome, Refusal> {
    let command = Command::TakeUnit {
        pool: pool(),
        image: image.into(),
        keys: [key].into(),
        hold: true,
    };
    apply(state, by, command)
}

fn end(state: &mut State, image: &str, given: Option<Revision>) -> Outcome {
    let command = Command::EndTake {
        pool: pool(),
        image: image.into(),
        given,
    };
    apply(state, "pools", command).unwrap()
}

#[test]
fn a_word_is_for_the_strangers_that_were_seen_and_ends_once() {
    let mut state = world();
    let told = take(&mut state, "operator", "db", 0xbad).unwrap();
    assert!(
        told.events[0].text.contains("keys 0x0000000000000bad"),
        "{told:?}"
    );
    // However the unit is written.
    let word = state.take_of(&pool(), "db/0").unwrap().clone();
    assert_eq!(
        (&word.keys, word.by.as_str()),
        (&[0xbad].into(), "operator")
    );
    assert_eq!(word.given, state.revision);
    assert!(state.take_of(&pool(), "other").is_none());
    // Another one later takes its place, and is not ended by who looked at the first.
    take(&mut state, "eva", "db/0", 0xbae).unwrap();
    assert!(end(&mut state, "db", Some(word.given)).events.is_empty());
    let second = state.take_of(&pool(), "db").unwrap();
    assert_eq!((&second.keys, second.by.as_str()), (&[0xbae].into(), "eva"));
    let given = second.given;
    assert!(!end(&mut state, "db", Some(given)).events.is_empty());
    assert!(state.unit_takes.is_empty());
    // Taken back.
    take(&mut state, "operator", "db", 0xbad).unwrap();
    end(&mut state, "db", None);
    assert!(state.unit_takes.is_empty());
}

#[test]
fn a_word_is_for_a_pool_as_it_is() {
    let mut state = world();
    take(&mut state, "operator", "db", 0xbad).unwrap();
    define(&mut state, "iqn.2026-01.example:a");
    assert!(state.take_of(&pool(), "db").is_some());
    define(&mut state, "iqn.2026-01.example:b");
    assert!(state.unit_takes.is_empty(), "units of another SAN");
    take(&mut state, "operator", "db", 0xbad).unwrap();
    apply(&mut state, "operator", Command::DeletePool { pool: pool() }).unwrap();
    assert!(state.unit_takes.is_empty());
    assert!(take(&mut state, "operator", "db", 0xbad).is_err());
}
