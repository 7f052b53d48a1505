//! Figures of measurements: `target/bench/NAME.json` for programs, a table for people.
//!
//! Owns: the format. Always holds: a figure is the median of its samples, which are kept beside it; a
//! figure that is a comparison carries what it is compared with, measured in the same run. Must
//! not: judge. Limits are held against figures in tests.
//!
//! A file is an array of `{"name", "unit", "median", "samples", "baseline"}`; `baseline` is `null` where there is
//! none. `make bench` collects the files of all that measures.
#![cfg_attr(test, allow(clippy::unwrap_used))]

use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// Set to a folder: measuring tests write their figures there.
pub const DIR_VARIABLE: &str = "QUORATE_BENCH_DIR";

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// What was measured.
    pub name: String,
    /// Unit of all its numbers.
    pub unit: String,
    /// The middle of the samples; of an even number, the lower of the two.
    pub median: f64,
    /// Every sample, in the order of measuring.
    pub samples: Vec<f64>,
    /// The median of what it is compared with.
    pub baseline: Option<f64>,
}

/// The figures of one measurement.
#[derive(Debug, Clone, Default)]
pub struct Report {
    entries: Vec<Entry>,
}

impl Report {
    /// Without figures yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a figure. One without samples is left out: nothing was measured.
    pub fn add(&mut self, name: &str, unit: &str, samples: &[f64], baseline: Option<f64>) {
        if let Some(median) = median(samples) {
            self.entries.push(Entry {
                name: name.to_owned(),
                unit: unit.to_owned(),
                median,
                samples: samples.to_vec(),
                baseline,
            });
        }
    }

    /// The figures.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        table.set_header(["FIGURE", "MEDIAN", "RANGE", "RUNS", "BASELINE", "RATIO"]);
        for entry in &self.entries {
            let least = entry.samples.iter().copied().fold(f64::INFINITY, f64::min);
            let most = entry.samples.iter().copied().fold(0.0, f64::max);
            let unit = &entry.unit;
            let base = entry.baseline;
            table.add_row([
                entry.name.clone(),
                format!("{} {unit}", short(entry.median)),
                format!("{} to {}", short(least), short(most)),
                entry.samples.len().to_string(),
                base.map_or("-".into(), |base| format!("{} {unit}", short(base))),
                base.filter(|base| *base > 0.0)
                    .map_or("-".into(), |base| short(entry.median / base)),
            ]);
        }
        table.to_string()
    }

    /// Writes `NAME.json` into `dir`, whole or not at all.
    ///
    /// # Errors
    /// When the folder or the file cannot be written.
    pub fn write(&self, dir: &Path, name: &str) -> io::Result<PathBuf> {
        std::fs::create_dir_all(dir)?;
        let path = dir.join(format!("{name}.json"));
        let new = dir.join(format!("{name}.json.new"));
        let mut text = serde_json::to_string_pretty(&self.entries)?;
        text.push('\n');
        std::fs::write(&new, text)?;
        std::fs::rename(&new, &path)?;
        Ok(path)
    }

    /// Prints the table, and writes the file where [`DIR_VARIABLE`] says so.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish(&self, name: &str) -> io::Result<()> {
        println!("\n{name}\n{}", self.table());
        match std::env::var_os(DIR_VARIABLE) {
            Some(dir) => self.write(Path::new(&dir), name).map(drop),
            None => Ok(()),
        }
    }
}

/// Whether figures are wanted, so that rounds enough for a median are run.
#[must_use]
pub fn wanted() -> bool {
    std::env::var_os(DIR_VARIABLE).is_some()
}

/// The middle one; of an even number, the lower of the two. `None` without samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_one_of_the_samples() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.0));
    }

    #[test]
    fn a_report_reads_back_and_shows_the_ratio() {
        let mut report = Report::new();
        report.add("blackout", "ms", &[50.0, 60.0, 40.0], Some(40.0));
        report.add("nothing", "ms", &[], None);
        let dir = tempfile::tempdir().unwrap();
        let path = report.write(dir.path(), "migration").unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let read: Vec<Entry> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, report.entries());
        assert_eq!(read.len(), 1);
        assert!(report.table().contains("1.25"), "{}", report.table());
    }
}
