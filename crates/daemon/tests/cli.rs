//! The real binary against the API of a fake daemon: exit statuses, messages, waiting.
#![allow(clippy::unwrap_used)]

mod binary;
#[path = "../../api/tests/common/mod.rs"]
mod common;

use binary::{SOON, command, run, run_with};
use common::{Site, TWO};
use quorate_api::Limits;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

#[tokio::test]
async fn a_manifest_is_applied_compared_and_refused() {
    let site = Site::start(Limits::default()).await;
    let diff = run_with(&site, "diff -f -", TWO).await;
    assert_eq!(diff.status, 0, "{}", diff.err);
    assert!(
        diff.out.contains("+ vm db\n    boot.kernel.append"),
        "{}",
        diff.out
    );
    assert!(diff.out.ends_with("2 objects would change.\n"));
    let applied = run_with(&site, "apply -f -", TWO).await;
    assert_eq!(applied.out, "+ vm app\n+ vm db\nApplied as revision 6.\n");
    let by = site.fake.callers.lock().unwrap()[0].clone();
    assert!(by.starts_with("bob@"), "{by}");
    let again = run_with(&site, "apply -f -", TWO).await;
    assert_eq!(
        again.out,
        "Nothing to change: all is so already (revision 6).\n"
    );
    let bad = run_with(&site, "apply -f -", &TWO.replace("memory", "memroy")).await;
    assert_eq!((bad.status, bad.out.as_str()), (2, ""));
    assert!(bad.err.contains("--> standard input:3:8"), "{}", bad.err);
    assert!(bad.err.contains("help: did you mean `memory`?"));
    assert!(
        bad.err
            .ends_with("error: the manifest has 2 errors; nothing was changed\n")
    );
    let missing = run(&site, "apply -f /no/such/file.yaml").await;
    assert_eq!(missing.status, 2);
    assert!(missing.err.contains("/no/such/file.yaml cannot be read"));
}

#[tokio::test]
async fn a_variable_of_the_environment_is_needed_where_the_manifest_says_so() {
    let site = Site::start(Limits::default()).await;
    let text = TWO.replace("${KERNEL}", "${QUORATE_TEST_UNSET}");
    let ran = run_with(&site, "apply -f -", &text).await;
    assert_eq!(ran.status, 2);
    assert!(
        ran.err
            .contains("the variable `QUORATE_TEST_UNSET` is not set"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn status_speaks_to_people_and_programs() {
    let site = Site::start(Limits::default()).await;
    run_with(&site, "apply -f -", TWO).await;
    let page = run(&site, "status").await;
    assert!(page.out.starts_with("Cluster lab: "), "{}", page.out);
    assert!(!page.out.contains('\x1b'), "no colours outside a terminal");
    let json = run(&site, "status --output json").await;
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value["vms"][1]["name"], "db");
    let yaml = run(&site, "vm list -o yaml").await;
    assert!(yaml.out.starts_with("- name: app\n"), "{}", yaml.out);
    site.fake.quorate.store(false, Ordering::SeqCst);
    let page = run(&site, "status").await;
    assert_eq!(page.status, 0);
    assert!(
        page.out.starts_with("Cluster lab: no quorum"),
        "{}",
        page.out
    );
    let refused = run(&site, "vm start db").await;
    assert_eq!(refused.status, 1);
    assert!(refused.err.contains("error: no quorum"), "{}", refused.err);
}

#[tokio::test]
async fn waiting_ends_with_done_failed_or_timed_out() {
    let site = Site::start(Limits::default()).await;
    run_with(&site, "apply -f -", TWO).await;
    let stopped = run(&site, "vm stop app --wait").await;
    assert_eq!(stopped.status, 0, "{}", stopped.err);
    assert!(
        stopped
            .out
            .starts_with("VM app shall be stopped\nDone after "),
        "{}",
        stopped.out
    );
    let late = run_with(&site, "apply -f - --wait --timeout 300ms", TWO).await;
    assert_eq!(late.status, 4);
    assert!(
        late.err
            .contains("error: not done after 300ms: app: starting; db: starting"),
        "{}",
        late.err
    );
    let drain = run(&site, "host drain h2").await;
    assert_eq!(drain.out, "host h2 is being drained\n");
    let failed = run(&site, "vm migrate db --to h3 --wait").await;
    assert_eq!(failed.status, 1);
    assert!(
        failed.err.contains("`quorate vm start db` places it"),
        "{}",
        failed.err
    );
}

#[tokio::test]
async fn a_missing_daemon_has_its_own_status() {
    let site = Site::start(Limits::default()).await;
    let ran = run(&site, "--dir /nonexistent status").await;
    assert_eq!(ran.status, 3);
    assert!(
        ran.err.contains("is `quorate serve` running"),
        "{}",
        ran.err
    );
    assert_eq!(run(&site, "vm show DB").await.status, 2);
    assert_eq!(run(&site, "vm show dbx").await.status, 1);
    assert_eq!(run(&site, "--help").await.status, 0);
    assert_eq!(run(&site, "").await.status, 2);
}

#[tokio::test]
async fn confirm_dead_asks_unless_told_not_to() {
    let site = Site::start(Limits::default()).await;
    let asked = run_with(&site, "host confirm-dead h3", "h3\n").await;
    assert_eq!(asked.status, 2, "a pipe is no confirmation");
    assert!(asked.err.contains("--yes"), "{}", asked.err);
    let told = run(&site, "host confirm-dead h3 --yes").await;
    assert!(
        told.out.starts_with("h3 is dead, says bob@"),
        "{}",
        told.out
    );
    assert_eq!(run(&site, "host confirm-dead h9 --yes").await.status, 1);
}

#[tokio::test]
async fn consoles_and_logs_come_through() {
    let site = Site::start(Limits::default()).await;
    run_with(&site, "apply -f -", TWO).await;
    let ran = run_with(&site, "vm console db", "ls\n\x1d").await;
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(
        ran.err.contains("Ctrl-] ends the connection"),
        "{}",
        ran.err
    );
    let logs = run(&site, "vm logs db -n 5").await;
    assert_eq!(logs.out, "5 lines\n");
}

#[tokio::test]
async fn events_are_followed_one_per_line() {
    let site = Site::start(Limits::default()).await;
    run_with(&site, "apply -f -", TWO).await;
    let list = run(&site, "events -n 1 -o json").await;
    let list: serde_json::Value = serde_json::from_str(&list.out).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    let mut child = command(&site, "events --follow -n 1 -o json --about vm/db")
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = tokio::time::timeout(SOON, lines.next_line())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(first.contains("VM db created"), "{first}");
    run(&site, "vm stop app").await;
    run(&site, "vm stop db").await;
    let next = tokio::time::timeout(SOON, lines.next_line())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(next.contains("VM db shall be stopped"), "{next}");
    child.kill().await.unwrap();
}

#[tokio::test]
async fn completions_and_manual_pages_are_made() {
    let site = Site::start(Limits::default()).await;
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&site, &format!("completion {shell}")).await;
        assert_eq!(script.status, 0, "{}", script.err);
        assert!(script.out.contains("QUORATE_COMPLETE"), "{}", script.out);
    }
    let man = run(&site, "man").await;
    assert!(man.out.contains(".TH quorate 1"), "{}", &man.out[..200]);
    let dir = tempfile::tempdir().unwrap();
    let ran = run(&site, &format!("man --to {}", dir.path().display())).await;
    assert_eq!(ran.status, 0, "{}", ran.err);
    assert!(dir.path().join("quorate-vm-migrate.1").exists());
}

#[tokio::test]
async fn make_install_puts_everything_in_place_and_takes_it_away_again() {
    let root = tempfile::tempdir().unwrap();
    let make = |target: &str| {
        let mut command = Command::new("make");
        command
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .args(["--no-print-directory", target, "PREFIX=/opt/q"])
            .arg(concat!("BINARY=", env!("CARGO_BIN_EXE_quorate")))
            .arg(format!("DESTDIR={}", root.path().display()))
            .env_remove("MAKEFLAGS");
        command.output()
    };
    let ran = make("install").await.unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let place = root.path().join("opt/q");
    let read = |path: &str| std::fs::read_to_string(place.join(path)).unwrap();
    let unit = read("lib/systemd/system/quorate.service");
    assert!(
        unit.contains("ExecStart=/opt/q/bin/quorate serve"),
        "{unit}"
    );
    assert!(read("share/man/man1/quorate-host-drain.1").contains(".TH"));
    for path in [
        "share/bash-completion/completions/quorate",
        "share/zsh/site-functions/_quorate",
        "share/fish/vendor_completions.d/quorate.fish",
    ] {
        assert!(read(path).contains("QUORATE_COMPLETE"), "{path}");
    }
    let ran = make("uninstall").await.unwrap();
    assert!(ran.status.success(), "{ran:?}");
    assert!(!place.join("bin/quorate").exists());
    let left = std::fs::read_dir(place.join("share/man/man1")).unwrap();
    assert_eq!(left.count(), 0);
}

/// What Tab offers at the end of a line.
async fn tab(dir: &std::path::Path, line: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.arg("--").args(line.split(' '));
    let output = command
        .env("QUORATE_COMPLETE", "fish")
        .env("QUORATE_DIR", dir)
        .output();
    let output = tokio::time::timeout(SOON, output).await.unwrap().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn names_are_completed_and_a_daemon_that_does_not_answer_is_not_waited_for() {
    let site = Site::start(Limits::default()).await;
    let dir = site.socket.parent().unwrap();
    assert!(tab(dir, "quorate hos").await.starts_with("host"));
    run_with(&site, "apply -f -", TWO).await;
    let vms = tab(dir, "quorate vm show d").await;
    assert!(vms.starts_with("db") && !vms.contains("app"), "{vms}");
    let hosts = tab(dir, "quorate vm migrate db --to h").await;
    assert!(hosts.starts_with("h1"), "{hosts}");
    // Nobody there.
    let none = tempfile::tempdir().unwrap();
    assert!(!tab(none.path(), "quorate vm show d").await.contains("db"));
    // Somebody who takes the connection and says nothing.
    let _deaf = tokio::net::UnixListener::bind(none.path().join(quorate_api::SOCKET)).unwrap();
    let begin = std::time::Instant::now();
    assert!(!tab(none.path(), "quorate vm show d").await.contains("db"));
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn bash_completes_with_the_script() {
    let bin = std::path::Path::new(env!("CARGO_BIN_EXE_quorate"));
    let path = format!(
        "{}:{}",
        bin.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let session = "source <(quorate completion bash) && COMP_WORDS=(quorate vm mig) COMP_CWORD=2 COMP_TYPE=9 \
        && _clap_complete_quorate quorate mig vm && echo \"${COMPREPLY[*]}\"";
    let output = Command::new("bash")
        .args(["-c", session])
        .env("PATH", path)
        .output()
        .await;
    let Ok(output) = output else {
        return eprintln!("skipped: there is no bash");
    };
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "migrate\n");
}

#[tokio::test]
async fn a_token_stands_alone_on_standard_output() {
    let site = Site::start(Limits::default()).await;
    let ran = run(&site, "token create --ttl 5m").await;
    assert_eq!(ran.out, "token\n");
    assert!(ran.err.contains("quorate join TOKEN"), "{}", ran.err);
}

#[tokio::test]
async fn settings_are_read_strictly() {
    let site = Site::start(Limits::default()).await;
    let line = "init --address 192.0.2.1:7420 --host h1 --settings -";
    let bad = run_with(&site, line, "cluster: {max_voters: 4}").await;
    assert_eq!(bad.status, 2);
    assert!(
        bad.err.contains("max_voters must be 1, 3 or 5"),
        "{}",
        bad.err
    );
    let more = run_with(
        &site,
        line,
        "cluster: {max_voters: 3}\nnetworks: {lan: {bridge: b}}",
    )
    .await;
    assert!(
        more.err.contains("holds more than a `cluster:` section"),
        "{}",
        more.err
    );
}

#[tokio::test]
async fn a_secret_is_read_from_a_pipe_or_a_file_and_shown_nowhere() {
    let site = Site::start(Limits::default()).await;
    let value = "open-sesame-42";
    let set = run_with(&site, "secret set san-chap", &format!("{value}\n")).await;
    assert_eq!(
        (set.status, set.out.as_str()),
        (0, "secret san-chap created\n"),
        "{}",
        set.err
    );
    let kept = |name: &str| {
        let state = site.fake.state_now();
        let secret = state.secrets.get(&name.parse().unwrap()).unwrap();
        secret.expose().to_owned()
    };
    assert_eq!(kept("san-chap"), value);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s");
    std::fs::write(&file, "other-one\r\n").unwrap();
    let set = run(
        &site,
        &format!("secret set array --file {}", file.display()),
    )
    .await;
    assert_eq!(set.status, 0, "{}", set.err);
    assert_eq!(kept("array"), "other-one");
    let listed = run(&site, "secret list").await;
    assert!(listed.out.contains("san-chap"), "{}", listed.out);
    let json = run(&site, "secret list -o json").await;
    let saved = run(&site, "state save -").await;
    assert_eq!(saved.status, 0, "{}", saved.err);
    let events = run(&site, "events -o json").await;
    for ran in [&listed, &json, &saved, &events] {
        assert!(!ran.out.contains(value) && !ran.err.contains(value));
    }
    // There is no way to say it on the command line.
    assert_eq!(run(&site, "secret set san-chap word").await.status, 2);
    let empty = run_with(&site, "secret set san-chap", "\n").await;
    assert_eq!(empty.status, 2);
    assert!(empty.err.contains("cannot be empty"), "{}", empty.err);
    let lines = run_with(&site, "secret set san-chap", "a\nb\n").await;
    assert!(lines.err.contains("control characters"), "{}", lines.err);
    let names = tab(site.socket.parent().unwrap(), "quorate secret delete s").await;
    assert!(names.starts_with("san-chap"), "{names}");
    let gone = run(&site, "secret delete array").await;
    assert_eq!(gone.out, "secret array deleted\n");
}

const POOL: &str = "pools: {shared: {kind: directory, path: /srv/vms}}";

#[tokio::test]
async fn storage_is_shown_to_people_and_programs() {
    let site = Site::start(Limits::default()).await;
    let none = run(&site, "storage list").await;
    assert!(none.out.starts_with("No pools yet"), "{}", none.out);
    run_with(&site, "apply -f -", POOL).await;
    let list = run(&site, "storage list").await;
    assert!(list.out.contains("shared"), "{}", list.out);
    let page = run(&site, "storage show shared").await;
    assert!(
        page.out.contains("/srv/vms") && page.out.contains("shared-disk"),
        "{}",
        page.out
    );
    let json = run(&site, "storage show shared -o json").await;
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value["images"][0]["state"], "unused");
    let yaml = run(&site, "storage list -o yaml").await;
    assert!(yaml.out.starts_with("- name: shared\n"), "{}", yaml.out);
    let wrong = run(&site, "storage show sharde").await;
    assert_eq!(wrong.status, 1);
    assert!(
        wrong.err.contains("did you mean `shared`?"),
        "{}",
        wrong.err
    );
    let dir = site.socket.parent().unwrap();
    assert!(
        tab(dir, "quorate storage show s")
            .await
            .starts_with("shared")
    );
    let pools = tab(dir, "quorate image delete s").await;
    assert!(pools.starts_with("shared/"), "{pools}");
    let images = tab(dir, "quorate image delete shared/s").await;
    assert!(images.starts_with("shared/shared-disk"), "{images}");
}

#[tokio::test]
async fn image_work_is_watched_or_left_alone() {
    let site = Site::start(Limits::default()).await;
    run_with(&site, "apply -f -", POOL).await;
    let done = run(&site, "image import a.qcow2 --to shared/a --limit 1MiB").await;
    assert_eq!(done.status, 0, "{}", done.err);
    assert!(done.out.contains("SHA-256 00ff, verified"), "{}", done.out);
    assert!(done.err.contains("h1-0: copying 0 %"), "{}", done.err);
    let tasks: Vec<String> = site
        .fake
        .images
        .lock()
        .unwrap()
        .iter()
        .map(|job| job.task.to_string())
        .collect();
    let here = std::env::current_dir().unwrap();
    assert_eq!(
        tasks,
        [format!("import {}/a.qcow2 to shared/a", here.display())]
    );
    // Lines of JSON, the last one says how it ended.
    let json = run(&site, "image clone shared/a --to shared/b -o json").await;
    let lines: Vec<serde_json::Value> = json
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.last().unwrap()["state"], "done");
    assert_eq!(json.err, "");
    let failed = run(&site, "image export shared/bad --to /tmp/x").await;
    assert_eq!(failed.status, 1);
    assert!(
        failed.err.contains("reading failed at byte 7"),
        "{}",
        failed.err
    );
    assert!(failed.err.contains("goes on where"), "{}", failed.err);
    let detached = run(&site, "image import a --to shared/c --detach").await;
    assert_eq!(detached.out, "h1-3\n");
    let cancelled = run(&site, "image cancel h1-3").await;
    assert!(cancelled.out.contains("h1-3 is over"), "{}", cancelled.out);
    assert!(run(&site, "image jobs").await.out.contains("cancelled"));
    let asked = run(&site, "image delete shared/a").await;
    assert_eq!(asked.status, 2);
    assert!(asked.err.contains("--yes"), "{}", asked.err);
    assert_eq!(run(&site, "image delete shared/a --yes").await.status, 0);
    let listed = run(&site, "image snapshot list shared/a").await;
    let snapshot = listed.out.lines().last().unwrap();
    let words: Vec<&str> = snapshot.split_whitespace().collect();
    assert_eq!(
        words,
        ["before", "2023-11-14", "22:13:20"],
        "{}",
        listed.out
    );
    let list = run(&site, "image list").await;
    assert!(list.out.contains("shared/shared-disk"), "{}", list.out);
    let unknown = run(&site, "image resize nothing/a 1GiB").await;
    assert!(unknown.err.contains("there is no pool"), "{}", unknown.err);
}
