//! The committed OpenAPI document is what the program serves. `UPDATE_GOLDEN=1` writes it anew.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::path::Path;

#[test]
fn the_committed_document_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let now = format!("{}\n", quorate_api::document());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == now,
        "crates/api/openapi.json is out of date: run the test with UPDATE_GOLDEN=1"
    );
}

#[test]
fn every_reference_resolves_and_every_operation_is_named() {
    let document: Value = serde_json::from_str(&quorate_api::document()).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let mut names = std::collections::BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap().to_owned();
            assert!(names.insert(id), "{method} {path} has the name of another");
        }
    }
    assert!(names.len() >= 32);
    references(&document, &document);
}

fn references(document: &Value, value: &Value) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                let pointer = reference.trim_start_matches('#');
                assert!(
                    document.pointer(pointer).is_some(),
                    "{reference} leads nowhere"
                );
            }
            map.values().for_each(|value| references(document, value));
        }
        Value::Array(items) => items.iter().for_each(|value| references(document, value)),
        _ => {}
    }
}
