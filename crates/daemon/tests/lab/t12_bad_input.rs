//! Bad input and broken parts, end to end: a clear error or a defined recovery, and nothing lost.

use crate::harness::guest::Guest;
use crate::harness::{Cluster, LONG, Options, find_host, find_vm};
use quorate_api::view::{HostState, VmState};
use quorate_lab::site::CLUSTER_PORT;
use quorate_lab::supervisor::protocol::Request;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Says what was refused, and that the message helps.
fn refused(cluster: &Cluster, what: &str, result: Result<String, String>, words: &[&str]) {
    let error = result.expect_err(what);
    // A join token is a long word that nobody wants to read.
    let short = |word: &str| word.chars().take(90).collect::<String>();
    let words_shown: Vec<String> = error.split(' ').map(short).collect();
    cluster.say(&format!(
        "{what}: {}",
        words_shown.join(" ").replace('\n', " | ")
    ));
    for word in words {
        assert!(
            error.contains(word),
            "{what}: `{word}` is missing in: {error}"
        );
    }
}

fn address(cluster: &Cluster, host: &str) -> String {
    let address = cluster.lab.site().cluster_address(host).unwrap();
    format!("{address}:{CLUSTER_PORT}")
}

fn on(cluster: &Cluster, host: &str, words: &[&str]) -> Result<String, String> {
    cluster
        .lab
        .quorate(host, words)
        .map_err(|error| error.to_string())
}

fn join(cluster: &Cluster, host: &str, token: &str, name: &str) -> Result<String, String> {
    let own = address(cluster, host);
    on(
        cluster,
        host,
        &["join", token, "--host", name, "--address", &own],
    )
}

fn token(cluster: &Cluster) -> String {
    let text = on(cluster, "h1", &["token", "create"]).unwrap();
    text.split_whitespace().last().unwrap().to_owned()
}

#[test]
fn tokens_and_strangers() {
    let cluster = Cluster::machines(&Options::default());
    refused(
        &cluster,
        "a command without a daemon",
        on(&cluster, "h1", &["status"]),
        &["quorate serve"],
    );
    refused(
        &cluster,
        "serve without a cluster",
        on(&cluster, "h1", &["serve"]),
        &["quorate init"],
    );
    let own = address(&cluster, "h1");
    refused(
        &cluster,
        "init with an address without port",
        on(
            &cluster,
            "h1",
            &["init", "--host", "h1", "--address", "10.78.0.1"],
        ),
        &["ADDRESS:PORT"],
    );
    on(
        &cluster,
        "h1",
        &["init", "--name", "lab", "--host", "h1", "--address", &own],
    )
    .unwrap();
    refused(
        &cluster,
        "init twice",
        on(&cluster, "h1", &["init", "--host", "h1", "--address", &own]),
        &["already"],
    );
    cluster.lab.start("h1").unwrap();
    cluster.wait("the first host", LONG, |_| Ok(()));

    let good = token(&cluster);
    refused(
        &cluster,
        "no token",
        join(&cluster, "h2", "letmein", "h2"),
        &["quorate token"],
    );
    let mut letters: Vec<char> = good.chars().collect();
    let middle = letters.len() / 2;
    letters[middle] = if letters[middle] == 'A' { 'B' } else { 'A' };
    let bent: String = letters.into_iter().collect();
    refused(
        &cluster,
        "a bent token",
        join(&cluster, "h2", &bent, "h2"),
        &["copy it again"],
    );
    refused(
        &cluster,
        "a name that is taken",
        join(&cluster, "h2", &good, "h1"),
        &["h1"],
    );
    let good = token(&cluster);
    join(&cluster, "h2", &good, "h2").unwrap();
    cluster.lab.start("h2").unwrap();
    cluster.wait("the second host", LONG, |view| {
        let host = find_host(view, "h2")?;
        (host.state == HostState::Up)
            .then_some(())
            .ok_or_else(|| format!("{host:?}"))
    });
    refused(
        &cluster,
        "a used token",
        join(&cluster, "h3", &good, "h3"),
        &["token"],
    );

    stranger(&cluster);
}

/// A host with the keys of another cluster is not let in, and is told.
fn stranger(cluster: &Cluster) {
    let own = address(cluster, "h3");
    on(
        cluster,
        "h3",
        &["init", "--name", "other", "--host", "h3", "--address", &own],
    )
    .unwrap();
    cluster
        .lab
        .ask("h2", &Request::StopDaemon { hard: false })
        .unwrap();
    let (from, to) = (
        cluster.lab.site().data_dir("h3"),
        cluster.lab.site().data_dir("h2"),
    );
    // Everything that is no state of the cluster: keys and certificates.
    let keys: Vec<PathBuf> = files(&from)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "pem"))
        .collect();
    assert!(
        !keys.is_empty(),
        "no keys found in {from:?}: {:?}",
        files(&from)
    );
    for key in keys {
        let name = key.strip_prefix(&from).unwrap();
        std::fs::copy(&key, to.join(name)).unwrap();
    }
    let revision = cluster.seen_by("h1").cluster.revision;
    cluster.lab.ask("h2", &Request::StartDaemon).unwrap();
    let said = cluster.eventually("a message about the other cluster", LONG, || {
        let log = cluster.log_tail("h2", 200);
        let line = log.lines().rev().find(|line| {
            let line = line.to_lowercase();
            line.contains("other cluster") || line.contains("another cluster")
        });
        line.map(str::to_owned).ok_or(log.clone())
    });
    cluster.say(&format!("a peer of another cluster: {said}"));
    cluster.wait("the stranger shut out", LONG, |view| {
        let host = find_host(view, "h2")?;
        (host.state != HostState::Up)
            .then_some(())
            .ok_or_else(|| format!("{host:?}"))
    });
    assert!(cluster.seen_by("h1").cluster.revision >= revision);
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path => found.push(path),
        }
    }
    found
}

#[test]
fn manifests_disks_and_broken_logs() {
    // Before the machines, so that they see it.
    let small = SmallDisk::mount();
    let cluster = Cluster::machines(&Options::default());
    small.replace(&cluster.lab.site().data_dir("h3"));
    cluster.lab.form_cluster("lab", None).unwrap();
    cluster.wait_healthy();
    cluster.apply(&[]);
    bad_manifests(&cluster);
    full_disk(&cluster, &small);
    corrupt_log(&cluster);
    impossible(&cluster);
    cluster.run(&[Guest::new("after", 1)]);
    larger(&cluster);
    imported(&cluster);
}

/// A larger size in the manifest is given to the running guest, which stays as it is.
fn larger(cluster: &Cluster) {
    let before = cluster.copy("after");
    let guest = Guest::new("after", 1).disk(24);
    cluster.apply(std::slice::from_ref(&guest));
    let file = cluster.disk_file(&guest);
    cluster.eventually("a larger disk", LONG, || {
        let length = std::fs::metadata(&file).map_or(0, |meta| meta.len());
        (length == 24 << 20)
            .then_some(())
            .ok_or(format!("{length} bytes"))
    });
    assert_eq!(cluster.copy("after"), before, "it was started anew");
}

/// A VM waits for the image that is being written for it.
fn imported(cluster: &Cluster) {
    let file = cluster.file("late.img", &"not all zeros..\n".repeat(512 << 10));
    let file = file.to_string_lossy();
    let import = ["image", "import", &file, "--to", "shared/late.raw"];
    let slowly = [&import[..], &["--limit", "64KiB", "--detach"]].concat();
    let job = cluster.must(&slowly);
    let kernel = cluster.image().kernel;
    let text = format!(
        "vms:\n  late:\n    memory: 64MiB\n    boot: {{kernel: {{kernel: {}}}}}\n    disks: [{{pool: shared, image: late.raw}}]\n",
        kernel.display()
    );
    cluster.apply_text(&text).unwrap();
    let why = cluster.wait("the reason why it waits", LONG, |view| {
        let vm = find_vm(view, "late")?;
        let tells = vm.why.contains("it starts when that is done");
        (tells && vm.state == VmState::Waiting)
            .then(|| vm.why.clone())
            .ok_or_else(|| format!("{vm:?}"))
    });
    cluster.say(&why);
    // Nobody wants to wait for that one. Without it the VM would start, and find no image.
    cluster.must(&["vm", "stop", "late"]);
    cluster.must(&["image", "cancel", job.trim()]);
    cluster.eventually("an import at full speed", LONG, || {
        cluster.quorate(&import).map(drop)
    });
    cluster.must(&["vm", "start", "late"]);
    cluster.wait("the VM whose image is whole", LONG, |view| {
        let vm = find_vm(view, "late")?;
        (vm.state == VmState::Running)
            .then_some(())
            .ok_or_else(|| format!("{vm:?}"))
    });
    // It has no operating system that could be asked.
    cluster.must(&["vm", "stop", "late", "--hard", "--wait"]);
}

/// Errors have a place and a hint, and change nothing.
fn bad_manifests(cluster: &Cluster) {
    // What the cluster itself still had to commit about the new pool.
    let mut before = cluster.view().cluster.revision;
    cluster.eventually("a revision that stays", LONG, || {
        quorate_lab::wait::pause(Duration::from_secs(1));
        let last = std::mem::replace(&mut before, cluster.view().cluster.revision);
        (last == before)
            .then_some(())
            .ok_or_else(|| format!("{before:?}"))
    });
    let vm = "  v:\n    memory: 64MiB\n    boot: {kernel: {kernel: /k}}\n";
    let other = vm.replace("  v:", "  w:");
    let cases = [
        (
            "an unknown field",
            format!("vms:\n{vm}    colour: red\n"),
            vec!["manifest.yaml:5:", "colour"],
        ),
        (
            "a wrong unit",
            format!("vms:\n{}", vm.replace("64MiB", "64 parsecs")),
            vec!["manifest.yaml:3:", "memory"],
        ),
        (
            "a name twice",
            format!("vms:\n{vm}{vm}"),
            vec!["manifest.yaml:5:", "v"],
        ),
        (
            "a cycle",
            format!("vms:\n{vm}    depends_on: [w]\n{other}    depends_on: [v]\n"),
            vec!["manifest.yaml:", "depends_on"],
        ),
        (
            "an unknown host",
            format!("vms:\n{vm}    hosts: [h9]\n"),
            vec!["manifest.yaml:5:", "h9", "h1"],
        ),
        (
            "an unknown pool",
            format!("vms:\n{vm}    disks: [{{pool: nowhere, image: v.raw}}]\n"),
            vec!["manifest.yaml:5:", "nowhere"],
        ),
        ("no YAML", "vms: [".to_owned(), vec!["manifest.yaml:"]),
    ];
    for (what, text, words) in cases {
        refused(cluster, what, cluster.apply_text(&text), &words);
    }
    refused(
        cluster,
        "a VM that is not there",
        cluster.quorate(&["vm", "show", "nobody"]),
        &["nobody"],
    );
    refused(
        cluster,
        "a host that is not there",
        cluster.quorate(&["host", "drain", "h9"]),
        &["h9"],
    );
    let view = cluster.view();
    assert!(view.vms.is_empty(), "{:?}", view.vms);
    assert_eq!(
        view.cluster.revision, before,
        "a refused change left a trace"
    );
}

/// What cannot run waits, says why, and does not disturb others.
fn impossible(cluster: &Cluster) {
    let shared = cluster.lab.site().shared_dir();
    let image = cluster.image();
    let text = format!(
        "pools:\n  far: {{kind: directory, path: {}/not-there}}\nvms:\n\
         \x20 huge:\n    memory: 900GiB\n    boot: {{kernel: {{kernel: {kernel}}}}}\n\
         \x20 missing:\n    memory: 64MiB\n    boot: {{kernel: {{kernel: {kernel}}}}}\n    disks: [{{pool: shared, image: missing.raw}}]\n\
         \x20 faraway:\n    memory: 64MiB\n    boot: {{kernel: {{kernel: {kernel}}}}}\n    disks: [{{pool: far, image: f.raw, size: 1MiB}}]\n",
        cluster.lab.site().dir.display(),
        kernel = image.kernel.display(),
    );
    cluster.apply_text(&text).unwrap();
    for (vm, words) in [
        ("huge", ["free", "needed"]),
        ("missing", ["missing.raw", "missing"]),
        ("faraway", ["far", "pool"]),
    ] {
        let said = cluster.wait(&format!("the reason why {vm} does not run"), LONG, |view| {
            let found = find_vm(view, vm)?;
            let text = format!("{} {:?}", found.why, found.problem);
            let tells = words.iter().all(|word| text.contains(word));
            let waits = matches!(found.state, VmState::Waiting | VmState::Failing);
            (tells && waits)
                .then_some(text)
                .ok_or_else(|| format!("{found:?}"))
        });
        cluster.say(&format!("{vm}: {said}"));
    }
    let explained = cluster.must(&["explain", "vm", "huge"]);
    for host in cluster.hosts() {
        assert!(
            explained.contains(&host),
            "{host} is not explained: {explained}"
        );
    }
    // The image appears: nothing else has to be done.
    quorate_lab::guest::make_disk(&shared.join("missing.raw"), 1).unwrap();
    cluster.wait("the VM whose image has appeared", LONG, |view| {
        let vm = find_vm(view, "missing")?;
        (vm.state == VmState::Running)
            .then_some(())
            .ok_or_else(|| format!("{vm:?}"))
    });
    // It has no operating system that could be asked.
    cluster.must(&["vm", "stop", "missing", "--hard", "--wait"]);
    for vm in ["huge", "missing", "faraway"] {
        cluster.must(&["delete", "vm", vm, "--wait"]);
    }
}

/// A small file system for one host's state.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
            .arg(dir.path())
            .status();
        assert!(done.unwrap().success());
        Self(dir)
    }

    /// Takes the place of an empty directory.
    fn replace(&self, dir: &Path) {
        std::fs::remove_dir(dir).unwrap();
        std::os::unix::fs::symlink(self.0.path(), dir).unwrap();
    }
}

impl Drop for SmallDisk {
    /// Lazily: a daemon may still run there.
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

/// The disk with a host's log is full: its daemon ends clearly, the others go on, nothing is lost.
fn full_disk(cluster: &Cluster, small: &SmallDisk) {
    let deaths = cluster.status("h3").daemon_deaths;
    let filler = small.0.path().join("filler");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=64k", "status=none"])
        .arg(format!("of={}", filler.display()))
        .stderr(std::process::Stdio::null())
        .status();
    let mut last = 0;
    cluster.eventually("the end of the daemon without room", LONG, || {
        // Commits, until the log needs more room than there is.
        last += 1;
        let path = cluster.file("room.yaml", &much_to_store(last));
        on(cluster, "h1", &["apply", "-f", &path.to_string_lossy()])?;
        let status = cluster.status("h3");
        let ended = status.daemon_deaths > deaths;
        ended
            .then_some(())
            .ok_or_else(|| format!("{status:?} after {last} commits"))
    });
    let log = cluster.log_tail("h3", 40);
    assert!(
        log.to_lowercase().contains("space") || log.contains("full"),
        "the log does not tell: {log}"
    );
    cluster.say(&format!(
        "a full disk: {}",
        log.lines().last().unwrap_or_default()
    ));
    let view = cluster.view();
    assert_ne!(view.cluster.answered_by.as_str(), "h3");
    std::fs::remove_file(&filler).unwrap();
    cluster.wait_healthy();
    let revision = cluster.view().cluster.revision;
    cluster.eventually("the host that had no room to catch up", LONG, || {
        let seen = cluster.view_from("h3")?.cluster.revision;
        (seen >= revision)
            .then_some(())
            .ok_or_else(|| format!("{seen:?}"))
    });
    let there = cluster.seen_by("h3").vms.len();
    assert_eq!(there, cluster.seen_by("h1").vms.len());
}

/// A manifest of some ten thousand bytes, another one for every number.
fn much_to_store(number: usize) -> String {
    let append = "x".repeat(1800 + number % 200);
    let vm = |at: usize| {
        format!(
            "  room{at}:\n    memory: 64MiB\n    power: stopped\n    boot: {{kernel: {{kernel: /k, append: {append}}}}}\n"
        )
    };
    let vms: String = (0..20).map(vm).collect();
    format!("vms:\n{vms}")
}

/// A damaged log is never used: the daemon says so and ends.
fn corrupt_log(cluster: &Cluster) {
    let victim = cluster.follower();
    cluster
        .lab
        .ask(&victim, &Request::StopDaemon { hard: false })
        .unwrap();
    let dir = cluster.lab.site().data_dir(&victim).join("raft");
    let log = files(&dir)
        .into_iter()
        .find(|path| path.extension().is_some_and(|end| end == "redb"))
        .unwrap();
    let bytes = std::fs::read(&log).unwrap();
    // The head stays, so that it still looks like a log.
    let mut bent = bytes.clone();
    for byte in bent.iter_mut().skip(4096).step_by(7) {
        *byte = !*byte;
    }
    std::fs::write(&log, &bent).unwrap();
    let deaths = cluster.status(&victim).daemon_deaths;
    cluster.lab.ask(&victim, &Request::StartDaemon).unwrap();
    cluster.eventually("the end of the daemon", LONG, || {
        let status = cluster.status(&victim);
        (status.daemon_deaths > deaths)
            .then_some(())
            .ok_or_else(|| format!("{status:?}"))
    });
    let tail = cluster.log_tail(&victim, 12);
    let line = tail
        .lines()
        .rev()
        .find(|line| line.contains("redb") || line.contains("damaged") || line.contains("corrupt"));
    cluster.say(&format!("a damaged log: {}", line.unwrap_or(&tail)));
    assert!(
        line.is_some_and(|line| line.contains("remove") || line.contains("help")),
        "no way out is told: {tail}"
    );
    let panicked = tail.contains("panicked");
    assert!(!panicked, "{tail}");
    // The cluster goes on without it.
    assert_ne!(cluster.view().cluster.answered_by.as_str(), victim);
    // With the file mended, as from a backup of this very moment, it comes back.
    cluster
        .lab
        .ask(&victim, &Request::StopDaemon { hard: true })
        .unwrap();
    std::fs::write(&log, bytes).unwrap();
    cluster.lab.ask(&victim, &Request::StartDaemon).unwrap();
    cluster.wait_healthy();
    quorate_lab::wait::pause(Duration::from_millis(500));
}
