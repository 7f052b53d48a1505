//! The cluster in the lab, driven by its command line as a user would.
//!
//! Always holds: only `quorate` commands and their JSON are used; fields that are not known are
//! ignored. What the lab needs of `quorate status` is in [`ClusterView`].

use crate::lab::Lab;
use crate::site::CLUSTER_PORT;
use crate::{LabError, Result, wait};
use serde::Deserialize;
use std::io::Read as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// For one `quorate` command.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// For a daemon to answer after its start.
const DAEMON_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at the cluster; each is a process of its own.
const STEP: Duration = Duration::from_millis(100);

/// What `quorate status --output json` says, as far as the lab looks.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ClusterView {
    /// The cluster.
    pub cluster: ClusterLine,
    /// Its hosts.
    pub hosts: Vec<HostView>,
    /// Its VMs.
    pub vms: Vec<VmView>,
}

/// The cluster as a whole.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ClusterLine {
    /// Name.
    pub name: String,
    /// The host that leads.
    pub leader: Option<String>,
    /// A majority of voters answers.
    pub quorate: bool,
}

/// A host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct HostView {
    /// Name.
    pub name: String,
    /// State, as a word.
    pub state: String,
    /// It votes.
    pub voter: bool,
}

/// A VM.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VmView {
    /// Name.
    pub name: String,
    /// State, as a word.
    pub state: String,
    /// Its owner.
    pub host: Option<String>,
    /// Epoch of its ownership.
    pub epoch: u64,
    /// Its ready check has succeeded.
    pub ready: bool,
}

/// A line of `quorate events --output json`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct EventLine {
    /// Position in the log.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub at: u64,
    /// `start`, `release`, `migration`, ...
    pub kind: String,
    /// `vm/db`, `host/h1`, ...
    pub subject: String,
    /// One sentence.
    pub text: String,
}

impl ClusterView {
    /// A VM by name.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<&VmView> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// A host by name.
    #[must_use]
    pub fn host(&self, name: &str) -> Option<&HostView> {
        self.hosts.iter().find(|host| host.name == name)
    }

    /// VMs owned by a host.
    #[must_use]
    pub fn vms_on(&self, host: &str) -> Vec<&str> {
        let mine = self
            .vms
            .iter()
            .filter(|vm| vm.host.as_deref() == Some(host));
        mine.map(|vm| vm.name.as_str()).collect()
    }
}

/// As many voters as the cluster takes of so many hosts: an odd number, at most five.
fn wanted_voters(hosts: usize) -> usize {
    match hosts {
        0..=2 => 1,
        3 | 4 => 3,
        _ => 5,
    }
}

impl Lab {
    /// Makes the cluster: `init` on the first host, one-time tokens and `join` on the others.
    pub fn form_cluster(&self, name: &str, settings: Option<&Path>) -> Result<()> {
        let site = self.site();
        let mut hosts = site.hosts.iter();
        let Some(first) = hosts.next() else {
            return Ok(());
        };
        let address = |host: &str| -> Result<String> {
            Ok(format!("{}:{CLUSTER_PORT}", site.cluster_address(host)?))
        };
        let own = address(first)?;
        let mut init = vec!["init", "--name", name, "--host", first, "--address", &own];
        let settings = settings.map(|path| path.to_string_lossy().into_owned());
        if let Some(path) = &settings {
            init.extend(["--settings", path]);
        }
        self.quorate(first, &init)?;
        self.start(first)?;
        self.wait_status(first, "the first host leads", |view| view.cluster.quorate)?;
        for host in hosts {
            let answer = self.quorate(first, &["token", "create"])?;
            let token = answer.split_whitespace().next_back().unwrap_or_default();
            self.quorate(
                host,
                &["join", token, "--host", host, "--address", &address(host)?],
            )?;
            self.start(host)?;
        }
        let all = site.hosts.len();
        self.wait_status(first, "all hosts have joined", |view| {
            let voters = view.hosts.iter().filter(|host| host.voter).count();
            let settled = voters >= wanted_voters(all);
            view.cluster.quorate && view.hosts.len() == all && settled
        })?;
        Ok(())
    }

    /// Runs a `quorate` command for a host; its standard output.
    pub fn quorate(&self, host: &str, arguments: &[&str]) -> Result<String> {
        self.quorate_for(host, arguments, COMMAND_LIMIT)
    }

    /// The same with a limit of one's own.
    pub fn quorate_for(&self, host: &str, arguments: &[&str], limit: Duration) -> Result<String> {
        self.site().number(host)?;
        let daemon = &self.site().daemon;
        let missing = |source| LabError::MissingTool {
            tool: daemon.join(" "),
            source,
        };
        let Some((program, rest)) = daemon.split_first() else {
            return Err(missing(std::io::ErrorKind::NotFound.into()));
        };
        let mut child = self
            .command(host, program)
            .args(rest)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(missing)?;
        let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = err.as_mut().map(|pipe| pipe.read_to_string(&mut text));
            text
        });
        let output = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = out.as_mut().map(|pipe| pipe.read_to_string(&mut text));
            text
        });
        let command = format!("quorate {}", arguments.join(" "));
        let status = wait::until(&command, limit, Duration::from_millis(2), || {
            child.try_wait().ok().flatten()
        })
        .inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let output = output.join().unwrap_or_default();
        if status.success() {
            return Ok(output.trim().to_owned());
        }
        let errors = errors.join().unwrap_or_default();
        let said = if errors.trim().is_empty() {
            output
        } else {
            errors
        };
        Err(LabError::Command {
            command,
            output: said.trim().to_owned(),
        })
    }

    /// A `quorate` command with `--output json`.
    pub fn quorate_json(&self, host: &str, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let text = self.quorate(host, &all)?;
        serde_json::from_str(&text).map_err(|_| LabError::Answer {
            tool: format!("quorate {}", arguments.join(" ")),
            output: text,
        })
    }

    /// The cluster as one host sees it.
    pub fn view(&self, host: &str) -> Result<ClusterView> {
        let answer = self.quorate_json(host, &["status"])?;
        serde_json::from_value(answer.clone()).map_err(|_| LabError::Answer {
            tool: "quorate status".to_owned(),
            output: answer.to_string(),
        })
    }

    /// The newest events, oldest first.
    pub fn events(&self, host: &str) -> Result<Vec<EventLine>> {
        let answer = self.quorate_json(host, &["events", "-n", "500"])?;
        let mut events: Vec<EventLine> =
            serde_json::from_value(answer.clone()).map_err(|_| LabError::Answer {
                tool: "quorate events".to_owned(),
                output: answer.to_string(),
            })?;
        events.sort_by_key(|event| event.sequence);
        Ok(events)
    }

    /// Waits until the cluster, as one host sees it, is as wanted.
    pub fn wait_status(
        &self,
        host: &str,
        what: &str,
        good: impl FnMut(&ClusterView) -> bool,
    ) -> Result<ClusterView> {
        self.wait_status_for(host, what, DAEMON_LIMIT, good)
    }

    /// The same with a limit of one's own.
    pub fn wait_status_for(
        &self,
        host: &str,
        what: &str,
        limit: Duration,
        mut good: impl FnMut(&ClusterView) -> bool,
    ) -> Result<ClusterView> {
        let mut last = String::from("nothing");
        let found = wait::until(what, limit, STEP, || match self.view(host) {
            Ok(view) if good(&view) => Some(view),
            Ok(view) => {
                last = format!("{view:?}");
                None
            }
            Err(error) => {
                last = error.to_string();
                None
            }
        });
        found.map_err(|error| match error {
            LabError::Timeout { what, seconds, .. } => LabError::Timeout {
                what,
                seconds,
                hint: format!(
                    ": host {host} said last {last}; its log is {}",
                    self.site().daemon_log(host).display()
                ),
            },
            other => other,
        })
    }
}
