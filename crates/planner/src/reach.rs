//! Which hosts could take a VM if they were empty: everything about a pair of VM and host that does
//! not change while a plan is made.
//!
//! Always holds: VMs that ask for the same share one answer, so a site with few kinds of VMs costs
//! few answers; the answer is the same as that of [`crate::fit`], which says it in words.

use quorate_state::GuestAbi;
use quorate_types::{HostName, LabelSelector, NetworkName, PoolName};
use std::collections::{BTreeMap, BTreeSet};

/// Everything that the answer depends on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kind<'a> {
    pub(crate) hosts: &'a BTreeSet<HostName>,
    pub(crate) labels: &'a LabelSelector,
    /// Pools with the identity that they must have.
    pub(crate) pools: Vec<(&'a PoolName, Option<&'a str>)>,
    /// Images of pools that are the hosts' own.
    pub(crate) own: Vec<(&'a PoolName, &'a str)>,
    /// They are copied first where they are not.
    pub(crate) copies: bool,
    pub(crate) networks: Vec<&'a NetworkName>,
    pub(crate) needs: Needs<'a>,
    /// The accelerator that its memory comes from.
    pub(crate) accel: Option<&'a str>,
}

/// CPU and machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Needs<'a> {
    /// Any of this family.
    Family(&'static str),
    /// These: its memory was made with them.
    Abi(&'a str, &'a str),
}

impl<'a> Needs<'a> {
    pub(crate) fn abi(abi: &'a GuestAbi) -> Self {
        Self::Abi(&abi.machine, &abi.cpu_model)
    }
}

/// A set of hosts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct HostSet(Vec<u64>);

impl HostSet {
    pub(crate) fn of(hosts: usize, takes: impl Fn(usize) -> bool) -> Self {
        let mut set = Self(vec![0; hosts.div_ceil(64)]);
        for host in (0..hosts).filter(|host| takes(*host)) {
            set.0[host / 64] |= 1 << (host % 64);
        }
        set
    }

    #[cfg(test)]
    pub(crate) fn has(&self, host: usize) -> bool {
        self.0[host / 64] & (1 << (host % 64)) != 0
    }

    pub(crate) fn keep(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine &= theirs;
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = left.trailing_zeros() as usize;
                    left &= left - 1;
                    at * 64 + bit
                })
            })
        })
    }
}

/// Answers so far.
#[derive(Debug, Default)]
pub(crate) struct Reach<'a> {
    pub(crate) known: BTreeMap<Kind<'a>, std::rc::Rc<HostSet>>,
}
