//! Every file of `scenarios/` gives the transcript that it holds. `UPDATE=1` writes them anew.
#![allow(clippy::unwrap_used)]

use quorate_sim::{rendered, run_scenario};
use std::path::PathBuf;

fn files() -> Vec<PathBuf> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "txt"))
        .collect();
    files.sort();
    files
}

#[test]
fn scenarios_give_their_transcripts() {
    let update = std::env::var_os("UPDATE").is_some();
    let mut wrong = Vec::new();
    for path in files() {
        let text = std::fs::read_to_string(&path).unwrap();
        let outcome = run_scenario(&text, false).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        for failure in &outcome.failures {
            wrong.push(format!("{name}: {failure}"));
        }
        if outcome.actual == outcome.expected {
            continue;
        }
        if update {
            std::fs::write(&path, rendered(&outcome)).unwrap();
        } else {
            let mut lines = outcome.actual.lines().zip(outcome.expected.lines());
            let differs = lines.find(|(now, then)| now != then);
            wrong.push(format!("{name}: the transcript differs: {differs:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nUPDATE=1 writes transcripts anew",
        wrong.join("\n")
    );
}

#[test]
fn a_scenario_replays_exactly() {
    let text = std::fs::read_to_string(&files()[0]).unwrap();
    let first = run_scenario(&text, false).unwrap();
    assert_eq!(first.actual, run_scenario(&text, false).unwrap().actual);
}
