//! What a host must do, derived from the state: never stored, so it cannot disagree with it.

use crate::model::{GuestAbi, OrderKind, Ownership, State, StopMode, VmRecord};
use quorate_types::report::SavedState;
use quorate_types::{Epoch, HostName, MigrationId, VmName, VmSpec};
use std::collections::BTreeMap;

/// An order for one VM on one host. A VM without an order must not run there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Keep it running.
    Run {
        /// Fencing token.
        epoch: Epoch,
        /// Definition it runs with.
        spec: VmSpec,
        /// CPU and machine.
        abi: GuestAbi,
        /// Memory to resume from at the first start under this epoch.
        restore: Option<SavedState>,
    },
    /// End it, close the epoch, report it.
    Stop {
        /// Fencing token.
        epoch: Epoch,
        /// How.
        mode: StopMode,
        /// Definition it runs with.
        spec: VmSpec,
    },
    /// Send it to another host.
    MigrateOut {
        /// Which migration.
        id: MigrationId,
        /// Fencing token of this side.
        epoch: Epoch,
        /// Target.
        to: HostName,
        /// Give it up if it has not passed the switchover.
        cancel: bool,
        /// Definition it runs with.
        spec: VmSpec,
        /// CPU and machine.
        abi: GuestAbi,
    },
    /// Receive it from another host.
    MigrateIn {
        /// Which migration.
        id: MigrationId,
        /// Fencing token of this side.
        epoch: Epoch,
        /// Source.
        from: HostName,
        /// Give it up if it has not arrived.
        cancel: bool,
        /// Definition it runs with.
        spec: VmSpec,
        /// CPU and machine.
        abi: GuestAbi,
    },
}

impl Order {
    /// The fencing token of this side.
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::Run { epoch, .. }
            | Self::Stop { epoch, .. }
            | Self::MigrateOut { epoch, .. }
            | Self::MigrateIn { epoch, .. } => *epoch,
        }
    }
}

impl State {
    /// All orders of one host.
    pub fn orders_for(&self, host: &HostName) -> BTreeMap<VmName, Order> {
        let order = |(name, vm): (&VmName, &VmRecord)| Some((name.clone(), order_of(vm, host)?));
        self.vms.iter().filter_map(order).collect()
    }
}

fn order_of(vm: &VmRecord, me: &HostName) -> Option<Order> {
    let spec = vm.effective().clone();
    let abi = vm.abi.clone()?;
    match &vm.ownership {
        Ownership::Owned {
            host,
            epoch,
            order: OrderKind::Run,
        } if host == me => Some(Order::Run {
            epoch: *epoch,
            spec,
            abi,
            restore: vm.saved.clone(),
        }),
        Ownership::Owned {
            host,
            epoch,
            order: OrderKind::Stop(mode),
        } if host == me => Some(Order::Stop {
            epoch: *epoch,
            mode: *mode,
            spec,
        }),
        Ownership::Migrating {
            id,
            from,
            epoch,
            to,
            cancel,
            ..
        } if from == me => Some(Order::MigrateOut {
            id: *id,
            epoch: *epoch,
            to: to.clone(),
            cancel: *cancel,
            spec,
            abi,
        }),
        Ownership::Migrating {
            id,
            from,
            to,
            target_epoch,
            cancel,
            ..
        } if to == me => Some(Order::MigrateIn {
            id: *id,
            epoch: *target_epoch,
            from: from.clone(),
            cancel: *cancel,
            spec,
            abi,
        }),
        _ => None,
    }
}
