//! A disk that fills up, or whose fsync fails, under a running node.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use redb::StorageBackend;
use redb::backends::FileBackend;
use tokio::time::timeout;

use crate::log::file::LogFile;
use crate::suite::Journal;
use crate::{
    Config, Consensus, HandleError, LinkError, MembershipError, NodeId, OpenError, PeerLink,
    ProposeError, RaftMethod,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// What the disk refuses.
#[derive(Debug, Default)]
struct Faults {
    writes: AtomicBool,
    syncs: AtomicBool,
}

/// A file whose writes or syncs fail on demand.
#[derive(Debug)]
struct FaultyFile {
    file: FileBackend,
    faults: Arc<Faults>,
}

impl FaultyFile {
    fn check(flag: &AtomicBool) -> io::Result<()> {
        if flag.load(Ordering::SeqCst) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }
}

impl StorageBackend for FaultyFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Self::check(&self.faults.writes)?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        Self::check(&self.faults.syncs)?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        Self::check(&self.faults.writes)?;
        self.file.write(offset, data)
    }
}

struct NoPeers;

#[async_trait]
impl PeerLink for NoPeers {
    async fn call(
        &self,
        _target: NodeId,
        _method: RaftMethod,
        _body: Vec<u8>,
        _timeout: Duration,
    ) -> Result<Vec<u8>, LinkError> {
        Err(LinkError::Unreachable)
    }
}

async fn open(dir: &Path, faults: &Arc<Faults>) -> Result<Consensus<Journal>, OpenError> {
    let path: PathBuf = dir.join("raft.redb");
    let faults = Arc::clone(faults);
    let open_log = move || {
        let file: File = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        let file = FileBackend::new(file).unwrap();
        LogFile::open_with_backend(FaultyFile { file, faults }, &path, 1)
    };
    Consensus::open_on(
        Config::new(1, dir),
        Journal::default(),
        Arc::new(NoPeers),
        open_log,
    )
    .await
}

async fn nothing_is_confirmed_after(fault: impl Fn(&Faults) -> &AtomicBool) {
    let dir = tempfile::tempdir().unwrap();
    let faults = Arc::new(Faults::default());
    let node = open(dir.path(), &faults).await.unwrap();
    node.bootstrap().await.unwrap();
    node.propose(b"kept".to_vec(), PATIENCE).await.unwrap();

    fault(&faults).store(true, Ordering::SeqCst);
    let refused = node.propose(b"refused".to_vec(), PATIENCE).await;
    assert!(
        matches!(refused, Err(ProposeError::Stopped(_))),
        "{refused:?}"
    );
    let mut failed = node.failed();
    let reason = timeout(PATIENCE, failed.wait_for(Option::is_some)).await;
    let reason = reason.unwrap().unwrap().clone().unwrap();
    assert!(reason.contains("could not be stored"), "{reason}");
    assert_eq!(
        node.read(|j| j.0.len()),
        1,
        "it was applied without being stored"
    );

    // The disk works again, but nobody knows what it holds: only a restart helps.
    fault(&faults).store(false, Ordering::SeqCst);
    let still = node.propose(b"later".to_vec(), PATIENCE).await;
    assert!(matches!(still, Err(ProposeError::Stopped(_))), "{still:?}");
    let learner = node.add_learner(2).await;
    assert!(matches!(learner, Err(MembershipError::Stopped(_))));
    let peer = node.handle(RaftMethod::Vote, &[1]).await;
    assert!(matches!(peer, Err(HandleError::Stopped(_))));
    assert_eq!(node.last_quorum_ack(), None);
    let mut leadership = node.leadership();
    let resigned = timeout(PATIENCE, leadership.wait_for(|l| !l.is_self)).await;
    resigned.unwrap().unwrap();
    node.shutdown().await;

    let again = open(dir.path(), &faults).await.unwrap();
    let next = again.propose(b"next".to_vec(), PATIENCE);
    let mut leads = again.leadership();
    timeout(PATIENCE, leads.wait_for(|l| l.is_self))
        .await
        .unwrap()
        .unwrap();
    next.await.unwrap();
    let journal = again.read(|j| j.0.clone());
    assert_eq!(journal.first().unwrap(), b"kept");
    assert_eq!(journal.last().unwrap(), b"next");
    assert!(!journal.contains(&b"later".to_vec()));
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_on_a_full_disk() {
    nothing_is_confirmed_after(|f| &f.writes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_after_a_failed_sync() {
    nothing_is_confirmed_after(|f| &f.syncs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_at_the_start_is_an_error_with_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Arc::new(Faults::default());
    faults.writes.store(true, Ordering::SeqCst);
    let error = open(dir.path(), &faults).await.unwrap_err();
    assert!(matches!(error, OpenError::Io { .. }), "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
}
