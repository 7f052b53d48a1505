//! How long a guest says nothing on the wire while it changes hosts, by the frames that the switch has from it.
//!
//! What a client waits longer than QEMU says that the guest stood still has two parts, and only the second is the
//! product's: an emulated guest starts cold at its target (all of its code is translated anew, which keeps its CPU busy
//! for 0.1 s and more although it "runs"), and what was sent to it meanwhile waits, or is lost and sent again.

use super::Cluster;
use super::bare::command_line;
use quorate_lab::tools::Tool;
use quorate_lab::tools::capture::{CaptureReport, boot_ns};
use std::time::Duration;

/// All guests' addresses begin with it; so do those of the datapath.
const ANY: &str = "02";
/// Source of what came for a guest at its last host and was sent after it.
const HELD: &str = "02:51:48";

/// Listens to all guests.
pub(crate) struct Listening {
    tool: Tool<CaptureReport>,
    since_ns: u64,
}

/// What was heard.
pub(crate) struct Heard {
    report: CaptureReport,
    since_ns: u64,
}

impl Cluster {
    /// Notes what the switch has from guests, from now on.
    pub(crate) fn listen(&self) -> Listening {
        let hosts = self.hosts();
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        Listening {
            tool: self.lab.capture("lan", &hosts, ANY).unwrap(),
            since_ns: boot_ns(),
        }
    }

    /// The address of a guest's NIC, as its process was told.
    pub(crate) fn mac_of(&self, name: &str) -> String {
        let line = command_line(&self.wait_one_copy(name, super::LONG));
        let device = line.iter().find_map(|word| {
            let device: serde_json::Value = serde_json::from_str(word).ok()?;
            Some(device.get("mac")?.as_str()?.to_owned())
        });
        device.unwrap_or_else(|| panic!("no NIC: {line:?}"))
    }
}

impl Listening {
    pub(crate) fn finish(self) -> Heard {
        Heard {
            report: self.tool.finish().unwrap(),
            since_ns: self.since_ns,
        }
    }
}

impl Heard {
    /// The longest time without a packet from that address.
    pub(crate) fn silence(&self, mac: &str) -> Duration {
        let noted = self.report.ports.values().flat_map(|port| &port.noted);
        let packets = noted.filter(|frame| frame.source == mac && frame.protocol == "0800");
        let mut times: Vec<u64> = packets.map(|frame| frame.at_ns).collect();
        times.push(self.since_ns);
        times.sort_unstable();
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        Duration::from_nanos(gaps.max().unwrap_or(0))
    }

    /// Frames that were sent after guests.
    pub(crate) fn sent_after(&self) -> usize {
        let noted = self.report.ports.values().flat_map(|port| &port.noted);
        noted.filter(|frame| frame.source.starts_with(HELD)).count()
    }
}
