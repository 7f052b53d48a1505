//! What the steps of the tour share: the lab, the guests, the client's records, progress.

use crate::cluster::{ClusterView, EventLine};
use crate::guest::judge;
use crate::supervisor::protocol::Power;
use crate::tools::Tool;
use crate::tools::acks::AckReport;
use crate::tools::pinger::PingReport;
use crate::{LabGuard, wait};
use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use quorate_guest::log::GuestBoot;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// The manifest of the tour.
pub(super) const MANIFEST: &str = include_str!("../../../../examples/three-tier.yaml");
/// The VMs in it, with the last byte of their addresses.
const GUESTS: [(&str, u8); 4] = [("db", 11), ("app", 12), ("web1", 21), ("web2", 22)];
/// For the cluster to be as it should be again.
pub(super) const SETTLE: Duration = Duration::from_secs(120);
/// Times that an image is judged: a guest that writes meanwhile can make a good one look torn.
const JUDGEMENTS: usize = 5;

/// What came of a step.
pub(super) struct Outcome {
    pub(super) good: bool,
    pub(super) measured: String,
}

/// The tour's stage.
pub(super) struct Stage {
    pub(super) lab: LabGuard,
    progress: ProgressBar,
    collectors: BTreeMap<&'static str, Tool<AckReport>>,
    reports: BTreeMap<&'static str, AckReport>,
}

/// Pingers of several guests.
pub(super) struct Pingers(Vec<(&'static str, Tool<PingReport>)>);

impl Pingers {
    /// The longest gap of any guest, in milliseconds, and whose.
    pub(super) fn finish(self) -> Result<(f64, &'static str)> {
        let mut longest = (0.0, "none");
        for (name, tool) in self.0 {
            let gap = milliseconds(tool.finish()?.longest_gap_us);
            if gap > longest.0 {
                longest = (gap, name);
            }
        }
        Ok(longest)
    }
}

pub(super) fn milliseconds(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1000.0
}

/// Milliseconds since 1970, as events count.
pub(super) fn now_ms() -> u64 {
    let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(wall.map_or(0, |span| span.as_millis())).unwrap_or(0)
}

impl Stage {
    pub(super) fn new(lab: LabGuard) -> Self {
        let progress = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {msg} ({elapsed})") {
            progress.set_style(style);
        }
        Self {
            lab,
            progress,
            collectors: BTreeMap::new(),
            reports: BTreeMap::new(),
        }
    }

    pub(super) fn announce(&self, number: usize, title: &str) {
        self.progress.reset();
        self.progress.set_prefix(format!("{number:2}. {title}"));
        self.progress.set_message("");
        self.progress.enable_steady_tick(Duration::from_millis(120));
    }

    /// Says what is being waited for.
    pub(super) fn say(&self, what: impl Into<String>) {
        self.progress.set_message(format!("- {}", what.into()));
    }

    pub(super) fn quiet(&self) {
        self.progress.disable_steady_tick();
        self.progress.finish_and_clear();
    }

    pub(super) fn address(name: &str) -> Result<Ipv4Addr> {
        let guest = GUESTS.iter().find(|(guest, _)| *guest == name);
        let (_, byte) = guest.with_context(|| format!("the tour has no guest `{name}`"))?;
        Ok(Ipv4Addr::new(10, 77, 0, *byte))
    }

    // --- the cluster -----------------------------------------------------------------------

    /// A host whose daemon answers.
    pub(super) fn speaker(&self) -> Result<String> {
        let hosts = &self.lab.site().hosts;
        let answers = |host: &&String| self.lab.view(host).is_ok_and(|view| view.cluster.quorate);
        let found = hosts.iter().find(answers).cloned();
        found.context("no host answers as part of a quorate cluster")
    }

    pub(super) fn view(&self) -> Result<ClusterView> {
        Ok(self.lab.view(&self.speaker()?)?)
    }

    /// The host that owns a VM.
    pub(super) fn owner(&self, vm: &str) -> Result<String> {
        let view = self.view()?;
        let host = view.vm(vm).and_then(|vm| vm.host.clone());
        host.with_context(|| format!("VM {vm} is on no host"))
    }

    /// A VM on a host that does not lead; its host. Moves `db` away from the leader when there is no other.
    pub(super) fn follower_with_guest(&self) -> Result<(String, &'static str)> {
        let view = self.view()?;
        let leader = view.cluster.leader.clone().unwrap_or_default();
        for (name, _) in GUESTS {
            if let Some(host) = view.vm(name).and_then(|vm| vm.host.clone())
                && host != leader
            {
                return Ok((host, name));
            }
        }
        self.say("moving db away from the leader");
        self.run(&["vm", "migrate", "db", "--wait"])?;
        Ok((self.owner("db")?, "db"))
    }

    /// A `quorate` command on a host that answers, waiting as long as it may take.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<String> {
        Ok(self
            .lab
            .quorate_for(&self.speaker()?, arguments, Duration::from_secs(320))?)
    }

    pub(super) fn last_event(&self) -> Result<u64> {
        let events = self.lab.events(&self.speaker()?)?;
        Ok(events.last().map_or(0, |event| event.sequence))
    }

    pub(super) fn events_after(&self, sequence: u64) -> Result<Vec<EventLine>> {
        let mut events = self.lab.events(&self.speaker()?)?;
        events.retain(|event| event.sequence > sequence);
        Ok(events)
    }

    /// Everything is well: hosts up, VMs running and ready.
    pub(super) fn wait_well(&self, host: &str) -> Result<ClusterView> {
        let all = self.lab.site().hosts.len();
        Ok(self
            .lab
            .wait_status_for(host, "all hosts up and all VMs ready", SETTLE, |view| {
                view.cluster.quorate
                    && view.hosts.len() == all
                    && view.hosts.iter().all(|host| host.state == "up")
                    && view.vms.len() == GUESTS.len()
                    && view.vms.iter().all(|vm| vm.state == "running" && vm.ready)
            })?)
    }

    /// Mends whatever a step broke.
    pub(super) fn settle(&self) -> Result<()> {
        self.lab.heal()?;
        for line in self.lab.status()?.hosts {
            if line.status.is_some_and(|status| status.power != Power::On) {
                self.lab.start(&line.name)?;
            }
            self.lab
                .resume(&line.name, crate::supervisor::protocol::Who::All)?;
        }
        let speaker = wait::until(
            "a quorate cluster",
            SETTLE,
            Duration::from_millis(200),
            || self.speaker().ok(),
        )?;
        for host in &self.lab.site().hosts {
            // Harmless for a host that is not drained.
            let _ = self.lab.quorate(&speaker, &["host", "resume", host]);
        }
        self.wait_well(&speaker).map(drop)
    }

    /// Guests as the hosts' supervisors count them: QEMU processes, frozen ones too.
    pub(super) fn copies(&self) -> Result<usize> {
        let hosts = self.lab.status()?.hosts;
        Ok(hosts
            .iter()
            .filter_map(|line| line.status.as_ref())
            .map(|status| status.guests)
            .sum())
    }

    /// The last lines of the daemons' logs, for whoever has to find out why.
    pub(super) fn show_logs(&self) {
        for host in &self.lab.site().hosts {
            let path: PathBuf = self.lab.site().daemon_log(host);
            let bytes = std::fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().rev().take(15).collect();
            println!("--- daemon of {host}, last lines");
            lines.iter().rev().for_each(|line| println!("{line}"));
        }
    }

    // --- the guests ------------------------------------------------------------------------

    /// The present life of every guest.
    pub(super) fn boots(&self) -> Result<BTreeMap<&'static str, GuestBoot>> {
        let mut boots = BTreeMap::new();
        for (name, _) in GUESTS {
            let status = self.lab.guest_status(Self::address(name)?);
            boots.insert(
                name,
                status.with_context(|| format!("guest {name}"))?.boot_id,
            );
        }
        Ok(boots)
    }

    pub(super) fn pinger(&self, name: &str) -> Result<Tool<PingReport>> {
        Ok(self
            .lab
            .pinger(Self::address(name)?, Duration::from_millis(1))?)
    }

    /// Pings all guests, more slowly.
    pub(super) fn ping_all(&self) -> Result<Pingers> {
        let mut pingers = Vec::new();
        for (name, _) in GUESTS {
            let pinger = self
                .lab
                .pinger(Self::address(name)?, Duration::from_millis(5))?;
            pingers.push((name, pinger));
        }
        Ok(Pingers(pingers))
    }

    /// From now on the client remembers what the guests acknowledge.
    pub(super) fn collect(&mut self) -> Result<()> {
        for (name, _) in GUESTS {
            self.collectors
                .insert(name, self.lab.ack_collector(Self::address(name)?)?);
        }
        Ok(())
    }

    /// Compares all that was acknowledged so far with the disks. The number of records, and what is wrong.
    pub(super) fn check_records(&mut self) -> Result<(u64, Vec<String>)> {
        for (name, tool) in std::mem::take(&mut self.collectors) {
            self.reports.entry(name).or_default().merge(&tool.finish()?);
        }
        let (mut records, mut wrong) = (0, Vec::new());
        for (name, report) in &self.reports {
            let image = self.lab.site().shared_dir().join(format!("{name}.raw"));
            let mut verdict = judge(&image, report)?;
            for _ in 1..JUDGEMENTS {
                if verdict.good() {
                    break;
                }
                wait::pause(Duration::from_millis(50));
                verdict = judge(&image, report)?;
            }
            records += verdict.acknowledged;
            wrong.extend(
                verdict
                    .findings
                    .iter()
                    .map(|finding| format!("{name}: {finding}")),
            );
        }
        self.collect()?;
        if records == 0 {
            bail!("the guests have acknowledged nothing");
        }
        Ok((records, wrong))
    }
}
