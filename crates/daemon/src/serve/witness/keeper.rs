//! The thread that keeps the lease on the witness's files: the pure [`DiskLease`] with a real disk and a real clock.
//!
//! Always holds: the tenure that it hands out ends no later than the lease, also while a read or write hangs (nothing
//! has to happen for a tenure to run out); the tenure ends before the lease is given back. A thread that hangs
//! in the kernel is left behind. Must not: open the log.

use super::area::{Area, AreaError, LeasePlace};
use quorate_consensus::Tenure;
use quorate_controller::boot_now;
use quorate_membership::{DiskLease, DiskStep, DiskTimings};
use quorate_types::{HostName, Millis};
use std::io::Read as _;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::{info, warn};

/// Longest time without a look at what is wanted.
const TURN: Duration = Duration::from_millis(50);
/// A pool that cannot be used is tried again after this.
const AGAIN: Duration = Duration::from_millis(500);
/// Time between two looks whether the lease file is still the pool's.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Who holds the lease.
#[derive(Debug, Clone, Default)]
pub(crate) struct Standing {
    /// This host, under this generation, for so long.
    pub(crate) mine: Option<(u64, Tenure)>,
    /// Nobody, for so long.
    pub(crate) vacant: Option<Millis>,
    /// Why the files cannot be used.
    pub(crate) problem: Option<String>,
}

/// What the thread is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Order {
    wanted: bool,
    stop: bool,
}

/// The order that holds, and who waits for another.
#[derive(Debug, Default)]
struct Orders {
    order: Mutex<Order>,
    changed: Condvar,
}

impl Orders {
    fn now(&self) -> Order {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Order)) {
        change(&mut self.order.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until another order is given, for so long at most.
    fn wait(&self, old: Order, pause: Duration) {
        let order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |now: &mut Order| *now == old;
        drop(self.changed.wait_timeout_while(order, pause, same));
    }
}

/// Handle of the thread; it ends, and gives the lease back, when this is dropped.
pub(crate) struct Keeper {
    orders: Arc<Orders>,
    standing: watch::Receiver<Standing>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.orders.change(|order| order.stop = true);
    }
}

impl Keeper {
    /// Starts the thread.
    pub(crate) fn start(area: Area, host: &HostName) -> std::io::Result<Self> {
        let orders = Arc::new(Orders::default());
        let (publish, standing) = watch::channel(Standing::default());
        let mut nonce = [0; 8];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        let lease = DiskLease::new(
            host.as_str(),
            u64::from_be_bytes(nonce),
            DiskTimings::default(),
        );
        let mut thread = Thread {
            area,
            lease,
            file: None,
            looked: Instant::now(),
            mine: None,
            problem: None,
            publish,
        };
        let told = Arc::clone(&orders);
        std::thread::Builder::new()
            .name("disk-witness".into())
            .spawn(move || thread.run(&told))?;
        Ok(Self { orders, standing })
    }

    pub(crate) fn want(&self, wanted: bool) {
        self.orders.change(|order| order.wanted = wanted);
    }

    pub(crate) fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }
}

struct Thread {
    area: Area,
    lease: DiskLease,
    file: Option<Box<dyn LeasePlace>>,
    looked: Instant,
    mine: Option<(u64, Tenure)>,
    problem: Option<String>,
    publish: watch::Sender<Standing>,
}

impl Thread {
    fn run(&mut self, orders: &Orders) {
        loop {
            let order = orders.now();
            let wanted = order.wanted && !order.stop;
            if !wanted {
                self.give_back();
            }
            if order.stop || self.publish.is_closed() {
                return;
            }
            self.lease.want(wanted);
            let pause = match self.turn() {
                Ok(pause) => {
                    if self.problem.take().is_some() {
                        info!("the disk witness's files can be used again");
                    }
                    pause
                }
                Err(error) => {
                    self.lease.failed(boot_now());
                    let text = error.to_string();
                    if self.problem.as_ref() != Some(&text) {
                        warn!(%error, "the disk witness's files cannot be used");
                    }
                    self.problem = Some(text);
                    self.file = None;
                    AGAIN
                }
            };
            self.tell();
            let longest = match self.problem {
                Some(_) => AGAIN,
                None => TURN,
            };
            orders.wait(order, pause.min(longest));
        }
    }

    /// One step on the disk. Returns for how long there is nothing to do.
    fn turn(&mut self) -> Result<Duration, AreaError> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.area.open_lease()?,
        };
        if self.looked.elapsed() > LOOK_EVERY {
            self.looked = Instant::now();
            if !file.is_there()? {
                file = self.area.open_lease()?;
            }
        }
        let began = boot_now();
        let pause = match self.lease.step(began) {
            DiskStep::Read => {
                let places = file.read()?;
                self.lease.was_read(places, began, boot_now());
                Duration::ZERO
            }
            DiskStep::Write(block) => {
                file.write(&block)?;
                self.lease.was_written(began, boot_now());
                Duration::ZERO
            }
            DiskStep::Wait(until) => until.since(began).as_duration() + Duration::from_millis(1),
        };
        self.file = Some(file);
        Ok(pause)
    }

    /// Hands out, prolongs or ends the tenure, and tells who is interested.
    fn tell(&mut self) {
        let now = boot_now();
        match (self.lease.holds(now), &self.mine) {
            (Some((generation, until)), Some((mine, tenure))) if generation == *mine => {
                if !tenure.prolong(until.0) {
                    // It ran out between two renewals; the lease itself will notice.
                    self.mine = None;
                }
            }
            (Some((generation, until)), _) => {
                self.mine = Some((generation, Tenure::until(until.0)));
            }
            (None, _) => self.end(),
        }
        let mine = self.mine.clone();
        let vacant = self.lease.vacant_for(now);
        let problem = self.problem.clone();
        self.publish.send_if_modified(|told| {
            let key =
                |standing: &Standing| standing.mine.as_ref().map(|(generation, _)| *generation);
            let next = Standing {
                mine,
                vacant,
                problem,
            };
            let changed = key(told) != key(&next) || told.problem != next.problem;
            *told = next;
            changed
        });
    }

    fn end(&mut self) {
        if let Some((_, tenure)) = self.mine.take() {
            tenure.end();
        }
    }

    fn give_back(&mut self) {
        if self.mine.is_none() {
            return;
        }
        self.end();
        if let (Some(block), Some(file)) = (self.lease.give_back(boot_now()), &mut self.file)
            && let Err(error) = file.write(&block)
        {
            warn!(%error, "the disk witness's lease cannot be given back: it runs out");
        }
        self.tell();
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::FileArea;
    use super::super::raw::tests::disk;
    use super::*;
    use quorate_storage::DirectoryConfig;

    const SOON: Duration = Duration::from_secs(20);

    async fn until(keeper: &Keeper, what: &str, good: impl FnMut(&Standing) -> bool) -> Standing {
        let mut standing = keeper.standing();
        let found = tokio::time::timeout(SOON, standing.wait_for(good)).await;
        found.expect(what).unwrap().clone()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_of_two_holds_it_and_the_other_follows() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("pool");
        std::fs::create_dir_all(&root).unwrap();
        let marker =
            serde_json::json!({ "version": 1, "cluster": "c", "pool": "shared", "id": "m1" });
        std::fs::write(root.join(".quorate-pool"), marker.to_string()).unwrap();
        let keeper = |name: &str| {
            let mut pool = DirectoryConfig::new("shared", &root, "c", name);
            pool.expected_id = Some("m1".into());
            Keeper::start(Area::Files(FileArea::new(pool, 5)), &name.parse().unwrap()).unwrap()
        };
        let (one, two) = (keeper("h1"), keeper("h2"));
        one.want(true);
        let first = until(&one, "it is free", |now| now.mine.is_some()).await;
        let (generation, tenure) = first.mine.unwrap();
        assert!(tenure.holds());
        two.want(true);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(tenure.holds(), "it is renewed");
        assert!(two.standing().borrow().mine.is_none());
        one.want(false);
        let second = until(&two, "it was given back", |now| now.mine.is_some()).await;
        assert!(!tenure.holds());
        assert!(second.mine.unwrap().0 > generation);
        // The pool goes away and comes back.
        let away = dir.path().join("away");
        std::fs::rename(&root, &away).unwrap();
        let lost = until(&two, "it notices", |now| now.mine.is_none()).await;
        assert!(lost.problem.is_some());
        std::fs::rename(&away, &root).unwrap();
        until(&two, "it is back", |now| {
            now.mine.is_some() && now.problem.is_none()
        })
        .await;
        drop(two);
        one.want(true);
        until(&one, "the other ended", |now| now.mine.is_some()).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn it_is_the_same_on_a_raw_disk() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = |slot: u8| {
            let area = Area::Raw(disk(dir.path(), slot));
            Keeper::start(area, &format!("h{slot}").parse().unwrap()).unwrap()
        };
        let (one, two) = (keeper(1), keeper(2));
        one.want(true);
        let first = until(&one, "it is free", |now| now.mine.is_some()).await;
        let (generation, tenure) = first.mine.unwrap();
        two.want(true);
        one.want(false);
        let second = until(&two, "it was given back", |now| now.mine.is_some()).await;
        assert!(!tenure.holds());
        assert!(second.mine.unwrap().0 > generation);
    }
}
