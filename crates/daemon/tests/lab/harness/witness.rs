//! Witnesses: what guests acknowledged, held against their disks.
//!
//! Always holds: the judgement is made when no copy of the guest runs any more, from the raw image
//! alone; every record that the client saw acknowledged must be there, in one unbroken chain.

use super::Cluster;
use super::guest::Guest;
use quorate_lab::guest::judge;
use quorate_lab::tools::Tool;
use quorate_lab::tools::acks::AckReport;
use std::path::PathBuf;
use std::time::Duration;

/// Collectors beside the guests.
pub(crate) struct Witness(Vec<(Guest, Tool<AckReport>)>);

impl Cluster {
    /// Begins to record what these guests acknowledge, at the client.
    pub(crate) fn witness(&self, guests: &[Guest]) -> Witness {
        let collect = |guest: &Guest| {
            let tool = self.lab.ack_collector(guest.address).unwrap();
            (guest.clone(), tool)
        };
        Witness(guests.iter().map(collect).collect())
    }

    /// Ends the guests, then holds their disks against what they acknowledged. Returns the reports.
    pub(crate) fn judge(&self, witness: Witness) -> Vec<AckReport> {
        self.judge_at(witness, |guest| self.disk_file(guest))
    }

    /// The same where their images are elsewhere.
    pub(crate) fn judge_at(
        &self,
        witness: Witness,
        image: impl Fn(&Guest) -> PathBuf,
    ) -> Vec<AckReport> {
        let mut reports = Vec::new();
        for (guest, tool) in witness.0 {
            let report = tool.finish().unwrap();
            assert!(
                report.records() > 20,
                "{} acknowledged hardly anything: {report:?}",
                guest.name
            );
            reports.push((guest, report));
        }
        for (guest, _) in &reports {
            self.must(&["vm", "stop", &guest.name, "--hard"]);
        }
        for (guest, report) in &reports {
            self.eventually("the end of the guest", Duration::from_secs(30), || {
                let copies = self.copies(&guest.name);
                copies
                    .is_empty()
                    .then_some(())
                    .ok_or_else(|| format!("{copies:?}"))
            });
            let verdict = judge(&image(guest), report).unwrap();
            self.say(&format!(
                "{}: {} records in the log, {} acknowledged ones found, {} boots",
                guest.name,
                verdict.last,
                verdict.acknowledged,
                verdict.boots.len()
            ));
            assert!(
                verdict.good(),
                "the disk of {}: {:?}; boots {:?}",
                guest.name,
                verdict.findings,
                verdict.boots
            );
        }
        reports.into_iter().map(|(_, report)| report).collect()
    }
}
