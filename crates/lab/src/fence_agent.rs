//! `fence_lab`: a fence agent with the contract of the standard `fence_*` programs, whose "BMC" is
//! a host's supervisor.
//!
//! Standard input: `key=value` lines: `action` (`off`, `on`, `reboot`, `status`, `monitor`, `metadata`),
//! `plug` (the host), `ip` (the lab's folder). Exit status: 0 done; for `status` 0 on and 2 off; 1 failed.
//! How slow and how reachable the BMC is, the lab decides ([`Bmc`]), not the caller.

use crate::site::Site;
use crate::supervisor::protocol::{Power, Request};
use crate::supervisor::request;
use crate::{LabError, Result, wait};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const IS_OFF: u8 = 2;

/// Faults of a host's BMC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Bmc {
    /// Every action takes this much longer.
    pub delay_ms: u64,
    /// Never answers; the agent gives up after [`UNREACHABLE_AFTER`].
    pub unreachable: bool,
    /// Says `off` is done and does nothing: a lying BMC.
    pub ignores_off: bool,
}

/// After this long the agent says that its BMC does not answer.
pub const UNREACHABLE_AFTER: Duration = Duration::from_secs(5);

impl Bmc {
    fn path(site: &Site, host: &str) -> PathBuf {
        site.host_dir(host).join("bmc.json")
    }

    /// Sets the faults of a host's BMC.
    pub fn set(self, site: &Site, host: &str) -> Result<()> {
        site.number(host)?;
        let path = Self::path(site, host);
        let text = serde_json::to_vec(&self).map_err(|source| LabError::Corrupt {
            path: path.clone(),
            source,
        })?;
        std::fs::write(&path, text).map_err(LabError::file("write", path))
    }

    fn load(site: &Site, host: &str) -> Self {
        std::fs::read(Self::path(site, host))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }
}

/// Runs the agent: options from `input`; the exit status.
pub fn run(mut input: impl Read) -> u8 {
    let mut text = String::new();
    if let Err(error) = input.read_to_string(&mut text) {
        return fail(&format!("cannot read the options: {error}"));
    }
    let options = parse(&text);
    let get = |names: &[&str]| names.iter().find_map(|name| options.get(name)).copied();
    let action = get(&["action", "option"]).unwrap_or("reboot");
    if action == "metadata" {
        println!("{METADATA}");
        return DONE;
    }
    let (Some(dir), Some(plug)) = (get(&["ip", "ipaddr"]), get(&["plug", "port"])) else {
        return fail("give `ip` (the lab's folder) and `plug` (the host)");
    };
    let site = match open(Path::new(dir)) {
        Ok(site) => site,
        Err(error) => return fail(&error.to_string()),
    };
    let bmc = Bmc::load(&site, plug);
    if bmc.unreachable {
        wait::pause(UNREACHABLE_AFTER);
        return fail("connection timed out");
    }
    wait::pause(Duration::from_millis(bmc.delay_ms));
    match act(&site, plug, action, bmc) {
        Ok(status) => status,
        Err(error) => fail(&error.to_string()),
    }
}

fn fail(message: &str) -> u8 {
    eprintln!("fence_lab: {message}");
    FAILED
}

fn open(dir: &Path) -> Result<Site> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    Site::load(dir.parent().unwrap_or(Path::new("/")), &name)
}

fn act(site: &Site, plug: &str, action: &str, bmc: Bmc) -> Result<u8> {
    let off = || -> Result<()> {
        if !bmc.ignores_off {
            request(site, plug, &Request::Off)?;
        }
        Ok(())
    };
    match action {
        "off" => off()?,
        "on" => drop(request(site, plug, &Request::On)?),
        "reboot" => {
            off()?;
            request(site, plug, &Request::On)?;
        }
        "status" | "monitor" => {
            let power = request(site, plug, &Request::Status)?.power;
            println!("Status: {}", if power == Power::Off { "OFF" } else { "ON" });
            return Ok(if power == Power::Off && action == "status" {
                IS_OFF
            } else {
                DONE
            });
        }
        other => return Ok(fail(&format!("unknown action `{other}`"))),
    }
    println!("Success: {action}");
    Ok(DONE)
}

/// Lines without `=`, empty ones and comments are ignored, as the standard agents do.
fn parse(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim(), value.trim()))
        .collect()
}

const METADATA: &str = r#"<?xml version="1.0" ?>
<resource-agent name="fence_lab" shortdesc="Power switch of a Quorate lab">
<longdesc>Cuts the power of a lab's host: all of its processes end at one instant.</longdesc>
<parameters>
<parameter name="action" required="1"><content type="string" default="reboot"/></parameter>
<parameter name="ip" required="1"><content type="string"/><shortdesc>The lab's folder</shortdesc></parameter>
<parameter name="plug" required="1"><content type="string"/><shortdesc>The host</shortdesc></parameter>
</parameters>
<actions><action name="on"/><action name="off"/><action name="reboot"/><action name="status"/>
<action name="monitor"/><action name="metadata"/></actions>
</resource-agent>"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_the_standard_agents_do() {
        let options = parse("# comment\naction=off\n\n plug = h1 \nnonsense\nip=/x=y\n");
        assert_eq!(options["action"], "off");
        assert_eq!(options["plug"], "h1");
        assert_eq!(options["ip"], "/x=y");
        assert_eq!(options.len(), 3);
    }

    #[test]
    fn missing_options_and_labs_fail() {
        assert_eq!(run(&b"action=off\n"[..]), FAILED);
        assert_eq!(
            run(&b"action=off\nip=/nonexistent/lab\nplug=h1\n"[..]),
            FAILED
        );
        assert_eq!(run(&b"action=metadata\n"[..]), DONE);
    }
}
