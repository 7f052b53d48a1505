//! The shell around the agent's logic: carries out effects in order, a ledger record before what
//! follows it.

use crate::event::{Ask, D, Event, HostId, Q, Spawn, Wire};
use crate::guest::{Guest, ProcId, Vcpu};
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_agent_logic::{Act, AskToken, Effect, Exit, GuestEvent, Input, TargetSays, Token};
use quorate_types::{Epoch, MigrationId, VmName};

/// A peer that has not answered by then counts as not reachable.
const PEER_TIMEOUT: u64 = SEC;
/// A broken ledger is written to disk this often.
const SYNC_EVERY: u64 = 20 * SEC;

impl World {
    /// Tells the logic something.
    pub(crate) fn give(&mut self, host: HostId, input: Input) {
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.inbox.push_back(input);
        }
        self.pump(host);
    }

    /// Carries out effects and takes inputs until a ledger write is under way or nothing is left.
    pub(crate) fn pump(&mut self, host: HostId) {
        loop {
            let now = self.hosts[host].local(self.now);
            let Some(daemon) = self.hosts[host].daemon.as_mut() else {
                return;
            };
            if daemon.writing.is_some() {
                return;
            }
            if let Some(effect) = daemon.effects.pop_front() {
                self.carry_out(host, effect);
                continue;
            }
            let Some(logic) = daemon.logic.as_mut() else {
                return;
            };
            let Some(input) = daemon.inbox.pop_front() else {
                break;
            };
            daemon.effects.extend(logic.step(now, input));
        }
        self.agent_wake(host);
    }

    fn agent_wake(&mut self, host: HostId) {
        let at = &mut self.hosts[host];
        let now = at.local(self.now);
        let Some(daemon) = at.daemon.as_mut() else {
            return;
        };
        let due = daemon
            .logic
            .as_ref()
            .and_then(|logic| logic.next_wakeup(now));
        let Some(due) = due.map(|due| at.clock.true_time(due).max(self.now)) else {
            return;
        };
        if daemon.wake_at <= self.now || due < daemon.wake_at {
            daemon.wake_at = due;
            let inc = at.daemon_inc;
            self.queue.push(due, Event::Daemon(host, inc, D::AgentTick));
        }
    }

    fn carry_out(&mut self, host: HostId, effect: Effect) {
        match effect {
            Effect::Ledger(record) => {
                let slow = self.hosts[host].disk_slow;
                let delay = if slow {
                    self.rng.range(50, 1500) * MS
                } else {
                    self.rng.range(MS / 2, 8 * MS)
                };
                if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                    daemon.writing = Some(record);
                }
                self.daemon_after(host, delay, D::LedgerDone);
            }
            Effect::Report => {
                self.refresh_report(host);
                self.beat(host);
            }
            Effect::Guest {
                vm,
                token,
                run,
                act,
            } => self.act(host, vm, token, run, act),
            Effect::AskTarget {
                vm,
                token,
                to,
                id,
                ready,
            } => {
                let inc = self.hosts[host].daemon_inc;
                let what = D::PeerTimeout {
                    vm: vm.clone(),
                    token,
                    outcome: false,
                };
                self.daemon_after(host, PEER_TIMEOUT, what);
                if let Some(to) = self.host_id(&to) {
                    let wire = Wire::AskTarget {
                        token,
                        inc,
                        vm,
                        id,
                        ready,
                    };
                    self.send(host, to, wire);
                }
            }
            Effect::AskOutcome { vm, token, to, id } => {
                let inc = self.hosts[host].daemon_inc;
                let what = D::PeerTimeout {
                    vm: vm.clone(),
                    token,
                    outcome: true,
                };
                self.daemon_after(host, PEER_TIMEOUT, what);
                if let Some(to) = self.host_id(&to) {
                    self.send(host, to, Wire::AskOutcome { token, inc, vm, id });
                }
            }
            Effect::Answer { ask, result } => self.answer_ask(host, ask, Ok(result)),
            Effect::AnswerOutcome { ask, says } => self.answer_ask(host, ask, Err(says)),
        }
    }

    pub(crate) fn ledger_done(&mut self, host: HostId) {
        let now = self.now;
        let at = &mut self.hosts[host];
        if let Some(record) = at.daemon.as_mut().and_then(|daemon| daemon.writing.take()) {
            at.ledger.apply(&record);
            let name = at.name.clone();
            self.trace(|| format!("{name}: ledger {record:?}"));
        }
        let at = &mut self.hosts[host];
        if now > at.ledger_synced.0 + SYNC_EVERY {
            at.ledger_synced = (now, at.ledger.clone());
        }
        self.pump(host);
    }

    fn answer_ask(
        &mut self,
        host: HostId,
        ask: AskToken,
        what: Result<Result<String, String>, TargetSays>,
    ) {
        let daemon = self.hosts[host].daemon.as_mut();
        let Some((to, token, inc, vm)) = daemon.and_then(|daemon| daemon.asks.remove(&ask)) else {
            return;
        };
        let wire = match what {
            Ok(result) => Wire::TargetSaysWhere {
                token,
                inc,
                vm,
                result,
            },
            Err(says) => Wire::TargetSaysWhat {
                token,
                inc,
                vm,
                says,
            },
        };
        self.send(host, to, wire);
    }

    pub(crate) fn deliver_peer(&mut self, from: HostId, to: HostId, wire: Wire) {
        match wire {
            Wire::AskTarget {
                token,
                inc,
                vm,
                id,
                ready,
            } => {
                let Some(ask) = self.new_ask(to, (from, token, inc, vm.clone())) else {
                    return;
                };
                self.give(to, Input::PeerIncoming { ask, vm, id, ready });
            }
            Wire::AskOutcome { token, inc, vm, id } => {
                let Some(ask) = self.new_ask(to, (from, token, inc, vm.clone())) else {
                    return;
                };
                self.give(to, Input::PeerOutcome { ask, vm, id });
            }
            Wire::TargetSaysWhere {
                token,
                inc,
                vm,
                result,
            } if self.hosts[to].daemon_inc == inc => {
                let event = match result {
                    Ok(address) => GuestEvent::TargetReady { address },
                    Err(detail) => GuestEvent::TargetNotReady { detail },
                };
                self.give(to, Input::Guest { vm, token, event });
            }
            Wire::TargetSaysWhat {
                token,
                inc,
                vm,
                says,
            } if self.hosts[to].daemon_inc == inc => {
                let event = GuestEvent::TargetSaid(says);
                self.give(to, Input::Guest { vm, token, event });
            }
            other => self.own_wire(from, to, other),
        }
    }

    fn new_ask(&mut self, host: HostId, from: (HostId, Token, u32, VmName)) -> Option<AskToken> {
        let daemon = self.hosts[host].daemon.as_mut()?;
        daemon.logic.as_ref()?;
        daemon.next_ask += 1;
        let ask = AskToken(daemon.next_ask);
        daemon.asks.insert(ask, from);
        Some(ask)
    }

    pub(crate) fn peer_timeout(&mut self, host: HostId, vm: VmName, token: Token, outcome: bool) {
        let event = if outcome {
            GuestEvent::TargetSaid(TargetSays::Unknown)
        } else {
            let detail = "it does not answer".to_owned();
            GuestEvent::TargetNotReady { detail }
        };
        self.give(host, Input::Guest { vm, token, event });
    }

    pub(crate) fn froze(&mut self, host: HostId, proc: ProcId) {
        let Some(daemon) = &self.hosts[host].daemon else {
            return;
        };
        let run = daemon.runs.iter().find(|(_, known)| **known == proc);
        let run = run.map(|(token, _)| *token);
        let vm = self.guests.get(&proc).map(|guest| guest.vm.clone());
        if let (Some(run), Some(vm)) = (run, vm) {
            self.give(host, Input::GuardFroze { vm, run });
        }
    }

    fn proc_of(&self, host: HostId, run: Token) -> Option<ProcId> {
        let proc = *self.hosts[host].daemon.as_ref()?.runs.get(&run)?;
        self.guests.contains_key(&proc).then_some(proc)
    }

    fn say(&mut self, host: HostId, vm: VmName, token: Token, event: GuestEvent) {
        self.daemon_after(host, MS, D::Guest { vm, token, event });
    }

    fn act(&mut self, host: HostId, vm: VmName, token: Token, run: Token, act: Act) {
        let name = self.hosts[host].name.clone();
        self.trace(|| format!("{name}: {vm}: {}", act_name(&act)));
        match act {
            Act::Start { epoch, restore, .. } => {
                self.begin_spawn(host, token, vm, epoch, Spawn::Boot { restore })
            }
            Act::Prepare { id, epoch, .. } => {
                self.begin_spawn(host, token, vm, epoch, Spawn::Incoming { id });
            }
            Act::Kill => self.kill_process(host, vm, run),
            Act::Clean => self.check_clean(host, &vm, run),
            // There are no taps here.
            Act::Open => {}
            Act::Probe(_) => {
                if let Some(proc) = self.proc_of(host, run) {
                    self.daemon_after(host, 100 * MS, D::Probe(proc));
                }
            }
            Act::Thaw => {
                let Some(proc) = self.proc_of(host, run) else {
                    return;
                };
                if !self.guard_leave(host) || !self.in_time(host, &vm, token) {
                    let detail = "the guard holds no lease".to_owned();
                    return self.say(host, vm, token, GuestEvent::ThawRefused { detail });
                }
                self.guard_holds(host, proc);
                if let Some(guest) = self.guests.get_mut(&proc) {
                    guest.thawing = true;
                }
                self.ask_guest(host, proc, token, Ask::Thaw);
            }
            other => self.act_on(host, vm, token, run, other),
        }
    }

    fn act_on(&mut self, host: HostId, vm: VmName, token: Token, run: Token, act: Act) {
        let Some(proc) = self.proc_of(host, run) else {
            return;
        };
        let ask = match act {
            Act::Powerdown => Ask::Powerdown,
            Act::Freeze => Ask::Freeze,
            Act::Dismiss => Ask::Dismiss,
            Act::Save { pool, file } => Ask::Save(quorate_types::report::SavedState { pool, file }),
            Act::Query => Ask::Query,
            Act::Attach => Ask::Attach,
            Act::Continue { .. } => Ask::Continue,
            Act::Cancel => Ask::Cancel,
            Act::Send { id, address } => {
                let target = address.strip_prefix("proc-").and_then(|n| n.parse().ok());
                let Some(target) = target else {
                    let event = GuestEvent::SendFailed {
                        detail: "the address is wrong".into(),
                        begun: false,
                        observed: self.adopted_state(proc),
                    };
                    return self.say(host, vm, token, event);
                };
                Ask::Send { id, target }
            }
            _ => return,
        };
        self.ask_guest(host, proc, token, ask);
    }

    fn ask_guest(&mut self, host: HostId, proc: ProcId, token: Token, ask: Ask) {
        let inc = self.hosts[host].daemon_inc;
        let delay = self.rng.range(MS / 5, 4 * MS);
        self.after(delay, Event::Guest(proc, Q::Ask { inc, token, ask }));
    }

    /// The lease that a start or thaw was decided under still runs.
    fn in_time(&self, host: HostId, vm: &VmName, token: Token) -> bool {
        let at = &self.hosts[host];
        let logic = at.daemon.as_ref().and_then(|daemon| daemon.logic.as_ref());
        let until = logic.and_then(|logic| logic.leave_until(vm, token));
        until.is_some_and(|until| at.local(self.now) < until)
    }

    fn begin_spawn(&mut self, host: HostId, token: Token, vm: VmName, epoch: Epoch, how: Spawn) {
        if !self.guard_leave(host) {
            return self.refuse_spawn(host, token, vm);
        }
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.spawning.insert(token);
        }
        let delay = self.rng.range(5, 40) * MS;
        let what = D::Spawn {
            token,
            vm,
            epoch,
            how,
        };
        self.daemon_after(host, delay, what);
    }

    fn refuse_spawn(&mut self, host: HostId, token: Token, vm: VmName) {
        let detail = "the guard holds no lease".to_owned();
        let refused = true;
        self.say(host, vm, token, GuestEvent::StartFailed { detail, refused });
    }

    pub(crate) fn spawn(
        &mut self,
        host: HostId,
        token: Token,
        vm: VmName,
        epoch: Epoch,
        how: Spawn,
    ) {
        let daemon = self.hosts[host].daemon.as_mut();
        if !daemon.is_some_and(|daemon| daemon.spawning.remove(&token)) {
            return;
        }
        if !self.guard_leave(host) || !self.in_time(host, &vm, token) {
            return self.refuse_spawn(host, token, vm);
        }
        let (incoming, restore) = match &how {
            Spawn::Incoming { id } => (Some(*id), None),
            Spawn::Boot { restore } => (None, restore.clone()),
        };
        if let Err(detail) = self.own_before_start(host, &vm, incoming.is_some()) {
            let refused = incoming.is_none();
            return self.say(host, vm, token, GuestEvent::StartFailed { detail, refused });
        }
        let memory = restore.as_ref().map(Self::file_name);
        let memory = memory.map(|file| self.files.get(&file).copied().unwrap_or(u64::MAX));
        let (targets, shared) = self.disks_of(&vm);
        let own = self.has_own_disk(&vm);
        let obeys = !self.rng.chance(self.setup.ignores_powerdown_permille);
        let now = self.now;
        let proc = self.make_guest(Guest {
            host,
            vm,
            epoch,
            vcpu: Vcpu::Starting,
            incoming,
            ever_ran: false,
            dismissed: false,
            disks: false,
            memory: 0,
            restore: memory,
            out: None,
            self_resumed: false,
            thawing: false,
            obeys_powerdown: obeys,
            ready_at: now,
            targets,
            shared,
            own,
            hangs: None,
            unreached: None,
            started_at: now,
        });
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.runs.insert(token, proc);
        }
        self.guard_holds(host, proc);
        if incoming.is_none() {
            self.start_attempt(proc);
        }
    }

    fn kill_process(&mut self, host: HostId, vm: VmName, run: Token) {
        let pending = self.hosts[host].daemon.as_mut();
        if pending.is_some_and(|daemon| daemon.spawning.remove(&run)) {
            let exit = Exit {
                by_guest: false,
                by_guard: false,
                ran: false,
                detail: "it was ended before it began".into(),
            };
            return self.say(host, vm, run, GuestEvent::Exited(exit));
        }
        let Some(proc) = self.proc_of(host, run) else {
            return;
        };
        self.check_kill(proc);
        let slow = self.rng.chance(20);
        let delay = if slow {
            self.rng.range(1, 7) * SEC
        } else {
            self.rng.range(MS / 2, 5 * MS)
        };
        self.after(delay, Event::Guest(proc, Q::Killed { by_guard: false }));
    }

    pub(crate) fn probe(&mut self, host: HostId, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        if guest.vcpu == Vcpu::Running && guest.ready_at <= self.now {
            return self.tell(proc, GuestEvent::Ready);
        }
        self.daemon_after(host, 250 * MS, D::Probe(proc));
    }

    /// Names a migration's step, for faults that are aimed at one.
    pub(crate) fn migration_of_proc(&self, proc: ProcId) -> Option<MigrationId> {
        let guest = self.guests.get(&proc)?;
        guest.out.as_ref().map(|out| out.id).or(guest.incoming)
    }
}

fn act_name(act: &Act) -> String {
    match act {
        Act::Start { epoch, restore, .. } => {
            format!(
                "start (epoch {epoch}{})",
                if restore.is_some() { ", restored" } else { "" }
            )
        }
        Act::Prepare { id, epoch, .. } => format!("prepare migration {id} (epoch {epoch})"),
        Act::Send { id, .. } => format!("send, migration {id}"),
        other => format!("{other:?}").to_lowercase(),
    }
}
