//! The address map: which device answers at a port or a guest-physical address.
//!
//! Ports are a direct index, memory ranges a sorted table: nothing is hashed on the exit path.
//! What no device claims is not an error: reads are ones, writes vanish, as on a PC.
//!
//! Invariant: ranges never overlap, so each address has at most one device.

use crate::GuestPhys;

/// Number of a device, given out by whoever builds the map.
pub type Slot = u8;

const UNASSIGNED: u8 = u8::MAX;

#[derive(Clone, Copy, Debug)]
struct MemoryRange {
    start: u64,
    end: u64,
    slot: Slot,
}

/// Ports and memory ranges of a machine's devices.
pub struct AddressMap {
    /// Device and offset in it, of each port.
    ports: Box<[(Slot, u8); 1 << 16]>,
    /// Sorted by start.
    memory: Vec<MemoryRange>,
}

impl Default for AddressMap {
    fn default() -> Self {
        AddressMap {
            ports: vec![(UNASSIGNED, 0); 1 << 16]
                .try_into()
                .expect("as many as that"),
            memory: Vec::new(),
        }
    }
}

impl AddressMap {
    /// Gives `count` ports from `first` to `slot`, where they are the registers from `offset` on.
    /// A device may have several ranges.
    ///
    /// # Panics
    /// If a port is taken or a device has more than 256: machines are put together by the VMM, not
    /// by its input.
    pub fn assign_ports(&mut self, first: u16, count: u16, slot: Slot, offset: u8) {
        for at in 0..count {
            let port = first + at;
            let owner = &mut self.ports[usize::from(port)];
            assert_eq!(owner.0, UNASSIGNED, "port {port:#x} is taken");
            let offset = u8::try_from(u16::from(offset) + at).expect("256 registers at most");
            *owner = (slot, offset);
        }
    }

    /// Gives `size` bytes of guest-physical memory from `start` to `slot`.
    ///
    /// # Panics
    /// If the range overlaps another.
    pub fn assign_memory(&mut self, start: GuestPhys, size: u64, slot: Slot) {
        let range = MemoryRange {
            start: start.0,
            end: start.0 + size,
            slot,
        };
        let at = self
            .memory
            .partition_point(|other| other.start < range.start);
        let clear = self.memory[..at]
            .last()
            .is_none_or(|before| before.end <= range.start)
            && self.memory[at..]
                .first()
                .is_none_or(|after| range.end <= after.start);
        assert!(clear, "the device range at {start:?} is taken");
        self.memory.insert(at, range);
    }

    /// The device at `port` and the port's offset in it.
    #[inline]
    pub fn port(&self, port: u16) -> Option<(Slot, u64)> {
        let (slot, offset) = self.ports[usize::from(port)];
        (slot != UNASSIGNED).then(|| (slot, offset.into()))
    }

    /// The device at `addr` and the address's offset in it.
    #[inline]
    pub fn memory(&self, addr: GuestPhys) -> Option<(Slot, u64)> {
        let at = self.memory.partition_point(|range| range.start <= addr.0);
        let range = self.memory[..at].last()?;
        (addr.0 < range.end).then(|| (range.slot, addr.0 - range.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookups_find_the_device_and_the_offset_and_nothing_else() {
        let mut map = AddressMap::default();
        map.assign_ports(0x3f8, 8, 3, 0);
        map.assign_ports(0x3f0, 1, 3, 8);
        map.assign_memory(GuestPhys(0xfee0_0000), 0x1000, 1);
        map.assign_memory(GuestPhys(0xd000_0000), 0x100, 2);
        assert_eq!(map.port(0x3f7), None);
        assert_eq!(map.port(0x3fd), Some((3, 5)));
        assert_eq!(map.port(0x400), None);
        assert_eq!(map.port(0x3f0), Some((3, 8)));
        assert_eq!(map.memory(GuestPhys(0xd000_00ff)), Some((2, 0xff)));
        assert_eq!(map.memory(GuestPhys(0xd000_0100)), None);
        assert_eq!(map.memory(GuestPhys(0xfee0_0380)), Some((1, 0x380)));
        assert_eq!(map.memory(GuestPhys(0)), None);
        assert_eq!(map.memory(GuestPhys(u64::MAX)), None);
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn overlapping_memory_is_refused() {
        let mut map = AddressMap::default();
        map.assign_memory(GuestPhys(0x1000), 0x1000, 1);
        map.assign_memory(GuestPhys(0x1fff), 1, 2);
    }
}
