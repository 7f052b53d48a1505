//! Cut cables: frames between two ports of the switch are dropped.
//!
//! Owns: one nftables table in the switch's namespace, which is also the only record of what is
//! cut. Always holds: a cut says direction by direction which frames are dropped, so one-way and
//! partial cuts need no special case. Must not: touch the hosts; they find out by themselves.

use crate::net::{namespace_path, network_names};
use crate::process::{run, run_with_input};
use crate::site::{CLIENT, Networks, Site};
use crate::{LabError, Result};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// Which of the switch's networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// All of them.
    #[default]
    All,
    /// The guests' network.
    Lan,
    /// The cluster's network.
    Mgmt,
}

/// One direction that is cut.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cut {
    /// `lan` or `mgmt`.
    pub network: String,
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
}

impl Link {
    fn networks(self, site: Networks) -> Vec<&'static str> {
        let all = network_names(site).iter().copied();
        match self {
            Self::All => all.collect(),
            // On a single network, cluster traffic is on the guests' network.
            Self::Mgmt if site == Networks::Single => vec!["lan"],
            Self::Lan => all.filter(|name| *name == "lan").collect(),
            Self::Mgmt => all.filter(|name| *name == "mgmt").collect(),
        }
    }
}

/// Makes the table.
pub(crate) fn prepare(site: &Site) -> Result<()> {
    nft(
        site,
        "table bridge quorate_lab {\n\
           set cuts {\n type ifname . ifname\n }\n\
           set lossy {\n type ifname . ifname\n }\n\
           chain forward {\n\
             type filter hook forward priority 0\n\
             iifname . oifname @cuts drop\n\
             iifname . oifname @lossy numgen random mod 100 < 30 drop\n\
           }\n\
         }\n",
    )
}

/// Cuts the cable between two parts of the site (hosts or `client`), both ways or only `from` -> `to`.
pub(crate) fn cut(site: &Site, from: &str, to: &str, link: Link, one_way: bool) -> Result<()> {
    let pairs = if one_way {
        vec![(from, to)]
    } else {
        vec![(from, to), (to, from)]
    };
    change(site, "add", "cuts", link, &pairs)
}

/// Cuts a host from everything else.
pub(crate) fn isolate(site: &Site, host: &str, link: Link) -> Result<()> {
    change(site, "add", "cuts", link, &pairs_with_all(site, host))
}

/// Loses 30 % of the frames between a host and everything else.
pub(crate) fn make_lossy(site: &Site, host: &str, link: Link) -> Result<()> {
    change(site, "add", "lossy", link, &pairs_with_all(site, host))
}

fn pairs_with_all<'a>(site: &'a Site, host: &'a str) -> Vec<(&'a str, &'a str)> {
    site.hosts
        .iter()
        .map(String::as_str)
        .chain([CLIENT])
        .filter(|other| *other != host)
        .flat_map(|other| [(host, other), (other, host)])
        .collect()
}

/// Mends everything.
pub(crate) fn heal(site: &Site) -> Result<()> {
    nft(
        site,
        "flush set bridge quorate_lab cuts\nflush set bridge quorate_lab lossy\n",
    )
}

/// What is cut now.
pub(crate) fn list(site: &Site) -> Result<Vec<Cut>> {
    let net = net_argument(site);
    let arguments = [
        net.as_str(),
        "nft",
        "-j",
        "list",
        "set",
        "bridge",
        "quorate_lab",
        "cuts",
    ];
    let text = run("nsenter", &arguments)?;
    parse(&text).ok_or(LabError::Answer {
        tool: "nft".to_owned(),
        output: text,
    })
}

fn parse(text: &str) -> Option<Vec<Cut>> {
    let answer: serde_json::Value = serde_json::from_str(text).ok()?;
    let set = answer["nftables"]
        .as_array()?
        .iter()
        .find_map(|item| item.get("set"))?;
    let mut cuts = Vec::new();
    for element in set["elem"].as_array().into_iter().flatten() {
        let from = element["concat"][0].as_str()?.split_once('-')?;
        let to = element["concat"][1].as_str()?.split_once('-')?;
        cuts.push(Cut {
            network: from.0.to_owned(),
            from: from.1.to_owned(),
            to: to.1.to_owned(),
        });
    }
    cuts.sort();
    Some(cuts)
}

fn change(site: &Site, verb: &str, set: &str, link: Link, pairs: &[(&str, &str)]) -> Result<()> {
    let mut lines = String::new();
    for network in link.networks(site.networks) {
        for (from, to) in pairs {
            for part in [from, to] {
                if *part != CLIENT {
                    site.number(part)?;
                }
            }
            // Writing to a String cannot fail.
            let _ = writeln!(
                lines,
                "{verb} element bridge quorate_lab {set} {{ \"{network}-{from}\" . \"{network}-{to}\" }}"
            );
        }
    }
    nft(site, &lines)
}

fn net_argument(site: &Site) -> String {
    format!("--net={}", namespace_path(&site.namespace("switch")))
}

/// One nftables transaction: all of it takes effect at one instant.
fn nft(site: &Site, script: &str) -> Result<()> {
    let net = net_argument(site);
    run_with_input("nsenter", &[net.as_str(), "nft", "-f", "-"], script).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_read_from_nft() {
        let text = r#"{"nftables": [{"metainfo": {"version": "1"}}, {"set": {"family": "bridge", "name": "cuts",
            "elem": [{"concat": ["mgmt-h2", "mgmt-h1"]}, {"concat": ["lan-h1", "lan-client"]}]}}]}"#;
        let cuts = parse(text).unwrap();
        assert_eq!(cuts.len(), 2);
        assert_eq!(
            (cuts[0].network.as_str(), cuts[0].to.as_str()),
            ("lan", "client")
        );
        assert_eq!(
            parse(r#"{"nftables": [{"set": {"name": "cuts"}}]}"#),
            Some(vec![])
        );
        assert_eq!(parse("no json"), None);
    }

    #[test]
    fn on_a_single_network_the_cluster_uses_the_lan() {
        assert_eq!(Link::Mgmt.networks(Networks::Single), ["lan"]);
        assert_eq!(Link::Mgmt.networks(Networks::Separate), ["mgmt"]);
        assert_eq!(Link::All.networks(Networks::Separate), ["lan", "mgmt"]);
    }
}
