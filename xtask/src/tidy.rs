//! House rules: purity of the pure crates, module docs, sizes, words that must not be committed.

use anyhow::{Context as _, Result, bail};
use std::path::Path;
use std::process::Command;

/// Crates whose decisions must be functions of their inputs alone.
const PURE: &[&str] = &[
    "crates/types/",
    "crates/membership/",
    "crates/state/",
    "crates/manifest/",
    "crates/planner/",
    "crates/import/",
    "crates/agent/logic/",
    "crates/controller/logic/",
    "crates/balancer/src/flow.rs",
    "crates/balancer/src/model.rs",
    "crates/balancer/src/ring.rs",
    "crates/balancer/src/trace.rs",
];

/// What a pure crate does not use, and what to do instead.
const IMPURE: &[(&str, &str)] = &[
    ("std::time::Instant", "take `now` as an argument"),
    ("SystemTime", "take the time as an argument"),
    ("tokio", "keep tasks in the shell"),
    ("std::fs", "keep files in the shell"),
    ("std::net::Tcp", "keep sockets in the shell"),
    (
        "HashMap",
        "use BTreeMap: decisions do not depend on hash order",
    ),
    (
        "HashSet",
        "use BTreeSet: decisions do not depend on hash order",
    ),
    ("rand::", "take a seed as an argument"),
];

/// Longest file, in lines. A file that needs more has two jobs.
const MAX_LINES: usize = 700;

/// Longest file of tests: tables are long and read one row at a time.
const MAX_TEST_LINES: usize = 1000;

struct Finding {
    file: String,
    line: usize,
    text: String,
}

/// Checks all tracked files and those git would track.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    let files = files(root)?;
    for file in &files {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else {
            continue;
        };
        words(file, &text, &mut findings);
        if file.ends_with(".rs") {
            rust(file, &text, &mut findings);
        }
    }
    for finding in &findings {
        println!("{}:{}: {}", finding.file, finding.line, finding.text);
    }
    if findings.is_empty() {
        return Ok(());
    }
    bail!("{} findings in {} files read", findings.len(), files.len())
}

fn files(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git cannot be run")?;
    if !output.status.success() {
        bail!(
            "git ls-files failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let mut files: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn words(file: &str, text: &str, findings: &mut Vec<Finding>) {
    if file.ends_with(".lock") || file == "xtask/src/tidy.rs" || file.starts_with("LICENSE") {
        return;
    }
    let open = ["TODO", "FIXME"];
    for (number, line) in text.lines().enumerate() {
        if let Some(word) = open.iter().find(|word| line.contains(**word)) {
            findings.push(Finding {
                file: file.to_owned(),
                line: number + 1,
                text: format!("`{word}`: finish it, or open an issue"),
            });
        }
    }
}

fn rust(file: &str, text: &str, findings: &mut Vec<Finding>) {
    let mut add = |line: usize, text: String| {
        findings.push(Finding {
            file: file.to_owned(),
            line,
            text,
        })
    };
    let lines = text.lines().count();
    let is_test = file.contains("/tests/") || file.ends_with("tests.rs");
    let limit = if is_test { MAX_TEST_LINES } else { MAX_LINES };
    if lines > limit {
        add(
            lines,
            format!("{lines} lines, at most {limit}: split it by job"),
        );
    }
    if !text.trim_start().starts_with("//!") && lines > 30 {
        add(
            1,
            "no module doc: say first what it owns, what always holds, and why".to_owned(),
        );
    }
    let mut inside = false;
    for (number, line) in text.lines().enumerate() {
        let doc = ["///", "//!"]
            .iter()
            .find_map(|mark| line.trim_start().strip_prefix(mark));
        let Some(fence) = doc.and_then(|doc| doc.trim().strip_prefix("```")) else {
            continue;
        };
        inside = !inside;
        if inside && fence != "text" {
            add(
                number + 1,
                "an example that no stage runs: mark it ```text, and write a test".to_owned(),
            );
        }
    }
    if !PURE.iter().any(|pure| file.starts_with(pure))
        || file.contains("/tests")
        || file.contains("/testing")
    {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        if line.contains("#[cfg(test)]") {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        for (word, instead) in IMPURE {
            if code.contains(word) {
                add(number + 1, format!("`{word}` in a pure crate: {instead}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(file: &str, text: &str) -> usize {
        let mut found = Vec::new();
        rust(file, text, &mut found);
        words(file, text, &mut found);
        found.len()
    }

    #[test]
    fn a_clock_in_a_pure_crate_is_found_and_elsewhere_is_not() {
        let text = "//! Doc.\nuse std::time::Instant;\n";
        assert_eq!(findings("crates/planner/src/lib.rs", text), 1);
        assert_eq!(findings("crates/agent/src/lib.rs", text), 0);
        assert_eq!(
            findings(
                "crates/planner/src/lib.rs",
                "//! Doc.\n#[cfg(test)]\nuse std::time::Instant;\n"
            ),
            0
        );
    }

    #[test]
    fn long_files_and_open_ends_are_found() {
        let long = format!("//! Doc.\n{}", "fn x() {}\n".repeat(MAX_LINES));
        assert_eq!(findings("crates/api/src/x.rs", &long), 1);
        assert_eq!(findings("README.md", &format!("{}{}", "TO", "DO")), 1);
    }

    #[test]
    fn examples_that_nobody_runs_are_found() {
        let example = |kind: &str| format!("//! ```{kind}\n//! f();\n//! ```\n");
        assert_eq!(findings("crates/api/src/x.rs", &example("text")), 0);
        assert_eq!(findings("crates/api/src/x.rs", &example("")), 1);
    }
}
