//! What QEMU processes do.

use crate::event::{Ask, D, Event, G, HostId, Q, observed_of};
use crate::guest::{Guest, ProcId, StreamPhase, Vcpu};
use crate::san::GIVES_UP;
use crate::time::{MS, SEC};
use crate::world::World;
use quorate_agent_logic::{Exit, GuestEvent, Observed, Token};
use quorate_types::report::SavedState;

/// Time between two writes of a guest.
const WRITE_EVERY: u64 = 100 * MS;

impl World {
    pub(crate) fn guest_event(&mut self, proc: ProcId, what: Q) {
        match what {
            Q::Boot => self.guest_boot(proc),
            Q::Listen => self.guest_listen(proc),
            Q::Write => self.guest_write(proc),
            Q::Ask { inc, token, ask } => self.guest_asked(proc, inc, token, ask),
            Q::Killed { by_guard } => {
                let text = if by_guard {
                    "the guard ended it"
                } else {
                    "it was killed"
                };
                self.end_guest(proc, false, by_guard, text);
            }
            Q::Off => {
                if self
                    .guests
                    .get(&proc)
                    .is_some_and(|guest| guest.vcpu == Vcpu::Running)
                {
                    self.end_guest(proc, true, false, "the guest shut itself down");
                }
            }
            Q::SaveDone { inc, token, file } => self.guest_saved(proc, inc, token, &file),
            Q::Stream(id) => self.stream_step(proc, id),
            Q::Final(id) => self.stream_final(proc, id),
            Q::Acked(id) => self.stream_acked(proc, id),
        }
    }

    pub(crate) fn note_guest(&mut self, proc: ProcId, text: &str) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (vm, host, epoch) = (guest.vm.clone(), guest.host, guest.epoch);
        let host = self.hosts[host].name.clone();
        self.note(|| format!("{host}: {vm} (epoch {epoch}) {text}"));
    }

    /// Tells the agent about a process that it knows.
    pub(crate) fn tell(&mut self, proc: ProcId, event: GuestEvent) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (host, vm) = (guest.host, guest.vm.clone());
        let Some(daemon) = &self.hosts[host].daemon else {
            return;
        };
        let run = daemon.runs.iter().find(|(_, known)| **known == proc);
        let Some(token) = run.map(|(token, _)| *token) else {
            return;
        };
        let delay = self.rng.range(MS / 10, 2 * MS);
        self.daemon_after(host, delay, D::Guest { vm, token, event });
    }

    /// Answers a command, if the agent that gave it still lives.
    pub(crate) fn answer(
        &mut self,
        host: HostId,
        inc: u32,
        token: Token,
        proc: ProcId,
        event: GuestEvent,
    ) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let vm = guest.vm.clone();
        let delay = self.rng.range(MS / 10, MS);
        let what = D::Guest { vm, token, event };
        self.after(delay, Event::Daemon(host, inc, what));
    }

    /// Takes the locks of the images. Returns who has them instead.
    pub(crate) fn lock_disks(&mut self, proc: ProcId) -> Result<(), ProcId> {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return Ok(());
        };
        if !guest.shared {
            guest.disks = true;
            return Ok(());
        }
        let disk = self.disks.entry(guest.vm.clone()).or_default();
        match disk.holder {
            Some(other) if other != proc => Err(other),
            _ => {
                disk.holder = Some(proc);
                guest.disks = true;
                Ok(())
            }
        }
    }

    pub(crate) fn unlock_disks(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        guest.disks = false;
        if let Some(disk) = self.disks.get_mut(&guest.vm)
            && disk.holder == Some(proc)
        {
            disk.holder = None;
        }
    }

    pub(crate) fn set_vcpu(&mut self, proc: ProcId, vcpu: Vcpu) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        let begins = vcpu == Vcpu::Running && guest.vcpu != Vcpu::Running;
        guest.vcpu = vcpu;
        if begins {
            guest.ever_ran = true;
            self.run_begins(proc);
        }
    }

    fn guest_boot(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let reached = self.disks_reached(guest);
        let bad = !reached || self.rng.chance(self.setup.start_fail_permille);
        if bad {
            self.fail_start(proc, "the image cannot be opened");
            return;
        }
        if let Err(other) = self.lock_disks(proc) {
            self.lock_refused(proc, other);
            self.fail_start(proc, "another process has the image's lock");
            return;
        }
        let own = self.guests.get(&proc).is_some_and(|guest| guest.own);
        let counter = match own {
            true => match self.own_boots(proc) {
                Ok(counter) => counter,
                Err(why) => return self.fail_start(proc, &why),
            },
            false => {
                let guest = self.guests.get(&proc);
                let disk = guest.and_then(|guest| self.disks.get(&guest.vm));
                disk.map_or(0, |disk| disk.counter)
            }
        };
        let ready = self.now + self.rng.range(self.setup.ready_ns.0, self.setup.ready_ns.1);
        if let Some(guest) = self.guests.get_mut(&proc) {
            guest.memory = guest.restore.unwrap_or(counter);
            guest.ready_at = if guest.restore.is_some() {
                self.now
            } else {
                ready
            };
            guest.started_at = self.now;
        }
        self.note_guest(proc, "runs");
        self.set_vcpu(proc, Vcpu::Running);
        self.tell(proc, GuestEvent::Started);
        self.after(WRITE_EVERY, Event::Guest(proc, Q::Write));
    }

    pub(crate) fn fail_start(&mut self, proc: ProcId, why: &str) {
        self.note_guest(proc, &format!("does not start: {why}"));
        let detail = why.to_owned();
        let refused = false;
        self.tell(proc, GuestEvent::StartFailed { detail, refused });
        self.remove_guest(proc);
    }

    fn guest_listen(&mut self, proc: ProcId) {
        let there = |guest: &Guest| guest.targets.is_empty() || self.disks_reached(guest);
        if !self.guests.get(&proc).is_some_and(there) {
            return self.fail_start(proc, "a disk cannot be opened");
        }
        if self.rng.chance(self.setup.start_fail_permille) {
            return self.fail_start(proc, "the target cannot listen");
        }
        if let Some(guest) = self.guests.get_mut(&proc) {
            guest.vcpu = Vcpu::InMigrate;
        }
        let address = format!("proc-{proc}");
        self.tell(proc, GuestEvent::Listening { address });
        self.step_hook(proc, "prepared");
        self.after(WRITE_EVERY, Event::Guest(proc, Q::Write));
    }

    fn guest_write(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        if guest.vcpu == Vcpu::Running {
            if !guest.disks {
                return self.end_guest(
                    proc,
                    false,
                    false,
                    "QEMU aborted: it wrote to a disk that it does not have",
                );
            }
            match guest.own {
                true => self.own_write(proc),
                false => self.write_or_fail(proc),
            }
        }
        self.after(WRITE_EVERY, Event::Guest(proc, Q::Write));
    }

    /// A write reaches all disks, or hangs, or fails.
    fn write_or_fail(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (all, any) = (self.disks_reached(guest), self.a_disk_reached(guest));
        let (san, hangs) = (!guest.targets.is_empty(), guest.hangs);
        if any {
            self.check_write(proc);
        }
        if all {
            if let Some(guest) = self.guests.get_mut(&proc) {
                guest.hangs = None;
            }
            return self.write_counter(proc);
        }
        let long = hangs.is_some_and(|since| self.now >= since + GIVES_UP);
        let fails = !san || long || self.rng.chance(200);
        let now = self.now;
        if let Some(guest) = self.guests.get_mut(&proc) {
            guest.unreached = Some(now);
            guest.hangs = if fails { None } else { hangs.or(Some(now)) };
        }
        if fails {
            self.note_guest(proc, "paused by an I/O error");
            self.set_vcpu(proc, Vcpu::IoError);
            let detail = "a disk failed".to_owned();
            self.tell(proc, GuestEvent::IoError { detail });
        }
    }

    fn write_counter(&mut self, proc: ProcId) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        let disk = self.disks.entry(guest.vm.clone()).or_default();
        let (known, found) = (guest.memory, disk.counter);
        disk.counter += 1;
        guest.memory = disk.counter;
        if known != found {
            let (vm, host, epoch) = (guest.vm.clone(), guest.host, guest.epoch);
            let host = self.hosts[host].name.clone();
            self.fail(
                "nothing-lost",
                format!("{vm} on {host} (epoch {epoch}) writes after {known}, but its disk is at {found}: its memory is older than its disk"),
            );
        }
    }

    /// A process has ended: the world sees it.
    pub(crate) fn end_guest(&mut self, proc: ProcId, by_guest: bool, by_guard: bool, why: &str) {
        let Some(guest) = self.guests.get(&proc).cloned() else {
            return;
        };
        self.note_guest(proc, &format!("ends: {why}"));
        if guest.vcpu == Vcpu::Starting {
            let detail = why.to_owned();
            let refused = false;
            self.tell(proc, GuestEvent::StartFailed { detail, refused });
        } else {
            let exit = Exit {
                by_guest,
                by_guard,
                ran: guest.ever_ran,
                detail: why.to_owned(),
            };
            self.tell(proc, GuestEvent::Exited(exit));
        }
        self.remove_guest(proc);
    }

    /// Takes a process out; the other end of its stream notices.
    pub(crate) fn remove_guest(&mut self, proc: ProcId) {
        self.unlock_disks(proc);
        self.own_forget(proc);
        let Some(guest) = self.guests.remove(&proc) else {
            return;
        };
        self.guard_forgets(guest.host, proc);
        let sources = self.guests.iter().filter(|(_, other)| {
            let over = |phase| matches!(phase, StreamPhase::Completed | StreamPhase::Failed { .. });
            other
                .out
                .as_ref()
                .is_some_and(|out| out.target == proc && !over(out.phase))
        });
        let sources: Vec<ProcId> = sources.map(|(source, _)| *source).collect();
        for source in sources {
            if guest.ever_ran {
                // It had received all; the source only misses the last word.
                if let Some(id) = self
                    .guests
                    .get(&source)
                    .and_then(|s| Some(s.out.as_ref()?.id))
                {
                    self.stream_acked(source, id);
                }
            } else {
                self.stream_breaks(source, "the target has ended", false);
            }
        }
        if let Some(out) = guest.out
            && !matches!(
                out.phase,
                StreamPhase::Completed | StreamPhase::Failed { .. }
            )
        {
            self.target_loses_stream(out.target, "the source has ended");
        }
    }

    fn guest_asked(&mut self, proc: ProcId, inc: u32, token: Token, ask: Ask) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let host = guest.host;
        match ask {
            Ask::GuardFreeze(guard) => {
                let good = self.freeze(proc);
                let what = G::Frozen { proc, good };
                self.after(MS / 2, Event::Guard(host, guard, what));
                if good {
                    // QEMU says so to everybody.
                    self.tell(proc, GuestEvent::Noticed);
                }
            }
            Ask::Freeze => {
                let event = if self.freeze(proc) {
                    GuestEvent::Paused
                } else {
                    let detail = "QEMU does not confirm the pause".to_owned();
                    GuestEvent::PauseFailed { detail }
                };
                self.answer(host, inc, token, proc, event);
            }
            Ask::Dismiss => {
                let state = self.dismiss(proc);
                self.answer(host, inc, token, proc, GuestEvent::State(state));
            }
            Ask::Thaw => self.guest_thaw(proc, inc, token),
            Ask::Query => {
                let state = observed_of(guest.vcpu);
                self.answer(host, inc, token, proc, GuestEvent::State(state));
            }
            Ask::Powerdown => {
                if guest.vcpu == Vcpu::Running
                    && guest.obeys_powerdown
                    && guest.ready_at <= self.now
                {
                    let delay = self.rng.range(200, 4000) * MS;
                    self.after(delay, Event::Guest(proc, Q::Off));
                }
            }
            Ask::Save(file) => self.guest_save(proc, inc, token, file),
            Ask::Send { id, target } => self.stream_begin(proc, (inc, token), id, target),
            Ask::Attach => self.stream_attach(proc, (inc, token)),
            Ask::Continue => self.stream_continue(proc),
            Ask::Cancel => self.stream_cancel(proc),
        }
    }

    /// Pauses and gives up the disks. Returns whether it is confirmed.
    fn freeze(&mut self, proc: ProcId) -> bool {
        let Some(guest) = self.guests.get(&proc) else {
            return false;
        };
        // A switchover that was ordered ends by itself, this way or that.
        let device = |out: &crate::guest::Outgoing| out.phase == StreamPhase::Device;
        let bad = matches!(guest.vcpu, Vcpu::Starting | Vcpu::InMigrate)
            || guest.out.as_ref().is_some_and(device)
            || self.own_waits(proc)
            || self.rng.chance(self.setup.freeze_fail_permille);
        if bad {
            return false;
        }
        self.stream_cancel(proc);
        self.set_vcpu(proc, Vcpu::Paused);
        self.unlock_disks(proc);
        if let Some(guest) = self.guests.get_mut(&proc) {
            guest.self_resumed = false;
        }
        true
    }

    /// A guest that is awaited will not run when it arrives; one that is here is paused.
    fn dismiss(&mut self, proc: ProcId) -> Observed {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return Observed::Ended;
        };
        if guest.vcpu == Vcpu::InMigrate {
            guest.dismissed = true;
            return Observed::InMigrate;
        }
        match self.freeze(proc) {
            true => Observed::Paused,
            false => Observed::Unknown,
        }
    }

    fn guest_thaw(&mut self, proc: ProcId, inc: u32, token: Token) {
        let Some(guest) = self.guests.get_mut(&proc) else {
            return;
        };
        guest.thawing = false;
        let host = guest.host;
        self.thaw_attempt(proc);
        let event = match self.lock_disks(proc) {
            Err(other) => {
                self.lock_refused(proc, other);
                let detail = "another process has the image's lock".to_owned();
                GuestEvent::DiskLost { detail }
            }
            Ok(()) => {
                self.note_guest(proc, "goes on");
                self.set_vcpu(proc, Vcpu::Running);
                GuestEvent::Thawed
            }
        };
        self.answer(host, inc, token, proc, event);
    }

    fn guest_save(&mut self, proc: ProcId, inc: u32, token: Token, file: SavedState) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        if guest.vcpu != Vcpu::Running {
            let (host, detail) = (guest.host, "it does not run".to_owned());
            return self.answer(host, inc, token, proc, GuestEvent::SaveFailed { detail });
        }
        self.set_vcpu(proc, Vcpu::Paused);
        let delay = self.rng.range(150, 2000) * MS;
        self.after(delay, Event::Guest(proc, Q::SaveDone { inc, token, file }));
    }

    fn guest_saved(&mut self, proc: ProcId, inc: u32, token: Token, file: &SavedState) {
        let Some(guest) = self.guests.get(&proc) else {
            return;
        };
        let (host, memory, held) = (guest.host, guest.memory, guest.disks);
        if !held || self.rng.chance(50) || self.hosts[host].storage_lost {
            if held && guest.vcpu == Vcpu::Paused {
                self.set_vcpu(proc, Vcpu::Running);
            }
            let detail = "the file cannot be written".to_owned();
            return self.answer(host, inc, token, proc, GuestEvent::SaveFailed { detail });
        }
        self.unlock_disks(proc);
        self.files.insert(Self::file_name(file), memory);
        self.answer(host, inc, token, proc, GuestEvent::Saved);
    }

    /// Makes a process.
    pub(crate) fn make_guest(&mut self, guest: Guest) -> ProcId {
        let proc = self.next_proc;
        self.next_proc += 1;
        let incoming = guest.incoming.is_some();
        self.guests.insert(proc, guest);
        let delay = self.rng.range(30, 250) * MS;
        let what = if incoming { Q::Listen } else { Q::Boot };
        self.after(delay, Event::Guest(proc, what));
        proc
    }

    /// Ends a random guest's QEMU, or that of one VM.
    pub(crate) fn crash_qemu(&mut self, proc: ProcId) {
        self.end_guest(proc, false, false, "QEMU crashed");
    }

    /// What a query shows for a guest of a dead agent.
    pub(crate) fn adopted_state(&self, proc: ProcId) -> Observed {
        self.guests
            .get(&proc)
            .map_or(Observed::Ended, |guest| observed_of(guest.vcpu))
    }

    /// The longest time that a stream waits for the network.
    pub(crate) fn stream_patience(&mut self) -> u64 {
        self.rng.range(2, 12) * SEC
    }
}
