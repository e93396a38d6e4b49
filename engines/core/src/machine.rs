//! The machine around a vCPU: its devices at their addresses, its console and its event source.
//!
//! The same machine is put around every engine's vCPU, so what a guest finds does not depend on
//! the mode. One machine serves one run.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::bus::{AddressMap, Slot};
use crate::devices::{
    Action, Device, ExitPort, Ignored, Lapic, MarkPort, Pic, Serial, lapic, serial,
};
use crate::host::console::{Output, Sink};
use crate::host::events::Events;
use crate::host::input::Input;
use crate::host::{Pump, PumpOptions};
use crate::tally::{Count, Snapshot, Tally};
use crate::{GuestPhys, Vcpu};

/// Where console input comes from.
#[derive(Debug)]
pub enum Source {
    /// A descriptor of the host.
    Descriptor(OwnedFd),
    /// These bytes, then the end.
    Bytes(Vec<u8>),
}

/// How a machine is tied to its host.
#[derive(Debug)]
pub struct MachineOptions {
    /// Console input.
    pub input: Source,
    /// Console output.
    pub output: Sink,
    /// End the run on SIGINT and SIGTERM. Blocks both in the calling thread.
    pub signals: bool,
}

impl Default for MachineOptions {
    /// No input, output kept in memory, signals left alone.
    fn default() -> Self {
        MachineOptions {
            input: Source::Bytes(Vec::new()),
            output: Sink::Memory(Vec::new()),
            signals: false,
        }
    }
}

/// Counters of one measured window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Number of the window in this run, from 0.
    pub seq: u64,
    /// What was counted between the marks, the marks left out.
    pub counts: Vec<Count>,
}

type Observer = Box<dyn FnMut(&Window)>;

const LAPIC: Slot = 0;
const SERIAL: Slot = 1;
const FIRST_OTHER: Slot = 2;

/// Devices, console and event source of one virtual machine.
pub struct Machine {
    pub(crate) events: Arc<Events>,
    pub(crate) pump: Arc<Pump>,
    pub(crate) lapic: Lapic,
    pub(crate) serial: Serial,
    pub(crate) tally: Tally,
    others: Vec<Box<dyn Device>>,
    map: AddressMap,
    marks: Marks,
    observer: Observer,
}

/// Windows between marks. Closing one only takes a snapshot; it is worked out and handed to the
/// observer when the guest has time ([`Machine::report_windows`]), outside of what is measured.
#[derive(Default)]
struct Marks {
    open: Option<Snapshot>,
    closed: Option<(Snapshot, Snapshot)>,
    next: u64,
}

impl Machine {
    /// Puts a machine together and starts its pump.
    ///
    /// # Errors
    /// The host's, if it has no descriptors or threads left.
    pub fn new(options: MachineOptions) -> io::Result<Self> {
        let events = Arc::new(Events::new()?);
        let (input, source) = match options.input {
            Source::Descriptor(fd) => (Input::default(), Some(fd)),
            Source::Bytes(bytes) => (Input::closed(&bytes), None),
        };
        let input = Arc::new(input);
        let pump = Arc::new(Pump::start(
            Arc::clone(&events),
            Arc::clone(&input),
            PumpOptions {
                input: source,
                signals: options.signals,
            },
        )?);
        let resume = Arc::clone(&pump);
        let output = Output::new(options.output, Arc::clone(&events));
        let serial = Serial::new(output, input, Box::new(move || resume.resume_input()));

        let mut map = AddressMap::default();
        map.assign_memory(lapic::BASE, lapic::SIZE, LAPIC);
        map.assign_ports(abi::port::COM1, serial::REGISTERS as u16, SERIAL);
        let mut others: Vec<Box<dyn Device>> = Vec::new();
        for (first, count, device) in standard_ports() {
            map.assign_ports(first, count, FIRST_OTHER + others.len() as Slot);
            others.push(device);
        }
        let lapic = Lapic::default();
        let names = [lapic.name(), serial.name()];
        let tally = Tally::new(
            names
                .into_iter()
                .chain(others.iter().map(|other| other.name())),
        );
        Ok(Machine {
            events,
            pump,
            lapic,
            serial,
            tally,
            others,
            map,
            marks: Marks::default(),
            observer: Box::new(|_| ()),
        })
    }

    /// Calls `observer` with each window soon after it has closed.
    pub fn observe_windows(&mut self, observer: impl FnMut(&Window) + 'static) {
        self.observer = Box::new(observer);
    }

    /// Console output, if it is kept in memory.
    pub fn console(&self) -> &[u8] {
        self.serial.output().kept()
    }

    /// The exit counters.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Everything counted so far, zeros left out.
    pub fn totals(&self, vcpu: &mut dyn Vcpu) -> Vec<Count> {
        let now = self.tally.snapshot(vcpu);
        self.tally.between(&Snapshot::default(), &now, vcpu)
    }

    fn device(&mut self, slot: Slot) -> &mut dyn Device {
        match slot {
            LAPIC => &mut self.lapic,
            SERIAL => &mut self.serial,
            other => &mut *self.others[usize::from(other - FIRST_OTHER)],
        }
    }

    /// Answers an `in` or `ins`; `data` holds items of `size` bytes.
    #[inline]
    pub(crate) fn port_in(&mut self, port: u16, size: u8, data: &mut [u8]) -> Action {
        self.tally.port(port, false);
        data.fill(0xff);
        let Some((slot, offset)) = self.map.port(port) else {
            return Action::None;
        };
        let device = self.device(slot);
        // Nearly every access is one item: no division for those.
        if data.len() == usize::from(size) {
            return device.read(offset, data);
        }
        let mut action = Action::None;
        for item in data.chunks_exact_mut(usize::from(size)) {
            action = device.read(offset, item);
        }
        action
    }

    /// Takes an `out` or `outs`.
    #[inline]
    pub(crate) fn port_out(&mut self, port: u16, size: u8, data: &[u8]) -> Action {
        self.tally.port(port, true);
        let Some((slot, offset)) = self.map.port(port) else {
            return Action::None;
        };
        let device = self.device(slot);
        if data.len() == usize::from(size) {
            return device.write(offset, data);
        }
        let mut action = Action::None;
        for item in data.chunks_exact(usize::from(size)) {
            action = device.write(offset, item);
            if action != Action::None {
                break;
            }
        }
        action
    }

    /// Answers a read of an address that is not RAM.
    #[inline]
    pub(crate) fn memory_read(&mut self, addr: GuestPhys, data: &mut [u8]) -> Action {
        data.fill(0xff);
        let found = self.map.memory(addr);
        self.tally.memory(found.map(|found| found.0), false);
        found.map_or(Action::None, |(slot, offset)| {
            self.device(slot).read(offset, data)
        })
    }

    /// Takes a write to an address that is not RAM.
    #[inline]
    pub(crate) fn memory_write(&mut self, addr: GuestPhys, data: &[u8]) -> Action {
        let found = self.map.memory(addr);
        self.tally.memory(found.map(|found| found.0), true);
        found.map_or(Action::None, |(slot, offset)| {
            self.device(slot).write(offset, data)
        })
    }

    /// The guest wrote `value` to the mark port.
    pub(crate) fn mark(&mut self, value: u8, vcpu: &mut dyn Vcpu) {
        match value {
            abi::mark::BEGIN => {
                self.report_windows(vcpu);
                self.marks.open = Some(self.tally.snapshot(vcpu));
            }
            abi::mark::END => {
                if let Some(begin) = self.marks.open.take() {
                    let mut end = self.tally.snapshot(vcpu);
                    // The closing mark's own exit was counted already.
                    self.tally.forget_port_write(abi::port::MARK, &mut end);
                    self.report_windows(vcpu);
                    self.marks.closed = Some((begin, end));
                }
            }
            // A guest may write what it likes.
            _ => {}
        }
    }

    /// Hands a closed window to the observer.
    pub(crate) fn report_windows(&mut self, vcpu: &dyn Vcpu) {
        if let Some((begin, end)) = self.marks.closed.take() {
            let seq = self.marks.next;
            self.marks.next += 1;
            let counts = self.tally.between(&begin, &end, vcpu);
            (self.observer)(&Window { seq, counts });
        }
    }
}

/// Ports that every machine has besides the console: (first, count, device).
fn standard_ports() -> [(u16, u16, Box<dyn Device>); 5] {
    [
        (abi::port::EXIT, 1, Box::new(ExitPort)),
        (abi::port::MARK, 1, Box::new(MarkPort)),
        (0x80, 1, Box::new(Ignored("post"))),
        (0x20, 2, Box::new(Pic::default())),
        (0xa0, 2, Box::new(Pic::default())),
    ]
}
