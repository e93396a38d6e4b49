//! The page tables that a guest starts with, and what entries there are.

use crate::generate::Generator;
use crate::layout::*;

/// Tables of one space.
pub(crate) struct Space {
    pub(crate) root: u64,
    pub(crate) pcid: u64,
    pub(crate) private: u64,
    /// The entry of the directory that maps [`Region::Large`], and the table that it leads to at times.
    pub(crate) large_entry: u64,
    pub(crate) large: u64,
    pub(crate) upper: u64,
}

impl Generator {
    fn table(&mut self) -> u64 {
        let table = self.next_table;
        self.next_table += PAGE;
        assert!(self.next_table <= GROUPS[0]);
        table
    }

    fn set(&mut self, table: u64, index: u64, entry: u64) {
        self.model
            .put(table + (index & 0x1ff) * 8, &entry.to_le_bytes());
    }

    pub(crate) fn tables(&mut self, pcids: bool, global_kernel: bool, cpus: usize) {
        const OPEN: u64 = PRESENT | WRITABLE | USER;
        let kernel = PRESENT | WRITABLE | if global_kernel { GLOBAL } else { 0 };
        let (low, mixed) = (self.table(), self.table());
        for index in 0..RAM_MIB / 2 {
            self.set(low, index, index << 21 | LARGE | USED | kernel);
        }
        self.set(low, USER_CODE >> 21, mixed | OPEN);
        for index in 0..512 {
            let at = USER_CODE + index * PAGE;
            let user = if at < USER_END { USER } else { 0 };
            self.set(mixed, index, at | USED | kernel | user);
        }
        let (global, global_directory) = (self.table(), self.table());
        self.cpu().global = global;
        self.set(global_directory, 0, global | OPEN);
        for page in 0..REGION_PAGES {
            let entry = self.entry(Region::Global);
            self.set(global, page, entry);
        }
        // More than anybody remembers, at times.
        let count = self.random.pick(&[2, 4, 4, if cpus == 1 { 20 } else { 3 }]);
        let way = self.random.below(3);
        for number in 0..count {
            let pcid = match way {
                _ if !pcids => 0,
                // As with page-table isolation, two halves each; all alone; every other one together.
                0 => (number / 2 + 1) | ((number % 2) << 11),
                1 => number,
                _ => 4 | ((number % 2) << 11),
            };
            let [root, first, high, top] = std::array::from_fn(|_| self.table());
            let [directory, high_directory, upper_directory] =
                std::array::from_fn(|_| self.table());
            let [private, large, upper] = std::array::from_fn(|_| self.table());
            let at = |address: u64, level: u64| address >> (12 + 9 * level);
            let [below, above] = *Region::Private.bases() else {
                unreachable!("it is seen at two addresses");
            };
            let upper_base = Region::Upper.bases()[0];
            let large_base = Region::Large.bases()[0];
            self.set(root, 0, first | OPEN);
            self.set(root, at(above, 3), high | OPEN);
            self.set(root, at(upper_base, 3), top | OPEN);
            self.set(first, 0, low | OPEN);
            self.set(first, at(below, 2), directory | OPEN);
            self.set(
                first,
                at(Region::Global.bases()[0], 2),
                global_directory | OPEN,
            );
            self.set(high, at(above, 2), high_directory | OPEN);
            self.set(top, at(upper_base, 2), upper_directory | OPEN);
            self.set(directory, at(below, 1), private | OPEN);
            self.set(directory, at(large_base, 1), large | OPEN);
            self.set(high_directory, at(above, 1), private | OPEN);
            self.set(upper_directory, at(upper_base, 1), upper | OPEN);
            let tables = [
                (Region::Private, private),
                (Region::Large, large),
                (Region::Upper, upper),
            ];
            for (region, table) in tables {
                for page in 0..REGION_PAGES {
                    let entry = self.entry(region);
                    self.set(table, page, entry);
                }
            }
            self.cpu().spaces.push(Space {
                root,
                pcid,
                private,
                large_entry: directory + (at(large_base, 1) & 0x1ff) * 8,
                large,
                upper,
            });
        }
    }

    /// An entry of a region's table: most often one that allows everything.
    pub(crate) fn entry(&mut self, region: Region) -> u64 {
        let random = &mut self.random;
        if random.chance(2) {
            return 0;
        }
        let mut entry = frame(random.below(FRAMES)) | PRESENT;
        if random.chance(95) {
            entry |= WRITABLE;
        }
        if random.chance(95) {
            entry |= USER;
        }
        if random.chance(60) {
            entry |= USED;
        }
        if random.chance(3) {
            entry |= NO_EXECUTE;
        }
        if region == Region::Global {
            entry |= GLOBAL;
        }
        entry
    }
}
