//! Hosts, a disk and an adversary on virtual time: pauses anywhere, slow, lost and torn writes, clocks that drift.

use super::*;

/// Reproducible random numbers (xorshift64*).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

const MS: u64 = 1_000_000;

/// What a host is doing on the disk.
#[derive(Clone)]
enum Doing {
    Nothing,
    /// Reads: what was there at `at`.
    Reading {
        began: u64,
        at: u64,
        found: Option<[Option<Block>; 2]>,
        ends: u64,
    },
    Writing {
        began: u64,
        ends: u64,
    },
}

struct Host {
    lease: DiskLease,
    doing: Doing,
    /// Thousandths that its clock is faster.
    rate: u64,
    paused_until: u64,
    nonce: u64,
}

impl Host {
    fn clock(&self, now: u64) -> Instant {
        Instant(1_000_000_000_000 + now / 1000 * (1000 + self.rate))
    }
}

struct World {
    rng: Rng,
    now: u64,
    hosts: Vec<Host>,
    places: [Option<Block>; 2],
    /// Writes under way: when they land.
    landing: Vec<(u64, Block, bool)>,
    held_for: u64,
    changes: u64,
    last: Option<usize>,
}

/// How rough it is.
#[derive(Clone, Copy)]
struct Rough {
    pauses: u64,
    slow: u64,
    torn: u64,
    lost: u64,
    given_back: u64,
}

impl World {
    fn new(seed: u64, hosts: usize) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let hosts = (0..hosts).map(|n| {
            let nonce = n as u64 + 1;
            let mut lease = DiskLease::new(&format!("h{n}"), nonce, DiskTimings::default());
            lease.want(true);
            Host {
                lease,
                doing: Doing::Nothing,
                rate: rng.below(10),
                paused_until: rng.below(500) * MS,
                nonce,
            }
        });
        let hosts = hosts.collect();
        Self {
            rng,
            now: 0,
            hosts,
            places: [None, None],
            landing: Vec::new(),
            held_for: 0,
            changes: 0,
            last: None,
        }
    }

    fn duration(&mut self, rough: Rough) -> u64 {
        if self.rng.one_in(rough.slow) {
            let longest = [1200, 4000][self.rng.below(2) as usize];
            self.rng.below(longest) * MS
        } else {
            (1 + self.rng.below(20)) * MS
        }
    }

    fn land(&mut self) {
        let now = self.now;
        let mut due: Vec<_> = self
            .landing
            .iter()
            .filter(|(at, ..)| *at <= now)
            .cloned()
            .collect();
        self.landing.retain(|(at, ..)| *at > now);
        due.sort_by_key(|(at, ..)| *at);
        for (_, block, torn) in due {
            let place = block.place();
            self.places[place] = if torn { None } else { Some(block) };
        }
    }

    fn one(&mut self, n: usize, rough: Rough) {
        let now = self.now;
        if now < self.hosts[n].paused_until {
            return;
        }
        if self.rng.one_in(rough.pauses) {
            let longest = [2500, 5000][self.rng.below(2) as usize];
            self.hosts[n].paused_until = now + self.rng.below(longest) * MS;
            return;
        }
        let clock = self.hosts[n].clock(now);
        match self.hosts[n].doing.clone() {
            Doing::Reading {
                began,
                at,
                found: None,
                ends,
            } if now >= at => {
                let found = Some(self.places.clone());
                self.hosts[n].doing = Doing::Reading {
                    began,
                    at,
                    found,
                    ends,
                };
            }
            Doing::Reading {
                began,
                found: Some(found),
                ends,
                ..
            } if now >= ends => {
                let began = self.hosts[n].clock(began);
                let host = &mut self.hosts[n];
                host.doing = Doing::Nothing;
                host.lease.was_read(found, began, clock);
            }
            Doing::Writing { began, ends } if now >= ends => {
                let began = self.hosts[n].clock(began);
                let host = &mut self.hosts[n];
                host.doing = Doing::Nothing;
                host.lease.was_written(began, clock);
            }
            Doing::Nothing => self.begin(n, clock, rough),
            _ => {}
        }
    }

    fn begin(&mut self, n: usize, clock: Instant, rough: Rough) {
        let now = self.now;
        match self.hosts[n].lease.step(clock) {
            DiskStep::Wait(_) => {
                if self.rng.one_in(rough.given_back)
                    && let Some(free) = self.hosts[n].lease.give_back(clock)
                {
                    let lands = now + self.duration(rough);
                    self.landing.push((lands, free, false));
                }
            }
            DiskStep::Read => {
                let (a, b) = (self.duration(rough) / 2, self.duration(rough) / 2);
                self.hosts[n].doing = Doing::Reading {
                    began: now,
                    at: now + a,
                    found: None,
                    ends: now + a + b,
                };
            }
            DiskStep::Write(block) => {
                assert_eq!(block.nonce, self.hosts[n].nonce);
                let (a, b) = (self.duration(rough), self.duration(rough));
                if self.rng.one_in(rough.lost) {
                    // The caller hears of a failure; the write may land all the same, much later.
                    let late = now + a + self.rng.below(9000) * MS;
                    if self.rng.one_in(2) {
                        self.landing.push((late, block, false));
                    }
                    self.hosts[n].lease.failed(clock);
                    return;
                }
                let torn = self.rng.one_in(rough.torn);
                self.landing.push((now + a, block, torn));
                self.hosts[n].doing = Doing::Writing {
                    began: now,
                    ends: now + a + b,
                };
            }
        }
    }

    fn holders(&self) -> Vec<usize> {
        let holds = |n: &usize| {
            let host = &self.hosts[*n];
            host.lease.holds(host.clock(self.now)).is_some()
        };
        (0..self.hosts.len()).filter(holds).collect()
    }

    fn run(&mut self, until: u64, rough: Rough, what: &str) {
        while self.now < until {
            self.now += MS;
            self.land();
            for n in 0..self.hosts.len() {
                self.one(n, rough);
            }
            let holders = self.holders();
            assert!(
                holders.len() <= 1,
                "{what}: {holders:?} at {} ms",
                self.now / MS
            );
            self.held_for += u64::from(!holders.is_empty());
            if let Some(holder) = holders.first()
                && self.last != Some(*holder)
            {
                self.last = Some(*holder);
                self.changes += 1;
            }
        }
    }
}

const CALM: Rough = Rough {
    pauses: u64::MAX,
    slow: u64::MAX,
    torn: u64::MAX,
    lost: u64::MAX,
    given_back: u64::MAX,
};

#[test]
fn never_two_holders_whatever_is_late() {
    let seeds = std::env::var("QUORATE_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let mut changes = 0;
    for seed in 1..=seeds.unwrap_or(60) {
        let mut world = World::new(seed, 2 + (seed % 2) as usize);
        let rough = Rough {
            pauses: 200 + world.rng.below(2000),
            slow: 3 + world.rng.below(60),
            torn: 20 + world.rng.below(200),
            lost: 20 + world.rng.below(200),
            given_back: 4000,
        };
        world.run(60_000 * MS, rough, &format!("seed {seed}"));
        changes += world.changes;
        // Whatever happened, it heals.
        let end = world.now + 20_000 * MS;
        world.run(end, CALM, &format!("seed {seed}, calm"));
        assert_eq!(
            world.holders().len(),
            1,
            "seed {seed}: nobody holds it in the end"
        );
    }
    assert!(
        changes > 100,
        "the adversary was too kind: {changes} changes"
    );
}

#[test]
fn a_dead_holder_is_followed_within_three_seconds_and_a_live_one_is_not_disturbed() {
    let mut world = World::new(7, 2);
    world.run(10_000 * MS, CALM, "calm");
    let first = world.holders()[0];
    world.run(60_000 * MS, CALM, "calm");
    assert_eq!(
        (world.holders(), world.changes),
        (vec![first], 1),
        "nothing changes hands"
    );
    world.hosts[first].paused_until = u64::MAX;
    let died = world.now;
    while world.holders() != [1 - first] {
        let next = world.now + 10 * MS;
        world.run(next, CALM, "takeover");
        assert!(world.now - died < 3000 * MS, "not followed");
    }
    assert!(world.now - died > 1300 * MS, "its lease had not run out");
}

#[test]
fn what_was_given_back_is_taken_at_once_by_who_wants_it() {
    let mut world = World::new(9, 2);
    world.run(5_000 * MS, CALM, "calm");
    let first = world.holders()[0];
    world.hosts[first].lease.want(false);
    let clock = world.hosts[first].clock(world.now);
    world.hosts[first].doing = Doing::Nothing;
    let free = world.hosts[first].lease.give_back(clock).unwrap();
    assert_eq!(world.hosts[first].lease.holds(clock), None);
    world.landing.push((world.now, free, false));
    let end = world.now + 700 * MS;
    world.run(end, CALM, "hand over");
    assert_eq!(world.holders(), [1 - first]);
    let lease = &world.hosts[first].lease;
    let clock = world.hosts[first].clock(world.now);
    assert_eq!(lease.vacant_for(clock), None);
    assert_eq!(lease.other(), Some(format!("h{}", 1 - first).as_str()));
}

#[test]
fn a_renewal_that_came_too_late_counts_for_nothing() {
    let t = |ms: u64| Instant(1_000_000_000 + ms * MS);
    let mut lease = DiskLease::new("h1", 5, DiskTimings::default());
    lease.want(true);
    assert_eq!(lease.step(t(0)), DiskStep::Read);
    lease.was_read([None, None], t(0), t(1));
    lease.was_read([None, None], t(1600), t(1601));
    assert!(matches!(lease.step(t(1650)), DiskStep::Wait(_)), "not yet");
    lease.was_read([None, None], t(1680), t(1681));
    let DiskStep::Write(claim) = lease.step(t(1681)) else {
        panic!("no claim")
    };
    lease.was_written(t(1681), t(1682));
    assert_eq!(lease.holds(t(1700)), None, "a claim is no lease");
    assert_eq!(lease.step(t(2031)), DiskStep::Wait(t(2032)));
    lease.was_read([None, Some(claim.clone())], t(2032), t(2033));
    assert_eq!(lease.holds(t(2033)), Some((1, t(3281))));
    assert_eq!(lease.step(t(2033)), DiskStep::Read);
    lease.was_read([None, Some(claim.clone())], t(2033), t(2034));
    let DiskStep::Write(next) = lease.step(t(2034)) else {
        panic!("no renewal")
    };
    assert_eq!(next.counter, 1);
    lease.was_written(t(2034), t(3282));
    assert_eq!(lease.holds(t(3282)), None, "one millisecond too late");
    // A claim that took too long to write is none.
    let mut late = DiskLease::new("h2", 6, DiskTimings::default());
    late.want(true);
    late.was_read(
        [
            Some(Block {
                held: false,
                ..claim
            }),
            None,
        ],
        t(0),
        t(1),
    );
    assert!(matches!(late.step(t(1)), DiskStep::Write(_)));
    late.was_written(t(1), t(251));
    assert_eq!(late.step(t(251)), DiskStep::Read);
    assert_eq!(late.holds(t(251)), None);
}
