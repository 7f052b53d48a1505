//! A cluster in one process: links that can be cut one way, nodes that can be stopped and opened again.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use quorate_consensus::{
    Applied, Config, Consensus, LinkError, NodeId, OpenError, PeerLink, ProposeError, RaftMethod,
    Role, StateMachine, Tenure,
};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Remembers its commands; the reply is their number.
#[derive(Default)]
pub struct Journal(pub Vec<String>);

impl StateMachine for Journal {
    fn apply(&mut self, _index: u64, command: &[u8]) -> Vec<u8> {
        self.0.push(String::from_utf8_lossy(command).into_owned());
        self.0.len().to_string().into_bytes()
    }

    fn snapshot(&self) -> Vec<u8> {
        serde_json::to_vec(&self.0).unwrap()
    }

    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String> {
        self.0 = serde_json::from_slice(snapshot).map_err(|e| e.to_string())?;
        Ok(())
    }
}

pub type Node = Consensus<Journal>;

/// The wires between the nodes.
#[derive(Default)]
pub struct Wires {
    nodes: RwLock<BTreeMap<NodeId, Node>>,
    /// Directed cuts.
    cut: RwLock<BTreeSet<(NodeId, NodeId)>>,
    pub calls: Mutex<BTreeMap<RaftMethod, u64>>,
}

impl Wires {
    pub fn cut(&self, a: NodeId, b: NodeId) {
        self.cut.write().unwrap().extend([(a, b), (b, a)]);
    }

    pub fn cut_one_way(&self, from: NodeId, to: NodeId) {
        self.cut.write().unwrap().insert((from, to));
    }

    pub fn heal(&self) {
        self.cut.write().unwrap().clear();
    }

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.read().unwrap().contains(&(from, to))
    }
}

struct Wire {
    from: NodeId,
    wires: Arc<Wires>,
}

#[async_trait]
impl PeerLink for Wire {
    async fn call(
        &self,
        target: NodeId,
        method: RaftMethod,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        *self.wires.calls.lock().unwrap().entry(method).or_default() += 1;
        if self.wires.is_cut(self.from, target) {
            // Like a real cut: silence, not an error.
            sleep(limit).await;
            return Err(LinkError::Timeout);
        }
        let node = self.wires.nodes.read().unwrap().get(&target).cloned();
        let node = node.ok_or(LinkError::Unreachable)?;
        let answer = timeout(limit, node.handle(method, &body)).await;
        if self.wires.is_cut(target, self.from) {
            sleep(limit).await;
            return Err(LinkError::Timeout);
        }
        answer
            .map_err(|_| LinkError::Timeout)?
            .map_err(|e| LinkError::Remote(e.to_string()))
    }
}

pub struct Cluster {
    pub wires: Arc<Wires>,
    pub nodes: BTreeMap<NodeId, Node>,
    pub dir: TempDir,
    pub snapshot_every: u64,
    /// Nodes that are witnesses.
    pub witnesses: BTreeSet<NodeId>,
    /// Tenures of nodes that have one.
    pub tenures: BTreeMap<NodeId, Tenure>,
}

impl Cluster {
    pub fn empty() -> Self {
        Self {
            wires: Arc::default(),
            nodes: BTreeMap::new(),
            dir: tempfile::tempdir().unwrap(),
            snapshot_every: 2000,
            witnesses: BTreeSet::new(),
            tenures: BTreeMap::new(),
        }
    }

    /// Node 1 bootstrapped, the others added as voters.
    pub async fn of(voters: u64) -> Self {
        Self::with_witnesses(voters, &[]).await
    }

    /// The same, some of them witnesses.
    pub async fn with_witnesses(voters: u64, witnesses: &[NodeId]) -> Self {
        let mut cluster = Self::empty();
        cluster.witnesses = witnesses.iter().copied().collect();
        cluster.start(1).await;
        cluster.nodes[&1].bootstrap().await.unwrap();
        for id in 2..=voters {
            cluster.start(id).await;
            cluster.nodes[&1].add_learner(id).await.unwrap();
        }
        cluster.nodes[&1]
            .change_voters((1..=voters).collect())
            .await
            .unwrap();
        cluster
    }

    pub fn path(&self, id: NodeId) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    pub async fn try_start(&mut self, id: NodeId) -> Result<(), OpenError> {
        let mut config = Config::new(id, self.path(id));
        config.snapshot_every = self.snapshot_every;
        if self.witnesses.contains(&id) {
            config.role = Role::Witness;
        }
        config.tenure = self.tenures.get(&id).cloned();
        let link = Arc::new(Wire {
            from: id,
            wires: Arc::clone(&self.wires),
        });
        let node = Consensus::open(config, Journal::default(), link).await?;
        self.wires.nodes.write().unwrap().insert(id, node.clone());
        self.nodes.insert(id, node);
        Ok(())
    }

    pub async fn start(&mut self, id: NodeId) {
        self.try_start(id).await.unwrap();
    }

    pub async fn stop(&mut self, id: NodeId) {
        self.wires.nodes.write().unwrap().remove(&id);
        self.nodes.remove(&id).unwrap().shutdown().await;
    }

    /// Waits until one of `among` leads with a confirmed majority.
    pub async fn leader_among(&self, among: &[NodeId]) -> NodeId {
        let waits = among.iter().map(|id| {
            let mut watch = self.nodes[id].leadership();
            let id = *id;
            Box::pin(async move {
                watch.wait_for(|l| l.is_self).await.unwrap();
                id
            })
        });
        let first = futures_util::future::select_all(waits);
        timeout(PATIENCE, first).await.expect("nobody leads").0
    }

    pub async fn leader(&self) -> NodeId {
        let all: Vec<NodeId> = self.nodes.keys().copied().collect();
        self.leader_among(&all).await
    }

    pub fn others(&self, id: NodeId) -> Vec<NodeId> {
        self.nodes.keys().copied().filter(|n| *n != id).collect()
    }

    /// Proposes at whoever leads until it is confirmed.
    pub async fn propose(&self, command: &str) -> Applied {
        let until = Instant::now() + PATIENCE;
        loop {
            let leader = self.leader().await;
            let bytes = command.as_bytes().to_vec();
            match self.nodes[&leader].propose(bytes, PATIENCE).await {
                Ok(applied) => return applied,
                Err(ProposeError::NotLeader { .. }) if Instant::now() < until => {
                    tokio::task::yield_now().await;
                }
                Err(e) => panic!("{command}: {e}"),
            }
        }
    }

    pub async fn wait_applied(&self, id: NodeId, index: u64) {
        let mut applied = self.nodes[&id].applied();
        let reached = timeout(PATIENCE, applied.wait_for(|a| *a >= index)).await;
        reached.expect("not applied in time").unwrap();
    }

    pub fn journal(&self, id: NodeId) -> Vec<String> {
        self.nodes[&id].read(|j| j.0.clone())
    }
}

/// Waits until `condition` holds, looking every 10 ms.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "not in time: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}
