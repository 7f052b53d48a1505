//! A network in memory, for tests of the agent and for the simulator: it keeps the
//! same promises about state, records what was asked, and fails on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::names::{check_ifname, check_ours};
use crate::{
    Announcement, BridgeFacts, BridgeSpec, Held, InterfaceFacts, MacAddr, NetworkDriver,
    NetworkError, TapFacts, TapSpec,
};

/// A host's network that exists only in memory.
#[derive(Debug, Default)]
pub struct FakeNetwork {
    inner: Mutex<Inner>,
    passed_on: Arc<Mutex<Vec<PassedOn>>>,
}

/// What came for a guest was sent after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOn {
    /// The guest's tap.
    pub ifname: String,
    /// From when on, microseconds since 1970.
    pub since_us: u64,
    /// The frames' source.
    pub source: MacAddr,
}

/// Listens at no tap.
struct FakeHeld {
    ifname: String,
    passed_on: Arc<Mutex<Vec<PassedOn>>>,
}

impl Held for FakeHeld {
    fn forget(&mut self) {}

    fn pass_on(&mut self, since_us: u64, source: MacAddr) -> Result<u32, NetworkError> {
        let mut passed_on = self
            .passed_on
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        passed_on.push(PassedOn {
            ifname: self.ifname.clone(),
            since_us,
            source,
        });
        Ok(1)
    }
}

#[derive(Debug, Default)]
struct Inner {
    next_index: u32,
    bridges: BTreeMap<String, u32>,
    taps: BTreeMap<String, TapFacts>,
    announced: Vec<Announcement>,
    failing: BTreeSet<&'static str>,
}

impl FakeNetwork {
    /// An empty network.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every following call of the operation fail, or succeed again. Operations
    /// are named like the trait's functions.
    pub fn set_failing(&self, operation: &'static str, failing: bool) {
        let mut inner = self.lock();
        if failing {
            inner.failing.insert(operation);
        } else {
            inner.failing.remove(operation);
        }
    }

    /// What was announced so far, in order.
    pub fn announced(&self) -> Vec<Announcement> {
        self.lock().announced.clone()
    }

    /// What was sent after guests that have left, in order.
    pub fn passed_on(&self) -> Vec<PassedOn> {
        let passed_on = self.passed_on.lock();
        passed_on.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says whether a guest holds the tap open.
    pub fn set_attached(&self, ifname: &str, attached: bool) {
        if let Some(tap) = self.lock().taps.get_mut(ifname) {
            tap.attached = attached;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, operation: &'static str) -> Result<MutexGuard<'_, Inner>, NetworkError> {
        let inner = self.lock();
        if inner.failing.contains(operation) {
            return Err(NetworkError::Injected { operation });
        }
        Ok(inner)
    }

    fn set_muted(
        &self,
        operation: &'static str,
        ifname: &str,
        muted: bool,
    ) -> Result<(), NetworkError> {
        check_ours(ifname)?;
        let mut inner = self.begin(operation)?;
        let tap = inner
            .taps
            .get_mut(ifname)
            .ok_or_else(|| NetworkError::TapMissing {
                name: ifname.to_owned(),
            })?;
        tap.muted = muted;
        Ok(())
    }
}

#[async_trait::async_trait]
impl NetworkDriver for FakeNetwork {
    async fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<BridgeFacts, NetworkError> {
        check_ifname(&spec.name)?;
        let mut inner = self.begin("ensure_bridge")?;
        let created = !inner.bridges.contains_key(&spec.name);
        let mtu = *inner.bridges.entry(spec.name.clone()).or_insert(spec.mtu);
        if mtu < spec.mtu {
            return Err(NetworkError::MtuTooSmall {
                name: spec.name.clone(),
                have: mtu,
                want: spec.mtu,
            });
        }
        Ok(BridgeFacts {
            name: spec.name.clone(),
            mtu,
            created,
        })
    }

    async fn create_tap(&self, spec: &TapSpec) -> Result<TapFacts, NetworkError> {
        check_ours(&spec.ifname)?;
        let mut inner = self.begin("create_tap")?;
        let Some(&mtu) = inner.bridges.get(&spec.bridge) else {
            return Err(NetworkError::BridgeMissing {
                bridge: spec.bridge.clone(),
            });
        };
        let existing = inner.taps.get(&spec.ifname).cloned();
        if let Some(tap) = &existing
            && tap.nic.as_deref() != Some(&spec.nic)
        {
            return Err(NetworkError::TapConflict {
                name: spec.ifname.clone(),
                found: tap.nic.clone().unwrap_or_default(),
            });
        }
        inner.next_index += 1;
        let facts = TapFacts {
            ifname: spec.ifname.clone(),
            index: existing.as_ref().map_or(inner.next_index, |tap| tap.index),
            bridge: Some(spec.bridge.clone()),
            guest_mac: Some(spec.guest_mac),
            nic: Some(spec.nic.clone()),
            muted: spec.muted,
            attached: existing.is_some_and(|tap| tap.attached),
            mtu,
        };
        inner.taps.insert(spec.ifname.clone(), facts.clone());
        Ok(facts)
    }

    async fn mute(&self, ifname: &str) -> Result<(), NetworkError> {
        self.set_muted("mute", ifname, true)
    }

    async fn unmute(&self, ifname: &str) -> Result<(), NetworkError> {
        self.set_muted("unmute", ifname, false)
    }

    async fn delete_tap(&self, ifname: &str) -> Result<bool, NetworkError> {
        check_ours(ifname)?;
        let mut inner = self.begin("delete_tap")?;
        Ok(inner.taps.remove(ifname).is_some())
    }

    async fn list_taps(&self) -> Result<Vec<TapFacts>, NetworkError> {
        let inner = self.begin("list_taps")?;
        Ok(inner.taps.values().cloned().collect())
    }

    async fn announce(&self, what: &Announcement) -> Result<u32, NetworkError> {
        let mut inner = self.begin("announce")?;
        inner.announced.push(what.clone());
        Ok(what.frames().len() as u32)
    }

    async fn announce_once(&self, what: &Announcement) -> Result<(), NetworkError> {
        self.begin("announce_once")?.announced.push(what.clone());
        Ok(())
    }

    async fn hold(&self, ifname: &str) -> Result<Box<dyn Held>, NetworkError> {
        let inner = self.begin("hold")?;
        if !inner.taps.contains_key(ifname) {
            return Err(NetworkError::TapMissing {
                name: ifname.to_owned(),
            });
        }
        Ok(Box::new(FakeHeld {
            ifname: ifname.to_owned(),
            passed_on: Arc::clone(&self.passed_on),
        }))
    }

    async fn let_go(&self, _ifname: &str) -> Result<(), NetworkError> {
        self.begin("let_go").map(drop)
    }

    async fn interface(&self, name: &str) -> Result<InterfaceFacts, NetworkError> {
        check_ifname(name)?;
        let inner = self.begin("interface")?;
        let mut facts = InterfaceFacts::missing(name);
        if let Some(&mtu) = inner.bridges.get(name) {
            facts.exists = true;
            facts.up = true;
            facts.carrier = true;
            facts.mtu = mtu;
            facts.kind = Some("bridge".into());
        } else if let Some(tap) = inner.taps.get(name) {
            facts.exists = true;
            facts.up = !tap.muted;
            facts.carrier = tap.attached;
            facts.mtu = tap.mtu;
            facts.kind = Some("tun".into());
            facts.controller.clone_from(&tap.bridge);
        }
        Ok(facts)
    }
}
