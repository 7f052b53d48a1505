//! The actions a plan is made of: each is collected and its effect put into the picture at once.
//!
//! Always holds: what is recorded here is what `State::apply` does with the same action.

use crate::work::{Moving, Own, Work};
use quorate_membership::FenceProof;
use quorate_state::{Action, HostMode, MigrationEnd, OrderKind, PlannedAction, Reason, StopMode};
use quorate_types::Epoch;
use quorate_types::report::SavedState;

impl Work<'_> {
    fn push(&mut self, action: Action, reason: Reason) {
        self.actions.push(PlannedAction { action, reason });
    }

    pub(crate) fn start(&mut self, vm: usize, host: usize, reason: Reason) {
        let Some(abi) = self.start_abi(vm) else {
            return;
        };
        let action = Action::Start {
            vm: self.vms[vm].name.clone(),
            host: self.hosts[host].name.clone(),
            abi,
        };
        let own = Own::Owned {
            host,
            epoch: None,
            order: OrderKind::Run,
        };
        self.set_own(vm, own, |_| {});
        self.push(action, reason);
    }

    /// CPU and machine for the next start of a free VM.
    pub(crate) fn start_abi(&self, vm: usize) -> Option<quorate_state::GuestAbi> {
        let vm = &self.vms[vm];
        vm.abi.or_else(|| self.new_abi(vm.spec.machine)).cloned()
    }

    pub(crate) fn release(
        &mut self,
        vm: usize,
        proofs: Vec<FenceProof>,
        saved: Option<SavedState>,
        reason: Reason,
    ) {
        let ordered = matches!(
            self.vms[vm].own,
            Own::Owned {
                order: OrderKind::Stop(StopMode::Save),
                ..
            }
        );
        let resumes = ordered && saved.is_some() && self.vms[vm].record.active.is_some();
        let action = Action::Release {
            vm: self.vms[vm].name.clone(),
            proofs,
            saved: saved.filter(|_| ordered),
        };
        self.set_own(vm, Own::Free, |_| {});
        let at = vm;
        let vm = &mut self.vms[at];
        vm.saved = resumes;
        if !resumes {
            vm.spec = &vm.record.spec;
            vm.abi = None;
            self.room.set_vm(at, vm.spec);
        }
        self.push(action, reason);
    }

    pub(crate) fn stop(&mut self, vm: usize, mode: StopMode, reason: Reason) {
        let Own::Owned { host, epoch, .. } = self.vms[vm].own else {
            return;
        };
        let action = Action::Stop {
            vm: self.vms[vm].name.clone(),
            mode,
        };
        let order = OrderKind::Stop(mode);
        self.set_own(vm, Own::Owned { host, epoch, order }, |_| {});
        self.push(action, reason);
    }

    pub(crate) fn abandon_save(&mut self, vm: usize, reason: Reason) {
        let Own::Owned { host, epoch, .. } = self.vms[vm].own else {
            return;
        };
        let action = Action::AbandonSave {
            vm: self.vms[vm].name.clone(),
        };
        let order = OrderKind::Run;
        self.set_own(vm, Own::Owned { host, epoch, order }, |_| {});
        self.push(action, reason);
    }

    pub(crate) fn migrate(&mut self, vm: usize, to: usize, reason: Reason) {
        let Own::Owned {
            host,
            epoch: Some(epoch),
            order: OrderKind::Run,
        } = self.vms[vm].own
        else {
            return;
        };
        let action = Action::Migrate {
            vm: self.vms[vm].name.clone(),
            to: self.hosts[to].name.clone(),
        };
        let moving = Moving {
            id: None,
            from: host,
            epoch,
            to,
            target_epoch: Epoch(u64::MAX),
            cancel: false,
        };
        self.set_own(vm, Own::Migrating(moving), |_| {});
        self.push(action, reason);
    }

    pub(crate) fn cancel(&mut self, vm: usize, reason: Reason) {
        let Own::Migrating(mut moving) = self.vms[vm].own else {
            return;
        };
        let Some(id) = moving.id.filter(|_| !moving.cancel) else {
            return;
        };
        moving.cancel = true;
        let action = Action::CancelMigration {
            vm: self.vms[vm].name.clone(),
            id,
        };
        self.set_own(vm, Own::Migrating(moving), |_| {});
        self.push(action, reason);
    }

    pub(crate) fn finish(&mut self, vm: usize, end: MigrationEnd, reason: Reason) {
        let Own::Migrating(moving) = self.vms[vm].own else {
            return;
        };
        let Some(id) = moving.id else { return };
        let (host, epoch) = match &end {
            MigrationEnd::Arrived { .. } => (moving.to, moving.target_epoch),
            _ => (moving.from, moving.epoch),
        };
        let own = Own::Owned {
            host,
            epoch: Some(epoch),
            order: OrderKind::Run,
        };
        let action = Action::FinishMigration {
            vm: self.vms[vm].name.clone(),
            id,
            end,
        };
        self.set_own(vm, own, |_| {});
        self.push(action, reason);
    }

    pub(crate) fn clear_move(&mut self, vm: usize, done: bool, reason: Reason) {
        let action = Action::ClearMove {
            vm: self.vms[vm].name.clone(),
            done,
        };
        self.vms[vm].touched = true;
        self.push(action, reason);
    }

    pub(crate) fn forget(&mut self, vm: usize, reason: Reason) {
        let action = Action::Forget {
            vm: self.vms[vm].name.clone(),
        };
        self.vms[vm].touched = true;
        self.push(action, reason);
    }

    pub(crate) fn set_mode(&mut self, host: usize, mode: HostMode, reason: Reason) {
        let action = Action::SetHostMode {
            host: self.hosts[host].name.clone(),
            mode,
        };
        self.push(action, reason);
    }
}
