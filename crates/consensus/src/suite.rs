//! openraft's own storage test suite on the real log file, snapshot file and machine adaptor.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use openraft::testing::{StoreBuilder, Suite};
use tempfile::TempDir;

use crate::StateMachine;
use crate::fault::FaultCell;
use crate::log::LogStore;
use crate::log::file::LogFile;
use crate::machine::MachineStore;
use crate::quorum::AckTable;
use crate::snapshot::SnapshotStore;
use crate::types::{StorageError, TypeConfig};

/// Remembers its commands.
#[derive(Default)]
pub(crate) struct Journal(pub(crate) Vec<Vec<u8>>);

impl StateMachine for Journal {
    fn apply(&mut self, _index: u64, command: &[u8]) -> Vec<u8> {
        self.0.push(command.to_vec());
        Vec::new()
    }

    fn snapshot(&self) -> Vec<u8> {
        serde_json::to_vec(&self.0).unwrap()
    }

    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String> {
        self.0 = serde_json::from_slice(snapshot).map_err(|e| e.to_string())?;
        Ok(())
    }
}

struct Fresh;

impl StoreBuilder<TypeConfig, LogStore, MachineStore<Journal>, TempDir> for Fresh {
    async fn build(&self) -> Result<(TempDir, LogStore, MachineStore<Journal>), StorageError> {
        let dir = tempfile::tempdir().unwrap();
        let fault = FaultCell::new();
        let acks = Arc::new(AckTable::default());
        let path = dir.path().join("raft.redb");
        let open = move || LogFile::open(&path, 0).map(LogFile::allow_holes);
        let log = LogStore::open(open, acks, fault.clone()).unwrap();
        let (snapshots, snapshot) = SnapshotStore::open(dir.path()).unwrap();
        let machine = MachineStore::new(Journal::default(), snapshots, snapshot, fault).unwrap();
        Ok((dir, log, machine))
    }
}

#[test]
fn openraft_storage_suite() {
    Suite::test_all(Fresh).unwrap();
}
