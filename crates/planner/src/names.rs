//! Names as indexes.
//!
//! Owns: the look-up from the name of a VM or a host to its index. A tree of strings costs a dozen
//! comparisons, each in another corner of memory; with 20,000 VMs that was most of a plan's time. This
//! costs one. Always holds: names are walked in the order
//! in which they came, never in that of the slots, so no decision depends on the order of its slots; the
//! hash is fixed, so every host takes the same way; names that collide cost time, not correctness.

/// What a name is looked up by.
pub(crate) trait Name: Eq {
    fn bytes(&self) -> &[u8];
}

impl Name for quorate_types::VmName {
    fn bytes(&self) -> &[u8] {
        self.as_str().as_bytes()
    }
}

impl Name for quorate_types::HostName {
    fn bytes(&self) -> &[u8] {
        self.as_str().as_bytes()
    }
}

/// Marks a free slot.
const FREE: u32 = u32::MAX;

/// Names in their order, and where each is.
#[derive(Debug)]
pub(crate) struct Names<'a, N> {
    names: Vec<&'a N>,
    /// Hash and index; a power of two of them, at most half of them taken.
    slots: Vec<(u32, u32)>,
}

impl<'a, N: Name> Names<'a, N> {
    /// Of two equal names the first counts.
    pub(crate) fn new(names: impl Iterator<Item = &'a N>) -> Self {
        let names: Vec<&'a N> = names.collect();
        let size = (names.len() * 2).next_power_of_two().max(2);
        let mut index = Self {
            names,
            slots: vec![(0, FREE); size],
        };
        for at in 0..index.names.len() {
            let hash = hash(index.names[at].bytes());
            let slot = index.slot(hash, index.names[at]);
            if index.slots[slot].1 == FREE {
                index.slots[slot] = (hash, u32::try_from(at).unwrap_or(FREE));
            }
        }
        index
    }

    /// The slot that holds a name, or would.
    fn slot(&self, hash: u32, name: &N) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            let (other, at) = self.slots[slot];
            if at == FREE || (other == hash && self.names[at as usize] == name) {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a N> + '_ {
        self.names.iter().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    pub(crate) fn get(&self, name: &N) -> Option<usize> {
        let slot = self.slot(hash(name.bytes()), name);
        let at = self.slots[slot].1;
        (at != FREE).then_some(at as usize)
    }
}

/// FNV-1a, folded.
fn hash(bytes: &[u8]) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) ^ u32::from_le_bytes([e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_types::VmName;

    #[test]
    fn every_name_is_found_and_no_other() {
        let names: Vec<VmName> = (0..3000)
            .map(|n| VmName::new(format!("v{n}")).unwrap())
            .collect();
        let index = Names::new(names.iter());
        for (at, name) in names.iter().enumerate() {
            assert_eq!(index.get(name), Some(at));
        }
        assert_eq!(index.get(&VmName::new("v3000").unwrap()), None);
        assert_eq!(Names::new([].iter()).get(&names[0]), None);
    }

    #[test]
    fn names_that_collide_are_told_apart() {
        /// All have the same hash.
        #[derive(Debug, PartialEq, Eq)]
        struct Same(u32);
        impl Name for Same {
            fn bytes(&self) -> &[u8] {
                b"same"
            }
        }
        let names: Vec<Same> = (0..20).map(Same).collect();
        let index = Names::new(names.iter());
        assert!((0..20).all(|n| index.get(&Same(n)) == Some(n as usize)));
        assert_eq!(index.get(&Same(20)), None);
    }
}
