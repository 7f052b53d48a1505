//! The corpus of the fuzz target, and texts made from it: nothing panics, nothing takes for ever.
#![allow(clippy::unwrap_used)]

use quorate_import::pacemaker::{convert, plan, read};
use std::path::Path;

fn corpus() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/cib");
    let mut texts: Vec<(String, String)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    texts.sort();
    texts
}

fn run(text: &str) {
    if let Ok(cib) = read(text, "test.xml") {
        let planned = plan(&cib, 1_700_000_000);
        assert_eq!(planned.flaws, [], "{text}");
        let converted = convert(&cib, "test.xml", true, 1_700_000_000);
        let loaded = quorate_manifest::load(
            &converted.manifest,
            "manifest.yaml",
            &std::collections::BTreeMap::new(),
            &quorate_manifest::Existing::default(),
        );
        assert!(
            loaded.is_ok(),
            "{}\n{}",
            converted.manifest,
            loaded.unwrap_err()
        );
    }
}

#[test]
fn every_text_of_the_corpus() {
    let corpus = corpus();
    assert!(corpus.len() >= 8);
    for (_, text) in &corpus {
        run(text);
    }
}

/// A small generator of its own: the same texts on every machine.
fn next(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

#[test]
fn texts_cut_off_anywhere() {
    for (_, text) in corpus() {
        for at in (0..text.len()).step_by(97) {
            run(text.get(..at).unwrap_or_default());
        }
    }
}

#[test]
fn texts_with_values_exchanged() {
    let mut seed = 7;
    for (name, text) in corpus() {
        let values: Vec<&str> = text.split('"').skip(1).step_by(2).collect();
        if values.is_empty() || name == "bomb.xml" {
            continue;
        }
        let extra = [
            "INFINITY",
            "-INFINITY",
            "-1",
            "true",
            "",
            "9223372036854775807",
            "Stopped",
            "block",
        ];
        for _ in 0..60 {
            let mut parts: Vec<&str> = text.split('"').collect();
            for _ in 0..3 {
                let place = next(&mut seed) as usize % values.len() * 2 + 1;
                let from = next(&mut seed) as usize % (values.len() + extra.len());
                let value = values
                    .get(from)
                    .copied()
                    .unwrap_or_else(|| extra[from - values.len()]);
                if let Some(part) = parts.get_mut(place) {
                    *part = value;
                }
            }
            run(&parts.join("\""));
        }
    }
}
