//! Votes: who has one, how many failures are survived, and which witness would be best for the hosts at hand.

use super::Observed;
use crate::quorum::{
    QuorumView, RecommendationView, VoterKind, VoterView, WitnessKind, WitnessOption, WitnessView,
};
use quorate_membership::wanted_voters;
use quorate_state::{State, Witness};
use quorate_types::{HostName, NodeId, PoolName, PoolSpec};

/// The view of the votes. `observed` is what the leader knows.
#[must_use]
pub fn quorum(state: &State, observed: Option<&Observed>) -> QuorumView {
    let nothing = Observed::default();
    let seen = observed.unwrap_or(&nothing);
    let voters = voters(state, seen);
    let votes: Vec<&VoterView> = voters.iter().filter(|voter| voter.votes).collect();
    let alive = votes.iter().filter(|voter| voter.up).count();
    let majority = votes.len() / 2 + 1;
    let mut view = QuorumView {
        quorate: observed.is_some_and(|seen| seen.quorate),
        leader: seen.leader.clone(),
        votes: votes.len(),
        votes_up: alive,
        survives: alive.saturating_sub(majority),
        witness: state
            .quorum
            .witness
            .as_ref()
            .map(|witness| witness_view(witness, seen)),
        voters,
        problems: Vec::new(),
        recommendation: recommend(state, seen),
    };
    view.problems = problems(state, &view);
    view
}

/// What is wrong with the witness, for `status` too.
pub(super) fn witness_problem(state: &State, seen: &Observed) -> Option<String> {
    let witness = state.quorum.witness.as_ref()?;
    let vote = seen.votes.get(&witness.node())?;
    let silent = vote.silent?;
    let votes = seen.voters.contains(&witness.node());
    let what = witness.describe();
    if !votes {
        return (silent.0 > 10_000).then(|| {
            format!(
                "the {what} was not heard yet and has no vote: {}",
                remedy(witness)
            )
        });
    }
    Some(format!(
        "the {what} has not answered for {silent}: the hosts go on, and the next host that fails may stop the cluster; {}",
        remedy(witness)
    ))
}

fn remedy(witness: &Witness) -> String {
    match witness {
        Witness::Remote { address, .. } => format!(
            "start `quorate witness serve` there, or mend the way to {address}; `quorate quorum set --witness none` gives it up"
        ),
        Witness::Disk {
            pool,
            unit: Some(unit),
            ..
        } => format!(
            "make {} of pool {pool} usable again: at least 512 MiB, writable by all hosts (the witness repairs itself then; the hosts' logs say what is wrong); `quorate quorum set` chooses another",
            unit.image
        ),
        Witness::Disk { pool, .. } => format!(
            "make pool {pool} usable again (it repairs itself then); `quorate quorum set` chooses another witness"
        ),
    }
}

fn voters(state: &State, seen: &Observed) -> Vec<VoterView> {
    let up = |node: NodeId| {
        seen.votes
            .get(&node)
            .is_some_and(|vote| vote.silent.is_none())
    };
    let voter = |name: String, kind, node: NodeId| VoterView {
        name,
        kind,
        node,
        votes: seen.voters.contains(&node),
        up: up(node),
        silent_ms: seen
            .votes
            .get(&node)
            .and_then(|vote| vote.silent)
            .map(|silent| silent.0),
        caught_up: seen.votes.get(&node).is_some_and(|vote| vote.caught_up),
        left: false,
    };
    let mut all: Vec<VoterView> = state
        .hosts
        .iter()
        .map(|(name, record)| VoterView {
            left: state.quorum.left.contains(name),
            ..voter(name.to_string(), VoterKind::Host, record.node)
        })
        .collect();
    if let Some(witness) = &state.quorum.witness {
        let name = match witness {
            Witness::Remote { name, .. } => name.to_string(),
            Witness::Disk {
                pool,
                unit: Some(unit),
                ..
            } => format!("disk witness ({pool}/{})", unit.image),
            Witness::Disk { pool, .. } => format!("disk witness ({pool})"),
        };
        all.push(voter(name, VoterKind::Witness, witness.node()));
    }
    let known: Vec<NodeId> = all.iter().map(|voter| voter.node).collect();
    let gone = seen.voters.iter().filter(|node| !known.contains(node));
    all.extend(gone.map(|node| voter(format!("node {node} (gone)"), VoterKind::Witness, *node)));
    all
}

fn witness_view(witness: &Witness, seen: &Observed) -> WitnessView {
    let vote = seen.votes.get(&witness.node());
    let (kind, pool, name, address) = match witness {
        Witness::Disk { pool, .. } => (WitnessKind::Disk, Some(pool.clone()), None, None),
        Witness::Remote { name, address, .. } => (
            WitnessKind::Remote,
            None,
            Some(name.clone()),
            Some(address.clone()),
        ),
    };
    WitnessView {
        kind,
        pool,
        disk: witness.unit().map(|(_, unit)| unit.image.clone()),
        name,
        address,
        votes: seen.voters.contains(&witness.node()),
        up: vote.is_some_and(|vote| vote.silent.is_none()),
    }
}

fn problems(state: &State, view: &QuorumView) -> Vec<String> {
    let mut found = Vec::new();
    if !view.quorate {
        found.push("no leader with a majority answers: `quorate status` says more".to_owned());
        return found;
    }
    for voter in view.voters.iter().filter(|voter| voter.votes && !voter.up) {
        let silent = voter.silent_ms.unwrap_or_default() / 1000;
        found.push(format!(
            "{} has a vote and has been silent for {silent} s",
            voter.name
        ));
    }
    if view.survives == 0 && state.hosts.len() > 1 {
        let single = view.votes == 1;
        let voter = view.voters.iter().find(|voter| voter.votes);
        found.push(match voter.filter(|_| single) {
            Some(voter) => format!(
                "only {} votes: if it fails, the cluster stops; {}",
                voter.name, view.recommendation.summary
            ),
            None => "one more failure of a voter stops the cluster".to_owned(),
        });
    }
    found
}

/// Pools that every host uses, and can, in which a witness has a place: those with files first.
fn shared_pools(state: &State, seen: &Observed) -> Vec<(PoolName, bool)> {
    let all_list_it = |hosts: &std::collections::BTreeSet<HostName>| {
        hosts.is_empty() || state.hosts.keys().all(|host| hosts.contains(host))
    };
    let usable = |pool: &PoolName| {
        state.hosts.keys().all(|host| {
            let report = seen.hosts.get(host).and_then(|host| host.report.as_ref());
            report.is_some_and(|report| report.pools.get(pool).is_some_and(|pool| pool.usable))
        })
    };
    let pools = state.pools.iter().filter_map(|(name, object)| {
        let files = match object.spec {
            PoolSpec::Directory { .. } => true,
            PoolSpec::Iscsi(_) | PoolSpec::Block(_) => false,
            _ => return None,
        };
        let shared = all_list_it(object.spec.hosts()) && usable(name);
        shared.then(|| (name.clone(), files))
    });
    let mut pools: Vec<_> = pools.collect();
    pools.sort_by_key(|(_, files)| !files);
    pools
}

fn survives(hosts: usize, witness: bool, max_voters: u32) -> (usize, usize) {
    let (votes, _) = wanted_voters(hosts, witness, max_voters);
    (votes, votes.saturating_sub(votes / 2 + 1))
}

fn recommend(state: &State, seen: &Observed) -> RecommendationView {
    let hosts = state.hosts.len();
    let max = state.settings().max_voters;
    let (without, survives_without) = survives(hosts, false, max);
    let (with, survives_with) = survives(hosts, true, max);
    let pools = shared_pools(state, seen);
    let option = |witness, votes, survives, why: &str| WitnessOption {
        witness,
        votes,
        survives,
        why: why.to_owned(),
    };
    let mut options = vec![option(
        WitnessKind::None,
        without,
        survives_without,
        match hosts {
            1 => "there is only one host",
            2 => "one of the two hosts votes alone: if it fails, the other stops too",
            _ => "the hosts themselves are a majority",
        },
    )];
    if hosts >= 2 {
        options.push(option(
            WitnessKind::Disk,
            with,
            survives_with,
            "needs no further machine; whichever host holds the pool's lease has the third vote; useless while the pool is away",
        ));
        options.push(option(
            WitnessKind::Remote,
            with,
            survives_with,
            "needs a third machine, however small; independent of the storage, and it relays between hosts that cannot hear each other",
        ));
    }
    let helps = survives_with > survives_without;
    let mut reasons = Vec::new();
    let plural = |n: usize, word: &str| match n {
        1 => format!("1 {word}"),
        n => format!("{n} {word}s"),
    };
    let (choice, pool) = if !helps {
        reasons.push(match hosts {
            1 => "one host is its own majority; a second one, and then a witness, would survive a failure".to_owned(),
            _ => format!(
                "{} have {} and survive {}; a witness would add nothing",
                plural(hosts, "host"),
                plural(without, "vote"),
                plural(survives_without, "failure")
            ),
        });
        (WitnessKind::None, None)
    } else {
        reasons.push(format!(
            "{} alone have {} and survive {}; with a witness there are {}, and any {} of them may fail",
            plural(hosts, "host"),
            plural(without, "vote"),
            plural(survives_without, "failure"),
            with,
            survives_with
        ));
        match pools.first() {
            Some((pool, files)) => {
                reasons.push(match files {
                    true => format!(
                        "all hosts share pool {pool}: a disk witness there needs no further machine"
                    ),
                    false => format!(
                        "all hosts share pool {pool}: a disk witness on a unit of its own there, of 512 MiB, needs no further machine"
                    ),
                });
                (WitnessKind::Disk, Some(pool.clone()))
            }
            None => {
                reasons.push(
                    "no pool of the kind `directory`, `iscsi` or `block` is usable on all hosts, so a disk witness has no place: any third machine will do for a remote one".to_owned(),
                );
                (WitnessKind::Remote, None)
            }
        }
    };
    let unit = pools.first().filter(|(_, files)| !files);
    let command = match (&choice, &pool) {
        (WitnessKind::Disk, Some(pool)) if unit.is_some() => {
            format!("quorate quorum set --witness disk --pool {pool} --disk NAME")
        }
        (WitnessKind::Disk, Some(pool)) => {
            format!("quorate quorum set --witness disk --pool {pool}")
        }
        (WitnessKind::Remote, _) => "quorate quorum set --witness remote".to_owned(),
        _ => "quorate quorum set --witness none".to_owned(),
    };
    let satisfied = match (&state.quorum.witness, choice) {
        (None, WitnessKind::None) => true,
        (Some(_), WitnessKind::None) | (None, _) => false,
        // Either kind does.
        (Some(_), _) => true,
    };
    let summary = match satisfied {
        true => "the set-up is as recommended".to_owned(),
        false => format!("recommended: `{command}`"),
    };
    RecommendationView {
        witness: choice,
        pool,
        satisfied,
        summary,
        command,
        reasons,
        options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::ObservedVote;
    use quorate_state::{Command, Envelope, FORMAT, WitnessChoice};
    use quorate_types::{ClusterSettings, Millis, Timestamp};

    fn apply(state: &mut State, command: Command) {
        let envelope = Envelope {
            format: FORMAT,
            at: Timestamp(1),
            by: "test".into(),
            command,
        };
        state.apply(&envelope).unwrap();
    }

    fn site(hosts: u64, pool: bool) -> (State, Observed) {
        let mut state = State::default();
        apply(
            &mut state,
            Command::CreateCluster {
                id: "c".into(),
                name: "lab".into(),
                ca_certificate: "c".into(),
                ca_key: "k".into(),
                host: "h1".parse().unwrap(),
                address: "192.0.2.1:7".into(),
                settings: ClusterSettings::default(),
            },
        );
        for n in 2..=hosts {
            let hash = format!("t{n}");
            let expires = Timestamp(9);
            apply(
                &mut state,
                Command::CreateToken {
                    hash: hash.clone(),
                    expires,
                },
            );
            apply(
                &mut state,
                Command::AdmitHost {
                    token: hash,
                    host: format!("h{n}").parse().unwrap(),
                    address: format!("192.0.2.{n}:7"),
                },
            );
        }
        let mut seen = Observed {
            leader: Some("h1".parse().unwrap()),
            quorate: true,
            voters: [1].into(),
            ..Observed::default()
        };
        if pool {
            let manifest = serde_json::json!({ "pools": {
                "shared": { "kind": "directory", "path": "/srv" } } });
            let manifest = serde_json::from_value(manifest).unwrap();
            apply(
                &mut state,
                Command::ApplyManifest {
                    base: None,
                    manifest,
                },
            );
        }
        for (name, record) in &state.hosts {
            let vote = ObservedVote {
                silent: None,
                caught_up: true,
            };
            seen.votes.insert(record.node, vote);
            let host = crate::build::tests::with_pool(name, pool);
            seen.hosts.insert(name.clone(), host);
        }
        (state, seen)
    }

    #[test]
    fn recommends_what_helps_and_says_why() {
        for (hosts, pool, choice, text) in [
            (1, true, WitnessKind::None, "its own majority"),
            (2, true, WitnessKind::Disk, "all hosts share pool shared"),
            (2, false, WitnessKind::Remote, "any third machine"),
            (3, true, WitnessKind::None, "would add nothing"),
            (4, true, WitnessKind::Disk, "any 2 of them may fail"),
            (4, false, WitnessKind::Remote, "any third machine"),
            (5, true, WitnessKind::None, "5 votes and survive 2 failures"),
            (6, true, WitnessKind::None, "would add nothing"),
        ] {
            let (state, seen) = site(hosts, pool);
            let view = quorum(&state, Some(&seen)).recommendation;
            assert_eq!(view.witness, choice, "{hosts} hosts: {view:?}");
            let reasons = view.reasons.join(" ");
            assert!(reasons.contains(text), "{hosts} hosts: {reasons}");
            assert_eq!(view.satisfied, choice == WitnessKind::None);
        }
    }

    #[test]
    fn tells_what_is_survived_and_what_is_wrong() {
        let (mut state, mut seen) = site(2, true);
        let view = quorum(&state, Some(&seen));
        assert_eq!((view.votes, view.survives), (1, 0));
        assert!(view.problems[0].contains("only h1 votes"), "{view:?}");
        assert!(view.problems[0].contains("--witness disk --pool shared"));
        let pool = "shared".parse().unwrap();
        let witness = WitnessChoice::Disk { pool, image: None };
        apply(&mut state, Command::SetWitness { witness });
        assert_eq!(witness_problem(&state, &seen), None, "not looked at yet");
        let mut vote = |silent: Option<u64>| {
            let silent = silent.map(Millis);
            seen.votes.insert(
                3,
                ObservedVote {
                    silent,
                    caught_up: true,
                },
            );
            seen.clone()
        };
        assert_eq!(
            witness_problem(&state, &vote(Some(500))),
            None,
            "it may take a moment"
        );
        let late = witness_problem(&state, &vote(Some(20_000))).unwrap();
        assert!(late.contains("has no vote"), "{late}");
        let mut seen = vote(None);
        seen.voters = [1, 2, 3].into();
        let view = quorum(&state, Some(&seen));
        assert_eq!((view.votes, view.votes_up, view.survives), (3, 3, 1));
        assert!(view.problems.is_empty(), "{view:?}");
        assert!(view.recommendation.satisfied);
        assert_eq!(witness_problem(&state, &seen), None);
        let silent = Some(Millis(5000));
        seen.votes.insert(
            3,
            ObservedVote {
                silent,
                caught_up: true,
            },
        );
        let view = quorum(&state, Some(&seen));
        assert_eq!((view.votes_up, view.survives), (2, 0));
        assert!(view.problems[0].contains("disk witness (shared) has a vote"));
        let text = witness_problem(&state, &seen).unwrap();
        assert!(text.contains("repairs itself"), "{text}");
        let alone = quorum(&state, None);
        assert!(!alone.quorate && alone.problems[0].contains("quorate status"));
    }
}
