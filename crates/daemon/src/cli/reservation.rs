//! `storage keys` and `storage drill`: who may write a LUN of this host's kernel, and what its SAN can prove. Asks the
//! device itself; needs no daemon, and changes nothing but a scratch LUN's registrations.

use super::error::CliError;
use super::output::{Output, Tone, cell, count, trimmed};
use clap::{Args, ValueHint};
use quorate_storage::StorageFence;
use quorate_storage::reservation::{
    ClusterTag, DrillReport, Inspection, LinuxDevice, Reservation, ReservationKey,
};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// For everything that is asked of a device.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// The block device, best by a name below /dev/disk/by-id or /dev/mapper.
    #[arg(value_name = "DEVICE", value_hint = ValueHint::FilePath)]
    device: PathBuf,
}

impl DeviceArgs {
    /// The device at a path.
    pub(crate) fn of(device: PathBuf) -> Self {
        Self { device }
    }
}

/// One key, as it is printed for programs. Who it is of is absent for a stranger's.
#[derive(Debug, Serialize)]
struct KeyView {
    key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u32>,
    holds: bool,
    paths: u32,
    initiators: Vec<String>,
}

/// What a device says, as it is printed for programs. What it does not say is absent.
#[derive(Debug, Serialize)]
struct DeviceView {
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reservation: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    persistent: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    may_write: Option<bool>,
    keys: Vec<KeyView>,
}

#[derive(Debug, Serialize)]
struct StepView<'a> {
    step: &'a str,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<&'a str>,
}

/// A drill, as it is printed for programs.
#[derive(Debug, Serialize)]
struct DrillView<'a> {
    device: String,
    steps: Vec<StepView<'a>>,
    proof: Option<StorageFence>,
    persistent: bool,
}

/// The tag only marks the drill's own keys; every cluster's are shown.
fn reservation(device: &Path) -> Reservation {
    let device = Arc::new(LinuxDevice::new(device));
    Reservation::new(device, ClusterTag::of("drill"), DEADLINE)
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::Failed(error.to_string())
}

/// `storage keys`.
pub(crate) async fn keys(output: &Output, args: &DeviceArgs) -> Result<(), CliError> {
    let device = args.device.as_path();
    let asked = reservation(device);
    let seen = asked.inspect().await.map_err(failed)?;
    let may_write = asked.may_write().await.map_err(failed)?;
    let view = view(device, &seen, may_write);
    output.print(&view, |out| page(out, &view))
}

fn view(device: &Path, seen: &Inspection, may_write: Option<bool>) -> DeviceView {
    let nexuses = seen.nexuses.as_deref().unwrap_or_default();
    let held = seen.facts.held;
    let keys = seen.facts.keys.iter().map(|(raw, paths)| {
        let known = ReservationKey::decode_any(*raw);
        let of_it = || nexuses.iter().filter(|nexus| nexus.key == *raw);
        KeyView {
            key: format!("{raw:#018x}"),
            cluster: known.map(|key| key.cluster().to_string()),
            host: known.map(|key| key.host()),
            epoch: known.map(|key| key.epoch()),
            holds: of_it().any(|nexus| nexus.holder) || held.is_some_and(|held| held.key == *raw),
            paths: *paths,
            initiators: of_it().map(|nexus| nexus.initiator.clone()).collect(),
        }
    });
    DeviceView {
        device: device.display().to_string(),
        reservation: held.map(|held| held.kind.to_string()),
        persistent: seen.persistent,
        may_write,
        keys: keys.collect(),
    }
}

fn page(output: &Output, view: &DeviceView) -> String {
    let mut text = format!(
        "{}: {}; {} registered",
        view.device,
        view.reservation.as_deref().unwrap_or("not reserved"),
        count(view.keys.len(), "key"),
    );
    match view.may_write {
        Some(true) => text.push_str("; this host may write"),
        Some(false) => text.push_str("; this host may not write"),
        None => {}
    }
    if view.persistent == Some(false) && !view.keys.is_empty() {
        text.push_str("\nThe keys do not outlast a restart of the SAN.");
    }
    if view.keys.is_empty() {
        return text;
    }
    let mut table = output.table(&[
        "KEY",
        "CLUSTER",
        "HOST",
        "EPOCH",
        "HOLDS",
        "PATHS",
        "INITIATOR",
    ]);
    for key in &view.keys {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let cluster = key
            .cluster
            .clone()
            .unwrap_or_else(|| "a stranger".to_owned());
        let tone = if key.cluster.is_some() {
            Tone::Plain
        } else {
            Tone::Warn
        };
        table.add_row(vec![
            cell(&key.key, Tone::Plain),
            cell(cluster, tone),
            cell(or_dash(key.host.map(|host| host.to_string())), Tone::Plain),
            cell(
                or_dash(key.epoch.map(|epoch| epoch.to_string())),
                Tone::Plain,
            ),
            cell(if key.holds { "yes" } else { "" }, Tone::Plain),
            cell(key.paths, Tone::Plain),
            cell(key.initiators.join("\n"), Tone::Plain),
        ]);
    }
    format!("{text}\n\n{}", trimmed(&table))
}

/// `storage drill`.
pub(crate) async fn drill(output: &Output, args: &DeviceArgs) -> Result<(), CliError> {
    let device = args.device.as_path();
    let asked = reservation(device);
    let scratch = ReservationKey::new(asked.cluster(), 1, 1).map_err(failed)?;
    let report = asked.drill(scratch).await.map_err(failed)?;
    let view = drilled(device, &report);
    output.print(&view, |_| format!("{}: {report}", device.display()))?;
    match report.failed() {
        None => Ok(()),
        Some(step) => Err(CliError::Failed(format!(
            "{}: {}: {}",
            device.display(),
            step.name,
            step.problem.as_deref().unwrap_or_default()
        ))),
    }
}

fn drilled<'a>(device: &Path, report: &'a DrillReport) -> DrillView<'a> {
    DrillView {
        device: device.display().to_string(),
        steps: report
            .steps
            .iter()
            .map(|step| StepView {
                step: step.name,
                ok: step.problem.is_none(),
                problem: step.problem.as_deref(),
            })
            .collect(),
        proof: report.proof,
        persistent: report.persistent,
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::Format;
    use super::*;
    use quorate_storage::reservation::{FakeLun, ReservationType};

    const PLAIN: Output = Output {
        format: Format::Table,
        color: false,
        width: None,
    };

    #[test]
    fn keys_are_told_apart() {
        let lun = FakeLun::new();
        lun.put_key(1, 0x51ab_c002_0000_0007);
        lun.put_key(2, 0xdead_beef);
        lun.put_reservation(1, ReservationType::WriteExclusiveRegistrantsOnly);
        let seen = Inspection::of(&lun.nexus(3), ClusterTag::new(0)).unwrap();
        let view = view(Path::new("/dev/sdz"), &seen, Some(false));
        let text = page(&PLAIN, &view);
        // However wide the columns are.
        let words: Vec<&str> = text.split_whitespace().collect();
        let text = words.join(" ");
        for part in [
            "/dev/sdz: write exclusive, registrants only (5); 2 keys registered; this host may not write",
            "0x51abc00200000007 abc 2 7 yes 1 nexus 1",
            "0x00000000deadbeef a stranger - - 1 nexus 2",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["keys"][1]["host"], 2, "{json}");
        assert_eq!(json["keys"][0].get("host"), None, "{json}");
    }

    #[test]
    fn a_lun_without_keys_has_no_table() {
        let seen = Inspection::of(&FakeLun::new().nexus(3), ClusterTag::new(0)).unwrap();
        let text = page(&PLAIN, &view(Path::new("/dev/sdz"), &seen, Some(true)));
        let wanted = "/dev/sdz: not reserved; 0 keys registered; this host may write";
        assert_eq!(text, wanted);
    }

    #[tokio::test]
    async fn what_is_no_device_fails_with_a_hint() {
        let args = DeviceArgs {
            device: "/dev/disk/by-id/none".into(),
        };
        let errors = [
            keys(&PLAIN, &args).await.unwrap_err(),
            drill(&PLAIN, &args).await.unwrap_err(),
        ];
        for error in errors {
            assert!(error.to_string().contains("the device is gone"), "{error}");
        }
    }
}
