//! A host with pools in a temporary folder, and a `tgtd` of its own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use async_trait::async_trait;
use quorate_image::{Config, ImageUser, Jobs, Site};
use quorate_storage::{DirectoryConfig, DirectoryPool, IscsiConfig, IscsiPoolDriver, Login, Pool};
use quorate_types::{
    HostName, ImageJob, ImageRef, ImageTask, IscsiPool, PoolName, Timestamp, VmName,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest that any wait of these tests may take: the machine may be busy.
pub const SOON: Duration = Duration::from_secs(120);

#[derive(Default)]
pub struct Host {
    pub pools: Mutex<BTreeMap<PoolName, Arc<dyn Pool>>>,
    pub users: Mutex<BTreeMap<ImageRef, ImageUser>>,
    pub told: Mutex<Vec<String>>,
}

#[async_trait]
impl Site for Host {
    fn pool(&self, name: &PoolName) -> Result<Arc<dyn Pool>, String> {
        let found = self.pools.lock().unwrap().get(name).cloned();
        found.ok_or_else(|| format!("there is no pool {name}"))
    }

    fn users(&self, image: &ImageRef) -> Vec<ImageUser> {
        let users = self.users.lock().unwrap();
        users.get(image).cloned().into_iter().collect()
    }

    fn now(&self) -> Timestamp {
        Timestamp(1)
    }

    async fn guest_resize(&self, vm: &VmName, image: &ImageRef, bytes: u64) -> Result<(), String> {
        let text = format!("resize {vm} {image} {bytes}");
        self.told.lock().unwrap().push(text);
        Ok(())
    }

    async fn guest_thaw(&self, vm: &VmName) {
        self.told.lock().unwrap().push(format!("thaw {vm}"));
    }

    async fn guest_snapshot(
        &self,
        vm: &VmName,
        image: &ImageRef,
        name: &str,
        create: bool,
    ) -> Result<String, String> {
        let text = format!("snapshot {vm} {image} {name} {create}");
        self.told.lock().unwrap().push(text);
        Ok("the guest was quiesced".to_owned())
    }
}

pub struct Lab {
    pub dir: tempfile::TempDir,
    pub host: Arc<Host>,
    pub jobs: Jobs,
}

impl Lab {
    /// A host with the directory pool `shared`.
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Arc::new(Host::default());
        let pool = dir.path().join("shared");
        std::fs::create_dir(&pool).unwrap();
        let config = DirectoryConfig::new("shared", &pool, "c1", "h1");
        let driver: Arc<dyn Pool> = Arc::new(DirectoryPool::new(config));
        driver.define().await.unwrap();
        let name = "shared".parse().unwrap();
        host.pools.lock().unwrap().insert(name, driver);
        let jobs = start(&dir, &host);
        Self { dir, host, jobs }
    }

    /// The daemon again, after it was killed.
    pub fn restart(&mut self) {
        self.jobs = start(&self.dir, &self.host);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pool(&self, name: &str) -> PathBuf {
        self.dir.path().join("shared").join(name)
    }

    pub async fn run(&self, task: ImageTask) -> ImageJob {
        let job = self.jobs.submit("test", task).unwrap();
        self.end(&job.id).await
    }

    pub async fn end(&self, id: &str) -> ImageJob {
        let deadline = Instant::now() + SOON;
        loop {
            let job = self.jobs.get(id).unwrap();
            if job.state.is_over() {
                return job;
            }
            assert!(Instant::now() < deadline, "{job:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Adds the pool `san` on a SAN.
    pub fn add_san(&self, san: &San) {
        let driver: Arc<dyn Pool> = Arc::new(san.pool("iqn.2026-01.local.quorate:c1.h1"));
        let name = "san".parse().unwrap();
        self.host.pools.lock().unwrap().insert(name, driver);
    }

    /// Nothing but images: no part of a copy is left.
    pub fn tidy(&self) -> bool {
        let entries = std::fs::read_dir(self.path("shared")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names
            .into_iter()
            .all(|name| !name.to_string_lossy().contains("-new."))
    }
}

fn start(dir: &tempfile::TempDir, host: &Arc<Host>) -> Jobs {
    let config = Config {
        host: HostName::new("h1").unwrap(),
        folder: dir.path().join("jobs"),
        parallel: 2,
    };
    Jobs::start(config, Arc::clone(host) as Arc<dyn Site>).unwrap()
}

pub fn import(file: &Path, to: &str) -> ImageTask {
    let text = serde_json::json!({ "op": "import", "file": file, "to": to });
    serde_json::from_value(text).unwrap()
}

pub fn task(value: serde_json::Value) -> ImageTask {
    serde_json::from_value(value).unwrap()
}

pub fn qemu_img(words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).output().unwrap();
    assert!(
        output.status.success(),
        "{words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A disk with data here and there, a hole, and an end that is not round.
pub fn content(bytes: usize) -> Vec<u8> {
    let mut disk = vec![0; bytes];
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for (index, byte) in disk.iter_mut().enumerate() {
        if index / (1 << 20) % 3 != 1 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            *byte = seed as u8;
        }
    }
    disk
}

pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// A `tgtd` on the loopback address with targets for whoever comes.
pub struct San {
    daemon: Child,
    control: u32,
    port: u16,
    dir: tempfile::TempDir,
    login: Option<(String, String)>,
}

pub const TARGET: &str = "iqn.2026-01.local.test:san";

impl San {
    /// `None`, with a word, where there is none.
    pub fn start() -> Option<Self> {
        let root = rustix::process::geteuid().is_root();
        if !root || Command::new("tgtadm").arg("--version").output().is_err() {
            eprintln!("skipped: needs root and the package tgt");
            return None;
        }
        // Free at this moment; nobody else asks the kernel for the same one.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        // Larger ones are refused.
        let control = 1 + u32::from(port) % 32_000;
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all("/var/run/tgtd").unwrap();
        let daemon = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "tgtd",
                "-f",
                "-t",
                "4",
                "-C",
                &control.to_string(),
            ])
            .arg("--iscsi")
            .arg(format!("portal=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let san = Self {
            daemon,
            control,
            port,
            dir,
            login: None,
        };
        let deadline = Instant::now() + SOON;
        while !san.try_admin(&["--mode", "target", "--op", "show"]) {
            assert!(Instant::now() < deadline, "tgtd does not start");
            // The daemon says nothing when it is there.
            std::thread::park_timeout(Duration::from_millis(20));
        }
        Some(san)
    }

    fn try_admin(&self, words: &[&str]) -> bool {
        let control = self.control.to_string();
        let mut command = Command::new("tgtadm");
        command.args(["-C", &control, "--lld", "iscsi"]).args(words);
        command.output().unwrap().status.success()
    }

    pub fn admin(&self, words: &[&str]) {
        assert!(self.try_admin(words), "{words:?}");
    }

    /// Whoever logs in must know this password.
    pub fn set_account(&mut self, user: &str, password: &str) {
        let words = [
            "--mode",
            "account",
            "--op",
            "new",
            "--user",
            user,
            "--password",
            password,
        ];
        self.admin(&words);
        self.login = Some((user.to_owned(), password.to_owned()));
    }

    /// A target with one LUN.
    pub fn add(&self, number: u32, name: &str, bytes: u64) -> PathBuf {
        let file = self.dir.path().join(name);
        std::fs::File::create(&file)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        let (tid, target) = (number.to_string(), format!("{TARGET}:{name}"));
        self.admin(&[
            "--mode", "target", "--op", "new", "--tid", &tid, "-T", &target,
        ]);
        let path = file.to_str().unwrap();
        let unit = [
            "--mode",
            "logicalunit",
            "--op",
            "new",
            "--tid",
            &tid,
            "--lun",
            "1",
            "-b",
            path,
        ];
        self.admin(&unit);
        if let Some((user, _)) = &self.login {
            self.admin(&[
                "--mode", "account", "--op", "bind", "--tid", &tid, "--user", user,
            ]);
        }
        self.admin(&[
            "--mode", "target", "--op", "bind", "--tid", &tid, "-I", "ALL",
        ]);
        file
    }

    /// The way to its targets, as an initiator of this name.
    #[allow(dead_code, reason = "not every test writes units itself")]
    pub fn peer(&self, initiator: &str) -> quorate_storage::iscsi::session::Peer {
        let login = self.login.clone();
        quorate_storage::iscsi::session::Peer {
            portal: format!("127.0.0.1:{}", self.port),
            initiator: initiator.to_owned(),
            login: login.map(|(user, password)| Login { user, password }),
            deadline: Duration::from_secs(20),
        }
    }

    /// The pool of all its targets, as an initiator of this name sees it.
    pub fn pool(&self, initiator: &str) -> IscsiPoolDriver {
        let spec: IscsiPool = serde_json::from_value(serde_json::json!({
            "portals": [format!("127.0.0.1:{}", self.port)], "target": TARGET, "lun": 1,
        }))
        .unwrap();
        let login = self
            .login
            .clone()
            .map(|(user, password)| Login { user, password });
        IscsiPoolDriver::new(IscsiConfig {
            pool: "san".to_owned(),
            spec,
            cluster: "c1".to_owned(),
            initiator: initiator.to_owned(),
            login,
            missing_secret: None,
            deadline: Duration::from_secs(20),
        })
    }
}

impl Drop for San {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let socket = format!("/var/run/tgtd/socket.{}", self.control);
        let _ = std::fs::remove_file(&socket);
        let _ = std::fs::remove_file(format!("{socket}.lock"));
    }
}
