//! The task behind a [`super::Guest`].
//!
//! ```text
//!            connection lost                     pidfd readable
//! Connected ----------------> Reconnecting  ...  ---------------> drain events -> publish exit -> end
//!     ^------------------------------+ (Reconnected event; 10 ms doubling to 1 s, as long as the process lives)
//! ```
//!
//! Always holds: the exit is published once, after the last events, so that a reader sees why.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, timeout};

use crate::config::GuestConfig;
use crate::guest::{ExitInfo, GuestEvent};
use crate::qemu::command_line::disk_of_node;
use crate::qemu::process::Watched;
use crate::qemu::qmp::{QmpClient, QmpEvent, parse_event};
use crate::qemu::relay;

/// First and longest pause between two attempts to connect.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Deadline of one attempt.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// After the process has ended its socket is closed; what was in it is read within this (the bound is
/// for a socket that somebody else holds open).
const DRAIN_WITHIN: Duration = Duration::from_millis(100);

pub(super) struct Supervisor {
    pub(super) config: GuestConfig,
    pub(super) process: Arc<Watched>,
    pub(super) events: broadcast::Sender<GuestEvent>,
    pub(super) client: watch::Sender<Option<QmpClient>>,
    pub(super) exit: watch::Sender<Option<ExitInfo>>,
    pub(super) shutdown: Option<(bool, String)>,
}

impl Supervisor {
    pub(super) async fn run(mut self, first: Option<QmpClient>) {
        let process = self.process.clone();
        let mut source = first.map(|client| (client.events(), client));
        let (code, signal) = {
            let ended = process.ended();
            tokio::pin!(ended);
            loop {
                tokio::select! {
                    // The end first: when all is ready at once, no reconnection is attempted.
                    biased;
                    ending = &mut ended => break ending,
                    connected = self.follow(&mut source) => source = Some(connected),
                }
            }
        };
        self.drain(source).await;
        relay::close_all(&self.config.runtime_dir).await;
        self.client.send_replace(None);
        let exit = ExitInfo {
            code,
            signal,
            shutdown: self.shutdown.take(),
        };
        tracing::debug!(vm = self.config.name, %exit, "QEMU has ended");
        self.exit.send_replace(Some(exit));
    }

    /// Forwards events until the connection is lost, then returns a new one.
    async fn follow(
        &mut self,
        source: &mut Option<(broadcast::Receiver<QmpEvent>, QmpClient)>,
    ) -> (broadcast::Receiver<QmpEvent>, QmpClient) {
        if let Some((receiver, client)) = source {
            let closed = client.clone();
            loop {
                tokio::select! {
                    biased;
                    event = receiver.recv() => match event {
                        Ok(event) => self.forward(event),
                        Err(RecvError::Lagged(missed)) => {
                            tracing::warn!(vm = self.config.name, missed, "QMP events were lost");
                            let _ = self.events.send(GuestEvent::Reconnected);
                        }
                        Err(RecvError::Closed) => break,
                    },
                    () = closed.closed() => break,
                }
            }
            tracing::debug!(vm = self.config.name, "the QMP connection is lost");
            self.client.send_replace(None);
            // Kept in `source` for the final drain.
        }
        let client = self.reconnect().await;
        let receiver = client.events();
        self.client.send_replace(Some(client.clone()));
        let _ = self.events.send(GuestEvent::Reconnected);
        (receiver, client)
    }

    async fn reconnect(&self) -> QmpClient {
        let mut pause = RECONNECT.0;
        loop {
            let path = self.config.paths().qmp();
            let begun = Instant::now();
            match QmpClient::connect(&path, CONNECT_WITHIN).await {
                Ok(client) => return client,
                Err(error) => tracing::debug!(vm = self.config.name, %error, "no QMP connection"),
            }
            tokio::time::sleep_until(begun + pause).await;
            pause = (pause * 2).min(RECONNECT.1);
        }
    }

    async fn drain(&mut self, source: Option<(broadcast::Receiver<QmpEvent>, QmpClient)>) {
        let Some((mut receiver, client)) = source else {
            return;
        };
        let _ = timeout(DRAIN_WITHIN, client.closed()).await;
        loop {
            match receiver.try_recv() {
                Ok(event) => self.forward(event),
                Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => return,
            }
        }
    }

    fn forward(&mut self, event: QmpEvent) {
        let disks = &self.config.disks;
        let event = parse_event(event, |node| {
            disk_of_node(node)
                .and_then(|index| disks.get(index))
                .map(|disk| disk.id.clone())
        });
        match &event {
            GuestEvent::Shutdown { by_guest, reason } => {
                self.shutdown = Some((*by_guest, reason.clone()));
            }
            // With the default actions a reset is no end; a shutdown announced before it is void.
            GuestEvent::Reset { .. } => self.shutdown = None,
            _ => {}
        }
        // No subscriber is no error.
        let _ = self.events.send(event);
    }
}
