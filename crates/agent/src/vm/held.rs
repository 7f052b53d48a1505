//! What comes for a guest while it changes hosts follows it: see [`quorate_network::held`].
//!
//! ```text
//! source   pass 2 of the copying: listen    STOP ------ flows go ahead ------ target is open: pass on what came since STOP
//! target                                                tap opened, announced
//! ```
//! The taps are listened to *before* the stop, or what comes until this agent hears of it would be lost. That costs
//! nothing while nobody reads: the kernel keeps what fits into a small buffer, and each pass starts with little in it.
//!
//! Always holds: nothing is sent by a host without a lease, and nothing here fails a migration.

use super::{Shared, reserve, text};
use quorate_hypervisor::GuestEvent;
use quorate_network::{Held, MacAddr, tap_name};
use quorate_types::VmName;

/// The first pass copies all of the memory; what follows is short.
const SHORT_PASS: u64 = 2;

/// The taps of a guest that is about to leave.
pub(crate) struct Holding {
    vm: VmName,
    taps: Vec<Box<dyn Held>>,
    listens: bool,
    /// When the guest's CPUs stopped, microseconds since 1970; 0: not known.
    stopped_us: u64,
}

impl Holding {
    pub(super) fn new(vm: &VmName) -> Self {
        Self {
            vm: vm.clone(),
            taps: Vec::new(),
            listens: false,
            stopped_us: 0,
        }
    }

    /// Something happened to the guest while it is copied.
    pub(super) async fn on_event(&mut self, shared: &Shared, event: &GuestEvent) {
        match event {
            GuestEvent::MigrationPass(pass) if *pass >= SHORT_PASS => self.listen(shared).await,
            GuestEvent::Stop { at_us } => self.stopped_us = *at_us,
            GuestEvent::Resume => self.stopped_us = 0,
            _ => {}
        }
    }

    /// Listens, from now on at the latest.
    pub(crate) async fn listen(&mut self, shared: &Shared) {
        if self.listens {
            if self.stopped_us == 0 {
                self.taps.iter_mut().for_each(|tap| tap.forget());
            }
            return;
        }
        self.listens = true;
        for nic in 0..nics(shared, &self.vm) {
            match shared
                .drivers
                .network
                .hold(&tap_name(self.vm.as_str(), nic))
                .await
            {
                Ok(held) => self.taps.push(held),
                Err(error) => {
                    tracing::warn!(vm = %self.vm, error = text(&error), "clients may have to send again");
                }
            }
        }
    }

    /// Its tap at the target is open: what came since the stop goes there, and what comes from now on.
    pub(crate) async fn pass_on(&mut self, shared: &Shared) {
        for nic in 0..nics(shared, &self.vm) {
            let tap = tap_name(self.vm.as_str(), nic);
            if let Err(error) = shared.drivers.network.let_go(&tap).await {
                tracing::warn!(vm = %self.vm, tap, error = text(&error), "it still gets its frames here");
            }
        }
        let Some(source) = source(shared) else {
            return;
        };
        if let Err(why) = reserve::still_leased(shared) {
            tracing::debug!(vm = %self.vm, why, "what came for it stays behind");
            return;
        }
        for tap in &mut self.taps {
            match tap.pass_on(self.stopped_us, source) {
                Ok(frames) => tracing::debug!(vm = %self.vm, frames, "sent after the guest"),
                Err(error) => {
                    tracing::warn!(vm = %self.vm, error = text(&error), "clients must send again");
                }
            }
        }
    }
}

/// How many NICs a VM has.
pub(crate) fn nics(shared: &Shared, vm: &VmName) -> u32 {
    let state = shared.state();
    let record = state.vms.get(vm);
    let nics = record.map_or(0, |record| record.effective().nics.len());
    u32::try_from(nics).unwrap_or(u32::MAX)
}

fn source(shared: &Shared) -> Option<MacAddr> {
    let state = shared.state();
    let me = state.hosts.get(&shared.config.host)?;
    Some(MacAddr::new(quorate_balancer::mac::held_mac(me.node)))
}
