//! Live migration as two QEMU processes do it.
//!
//! ```text
//!  source  Active --converged--> PreSwitchover --continue--> Device --all sent--> Completed
//!             \______failed, cancelled: runs on_____/           \__failed: QEMU resumes it by itself
//!  target  InMigrate ------------------------------------ all received: takes the disks, runs
//! ```
//! What QEMU does by itself is modelled as it was measured: see `hypervisor::qemu::migration`.

use crate::event::{D, Event, Q, observed_of};
use crate::guest::{Outgoing, ProcId, StreamPhase, Vcpu};
use crate::mutate::Mutation;
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_agent_logic::{GuestEvent, Token};
use quorate_types::MigrationId;

/// Nobody orders the switchover for so long: the driver gives up.
const SWITCHOVER_WAIT: u64 = 5 * SEC;
/// Bytes that stand for all of a guest's memory.
const BYTES: u64 = 1 << 30;

impl World {
    fn out(&mut self, proc: ProcId) -> Option<&mut Outgoing> {
        self.guests.get_mut(&proc)?.out.as_mut()
    }

    fn phase(&self, proc: ProcId) -> Option<StreamPhase> {
        Some(self.guests.get(&proc)?.out.as_ref()?.phase)
    }

    /// Tells the agent that watches the stream, if it still lives.
    fn tell_watcher(&mut self, proc: ProcId, event: GuestEvent) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let host = guest.host;
        if let Some((inc, token)) = guest.out.as_ref().map(|out| out.watcher) {
            self.answer(host, inc, token, proc, event);
        }
    }

    pub(crate) fn phase_of(&self, proc: ProcId) -> Option<StreamPhase> {
        self.phase(proc)
    }

    /// The stream's ends can hear each other, and both exist.
    fn stream_up(&self, proc: ProcId) -> Option<bool> {
        let guest = self.guests.get(&proc)?;
        let target = self.guests.get(&guest.out.as_ref()?.target)?;
        Some(self.net.connected(guest.host, target.host))
    }

    pub(crate) fn stream_begin(
        &mut self,
        proc: ProcId,
        watcher: (u32, Token),
        id: MigrationId,
        target: ProcId,
    ) {
        let all_ns = self
            .rng
            .range(self.setup.precopy_ns.0, self.setup.precopy_ns.1);
        let now = self.now;
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        guest.out = Some(Outgoing {
            id,
            target,
            phase: StreamPhase::Active,
            watcher,
            left_ns: all_ns,
            all_ns,
            stalled: None,
            paused_at: now,
            ran: false,
        });
        let waits = self.guests.get(&target);
        let waits = waits.is_some_and(|g| g.vcpu == Vcpu::InMigrate && g.incoming == Some(id));
        if !waits || self.stream_up(proc) != Some(true) {
            return self.stream_breaks(proc, "the target cannot be reached", false);
        }
        self.note_guest(proc, &format!("is sent (migration {id})"));
        self.step_hook(proc, "streaming");
        self.after(MS, Event::Guest(proc, Q::Stream(id)));
    }

    /// The stream makes progress, stalls, or breaks.
    pub(crate) fn stream_step(&mut self, proc: ProcId, id: MigrationId) {
        let up = self.stream_up(proc);
        let patience = self.stream_patience();
        let now = self.now;
        let Some(out) = self.out(proc) else { return };
        if out.id != id || out.phase != StreamPhase::Active {
            return;
        }
        if up != Some(true) {
            let since = *out.stalled.get_or_insert(now);
            if now > since + patience {
                return self.stream_breaks(proc, "the connection was lost", true);
            }
            return self.after(200 * MS, Event::Guest(proc, Q::Stream(id)));
        }
        out.stalled = None;
        if out.left_ns == 0 {
            out.phase = StreamPhase::PreSwitchover;
            out.paused_at = now;
            return self.stream_pauses(proc);
        }
        let step = out.left_ns.min(300 * MS);
        out.left_ns -= step;
        let done = (out.all_ns - out.left_ns) / MS;
        let transferred = BYTES * done / (out.all_ns / MS).max(1);
        let remaining = BYTES.saturating_sub(transferred);
        let progress = GuestEvent::Progress {
            transferred,
            remaining,
        };
        self.tell_watcher(proc, progress);
        self.after(step, Event::Guest(proc, Q::Stream(id)));
    }

    fn stream_pauses(&mut self, proc: ProcId) {
        self.trace_guest(proc, "paused before its switchover");
        let guest = self.guests.get(&proc);
        let ran = guest.is_some_and(|guest| guest.vcpu == Vcpu::Running);
        if let Some(out) = self.out(proc) {
            out.ran = ran;
        }
        self.set_vcpu(proc, Vcpu::Paused);
        self.step_hook(proc, "paused");
        self.flows_leave(proc);
        self.tell_watcher(proc, GuestEvent::PreSwitchover);
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let host = guest.host;
        if let Some((inc, token)) = guest.out.as_ref().map(|out| out.watcher) {
            let what = D::SwitchoverWait(proc, token);
            self.after(SWITCHOVER_WAIT, Event::Daemon(host, inc, what));
        }
    }

    /// The driver's patience has ended.
    pub(crate) fn switchover_wait(&mut self, proc: ProcId, token: Token) {
        let mine = self
            .out(proc)
            .is_some_and(|out| out.phase == StreamPhase::PreSwitchover && out.watcher.1 == token);
        if mine {
            self.stream_cancel(proc);
        }
    }

    pub(crate) fn stream_continue(&mut self, proc: ProcId) {
        if self.phase(proc) != Some(StreamPhase::PreSwitchover) {
            return;
        }
        let Some(out) = self.out(proc) else { return };
        let (id, target) = (out.id, out.target);
        if self.guests.get(&proc).is_some_and(|guest| guest.own) {
            return self.own_hand_over(proc, id, target);
        }
        self.stream_ordered(proc);
    }

    /// What the target must have it has.
    pub(crate) fn stream_ordered(&mut self, proc: ProcId) {
        let Some(out) = self.out(proc) else { return };
        out.phase = StreamPhase::Device;
        let id = out.id;
        self.trace_guest(proc, "its switchover is ordered");
        self.unlock_disks(proc);
        self.step_hook(proc, "ordered");
        let delay = self.rng.range(3, 40) * MS;
        self.after(delay, Event::Guest(proc, Q::Final(id)));
    }

    /// The last state is sent: the target runs.
    pub(crate) fn stream_final(&mut self, proc: ProcId, id: MigrationId) {
        let up = self.stream_up(proc);
        let patience = self.stream_patience();
        let now = self.now;
        let Some(out) = self.out(proc) else { return };
        if out.id != id || out.phase != StreamPhase::Device {
            return;
        }
        let target = out.target;
        if up != Some(true) {
            let since = *out.stalled.get_or_insert(now);
            if now > since + patience {
                return self.stream_breaks(proc, "the connection was lost", true);
            }
            return self.after(20 * MS, Event::Guest(proc, Q::Final(id)));
        }
        let Some(source) = self.guests.get(&proc) else {
            return;
        };
        let (memory, ready_at) = (source.memory, source.ready_at);
        if let Err(other) = self.lock_disks(target) {
            self.lock_refused(target, other);
            return self.stream_breaks(proc, "the target cannot take the disks", true);
        }
        if let Some(guest) = self.guests.get_mut(&target) {
            guest.memory = memory;
            guest.ready_at = ready_at;
            guest.started_at = now;
        }
        let dismissed = self
            .guests
            .get(&target)
            .is_some_and(|guest| guest.dismissed);
        if dismissed {
            self.note_guest(
                target,
                &format!("is paused (migration {id} arrived too late)"),
            );
            self.set_vcpu(target, Vcpu::Paused);
        } else {
            self.note_guest(target, &format!("runs (migration {id} arrived)"));
            self.set_vcpu(target, Vcpu::Running);
        }
        self.tell(
            target,
            GuestEvent::Arrived {
                running: !dismissed,
            },
        );
        self.step_hook(target, "arrived");
        if self.rng.chance(self.setup.ack_lost_permille) {
            self.stream_breaks(proc, "the connection was reset at the very end", false);
        } else {
            let delay = self.rng.range(MS / 2, 3 * MS);
            self.after(delay, Event::Guest(proc, Q::Acked(id)));
        }
    }

    pub(crate) fn stream_acked(&mut self, proc: ProcId, id: MigrationId) {
        let now = self.now;
        let Some(out) = self.out(proc) else { return };
        if out.id != id || out.phase != StreamPhase::Device {
            return;
        }
        out.phase = StreamPhase::Completed;
        let downtime_ms = now.saturating_sub(out.paused_at) / MS;
        self.tell_watcher(proc, GuestEvent::SendCompleted { downtime_ms });
        self.step_hook(proc, "sent");
    }

    /// Cancelled by the source: it goes on, unless the switchover was ordered.
    pub(crate) fn stream_cancel(&mut self, proc: ProcId) {
        let open = matches!(
            self.phase(proc),
            Some(StreamPhase::Active | StreamPhase::PreSwitchover)
        );
        if open {
            self.stream_breaks(proc, "it was cancelled", true);
        }
    }

    /// The stream breaks. `target_lives`: the target sees it too.
    pub(crate) fn stream_breaks(&mut self, proc: ProcId, why: &str, target_lives: bool) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        let Some(out) = guest.out.as_mut() else {
            return;
        };
        let begun = out.phase == StreamPhase::Device;
        let paused = out.phase == StreamPhase::PreSwitchover && out.ran;
        out.phase = StreamPhase::Failed { begun };
        let (target, host, watcher) = (out.target, guest.host, out.watcher);
        self.note_guest(proc, &format!("is not sent on: {why}"));
        if target_lives {
            self.target_loses_stream(target, why);
        }
        if begun {
            self.self_resume(proc);
            let inc = watcher.0;
            let what = D::SwitchoverFailed(proc);
            self.after(MS, Event::Daemon(host, inc, what));
        } else {
            if paused {
                self.set_vcpu(proc, Vcpu::Running);
            }
            let Some(guest) = self.guests.get(&proc) else {
                return;
            };
            let event = GuestEvent::SendFailed {
                detail: why.to_owned(),
                begun,
                observed: observed_of(guest.vcpu),
            };
            self.tell_watcher(proc, event);
        }
    }

    /// A switchover that was ordered failed: QEMU resumes the source whether it gets the disks or not.
    fn self_resume(&mut self, proc: ProcId) {
        if self.out(proc).is_some_and(|out| !out.ran) {
            return;
        }
        let held = self.takes_back_disks(proc);
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        guest.self_resumed = true;
        guest.vcpu = Vcpu::Running;
        let host = guest.host;
        self.note_guest(proc, "was resumed by QEMU itself");
        if held {
            self.run_begins(proc);
        }
        // The guard hears of every resume.
        self.guard_holds(host, proc);
        let inc = self.hosts[host].guard_inc;
        self.after(MS, Event::Guard(host, inc, crate::event::G::Look));
    }

    /// A lock keeps a source that QEMU resumed from image files that its target has. A unit of a SAN has none: the driver
    /// takes it from the source before it orders the switchover, and gives it back with a thaw only.
    fn takes_back_disks(&mut self, proc: ProcId) -> bool {
        let held = !self.mutated(Mutation::SanWithoutHold);
        match self.guests.get(&proc) {
            Some(guest) if held && !guest.shared => false,
            Some(_) => self.lock_disks(proc).is_ok(),
            None => false,
        }
    }

    /// The driver on the source hears of it: pauses the guest, then says so.
    pub(crate) fn switchover_failed(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        // The guard may have been faster.
        if std::mem::take(&mut guest.self_resumed) {
            self.set_vcpu(proc, Vcpu::Paused);
            self.unlock_disks(proc);
        }
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let event = GuestEvent::SendFailed {
            detail: "the switchover failed".to_owned(),
            begun: true,
            observed: observed_of(guest.vcpu),
        };
        self.tell_watcher(proc, event);
    }

    /// An agent takes up the watch.
    pub(crate) fn stream_attach(&mut self, proc: ProcId, watcher: (u32, Token)) {
        let Some(out) = self.out(proc) else { return };
        out.watcher = watcher;
        let phase = out.phase;
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (host, vcpu) = (guest.host, observed_of(guest.vcpu));
        match phase {
            StreamPhase::Completed => {
                self.tell_watcher(proc, GuestEvent::SendCompleted { downtime_ms: 0 });
            }
            StreamPhase::Failed { begun } => {
                let event = GuestEvent::SendFailed {
                    detail: "it had failed".to_owned(),
                    begun,
                    observed: vcpu,
                };
                self.tell_watcher(proc, event);
            }
            StreamPhase::PreSwitchover => {
                let (inc, token) = watcher;
                let what = D::SwitchoverWait(proc, token);
                self.after(SWITCHOVER_WAIT, Event::Daemon(host, inc, what));
                self.flows_leave(proc);
            }
            StreamPhase::Active | StreamPhase::Device => {}
        }
    }

    /// A target that waits ends when its stream does.
    pub(crate) fn target_loses_stream(&mut self, target: ProcId, why: &str) {
        let waits = |guest: &crate::guest::Guest| {
            matches!(guest.vcpu, Vcpu::InMigrate | Vcpu::Starting) && guest.incoming.is_some()
        };
        if self.guests.get(&target).is_some_and(waits) {
            let detail = why.to_owned();
            self.tell(target, GuestEvent::ArrivalFailed { detail });
            self.end_guest(target, false, false, "its stream broke");
        }
    }

    pub(crate) fn trace_guest(&mut self, proc: ProcId, text: &str) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (vm, host, epoch) = (guest.vm.clone(), guest.host, guest.epoch);
        let host = self.hosts[host].name.clone();
        self.trace(|| format!("{host}: {vm} (epoch {epoch}) {text}"));
    }
}
