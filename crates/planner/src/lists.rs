//! Many short lists in one.
//!
//! Owns: lists by index that are built once and only read, in two pieces of memory: with one vector
//! for each of 20,000 VMs a plan spends its time on getting and giving back memory.

/// A list of indexes for each index.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    /// Where each list begins; one more at the end.
    begins: Vec<usize>,
    items: Vec<usize>,
}

impl Lists {
    /// From pairs of list and item; the items of a list stay in the order in which they come.
    pub(crate) fn new(lists: usize, pairs: &[(usize, usize)]) -> Self {
        let mut begins = vec![0; lists + 1];
        for (list, _) in pairs {
            begins[list + 1] += 1;
        }
        for list in 0..lists {
            begins[list + 1] += begins[list];
        }
        let mut next = begins.clone();
        let mut items = vec![0; pairs.len()];
        for (list, item) in pairs {
            items[next[*list]] = *item;
            next[*list] += 1;
        }
        Self { begins, items }
    }

    pub(crate) fn of(&self, list: usize) -> &[usize] {
        &self.items[self.begins[list]..self.begins[list + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_their_order() {
        let lists = Lists::new(4, &[(2, 7), (0, 1), (2, 5), (3, 9), (0, 0)]);
        assert_eq!(lists.of(0), [1, 0]);
        assert!(lists.of(1).is_empty());
        assert_eq!(lists.of(2), [7, 5]);
        assert_eq!(lists.of(3), [9]);
    }
}
