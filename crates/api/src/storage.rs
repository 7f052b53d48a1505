//! What clients see of storage: pools in full, their images, cuts. Stable JSON: fields are added, never changed.
//!
//! Owns: the views, and how they are made from the state, the leader's picture and one host's look into the pool.
//! Always holds: pure; no secret is part of a view, only the name of one; what is said of recovery is what `state`
//! and the drivers do, never a wish.

use crate::build::Observed;
use quorate_membership::HostHealth;
use quorate_state::State;
use quorate_types::{HostName, PoolName, PoolSpec, Revision, SecretName, Timestamp, VmName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use utoipa::ToSchema;

/// A pool in full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StorageView {
    /// Name.
    #[schema(value_type = String)]
    pub name: PoolName,
    /// `directory`, `iscsi`, `block`, ...
    pub kind: String,
    /// Definition.
    #[schema(value_type = Object)]
    pub spec: PoolSpec,
    /// What it can prove about a host that is lost.
    pub fence: FenceView,
    /// Its last drill; absent: none was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill: Option<DrillView>,
    /// Every host that should reach it, by name.
    pub hosts: Vec<StorageHostView>,
    /// Free bytes, as the host that sees least says; absent: not known, or not a matter of this pool.
    pub free: Option<u64>,
    /// Total bytes.
    pub total: Option<u64>,
    /// Access that was taken away at the SAN and not given back yet.
    pub cuts: Vec<CutView>,
    /// Units whose other users are pushed out by the next start, on an operator's word.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub takes: Vec<TakeView>,
    /// Secrets that it names, and whether the cluster has them.
    pub secrets: Vec<SecretState>,
    /// VMs with a disk in it.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
    /// Images or units; absent: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<Vec<ImageView>>,
    /// The host that looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub seen_by: Option<HostName>,
    /// Why nobody could look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images_problem: Option<String>,
}

/// How a pool proves that a host writes no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FenceView {
    /// `storage-cut`; absent: it cannot.
    pub proof: Option<String>,
    /// By what: `tgt`, `lio`, `exec`.
    pub by: Option<String>,
    /// What that means for recovery, one sentence.
    pub meaning: String,
}

/// What came of a drill: a scratch initiator was let in to the SAN and shut out again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrillView {
    /// The image whose target it was tried on.
    pub image: String,
    /// When. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// Every step had the effect that a proof rests on.
    pub passed: bool,
    /// What was done and seen, one sentence for each step; the last one of a failed drill says what is wrong.
    pub steps: Vec<String>,
}

/// What is to be tried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrillRequest {
    /// A unit of the pool; absent: the first disk of any VM. Nothing is written to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// A pool on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StorageHostView {
    /// Which.
    #[schema(value_type = String)]
    pub host: HostName,
    /// It can use the pool; absent: it was not heard.
    pub usable: Option<bool>,
    /// Since when that is so, as it says. Milliseconds since 1970.
    #[schema(value_type = Option<u64>)]
    pub since: Option<Timestamp>,
    /// Time of its last probe, in microseconds.
    pub latency_us: Option<u64>,
    /// Free bytes that it sees.
    pub free: Option<u64>,
    /// Why it cannot use it.
    pub problem: Option<String>,
}

/// A host that is shut out at the SAN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CutView {
    /// Which.
    #[schema(value_type = String)]
    pub host: HostName,
    /// The revision that ordered it.
    #[schema(value_type = u64)]
    pub revision: Revision,
    /// When, where the log still knows. Milliseconds since 1970.
    #[schema(value_type = Option<u64>)]
    pub at: Option<Timestamp>,
}

/// A unit that strangers use, and may be taken from them: from these and no others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TakeView {
    /// The unit.
    pub image: String,
    /// VMs that name it.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
    /// Keys that may be pushed out, in hexadecimal digits.
    pub keys: Vec<String>,
    /// Who said so.
    pub by: String,
    /// When. Milliseconds since 1970.
    #[schema(value_type = u64)]
    pub at: Timestamp,
}

/// A unit is to be taken from whoever else uses it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeRequest {
    /// A unit of the pool.
    pub image: String,
    /// They are gone: the next start of its VM pushes out those that are registered now. Without it they are only shown,
    /// as an error.
    #[serde(default)]
    pub force: bool,
    /// Take the word back.
    #[serde(default)]
    pub withdraw: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TakeAnswer {
    /// The unit.
    pub image: String,
    /// VMs that name it.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
    /// Who else is registered on it; absent after a withdrawal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<StrangersSeen>,
    /// The next start of its VM pushes them out.
    pub recorded: bool,
}

/// Who else uses a unit, as a host saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StrangersSeen {
    /// Who looked.
    #[schema(value_type = String)]
    pub host: HostName,
    /// They, in order of their keys.
    pub strangers: Vec<Stranger>,
    /// The reservation is not one of this cluster's: by its holder or its type.
    pub hold: bool,
}

/// Somebody who is no host of this cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stranger {
    /// Its key, in hexadecimal digits.
    pub key: String,
    /// It holds the reservation.
    pub holds: bool,
    /// From where it registered, as the unit names it.
    pub initiators: Vec<String>,
}

impl StrangersSeen {
    /// Whether nobody else uses it.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        self.strangers.is_empty() && !self.hold
    }

    /// Their keys.
    ///
    /// # Errors
    /// When one is none.
    pub fn keys(&self) -> Result<BTreeSet<u64>, std::num::ParseIntError> {
        let keys = self.strangers.iter();
        keys.map(|of| u64::from_str_radix(of.key.trim_start_matches("0x"), 16))
            .collect()
    }

    /// `key 0x00000000deadbeef of iqn.2026-01.com.example:old, which holds the reservation`.
    #[must_use]
    pub fn describe(&self) -> String {
        let one = |of: &Stranger| {
            let from = match of.initiators.is_empty() {
                true => String::new(),
                false => format!(" of {}", of.initiators.join(", ")),
            };
            let holds = if of.holds {
                ", which holds the reservation"
            } else {
                ""
            };
            format!("key {}{from}{holds}", of.key)
        };
        match self.strangers.is_empty() {
            true => "a reservation of another type than this cluster makes".to_owned(),
            false => self
                .strangers
                .iter()
                .map(one)
                .collect::<Vec<_>>()
                .join("; "),
        }
    }
}

/// A key as it is shown.
#[must_use]
pub fn key_text(key: u64) -> String {
    format!("{key:#018x}")
}

/// A secret that a pool names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecretState {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SecretName,
    /// The cluster has it.
    pub known: bool,
}

/// How an image stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageState {
    /// A VM names it.
    Used,
    /// No VM names it.
    Unused,
    /// A VM names it and it is not there.
    Missing,
    /// A VM names it; it is made at the VM's first start.
    Planned,
    /// It is there and cannot be read.
    Broken,
}

/// An image or a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// Its name in the pool.
    pub image: String,
    /// How it stands.
    pub state: ImageState,
    /// Size as a guest sees it, in bytes.
    pub size: Option<u64>,
    /// Space that it takes, in bytes.
    pub allocated: Option<u64>,
    /// `raw` or `qcow2`.
    pub format: Option<String>,
    /// VMs that name it.
    #[schema(value_type = Vec<String>)]
    pub vms: Vec<VmName>,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What one host saw in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolLook {
    /// Who looked.
    pub host: HostName,
    /// What is there, by name.
    pub images: Vec<ImageSeen>,
}

/// An image as it was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSeen {
    /// Its name in the pool.
    pub image: String,
    /// Size as a guest sees it, in bytes.
    pub virtual_bytes: Option<u64>,
    /// Space that it takes, in bytes.
    pub actual_bytes: Option<u64>,
    /// `raw` or `qcow2`.
    pub format: String,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What a pool can prove.
#[must_use]
pub fn fence(spec: &PoolSpec) -> FenceView {
    let by = match spec {
        PoolSpec::Rbd(pool) => pool.blocklist.then_some("blocklist"),
        PoolSpec::Block(pool) => pool.reservations.then_some("reservation"),
        PoolSpec::Iscsi(pool) if pool.has_reservations() => Some("reservation"),
        _ => spec.access().map(|access| access.name()),
    };
    let meaning = match spec {
        PoolSpec::Local(_) => {
            "its disks are on one host each: a VM with one starts there and nowhere else"
        }
        PoolSpec::Mirrored(_) => {
            "a VM starts on a host with a copy in step, once its own is proven lost: by power-off, by the end of its \
             lease with guard and watchdog armed, or by your word (`quorate host confirm-dead`)"
        }
        _ => {
            "it proves nothing of a host that is lost: its VMs wait for a power-off, the end of its lease with guard \
             and watchdog armed, or your word (`quorate host confirm-dead`)"
        }
    };
    match by {
        Some("reservation") => FenceView {
            proof: Some("storage-cut".to_owned()),
            by: Some("reservation".to_owned()),
            meaning: "a host that is lost is shut out by the units themselves, which a host that reaches them tells; VMs \
                      with all their disks in such pools then start elsewhere, with no need to power it off"
                .to_owned(),
        },
        Some(by) => FenceView {
            proof: Some("storage-cut".to_owned()),
            by: Some(by.to_owned()),
            meaning: "a host that is lost is shut out at the SAN; VMs with all their disks in such pools then start \
                      elsewhere, with no need to power it off"
                .to_owned(),
        },
        None => FenceView {
            proof: None,
            by: None,
            meaning: meaning.to_owned(),
        },
    }
}

/// The name under which an image of this pool is listed, however a manifest writes it.
#[must_use]
pub fn listed_name(spec: &PoolSpec, image: &str) -> String {
    spec.canonical(image)
}

/// Whether images are made in it, so that its room matters; units of a SAN are there or not.
fn makes_images(spec: &PoolSpec) -> bool {
    !matches!(spec, PoolSpec::Iscsi(_) | PoolSpec::Block(_))
}

/// Who names an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageUse {
    /// VMs, by name.
    pub vms: BTreeSet<VmName>,
    /// It is made at the first start.
    pub created: bool,
    /// Its format, as the first of them says.
    pub format: String,
}

/// Images of a pool that VMs name, as defined or as they run now.
#[must_use]
pub fn uses(state: &State, pool: &PoolName) -> BTreeMap<String, ImageUse> {
    let mut uses: BTreeMap<String, ImageUse> = BTreeMap::new();
    let Some(object) = state.pools.get(pool) else {
        return uses;
    };
    for (name, vm) in &state.vms {
        let active = vm.active.iter().flat_map(|spec| &spec.disks);
        let disks = vm.spec.disks.iter().chain(active);
        for disk in disks.filter(|disk| disk.pool == *pool) {
            let entry = uses.entry(listed_name(&object.spec, &disk.image));
            let of = entry.or_default();
            of.created |= disk.size.is_some() && makes_images(&object.spec);
            if of.format.is_empty() {
                of.format = format!("{:?}", disk.format).to_lowercase();
            }
            of.vms.insert(name.clone());
        }
    }
    uses
}

/// A pool as the leader sees it, without its images; `None`: there is no such pool.
#[must_use]
pub fn pool(state: &State, seen: &Observed, name: &PoolName) -> Option<StorageView> {
    let spec = &state.pools.get(name)?.spec;
    let hosts: Vec<StorageHostView> = state
        .hosts
        .keys()
        .filter(|host| spec.is_for(host))
        .map(|host| on_host(seen, name, host))
        .collect();
    let known = |host: &&StorageHostView| host.usable == Some(true) && makes_images(spec);
    let free = hosts
        .iter()
        .filter(known)
        .filter_map(|host| host.free)
        .min();
    let total = free.and_then(|free| {
        let seen_least = hosts.iter().find(|host| host.free == Some(free))?;
        let report = seen.hosts.get(&seen_least.host)?.report.as_ref()?;
        Some(report.pools.get(name)?.total.0)
    });
    let named = |secret: &SecretName| SecretState {
        name: secret.clone(),
        known: state.secrets.contains_key(secret),
    };
    let vms: BTreeSet<VmName> = uses(state, name)
        .into_values()
        .flat_map(|of| of.vms)
        .collect();
    Some(StorageView {
        name: name.clone(),
        kind: spec.kind().to_owned(),
        fence: fence(spec),
        drill: state.pool_drills.get(name).map(|drill| DrillView {
            image: drill.image.clone(),
            at: drill.at,
            passed: drill.passed,
            steps: drill.steps.clone(),
        }),
        hosts,
        free,
        total,
        cuts: cuts(state, name),
        takes: takes(state, name),
        secrets: spec.secrets().into_iter().map(named).collect(),
        vms: vms.into_iter().collect(),
        images: None,
        seen_by: None,
        images_problem: None,
        spec: spec.clone(),
    })
}

fn on_host(seen: &Observed, pool: &PoolName, host: &HostName) -> StorageHostView {
    let heard = seen.hosts.get(host);
    let heard = heard.filter(|of| matches!(of.health, HostHealth::Up | HostHealth::Suspect));
    let report = heard.and_then(|of| of.report.as_ref()?.pools.get(pool));
    StorageHostView {
        host: host.clone(),
        usable: report.map(|of| of.usable),
        since: report.and_then(|of| of.since),
        latency_us: report
            .map(|of| of.latency_us)
            .filter(|latency| *latency > 0),
        free: report.map(|of| of.free.0).filter(|free| *free > 0),
        problem: report.and_then(|of| of.problem.clone()),
    }
}

fn cuts(state: &State, pool: &PoolName) -> Vec<CutView> {
    let of = state.storage_cuts.iter();
    of.filter_map(|(host, cuts)| {
        let revision = *cuts.get(pool)?;
        let event = state.log.all().find(|event| event.revision == revision);
        Some(CutView {
            host: host.clone(),
            revision,
            at: event.map(|event| event.at),
        })
    })
    .collect()
}

fn takes(state: &State, pool: &PoolName) -> Vec<TakeView> {
    let mut uses = uses(state, pool);
    let of = state.unit_takes.get(pool).into_iter().flatten();
    of.map(|(image, take)| TakeView {
        image: image.clone(),
        vms: uses
            .remove(image)
            .unwrap_or_default()
            .vms
            .into_iter()
            .collect(),
        keys: take.keys.iter().map(|key| key_text(*key)).collect(),
        by: take.by.clone(),
        at: take.at,
    })
    .collect()
}

/// Adds what a host saw in the pool: what is there and not, and who uses it.
#[must_use]
pub fn with_images(mut view: StorageView, state: &State, look: PoolLook) -> StorageView {
    let mut uses = uses(state, &view.name);
    let mut images: Vec<ImageView> = look
        .images
        .into_iter()
        .map(|seen| {
            let used = uses.remove(&seen.image).unwrap_or_default();
            ImageView {
                state: match (&seen.problem, used.vms.is_empty()) {
                    (Some(_), _) => ImageState::Broken,
                    (None, true) => ImageState::Unused,
                    (None, false) => ImageState::Used,
                },
                size: seen.virtual_bytes,
                allocated: seen.actual_bytes,
                format: seen.problem.is_none().then_some(seen.format),
                vms: used.vms.into_iter().collect(),
                problem: seen.problem,
                image: seen.image,
            }
        })
        .collect();
    images.extend(uses.into_iter().map(|(image, used)| ImageView {
        image,
        state: match used.created {
            true => ImageState::Planned,
            false => ImageState::Missing,
        },
        size: None,
        allocated: None,
        format: Some(used.format),
        vms: used.vms.into_iter().collect(),
        problem: None,
    }));
    images.sort_by(|a, b| a.image.cmp(&b.image));
    view.images = Some(images);
    view.seen_by = Some(look.host);
    view
}
