//! The driver against agents that behave, misbehave and hang: small shell scripts in
//! a folder of the test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use quorate_fence::{
    AgentFence, FenceDevice, FenceError, FenceLevel, FencePlan, Outcome, Phase, PowerFence,
    PowerState,
};
use tokio::time::Instant;

const SECRET: &str = "hunter2";

/// What every agent begins with: it reads its options into variables, and notes that it
/// was called. `$D` is the folder of the test, `$plug` the file that is the power.
const PRELUDE: &str = r#"#!/bin/sh
D=$(dirname "$0")
while IFS='=' read -r name value; do
  case $name in action) action=$value;; plug) plug=$value;; password) password=$value;; esac
done
echo "$(basename "$0") $action $plug args:$*" >> "$D/calls"
"#;

/// An agent as it should be.
const GOOD: &str = r#"
power=$D/power-$plug
case $action in
  off) echo off > "$power"; exit 0;;
  status) [ "$(cat "$power" 2>/dev/null)" = off ] && exit 2; exit 0;;
  monitor) exit 0;;
  metadata) echo '<resource-agent name="fence_good" shortdesc="Good"><parameters>'
    echo '<parameter name="plug" required="1"></parameter></parameters></resource-agent>'; exit 0;;
esac
exit 1
"#;

struct Lab {
    dir: tempfile::TempDir,
    fence: AgentFence,
}

impl Lab {
    fn new(agents: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, body) in agents {
            let path = dir.path().join(name);
            // A script that is executed while any thread still holds it for writing is
            // "busy": it is written elsewhere and renamed by another process.
            let draft = dir.path().join("draft");
            fs::write(&draft, format!("{PRELUDE}{body}")).unwrap();
            fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
            let copied = std::process::Command::new("cp")
                .args([&draft, &path])
                .status()
                .unwrap();
            assert!(copied.success());
        }
        let fence = AgentFence::with_folders([dir.path().to_owned()]);
        Self { dir, fence }
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    async fn fence(
        &self,
        plan: &FencePlan,
        limit: Duration,
    ) -> Result<quorate_fence::PowerOffConfirmed, FenceError> {
        self.fence.fence_off(plan, Instant::now() + limit).await
    }

    /// Whether no process of an agent is left, not even its corpse.
    fn ended(&self, agent: &str) -> bool {
        let path = self.dir.path().join(agent);
        let path = path.to_str().unwrap();
        fs::read_dir("/proc").unwrap().flatten().all(|entry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            !String::from_utf8_lossy(&line).contains(path)
        })
    }

    /// Fences on a clock of the test's own: it goes on by a step whenever `passes` says so, which sees the calls up to
    /// now. So a deadline passes after what it is about has happened, however slow the machine is.
    async fn fence_while(
        &self,
        plan: &FencePlan,
        limit: Duration,
        mut passes: impl FnMut(&[String]) -> Option<Duration>,
    ) -> Result<quorate_fence::PowerOffConfirmed, FenceError> {
        tokio::time::pause();
        let fenced = self.fence(plan, limit);
        tokio::pin!(fenced);
        let end = std::time::Instant::now() + PATIENCE;
        let result = 'fenced: loop {
            // Never idle, so that the clock does not go on by itself; and often enough that all that is there is read.
            for _ in 0..200 {
                tokio::select! {
                    biased;
                    result = &mut fenced => break 'fenced result,
                    () = tokio::task::yield_now() => {}
                }
            }
            assert!(std::time::Instant::now() < end, "{:?}", self.calls());
            std::thread::park_timeout(Duration::from_millis(2));
            if let Some(step) = passes(&self.calls()) {
                tokio::time::advance(step).await;
            }
        };
        tokio::time::resume();
        result
    }
}

/// How many of the calls hold a text.
fn count(calls: &[String], text: &str) -> usize {
    calls.iter().filter(|call| call.contains(text)).count()
}

/// Time that passes until an agent was asked for the status so often, and then all that is left.
fn until_asked(agent: &str, times: usize) -> impl FnMut(&[String]) -> Option<Duration> {
    let status = format!("{agent} status");
    move |calls| {
        let enough = count(calls, &status) >= times;
        Some(if enough { HOUR } else { STEP })
    }
}

fn device(agent: &str, plug: &str) -> FenceDevice {
    let options = [("plug", plug), ("password", SECRET), ("ip", "10.0.0.1")];
    FenceDevice {
        agent: agent.into(),
        options: options.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        timeout: HOUR,
    }
}

fn plan(agents: &[&str]) -> FencePlan {
    FencePlan::in_order("h1", agents.iter().map(|agent| device(agent, "1")))
}

fn only_outcome(error: FenceError) -> (Phase, Outcome) {
    let text = error.to_string();
    assert!(!text.contains(SECRET), "a secret leaked: {text}");
    assert!(!format!("{error:?}").contains(SECRET));
    match error {
        FenceError::NotConfirmed { mut attempts, .. } if attempts.len() == 1 => {
            let attempt = attempts.remove(0);
            (attempt.phase, attempt.outcome)
        }
        other => panic!("{other:?}"),
    }
}

const LONG: Duration = Duration::from_secs(20);
/// How long the test itself waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(120);
/// A deadline on the test's own clock, and the steps in which that goes on.
const HOUR: Duration = Duration::from_secs(3600);
const STEP: Duration = Duration::from_millis(100);

#[tokio::test]
async fn off_is_confirmed_by_the_status_afterwards() {
    let lab = Lab::new(&[("fence_good", GOOD)]);
    let proof = lab.fence(&plan(&["fence_good"]), LONG).await.unwrap();
    assert_eq!((proof.host.as_str(), proof.level), ("h1", 1));
    assert_eq!(proof.agent(), "fence_good");
    assert!(proof.finished_unix_ms >= proof.started_unix_ms);
    // The options never were arguments.
    assert_eq!(
        lab.calls(),
        ["fence_good off 1 args:", "fence_good status 1 args:"]
    );
    let other = device("fence_good", "2");
    let state = lab.fence.power_state(&other, Instant::now() + LONG);
    assert_eq!(state.await.unwrap(), PowerState::On);
}

#[tokio::test]
async fn a_slow_device_is_asked_until_it_is_off() {
    // Off takes effect after the third question.
    let slow = r#"
[ $action = off ] && exit 0
echo x >> "$D/asked"; [ $(wc -l < "$D/asked") -gt 3 ] && exit 2; exit 0
"#;
    let lab = Lab::new(&[("fence_slow", slow)]);
    lab.fence(&plan(&["fence_slow"]), LONG).await.unwrap();
    assert_eq!(lab.calls().len(), 5);
}

#[tokio::test]
async fn a_device_that_lies_about_off_proves_nothing() {
    let lab = Lab::new(&[("fence_liar", "exit 0")]);
    let asked = until_asked("fence_liar", 3);
    let error = lab.fence_while(&plan(&["fence_liar"]), HOUR, asked).await;
    let error = error.unwrap_err();
    assert!(error.to_string().contains("confirm-dead h1"), "{error}");
    let (phase, outcome) = only_outcome(error);
    assert_eq!((phase, outcome), (Phase::Confirm, Outcome::StillOn));
}

#[tokio::test]
async fn a_status_of_off_without_an_accepted_off_proves_nothing() {
    // Says "off" whenever asked, but does not take the order.
    let lab = Lab::new(&[("fence_refuses", "[ $action = status ] && exit 2; exit 1")]);
    let error = lab.fence(&plan(&["fence_refuses"]), LONG).await;
    let (phase, outcome) = only_outcome(error.unwrap_err());
    assert_eq!(phase, Phase::Off);
    assert!(matches!(outcome, Outcome::Failed { code: Some(1), .. }));
    assert_eq!(
        lab.calls().len(),
        3,
        "off is tried a bounded number of times"
    );
}

#[tokio::test]
async fn unknown_is_not_off() {
    // Every exit code but 2 after an accepted off: errors, odd codes, death by a signal.
    for end in ["exit 1", "exit 3", "exit 255", "kill -9 $$"] {
        let body = format!("[ $action = off ] && exit 0\necho 'no idea, {SECRET}' >&2; {end}");
        let lab = Lab::new(&[("fence_unsure", &body)]);
        let asked = until_asked("fence_unsure", 2);
        let error = lab.fence_while(&plan(&["fence_unsure"]), HOUR, asked).await;
        let (phase, outcome) = only_outcome(error.unwrap_err());
        assert_eq!(phase, Phase::Confirm, "{end}");
        match outcome {
            Outcome::Failed { output, .. } => assert!(output.contains("no idea, ***"), "{output}"),
            other => panic!("{end}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn an_agent_that_hangs_is_killed_with_its_children() {
    let hang = r#"
sleep 1000 & echo $! > "$D/child"; echo $$ > "$D/self"; echo waiting; echo > "$D/said"; wait
"#;
    let lab = Lab::new(&[("fence_hang", hang)]);
    let said = lab.dir.path().join("said");
    let (mut seen, limit) = (0, Duration::from_secs(3));
    let begin = Instant::now();
    let plan = plan(&["fence_hang"]);
    let error = lab.fence_while(&plan, limit, |_| {
        // What it said is read meanwhile.
        seen += usize::from(said.exists());
        (seen > 2 && !lab.ended("fence_hang")).then_some(STEP)
    });
    let (phase, outcome) = only_outcome(error.await.unwrap_err());
    assert_eq!(phase, Phase::Off);
    assert!(
        matches!(outcome, Outcome::TimedOut { ref output, .. } if output == "waiting"),
        "{outcome:?}"
    );
    // Of the clock that stood still until it hung.
    assert!(begin.elapsed() < limit + Duration::from_secs(30));
    for file in ["child", "self"] {
        let pid = fs::read_to_string(lab.dir.path().join(file)).unwrap();
        ends(pid.trim()).await;
    }
}

#[tokio::test]
async fn an_agent_is_killed_when_nobody_waits_for_it_any_more() {
    let hang = r#"sleep 1000 & echo $! > "$D/draft"; mv "$D/draft" "$D/child"; wait"#;
    let lab = Lab::new(&[("fence_hang", hang)]);
    let child = lab.dir.path().join("child");
    let plan = plan(&["fence_hang"]);
    tokio::select! {
        _ = lab.fence(&plan, LONG) => panic!("it hangs"),
        () = exists(&child) => {}
    }
    ends(fs::read_to_string(child).unwrap().trim()).await;
}

/// Waits until a process is gone or nothing but a corpse.
async fn ends(pid: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) {
        if stat
            .rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('Z')
        {
            return;
        }
        assert!(Instant::now() < deadline, "process {pid} survives");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn exists(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_next_level_gets_its_share_when_one_hangs() {
    let lab = Lab::new(&[("fence_hang", "sleep 1000"), ("fence_good", GOOD)]);
    let limit = Duration::from_secs(6);
    // Time passes while the first one hangs, and stands still for the second one.
    let hangs = |calls: &[String]| {
        let runs = count(calls, "fence_hang") > 0 && !lab.ended("fence_hang");
        runs.then_some(STEP)
    };
    let levels = plan(&["fence_hang", "fence_good"]);
    let proof = lab.fence_while(&levels, limit, hangs).await.unwrap();
    assert_eq!((proof.level, proof.agent().as_str()), (2, "fence_good"));
    assert!(
        proof.took_ms >= 3000 && proof.took_ms < 6500,
        "{}",
        proof.took_ms
    );

    // A device's own timeout is kept too.
    let mut plan = levels;
    plan.levels[0].devices[0].timeout = Duration::from_millis(200);
    fs::remove_file(lab.dir.path().join("calls")).unwrap();
    let proof = lab.fence_while(&plan, LONG, hangs).await.unwrap();
    assert!(
        proof.level == 2 && proof.took_ms < 5000,
        "{}",
        proof.took_ms
    );
}

#[tokio::test]
async fn every_device_of_a_level_must_confirm() {
    let lab = Lab::new(&[("fence_good", GOOD), ("fence_liar", "exit 0")]);
    let both = |second: &str| FencePlan {
        host: "h1".into(),
        levels: vec![FenceLevel {
            devices: vec![device("fence_good", "1"), device(second, "2")],
        }],
    };
    // Time stands still until the good one has confirmed: nothing of it is left, and all it said is read.
    let mut confirmed = 0;
    let levels = both("fence_liar");
    let lied = lab.fence_while(&levels, HOUR, |calls| {
        confirmed += usize::from(count(calls, "fence_good status") > 0 && lab.ended("fence_good"));
        let asked = count(calls, "fence_liar status") >= 2;
        (confirmed > 2).then_some(if asked { HOUR } else { STEP })
    });
    let (_, outcome) = only_outcome(lied.await.unwrap_err());
    assert_eq!(outcome, Outcome::StillOn);
    let proof = lab.fence(&both("fence_good"), LONG).await.unwrap();
    assert_eq!(proof.agents, ["fence_good", "fence_good"]);
    // No level, or one without devices, confirms nothing.
    for levels in [vec![], vec![FenceLevel { devices: vec![] }]] {
        let host = "h1".to_owned();
        let error = lab.fence(&FencePlan { host, levels }, LONG).await;
        assert!(matches!(error, Err(FenceError::NoDevices { .. })));
    }
}

#[tokio::test]
async fn output_is_bounded_readable_and_without_secrets() {
    let noisy = r#"
head -c 3000000 /dev/zero | tr '\0' x
echo "bad login with $password at the end" >&2
head -c 2000 /dev/urandom >&2
echo "password=$password" >&2
exit 7
"#;
    let lab = Lab::new(&[("fence_noisy", noisy)]);
    let error = lab.fence(&plan(&["fence_noisy"]), LONG).await.unwrap_err();
    assert!(
        error.to_string().len() < 5000,
        "{}",
        error.to_string().len()
    );
    let (_, outcome) = only_outcome(error);
    assert!(matches!(outcome, Outcome::Failed { code: Some(7), .. }));

    let odd = r#"printf '\377\376 %s \033[31m garbage' "$password"; exit 1"#;
    let lab = Lab::new(&[("fence_odd", odd)]);
    let error = lab.fence(&plan(&["fence_odd"]), LONG).await.unwrap_err();
    let (_, outcome) = only_outcome(error);
    assert!(
        outcome.to_string().contains("*** [31m garbage"),
        "{outcome}"
    );
}

#[tokio::test]
async fn an_agent_that_leaves_a_daemon_behind_does_not_hold_us_up() {
    let daemon = r#"
[ $action = status ] && exit 2
sleep 1000 & echo $! > "$D/child"; exit 0
"#;
    let lab = Lab::new(&[("fence_daemon", daemon)]);
    let proof = lab.fence(&plan(&["fence_daemon"]), LONG).await.unwrap();
    assert!(proof.took_ms < 10_000);
    let child = fs::read_to_string(lab.dir.path().join("child")).unwrap();
    ends(child.trim()).await;
}

#[tokio::test]
async fn what_cannot_be_run_is_said() {
    let lab = Lab::new(&[("fence_good", GOOD)]);
    let missing = lab.fence(&plan(&["fence_none"]), LONG).await.unwrap_err();
    assert!(missing.to_string().contains("not installed"), "{missing}");
    let relative = lab.fence(&plan(&["../fence_good"]), LONG).await;
    assert!(relative.unwrap_err().to_string().contains("absolute path"));
    let absolute = lab.dir.path().join("fence_good");
    let absolute = absolute.to_str().unwrap();
    lab.fence(&plan(&[absolute]), LONG).await.unwrap();

    for (name, value) in [
        ("action", "on"),
        ("a b", "x"),
        ("x", "1\naction=on"),
        ("", "x"),
    ] {
        let mut bad = device("fence_good", "1");
        bad.options = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let error = lab.fence.power_state(&bad, Instant::now() + LONG).await;
        assert!(matches!(error, Err(FenceError::BadOption { .. })), "{name}");
    }
    // A file that the kernel cannot execute.
    let broken = lab.dir.path().join("fence_broken");
    fs::copy(lab.dir.path().join("fence_good"), &broken).unwrap();
    fs::write(&broken, b"\x7fELF").unwrap();
    let error = lab.fence(&plan(&["fence_broken"]), LONG).await;
    assert!(matches!(
        only_outcome(error.unwrap_err()).1,
        Outcome::NotRun { .. }
    ));
}

#[tokio::test]
async fn health_tells_working_devices_from_broken_ones() {
    let mute = "[ $action = monitor ] && exit 0; exit 1";
    let lab = Lab::new(&[
        ("fence_good", GOOD),
        ("fence_down", "echo cannot connect >&2; exit 1"),
        ("fence_mute", mute),
    ]);
    let plan = plan(&["fence_good", "fence_down", "fence_mute", "fence_none"]);
    let health = lab.fence.health(&plan, Instant::now() + LONG).await;
    let works: Vec<_> = health.iter().map(|h| (h.level, h.works())).collect();
    assert_eq!(works, [(1, true), (2, false), (3, false), (4, false)]);
    assert_eq!(health[0].state, Some(PowerState::On));
    assert!(
        health[1]
            .problem
            .as_ref()
            .unwrap()
            .contains("cannot connect")
    );
    assert!(
        health[3]
            .problem
            .as_ref()
            .unwrap()
            .contains("not installed")
    );
    assert!(health[2].problem.as_ref().unwrap().contains("`plug`"));
    // Asking changed nothing.
    assert!(lab.calls().iter().all(|call| !call.contains(" off ")));
}

#[tokio::test]
async fn installed_agents_are_listed_and_described() {
    let lab = Lab::new(&[("fence_good", GOOD), ("fence_down", "exit 1")]);
    fs::write(lab.dir.path().join("fence_text"), "not executable").unwrap();
    fs::create_dir(lab.dir.path().join("fence_folder")).unwrap();
    let names: Vec<_> = lab.fence.installed().into_iter().map(|a| a.name).collect();
    assert_eq!(names, ["fence_down", "fence_good"]);
    let deadline = Instant::now() + LONG;
    let metadata = lab.fence.metadata("fence_good", deadline).await.unwrap();
    assert_eq!(metadata.summary, "Good");
    assert!(metadata.parameters[0].required);
    let error = lab
        .fence
        .metadata("fence_down", deadline)
        .await
        .unwrap_err();
    assert!(matches!(
        error,
        FenceError::Device {
            phase: Phase::Metadata,
            ..
        }
    ));
    let nowhere = AgentFence::with_folders([PathBuf::from("/no/such/folder")]);
    assert!(nowhere.installed().is_empty());
}
