//! Choosing a host: hard rules first, then the best score, then the first name.

use crate::fit::{Ask, Query, Reject};
use crate::score::Score;
use crate::work::Work;
use quorate_state::{Candidate, Reason};

/// Most hosts named in a reason.
const CANDIDATES_KEPT: usize = 20;

/// Hosts as they look for one question: the best first, then rejected ones by name.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    pub(crate) best: Option<usize>,
    ranked: Vec<(usize, Result<Score, Reject>)>,
}

impl Work<'_> {
    pub(crate) fn choose(&self, query: &Query<'_>) -> Choice {
        let ask = self.ask(query);
        #[cfg(test)]
        self.check_agreement(query, &ask);
        let mut fits: Vec<(usize, Score)> = ask
            .set
            .iter()
            .filter(|at| self.passes(query, &ask, *at))
            .map(|at| (at, self.score(query, &ask, at)))
            .collect();
        let rank = |(at, score): &(usize, Score)| (std::cmp::Reverse(score.total), *at);
        if fits.len() > CANDIDATES_KEPT {
            fits.select_nth_unstable_by_key(CANDIDATES_KEPT, rank);
            fits.truncate(CANDIDATES_KEPT);
        }
        fits.sort_by_key(rank);
        let best = fits.first().map(|(at, _)| *at);
        let mut ranked: Vec<_> = fits
            .into_iter()
            .map(|(at, score)| (at, Ok(score)))
            .collect();
        self.add_rejected(query, &mut ranked);
        Choice { best, ranked }
    }

    /// The short way and the long one say the same of every host.
    #[cfg(test)]
    fn check_agreement(&self, query: &Query<'_>, ask: &Ask) {
        for at in 0..self.hosts.len() {
            let short = ask.set.has(at) && self.passes(query, ask, at);
            let long = self.fit(query, at);
            let name = self.hosts[at].name;
            assert_eq!(short, long.is_ok(), "{query:?} {name}: {long:?} {ask:?}");
        }
    }

    /// Fills the places that are left with hosts that do not fit, the one that was asked for first.
    fn add_rejected(&self, query: &Query<'_>, ranked: &mut Vec<(usize, Result<Score, Reject>)>) {
        let asked = query.only.into_iter();
        let others = (0..self.hosts.len()).filter(|at| query.only != Some(*at));
        for at in asked.chain(others) {
            if ranked.len() >= CANDIDATES_KEPT {
                return;
            }
            if let Err(reject) = self.fit(query, at) {
                ranked.push((at, Err(reject)));
            }
        }
    }

    /// The best host for a start, without anything to explain it. `alone`: if there is no room for
    /// all of its group, for it alone.
    pub(crate) fn best_start(&self, vm: usize, alone: bool) -> Option<usize> {
        self.pick(vm, alone, |work, query, ask, at| {
            work.score(query, ask, at).total
        })
    }

    /// A host for a start that leaves the least room; or, if not `tight`, the best one.
    pub(crate) fn tightest_start(&self, vm: usize, tight: bool, alone: bool) -> Option<usize> {
        if !tight {
            return self.best_start(vm, alone);
        }
        self.pick(vm, alone, |work, query, ask, at| {
            let score = work.score(query, ask, at);
            -score.free()
        })
    }

    fn pick(
        &self,
        vm: usize,
        alone: bool,
        value: impl Fn(&Self, &Query<'_>, &Ask, usize) -> i64,
    ) -> Option<usize> {
        let pick = |query: &Query<'_>| {
            let ask = self.ask(query);
            let hosts = ask.set.iter().filter(|at| self.passes(query, &ask, *at));
            let valued = hosts.map(|at| (value(self, query, &ask, at), std::cmp::Reverse(at)));
            valued.max().map(|(_, at)| at.0)
        };
        let whole = Query {
            vm,
            ..Query::default()
        };
        pick(&whole).or_else(|| {
            self.groups.of[vm].filter(|_| alone)?;
            let alone = Query {
                alone: true,
                ..whole
            };
            pick(&alone)
        })
    }

    /// Where a free VM would start. Room for its whole group is looked for first.
    pub(crate) fn choose_start(&self, vm: usize, only: Option<usize>) -> Choice {
        let whole = Query {
            vm,
            only,
            ..Query::default()
        };
        let choice = self.choose(&whole);
        if choice.best.is_some() || self.groups.of[vm].is_none() {
            return choice;
        }
        let alone = Query {
            alone: true,
            ..whole
        };
        self.choose(&alone)
    }
}

impl Choice {
    /// A choice that nobody asks the reason of.
    pub(crate) fn of(best: Option<usize>) -> Self {
        Self {
            best,
            ranked: Vec::new(),
        }
    }

    pub(crate) fn candidates(&self, work: &Work<'_>) -> Vec<Candidate> {
        let candidate = |(at, result): &(usize, Result<Score, Reject>)| Candidate {
            host: work.hosts[*at].name.clone(),
            score: result.as_ref().ok().map(|score| score.total),
            why: match result {
                Ok(score) => score.describe(),
                Err(reject) => reject.describe(work, *at),
            },
        };
        self.ranked
            .iter()
            .take(CANDIDATES_KEPT)
            .map(candidate)
            .collect()
    }

    /// A reason with the candidates.
    pub(crate) fn reason(&self, work: &Work<'_>, summary: String) -> Reason {
        Reason {
            summary,
            evidence: Vec::new(),
            candidates: self.candidates(work),
        }
    }

    /// Why no host fits, in one sentence.
    pub(crate) fn rejections(&self, work: &Work<'_>) -> String {
        let said = self.ranked.iter().filter_map(|(at, result)| {
            let reject = result.as_ref().err()?;
            if matches!(reject, Reject::NotAsked(_)) {
                return None;
            }
            let text = reject.describe(work, *at);
            Some(format!("{}: {text}", work.hosts[*at].name))
        });
        let said: Vec<String> = said.take(CANDIDATES_KEPT).collect();
        if said.is_empty() {
            return "there is no other host".into();
        }
        said.join("; ")
    }
}
