//! What lies where on every machine's board.

use super::{Device, ExitPort, Ignored, MarkPort, ioapic, lapic};
use crate::bus::{AddressMap, Slot};

/// First and number of some ports.
pub(crate) type Ports = &'static [(u16, u16)];

/// Assigns the interrupt controllers' addresses.
pub(crate) fn controllers(map: &mut AddressMap, lapic: Slot, pics: Slot, ioapic: Slot) {
    map.assign_memory(lapic::BASE, lapic::SIZE, lapic);
    map.assign_memory(ioapic::BASE, ioapic::SIZE, ioapic);
    // Master, slave, edge/level control.
    for (first, offset) in [(0x20, 0), (0xa0, 2), (0x4d0, 4)] {
        map.assign_ports(first, 2, pics, offset);
    }
}

/// The devices that every machine has besides the console and the interrupt controllers.
pub(crate) fn ports() -> Vec<(Ports, Box<dyn Device>)> {
    vec![
        (&[(abi::port::EXIT, 1)], Box::new(ExitPort)),
        (&[(abi::port::MARK, 1)], Box::new(MarkPort)),
        (&[(0x80, 1)], Box::new(Ignored("post"))),
    ]
}
