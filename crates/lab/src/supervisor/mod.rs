//! The supervisor: the lab's stand-in for a host's hardware and its init system.
//!
//! Owns: everything that runs on the host (one cgroup, or all processes in its network namespace),
//! the host's power, its watchdog, the restarting of the daemon. Always holds: when the host is off
//! or dead, none of its processes runs; a watchdog that was armed and is not fed in time ends the
//! host whatever state its processes are in. Must not: talk to the cluster, or share fate with the
//! host (it is in another cgroup, locked in memory, with real-time priority where that is allowed).
//!
//! ```text
//!            start/on                      kill, off
//!   off  ----------------->  on  ----------------------->  off
//!    ^                       |  watchdog not fed in time
//!    '------- off -------- dead  (until `on`, or the reboot that was asked for)
//! ```

mod host;
pub mod protocol;
mod watchdog;

use crate::site::Site;
use crate::{LabError, Result};
use host::Host;
use protocol::{Reply, Request};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    unmount,
};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Longest request.
const MAX_REQUEST: u64 = 4096;
/// Requests served at the same time.
const MAX_CLIENTS: usize = 16;

/// Which host to supervise.
#[derive(Debug, Clone, clap::Args)]
pub struct SuperviseArgs {
    /// The lab's `lab.json`.
    #[arg(long)]
    pub record: PathBuf,
    /// The host.
    #[arg(long)]
    pub host: String,
}

/// Where a host's supervisor listens.
#[must_use]
pub fn control_path(site: &Site, host: &str) -> PathBuf {
    site.host_dir(host).join("control.sock")
}

/// Holds the pid of a host's supervisor, in whose mount namespace the host's programs run.
pub(crate) fn pid_path(site: &Site, host: &str) -> PathBuf {
    site.host_dir(host).join("supervisor.pid")
}

/// Runs a supervisor until it is told to end. Expects to be in the host's network namespace and in a mount
/// namespace of its own.
pub fn supervise(args: &SuperviseArgs) -> Result<()> {
    let root = args
        .record
        .parent()
        .and_then(Path::parent)
        .unwrap_or(Path::new("/"));
    let name = args
        .record
        .parent()
        .and_then(Path::file_name)
        .unwrap_or_default();
    let site = Site::load(root, &name.to_string_lossy())?;
    site.number(&args.host)?;
    own_sysfs(&site.host_dir(&args.host))?;
    // Without these a busy machine makes the watchdog late, nothing worse.
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| LabError::file("adopt orphans as", &args.record)(error.into()))?;

    let path = pid_path(&site, &args.host);
    std::fs::write(&path, std::process::id().to_string()).map_err(LabError::file("write", path))?;
    let path = control_path(&site, &args.host);
    let _ = std::fs::remove_file(&path);
    let dog = watchdog::Watchdog::bind(&site.host_dir(&args.host))?;
    let host = Arc::new(Host::new(site, &args.host));
    let listener = UnixListener::bind(&path).map_err(LabError::file("listen on", &path))?;
    let serving = Arc::clone(&host);
    std::thread::spawn(move || serve(&listener, &serving));
    let caring = Arc::clone(&host);
    std::thread::spawn(move || caring.care_for_children());
    // On the main thread: real-time priority is not inherited by the others.
    dog.run(&host);
    let _ = std::fs::remove_file(&path);
    Ok(())
}

/// The host's programs read `/sys/class/net`: it must show the host's interfaces. The cgroups stay reachable.
fn own_sysfs(scratch: &Path) -> Result<()> {
    let keep = scratch.join("cgroup");
    let act = || -> std::io::Result<()> {
        std::fs::create_dir_all(&keep)?;
        mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )?;
        mount_bind_recursive("/sys/fs/cgroup", &keep)?;
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), c"")?;
        mount_bind_recursive(&keep, "/sys/fs/cgroup")?;
        unmount(&keep, UnmountFlags::DETACH)?;
        Ok(())
    };
    act().map_err(LabError::file("mount the host's /sys by way of", &keep))
}

fn serve(listener: &UnixListener, host: &Arc<Host>) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let (host, clients) = (Arc::clone(host), Arc::clone(&clients));
        std::thread::spawn(move || {
            let _ = answer(stream, &host);
            clients.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

fn answer(mut stream: UnixStream, host: &Host) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?)
        .take(MAX_REQUEST)
        .read_line(&mut line)?;
    let done = match serde_json::from_str::<Request>(&line) {
        Ok(request) => host.obey(&request),
        Err(error) => Err(format!("cannot read the request: {error}")),
    };
    let reply = match done {
        Ok(()) => Reply {
            error: None,
            status: host.status(),
        },
        Err(error) => Reply {
            error: Some(error),
            status: host.status(),
        },
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    stream.write_all(&bytes)?;
    drop(stream);
    host.finish_if_told();
    Ok(())
}

/// Sends a request to a host's supervisor.
pub fn request(site: &Site, host: &str, request: &Request) -> Result<protocol::HostStatus> {
    site.number(host)?;
    let problem = |problem: String| LabError::Supervisor {
        host: host.to_owned(),
        problem,
        log: site.host_dir(host).join("supervisor.log"),
    };
    let talk = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(control_path(site, host))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut bytes = serde_json::to_vec(request)?;
        bytes.push(b'\n');
        stream.write_all(&bytes)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    let line = talk().map_err(|error| problem(format!("does not answer ({error})")))?;
    let reply: Reply = serde_json::from_str(&line)
        .map_err(|error| problem(format!("answered nonsense ({error})")))?;
    match reply.error {
        None => Ok(reply.status),
        Some(error) => Err(problem(error)),
    }
}
