//! What QEMU on this host can do.
//!
//! Owns: [`HostFacts`], asked from a QEMU without a machine, and the choice of the accelerator, which is
//! proven by a trial boot: `/dev/kvm` may exist and yet not run a guest (nested without support, wrong
//! permissions, a hypervisor that traps what kernels use).
//!
//! Must not: cache. The caller keeps the facts and probes again when QEMU or the kernel changes.

mod trial;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout_at};

use super::command_line::SANDBOX;
use super::qmp::{QmpClient, QmpError};
use crate::config::Accel;
use crate::error::HypervisorError;

/// Bound of all questions to a QEMU without a machine.
const ASK_WITHIN: Duration = Duration::from_secs(10);
/// Pause between two looks at a socket that is not there yet.
const SOCKET_LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Which accelerator to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelChoice {
    /// Hardware virtualisation if a trial boot works, software emulation otherwise.
    #[default]
    Auto,
    /// This one, untried.
    Fixed(Accel),
}

/// How to probe.
#[derive(Debug, Clone)]
pub struct ProbeOptions {
    /// The QEMU program.
    pub binary: PathBuf,
    /// An existing directory for a socket and a small image; what is made there is removed again.
    pub scratch_dir: PathBuf,
    /// Which accelerator.
    pub accel: AccelChoice,
    /// A kernel that guests will boot, for a trial that means something; otherwise a boot sector is tried.
    pub kernel: Option<PathBuf>,
    /// How long the trial boot may take.
    pub trial_within: Duration,
}

impl ProbeOptions {
    /// The defaults: automatic choice, a boot sector, three seconds.
    #[must_use]
    pub fn new(binary: impl Into<PathBuf>, scratch_dir: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            scratch_dir: scratch_dir.into(),
            accel: AccelChoice::Auto,
            kernel: None,
            trial_within: Duration::from_secs(3),
        }
    }
}

/// What QEMU on this host can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Version, as `10.0.2`.
    pub version: String,
    /// The accelerator to use.
    pub accel: Accel,
    /// Why that one.
    pub accel_reason: String,
    /// The machine types.
    pub machines: Vec<MachineType>,
    /// The CPU models, under that accelerator.
    pub cpu_models: Vec<CpuModel>,
    /// System calls can be confined, in the way guests are.
    pub sandbox: bool,
    /// A frozen guest can give up its disks (`blockdev-set-active`).
    pub releases_disks: bool,
}

/// A machine type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineType {
    /// Its full name, as `pc-q35-10.0`.
    pub name: String,
    /// The short name that means it in this QEMU.
    pub alias: Option<String>,
    /// It will be removed.
    pub deprecated: bool,
}

/// A CPU model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// It means the same on every host, so that a guest can migrate.
    pub migration_safe: bool,
    /// What this host lacks for it; empty when it can be used.
    pub missing: Vec<String>,
}

impl HostFacts {
    /// The full name of a machine type: `q35` becomes `pc-q35-10.0`. `None` when this QEMU has no such machine.
    #[must_use]
    pub fn resolve_machine(&self, name: &str) -> Option<&str> {
        let by_alias = self
            .machines
            .iter()
            .find(|m| m.alias.as_deref() == Some(name));
        let found = by_alias.or_else(|| self.machines.iter().find(|m| m.name == name));
        found.map(|machine| machine.name.as_str())
    }

    /// The CPU models with which a guest can run here and migrate, by name.
    pub fn usable_cpu_models(&self) -> impl Iterator<Item = &str> {
        let usable = |model: &&CpuModel| model.migration_safe && model.missing.is_empty();
        self.cpu_models
            .iter()
            .filter(usable)
            .map(|model| model.name.as_str())
    }
}

/// Examines QEMU on this host.
///
/// # Errors
/// [`HypervisorError::Probe`] when QEMU cannot be run or does not answer.
pub async fn probe(options: &ProbeOptions) -> Result<HostFacts, HypervisorError> {
    let (accel, accel_reason) = choose_accel(options).await;
    let deadline = Instant::now() + ASK_WITHIN;
    let (asked, sandbox) = match Asked::start(options, accel, true, deadline).await {
        Ok(asked) => (asked, true),
        Err(with_sandbox) => match Asked::start(options, accel, false, deadline).await {
            Ok(asked) => {
                tracing::warn!(%with_sandbox, "this QEMU cannot be confined");
                (asked, false)
            }
            Err(error) => return Err(error),
        },
    };
    let version = asked.client.greeting().version;
    let machines = parse_machines(&asked.ask("query-machines", deadline).await?);
    let cpu_models = parse_cpu_models(&asked.ask("query-cpu-definitions", deadline).await?);
    let left = deadline.saturating_duration_since(Instant::now());
    let schema = asked
        .client
        .schema(left)
        .await
        .map_err(|error| probe_error(&error))?;
    Ok(HostFacts {
        version: format!("{}.{}.{}", version.0, version.1, version.2),
        accel,
        accel_reason,
        machines,
        cpu_models,
        sandbox,
        releases_disks: schema.has_command("blockdev-set-active"),
    })
}

async fn choose_accel(options: &ProbeOptions) -> (Accel, String) {
    match options.accel {
        AccelChoice::Fixed(accel) => (accel, "configured".to_owned()),
        AccelChoice::Auto => match trial::boot(options, Accel::Kvm).await {
            Ok(proof) => (Accel::Kvm, proof),
            Err(reason) => (Accel::Tcg, format!("KVM failed its trial boot: {reason}")),
        },
    }
}

/// Boots a tiny guest under this accelerator; the text says what was seen.
///
/// # Errors
/// What was seen instead.
pub async fn trial_boot(options: &ProbeOptions, accel: Accel) -> Result<String, String> {
    trial::boot(options, accel).await
}

fn probe_error(error: &QmpError) -> HypervisorError {
    HypervisorError::Probe {
        detail: error.to_string(),
    }
}

/// A QEMU without a machine, to be asked. It ends when this is dropped.
struct Asked {
    client: QmpClient,
    _child: Child,
    _socket: Scratch,
}

impl Asked {
    async fn start(
        options: &ProbeOptions,
        accel: Accel,
        sandbox: bool,
        deadline: Instant,
    ) -> Result<Self, HypervisorError> {
        let socket = Scratch::new(&options.scratch_dir, "ask.sock");
        let mut command = Command::new(&options.binary);
        command
            .args([
                "-machine",
                "none",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-S",
            ])
            .args(["-accel", accel.as_str()])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.path_escaped()))
            .args(
                sandbox
                    .then_some(["-sandbox", SANDBOX])
                    .into_iter()
                    .flatten(),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| HypervisorError::Probe {
            detail: format!(
                "cannot execute {}: {error}; install QEMU or set its path",
                options.binary.display()
            ),
        })?;
        let connect = async {
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                match QmpClient::connect(&socket.path, left).await {
                    Err(QmpError::Connect { .. }) => sleep(SOCKET_LOOK_AGAIN).await,
                    other => return other,
                }
            }
        };
        let client = tokio::select! {
            client = timeout_at(deadline, connect) => client
                .map_err(|_| HypervisorError::Probe { detail: "QEMU does not answer".into() })?
                .map_err(|error| probe_error(&error))?,
            status = child.wait() => {
                let status = status.map_or_else(|e| e.to_string(), |status| status.to_string());
                return Err(HypervisorError::Probe { detail: format!("QEMU ended at once: {status}") });
            }
        };
        Ok(Self {
            client,
            _child: child,
            _socket: socket,
        })
    }

    async fn ask(&self, command: &str, deadline: Instant) -> Result<Value, HypervisorError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let reply = self.client.execute(command, Value::Null, left).await;
        reply.map_err(|error| probe_error(&error))
    }
}

/// A file in the scratch directory that is removed in the end.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(dir: &Path, name: &str) -> Self {
        Self {
            path: dir.join(format!("probe-{}-{name}", std::process::id())),
        }
    }
    fn path_escaped(&self) -> String {
        self.path.to_string_lossy().replace(',', ",,")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn parse_machines(reply: &Value) -> Vec<MachineType> {
    let entries = reply.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut machines: Vec<MachineType> = entries
        .iter()
        .filter_map(|entry| {
            Some(MachineType {
                name: entry["name"].as_str()?.to_owned(),
                alias: entry["alias"].as_str().map(str::to_owned),
                deprecated: entry["deprecated"].as_bool().unwrap_or(false),
            })
        })
        .collect();
    machines.sort_by(|a, b| a.name.cmp(&b.name));
    machines
}

fn parse_cpu_models(reply: &Value) -> Vec<CpuModel> {
    let entries = reply.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut models: Vec<CpuModel> = entries
        .iter()
        .filter_map(|entry| {
            // Without the list QEMU does not know, so the model does not count as usable.
            let missing = entry["unavailable-features"].as_array().map_or_else(
                || vec!["unknown".to_owned()],
                |list| {
                    list.iter()
                        .filter_map(|f| f.as_str().map(str::to_owned))
                        .collect()
                },
            );
            Some(CpuModel {
                name: entry["name"].as_str()?.to_owned(),
                migration_safe: entry["migration-safe"].as_bool().unwrap_or(false),
                missing,
            })
        })
        .collect();
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn aliases_are_resolved_and_models_judged() {
        let facts = HostFacts {
            version: "10.0.2".into(),
            accel: Accel::Tcg,
            accel_reason: String::new(),
            machines: parse_machines(&json!([
                { "name": "pc-q35-10.0", "alias": "q35", "cpu-max": 288 },
                { "name": "microvm" },
                { "alias": "nameless" }
            ])),
            cpu_models: parse_cpu_models(&json!([
                { "name": "Nehalem", "migration-safe": true, "unavailable-features": [] },
                { "name": "EPYC", "migration-safe": true, "unavailable-features": ["xsaves"] },
                { "name": "host", "migration-safe": false, "unavailable-features": [] },
                { "name": "new", "migration-safe": true }
            ])),
            sandbox: true,
            releases_disks: true,
        };
        assert_eq!(facts.resolve_machine("q35"), Some("pc-q35-10.0"));
        assert_eq!(facts.resolve_machine("pc-q35-10.0"), Some("pc-q35-10.0"));
        assert_eq!(facts.resolve_machine("microvm"), Some("microvm"));
        assert_eq!(facts.resolve_machine("vax"), None);
        assert_eq!(facts.usable_cpu_models().collect::<Vec<_>>(), ["Nehalem"]);
    }
}
