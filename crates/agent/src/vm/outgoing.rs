//! The source of a migration: forwards its phases.

use super::held::Holding;
use super::{Done, Live, Shared, observed, text};
use crate::services::edges;
use quorate_agent_logic::{GuestEvent, Observed, Token};
use quorate_hypervisor::{
    Adoption, HypervisorError, MigrationPhase, MigrationRequest, MigrationStatus,
    OutgoingMigration, TlsMaterial, Vm,
};
use quorate_state::Ownership;
use quorate_types::{HostName, MigrationId, VmName};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{mpsc, oneshot};

const ASK_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn send(
    shared: Arc<Shared>,
    vm: VmName,
    live: Live,
    token: Token,
    id: MigrationId,
    address: String,
    done: mpsc::Sender<Done>,
) {
    let begun = begin(&shared, &vm, &live, id, &address).await;
    match begun {
        Ok(outgoing) => follow(&shared, &vm, &live, token, outgoing, &done).await,
        Err(detail) => {
            let state = live.guest.status().await;
            let observed = state.map_or(Observed::Unknown, |state| observed(&state));
            let event = GuestEvent::SendFailed {
                detail,
                begun: false,
                observed,
            };
            shared.tell(&vm, token, event).await;
        }
    }
}

async fn begin(
    shared: &Shared,
    vm: &VmName,
    live: &Live,
    id: MigrationId,
    address: &str,
) -> Result<OutgoingMigration, String> {
    let to: SocketAddr = address
        .parse()
        .map_err(|_| format!("the target gave the address `{address}`, which is none"))?;
    let mut request = MigrationRequest::new(to);
    let mib_per_s = shared.state().settings().migration_mib_per_s;
    request.max_bandwidth = (mib_per_s > 0).then_some(mib_per_s << 20);
    request.tls = shared.config.migration_tls.clone().map(|dir| TlsMaterial {
        dir,
        hostname: target(shared, vm, id).map(|host| host.to_string()),
    });
    let sent = live.guest.migrate(request).await;
    sent.map_err(|error| text(&error))
}

fn target(shared: &Shared, vm: &VmName, id: MigrationId) -> Option<HostName> {
    match &shared.state().vms.get(vm)?.ownership {
        Ownership::Migrating { id: now, to, .. } if *now == id => Some(to.clone()),
        _ => None,
    }
}

/// Takes up the watch over a migration that an earlier agent began.
pub(super) async fn attach(
    shared: Arc<Shared>,
    vm: VmName,
    live: Live,
    token: Token,
    done: mpsc::Sender<Done>,
) {
    match live.guest.attach_migration().await {
        Ok(Some(outgoing)) => follow(&shared, &vm, &live, token, outgoing, &done).await,
        Ok(None) => {
            let event = ended(&shared, &vm).await;
            shared.tell(&vm, token, event).await;
        }
        Err(error) => {
            let event = GuestEvent::SendFailed {
                detail: text(&error),
                begun: true,
                observed: Observed::Unknown,
            };
            shared.tell(&vm, token, event).await;
        }
    }
}

/// How a migration stands that was over before it could be attached to.
async fn ended(shared: &Shared, vm: &VmName) -> GuestEvent {
    let runtime = shared.layout.runtime(vm);
    let found = shared.drivers.hypervisor.adopt(&runtime, ASK_WITHIN).await;
    let (state, migration) = match found {
        Ok(Adoption::Alive {
            state, migration, ..
        }) => (state, migration),
        _ => (None, None),
    };
    if migration == Some(MigrationStatus::Completed) {
        return GuestEvent::SendCompleted { downtime_ms: 0 };
    }
    GuestEvent::SendFailed {
        detail: "it failed while the agent was away".into(),
        begun: true,
        observed: state.map_or(Observed::Unknown, |state| observed(&state)),
    }
}

/// Cancels a migration that nobody holds a control of.
pub(super) async fn cancel_found(guest: &dyn Vm) -> Result<(), HypervisorError> {
    if let Some(mut outgoing) = guest.attach_migration().await? {
        outgoing.cancel().await?;
        while outgoing.next().await.is_some() {}
    }
    Ok(())
}

/// What goes ahead of the guest and after it, beside what else is handed over: neither waits for the other.
struct Leaving {
    called_off: oneshot::Sender<()>,
    is_done: oneshot::Receiver<()>,
}

impl Leaving {
    fn begin(shared: &Arc<Shared>, vm: &VmName, holding: Holding) -> Self {
        let (shared, vm) = (shared.clone(), vm.clone());
        let (done, is_done) = oneshot::channel::<()>();
        let (called_off, is_called_off) = oneshot::channel();
        shared.clone().spawn(async move {
            edges::leave(&shared, &vm, holding, is_called_off).await;
            drop(done);
        });
        Self {
            called_off,
            is_done,
        }
    }

    async fn call_off(self) {
        let _ = self.called_off.send(());
        let _ = self.is_done.await;
    }
}

/// The next phase; `holding` hears what happens to the guest until then.
async fn next(
    shared: &Shared,
    outgoing: &mut OutgoingMigration,
    events: &mut broadcast::Receiver<quorate_hypervisor::GuestEvent>,
    holding: &mut Option<Holding>,
) -> Option<MigrationPhase> {
    loop {
        let Some(hears) = holding.as_mut() else {
            return outgoing.next().await;
        };
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(event) => hears.on_event(shared, &event).await,
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return outgoing.next().await,
            },
            phase = outgoing.next() => return phase,
        }
    }
}

async fn follow(
    shared: &Arc<Shared>,
    vm: &VmName,
    live: &Live,
    token: Token,
    mut outgoing: OutgoingMigration,
    done: &mpsc::Sender<Done>,
) {
    let control = outgoing.control();
    let _ = done.send(Done::Sending { token, control }).await;
    let mut switching = false;
    let mut leaving = None;
    let mut events = live.guest.events();
    let mut holding = Some(Holding::new(vm));
    while let Some(phase) = next(shared, &mut outgoing, &mut events, &mut holding).await {
        let state = |source: Option<quorate_hypervisor::GuestState>| {
            source.map_or(Observed::Unknown, |state| observed(&state))
        };
        let event = match phase {
            MigrationPhase::Setup => continue,
            MigrationPhase::Active(progress) => GuestEvent::Progress {
                transferred: progress.transferred_bytes,
                remaining: progress.remaining_bytes,
            },
            MigrationPhase::PreSwitchover => {
                if let Some(holding) = holding.take() {
                    leaving = Some(Leaving::begin(shared, vm, holding));
                }
                GuestEvent::PreSwitchover
            }
            MigrationPhase::Device => {
                switching = true;
                continue;
            }
            MigrationPhase::Completed { downtime_ms, .. } => {
                GuestEvent::SendCompleted { downtime_ms }
            }
            MigrationPhase::Failed {
                reason,
                switchover_begun,
                source,
            } => GuestEvent::SendFailed {
                detail: reason,
                begun: switchover_begun,
                observed: state(source),
            },
            MigrationPhase::Cancelled { source } => GuestEvent::SendFailed {
                detail: "it was cancelled".into(),
                begun: false,
                observed: state(source),
            },
        };
        if matches!(event, GuestEvent::SendFailed { .. }) {
            if let Some(leaving) = leaving.take() {
                leaving.call_off().await;
            }
            edges::back(shared, vm).await;
        }
        let last = matches!(
            event,
            GuestEvent::SendCompleted { .. } | GuestEvent::SendFailed { .. }
        );
        shared.tell(vm, token, event).await;
        if last {
            return;
        }
    }
    // The driver ended without a last word: the worst is assumed.
    let event = GuestEvent::SendFailed {
        detail: "the watch over it was lost".into(),
        begun: switching,
        observed: Observed::Unknown,
    };
    shared.tell(vm, token, event).await;
}
