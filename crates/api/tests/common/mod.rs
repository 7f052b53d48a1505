//! A backend without a cluster behind it: a real state machine, a scripted picture.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use async_trait::async_trait;
use quorate_api::storage::{ImageSeen, PoolLook, Stranger, StrangersSeen, key_text};
use quorate_api::view::{ClusterView, JoinToken};
use quorate_api::{
    Answering, ApiError, Backend, Client, Console, ErrorCode, Limits, LogOptions, LogStream,
    Observed, ObservedHost, build, router, serve,
};
use quorate_membership::HostHealth;
use quorate_planner::{Seen, Snapshot};
use quorate_state::{Command, Envelope, FORMAT, Outcome, State};
use quorate_types::report::{Capacity, HypervisorFacts};
use quorate_types::{
    BootId, ByteSize, ClusterSettings, Epoch, HostName, HostReport, Millis, PoolReport, Timestamp,
    VmName, VmPhase, VmReport,
};
use quorate_types::{ImageJob, ImageRef, ImageSnapshot, ImageTask, JobState, PoolName};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

pub fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

pub fn vm(name: &str) -> VmName {
    name.parse().unwrap()
}

pub struct Fake {
    states: watch::Sender<Arc<State>>,
    pub quorate: AtomicBool,
    /// So many proposals are refused as stale before one gets through.
    pub stale: AtomicU32,
    pub callers: Mutex<Vec<String>>,
    /// Work on images: each look brings it on by a half.
    pub images: Mutex<Vec<ImageJob>>,
    /// Keys of strangers, by unit.
    pub strangers: Mutex<BTreeMap<String, Vec<u64>>>,
    /// Memory of each host.
    pub memory_mib: std::sync::atomic::AtomicU64,
}

/// What a host with everything says, running what it has orders for.
fn report(state: &State, name: &HostName, memory_mib: u64) -> HostReport {
    let orders = state.orders_for(name);
    let running = |epoch| VmReport {
        epoch,
        phase: VmPhase::Running,
        ready: true,
        closed: Epoch(0),
        saved: None,
        guest_shutdown: false,
        restarts: 0,
        since: Timestamp(0),
        error: None,
        save_failures: 0,
        handed_over: None,
        migration: None,
        resident: ByteSize(0),
        mirrors: Vec::new(),
    };
    HostReport {
        host: name.clone(),
        boot: BootId("b1".into()),
        sequence: 1,
        version: "0.0.0".into(),
        applied: state.revision,
        guard_armed: true,
        watchdog_ms: Some(500),
        capacity: Capacity {
            cpus: 4,
            memory: ByteSize::mib(memory_mib),
        },
        hypervisor: HypervisorFacts {
            qemu: "10.0.2".into(),
            accel: "tcg".into(),
            cpu_models: ["qemu64".to_owned()].into(),
            machines: [
                ("q35".to_owned(), "pc-q35-10.0".to_owned()),
                ("microvm".to_owned(), "microvm".to_owned()),
            ]
            .into(),
        },
        networks: state.networks.keys().cloned().collect(),
        pools: state
            .pools
            .keys()
            .map(|pool| {
                let seen = PoolReport {
                    usable: true,
                    marker: Some("m".into()),
                    ..PoolReport::default()
                };
                (pool.clone(), seen)
            })
            .collect(),
        links: Default::default(),
        vms: orders
            .into_iter()
            .map(|(vm, order)| (vm, running(order.epoch())))
            .collect(),
        services: Default::default(),
        uplinks: Default::default(),
        offences: Default::default(),
    }
}

impl Fake {
    pub fn new() -> Arc<Self> {
        let mut state = State::default();
        let mut apply = |command| {
            let envelope = Envelope {
                format: FORMAT,
                at: Timestamp(1_700_000_000_000),
                by: "test".into(),
                command,
            };
            state.apply(&envelope).unwrap();
        };
        apply(Command::CreateCluster {
            id: "0".into(),
            name: "lab".into(),
            ca_certificate: String::new(),
            ca_key: "secret-key".into(),
            host: host("h1"),
            address: "192.0.2.1:7420".into(),
            settings: ClusterSettings::default(),
        });
        for name in ["h2", "h3"] {
            apply(Command::CreateToken {
                hash: name.into(),
                expires: Timestamp(u64::MAX),
            });
            apply(Command::AdmitHost {
                token: name.into(),
                host: host(name),
                address: format!("{name}:7420"),
            });
        }
        Arc::new(Self {
            states: watch::Sender::new(Arc::new(state)),
            quorate: AtomicBool::new(true),
            stale: AtomicU32::new(0),
            callers: Mutex::new(Vec::new()),
            images: Mutex::new(Vec::new()),
            strangers: Mutex::default(),
            memory_mib: 2048.into(),
        })
    }

    pub fn apply(&self, by: &str, command: Command) -> Result<Outcome, ApiError> {
        let mut result = Err(ApiError::no_quorum());
        self.states.send_modify(|state| {
            let envelope = Envelope {
                format: FORMAT,
                at: Timestamp(1_700_000_001_000),
                by: by.to_owned(),
                command,
            };
            result = Arc::make_mut(state)
                .apply(&envelope)
                .map_err(ApiError::from);
        });
        result
    }
}

impl Fake {
    pub fn state_now(&self) -> Arc<State> {
        Arc::clone(&self.states.borrow())
    }

    /// Guards and watchdogs of all hosts are armed, and the planner has done its work.
    pub async fn settle(&self) {
        for host in self.state().hosts.keys().cloned().collect::<Vec<_>>() {
            let armed = Some(Millis(500));
            self.apply("test", Command::RecordArmed { host, armed })
                .unwrap();
        }
        for _ in 0..20 {
            let snapshot = self.snapshot().await.unwrap();
            let plan = quorate_planner::plan(&snapshot.input());
            if plan.actions.is_empty() {
                return;
            }
            self.apply("planner", Command::CommitPlan(plan)).unwrap();
        }
        panic!("no rest");
    }
}

#[async_trait]
impl Backend for Fake {
    fn host(&self) -> HostName {
        host("h1")
    }

    fn states(&self) -> watch::Receiver<Arc<State>> {
        self.states.subscribe()
    }

    async fn view(&self) -> Result<ClusterView, ApiError> {
        let state = self.state();
        let me = Answering {
            host: host("h1"),
            version: "0.0.0".into(),
        };
        let observed = |_: &HostName| ObservedHost {
            health: HostHealth::Up,
            lease_left: Millis(1900),
            report: None,
            fencing: None,
        };
        let observed = self.quorate.load(Ordering::SeqCst).then(|| Observed {
            leader: Some(host("h1")),
            quorate: true,
            voters: [1, 2, 3].into(),
            hosts: state
                .hosts
                .keys()
                .map(|name| (name.clone(), observed(name)))
                .collect(),
            ..Observed::default()
        });
        Ok(build(&state, observed.as_ref(), &me))
    }

    async fn snapshot(&self) -> Result<Snapshot, ApiError> {
        if !self.quorate.load(Ordering::SeqCst) {
            return Err(ApiError::no_quorum());
        }
        let state = self.state().as_ref().clone();
        let hosts: Vec<HostName> = state.hosts.keys().cloned().collect();
        let memory = self.memory_mib.load(Ordering::SeqCst);
        let seen = Seen {
            now: quorate_membership::Instant(1_000_000_000_000),
            settled: true,
            leader: Some(host("h1")),
            voters: state.hosts.values().map(|record| record.node).collect(),
            reports: hosts
                .iter()
                .map(|name| (name.clone(), report(&state, name, memory)))
                .collect(),
            health: hosts
                .iter()
                .map(|name| (name.clone(), HostHealth::Up))
                .collect(),
            ..Seen::default()
        };
        Ok(Snapshot {
            format: quorate_planner::SNAPSHOT_FORMAT,
            version: "0.0.0".into(),
            saved: Timestamp(1_700_000_100_000),
            state,
            seen,
        })
    }

    async fn propose(&self, by: &str, command: Command) -> Result<Outcome, ApiError> {
        if !self.quorate.load(Ordering::SeqCst) {
            return Err(ApiError::no_quorum());
        }
        let left = self.stale.load(Ordering::SeqCst);
        if left > 0 {
            self.stale.store(left - 1, Ordering::SeqCst);
            return Err(ApiError::new(ErrorCode::Stale, "the configuration changed"));
        }
        self.callers.lock().unwrap().push(by.to_owned());
        self.apply(by, command)
    }

    async fn create_token(
        &self,
        _by: &str,
        ttl: Millis,
        witness: bool,
    ) -> Result<JoinToken, ApiError> {
        Ok(JoinToken {
            token: if witness { "witness" } else { "token" }.into(),
            expires: Timestamp(ttl.0),
        })
    }

    async fn fence(&self, _by: &str, host: &HostName) -> Result<String, ApiError> {
        Err(ApiError::new(
            ErrorCode::Conflict,
            format!("{host} has no fence device"),
        ))
    }

    async fn confirm_dead(&self, by: &str, host: &HostName) -> Result<String, ApiError> {
        Ok(format!("{host} is dead, says {by}"))
    }

    async fn look_into(&self, pool: &PoolName) -> Result<PoolLook, ApiError> {
        let seen = ImageSeen {
            image: format!("{pool}-disk"),
            virtual_bytes: Some(1 << 30),
            actual_bytes: Some(1 << 20),
            format: "raw".into(),
            problem: None,
        };
        Ok(PoolLook {
            host: host("h1"),
            images: vec![seen],
        })
    }

    async fn strangers(&self, _pool: &PoolName, image: &str) -> Result<StrangersSeen, ApiError> {
        let strangers = self.strangers.lock().unwrap();
        let keys = strangers.get(image).into_iter().flatten();
        let one = |key: &u64| Stranger {
            key: key_text(*key),
            holds: true,
            initiators: vec!["iqn.2026-01.com.example:old".into()],
        };
        let strangers: Vec<Stranger> = keys.map(one).collect();
        Ok(StrangersSeen {
            host: host("h1"),
            hold: !strangers.is_empty(),
            strangers,
        })
    }

    async fn image_job(&self, by: &str, task: ImageTask) -> Result<ImageJob, ApiError> {
        let state = self.state();
        if !state.pools.contains_key(&task.image().pool) {
            let known = state.pools.keys().map(PoolName::as_str);
            return Err(ApiError::unknown("pool", task.image().pool.as_str(), known));
        }
        let mut jobs = self.images.lock().unwrap();
        let job = serde_json::json!({
            "id": format!("h1-{}", jobs.len()), "host": "h1", "by": by, "task": task, "state": "running",
            "phase": "copying", "total": 100, "asked": 1,
        });
        let job: ImageJob = serde_json::from_value(job).unwrap();
        jobs.push(job.clone());
        Ok(job)
    }

    async fn image_jobs(&self) -> Result<Vec<ImageJob>, ApiError> {
        Ok(self.images.lock().unwrap().clone())
    }

    async fn find_image_job(&self, id: &str) -> Result<ImageJob, ApiError> {
        let mut jobs = self.images.lock().unwrap();
        let job = jobs.iter_mut().find(|job| job.id == id);
        let job = job.ok_or_else(|| ApiError::unknown("job", id, []))?;
        job.done = (job.done + 50).min(100);
        if job.done == 100 && job.state == JobState::Running {
            job.state = JobState::Done;
            job.sha256 = Some("00ff".into());
            if job.task.to_string().contains("bad") {
                (job.state, job.resumable) = (JobState::Failed, true);
                job.error = Some("reading failed at byte 7".into());
            }
        }
        Ok(job.clone())
    }

    async fn cancel_image_job(&self, id: &str) -> Result<ImageJob, ApiError> {
        let mut jobs = self.images.lock().unwrap();
        let job = jobs.iter_mut().find(|job| job.id == id);
        let job = job.ok_or_else(|| ApiError::unknown("job", id, []))?;
        job.state = JobState::Cancelled;
        Ok(job.clone())
    }

    async fn image_snapshots(&self, _image: &ImageRef) -> Result<Vec<ImageSnapshot>, ApiError> {
        let listed = serde_json::json!([{ "name": "before", "at": 1_700_000_000_000u64 }]);
        Ok(serde_json::from_value(listed).unwrap())
    }

    async fn console(&self, _vm: &VmName) -> Result<Console, ApiError> {
        let (ours, theirs) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(ours);
            write.write_all(b"login: ").await.unwrap();
            let mut buffer = [0; 64];
            while let Ok(n @ 1..) = read.read(&mut buffer).await {
                let upper = buffer[..n].to_ascii_uppercase();
                if write.write_all(&upper).await.is_err() {
                    break;
                }
            }
        });
        Ok(Box::new(theirs))
    }

    async fn logs(&self, _vm: &VmName, options: LogOptions) -> Result<LogStream, ApiError> {
        let text = format!("{} lines\n", options.lines);
        let first = futures_util::stream::iter([Ok(text.into())]);
        if options.follow {
            let rest = futures_util::stream::pending();
            return Ok(Box::pin(futures_util::StreamExt::chain(first, rest)));
        }
        Ok(Box::pin(first))
    }
}

/// The API over the fake, on a real socket.
pub struct Site {
    pub fake: Arc<Fake>,
    pub client: Client,
    pub socket: PathBuf,
    pub stop: watch::Sender<bool>,
    pub server: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Site {
    pub async fn start(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join(quorate_api::SOCKET);
        let fake = Fake::new();
        let (stop, stopping) = watch::channel(false);
        let routes = router(
            Arc::clone(&fake) as Arc<dyn Backend>,
            limits,
            stopping.clone(),
        );
        let path = socket.clone();
        let server = tokio::spawn(async move { serve(routes, &path, stopping).await.unwrap() });
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            assert!(
                tokio::time::Instant::now() < deadline,
                "the API does not listen"
            );
            tokio::task::yield_now().await;
        }
        Self {
            fake,
            client: Client::new(&socket, "alice@h1"),
            socket,
            stop,
            server,
            _dir: dir,
        }
    }

    pub async fn apply(&self, text: &str) -> quorate_api::view::Applied {
        let request = manifest(text);
        self.client
            .post("/api/v1/manifest/apply", &request)
            .await
            .unwrap()
    }
}

pub fn manifest(text: &str) -> quorate_api::view::ManifestRequest {
    quorate_api::view::ManifestRequest {
        text: text.into(),
        file: "test.yaml".into(),
        variables: [("KERNEL".to_owned(), "/boot/k".to_owned())].into(),
        base: None,
    }
}

/// Two VMs; `app` depends on `db`.
pub const TWO: &str = "
vms:
  db: {memory: 128MiB, boot: {kernel: {kernel: '${KERNEL}'}}}
  app: {memory: 128MiB, boot: {kernel: {kernel: '${KERNEL}'}}, depends_on: [db]}
";
