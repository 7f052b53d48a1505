//! Cut cables: frames between two ports of the switch are dropped.
//!
//! Owns: one nftables table in the switch's namespace, which is also the only record of what is
//! cut. Always holds: a cut says direction by direction which frames are dropped, so one-way and
//! partial cuts need no special case. Must not: touch the hosts; they find out by themselves.

use crate::net::namespace_path;
use crate::process::{run, run_with_input};
use crate::site::{CLIENT, Networks, SAN, Site};
use crate::{LabError, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

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
    /// The network to the SAN.
    San,
}

/// One direction that is cut.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cut {
    /// `lan`, `mgmt` or `san`.
    pub network: String,
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
}

impl Link {
    fn networks(self, site: &Site) -> Vec<&'static str> {
        let all = site.network_names().into_iter();
        match self {
            Self::All => all.collect(),
            // On a single network, cluster traffic is on the guests' network.
            Self::Mgmt if site.networks == Networks::Single => vec!["lan"],
            Self::Lan => all.filter(|name| *name == "lan").collect(),
            Self::Mgmt => all.filter(|name| *name == "mgmt").collect(),
            Self::San => all.filter(|name| *name == SAN).collect(),
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

/// Cuts the cable between two parts of the site (hosts, `client` or `san`), both ways or only `from` -> `to`.
pub(crate) fn cut(site: &Site, from: &str, to: &str, link: Link, one_way: bool) -> Result<()> {
    let pairs = if one_way {
        vec![(from, to)]
    } else {
        vec![(from, to), (to, from)]
    };
    change(site, "add", "cuts", link, &pairs)
}

/// Cuts a host or the SAN from everything else.
pub(crate) fn isolate(site: &Site, part: &str, link: Link) -> Result<()> {
    change(site, "add", "cuts", link, &pairs_with_all(site, part))
}

/// Loses 30 % of the frames between a host or the SAN and everything else.
pub(crate) fn make_lossy(site: &Site, part: &str, link: Link) -> Result<()> {
    change(site, "add", "lossy", link, &pairs_with_all(site, part))
}

fn pairs_with_all<'a>(site: &'a Site, part: &'a str) -> Vec<(&'a str, &'a str)> {
    site.hosts
        .iter()
        .map(String::as_str)
        .chain([CLIENT])
        .chain(site.san.then_some(SAN))
        .filter(|other| *other != part)
        .flat_map(|other| [(part, other), (other, part)])
        .collect()
}

/// Mends everything.
pub(crate) fn heal(site: &Site) -> Result<()> {
    hurry(site)?;
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
    for part in pairs.iter().flat_map(|(from, to)| [from, to]) {
        site.check_part(part)?;
    }
    for network in link.networks(site) {
        let plugged = |part: &str| site.plugged_into(network).any(|other| other == part);
        for (from, to) in pairs {
            if !plugged(from) || !plugged(to) {
                continue;
            }
            // Writing to a String cannot fail.
            let _ = writeln!(
                lines,
                "{verb} element bridge quorate_lab {set} {{ \"{network}-{from}\" . \"{network}-{to}\" }}"
            );
        }
    }
    if lines.is_empty() {
        let (from, to) = pairs.first().copied().unwrap_or_default();
        return Err(LabError::NoCable {
            from: from.to_owned(),
            to: to.to_owned(),
        });
    }
    nft(site, &lines)
}

/// Makes the cables of a part carry no more than so much, each way: a slow network, or a slow SAN. Small
/// packets pass at once until the allowance is used up, as on a real line.
pub(crate) fn slow(site: &Site, part: &str, link: Link, kbit_per_s: u32) -> Result<()> {
    site.check_part(part)?;
    let mut ends = Vec::new();
    for network in link.networks(site) {
        if site.plugged_into(network).any(|other| other == part) {
            ends.push(format!("{} {network}-{part}", site.namespace("switch")));
            ends.push(format!("{} {network}0", site.namespace(part)));
        }
    }
    if ends.is_empty() {
        return Err(LabError::NoCable {
            from: part.to_owned(),
            to: "the switch".to_owned(),
        });
    }
    let mut all = slowed(site);
    all.extend(ends.iter().cloned());
    let path = slow_path(site);
    let text: Vec<String> = all.into_iter().collect();
    std::fs::write(&path, text.join("\n")).map_err(LabError::file("write", &path))?;
    let rate = format!("{kbit_per_s}kbit");
    for end in &ends {
        let tbf = ["tbf", "rate", &rate, "burst", "4kb", "limit", "1mb"];
        queue(end, "replace", &tbf)?;
    }
    Ok(())
}

/// The cables that are slow now: network and part.
pub(crate) fn slow_cables(site: &Site) -> Vec<(String, String)> {
    let switch = format!("{} ", site.namespace("switch"));
    let ends = slowed(site).into_iter();
    ends.filter_map(|end| {
        let (network, part) = end.strip_prefix(&switch)?.split_once('-')?;
        Some((network.to_owned(), part.to_owned()))
    })
    .collect()
}

/// Lets everything run at full speed again.
fn hurry(site: &Site) -> Result<()> {
    for end in slowed(site) {
        queue(&end, "delete", &[])?;
    }
    match std::fs::remove_file(slow_path(site)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LabError::file("remove", slow_path(site))(error))
        }
        _ => Ok(()),
    }
}

/// Changes the queue of one end of a cable, given as `NAMESPACE INTERFACE`.
fn queue(end: &str, verb: &str, kind: &[&str]) -> Result<()> {
    let (namespace, device) = end.split_once(' ').unwrap_or_default();
    let mut arguments = vec!["-n", namespace, "qdisc", verb, "dev", device, "root"];
    arguments.extend(kind);
    run("tc", &arguments).map(drop)
}

/// The ends of cables that are slow now.
fn slowed(site: &Site) -> BTreeSet<String> {
    let text = std::fs::read_to_string(slow_path(site)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn slow_path(site: &Site) -> PathBuf {
    site.dir.join("slow")
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
    use crate::site::SiteSpec;
    use std::path::Path;

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
        let mut spec = SiteSpec::new(Path::new("/bin/quorate"));
        let separate = Site::plan(spec.clone()).unwrap();
        spec.networks = Networks::Single;
        let single = Site::plan(spec.clone()).unwrap();
        spec.san = true;
        let with_san = Site::plan(spec).unwrap();
        assert_eq!(Link::Mgmt.networks(&single), ["lan"]);
        assert_eq!(Link::Mgmt.networks(&separate), ["mgmt"]);
        assert_eq!(Link::All.networks(&separate), ["lan", "mgmt"]);
        assert!(Link::San.networks(&separate).is_empty());
        assert_eq!(Link::All.networks(&with_san), ["lan", "san"]);
        assert_eq!(
            pairs_with_all(&with_san, SAN)[..2],
            [("san", "h1"), ("h1", "san")]
        );
    }

    #[test]
    fn what_no_cable_joins_cannot_be_cut() {
        let mut spec = SiteSpec::new(Path::new("/bin/quorate"));
        spec.san = true;
        let site = Site::plan(spec).unwrap();
        let error = cut(&site, CLIENT, SAN, Link::All, false).unwrap_err();
        assert!(error.to_string().contains("no cable"), "{error}");
    }
}
