//! A cluster in a lab, for one test: bring it up, look at it, break it, judge it.
//!
//! Always holds: one lab at a time (they share two cores and the figures would lie); what a test
//! brings up is gone when the test ends, also when it panics, is interrupted or killed; a failed
//! test prints what the cluster and its daemons said. Commands go through the real command line;
//! looks, of which there are many, through the API's own client on the host's socket.

pub(crate) mod bare;
pub(crate) mod guest;
pub(crate) mod measure;
pub(crate) mod process;
pub(crate) mod service;
pub(crate) mod silence;
pub(crate) mod witness;

use guest::Guest;
use process::Copy;
use quorate_api::Client;
use quorate_api::view::{ClusterView, Explanation, HostState, HostView, VmState, VmView};
use quorate_lab::guest::GuestImage;
use quorate_lab::supervisor::protocol::{HostStatus, Request};
use quorate_lab::{LabGuard, SiteSpec, wait};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// For anything that a healthy cluster does by itself: boots of emulated guests included.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// Between two looks.
const STEP: Duration = Duration::from_millis(25);

static ONE_LAB: Mutex<()> = Mutex::new(());

/// What kind of cluster.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Hosts.
    pub(crate) hosts: u32,
    /// Lines of the `cluster:` section, indented by two spaces; `{dir}` is the lab's folder.
    pub(crate) settings: String,
    /// The hosts have watchdogs.
    pub(crate) watchdog: bool,
    /// There is a SAN.
    pub(crate) san: bool,
    /// More environment for the daemons.
    pub(crate) environment: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: 3,
            settings: String::new(),
            watchdog: true,
            san: false,
            environment: Vec::new(),
        }
    }
}

/// A cluster that is up.
pub(crate) struct Cluster {
    pub(crate) lab: LabGuard,
    runtime: tokio::runtime::Runtime,
    begun: Instant,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Three hosts with the default settings.
    pub(crate) fn up() -> Self {
        Self::with(Options::default())
    }

    /// A cluster of this kind, formed as a user would: `init`, tokens, `join`.
    pub(crate) fn with(options: Options) -> Self {
        let cluster = Self::machines(&options);
        let settings = (!options.settings.is_empty()).then(|| {
            let dir = cluster.lab.site().dir.to_string_lossy().into_owned();
            let text = format!("cluster:\n{}", options.settings.replace("{dir}", &dir));
            cluster.file("settings.yaml", &text)
        });
        cluster
            .lab
            .form_cluster("lab", settings.as_deref())
            .unwrap();
        cluster.wait_healthy();
        cluster.say("the cluster is formed");
        cluster
    }

    /// Three hosts whose daemons have more environment.
    pub(crate) fn with_environment(environment: &[(&str, &str)]) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Self::with(Options {
            environment: environment.iter().map(owned).collect(),
            ..Options::default()
        })
    }

    /// Only the machines, powered off.
    pub(crate) fn machines(options: &Options) -> Self {
        let turn = ONE_LAB.lock().unwrap_or_else(PoisonError::into_inner);
        let program = Path::new(env!("CARGO_BIN_EXE_quorate"));
        let mut spec = SiteSpec::new(program);
        spec.site = format!("t{}", std::process::id() % 10_000_000);
        spec.hosts = options.hosts;
        spec.san = options.san;
        spec.environment.extend(options.environment.iter().cloned());
        if !options.watchdog {
            spec.daemon = ["env", "-u", "QUORATE_WATCHDOG"]
                .map(str::to_owned)
                .to_vec();
            spec.daemon.push(program.to_string_lossy().into_owned());
        }
        // The harness of the test runner has written a line without its end.
        println!();
        GuestImage::find().unwrap();
        Self {
            lab: LabGuard::up(spec).unwrap(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            begun: Instant::now(),
            _turn: turn,
        }
    }

    /// One line of the test's own story.
    pub(crate) fn say(&self, text: &str) {
        println!("  {:7.2} s  {text}", self.begun.elapsed().as_secs_f64());
    }

    /// Writes a file into the lab's folder.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.lab.site().dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn hosts(&self) -> Vec<String> {
        self.lab.site().hosts.clone()
    }

    /// The guest image as the hosts see it.
    pub(crate) fn image(&self) -> GuestImage {
        let dir = self.lab.site().guest_dir();
        GuestImage {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.img"),
        }
    }

    // --- looking ---------------------------------------------------------------------------

    fn client(&self, host: &str) -> Client {
        let socket = self.lab.site().data_dir(host).join(quorate_api::SOCKET);
        Client::new(socket, "lab test").timeout(Duration::from_secs(3))
    }

    pub(crate) fn get<T: serde::de::DeserializeOwned>(
        &self,
        host: &str,
        path: &str,
    ) -> Result<T, String> {
        let client = self.client(host);
        self.runtime
            .block_on(client.get(path))
            .map_err(|error| format!("{host}: {error}"))
    }

    /// The cluster as one host sees it.
    pub(crate) fn view_from(&self, host: &str) -> Result<ClusterView, String> {
        self.get(host, "/api/v1/cluster")
    }

    /// The same, asked until it answers: on a busy machine one look may take too long.
    pub(crate) fn seen_by(&self, host: &str) -> ClusterView {
        self.eventually(&format!("an answer of {host}"), LONG, || {
            self.view_from(host)
        })
    }

    /// The cluster as a host with a quorum sees it.
    pub(crate) fn try_view(&self) -> Result<ClusterView, String> {
        let mut last = String::new();
        for host in self.hosts() {
            match self.view_from(&host) {
                Ok(view) if view.cluster.quorate && view.cluster.leader.is_some() => {
                    return Ok(view);
                }
                Ok(_) => last = format!("{host} knows no leader"),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(crate) fn view(&self) -> ClusterView {
        self.eventually("a host with a quorum", LONG, || self.try_view())
    }

    /// A host whose daemon answers with a quorum: where commands are given.
    pub(crate) fn desk(&self) -> String {
        self.view().cluster.answered_by.to_string()
    }

    pub(crate) fn leader(&self) -> String {
        self.wait("a leader", LONG, |view| {
            let leader = view.cluster.leader.as_ref().ok_or("none")?;
            Ok(leader.to_string())
        })
    }

    /// A host that does not lead.
    pub(crate) fn follower(&self) -> String {
        let leader = self.leader();
        self.hosts()
            .into_iter()
            .find(|host| *host != leader)
            .unwrap()
    }

    /// Waits for something; the last reason why not is in the failure.
    pub(crate) fn eventually<T>(
        &self,
        what: &str,
        limit: Duration,
        mut probe: impl FnMut() -> Result<T, String>,
    ) -> T {
        let mut last = String::new();
        let found = wait::until(what, limit, STEP, || match probe() {
            Ok(value) => Some(value),
            Err(why) => {
                last = why;
                None
            }
        });
        found.unwrap_or_else(|error| panic!("{error}; last: {last}"))
    }

    /// Waits until the cluster is as wanted.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut probe: impl FnMut(&ClusterView) -> Result<T, String>,
    ) -> T {
        self.eventually(what, limit, || probe(&self.try_view()?))
    }

    /// Watches for a while that something holds all the time.
    pub(crate) fn holds(
        &self,
        what: &str,
        span: Duration,
        mut probe: impl FnMut() -> Result<(), String>,
    ) {
        let end = Instant::now() + span;
        while Instant::now() < end {
            if let Err(why) = probe() {
                panic!("{what} did not hold: {why}");
            }
            wait::pause(STEP * 2);
        }
    }

    /// Every host up, armed where it can be, and voting.
    pub(crate) fn wait_healthy(&self) {
        let count = self.hosts().len();
        self.wait("all hosts up", LONG, |view| {
            let bad = view.hosts.iter().find(|host| {
                host.state != HostState::Up || !host.links_down.is_empty() || !host.guard
            });
            let voters = view.hosts.iter().filter(|host| host.voter).count();
            let wanted = if count < 3 { 1 } else { 3 };
            match bad {
                Some(host) => Err(format!("{host:?}")),
                None if view.hosts.len() < count => Err(format!("{} hosts", view.hosts.len())),
                None if voters < wanted => Err(format!("{voters} voters")),
                None => Ok(()),
            }
        });
    }

    pub(crate) fn vm(&self, name: &str) -> VmView {
        find_vm(&self.view(), name).unwrap()
    }

    /// The host that owns a VM.
    pub(crate) fn owner(&self, name: &str) -> String {
        self.vm(name).host.unwrap().to_string()
    }

    pub(crate) fn explain(&self, name: &str) -> Explanation {
        let path = format!("/api/v1/vms/{name}/explain");
        self.eventually("an explanation", LONG, || self.get(&self.desk(), &path))
    }

    /// Every text of an explanation, for looking words up in.
    pub(crate) fn why(&self, name: &str) -> String {
        let explained = self.explain(name);
        let mut text = format!("{}\n{:?}\n", explained.vm.why, explained.vm.problem);
        for decision in explained.decisions {
            text += &format!(
                "{}: {} {:?}\n",
                decision.action, decision.summary, decision.evidence
            );
        }
        for event in explained.events {
            text += &format!("{}: {}\n", event.kind, event.text);
        }
        text
    }

    pub(crate) fn status(&self, host: &str) -> HostStatus {
        self.lab.ask(host, &Request::Status).unwrap()
    }

    // --- processes -------------------------------------------------------------------------

    fn namespaces(&self) -> BTreeMap<String, u64> {
        let site = self.lab.site();
        let inode = |host: &String| {
            let path = format!("/run/netns/{}", site.namespace(host));
            Some((host.clone(), process::namespace(&path)?))
        };
        site.hosts.iter().filter_map(inode).collect()
    }

    /// All QEMU processes of a VM on all hosts.
    pub(crate) fn copies(&self, vm: &str) -> Vec<Copy> {
        process::copies(&self.namespaces(), vm)
    }

    /// The VM's only process.
    pub(crate) fn copy(&self, vm: &str) -> Copy {
        self.eventually(&format!("one process of {vm}"), LONG, || {
            let mut copies = self.copies(vm);
            match copies.len() {
                1 => Ok(copies.remove(0)),
                _ => Err(format!("{copies:?}")),
            }
        })
    }

    /// Waits for a process of a VM that is none of those, and returns it.
    pub(crate) fn new_copy(&self, vm: &str, old: &[Copy], limit: Duration) -> Copy {
        self.eventually(&format!("a new process of {vm}"), limit, || {
            let mut new = self.copies(vm);
            new.retain(|copy| !old.contains(copy));
            new.pop().ok_or_else(|| format!("only {old:?}"))
        })
    }

    /// Waits until exactly one copy of a VM exists and runs, on the host that the cluster names.
    pub(crate) fn wait_one_copy(&self, vm: &str, limit: Duration) -> Copy {
        self.eventually(&format!("exactly one running copy of {vm}"), limit, || {
            let view = find_vm(&self.try_view()?, vm)?;
            if view.state != VmState::Running || view.migration.is_some() {
                return Err(format!("{view:?}"));
            }
            let copies = self.copies(vm);
            let running = process::running(&copies);
            match (copies.as_slice(), running.as_slice()) {
                ([_], [one])
                    if view
                        .host
                        .as_ref()
                        .is_some_and(|host| host.as_str() == one.host) =>
                {
                    Ok(one.clone())
                }
                _ => Err(format!("{copies:?}, running {running:?}, {view:?}")),
            }
        })
    }

    /// Processes of a host whose arguments hold this word behind the program: `serve`, `guard`.
    pub(crate) fn programs(&self, host: &str, word: &str) -> Vec<i32> {
        let inode = self.namespaces()[host];
        process::in_namespace(inode)
            .into_iter()
            .filter(|(_, words)| {
                words
                    .first()
                    .is_some_and(|program| program.ends_with("quorate"))
                    && words.iter().skip(1).any(|other| other == word)
            })
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Processes of a host that serve copies of disks.
    pub(crate) fn storage_daemons(&self, host: &str) -> Vec<i32> {
        let inode = self.namespaces()[host];
        let serves = |words: &[String]| {
            let program = words.first();
            program.is_some_and(|program| program.ends_with("qemu-storage-daemon"))
        };
        process::in_namespace(inode)
            .into_iter()
            .filter(|(_, words)| serves(words))
            .map(|(pid, _)| pid)
            .collect()
    }

    // --- acting ----------------------------------------------------------------------------

    /// A command, given on a host that answers.
    pub(crate) fn quorate(&self, arguments: &[&str]) -> Result<String, String> {
        let desk = self.desk();
        self.lab
            .quorate_for(&desk, arguments, Duration::from_secs(180))
            .map_err(|error| error.to_string())
    }

    pub(crate) fn must(&self, arguments: &[&str]) -> String {
        self.quorate(arguments).unwrap()
    }

    /// Applies a manifest's text.
    pub(crate) fn apply_text(&self, text: &str) -> Result<String, String> {
        let path = self.file("manifest.yaml", text);
        self.quorate(&["apply", "-f", &path.to_string_lossy()])
    }

    /// Applies guests, with the network and the pool that they need.
    pub(crate) fn apply(&self, guests: &[Guest]) {
        let pools = self.pools();
        let text = guest::manifest(guests, &self.image(), &pools);
        self.apply_text(&text).unwrap();
    }

    /// The `pools:` section: the shared directory, and the SAN if there is one.
    pub(crate) fn pools(&self) -> String {
        let site = self.lab.site();
        let mut text = format!(
            "pools:\n  shared: {{kind: directory, path: {}}}\n",
            site.shared_dir().display()
        );
        if site.san {
            text += &format!("  san: {}\n", self.lab.san().unwrap().pool().unwrap());
        }
        text
    }

    /// Where the bytes of a guest's disk are, for looking behind everybody's back.
    pub(crate) fn disk_file(&self, guest: &Guest) -> PathBuf {
        match guest.lun {
            true => self.lab.san().unwrap().lun(&guest.name).unwrap().file,
            false => {
                let dir = self.lab.site().shared_dir();
                dir.join(format!("{}.raw", guest.name))
            }
        }
    }

    /// Applies guests and waits until they run and are ready.
    pub(crate) fn run(&self, guests: &[Guest]) {
        self.apply(guests);
        let names: Vec<&str> = guests.iter().map(|guest| guest.name.as_str()).collect();
        self.wait_ready(&names, Duration::from_secs(120));
        self.say(&format!("ready: {}", names.join(" ")));
    }

    pub(crate) fn wait_ready(&self, names: &[&str], limit: Duration) {
        self.wait("ready guests", limit, |view| {
            names.iter().try_for_each(|name| {
                let vm = find_vm(view, name)?;
                if vm.state == VmState::Running && vm.ready && vm.migration.is_none() {
                    Ok(())
                } else {
                    Err(format!("{vm:?}"))
                }
            })
        });
    }

    /// Brings a VM to a host, live.
    pub(crate) fn place(&self, vm: &str, host: &str) {
        if self.owner(vm) != host {
            self.must(&["vm", "migrate", vm, "--to", host, "--wait"]);
        }
    }

    /// Cuts a host's power; the instant at which its processes were stopped, since the machine's boot.
    pub(crate) fn cut_power(&self, host: &str) -> Duration {
        self.lab.kill(host).unwrap();
        let line = self.history(host, "power off").pop().unwrap();
        let micros = |key: &str| Duration::from_micros(line[key].as_u64().unwrap());
        micros("boottime_us") - micros("took_us")
    }

    /// Lines of a host's history about one kind of event.
    pub(crate) fn history(&self, host: &str, event: &str) -> Vec<serde_json::Value> {
        let path = self.lab.site().host_dir(host).join("events.jsonl");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|line| line["event"] == event)
            .collect()
    }

    /// Powers a host on and waits until everything is well again.
    pub(crate) fn boot(&self, host: &str) {
        self.lab.start(host).unwrap();
        self.wait_healthy();
    }

    /// The last lines of a daemon's log.
    pub(crate) fn log_tail(&self, host: &str, lines: usize) -> String {
        let bytes = std::fs::read(self.lab.site().daemon_log(host)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// What a failed test wants to know.
    fn diagnose(&self) {
        println!("\n--- what the lab was like ---");
        for host in self.hosts() {
            println!("--- {host}: {:?}", self.lab.ask(&host, &Request::Status));
            println!("{}", self.log_tail(&host, 60));
        }
        for host in self.hosts() {
            for words in [&["status"][..], &["events", "-n", "60"]] {
                let limit = Duration::from_secs(5);
                match self.lab.quorate_for(&host, words, limit) {
                    Ok(text) => println!("--- {host}: quorate {}\n{text}", words.join(" ")),
                    Err(error) => println!("--- {host}: quorate {}: {error}", words.join(" ")),
                }
            }
        }
        if let Ok(view) = self.try_view() {
            for vm in &view.vms {
                let name = vm.name.as_str();
                println!("--- {name}: {:?}", self.copies(name));
                match self.quorate(&["vm", "logs", name, "-n", "15"]) {
                    Ok(text) => println!("{text}"),
                    Err(error) => println!("no console of {name}: {error}"),
                }
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.diagnose();
        }
    }
}

/// A VM of a view.
pub(crate) fn find_vm(view: &ClusterView, name: &str) -> Result<VmView, String> {
    let found = view.vms.iter().find(|vm| vm.name.as_str() == name);
    found.cloned().ok_or_else(|| format!("no VM {name}"))
}

/// A host of a view.
pub(crate) fn find_host(view: &ClusterView, name: &str) -> Result<HostView, String> {
    let found = view.hosts.iter().find(|host| host.name.as_str() == name);
    found.cloned().ok_or_else(|| format!("no host {name}"))
}
