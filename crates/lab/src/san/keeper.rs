//! The SAN's power supply: a process that runs `tgtd`, gives it back its configuration and ends with
//! it, with the lab, or with the lab's owner.
//!
//! Always holds: no initiator can log in before the whole configuration is there, so that an
//! initiator that was shut out before a power cut stays shut out after it.

use super::config::Config;
use super::tgt::Tgt;
use super::{CONTROLLER, portal};
use crate::process::Found;
use crate::site::Site;
use crate::{LabError, Result, wait};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// For `tgtd` to answer after its start, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at `tgtd` and at the lab's owner.
const TICK: Duration = Duration::from_millis(50);

/// Whose SAN.
#[derive(Debug, Clone, clap::Args)]
pub struct KeepSanArgs {
    /// The lab's `lab.json`.
    #[arg(long)]
    pub record: PathBuf,
}

/// Runs the SAN until it ends. Expects to be in the SAN's network namespace.
pub fn keep(args: &KeepSanArgs) -> Result<()> {
    let dir = args.record.parent().unwrap_or(Path::new("/"));
    let root = dir.parent().unwrap_or(Path::new("/"));
    let site = Site::load(root, &dir.file_name().unwrap_or_default().to_string_lossy())?;
    let owner = site
        .owner
        .map(|pid| i32::try_from(pid).ok().and_then(Found::read));
    let config = Config::load(&site)?;
    let mut daemon = spawn(config.control)?;
    let opened = open(&site, &config, &mut daemon);
    if opened.is_err() {
        let _ = daemon.kill();
    }
    opened?;
    loop {
        if daemon.try_wait().ok().flatten().is_some() {
            eprintln!("tgtd has ended");
            return Ok(());
        }
        let gone = owner.as_ref().is_some_and(|owner| {
            owner.as_ref().is_none_or(|owner| {
                Found::read(owner.pid).is_none_or(|now| now.started != owner.started)
            })
        });
        if gone {
            let _ = daemon.kill();
            let _ = daemon.wait();
            return Ok(());
        }
        wait::pause(TICK);
    }
}

/// Starts `tgtd` in the foreground, to die with this process, listening only where nobody comes from.
fn spawn(control: u16) -> Result<Child> {
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "tgtd", "-f", "-t", "4", "-C"])
        .arg(control.to_string())
        .args(["--iscsi", &format!("portal={CONTROLLER}")])
        .stdin(Stdio::null())
        .spawn()
        .map_err(|source| LabError::MissingTool {
            tool: "setpriv".to_owned(),
            source,
        })
}

/// Gives `tgtd` its configuration back, then opens the door.
fn open(site: &Site, config: &Config, daemon: &mut Child) -> Result<()> {
    let tgt = Tgt::new(config.control);
    let mut ended = false;
    let what = "start of tgtd";
    wait::until(what, START_LIMIT, Duration::from_millis(5), || {
        ended = daemon.try_wait().ok().flatten().is_some();
        (ended || tgt.run("--mode sys --op show", &[]).is_ok()).then_some(())
    })?;
    if ended {
        return Err(LabError::San {
            problem: "does not start".to_owned(),
            log: site.san_dir().join("san.log"),
        });
    }
    for (user, secret) in &config.accounts {
        tgt.run(
            "--mode account --op new",
            &["--user", user, "--password", secret],
        )?;
    }
    for target in &config.targets {
        tgt.make(target)?;
    }
    let door = format!("portal={}", portal(site)?);
    tgt.run("--mode portal --op new", &["--param", &door])?;
    let inner = format!("portal={CONTROLLER}");
    tgt.run("--mode portal --op delete", &["--param", &inner])
        .map(drop)
}
