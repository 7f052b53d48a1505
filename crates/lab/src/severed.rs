//! A host that is cut from everything while its guests go on: the storage alone must keep them from writing.
//!
//! Always holds: the cut is one nftables transaction, so no path goes before another one. Why with `hang`:
//! a host whose agent and guard work freezes its guests by itself, and a test of the storage would see nothing; with
//! both stopped its guests run on, their writes wait in their connections and arrive when the cables are mended.
//!
//! ```text
//!   sever --> cut (and hung) --heal--> reachable, still hung: late writes are tried --wake--> as before
//! ```

use crate::faults::{self, Link};
use crate::lab::Lab;
use crate::process::run;
use crate::site::SAN;
use crate::supervisor::protocol::Who;
use crate::{LabError, Result};
use std::time::Duration;

/// A host that was cut from everything.
#[derive(Debug)]
pub struct Severed {
    lab: Lab,
    host: String,
    hung: bool,
    /// When, since the machine's boot, as hosts count their leases; just before the cut.
    pub at: Duration,
    /// Frames towards the SAN when the cables were mended.
    frames: Option<u64>,
}

impl Lab {
    /// Cuts a host from everything: cluster, guests' network, SAN. With `hang` its daemon and its guard are
    /// stopped first (SIGSTOP), so nothing on the host freezes its guests; such a host must have no watchdog.
    pub fn sever(&self, host: &str, hang: bool) -> Result<Severed> {
        self.site().number(host)?;
        if hang {
            self.pause(host, Who::Guard)?;
            self.pause(host, Who::Daemon)?;
        }
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let at = Duration::try_from(now).unwrap_or_default();
        self.isolate(host, Link::All)?;
        Ok(Severed {
            lab: self.clone(),
            host: host.to_owned(),
            hung: hang,
            at,
            frames: None,
        })
    }

    /// How many frames a host or the SAN has sent into the SAN's network since the lab came up, those that a cut
    /// has stopped included.
    pub fn san_frames(&self, part: &str) -> Result<u64> {
        self.site().check_part(SAN)?;
        self.site().check_part(part)?;
        let switch = self.site().namespace("switch");
        let port = format!("{SAN}-{part}");
        let arguments = ["-n", &switch, "-j", "-s", "link", "show", "dev", &port];
        let text = run("ip", &arguments)?;
        let read = || {
            let links: serde_json::Value = serde_json::from_str(&text).ok()?;
            links[0]["stats64"]["rx"]["packets"].as_u64()
        };
        read().ok_or_else(|| LabError::Answer {
            tool: "ip".to_owned(),
            output: text.clone(),
        })
    }
}

impl Severed {
    /// The host.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Mends all cables of the lab; what hangs on the host goes on hanging.
    pub fn heal(&mut self) -> Result<()> {
        self.frames = Some(self.lab.san_frames(&self.host)?);
        faults::heal(self.lab.site())
    }

    /// Frames that the host has sent towards the SAN since the cables were mended: its guests try to write.
    pub fn tries(&self) -> Result<u64> {
        let begun = self.frames.unwrap_or(u64::MAX);
        Ok(self.lab.san_frames(&self.host)?.saturating_sub(begun))
    }

    /// Lets daemon and guard go on.
    pub fn wake(self) -> Result<()> {
        if self.hung {
            self.lab.resume(&self.host, Who::Guard)?;
            self.lab.resume(&self.host, Who::Daemon)?;
        }
        Ok(())
    }
}
