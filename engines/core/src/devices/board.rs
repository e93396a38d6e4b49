//! What lies where on every machine's board.

use std::io::Write;

use super::{
    DebugConsole, Device, ExitPort, FwCfg, Ignored, Keyboard, MarkPort, Power, ResetPorts, Rtc,
    debug_console, fw_cfg, i8042, ioapic, lapic, power, reset, rtc,
};
use crate::bus::{AddressMap, Slot};
use crate::{GuestPhys, Machine};

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

/// Counters and control of the timer, and the system control port.
pub(crate) const PIT: Ports = &[(0x40, 4), (0x61, 1)];
const RTC: Ports = &[(0x70, 2)];
const KEYBOARD: Ports = &[(0x60, 1), (0x64, 1)];

/// The devices that every machine has besides the console, the interrupt controllers and their
/// timer.
pub(crate) fn devices(
    machine: &Machine,
    memory: &[(GuestPhys, u64)],
    cpus: u8,
    command_line: &str,
    debug: Option<Box<dyn Write + Send>>,
) -> Vec<(Ports, Box<dyn Device>)> {
    let clock = machine.clock();
    vec![
        (&[(abi::port::EXIT, 1)], Box::new(ExitPort)),
        (&[(abi::port::MARK, 1)], Box::new(MarkPort)),
        (&[(0x80, 1)], Box::new(Ignored("post"))),
        (
            RTC,
            Box::new(Rtc::new(clock.clone(), machine.line(rtc::IRQ), memory)),
        ),
        (reset::PORTS, Box::<ResetPorts>::default()),
        (KEYBOARD, Box::new(Keyboard::new(machine.line(i8042::IRQ)))),
        (
            &[(debug_console::PORT, 1)],
            Box::new(DebugConsole::new(debug)),
        ),
        (
            power::PORTS,
            Box::new(Power::new(clock.clone(), machine.line(power::IRQ))),
        ),
        (
            &[(fw_cfg::PORT, 2)],
            Box::new(FwCfg::new(memory, cpus, command_line)),
        ),
    ]
}
