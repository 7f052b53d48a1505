//! Random inputs, answers, crashes and restarts of one agent. Whatever happens, it keeps the rules that
//! need only one host; the simulator checks those that need several.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use proptest::prelude::*;
use quorate_agent_logic::{
    Act, Adopted, AskToken, Effect, Exit, GuestEvent, Input, LedgerRecord, Observed,
    ObservedMigration, SendStage, TargetSays, Token,
};
use quorate_membership::HostLease;
use quorate_state::{Order, StopMode};
use quorate_types::{Epoch, LeaseTimings, MigrationId, Millis, Revision};

/// One step of the outside world.
#[derive(Debug, Clone)]
enum Step {
    /// The state moves on to its next order.
    Order(u8),
    /// A heartbeat is acknowledged; the leader may be ahead of this replica.
    Ack { ahead: bool, granted: bool },
    /// Time passes.
    Wait(u16),
    /// The oldest act that waits is answered.
    Answer(u8),
    /// An answer to something else.
    Stale(u8),
    /// The process ends by itself.
    Crash { by_guest: bool },
    /// The guard freezes.
    Froze,
    /// A source asks.
    Peer,
    /// The agent ends and another one starts, with the replica from its beginning.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => any::<u8>().prop_map(Step::Order),
        6 => (prop::bool::weighted(0.1), prop::bool::weighted(0.9))
            .prop_map(|(ahead, granted)| Step::Ack { ahead, granted }),
        5 => (0..2500_u16).prop_map(Step::Wait),
        8 => any::<u8>().prop_map(Step::Answer),
        1 => any::<u8>().prop_map(Step::Stale),
        1 => any::<bool>().prop_map(|by_guest| Step::Crash { by_guest }),
        1 => Just(Step::Froze),
        1 => Just(Step::Peer),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..120)
}

/// A process as the host's kernel sees it.
#[derive(Debug, Clone, Copy)]
struct Process {
    run: Token,
    epoch: Epoch,
    running: bool,
    /// It waits for a migration and has not run.
    waits: bool,
}

struct World {
    bench: Bench,
    lease: HostLease,
    process: Option<Process>,
    /// Acts that have no answer yet.
    open: Vec<(Token, Act)>,
    /// What the cluster wants of this host now, and the epochs it has handed out.
    order: Option<Order>,
    last_epoch: u64,
    last_id: u64,
}

impl World {
    fn new() -> Self {
        Self {
            bench: Bench::new(),
            lease: HostLease::new(LeaseTimings::default()),
            process: None,
            open: vec![],
            order: None,
            last_epoch: 0,
            last_id: 0,
        }
    }

    fn next_order(&mut self, choice: u8) -> Option<Order> {
        let epoch = self.order.as_ref().map(|order| order.epoch().0);
        let last_id = self.last_id;
        match (choice % 8, epoch, &self.order) {
            (0, _, _) => None,
            (1, Some(epoch), Some(Order::Run { .. })) => Some(stop(epoch, StopMode::Graceful)),
            (2, Some(epoch), Some(Order::Run { .. })) => Some(stop(epoch, StopMode::Hard)),
            (3, Some(epoch), Some(Order::Run { .. })) => {
                self.last_id += 1;
                Some(out(self.last_id, epoch, false))
            }
            (4, Some(epoch), Some(Order::MigrateOut { .. })) => Some(out(last_id, epoch, true)),
            (5, Some(epoch), Some(Order::MigrateOut { .. } | Order::MigrateIn { .. })) => {
                Some(run(epoch))
            }
            (6, None, _) => {
                self.last_epoch += 1;
                self.last_id += 1;
                Some(incoming(self.last_id, self.last_epoch, false))
            }
            (_, None, _) => {
                self.last_epoch += 1;
                Some(run(self.last_epoch))
            }
            _ => self.order.clone(),
        }
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Order(choice) => {
                self.order = self.next_order(*choice);
                self.bench.order(self.order.clone());
            }
            Step::Ack { ahead, granted } => {
                let revision = Revision(self.bench.revision + u64::from(*ahead));
                let granted = Millis(if *granted { 2000 } else { 0 });
                let sent = self.bench.now;
                self.lease.acknowledged(sent, granted, revision);
                self.bench.step(Input::LeaseAck {
                    sent,
                    granted,
                    revision,
                });
            }
            Step::Wait(ms) => {
                self.bench.now = self.bench.now.plus(Millis(u64::from(*ms)));
                self.bench.step(Input::Tick);
            }
            Step::Answer(choice) => self.answer(*choice),
            Step::Stale(choice) => {
                let token = Token(u64::from(*choice) % 7);
                let fresh = self.open.iter().any(|(open, _)| *open == token);
                let own = self.process.is_some_and(|process| process.run == token);
                if !fresh && !own {
                    self.bench.event(token, GuestEvent::Thawed);
                    self.bench.event(token, exit("stale"));
                    self.bench.event(token, GuestEvent::PreSwitchover);
                }
            }
            Step::Crash { by_guest } => self.end(*by_guest),
            Step::Froze => {
                if let Some(process) = &mut self.process {
                    process.running = false;
                    let run = process.run;
                    self.bench.step(Input::GuardFroze { vm: vm(), run });
                }
            }
            Step::Peer => {
                let (ask, id) = (AskToken(1), MigrationId(self.last_id));
                self.bench.step(Input::PeerIncoming {
                    ask,
                    vm: vm(),
                    id,
                    ready: true,
                });
                self.bench.step(Input::PeerOutcome { ask, vm: vm(), id });
            }
            Step::Restart => self.restart(),
        }
        self.check();
    }

    fn end(&mut self, by_guest: bool) {
        if let Some(process) = self.process.take() {
            self.open.retain(|(_, act)| matches!(act, Act::Clean));
            let exit = Exit {
                by_guest,
                by_guard: false,
                ran: !process.waits,
                detail: "ended".into(),
            };
            self.bench.event(process.run, GuestEvent::Exited(exit));
        }
    }

    fn answer(&mut self, choice: u8) {
        if self.open.is_empty() {
            return;
        }
        let (token, act) = self.open.remove(0);
        let good = !choice.is_multiple_of(4);
        let detail = "no".to_owned();
        let event = match act {
            Act::Start { .. } | Act::Prepare { .. } if !good => {
                self.process = None;
                let refused = choice.is_multiple_of(8);
                GuestEvent::StartFailed { detail, refused }
            }
            Act::Start { .. } => {
                if let Some(process) = &mut self.process {
                    process.running = true;
                }
                GuestEvent::Started
            }
            Act::Prepare { .. } => {
                let address = "a:1".to_owned();
                self.bench.event(token, GuestEvent::Listening { address });
                self.check();
                if choice.is_multiple_of(3) {
                    GuestEvent::ArrivalFailed { detail }
                } else if let Some(process) = &mut self.process {
                    (process.running, process.waits) = (true, false);
                    GuestEvent::Arrived { running: true }
                } else {
                    return;
                }
            }
            Act::Kill if good => return self.end(false),
            Act::Kill => GuestEvent::KillFailed { detail },
            Act::Thaw if good => {
                if let Some(process) = &mut self.process {
                    process.running = true;
                }
                GuestEvent::Thawed
            }
            Act::Thaw => match choice % 3 {
                0 => GuestEvent::ThawRefused { detail },
                1 => GuestEvent::DiskLost { detail },
                _ => GuestEvent::ThawFailed { detail },
            },
            Act::Dismiss => {
                if let Some(process) = &mut self.process {
                    process.running &= !good;
                }
                match good {
                    true => GuestEvent::State(self.observed()),
                    false => GuestEvent::State(Observed::Unknown),
                }
            }
            Act::Freeze if good => GuestEvent::Paused,
            Act::Freeze => GuestEvent::PauseFailed { detail },
            Act::Powerdown if good => return self.end(true),
            Act::Powerdown => GuestEvent::PowerdownFailed { detail },
            Act::Save { .. } if good => GuestEvent::Saved,
            Act::Save { .. } => GuestEvent::SaveFailed { detail },
            Act::Query => GuestEvent::State(self.observed()),
            Act::Send { .. } | Act::Attach if good => GuestEvent::PreSwitchover,
            Act::Send { .. } | Act::Attach => GuestEvent::SendFailed {
                detail,
                begun: false,
                observed: Observed::Running,
            },
            Act::Continue { send } => {
                let event = if good {
                    GuestEvent::SendCompleted { downtime_ms: 1 }
                } else {
                    GuestEvent::SendFailed {
                        detail,
                        begun: true,
                        observed: Observed::Paused,
                    }
                };
                if let Some(process) = &mut self.process {
                    process.running = false;
                }
                return self.bench.event(send, event);
            }
            Act::Probe(_) | Act::Cancel | Act::Clean | Act::Open => return,
        };
        self.bench.event(token, event);
    }

    fn observed(&self) -> Observed {
        match self.process {
            Some(process) if process.waits => Observed::InMigrate,
            Some(process) if process.running => Observed::Running,
            _ => Observed::Paused,
        }
    }

    fn restart(&mut self) {
        let run = Token(1);
        if let Some(process) = &mut self.process {
            process.run = run;
        }
        let found = self.process.map(|_| Adopted {
            vm: vm(),
            run,
            observed: self.observed(),
            migration: ObservedMigration::None,
        });
        self.open.clear();
        self.lease = HostLease::new(LeaseTimings::default());
        let fresh = std::mem::replace(&mut self.bench, Bench::new());
        let revision = fresh.revision;
        self.bench = fresh.restart(found.as_slice());
        // The replica is played back: an older state comes first.
        self.bench.revision = 0;
        self.bench.order(None);
        self.check();
        self.bench.revision = revision;
        self.bench.order(self.order.clone());
    }

    /// Looks at what was asked for.
    fn check(&mut self) {
        let effects = std::mem::take(&mut self.bench.effects);
        let mut entry = None;
        for effect in effects {
            match effect {
                Effect::Ledger(record) => {
                    self.check_record(&record);
                    entry = Some(record);
                }
                Effect::Guest { token, act, .. } => {
                    self.check_act(token, &act, entry.as_ref());
                    self.open.push((token, act));
                }
                Effect::AskTarget { token, .. } => {
                    let address = "b:1".to_owned();
                    self.bench.event(token, GuestEvent::TargetReady { address });
                }
                Effect::AskOutcome { token, .. } => {
                    let says = GuestEvent::TargetSaid(TargetSays::Unknown);
                    self.bench.event(token, says);
                }
                _ => {}
            }
        }
        if !self.bench.effects.is_empty() {
            self.check();
        }
    }

    fn check_record(&self, record: &LedgerRecord) {
        if let LedgerRecord::Closed { epoch, .. } = record {
            let held = self.process.filter(|process| process.epoch <= *epoch);
            assert!(held.is_none(), "closed with a process: {held:?}");
        }
    }

    fn may_run(&self) -> bool {
        self.lease
            .may_run(self.bench.now, Revision(self.bench.revision))
    }

    fn check_act(&mut self, token: Token, act: &Act, last: Option<&LedgerRecord>) {
        let entry = self.bench.disk.get(&vm()).cloned().unwrap_or_default();
        let ordered = self.order.as_ref().map(Order::epoch);
        match act {
            Act::Start { epoch, .. } | Act::Prepare { epoch, .. } => {
                assert!(self.may_run(), "made without a lease");
                assert_eq!(Some(*epoch), ordered, "made without an order");
                assert!(*epoch > entry.closed, "made under a closed epoch");
                assert_eq!(entry.told, *epoch, "made before it is in the ledger");
                assert!(self.process.is_none(), "two processes");
                let handed_over = entry.begun().is_some();
                assert!(!handed_over, "made though it may be elsewhere");
                self.process = Some(Process {
                    run: token,
                    epoch: *epoch,
                    running: false,
                    waits: matches!(act, Act::Prepare { .. }),
                });
            }
            Act::Thaw => {
                assert!(self.may_run(), "resumed without a lease");
                assert_eq!(Some(entry.told), ordered, "resumed without an order");
                assert!(entry.told > entry.closed, "resumed under a closed epoch");
                assert!(entry.begun().is_none(), "resumed though handed over");
            }
            Act::Continue { .. } => {
                assert!(self.may_run(), "switched over without a lease");
                assert!(
                    matches!(last, Some(LedgerRecord::SwitchoverBegun { .. })),
                    "switched over before it is durable"
                );
            }
            Act::Send { id, .. } => {
                assert_eq!(entry.send_stage(*id), Some(&SendStage::Sending));
            }
            Act::Save { .. } | Act::Powerdown => {
                assert!(matches!(self.order, Some(Order::Stop { .. })));
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn the_rules_of_one_host_hold(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
        }
    }

    /// However it got there: with a lease, an order to run and a world that works, it runs.
    #[test]
    fn there_is_no_dead_end(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
        }
        world.last_epoch += 1;
        world.order = Some(run(world.last_epoch));
        world.bench.order(world.order.clone());
        world.check();
        for _ in 0..2000 {
            world.apply(&Step::Ack { ahead: false, granted: true });
            world.apply(&Step::Wait(100));
            while !world.open.is_empty() {
                world.apply(&Step::Answer(1));
            }
            if world.process.is_some_and(|p| p.running && p.epoch.0 == world.last_epoch) {
                return Ok(());
            }
        }
        prop_assert!(false, "it does not run: {:?}", world.bench.report());
    }
}
