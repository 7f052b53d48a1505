//! Health checks of members that run on this host.
//!
//! ```text
//!  guest stopped, or resumed a moment ago --> suspended: says nothing, forgets what it counted
//!  else: try every interval --good--> rise in a row: healthy
//!                            --bad--> fall in a row: not healthy, with the reason
//! ```
//! Always holds: a check never counts against a guest whose CPUs stood still at any moment of it, so the drain of a
//! whole host empties no service; what this host cannot try (no address in the network) counts for nobody.

use super::lock;
use crate::vm::Shared;
use quorate_state::State;
use quorate_types::service::{HealthCheck, HealthKind, MemberReport};
use quorate_types::{ServiceName, VmName};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// After a guest's CPUs have gone on: its clock, its network and its peers have to find themselves.
const GRACE: Duration = Duration::from_secs(2);

/// Whether a guest's CPUs run, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    running: bool,
    since: Instant,
}

impl Life {
    pub(super) fn new(running: bool) -> Self {
        Self {
            running,
            since: Instant::now(),
        }
    }

    fn can_be_judged(&self) -> bool {
        self.running && self.since.elapsed() >= GRACE
    }
}

/// What one check tries.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Try {
    check: HealthCheck,
    /// Where; absent for the agent.
    to: Option<SocketAddr>,
}

/// How one try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Good,
    Bad(String),
    /// It says nothing about the member.
    Cannot(String),
}

/// Good and bad tries in a row.
#[derive(Debug, Default)]
struct Tries {
    healthy: Option<bool>,
    good: u32,
    bad: u32,
}

impl Tries {
    /// Notes a try; what the member is now.
    fn note(&mut self, good: bool, check: &HealthCheck) -> Option<bool> {
        match good {
            true => (self.good, self.bad) = (self.good.saturating_add(1), 0),
            false => (self.good, self.bad) = (0, self.bad.saturating_add(1)),
        }
        if self.good >= check.rise.max(1) {
            self.healthy = Some(true);
        } else if self.bad >= check.fall.max(1) {
            self.healthy = Some(false);
        }
        self.healthy
    }
}

/// The checks that run, by service and member.
#[derive(Default)]
pub(super) struct Checkers {
    running: BTreeMap<(ServiceName, VmName), (Try, AbortHandle)>,
}

impl Checkers {
    /// Begins and ends checks, as services and guests come and go.
    pub(super) fn keep(&mut self, shared: &Arc<Shared>, state: &State) {
        let wanted = wanted(shared, state);
        self.running.retain(|key, (what, task)| {
            let same = wanted.get(key) == Some(what);
            if !same {
                task.abort();
                lock(&shared.services.checks).remove(key);
            }
            same
        });
        for (key, what) in wanted {
            self.running.entry(key).or_insert_with_key(|key| {
                let checking = check_again_and_again(shared.clone(), key.clone(), what.clone());
                (what, shared.spawn(checking))
            });
        }
    }
}

fn wanted(shared: &Shared, state: &State) -> BTreeMap<(ServiceName, VmName), Try> {
    let mut wanted = BTreeMap::new();
    let lives = lock(&shared.services.lives);
    for (name, service) in &state.services {
        let Some(check) = &service.spec.health else {
            continue;
        };
        for (vm, record, _) in state.members(&service.spec) {
            if !lives.contains_key(vm) {
                continue;
            }
            let nics = &record.effective().nics;
            let mut nics = nics
                .iter()
                .filter(|nic| nic.network == service.spec.network);
            let address: Option<IpAddr> = nics.next().and_then(|nic| nic.addresses().next());
            let to = match check.kind {
                HealthKind::Agent => None,
                _ => match (address, service.spec.health_port()) {
                    (Some(address), Some(port)) => Some(SocketAddr::new(address, port)),
                    _ => continue,
                },
            };
            let check = check.clone();
            wanted.insert((name.clone(), vm.clone()), Try { check, to });
        }
    }
    wanted
}

async fn check_again_and_again(shared: Arc<Shared>, key: (ServiceName, VmName), what: Try) {
    let mut tries = Tries::default();
    let life = || lock(&shared.services.lives).get(&key.1).copied();
    loop {
        let before = life();
        let report = match before {
            Some(now) if now.can_be_judged() => {
                let outcome = attempt(&shared, &key.1, &what).await;
                if life() != before {
                    // It stood still meanwhile.
                    tries = Tries::default();
                    MemberReport::default()
                } else {
                    judge(&mut tries, outcome, &what.check)
                }
            }
            _ => {
                tries = Tries::default();
                MemberReport::default()
            }
        };
        let changed = lock(&shared.services.checks).insert(key.clone(), report.clone());
        if changed.as_ref() != Some(&report) {
            shared.services.news.notify_one();
        }
        tokio::time::sleep(
            what.check
                .interval
                .as_duration()
                .max(Duration::from_millis(50)),
        )
        .await;
    }
}

fn judge(tries: &mut Tries, outcome: Outcome, check: &HealthCheck) -> MemberReport {
    let (healthy, problem) = match outcome {
        Outcome::Good => (tries.note(true, check), None),
        Outcome::Bad(why) => (tries.note(false, check), Some(why)),
        Outcome::Cannot(why) => {
            *tries = Tries::default();
            (None, Some(why))
        }
    };
    MemberReport {
        healthy,
        // One bad try is none of anybody's business yet.
        problem: problem.filter(|_| healthy != Some(true)),
        ..MemberReport::default()
    }
}

async fn attempt(shared: &Shared, vm: &VmName, what: &Try) -> Outcome {
    let within = what.check.timeout.as_duration();
    let Some(to) = what.to else {
        let guest = lock(&shared.guests).get(vm).cloned();
        let Some(guest) = guest else {
            return Outcome::Cannot("its process is not known yet".to_owned());
        };
        return match guest.ping_agent(within).await {
            Ok(()) => Outcome::Good,
            Err(error) => Outcome::Bad(format!(
                "its guest agent does not answer: {}",
                crate::vm::text(&error)
            )),
        };
    };
    let tried = async {
        let stream = TcpStream::connect(to).await?;
        match what.check.kind {
            HealthKind::Http => get(stream, to, &what.check.path).await,
            HealthKind::Https => {
                let stream = super::tls::wrap(stream, to).await?;
                get(stream, to, &what.check.path).await
            }
            HealthKind::Tcp | HealthKind::Agent => Ok(()),
        }
    };
    match timeout(within, tried).await {
        Ok(Ok(())) => Outcome::Good,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NetworkUnreachable => {
            Outcome::Cannot(format!(
                "this host has no address in the network of {to}: give its bridge one, or check with `kind: agent`"
            ))
        }
        Ok(Err(error)) => Outcome::Bad(format!("{to}: {error}")),
        Err(_) => Outcome::Bad(format!("{to}: no answer within {} ms", within.as_millis())),
    }
}

/// A minimal HTTP/1.0 GET; good when the status is 200 to 399.
async fn get<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    to: SocketAddr,
    path: &str,
) -> io::Result<()> {
    let text = format!(
        "GET {path} HTTP/1.0\r\nHost: {to}\r\nUser-Agent: quorate\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(text.as_bytes()).await?;
    let mut head = [0; 12]; // `HTTP/1.x NNN`
    stream.read_exact(&mut head).await?;
    let status = std::str::from_utf8(&head).ok();
    let status = status.and_then(|head| head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok());
    match status {
        Some(200..=399_u16) => Ok(()),
        Some(status) => Err(io::Error::other(format!("HTTP status {status}"))),
        None => Err(io::Error::other("it does not speak HTTP")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_rise_and_fall_in_a_row() {
        let mut check = HealthCheck::new(HealthKind::Tcp);
        (check.rise, check.fall) = (2, 3);
        let mut tries = Tries::default();
        let mut after = |good: &str| {
            good.chars()
                .map(|one| tries.note(one == '+', &check))
                .last()
                .flatten()
        };
        assert_eq!(after("+"), None);
        assert_eq!(after("-+"), None, "not in a row");
        assert_eq!(after("+"), Some(true));
        assert_eq!(after("--+--"), Some(true), "never three in a row");
        assert_eq!(after("-"), Some(false));
        assert_eq!(after("+"), Some(false));
        assert_eq!(after("+"), Some(true));
    }

    #[test]
    fn what_cannot_be_tried_counts_for_nobody() {
        let check = HealthCheck::new(HealthKind::Tcp);
        let mut tries = Tries::default();
        for _ in 0..2 {
            judge(&mut tries, Outcome::Bad("no".into()), &check);
        }
        let cannot = judge(&mut tries, Outcome::Cannot("no way".into()), &check);
        assert_eq!(
            (cannot.healthy, cannot.problem.as_deref()),
            (None, Some("no way"))
        );
        let bad = judge(&mut tries, Outcome::Bad("no".into()), &check);
        assert_eq!(bad.healthy, None, "it counts from the beginning");
    }

    #[tokio::test]
    async fn http_is_good_from_200_to_399() {
        for (answer, good) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", true),
            ("HTTP/1.1 503 Busy\r\n\r\n", false),
            ("220 smtp ready\r\n", false),
        ] {
            let (client, mut server) = tokio::io::duplex(1024);
            server.write_all(answer.as_bytes()).await.unwrap();
            let to = "10.0.0.1:80".parse().unwrap();
            assert_eq!(get(client, to, "/").await.is_ok(), good, "{answer}");
        }
    }

    #[test]
    fn a_guest_is_judged_only_when_it_has_run_for_a_while() {
        assert!(!Life::new(true).can_be_judged());
        assert!(!Life::new(false).can_be_judged());
        if let Some(since) = Instant::now().checked_sub(GRACE) {
            let running = true;
            assert!(Life { running, since }.can_be_judged());
        }
    }
}
