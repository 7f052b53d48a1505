//! The site's switch as something to be set up: how long it remembers addresses, whether it snoops on IGMP.
//!
//! Always holds: settings are the kernel bridge's own, so what the lab shows a bridge does.

use crate::lab::Lab;
use crate::process::run;
use crate::{LabError, Result};
use std::collections::BTreeMap;

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

#[cfg(test)]
mod tests {
    use super::*;

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
