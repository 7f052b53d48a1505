//! The ring: which member each slot of a service belongs to.
//!
//! Owns: Maglev's table (Eisenbud et al., NSDI 2016, section 3.4) with weights, and what a slot remembers of earlier
//! member lists. Always holds: the result is a function of the lists alone, integers only, so every host has the
//! same table (`fixtures/ring.txt` is compared in a test); the change of one member moves hardly more slots than its
//! own. Must not: change for the same input, ever: hosts of two releases steer side by side.
//!
//! A member's order of preference over the slots comes from its VM's name. The members take turns in the order of
//! their names and each takes the slot that it likes best among those left, until none is. A member of weight 1
//! beside one of weight 3 takes a turn in every third round only.

use quorate_types::VmName;
use quorate_types::service::{RingMember, RingVersion};
use std::collections::BTreeMap;

/// Slots of a ring where nothing speaks against it: a prime, 512 KiB in the kernel.
pub const SLOTS: u32 = 65_537;
/// Slots of a ring in a cluster with many services.
pub const FEW_SLOTS: u32 = 4_099;
/// So many services make [`FEW_SLOTS`] the choice for the next one.
pub const MANY_SERVICES: usize = 200;
/// Member lists that a ring remembers.
pub const HISTORY: usize = 8;

/// No member.
pub const NONE: u16 = u16::MAX;

/// One slot: indexes into [`Ring::members`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// Who gets new flows, and old ones that nobody else knows.
    pub primary: u16,
    /// Who had the slot before, if anybody else ever did: it knows the old flows.
    pub previous: u16,
    /// Who gets the slot with the coming list; else the same as `primary`.
    pub next: u16,
}

/// The table of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ring {
    /// All members that a slot names, sorted by VM.
    pub members: Vec<RingMember>,
    /// The slots.
    pub slots: Vec<Slot>,
}

/// Slots for the next service in a cluster that has so many already.
#[must_use]
pub fn slots_for(services: usize) -> u32 {
    if services >= MANY_SERVICES {
        FEW_SLOTS
    } else {
        SLOTS
    }
}

fn mixed(seed: u64, name: &str) -> u64 {
    let mut hash = seed;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    // FNV's low bits of short names are alike: mix them once more (the finish of SplitMix64).
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Where a member begins and how far it steps: with a step that shares no factor with the number of slots it comes
/// by every slot once.
fn preference(vm: &VmName, slots: u64) -> (u64, u64) {
    if slots < 2 {
        return (0, 1);
    }
    let offset = mixed(0xcbf2_9ce4_8422_2325, vm.as_str()) % slots;
    let mut skip = mixed(0x8422_2325_cbf2_9ce4, vm.as_str()) % (slots - 1) + 1;
    while common_factor(skip, slots) > 1 {
        skip = skip % (slots - 1) + 1;
    }
    (offset, skip)
}

fn common_factor(mut a: u64, mut b: u64) -> u64 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// A member while slots are given out.
struct Turn {
    index: u16,
    weight: u64,
    /// The slot that it asks for next, and how far it steps from one to the next.
    at: u32,
    skip: u32,
    credit: u64,
    /// How many steps from `at` it comes by each of the [`Last`] slots; empty until it is asked.
    ranks: Vec<u32>,
}

impl Turn {
    fn new(index: u16, member: &RingMember, slots: u32) -> Self {
        let (at, skip) = preference(&member.vm, u64::from(slots));
        Self {
            index,
            weight: u64::from(member.weight),
            at: u32::try_from(at).unwrap_or(0),
            skip: u32::try_from(skip).unwrap_or(1),
            credit: 0,
            ranks: Vec::new(),
        }
    }

    /// Steps on until it comes by a free slot.
    fn take(&mut self, taken: &mut Taken, slots: u32) -> u32 {
        let turn_over = slots - self.skip;
        loop {
            let slot = self.at;
            self.at = if slot >= turn_over {
                slot - turn_over
            } else {
                slot + self.skip
            };
            if taken.take(slot) {
                return slot;
            }
        }
    }
}

/// Which slots are taken, one bit each: all of it stays in the fastest cache.
struct Taken(Vec<u64>);

impl Taken {
    fn none(slots: u32) -> Self {
        Self(vec![0; (slots as usize).div_ceil(64)])
    }

    /// Takes the slot; whether it was free.
    fn take(&mut self, slot: u32) -> bool {
        let (word, bit) = (slot as usize / 64, 1_u64 << (slot % 64));
        let free = self.0[word] & bit == 0;
        self.0[word] |= bit;
        free
    }
}

/// So many slots are given out by comparing, not by trying: half of all trying would be for them, since each
/// turn would step by some hundred or thousand slots that are taken.
const LAST_SLOTS: u32 = 128;

/// Taken: later than any other.
const GONE: u32 = u32::MAX;

/// The slots that are left when most are given out.
struct Last {
    slots: Vec<u32>,
    /// 0 for those that are still left, else [`GONE`].
    gone: Vec<u32>,
}

impl Last {
    fn of(taken: &Taken, slots: u32) -> Self {
        let free = |slot: &u32| taken.0[*slot as usize / 64] >> (slot % 64) & 1 == 0;
        let slots: Vec<u32> = (0..slots).filter(free).collect();
        let gone = vec![0; slots.len()];
        Self { slots, gone }
    }

    /// The slot that [`Turn::take`] would end at: all that the member has come by so far are taken, so it is the one
    /// that fewest steps lead to.
    fn take(&mut self, turn: &mut Turn, slots: u32) -> u32 {
        if turn.ranks.is_empty() {
            let (size, at) = (u64::from(slots), turn.at);
            let back = inverse(u64::from(turn.skip), size);
            let steps = |slot: &u32| {
                let ahead = slot.checked_sub(at).unwrap_or(slot + (slots - at));
                u64::from(ahead) * back % size
            };
            let steps = self.slots.iter().map(steps);
            turn.ranks = steps
                .map(|steps| u32::try_from(steps).unwrap_or(0))
                .collect();
        }
        let left = turn.ranks.iter().zip(&self.gone);
        let least = left.map(|(rank, gone)| rank | gone).fold(GONE, u32::min);
        let mut all = turn.ranks.iter().zip(&self.gone);
        let found = all.position(|(rank, gone)| *gone == 0 && *rank == least);
        let found = found.unwrap_or(0);
        self.gone[found] = GONE;
        self.slots[found]
    }
}

/// The number that undoes a multiplication by `skip`, which shares no factor with `size` (Euclid's algorithm).
fn inverse(skip: u64, size: u64) -> u64 {
    let (mut a, mut b) = (size, skip % size);
    let (mut of_a, mut of_b) = (0, 1 % size);
    while b > 1 {
        let times = a / b;
        (a, b) = (b, a % b);
        (of_a, of_b) = (of_b, (of_a + size - times % size * of_b % size) % size);
    }
    of_b
}

/// Maglev's table: for every slot the index of its member in the list; empty for a list without members of any weight.
/// At most 65,535 members are looked at.
#[must_use]
pub fn table(members: &[RingMember], slots: u32) -> Vec<u16> {
    let some = (0..NONE).zip(members).filter(|(_, one)| one.weight > 0);
    let mut turns: Vec<Turn> = some
        .map(|(index, member)| Turn::new(index, member, slots))
        .collect();
    let heaviest = turns.iter().map(|turn| turn.weight).max().unwrap_or(0);
    if turns.is_empty() || slots == 0 {
        return Vec::new();
    }
    let mut table = vec![NONE; slots as usize];
    let mut taken = Taken::none(slots);
    let mut last = None;
    let mut left = slots;
    loop {
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < heaviest {
                continue;
            }
            turn.credit -= heaviest;
            let slot = if left > LAST_SLOTS {
                turn.take(&mut taken, slots)
            } else {
                let last = last.get_or_insert_with(|| Last::of(&taken, slots));
                last.take(turn, slots)
            };
            table[slot as usize] = turn.index;
            left -= 1;
            if left == 0 {
                return table;
            }
        }
    }
}

impl Ring {
    /// The table that these lists make: the last of `history` is active, `next` is coming. `None` without a member.
    #[must_use]
    pub fn build(history: &[RingVersion], next: Option<&RingVersion>, slots: u32) -> Option<Self> {
        let begin = history.len().saturating_sub(HISTORY);
        let lists: Vec<&RingVersion> = history[begin..].iter().chain(next).collect();
        let mut all = BTreeMap::new();
        for list in &lists {
            for member in &list.members {
                // A later list knows a member's address better.
                all.insert(&member.vm, member);
            }
        }
        let members: Vec<RingMember> = all.values().map(|member| (*member).clone()).collect();
        let index = |vm: &VmName| {
            let found = members.binary_search_by(|member| member.vm.cmp(vm));
            found.ok().and_then(|at| u16::try_from(at).ok())
        };
        let tables: Vec<Vec<u16>> = lists
            .iter()
            .map(|list| {
                let own = list
                    .members
                    .iter()
                    .map(|member| match list.gone.contains(&member.vm) {
                        true => NONE,
                        false => index(&member.vm).unwrap_or(NONE),
                    });
                let own: Vec<u16> = own.collect();
                let mut table = table(&list.members, slots);
                for slot in &mut table {
                    *slot = own[usize::from(*slot)];
                }
                table
            })
            .collect();
        let (past, coming) = tables.split_at(lists.len() - usize::from(next.is_some()));
        let (active, older) = past.split_last()?;
        if active.is_empty() {
            return None;
        }
        let coming = coming.first().filter(|table| !table.is_empty());
        let slots = (0..active.len())
            .map(|slot| {
                let primary = active[slot];
                let mut before = older.iter().rev().filter_map(|table| table.get(slot));
                Slot {
                    primary,
                    previous: before
                        .find(|one| **one != primary && **one != NONE)
                        .copied()
                        .unwrap_or(NONE),
                    next: coming.map_or(primary, |table| table[slot]),
                }
            })
            .collect();
        Some(Self { members, slots })
    }

    /// The member of an index in a slot.
    #[must_use]
    pub fn member(&self, index: u16) -> Option<&RingMember> {
        self.members.get(usize::from(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(names: impl IntoIterator<Item = (usize, u32)>) -> Vec<RingMember> {
        let mut list: Vec<RingMember> = names
            .into_iter()
            .map(|(number, weight)| RingMember {
                vm: VmName::new(format!("web{number}")).unwrap(),
                mac: [2, 0, 0, 0, 0, 1],
                weight,
            })
            .collect();
        list.sort();
        list
    }

    fn version(epoch: u64, members: Vec<RingMember>) -> RingVersion {
        RingVersion {
            epoch,
            members,
            ..RingVersion::default()
        }
    }

    fn counts(table: &[u16], members: usize) -> Vec<u64> {
        let mut counts = vec![0; members];
        for slot in table {
            counts[usize::from(*slot)] += 1;
        }
        counts
    }

    /// Per mille of the fair share by which the worst member is off.
    fn imbalance(list: &[RingMember], slots: u32) -> u64 {
        let total: u64 = list.iter().map(|member| u64::from(member.weight)).sum();
        let counts = counts(&table(list, slots), list.len());
        let off = |(member, count): (&RingMember, u64)| {
            let fair = u64::from(slots) * u64::from(member.weight);
            (count * total).abs_diff(fair) * 1000 / fair
        };
        list.iter().zip(counts).map(off).max().unwrap_or(0)
    }

    #[test]
    fn a_member_that_is_gone_is_asked_no_more_and_the_others_still_are() {
        let two = || members([(1, 1), (2, 1)]);
        let three = members([(1, 1), (2, 1), (3, 1)]);
        let mut history = [version(1, two()), version(2, three), version(3, two())];
        let before = Ring::build(&history, None, FEW_SLOTS).unwrap();
        let gone = VmName::new("web3").unwrap();
        history[1].gone.insert(gone.clone());
        let after = Ring::build(&history, None, FEW_SLOTS).unwrap();
        let mut asked = 0;
        for (was, is) in before.slots.iter().zip(&after.slots) {
            assert_eq!((was.primary, was.next), (is.primary, is.next));
            match before.member(was.previous).map(|member| &member.vm) {
                Some(vm) if *vm == gone => {
                    let now = after.member(is.previous);
                    assert!(now.is_none_or(|member| member.vm != gone));
                }
                Some(_) => {
                    asked += 1;
                    assert_eq!(was.previous, is.previous);
                }
                None => assert_eq!(is.previous, NONE),
            }
        }
        assert!(
            asked > 0,
            "no slot went from one of the two to the other and back"
        );
    }

    /// The table by its definition: who steps on until a free slot comes.
    fn by_the_book(members: &[RingMember], slots: u32) -> Vec<u16> {
        let size = u64::from(slots);
        let heaviest = members.iter().map(|member| member.weight).max().unwrap();
        let mut places: Vec<(u64, u64)> = members
            .iter()
            .map(|member| preference(&member.vm, size))
            .collect();
        let mut credit = vec![0; members.len()];
        let mut table = vec![NONE; slots as usize];
        let mut left = slots;
        loop {
            for (index, member) in members.iter().enumerate() {
                credit[index] += member.weight;
                if credit[index] < heaviest {
                    continue;
                }
                credit[index] -= heaviest;
                let (at, skip) = &mut places[index];
                while table[usize::try_from(*at).unwrap()] != NONE {
                    *at = (*at + *skip) % size;
                }
                table[usize::try_from(*at).unwrap()] = u16::try_from(index).unwrap();
                left -= 1;
                if left == 0 {
                    return table;
                }
            }
        }
    }

    #[test]
    fn a_table_is_what_the_book_says() {
        for slots in [
            1, 2, 3, 100, 255, 256, 257, 258, 300, 1024, FEW_SLOTS, 6_000,
        ] {
            for count in [1, 2, 3, 7, 40, 300] {
                let list = members((0..count).map(|number| (number, number as u32 % 4 + 1)));
                assert_eq!(
                    table(&list, slots),
                    by_the_book(&list, slots),
                    "{count} members, {slots} slots"
                );
            }
        }
        let list = members((0..100).map(|number| (number, 1)));
        assert_eq!(table(&list, SLOTS), by_the_book(&list, SLOTS));
    }

    #[test]
    fn an_inverse_undoes() {
        for size in [2, 3, 4, 9, 100, 4_099, 65_537] {
            for skip in (1..size).filter(|skip| common_factor(*skip, size) == 1) {
                assert_eq!(skip * inverse(skip, size) % size, 1, "{skip} of {size}");
            }
        }
    }

    #[test]
    fn shares_are_within_one_percent() {
        for count in [1, 2, 3, 4, 7, 10, 50, 100] {
            let list = members((0..count).map(|number| (number, 1)));
            assert!(imbalance(&list, SLOTS) <= 10, "{count} members");
        }
        for weights in [[1, 3, 1, 2], [100, 1, 50, 7], [5, 5, 5, 1]] {
            let list = members(weights.into_iter().enumerate());
            assert!(imbalance(&list, SLOTS) <= 10, "{weights:?}");
        }
    }

    #[test]
    fn a_removal_moves_hardly_more_than_its_own_slots() {
        for count in [3, 10, 50, 100] {
            let list = members((0..count).map(|number| (number, 1)));
            let before = table(&list, SLOTS);
            for gone in [0, count / 2, count - 1] {
                let mut rest = list.clone();
                rest.remove(gone);
                let after = table(&rest, SLOTS);
                let moved = before.iter().zip(&after).filter(|(old, new)| {
                    usize::from(**old) != gone
                        && list[usize::from(**old)].vm != rest[usize::from(**new)].vm
                });
                let moved = moved.count() as u64;
                assert!(
                    moved * 100 <= u64::from(SLOTS),
                    "{count} members: {moved} moved"
                );
            }
        }
    }

    #[test]
    fn a_slot_remembers_who_had_it_and_knows_who_will() {
        let one = version(1, members([(0, 1), (1, 1)]));
        let two = version(2, members([(0, 1), (1, 1), (2, 1)]));
        let three = version(3, members([(1, 1), (2, 1)]));
        let ring = Ring::build(&[one.clone(), two.clone()], Some(&three), 4_099).unwrap();
        assert_eq!(ring.members.len(), 3);
        let name = |index: u16| ring.member(index).map(|member| member.vm.as_str());
        let old = table(&one.members, 4_099);
        for (slot, entry) in ring.slots.iter().enumerate() {
            if name(entry.primary) == Some("web2") {
                let had = one.members[usize::from(old[slot])].vm.as_str();
                assert_eq!(name(entry.previous), Some(had));
            }
            assert_ne!(name(entry.next), Some("web0"));
            assert_ne!(entry.previous, entry.primary);
        }
        let moved = ring.slots.iter().filter(|slot| slot.previous != NONE);
        assert!(moved.count() > 4_099 / 4);
        // Activated: what was coming is primary, what was primary is previous where it differs.
        let after = Ring::build(&[one, two, three], None, 4_099).unwrap();
        for (before, after) in ring.slots.iter().zip(&after.slots) {
            assert_eq!(after.primary, before.next);
            assert_eq!(after.next, after.primary);
            if before.next != before.primary {
                assert_eq!(after.previous, before.primary);
            }
        }
    }

    #[test]
    fn only_the_last_lists_count() {
        let lists: Vec<RingVersion> = (0..12)
            .map(|epoch| version(epoch, members([(epoch as usize, 1)])))
            .collect();
        let ring = Ring::build(&lists, None, 7).unwrap();
        assert_eq!(ring.members.len(), HISTORY);
    }

    #[test]
    fn odd_inputs_make_no_table_or_a_whole_one() {
        assert!(Ring::build(&[], None, SLOTS).is_none());
        assert!(Ring::build(&[version(1, Vec::new())], None, SLOTS).is_none());
        assert!(table(&members([(0, 0)]), 7).is_empty());
        assert!(table(&members([(0, 1)]), 0).is_empty());
        for slots in [1, 2, 6, 100, 1024] {
            let table = table(&members([(0, 1), (1, 2), (2, 0)]), slots);
            assert!(table.iter().all(|slot| *slot < 2), "{slots} slots");
            assert_eq!(table.len(), slots as usize);
        }
        // An emptied ring that was not: `next` without members changes nothing.
        let one = version(1, members([(0, 1)]));
        let ring = Ring::build(&[one], Some(&version(2, Vec::new())), 7).unwrap();
        assert!(ring.slots.iter().all(|slot| slot.next == slot.primary));
    }

    /// The fixture's text: a digest of the table and its first slots, for lists of several sizes and weights.
    fn fixture() -> String {
        use std::fmt::Write as _;
        let mut text = String::from("# members, slots, digest of the table, first slots\n");
        for (count, weighted) in [(1, false), (3, false), (4, true), (50, false), (100, true)] {
            for slots in [SLOTS, FEW_SLOTS] {
                let weight = |number: usize| if weighted { number as u32 % 5 + 1 } else { 1 };
                let list = members((0..count).map(|number| (number, weight(number))));
                let table = table(&list, slots);
                let digest = table.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, slot| {
                    (hash ^ u64::from(*slot)).wrapping_mul(0x0000_0100_0000_01b3)
                });
                let first = &table[..12];
                writeln!(
                    text,
                    "{count}{} {slots} {digest:016x} {first:?}",
                    if weighted { "w" } else { "" }
                )
                .unwrap();
            }
        }
        text
    }

    #[test]
    fn the_same_lists_give_the_same_ring_everywhere() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/ring.txt");
        let committed = std::fs::read_to_string(path).unwrap();
        // On purpose without a way to write it anew: the ring never changes.
        assert_eq!(fixture(), committed, "{}", fixture());
    }
}
