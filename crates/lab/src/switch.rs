//! The site's switch as something to be set up: how long it remembers addresses, whether it snoops on IGMP.
//!
//! Always holds: settings are the kernel bridge's own, so what the lab shows a bridge does.

use crate::lab::Lab;
use crate::process::run;
use crate::{LabError, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Settings of one network of the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchSettings {
    /// How long it remembers on which port an address is, in seconds.
    pub ageing_s: u32,
    /// It delivers multicast only to ports that asked for it.
    pub snooping: bool,
    /// It asks who wants multicast; without a querier snooping does nothing.
    pub querier: bool,
}

impl Default for SwitchSettings {
    fn default() -> Self {
        Self {
            ageing_s: 300,
            snooping: false,
            querier: false,
        }
    }
}

impl Lab {
    /// Sets up a network of the switch.
    pub fn set_switch(&self, network: &str, settings: SwitchSettings) -> Result<()> {
        self.check_network(network)?;
        let bit = |on: bool| if on { "1" } else { "0" };
        let ageing = (u64::from(settings.ageing_s) * 100).to_string();
        let (name, space) = (format!("sw-{network}"), self.site().namespace("switch"));
        if settings.querier {
            // A bridge that begins to ask floods for as long as answers may take: one second and not ten.
            let soon = ["mcast_query_response_interval", "100"];
            let set = ["-n", &space, "link", "set", &name, "type", "bridge"];
            let words: Vec<&str> = set.into_iter().chain(soon).collect();
            run("ip", &words)?;
        }
        let words = [
            "-n",
            &space,
            "link",
            "set",
            &name,
            "type",
            "bridge",
            "ageing_time",
            &ageing,
            "mcast_snooping",
            bit(settings.snooping),
            "mcast_querier",
            bit(settings.querier),
            // A lab does not wait two minutes for the first answers.
            "mcast_startup_query_interval",
            "100",
        ];
        run("ip", &words).map(drop)
    }

    /// Where the switch believes each address to be: MAC address to part (`h1`, `client`).
    pub fn switch_table(&self, network: &str) -> Result<BTreeMap<String, String>> {
        self.check_network(network)?;
        let (name, space) = (format!("sw-{network}"), self.site().namespace("switch"));
        let text = run("bridge", &["-n", &space, "fdb", "show", "br", &name])?;
        Ok(table(&text, network))
    }

    /// Sends multicast of groups that nobody named to this part too, as to a router: what a Linux bridge needs to deliver
    /// frames with a multicast MAC and a unicast IP address.
    pub fn set_router_port(&self, network: &str, part: &str) -> Result<()> {
        self.check_network(network)?;
        let (port, space) = (format!("{network}-{part}"), self.site().namespace("switch"));
        let words = [
            "-n",
            &space,
            "link",
            "set",
            "dev",
            &port,
            "mcast_router",
            "2",
        ];
        run("bridge", &words).map(drop)
    }

    /// Plugs a station in that never speaks: what reaches it is heard by a capture of part `spare`.
    pub fn plug_spare(&self, network: &str) -> Result<()> {
        self.check_network(network)?;
        let space = self.site().namespace("switch");
        let (port, end) = (format!("{network}-idle"), format!("{network}-spare"));
        let master = format!("sw-{network}");
        for words in [
            &["link", "add", &port, "type", "veth", "peer", "name", &end][..],
            &["link", "set", &end, "up"],
            &["link", "set", &port, "master", &master, "up"],
        ] {
            let words: Vec<&str> = ["-n", &space].iter().chain(words).copied().collect();
            run("ip", &words)?;
        }
        Ok(())
    }

    /// The multicast groups that the switch knows: group to the parts that asked for it.
    pub fn switch_groups(&self, network: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
        self.check_network(network)?;
        let (name, space) = (format!("sw-{network}"), self.site().namespace("switch"));
        let text = run("bridge", &["-n", &space, "mdb", "show", "dev", &name])?;
        Ok(groups(&text, network))
    }

    fn check_network(&self, network: &str) -> Result<()> {
        let known = self.site().network_names();
        if known.contains(&network) {
            return Ok(());
        }
        Err(LabError::UnknownNetwork {
            network: network.to_owned(),
            known: known.join(", "),
        })
    }
}

/// Learnt entries of `bridge fdb show`.
fn table(text: &str, network: &str) -> BTreeMap<String, String> {
    let prefix = format!("{network}-");
    let entry = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let mac = words.next()?;
        let port = words.skip_while(|word| *word != "dev").nth(1)?;
        let learnt = !line.contains("permanent");
        let part = port.strip_prefix(&prefix)?;
        learnt.then(|| (mac.to_owned(), part.to_owned()))
    };
    text.lines().filter_map(entry).collect()
}

/// Entries of `bridge mdb show`.
fn groups(text: &str, network: &str) -> BTreeMap<String, BTreeSet<String>> {
    let prefix = format!("{network}-");
    let mut groups: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let after = |word: &str| {
            let at = words.iter().position(|one| *one == word)?;
            words.get(at + 1).copied()
        };
        let part = after("port").and_then(|port| port.strip_prefix(&prefix));
        if let (Some(group), Some(part)) = (after("grp"), part) {
            groups
                .entry(group.to_owned())
                .or_default()
                .insert(part.to_owned());
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_with_who_asked_for_them() {
        let text = "dev sw-lan port lan-h1 grp 239.81.0.1 temp\n\
                    dev sw-lan port lan-h2 grp 239.81.0.1 temp\n\
                    dev sw-lan port sw-lan grp ff02::6a temp\n";
        let found = groups(text, "lan");
        assert_eq!(found.len(), 1);
        let parts: Vec<&str> = found["239.81.0.1"].iter().map(String::as_str).collect();
        assert_eq!(parts, ["h1", "h2"]);
    }

    #[test]
    fn only_what_was_learnt_is_in_the_table() {
        let text = "02:51:56:00:00:01 dev lan-h2 master sw-lan\n\
                    33:33:00:00:00:01 dev lan-h1 self permanent\n\
                    aa:00:00:00:00:01 dev lan-h1 vlan 1 master sw-lan permanent\n\
                    02:00:00:00:00:07 dev mgmt-h1 master sw-mgmt\n";
        let found = table(text, "lan");
        assert_eq!(found.len(), 1);
        assert_eq!(found["02:51:56:00:00:01"], "h2");
    }
}
