//! How the planner's work grows, counted and not timed.
//!
//! Owns: counting the instructions of one plan by `valgrind` (package of that name) on this very program. Why beside the
//! time: a count is the same on a busy machine and on a quiet one, and it tells the algorithm's growth from that of the
//! caches' misses, which any program has whose data outgrows them.

use std::path::PathBuf;
use std::process::Command;

/// VMs on 200 hosts.
const SIZES: [usize; 4] = [1_250, 5_000, 10_000, 20_000];
/// Plans that are counted at each size.
const TIMES: u64 = 3;
/// The count over n log n may be this much of what it is at the smallest size.
const LIMIT: f64 = 1.0;

/// The table, and what was missed. `None`: there is no `valgrind`.
pub(crate) fn curve(
    report: &mut quorate_bench::Report,
) -> anyhow::Result<Option<(String, Option<String>)>> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return Ok(None);
    }
    let mut text = String::from(
        "work on 200 hosts, one down (instructions of one plan, by valgrind):\n     VMs    millions   each VM    /n log n\n",
    );
    let (mut first, mut worst) = (None, 0.0f64);
    for vms in SIZES {
        let count = instructions(200, vms)? as f64 / TIMES as f64;
        let n = vms as f64;
        let scaled = count / (n * n.ln());
        let scaled = scaled / *first.get_or_insert(scaled);
        worst = worst.max(scaled);
        text.push_str(&format!(
            "{vms:>8} {:>11.1} {:>9.0} {scaled:>11.2}\n",
            count / 1e6,
            count / n
        ));
        let name = format!("200 hosts x {vms} VMs, one host down, instructions of a plan");
        report.add(&name, "million", &[count / 1e6], None);
    }
    let missed = (worst > LIMIT).then(|| {
        format!("the work of a plan grows by {worst:.2} times n log n, more than {LIMIT:.1}")
    });
    Ok(Some((text, missed)))
}

/// Instructions of [`TIMES`] plans with one host down.
fn instructions(hosts: usize, vms: usize) -> anyhow::Result<u64> {
    let me: PathBuf = std::env::current_exe()?;
    let done = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*repeat*")
        .arg(me)
        .args([
            "again",
            "--hosts",
            &hosts.to_string(),
            "--vms",
            &vms.to_string(),
        ])
        .args(["--times", &TIMES.to_string()])
        .output()?;
    let text = String::from_utf8_lossy(&done.stderr);
    let line = text.lines().find(|line| line.contains("refs:"));
    let digits = line.and_then(|line| line.rsplit("refs:").next());
    let digits: Option<String> =
        digits.map(|text| text.chars().filter(char::is_ascii_digit).collect());
    let count = digits.and_then(|digits| digits.parse().ok());
    count
        .filter(|count| *count > 0)
        .ok_or_else(|| anyhow::anyhow!("valgrind counted nothing: {text}"))
}
