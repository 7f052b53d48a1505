//! Cutting a host off from units with reservations: who does it, one host after the other until every unit is cut.

use super::peer::{self, Answer, Ask};
use async_trait::async_trait;
use quorate_agent::{AgentHandle, UnitsCut};
use quorate_controller::{Door, Shut};
use quorate_state::State;
use quorate_transport::Peers;
use quorate_types::{Epoch, HostName};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Bound for one host: its own operation on a unit takes three seconds at most.
const ASK_WITHIN: Duration = Duration::from_secs(5);

/// Reaches the hosts that reach the units.
pub(crate) struct Cutters {
    pub(crate) me: HostName,
    pub(crate) agent: AgentHandle,
    pub(crate) peers: Peers,
    pub(crate) states: watch::Receiver<Arc<State>>,
}

impl Cutters {
    /// Hosts that may reach the door's pool, the likeliest first: this one, those with a direct link, the others.
    fn candidates(&self, door: &Door, victim: &HostName) -> Vec<HostName> {
        let (state, report) = (self.states.borrow().clone(), self.agent.report());
        let spec = state.pools.get(&door.pool).map(|pool| &pool.spec);
        let usable = |host: &HostName| match *host == self.me {
            true => report.pools.get(&door.pool).is_none_or(|pool| pool.usable),
            false => true,
        };
        let distance = |host: &HostName| match report.links.get(host) {
            _ if *host == self.me => 0,
            Some(link) if link.up => 1,
            _ => 2,
        };
        let mut hosts: Vec<HostName> = state
            .hosts
            .keys()
            .filter(|host| *host != victim && spec.is_some_and(|spec| spec.is_for(host)))
            .filter(|host| usable(host) && !state.is_cut(host, &door.pool))
            .cloned()
            .collect();
        hosts.sort_by_key(|host| (distance(host), host.clone()));
        hosts
    }

    async fn ask(
        &self,
        host: &HostName,
        door: &Door,
        victim: &HostName,
        epochs: BTreeMap<String, Epoch>,
        within: Duration,
    ) -> Result<UnitsCut, String> {
        if *host == self.me {
            let cut = self.agent.cut_units(&door.pool, victim, epochs);
            let done = tokio::time::timeout(within, cut).await;
            return done.map_err(|_| "its storage does not answer".to_owned());
        }
        let node = self
            .states
            .borrow()
            .hosts
            .get(host)
            .map(|record| record.node);
        let node = node.ok_or("it is not a host of this cluster any more")?;
        let ask = Ask::CutUnits {
            pool: door.pool.clone(),
            host: victim.clone(),
            epochs,
        };
        match peer::ask(&self.peers, node, &ask, within).await {
            Ok(Answer::UnitsCut(done)) => Ok(done),
            Ok(_) => Err("it gave another kind of answer than was asked for".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Cuts the host whose door it is off from every target of it.
    pub(crate) async fn shut(
        &self,
        door: &Door,
        epochs: BTreeMap<String, Epoch>,
        within: Duration,
    ) -> Shut {
        let Ok(victim) = HostName::new(door.initiator.clone()) else {
            let problem = "the door names no host".to_owned();
            return door.targets.iter().map(|_| Err(problem.clone())).collect();
        };
        let hosts = self.candidates(door, &victim);
        let ask = Order {
            cutters: self,
            door,
            victim: &victim,
        };
        one_after_the_other(&door.targets, &hosts, epochs, within, &ask).await
    }
}

/// Asks one host for a cut.
#[async_trait]
trait AskHost: Send + Sync {
    async fn ask(
        &self,
        host: &HostName,
        epochs: BTreeMap<String, Epoch>,
        within: Duration,
    ) -> Result<UnitsCut, String>;
}

struct Order<'a> {
    cutters: &'a Cutters,
    door: &'a Door,
    victim: &'a HostName,
}

#[async_trait]
impl AskHost for Order<'_> {
    async fn ask(
        &self,
        host: &HostName,
        epochs: BTreeMap<String, Epoch>,
        within: Duration,
    ) -> Result<UnitsCut, String> {
        let asked = self
            .cutters
            .ask(host, self.door, self.victim, epochs, within);
        asked.await
    }
}

/// Asks hosts until every target is cut, each for what is left.
async fn one_after_the_other(
    targets: &[String],
    hosts: &[HostName],
    mut epochs: BTreeMap<String, Epoch>,
    within: Duration,
    by: &dyn AskHost,
) -> Shut {
    let begun = Instant::now();
    let (mut done, mut problems) = (BTreeMap::new(), BTreeMap::new());
    let mut nobody = "no host is left that reaches the pool".to_owned();
    for host in hosts {
        let left = within.saturating_sub(begun.elapsed());
        if epochs.is_empty() || left.is_zero() {
            break;
        }
        let cut = by.ask(host, epochs.clone(), left.min(ASK_WITHIN)).await;
        let cut = cut.unwrap_or_else(|why| {
            nobody = format!("{host}: {why}");
            UnitsCut::new()
        });
        for (image, result) in cut {
            match result {
                Ok(how) => {
                    epochs.remove(&image);
                    let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                    done.insert(image, (how, took));
                }
                Err(why) => drop(problems.insert(image, format!("{host}: {why}"))),
            }
        }
    }
    let each = targets.iter().map(|image| match done.remove(image) {
        Some(done) => Ok(done),
        None => Err(problems.remove(image).unwrap_or_else(|| nobody.clone())),
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    fn epochs(images: &[&str]) -> BTreeMap<String, Epoch> {
        let each = images.iter().map(|image| ((*image).to_owned(), Epoch(3)));
        each.collect()
    }

    const WITHIN: Duration = Duration::from_secs(60);

    /// What hosts answer, and what they were asked.
    struct Site {
        answers: BTreeMap<HostName, Result<UnitsCut, String>>,
        asked: Mutex<Vec<(String, usize)>>,
    }

    impl Site {
        fn new<const N: usize>(answers: [(&str, Result<UnitsCut, String>); N]) -> Self {
            let answers = answers.into_iter();
            Self {
                answers: answers.map(|(name, answer)| (host(name), answer)).collect(),
                asked: Mutex::default(),
            }
        }

        async fn shut(&self) -> Shut {
            let targets = ["a", "b"].map(str::to_owned);
            let hosts: Vec<_> = self.answers.keys().cloned().collect();
            one_after_the_other(&targets, &hosts, epochs(&["a", "b"]), WITHIN, self).await
        }
    }

    #[async_trait]
    impl AskHost for Site {
        async fn ask(
            &self,
            host: &HostName,
            epochs: BTreeMap<String, Epoch>,
            _: Duration,
        ) -> Result<UnitsCut, String> {
            let asked = (host.to_string(), epochs.len());
            self.asked.lock().unwrap().push(asked);
            self.answers[host].clone()
        }
    }

    fn told(image: &str, result: Result<&str, &str>) -> (String, Result<String, String>) {
        let result = result.map(str::to_owned).map_err(str::to_owned);
        (image.to_owned(), result)
    }

    #[tokio::test]
    async fn what_one_host_cannot_cut_the_next_one_does() {
        let some = [
            told("a", Ok("preempted")),
            told("b", Err("reservation conflict")),
        ];
        let site = Site::new([
            ("h2", Err("no path".to_owned())),
            ("h3", Ok(some.into())),
            ("h4", Ok([told("b", Ok("read"))].into())),
        ]);
        let shut = site.shut().await;
        let how: Vec<_> = shut.into_iter().map(|one| one.unwrap().0).collect();
        assert_eq!(how, ["preempted", "read"]);
        let asked = site.asked.into_inner().unwrap();
        let wanted = [("h2", 2), ("h3", 2), ("h4", 1)].map(|(host, n)| (host.to_owned(), n));
        assert_eq!(asked, wanted);
    }

    #[tokio::test]
    async fn a_unit_that_nobody_cut_is_not_cut_and_says_why() {
        let site = Site::new([
            ("h2", Ok([told("a", Err("a stranger uses it"))].into())),
            ("h3", Err("it does not answer".to_owned())),
        ]);
        let shut = site.shut().await;
        let why: Vec<_> = shut.into_iter().map(|one| one.unwrap_err()).collect();
        assert_eq!(why, ["h2: a stranger uses it", "h3: it does not answer"]);
        let shut = Site::new([]).shut().await;
        assert!(shut.iter().all(Result::is_err));
    }
}
