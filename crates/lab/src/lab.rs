//! A lab that is up: bringing it up, the faults, taking it down.

use crate::cgroup::Cgroup;
use crate::faults::{self, Cut, Link};
use crate::guest::GuestImage;
use crate::process::{Found, in_namespace, namespace_of, run};
use crate::san::{self, San, SanStatus};
use crate::site::{Site, SiteSpec};
use crate::supervisor::protocol::{HostStatus, Request, Who};
use crate::supervisor::{control_path, pid_path, request};
use crate::{LabError, Result, interrupt, net, wait};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// For a supervisor to answer after its start, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);
/// For the processes of a lab to end when it is taken down.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A lab.
#[derive(Debug, Clone)]
pub struct Lab {
    site: Site,
}

/// A lab as it is now.
#[derive(Debug, Clone, Serialize)]
pub struct LabStatus {
    /// Name of the site.
    pub site: String,
    /// Its folder.
    pub dir: String,
    /// Its hosts; one whose supervisor does not answer has an error instead.
    pub hosts: Vec<HostLine>,
    /// The SAN, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub san: Option<SanStatus>,
    /// What is cut.
    pub cuts: Vec<Cut>,
    /// Cables that are slow: network and part.
    pub slow: Vec<(String, String)>,
}

/// One host of a [`LabStatus`].
#[derive(Debug, Clone, Serialize)]
pub struct HostLine {
    /// Name.
    pub name: String,
    /// Address of the cluster's traffic.
    pub address: String,
    /// What the supervisor says.
    #[serde(flatten)]
    pub status: Option<HostStatus>,
    /// Why it says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Lab {
    /// Builds a site: network and supervisors; the hosts are off. A failure removes what was made.
    pub fn up(spec: SiteSpec) -> Result<Self> {
        if !rustix::process::getuid().is_root() {
            return Err(LabError::NotRoot);
        }
        let mut site = Site::plan(spec)?;
        if site.record().exists() {
            return Err(LabError::AlreadyUp { site: site.site });
        }
        let root = site.dir.parent().unwrap_or(Path::new("/")).to_owned();
        // What a lab that crashed half-way left behind.
        Self::remove(&root, &site.site)?;
        take_programs(&mut site)?;
        let lab = Self { site };
        lab.build().inspect_err(|_| {
            let _ = Self::remove(&root, &lab.site.site);
        })?;
        Ok(lab)
    }

    fn build(&self) -> Result<()> {
        let site = &self.site;
        site.save()?;
        for dir in [site.shared_dir(), site.bin_dir()] {
            std::fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
        }
        for host in &site.hosts {
            let dir = site.data_dir(host);
            std::fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
        }
        self.write_fence_agent()?;
        if let Ok(image) = GuestImage::find() {
            let dir = site.guest_dir();
            std::fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
            image.copy_to(&dir)?;
        }
        net::build(site)?;
        faults::prepare(site)?;
        if site.san {
            self.san()?.start()?;
        }
        let real_time = run("chrt", &["-R", "-f", "10", "true"]).is_ok();
        for host in &site.hosts {
            self.start_supervisor(host, real_time)?;
        }
        for host in &site.hosts {
            wait::until(
                &format!("start of the supervisor of {host}"),
                START_LIMIT,
                Duration::from_millis(5),
                || request(site, host, &Request::Status).ok(),
            )?;
        }
        Ok(())
    }

    /// `fence_lab`: a fence agent like any other, for a cluster whose hosts are this lab's.
    fn write_fence_agent(&self) -> Result<()> {
        let path = self.site.bin_dir().join("fence_lab");
        let tool: Vec<String> = self
            .site
            .tool
            .iter()
            .map(|word| format!("'{word}'"))
            .collect();
        let script = format!("#!/bin/sh\nexec {} fence-agent \"$@\"\n", tool.join(" "));
        std::fs::write(&path, script).map_err(LabError::file("write", &path))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
            .map_err(LabError::file("make executable", &path))
    }

    /// Starts a supervisor as a child of init, in the host's network namespace.
    fn start_supervisor(&self, host: &str, real_time: bool) -> Result<()> {
        let path = self.site.host_dir(host).join("supervisor.log");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(LabError::file("write", &path))?;
        let errors = log.try_clone().map_err(LabError::file("write", &path))?;
        let mut command = Command::new("setsid");
        command.arg("--fork").arg("nsenter");
        command.arg(format!(
            "--net={}",
            net::namespace_path(&self.site.namespace(host))
        ));
        command.args(["unshare", "--mount", "--propagation", "slave"]);
        if real_time {
            command.args(["chrt", "-R", "-f", "10"]);
        }
        command
            .args(&self.site.tool)
            .args(["supervise", "--host", host, "--record"])
            .arg(self.site.record())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let missing = |source| LabError::MissingTool {
            tool: "setsid".to_owned(),
            source,
        };
        command.status().map_err(missing).map(drop)
    }

    /// Finds a lab that is up.
    pub fn open(root: &Path, site: &str) -> Result<Self> {
        Ok(Self {
            site: Site::load(root, site)?,
        })
    }

    /// What the lab is made of.
    #[must_use]
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Takes the lab down and removes all of it.
    pub fn down(&self) -> Result<()> {
        Self::remove(
            self.site.dir.parent().unwrap_or(Path::new("/")),
            &self.site.site,
        )
    }

    /// Removes a site, whatever is left of it: processes, cgroups, namespaces, files. Idempotent.
    pub fn remove(root: &Path, name: &str) -> Result<()> {
        let site = match Site::load(root, name) {
            Ok(site) => Some(site),
            Err(LabError::NotUp { .. } | LabError::Corrupt { .. }) => None,
            Err(error) => return Err(error),
        };
        for host in site.iter().flat_map(|site| &site.hosts) {
            if let Some(site) = &site
                && control_path(site, host).exists()
            {
                let _ = request(site, host, &Request::Finish);
            }
        }
        Cgroup::remove_site(name);
        end_processes(name)?;
        if let Some(site) = &site {
            san::forget(site);
        }
        net::remove(name)?;
        Cgroup::remove_site(name);
        let dir = root.join(name);
        match std::fs::remove_dir_all(&dir) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(LabError::file("remove", dir)(error)),
        }
    }

    /// The names of the labs that are up.
    #[must_use]
    pub fn all(root: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter(|entry| entry.path().join("lab.json").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// How everything is.
    pub fn status(&self) -> Result<LabStatus> {
        let mut hosts = Vec::new();
        for name in &self.site.hosts {
            let answer = request(&self.site, name, &Request::Status);
            hosts.push(HostLine {
                name: name.clone(),
                address: self.site.cluster_address(name)?.to_string(),
                error: answer.as_ref().err().map(ToString::to_string),
                status: answer.ok(),
            });
        }
        Ok(LabStatus {
            site: self.site.site.clone(),
            dir: self.site.dir.to_string_lossy().into_owned(),
            hosts,
            san: self.san().ok().map(|san| san.status()),
            cuts: faults::list(&self.site)?,
            slow: faults::slow_cables(&self.site),
        })
    }

    /// Asks a host's supervisor for something.
    pub fn ask(&self, host: &str, what: &Request) -> Result<HostStatus> {
        request(&self.site, host, what)
    }

    /// Powers a host on: it boots and starts its daemon.
    pub fn start(&self, host: &str) -> Result<HostStatus> {
        self.ask(host, &Request::On)
    }

    /// Cuts a host's power: SIGKILL to all of its processes at one instant.
    pub fn kill(&self, host: &str) -> Result<HostStatus> {
        self.ask(host, &Request::Off)
    }

    /// Stops processes of a host (SIGSTOP).
    pub fn pause(&self, host: &str, who: Who) -> Result<HostStatus> {
        self.ask(host, &Request::Pause { who })
    }

    /// Lets them go on.
    pub fn resume(&self, host: &str, who: Who) -> Result<HostStatus> {
        self.ask(host, &Request::Resume { who })
    }

    /// Restarts a host's daemon; `hard`: with SIGKILL.
    pub fn restart_daemon(&self, host: &str, hard: bool) -> Result<HostStatus> {
        self.ask(host, &Request::RestartDaemon { hard })
    }

    /// The SAN.
    pub fn san(&self) -> Result<San> {
        San::of(&self.site)
    }

    /// Cuts two parts of the site (hosts, `client` or `san`) from each other; `one_way`: only `from` -> `to`.
    pub fn cut(&self, from: &str, to: &str, link: Link, one_way: bool) -> Result<()> {
        faults::cut(&self.site, from, to, link, one_way)
    }

    /// Cuts a host or the SAN from everything else.
    pub fn isolate(&self, part: &str, link: Link) -> Result<()> {
        faults::isolate(&self.site, part, link)
    }

    /// Loses 30 % of the frames of a host or of the SAN.
    pub fn make_lossy(&self, part: &str, link: Link) -> Result<()> {
        faults::make_lossy(&self.site, part, link)
    }

    /// Lets the cables of a host or of the SAN carry no more than this, each way.
    pub fn slow(&self, part: &str, link: Link, kbit_per_s: u32) -> Result<()> {
        faults::slow(&self.site, part, link, kbit_per_s)
    }

    /// Mends all cables.
    pub fn heal(&self) -> Result<()> {
        faults::heal(&self.site)
    }

    /// A command that will run in a part of the site (a host or `client`) with that host's environment.
    pub fn command(&self, part: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!(
            "--net={}",
            net::namespace_path(&self.site.namespace(part))
        ));
        if let Ok(pid) = std::fs::read_to_string(pid_path(&self.site, part)) {
            command.arg(format!("--mount=/proc/{pid}/ns/mnt"));
        }
        command.arg("--");
        // Entering a mount namespace changes the working directory.
        if let Ok(here) = std::env::current_dir() {
            command.arg("env").arg("-C").arg(here);
        }
        command
            .arg(program)
            .env("QUORATE_DIR", self.site.data_dir(part))
            .env("QUORATE_POOL", self.site.shared_dir())
            .env("QUORATE_GUEST_DIR", self.site.guest_dir())
            .envs(&self.site.environment);
        command
    }
}

/// Copies the programs that the lab runs: a rebuild must not change a lab that is up.
fn take_programs(site: &mut Site) -> Result<()> {
    let dir = site.bin_dir();
    std::fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
    let mut copied: BTreeMap<String, String> = BTreeMap::new();
    for command in [&mut site.daemon, &mut site.tool] {
        let Some(program) = command.first_mut() else {
            continue;
        };
        let path = Path::new(program);
        let Some(name) = path.file_name().filter(|_| path.is_absolute()) else {
            continue;
        };
        if let Some(copy) = copied.get(program) {
            program.clone_from(copy);
            continue;
        }
        let copy = dir.join(name);
        std::fs::copy(path, &copy).map_err(LabError::file("copy the program to", &copy))?;
        let copy = copy.to_string_lossy().into_owned();
        copied.insert(program.clone(), copy.clone());
        *program = copy;
    }
    Ok(())
}

/// Ends every process in the namespaces of a site, supervisors included.
fn end_processes(site: &str) -> Result<()> {
    let namespaces = net::existing(site);
    let inodes = namespaces
        .iter()
        .filter_map(|name| namespace_of(&net::namespace_path(name)));
    for inode in inodes.collect::<Vec<_>>() {
        let kill_all = || {
            let found = in_namespace(inode);
            found
                .iter()
                .for_each(|process: &Found| process.signal(rustix::process::Signal::KILL));
            found.is_empty().then_some(())
        };
        wait::until(
            "end of the lab's processes",
            END_LIMIT,
            Duration::from_millis(5),
            kill_all,
        )?;
    }
    Ok(())
}

/// Takes a lab down when it goes out of scope, when its test panics, and on Ctrl-C.
#[derive(Debug)]
pub struct LabGuard {
    lab: Lab,
    _interrupt: interrupt::Registration,
}

impl LabGuard {
    /// Builds a site that does not outlive this process.
    pub fn up(mut spec: SiteSpec) -> Result<Self> {
        spec.owner = Some(std::process::id());
        let (root, site) = (spec.root.clone(), spec.site.clone());
        let registration = interrupt::on_interrupt(move || {
            let _ = Lab::remove(&root, &site);
        });
        // A test that was killed left its record behind; its processes are gone.
        if let Ok(old) = Lab::open(&spec.root, &spec.site)
            && old.site.owner.is_some()
        {
            old.down()?;
        }
        Ok(Self {
            lab: Lab::up(spec)?,
            _interrupt: registration,
        })
    }
}

impl std::ops::Deref for LabGuard {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Drop for LabGuard {
    fn drop(&mut self) {
        if let Err(error) = self.lab.down() {
            eprintln!("lab {}: cannot clean up: {error}", self.lab.site.site);
        }
    }
}
