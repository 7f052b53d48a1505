//! The outside judge: Pacemaker's own scheduler cases (`cts/scheduler`), planned by Quorate.
//!
//! Prints one line a case: `pass`, `policy difference (why)`, `unsupported (what)` or `fail (what)`, and
//! totals by family. Every plan is linted (by the engine's linter), also that of the
//! supported part of a case. The input is imported as a manifest as well, which our own reader must accept. The cases are not part of this repository: `--dir` says where they are.

mod policy;
mod summary;

use anyhow::{Context as _, Result, bail};
use quorate_import::pacemaker::{self, Planned};
use quorate_manifest::Existing;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use summary::Summary;

/// Families of cases, by how their names begin.
const FAMILIES: &[&str] = &[
    "migrate",
    "order",
    "coloc",
    "utilization",
    "placement",
    "standby",
    "maintenance",
    "quorum",
    "stonith",
    "node-maintenance",
    "rsc-location",
    "group",
    "asymmetric",
];

/// How the answer begins when our own reader refuses what the import wrote.
const REFUSED: &str = "the imported manifest is refused";

/// How the answer begins when the plan breaks a promise.
const UNSOUND: &str = "the plan is unsound";

/// How a case ended.
enum Verdict {
    Pass,
    Policy(&'static str),
    Unsupported(String),
    Fail(String),
}

#[derive(Default)]
struct Total {
    pass: usize,
    policy: usize,
    unsupported: usize,
    fail: usize,
}

impl Total {
    fn add(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Pass => self.pass += 1,
            Verdict::Policy(_) => self.policy += 1,
            Verdict::Unsupported(_) => self.unsupported += 1,
            Verdict::Fail(_) => self.fail += 1,
        }
    }

    fn line(&self, name: &str) -> String {
        let judged = self.pass + self.policy + self.fail;
        let percent = (self.pass * 1000).checked_div(judged).unwrap_or(1000);
        format!(
            "{name:<18} {:>4} pass {:>4} policy {:>4} fail {:>4} unsupported   {}.{} % of {judged} pass",
            self.pass,
            self.policy,
            self.fail,
            self.unsupported,
            percent / 10,
            percent % 10,
        )
    }
}

/// Runs the cases in a folder, or those named in a list.
pub(crate) fn run(dir: &Path, list: Option<&Path>, details: bool) -> Result<()> {
    let names = names(dir, list)?;
    let mut totals: BTreeMap<&str, Total> = BTreeMap::new();
    let mut all = Total::default();
    // A case that panics is reported like any other that fails.
    std::panic::set_hook(Box::new(|_| {}));
    for name in &names {
        let verdict = judge(dir, name, details)?;
        let family = FAMILIES
            .iter()
            .rev()
            .find(|family| name.starts_with(**family));
        totals
            .entry(family.unwrap_or(&"(other)"))
            .or_default()
            .add(&verdict);
        all.add(&verdict);
        match &verdict {
            Verdict::Pass => println!("{name}: pass"),
            Verdict::Policy(why) => println!("{name}: policy difference ({why})"),
            Verdict::Unsupported(what) => println!("{name}: unsupported ({what})"),
            Verdict::Fail(what) => println!("{name}: fail ({what})"),
        }
    }
    let _ = std::panic::take_hook();
    println!();
    let mut families = Total::default();
    for (family, total) in &totals {
        println!("{}", total.line(family));
        if *family != "(other)" {
            families.pass += total.pass;
            families.policy += total.policy;
            families.unsupported += total.unsupported;
            families.fail += total.fail;
        }
    }
    println!("{}", families.line("named families"));
    println!("{}", all.line("all"));
    if all.fail > 0 {
        bail!("{} of {} cases fail", all.fail, names.len());
    }
    Ok(())
}

fn names(dir: &Path, list: Option<&Path>) -> Result<Vec<String>> {
    if let Some(list) = list {
        let text = std::fs::read_to_string(list)
            .with_context(|| format!("cannot read the list {}", list.display()))?;
        let lines = text.lines().map(str::trim);
        return Ok(lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_owned)
            .collect());
    }
    let folder = dir.join("xml");
    let entries = std::fs::read_dir(&folder).with_context(|| {
        format!(
            "cannot read {}: --dir is Pacemaker's folder cts/scheduler",
            folder.display()
        )
    })?;
    let mut names = BTreeSet::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "xml")
            && let Some(stem) = path.file_stem()
        {
            names.insert(stem.to_string_lossy().into_owned());
        }
    }
    Ok(names.into_iter().collect())
}

fn judge(dir: &Path, name: &str, details: bool) -> Result<Verdict> {
    let file = |folder: &str, ending: &str| -> PathBuf {
        dir.join(folder).join(format!("{name}.{ending}"))
    };
    let path = file("xml", "xml");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let expected = file("summary", "summary");
    let expected = std::fs::read_to_string(&expected)
        .with_context(|| format!("cannot read {}", expected.display()))?;
    let shown = format!("{name}.xml");
    let planned = std::panic::catch_unwind(|| plan(&text, &shown));
    let planned = match planned {
        Err(_) => return Ok(Verdict::Fail("panicked".to_owned())),
        Ok(Err(why)) if why.starts_with(REFUSED) || why.starts_with(UNSOUND) => {
            return Ok(Verdict::Fail(why));
        }
        Ok(Err(why)) => return Ok(Verdict::Unsupported(why)),
        Ok(Ok(planned)) => planned,
    };
    let differences = Summary::new(&expected).compare(&planned);
    if differences.is_empty() {
        return Ok(Verdict::Pass);
    }
    if let Some(why) = policy::reason(name) {
        return Ok(Verdict::Policy(why));
    }
    if details {
        for action in &planned.actions {
            println!("    {action:?}");
        }
    }
    Ok(Verdict::Fail(differences.join("; ")))
}

fn plan(text: &str, file: &str) -> Result<Planned, String> {
    let cib = pacemaker::read(text, file).map_err(|problems| {
        let first = problems
            .problems
            .first()
            .map(|one| one.render(&problems.file));
        first.unwrap_or_default().replace('\n', " ")
    })?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    });
    let manifest = pacemaker::convert(&cib, file, true, now).manifest;
    let none = BTreeMap::new();
    if let Err(error) = quorate_manifest::load(&manifest, file, &none, &Existing::default()) {
        return Err(format!(
            "{REFUSED}: {}",
            error.to_string().replace('\n', " ")
        ));
    }
    let planned = pacemaker::plan(&cib, now);
    if let Some(first) = cib.unsupported.first() {
        // What is left of the case must still be planned soundly.
        if planned.contradictions.is_empty() {
            sound(&planned)?;
        }
        let more = match cib.unsupported.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        return Err(format!("{}{more}", first.message));
    }
    match planned.contradictions.first() {
        Some(problem) => Err(problem.render(file).replace('\n', " ")),
        None => sound(&planned).map(|()| planned),
    }
}

/// A plan that breaks a promise fails, whatever Pacemaker does.
fn sound(planned: &Planned) -> Result<(), String> {
    if planned.flaws.is_empty() {
        return Ok(());
    }
    let flaws: Vec<String> = planned.flaws.iter().map(ToString::to_string).collect();
    Err(format!("{UNSOUND}: {}", flaws.join("; ")))
}
