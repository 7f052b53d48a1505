//! A real daemon on its own, killed in the middle of an import; and no trace of a secret anywhere.
#![allow(clippy::unwrap_used)]
// Looks again at a process that tells of nothing, with a deadline.
#![allow(clippy::disallowed_methods)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_quorate");
/// Longest that any wait of this test may take: the machine may be busy.
const SOON: Duration = Duration::from_secs(120);
const VALUE: &str = "open-sesame-e2e-42";

struct Daemon {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Daemon {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(BINARY);
        command
            .args(line.split_whitespace())
            .env("QUORATE_DIR", self.path("d"))
            .env("QUORATE_BOOT_ID", "images-test");
        command
    }

    fn run_with(&self, line: &str, input: &str) -> Output {
        let mut command = self.command(line);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A command that does not read its input may have ended already.
        let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Runs a command that must succeed.
    fn run(&self, line: &str, input: &str) -> String {
        let output = self.run_with(line, input);
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {err}{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn serve(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let mut command = self.command("serve");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
        self.eventually("the daemon leads", |me| {
            let output = me.run_with("status -o json", "");
            let page: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
            (page["cluster"]["quorate"] == true).then_some(())
        });
    }

    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn eventually<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "{what}: not in time\n{}",
                self.log()
            );
            quorate_lab::wait::pause(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    /// In good order, so that the guard ends, too.
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let pid = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(20);
        while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
            quorate_lab::wait::pause(Duration::from_millis(20));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Command lines and environments of all processes that hold the word.
fn processes_with(word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        for name in ["cmdline", "environ"] {
            let text = fs::read(entry.path().join(name)).unwrap_or_default();
            if text.windows(word.len()).any(|part| part == word.as_bytes()) {
                found.push(String::from_utf8_lossy(&text).replace('\0', " "));
            }
        }
    }
    found
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}

#[test]
fn an_import_outlives_the_daemon_and_a_secret_is_nowhere() {
    let tools = ["qemu-system-x86_64", "qemu-nbd"];
    let there = tools
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !rustix::process::geteuid().is_root() || !there {
        eprintln!("skipped: needs root and QEMU");
        return;
    }
    let mut daemon = Daemon {
        dir: tempfile::tempdir().unwrap(),
        child: None,
    };
    // Free at this moment.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    daemon.run(&format!("init --host h1 --address 127.0.0.1:{port}"), "");
    daemon.serve();
    let pool = daemon.path("pool");
    fs::create_dir(&pool).unwrap();
    let manifest = format!(
        "pools: {{shared: {{kind: directory, path: {}}}}}",
        pool.display()
    );
    daemon.run("apply -f -", &manifest);
    daemon.run("secret set san-chap", VALUE);
    daemon.eventually("the pool is ready", |me| {
        let text = me.run("storage show shared -o json", "");
        let page: serde_json::Value = serde_json::from_str(&text).unwrap();
        (page["hosts"][0]["usable"] == true && page["images"].is_array()).then_some(())
    });
    // 160 MiB of something, limited to 40 MiB in a second.
    let file = daemon.path("disk.raw");
    let bytes: Vec<u8> = (0..160u32 << 18)
        .flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(&file, bytes).unwrap();
    let line = format!(
        "image import {} --to shared/db --limit 40MiB --detach",
        file.display()
    );
    let id = daemon.run(&line, "").trim().to_owned();
    let record = daemon.path("d/images").join(format!("{id}.json"));
    daemon.eventually("a mark", |_| {
        let text = fs::read(&record).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&text).ok()?;
        (record["marked"].as_u64()? > 0).then_some(())
    });
    daemon.kill();
    assert!(!pool.join("db").exists(), "half made and visible");
    daemon.serve();
    let watched = daemon.run(&format!("image watch {id}"), "");
    assert!(watched.contains("It went on after"), "{watched}");
    assert!(watched.contains(&sha256(&file)), "{watched}");
    assert_eq!(sha256(&pool.join("db")), sha256(&file));
    let list = daemon.run("image list shared", "");
    assert!(
        list.contains("shared/db") && list.contains("unused"),
        "{list}"
    );
    daemon.run("image resize shared/db 200MiB", "");
    assert_eq!(fs::metadata(pool.join("db")).unwrap().len(), 200 << 20);
    daemon.run("image delete shared/db --yes", "");
    assert!(!pool.join("db").exists());
    // The secret is with the cluster, and nowhere that people look.
    let pages = [
        "secret list -o json",
        "events -o json",
        "state save -",
        "status -o json",
        "storage list -o json",
    ];
    for page in pages {
        let text = daemon.run(page, "");
        assert!(!text.contains(VALUE), "{page}");
    }
    assert!(!daemon.log().contains(VALUE));
    assert_eq!(processes_with(VALUE), [""; 0]);
}
