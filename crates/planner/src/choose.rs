//! Choosing a host: hard rules first, then the best score, then the first name.

use crate::fit::{Query, Reject};
use crate::score::Score;
use crate::work::Work;
use quorate_state::{Candidate, Reason};

/// Most hosts named in a reason.
const CANDIDATES_KEPT: usize = 20;

/// All hosts as they look for one question, best first, then the rejected ones by name.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) best: Option<usize>,
    ranked: Vec<(usize, Result<Score, Reject>)>,
}

impl Work<'_> {
    pub(crate) fn choose(&self, query: &Query<'_>) -> Choice {
        let judged = (0..self.hosts.len()).map(|at| {
            let fit = self.fit(query, at);
            (at, fit.map(|()| self.score(query, at)))
        });
        let mut ranked: Vec<_> = judged.collect();
        ranked.sort_by_key(|(at, result)| {
            let score = result.as_ref().ok().map(|score| score.total);
            (std::cmp::Reverse(score), *at)
        });
        let best = ranked
            .first()
            .filter(|(_, result)| result.is_ok())
            .map(|(at, _)| *at);
        Choice { best, ranked }
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
