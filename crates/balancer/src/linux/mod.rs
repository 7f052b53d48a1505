//! The datapath of a Linux host: eBPF programs loaded by `aya`, fed through maps.
//!
//! Owns: what is pinned below [`LinuxOptions::root`]`/NAME`. Always holds: one call at a time changes the tables; a call
//! that reaches the kernel does so on a thread of its own, so no task of the daemon waits for it; `lease` alone goes
//! straight to its map.
//!
//! ```text
//! host      the steps of `apply`                links     programs at interfaces, pinned
//! services  entries, addresses    rings         object    loading, maps pinned or taken over
//! doors     what directors find of both first
//! edges     taps            flows  flows, pins  sys       whole tables at once, clocks (the unsafe part)
//! limits    paces of members, what guests were kept from sending
//! ```

mod counters;
mod doors;
mod edges;
mod flows;
mod host;
mod limits;
mod links;
mod measure;
mod object;
mod receive;
mod rings;
mod services;
mod sys;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{Array, MapData};
use quorate_types::NodeId;

use crate::flow::{Flow, Pin};
use crate::model::{Applied, Counters, EdgeSpec, ServiceTable, Wanted};
use crate::trace::{TraceAnswer, TraceQuery};
use crate::{BalancerError, Datapath};
use host::Host;
use object::kernel;

pub use measure::{How, Verdict};
pub use object::Capacity;
pub use receive::Receivers;

/// Where pins of all clusters of a machine are.
pub const PIN_ROOT: &str = "/sys/fs/bpf/quorate";

/// What a host's datapath is made with.
#[derive(Debug, Clone)]
pub struct LinuxOptions {
    /// This host's number: part of the MAC addresses that it sends from.
    pub node: NodeId,
    /// Tells this daemon's pins from those of others on the machine, such as a hash of its state folder. No dots, no
    /// slashes.
    pub name: String,
    /// A folder right below a BPF file system; [`PIN_ROOT`] but for tests. The file system is mounted if it is not.
    pub root: PathBuf,
    /// Sizes of tables made anew.
    pub capacity: Capacity,
}

impl LinuxOptions {
    /// With defaults for the rest.
    #[must_use]
    pub fn new(node: NodeId, name: impl Into<String>) -> Self {
        Self {
            node,
            name: name.into(),
            root: PathBuf::from(PIN_ROOT),
            capacity: Capacity::default(),
        }
    }
}

/// A host's datapath in the kernel.
pub struct LinuxDatapath {
    host: Arc<Mutex<Host>>,
    lease: Mutex<Array<MapData, u64>>,
    deadline_ns: AtomicU64,
}

async fn run<T: Send + 'static>(
    host: &Arc<Mutex<Host>>,
    work: impl FnOnce(&mut Host) -> Result<T, BalancerError> + Send + 'static,
) -> Result<T, BalancerError> {
    let host = Arc::clone(host);
    let task = move || work(&mut host.lock().unwrap_or_else(PoisonError::into_inner));
    match tokio::task::spawn_blocking(task).await {
        Ok(result) => result,
        Err(error) => Err(BalancerError::Kernel {
            operation: "running",
            object: "a step of the datapath".to_owned(),
            detail: error.to_string(),
        }),
    }
}

impl LinuxDatapath {
    /// Loads the programs, and takes over what an earlier process pinned. Nothing is attached yet.
    ///
    /// # Errors
    /// Says what the kernel or the process lacks.
    pub async fn new(options: LinuxOptions) -> Result<Self, BalancerError> {
        let make = move || {
            let root = options.root.join(&options.name);
            object::ensure_bpffs(&options.root)?;
            let loaded = object::load(&root, &options.capacity)?;
            let deadline = loaded
                .lease
                .get(&0, 0)
                .map_err(kernel("reading", "lease"))?;
            let host = Host::new(
                root,
                options.node,
                loaded.capacity,
                loaded.ebpf,
                loaded.tables,
                loaded.doors,
            )?;
            Ok(Self {
                host: Arc::new(Mutex::new(host)),
                lease: Mutex::new(loaded.lease),
                deadline_ns: AtomicU64::new(deadline),
            })
        };
        match tokio::task::spawn_blocking(make).await {
            Ok(result) => result,
            Err(error) => Err(BalancerError::Kernel {
                operation: "loading",
                object: "quorate.bpf.o".to_owned(),
                detail: error.to_string(),
            }),
        }
    }

    /// Takes everything away: links, maps, pins. For tests, and for a host that leaves its cluster.
    ///
    /// # Errors
    /// When the pins cannot be removed.
    pub fn remove(&self) -> Result<(), BalancerError> {
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::remove_dir_all(&host.root)
            .map_err(kernel("removing", host.root.display().to_string()))
    }
}

#[async_trait::async_trait]
impl Datapath for LinuxDatapath {
    async fn apply(&self, wanted: &Wanted) -> Result<Applied, BalancerError> {
        let wanted = wanted.clone();
        run(&self.host, move |host| host.apply(&wanted)).await
    }

    fn lease(&self, deadline_ns: u64) {
        self.deadline_ns.store(deadline_ns, Ordering::Relaxed);
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = lease.set(0, deadline_ns, 0) {
            // The kernel goes silent by itself when the old one has passed.
            tracing::error!(%error, "the lease cannot be written");
        }
    }

    async fn attach_edge(&self, edge: &EdgeSpec) -> Result<(), BalancerError> {
        let edge = edge.clone();
        run(&self.host, move |host| host.attach_edge(&edge)).await
    }

    async fn open_edge(&self, ifname: &str) -> Result<(), BalancerError> {
        let ifname = ifname.to_owned();
        run(&self.host, move |host| host.set_open(&ifname, true, false)).await
    }

    async fn close_edge(&self, ifname: &str, forward_to_wire: bool) -> Result<(), BalancerError> {
        let ifname = ifname.to_owned();
        run(&self.host, move |host| {
            host.set_open(&ifname, false, forward_to_wire)
        })
        .await
    }

    async fn detach_edge(&self, ifname: &str) -> Result<(), BalancerError> {
        let ifname = ifname.to_owned();
        run(&self.host, move |host| host.detach_edge(&ifname)).await
    }

    async fn flows(&self, ifname: &str) -> Result<Vec<Flow>, BalancerError> {
        let ifname = ifname.to_owned();
        run(&self.host, move |host| host.flows(&ifname)).await
    }

    async fn put_flows(&self, ifname: &str, flows: &[Flow]) -> Result<(), BalancerError> {
        let (ifname, flows) = (ifname.to_owned(), flows.to_vec());
        run(&self.host, move |host| host.put_flows(&ifname, &flows)).await
    }

    async fn strays(&self, table: &ServiceTable) -> Result<Vec<Pin>, BalancerError> {
        let table = table.clone();
        run(&self.host, move |host| host.strays(&table)).await
    }

    async fn pin(&self, pins: &[Pin]) -> Result<(), BalancerError> {
        let pins = pins.to_vec();
        run(&self.host, move |host| host.pin(&pins)).await
    }

    async fn counters(&self) -> Result<Counters, BalancerError> {
        run(&self.host, |host| host.counters()).await
    }

    async fn trace(&self, query: &TraceQuery) -> Result<TraceAnswer, BalancerError> {
        let query = query.clone();
        let deadline_ns = self.deadline_ns.load(Ordering::Relaxed);
        run(&self.host, move |host| host.trace(&query, deadline_ns)).await
    }
}
