//! Services of the tests: the manifest that asks for one, and how it stands.

use super::guest::{Guest, manifest};
use super::{Cluster, LONG};
use quorate_lab::tools::load::{LoadArgs, LoadReport};
use quorate_lab::tools::{Tool, capture::CaptureReport};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// Address of the service of a test.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 200);
/// Bytes that all MAC addresses of the datapath begin with: virtual ones, and those of frames that it sends on.
pub(crate) const OURS: &str = "02:51";

/// Guests `web1`, `web2`, ... that a service may have as members; small, and quiet but for their connections.
pub(crate) fn webs(count: u8) -> Vec<Guest> {
    let web = |number: u8| Guest::new(&format!("web{number}"), number).words("qr.log_hz=5");
    (1..=count).map(web).collect()
}

/// The lines of a service `web` over these members.
pub(crate) fn web(members: &[&str], lines: &str) -> String {
    format!(
        "services:\n  web:\n    network: lan\n    address: {ADDRESS}\n    ports: [{}]\n    members: [{}]\n{lines}",
        quorate_guest::FLOW_PORT,
        members.join(", "),
    )
}

impl Cluster {
    /// Applies guests and a service.
    pub(crate) fn apply_service(&self, guests: &[Guest], service: &str) {
        self.apply_service_on(guests, service, "subnet: 10.77.0.0/24");
    }

    /// The same, with something more to say of the network.
    pub(crate) fn apply_service_on(&self, guests: &[Guest], service: &str, network: &str) {
        let text = manifest(guests, &self.image(), &self.pools());
        let text = text.replace(
            "lan: {bridge: br-lan}",
            &format!("lan: {{bridge: br-lan, uplink: lan0, {network}}}"),
        );
        self.apply_text(&format!("{text}{service}")).unwrap();
    }

    /// The service `web`.
    pub(crate) fn web(&self) -> Result<serde_json::Value, String> {
        let desk = self.desk();
        self.get(&desk, "/api/v1/services/web")
    }

    /// Another service.
    pub(crate) fn service(&self, name: &str) -> Result<serde_json::Value, String> {
        self.get(&self.desk(), &format!("/api/v1/services/{name}"))
    }

    /// The host that answers for its address.
    pub(crate) fn holder(&self) -> String {
        self.eventually("a holder", LONG, || {
            let web = self.web()?;
            let holder = web["holder"]["host"].as_str().map(str::to_owned);
            let holder = holder.ok_or_else(|| web.to_string())?;
            let directors = web["directors"].as_array().cloned().unwrap_or_default();
            let mine = directors.iter().find(|one| one["host"] == holder.as_str());
            match mine.is_some_and(|one| one["holding"] == true) {
                true => Ok(holder),
                false => Err(web.to_string()),
            }
        })
    }

    /// Waits until a ring with exactly these members is in force on every host.
    pub(crate) fn wait_ring(&self, members: &[&str]) {
        self.wait_ring_of("web", members);
    }

    /// The same for another service.
    pub(crate) fn wait_ring_of(&self, service: &str, members: &[&str]) {
        self.eventually("the ring in force everywhere", LONG, || {
            let web = self.service(service)?;
            let bad = || Err(web.to_string());
            let all = web["members"].as_array().cloned().unwrap_or_default();
            let ring = all.iter().filter(|one| one["in_ring"] == true);
            let mut ring: Vec<&str> = ring.filter_map(|one| one["vm"].as_str()).collect();
            ring.sort_unstable();
            if ring != members || web["preparing"].is_u64() {
                return bad();
            }
            let directors = web["directors"].as_array().cloned().unwrap_or_default();
            let on = directors.iter().filter(|one| one["active"] == web["epoch"]);
            match on.count() >= self.hosts().len() {
                true => Ok(()),
                false => bad(),
            }
        });
    }

    /// Holds connections to the service; returns when all of them answer.
    pub(crate) fn hold(&self, connections: u32, fresh_ms: u64) -> Tool<LoadReport> {
        self.hold_at(ADDRESS, connections, fresh_ms)
    }

    /// The same for a service elsewhere.
    pub(crate) fn hold_at(
        &self,
        address: impl Into<IpAddr>,
        connections: u32,
        fresh_ms: u64,
    ) -> Tool<LoadReport> {
        self.hold_with(&[address.into()], connections, fresh_ms)
    }

    /// The same with servers that each have their own address.
    pub(crate) fn hold_with(
        &self,
        servers: &[IpAddr],
        connections: u32,
        fresh_ms: u64,
    ) -> Tool<LoadReport> {
        let target = |address: &IpAddr| (*address, quorate_guest::FLOW_PORT).into();
        let load = self
            .lab
            .load(&LoadArgs {
                targets: servers.iter().map(target).collect(),
                connections,
                interval_us: 20_000,
                fresh_ms,
                state: None,
            })
            .unwrap();
        let all = usize::try_from(connections).unwrap();
        self.eventually("connections", Duration::from_secs(20), || {
            match self.lab.load_so_far() {
                Some(report) if report.held() == all => Ok(()),
                Some(report) => Err(format!("{} held: {:?}", report.held(), report.broken())),
                None => Err("no report".to_owned()),
            }
        });
        load
    }

    /// What the load tool has seen so far: nothing broken, nothing moved.
    pub(crate) fn unbroken(&self, what: &str) -> LoadReport {
        let report = self.lab.load_so_far().unwrap();
        assert_unbroken(&report, what);
        report
    }

    /// Notes frames of the datapath that the switch receives from these hosts.
    pub(crate) fn watch_frames(&self, hosts: &[&str]) -> Tool<CaptureReport> {
        self.lab.capture("lan", hosts, OURS).unwrap()
    }
}

/// No connection is broken, none has moved to another member.
pub(crate) fn assert_unbroken(report: &LoadReport, what: &str) {
    assert_eq!(
        (report.broken().len(), report.moved()),
        (0, 0),
        "{what}: {:#?}",
        report.broken()
    );
}
