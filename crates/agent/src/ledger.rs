//! The durable ledger: one JSON entry per VM in a redb file.
//!
//! Always holds: when [`LedgerStore::write`] returns, the records are on stable storage; a file that cannot be
//! read, or was written by a newer program, stops the agent instead of being taken for an empty one.

use quorate_agent_logic::{Ledger, LedgerEntry};
use quorate_types::VmName;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use std::path::{Path, PathBuf};

const ENTRIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("vms");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// Format that this program writes.
const FORMAT: u64 = 1;

/// Why the ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file is damaged or cannot be opened.
    #[error(
        "the ledger {} cannot be read: {detail}. It says which guests this host must never start again, so nothing is started without it. Make sure that no guest runs on this host, fence it (`quorate host fence` or `confirm-dead`), then remove the file and start the daemon again",
        .path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// What was seen.
        detail: String,
    },
    /// Written by a newer program.
    #[error("the ledger {} was written by a newer program (format {found}): upgrade this host", .path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// A record could not be made durable.
    #[error("the ledger {} cannot be written: {detail}. The agent stops; guests go on until the lease ends. Free space or mend the disk, then start the daemon again", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What was seen.
        detail: String,
    },
}

/// The file.
#[derive(Debug)]
pub struct LedgerStore {
    path: PathBuf,
    database: Database,
}

impl LedgerStore {
    /// Opens or makes the file and reads all of it.
    ///
    /// # Errors
    /// [`LedgerError::Open`], [`LedgerError::TooNew`].
    pub fn open(path: &Path) -> Result<(Self, Ledger), LedgerError> {
        let failed = |detail: String| LedgerError::Open {
            path: path.to_owned(),
            detail,
        };
        let database = Database::create(path).map_err(|error| failed(error.to_string()))?;
        Self::over(path, database)
    }

    /// Reads all of it.
    fn over(path: &Path, database: Database) -> Result<(Self, Ledger), LedgerError> {
        let failed = |detail: String| LedgerError::Open {
            path: path.to_owned(),
            detail,
        };
        let store = Self {
            path: path.to_owned(),
            database,
        };
        let ledger = store.read().map_err(|error| match error {
            Unreadable::Damaged(detail) => failed(detail),
            Unreadable::TooNew(found) => LedgerError::TooNew {
                path: path.to_owned(),
                found,
            },
        })?;
        Ok((store, ledger))
    }

    fn read(&self) -> Result<Ledger, Unreadable> {
        let write = self.database.begin_write()?;
        {
            let mut meta = write.open_table(META)?;
            let found = meta.get("format")?.map(|value| value.value());
            match found {
                Some(found) if found > FORMAT => return Err(Unreadable::TooNew(found)),
                Some(_) => {}
                None => {
                    meta.insert("format", FORMAT)?;
                }
            }
            write.open_table(ENTRIES)?;
        }
        write.commit()?;
        let read = self.database.begin_read()?;
        let table = read.open_table(ENTRIES)?;
        let mut entries = Vec::new();
        for row in table.iter()? {
            let (name, bytes) = row?;
            let name = VmName::new(name.value()).map_err(damaged)?;
            let entry: LedgerEntry = serde_json::from_slice(bytes.value()).map_err(damaged)?;
            entries.push((name, entry));
        }
        Ok(Ledger::from_entries(entries))
    }

    /// Makes the entries durable, in one transaction; `None` removes one.
    ///
    /// # Errors
    /// [`LedgerError::Write`].
    pub fn write(&self, rows: &[(VmName, Option<LedgerEntry>)]) -> Result<(), LedgerError> {
        self.try_write(rows).map_err(|error| LedgerError::Write {
            path: self.path.clone(),
            detail: error.to_string(),
        })
    }

    fn try_write(&self, rows: &[(VmName, Option<LedgerEntry>)]) -> Result<(), redb::Error> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut table = write.open_table(ENTRIES)?;
            for (vm, entry) in rows {
                match entry {
                    Some(entry) => {
                        let bytes = serde_json::to_vec(entry)
                            .map_err(|error| redb::Error::Io(error.into()))?;
                        table.insert(vm.as_str(), bytes.as_slice())?;
                    }
                    None => {
                        table.remove(vm.as_str())?;
                    }
                }
            }
        }
        write.commit()?;
        Ok(())
    }
}

enum Unreadable {
    Damaged(String),
    TooNew(u64),
}

fn damaged(error: impl std::fmt::Display) -> Unreadable {
    Unreadable::Damaged(error.to_string())
}

impl<E: Into<redb::Error>> From<E> for Unreadable {
    fn from(error: E) -> Self {
        Self::Damaged(error.into().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_types::Epoch;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn name(text: &str) -> VmName {
        VmName::new(text).unwrap()
    }

    fn closed(epoch: u64) -> Option<LedgerEntry> {
        Some(LedgerEntry {
            closed: Epoch(epoch),
            ..LedgerEntry::default()
        })
    }

    #[test]
    fn entries_survive_and_forgotten_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.redb");
        let (store, _) = LedgerStore::open(&path).unwrap();
        let rows = [(name("db"), closed(3)), (name("web"), closed(9))];
        store.write(&rows).unwrap();
        drop(store);
        let (store, ledger) = LedgerStore::open(&path).unwrap();
        assert_eq!(ledger.get(&name("web")), rows[1].1.as_ref());
        store.write(&[(name("db"), None)]).unwrap();
        drop(store);
        let (_store, ledger) = LedgerStore::open(&path).unwrap();
        assert_eq!(ledger.entries().len(), 1);
    }

    #[test]
    fn a_damaged_file_is_an_error_that_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.redb");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let error = LedgerStore::open(&path).unwrap_err();
        assert!(matches!(error, LedgerError::Open { .. }));
        assert!(error.to_string().contains("fence it"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap().len(), 8192, "left as it was");
    }

    /// A file on a disk that fills up.
    #[derive(Debug)]
    struct Filling(redb::backends::FileBackend, Arc<AtomicBool>);

    impl Filling {
        fn check(&self) -> std::io::Result<()> {
            match self.1.load(Ordering::SeqCst) {
                true => Err(std::io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }
    }

    impl redb::StorageBackend for Filling {
        fn len(&self) -> std::io::Result<u64> {
            self.0.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
            self.0.read(offset, out)
        }
        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.check()?;
            self.0.set_len(len)
        }
        fn sync_data(&self) -> std::io::Result<()> {
            self.check()?;
            self.0.sync_data()
        }
        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            self.check()?;
            self.0.write(offset, data)
        }
    }

    #[test]
    fn a_full_disk_is_an_error_and_nothing_that_was_written_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.redb");
        let file = std::fs::File::create_new(&path).unwrap();
        drop(file);
        let file = std::fs::File::options().read(true).write(true).open(&path);
        let full = Arc::new(AtomicBool::new(false));
        let backend = redb::backends::FileBackend::new(file.unwrap()).unwrap();
        let backend = Filling(backend, Arc::clone(&full));
        let database = Database::builder().create_with_backend(backend).unwrap();
        let (store, _) = LedgerStore::over(&path, database).unwrap();
        store.write(&[(name("db"), closed(3))]).unwrap();
        full.store(true, Ordering::SeqCst);
        let error = store.write(&[(name("db"), closed(4))]).unwrap_err();
        assert!(matches!(error, LedgerError::Write { .. }));
        assert!(error.to_string().contains("Free space"), "{error}");
        drop(store);
        let (_store, ledger) = LedgerStore::open(&path).unwrap();
        assert_eq!(ledger.get(&name("db")), closed(3).as_ref());
    }

    #[test]
    fn a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.redb");
        let (store, _) = LedgerStore::open(&path).unwrap();
        let write = store.database.begin_write().unwrap();
        write
            .open_table(META)
            .unwrap()
            .insert("format", 99)
            .unwrap();
        write.commit().unwrap();
        drop(store);
        let error = LedgerStore::open(&path).unwrap_err();
        assert!(matches!(error, LedgerError::TooNew { found: 99, .. }));
    }
}
