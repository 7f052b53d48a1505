//! Copies of disks on other hosts: what the owner does about one, and what the host of a copy serves.
//!
//! | record | mirror | does | says |
//! | --- | --- | --- | --- |
//! | in step | going on | nothing | ready |
//! | in step | stalled, broken or gone | nothing: the guest's writes wait for the record to change | failed |
//! | out of step | none | begins one, after the pause | waiting |
//! | out of step | of this life of the record | nothing | syncing, then ready |
//! | out of step | of an earlier life | drops it | waiting |
//! | out of step | stalled or broken | drops it: it was never counted on | waiting |
//! | in step | the guest's process is silent | nothing, as above | failed, after three leases |
//! | out of step | the guest's process is silent | drops it, after a lease | waiting |
//!
//! Always holds: a mirror is dropped only when the record says that the copy is out of step; a copy is written to
//! from outside only for the owner that the record names, and only from a life on in which it did not count.

use quorate_state::{DiskCopy, Ownership, State};
use quorate_types::report::MirrorPhase;
use quorate_types::{Epoch, HostName, PoolName, Revision, VmName};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A mirror as the hypervisor sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mirror {
    /// The life of the copy's record that it was begun for.
    pub since: Revision,
    /// Every write reaches the copy.
    pub in_step: bool,
    /// Writes have waited too long.
    pub stalled: bool,
    /// It is broken.
    pub problem: Option<String>,
}

/// What is to be done about a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorStep {
    /// Nothing.
    Nothing,
    /// Begin a mirror.
    Begin,
    /// Let go of it: writes that wait are completed without the copy.
    Drop,
    /// Make the disk larger: no copy is in the way.
    Grow,
}

/// What the owner does about a copy, and what it says of it.
#[must_use]
pub fn mirror_step(
    copy: &DiskCopy,
    mirror: Option<&Mirror>,
) -> (MirrorStep, MirrorPhase, Option<String>) {
    let broken = mirror.and_then(|mirror| match (&mirror.problem, mirror.stalled) {
        (Some(problem), _) => Some(problem.clone()),
        (None, true) => Some("its host does not answer".to_owned()),
        (None, false) => None,
    });
    match (copy.in_step, mirror) {
        (true, None) => {
            let why = "its mirror has ended".to_owned();
            (MirrorStep::Nothing, MirrorPhase::Failed, Some(why))
        }
        (true, Some(_)) if broken.is_some() => (MirrorStep::Nothing, MirrorPhase::Failed, broken),
        (true, Some(_)) => (MirrorStep::Nothing, MirrorPhase::Ready, None),
        (false, None) => (MirrorStep::Begin, MirrorPhase::Waiting, None),
        (false, Some(mirror)) if mirror.since != copy.since || broken.is_some() => {
            (MirrorStep::Drop, MirrorPhase::Waiting, broken)
        }
        (false, Some(mirror)) if mirror.in_step => (MirrorStep::Nothing, MirrorPhase::Ready, None),
        (false, Some(_)) => (MirrorStep::Nothing, MirrorPhase::Syncing, None),
    }
}

/// What the owner does about a copy, and what it says of it, while the disk shall become larger: that cannot be done
/// under a mirror. The copy becomes larger when it is brought up to date again, and gets only what it lacks.
#[must_use]
pub fn grow_step(copy: &DiskCopy, mirror: bool) -> (MirrorStep, MirrorPhase, Option<String>) {
    let why = "the disk is being made larger".to_owned();
    match (copy.in_step, mirror) {
        (true, _) => (MirrorStep::Nothing, MirrorPhase::Failed, Some(why)),
        (false, true) => (MirrorStep::Drop, MirrorPhase::Waiting, Some(why)),
        (false, false) => (MirrorStep::Grow, MirrorPhase::Waiting, Some(why)),
    }
}

/// For so many leases the guest's process says nothing before a copy that counts is blamed for it.
const SILENT_LEASES: u32 = 3;

/// What the owner does about a copy, and what it says of it, while the guest's process has not answered for this long:
/// it may be waiting for the copy.
#[must_use]
pub fn silent_step(
    copy: &DiskCopy,
    silent: Duration,
    lease: Duration,
) -> Option<(MirrorStep, MirrorPhase, String)> {
    let why = "the guest's process does not answer: it may be waiting for the copy";
    match copy.in_step {
        false if silent >= lease => Some((MirrorStep::Drop, MirrorPhase::Waiting, why.to_owned())),
        true if silent >= lease * SILENT_LEASES => {
            Some((MirrorStep::Nothing, MirrorPhase::Failed, why.to_owned()))
        }
        _ => None,
    }
}

/// What an owner asks of the host of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// The VM.
    pub vm: VmName,
    /// The disk's pool.
    pub pool: PoolName,
    /// Its image.
    pub image: String,
    /// The owner.
    pub from: HostName,
    /// The epoch under which it owns the VM.
    pub epoch: Epoch,
    /// The life of the copy's record.
    pub since: Revision,
    /// Size of the disk in bytes.
    pub size: u64,
}

impl ExportRequest {
    /// A name that nobody else has any reason to know.
    #[must_use]
    pub fn name(&self) -> String {
        export_name(&self.vm, self.epoch, &self.since.to_string())
    }
}

pub(crate) fn export_name(vm: &VmName, epoch: Epoch, since: &str) -> String {
    format!("{vm}-{epoch}-{since}")
}

/// Where an owner writes its copy to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportOffer {
    /// `address:port`.
    pub address: String,
    /// Name of the export.
    pub name: String,
    /// The mark that the image bears: see [`crate::FlushRequest`].
    #[serde(default)]
    pub mark: Option<String>,
}

/// Whether the copy on `me` may be overwritten by this owner from the beginning.
///
/// # Errors
/// A sentence for the owner, which asks again.
pub fn may_export(state: &State, me: &HostName, request: &ExportRequest) -> Result<(), String> {
    if state.revision < request.since {
        return Err(format!("{me} has not been told of the copy yet"));
    }
    let copy = owned_copy(state, me, request)?;
    if copy.in_step || copy.since != request.since {
        return Err(format!("the copy on {me} is not to be written anew"));
    }
    Ok(())
}

/// Whether an export that was opened for this request is still wanted.
#[must_use]
pub fn keeps_export(state: &State, me: &HostName, request: &ExportRequest) -> bool {
    // A replica that lags behind the request knows nothing about it.
    state.revision < request.since
        || owned_copy(state, me, request)
            .is_ok_and(|copy| copy.in_step || copy.since == request.since)
}

fn owned_copy<'s>(
    state: &'s State,
    me: &HostName,
    request: &ExportRequest,
) -> Result<&'s DiskCopy, String> {
    let owned = state.vms.get(&request.vm).is_some_and(|vm| {
        matches!(&vm.ownership, Ownership::Owned { host, epoch, .. }
            | Ownership::Migrating { from: host, epoch, .. }
            if *host == request.from && *epoch == request.epoch)
    });
    if !owned || request.from == *me {
        return Err(format!(
            "{} does not own {} under epoch {}",
            request.from, request.vm, request.epoch
        ));
    }
    let record = state.copies(&request.pool, &request.image);
    let copy = record.and_then(|record| record.hosts.get(me));
    copy.ok_or_else(|| format!("{me} has no copy of disk {}", request.image))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use quorate_types::Timestamp;

    fn copy(in_step: bool) -> DiskCopy {
        DiskCopy {
            in_step,
            since: Revision(7),
            at: Timestamp(0),
            boot: None,
        }
    }

    #[test]
    fn a_mirror_that_counts_is_never_dropped() {
        let mirror = |since, in_step, stalled, problem: Option<&str>| Mirror {
            since: Revision(since),
            in_step,
            stalled,
            problem: problem.map(str::to_owned),
        };
        use MirrorPhase::{Failed, Ready, Syncing, Waiting};
        use MirrorStep::{Begin, Drop, Nothing};
        for (in_step, seen, step, phase) in [
            (true, None, Nothing, Failed),
            (true, Some(mirror(3, true, false, None)), Nothing, Ready),
            (true, Some(mirror(3, true, true, None)), Nothing, Failed),
            (
                true,
                Some(mirror(3, false, false, Some("io"))),
                Nothing,
                Failed,
            ),
            (false, None, Begin, Waiting),
            (false, Some(mirror(7, false, false, None)), Nothing, Syncing),
            (false, Some(mirror(7, true, false, None)), Nothing, Ready),
            (false, Some(mirror(3, true, false, None)), Drop, Waiting),
            (false, Some(mirror(7, true, true, None)), Drop, Waiting),
            (
                false,
                Some(mirror(7, false, false, Some("io"))),
                Drop,
                Waiting,
            ),
        ] {
            let (did, said, _) = mirror_step(&copy(in_step), seen.as_ref());
            assert_eq!((did, said), (step, phase), "{in_step} {seen:?}");
        }
    }

    #[test]
    fn a_disk_grows_only_when_its_copy_does_not_count() {
        use MirrorPhase::{Failed, Waiting};
        use MirrorStep::{Drop, Grow, Nothing};
        for (in_step, mirror, step, phase) in [
            (true, true, Nothing, Failed),
            (true, false, Nothing, Failed),
            (false, true, Drop, Waiting),
            (false, false, Grow, Waiting),
        ] {
            let (did, said, why) = grow_step(&copy(in_step), mirror);
            assert_eq!((did, said), (step, phase), "{in_step} {mirror}");
            assert!(why.unwrap().contains("larger"));
        }
    }

    #[test]
    fn a_silent_process_is_freed_of_a_copy_that_does_not_count_and_not_of_one_that_does() {
        use MirrorPhase::{Failed, Waiting};
        use MirrorStep::{Drop, Nothing};
        let ms = Duration::from_millis;
        for (in_step, silent, step) in [
            (false, 1999, None),
            (false, 2000, Some((Drop, Waiting))),
            (true, 2000, None),
            (true, 5999, None),
            (true, 6000, Some((Nothing, Failed))),
        ] {
            let did = silent_step(&copy(in_step), ms(silent), ms(2000));
            let did = did.map(|(step, phase, _)| (step, phase));
            assert_eq!(did, step, "{in_step} {silent}");
        }
    }

    /// A VM on h1 under epoch 3, its copy on h2 out of step since revision 7.
    fn state() -> State {
        let text = serde_json::json!({
            "revision": 7, "cluster": null, "hosts": {}, "networks": {}, "pools": {}, "rules": {},
            "tokens": {}, "topology_changed": 1, "last_node": 2, "log": { "last": 0, "events": [] },
            "disk_copies": { "safe": { "db": { "created": 1, "hosts": {
                "h1": { "in_step": true, "since": 2, "at": 0 },
                "h2": { "in_step": false, "since": 7, "at": 0 },
            } } } },
            "vms": { "db": {
                "spec": { "memory": "64MiB" }, "active": null, "abi": null,
                "ownership": { "owned": { "host": "h1", "epoch": 3, "order": "run" } },
                "last_epoch": 3, "saved": null, "move_request": null, "failed_moves": 0,
                "deleting": false, "last_host": "h1", "decisions": [], "changed": 7,
            } },
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn a_copy_that_counts_is_not_written_anew_and_an_epoch_that_has_passed_writes_nothing() {
        let host = |name: &str| HostName::new(name).unwrap();
        let request = ExportRequest {
            vm: VmName::new("db").unwrap(),
            pool: PoolName::new("safe").unwrap(),
            image: "db".into(),
            from: host("h1"),
            epoch: Epoch(3),
            since: Revision(7),
            size: 512,
        };
        let h2 = host("h2");
        let mut now = state();
        assert_eq!(may_export(&now, &h2, &request), Ok(()));
        assert!(keeps_export(&now, &h2, &request));
        assert!(may_export(&now, &host("h3"), &request).is_err());
        assert!(may_export(&now, &host("h1"), &request).is_err());
        now.revision = Revision(6);
        assert!(
            may_export(&now, &h2, &request)
                .unwrap_err()
                .contains("not been told")
        );
        assert!(keeps_export(&now, &h2, &request), "the replica lags");
        now.revision = Revision(9);
        let change = |now: &mut State, in_step, since| {
            let disks = now.disk_copies.values_mut().next().unwrap();
            let copy = disks.get_mut("db").unwrap().hosts.get_mut(&h2).unwrap();
            (copy.in_step, copy.since) = (in_step, Revision(since));
        };
        change(&mut now, true, 8);
        assert!(may_export(&now, &h2, &request).is_err(), "it counts");
        assert!(keeps_export(&now, &h2, &request));
        change(&mut now, false, 9);
        assert!(!keeps_export(&now, &h2, &request), "it was dropped");
        change(&mut now, true, 8);
        let passed = ExportRequest {
            epoch: Epoch(2),
            ..request
        };
        assert!(!keeps_export(&now, &h2, &passed));
        assert!(may_export(&now, &h2, &passed).is_err());
    }
}
