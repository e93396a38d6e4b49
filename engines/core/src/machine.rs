//! The machine around a vCPU: its devices at their addresses, its console and its event source.
//!
//! The same machine is put around every engine's vCPU, so what a guest finds does not depend on
//! the mode; only where the host's kernel brings interrupt controllers and timer of its own
//! ([`MachineOptions::controller`]) are the machine's left out. One machine serves one run.
//!
//! Time. The machine has one clock and one host timer, which is set to the earliest deadline of all
//! devices just before the guest is entered ([`Machine::arm`]), or slept until when it is halted.

mod firmware;
mod upkeep;

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::{AddressMap, Slot};
use crate::clock::Clock;
use crate::devices::irqchip::{Irqchip, Wires};
use crate::devices::lapic::TSC_DEADLINE;
use crate::devices::{Action, Device, Pit, Serial, board, pit, serial};
use crate::dma::WriteLog;
use crate::host::console::{Output, Sink};
use crate::host::events::Events;
use crate::host::input::Input;
use crate::host::io_thread::IoThread;
use crate::host::{Pump, PumpOptions, WATCHED};
use crate::interrupt::{Interrupts, Line};
use crate::schedule::Schedule;
use crate::seats::Seats;
use crate::tally::{Count, Snapshot, Tally};
pub use crate::window::Window;
use crate::window::Windows;
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
pub struct MachineOptions {
    /// Console input.
    pub input: Source,
    /// Console output.
    pub output: Sink,
    /// End the run on SIGINT and SIGTERM. Blocks both in the calling thread.
    pub signals: bool,
    /// The interrupt controllers and the timer that the engine brings along, if it does.
    pub controller: Option<Arc<dyn Interrupts>>,
    /// Guest RAM as (start, size), for what tells a guest of it.
    pub memory: Vec<(GuestPhys, u64)>,
    /// How many vCPUs there are.
    pub cpus: u8,
    /// The guest's command line, for fw_cfg.
    pub command_line: String,
    /// Where the debug console goes, if anywhere.
    pub debug: Option<Box<dyn Write + Send>>,
    /// There is firmware at the reset vector ([`load_kernel`](crate::loader::load_kernel)), which has set
    /// up interrupt controllers and timer; INIT of the boot processor resets the machine otherwise.
    pub firmware: bool,
}

impl Default for MachineOptions {
    /// No input, output kept in memory, signals left alone.
    fn default() -> Self {
        MachineOptions {
            input: Source::Bytes(Vec::new()),
            output: Sink::Memory(Vec::new()),
            signals: false,
            controller: None,
            memory: Vec::new(),
            cpus: 1,
            command_line: String::new(),
            debug: None,
            firmware: false,
        }
    }
}

const LAPIC: Slot = 0;
const PICS: Slot = 1;
const IOAPIC: Slot = 2;
/// Slots below this are interrupt controllers.
const SERIAL: Slot = 3;
const FIRST_OTHER: Slot = 4;

/// Devices, console and event source of one virtual machine.
pub struct Machine {
    pub(crate) events: Arc<Events>,
    pub(crate) pump: Arc<Pump>,
    pub(crate) irqchip: Irqchip,
    pub(crate) serial: Serial,
    pub(crate) tally: Tally,
    pub(crate) schedule: Schedule,
    /// Something is to be done before the guest is entered: a cheap look for the run loop.
    pub(crate) attention: bool,
    /// The machine's own interrupt controllers are in use, so every interrupt passes the run loop.
    pub(crate) own_controllers: bool,
    pub(crate) firmware: bool,
    pub(crate) seats: Seats,
    pub(crate) input: Arc<Input>,
    /// The paravirtual console, if there is one.
    console: Option<Slot>,
    clock: Clock,
    wires: Arc<Wires>,
    controller: Arc<dyn Interrupts>,
    others: Vec<Box<dyn Device>>,
    map: AddressMap,
    /// Devices with a descriptor, as bits by slot.
    watched: u64,
    /// Those whose descriptor is not watched until the guest's next access.
    held: u64,
    /// What devices write to memory, for engines that must be told.
    write_log: Option<Arc<WriteLog>>,
    windows: Windows,
    /// Devices that let writes wait: slot, data port, how many.
    posting: Vec<(Slot, u16, u32)>,
    /// How many may, for the engine.
    postable: Arc<AtomicU32>,
    /// Serves doorbells that are no exits.
    pub(crate) io: Option<IoThread>,
}

impl Machine {
    /// Puts a machine together and starts its pump.
    ///
    /// # Errors
    /// The host's, if it has no descriptors or threads left.
    pub fn new(options: MachineOptions) -> io::Result<Self> {
        // The calling thread is going to run a vCPU, and threads that it starts are like it.
        crate::host::sharpen_sleeps();
        let events = Arc::new(Events::new()?);
        let seats = Seats::new(&events, options.cpus)?;
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
        let clock = Clock::default();
        let wires = Arc::new(Wires::new(Arc::clone(&events)));
        let own_controllers = options.controller.is_none();
        let controller = options
            .controller
            .unwrap_or_else(|| Arc::clone(&wires) as _);
        let irqchip = Irqchip::new(&clock, options.cpus);
        let resume = Arc::clone(&pump);
        let output = Output::new(options.output, Arc::clone(&events));
        let line = Line::new(Arc::clone(&controller), serial::IRQ);
        let serial_input = Arc::clone(&input);
        let serial = Serial::new(
            output,
            serial_input,
            line,
            Box::new(move || resume.resume_input()),
        );

        let mut map = AddressMap::default();
        if own_controllers {
            board::controllers(&mut map, LAPIC, PICS, IOAPIC);
        }
        map.assign_ports(abi::port::COM1, serial::REGISTERS as u16, SERIAL, 0);
        let names = [
            irqchip.lapics.name(),
            irqchip.pics.name(),
            irqchip.ioapic.name(),
            serial.name(),
        ];
        let mut machine = Machine {
            events,
            pump,
            irqchip,
            serial,
            tally: Tally::new(names.into_iter()),
            schedule: Schedule::new(usize::from(FIRST_OTHER)),
            attention: false,
            own_controllers,
            firmware: options.firmware,
            seats,
            input,
            console: None,
            clock,
            wires,
            controller,
            others: Vec::new(),
            map,
            watched: 0,
            held: 0,
            write_log: None,
            windows: Windows::default(),
            posting: Vec::new(),
            postable: Arc::default(),
            io: None,
        };
        for (ports, device) in board::devices(
            &machine,
            &options.memory,
            options.cpus,
            &options.command_line,
            options.debug,
        ) {
            machine.add_ports(ports, device)?;
        }
        if own_controllers {
            let pit = Pit::new(machine.clock.clone(), machine.line(pit::IRQ));
            machine.add_ports(board::PIT, Box::new(pit))?;
        }
        if own_controllers && options.firmware {
            machine.set_up_board();
        }
        Ok(machine)
    }

    /// The wire to interrupt input `number`. One device has it.
    pub fn line(&self, number: u8) -> Line {
        Line::new(Arc::clone(&self.controller), number)
    }

    /// Tells the engine of the pages in `log` before it runs the guest again
    /// ([`Vcpu::memory_written`]).
    pub fn log_writes(&mut self, log: Arc<WriteLog>) {
        self.write_log = Some(log);
    }

    /// Moves the pages that devices have written into `pages`; false if there are none.
    #[inline]
    pub(crate) fn written(&self, pages: &mut Vec<u64>) -> bool {
        self.write_log.as_ref().is_some_and(|log| log.take(pages))
    }

    /// The guest's firmware goes on after a reset as the guest has told it, by a shutdown code that it
    /// knows ([`loader`](crate::loader)).
    pub(crate) fn resumes(&self) -> bool {
        const EOI_AND_JUMP: u8 = 5;
        const JUMP: u8 = 10;
        let codes = self.others.iter().map(|device| device.shutdown_code());
        self.firmware
            && self.own_controllers
            && codes
                .max()
                .is_some_and(|code| matches!(code, EOI_AND_JUMP | JUMP))
    }

    /// The guest's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Adds a device at ranges of ports (first, count); its registers are numbered on from range
    /// to range.
    ///
    /// # Errors
    /// The host's, if the device's descriptor can't be watched.
    ///
    /// # Panics
    /// If a port is taken: machines are put together by the VMM, not by its input.
    pub fn add_ports(&mut self, ranges: &[(u16, u16)], device: Box<dyn Device>) -> io::Result<()> {
        let slot = self.add(device)?;
        let mut offset = 0;
        for &(first, count) in ranges {
            self.map.assign_ports(first, count, slot, offset);
            offset += count as u8;
        }
        Ok(())
    }

    /// As [`add_ports`](Machine::add_ports), for a device whose data register, at `port`, takes writes
    /// that may wait ([`Device::postable`]).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn add_posted(
        &mut self,
        ranges: &[(u16, u16)],
        port: u16,
        device: Box<dyn Device>,
    ) -> io::Result<()> {
        let postable = device.postable();
        self.add_ports(ranges, device)?;
        let slot = usize::from(FIRST_OTHER) + self.others.len() - 1;
        self.posting.push((slot as Slot, port, postable));
        Ok(())
    }

    /// Lets `vcpu`, the only one, keep such writes back ([`Vcpu::post_writes`]).
    pub fn post_writes(&self, vcpu: &mut dyn Vcpu) {
        if !self.posting.is_empty() {
            let ports: Vec<u16> = self.posting.iter().map(|posting| posting.1).collect();
            vcpu.post_writes(&ports, &self.postable);
        }
    }

    /// Says how many writes may wait now: as many as the device that expects some allows. While none
    /// does there is nothing to wait for.
    fn repost(&mut self, slot: Slot) {
        let postable = self.device(slot).postable();
        let entry = self.posting.iter_mut().find(|posting| posting.0 == slot);
        let Some(entry) = entry.filter(|entry| entry.2 != postable) else {
            return;
        };
        entry.2 = postable;
        let least = self.posting.iter().map(|posting| posting.2).min();
        let least = least.filter(|&least| least != u32::MAX).unwrap_or(0);
        self.postable.store(least, Ordering::Relaxed);
    }

    /// Adds a device at `size` bytes of guest-physical memory from `start`.
    ///
    /// # Errors
    /// The host's, if the device's descriptor can't be watched.
    ///
    /// # Panics
    /// If the range is taken.
    pub fn add_memory(
        &mut self,
        start: GuestPhys,
        size: u64,
        device: Box<dyn Device>,
    ) -> io::Result<Slot> {
        let slot = self.add(device)?;
        self.map.assign_memory(start, size, slot);
        Ok(slot)
    }

    /// Names the device that is the guest's paravirtual console.
    pub(crate) fn set_console(&mut self, slot: Slot) {
        self.console = Some(slot);
    }

    /// Console input has come or ended.
    pub(crate) fn take_input(&mut self) -> Action {
        self.serial.input_came();
        match self.console {
            Some(slot) => self.access(slot, |device| device.host_ready()),
            None => Action::None,
        }
    }

    fn add(&mut self, device: Box<dyn Device>) -> io::Result<Slot> {
        let index = usize::from(FIRST_OTHER) + self.others.len();
        assert!(index < usize::from(Slot::MAX), "too many devices");
        if let Some(fd) = device.descriptor() {
            assert!(index < WATCHED, "too many devices with descriptors");
            self.pump.watch(index, fd)?;
            self.watched |= 1 << index;
        }
        self.tally.add_device(device.name());
        self.schedule.add();
        let slot = index as Slot;
        let deadline = device.deadline();
        self.others.push(device);
        self.reschedule(slot, deadline);
        Ok(slot)
    }

    /// Calls `observer` with each window soon after it has closed.
    pub fn observe_windows(&mut self, observer: impl FnMut(&Window) + Send + 'static) {
        self.windows.observe(observer);
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
        self.totals_of(&mut [vcpu])
    }

    /// As [`totals`](Machine::totals), of several vCPUs that have all stopped.
    pub fn totals_of(&self, vcpus: &mut [&mut dyn Vcpu]) -> Vec<Count> {
        let now = self.tally.last(vcpus);
        let Some(first) = vcpus.first() else {
            return Vec::new();
        };
        self.tally.between(&Snapshot::default(), &now, &**first)
    }

    fn device(&mut self, slot: Slot) -> &mut dyn Device {
        match slot {
            LAPIC => &mut self.irqchip.lapics,
            PICS => &mut self.irqchip.pics,
            IOAPIC => &mut self.irqchip.ioapic,
            SERIAL => &mut self.serial,
            other => &mut *self.others[usize::from(other - FIRST_OTHER)],
        }
    }

    /// Answers an `in` or `ins`; `data` holds items of `size` bytes.
    #[inline(always)]
    pub(crate) fn port_in(&mut self, port: u16, size: u8, data: &mut [u8]) -> Action {
        if self.tally.port(port, false)
            && let [byte] = data
            && let Some(offset) = self.console_register(port)
        {
            return self.serial.read_register(offset, byte);
        }
        self.port_in_elsewhere(port, size, data)
    }

    /// Beside the most frequent case, and out of its way.
    #[inline(never)]
    fn port_in_elsewhere(&mut self, port: u16, size: u8, data: &mut [u8]) -> Action {
        self.tally.note_port(port, false);
        upkeep::undriven(data);
        let Some((slot, offset)) = self.map.port(port) else {
            return Action::None;
        };
        self.access(slot, |device| {
            // Nearly every access is one item: no division for those.
            if data.len() == usize::from(size) {
                return device.read(offset, data);
            }
            device.read_items(offset, size.into(), data)
        })
    }

    /// Takes an `out` or `outs`.
    #[inline(always)]
    pub(crate) fn port_out(&mut self, port: u16, size: u8, data: &[u8]) -> Action {
        if self.tally.port(port, true)
            && let &[byte] = data
            && let Some(offset) = self.console_register(port)
        {
            return self.serial.write_register(offset, byte);
        }
        self.port_out_elsewhere(port, size, data)
    }

    #[inline(never)]
    fn port_out_elsewhere(&mut self, port: u16, size: u8, data: &[u8]) -> Action {
        self.tally.note_port(port, true);
        let Some((slot, offset)) = self.map.port(port) else {
            return Action::None;
        };
        self.access(slot, |device| {
            if data.len() == usize::from(size) {
                return device.write(offset, data);
            }
            device.write_items(offset, size.into(), data)
        })
    }

    /// The UART's register at `port`, if it is one. Its accesses are the most frequent by far, and it has no
    /// deadline, no descriptor and no writes that wait: nothing of [`access`](Machine::access) is left to do,
    /// and no call goes through a table.
    #[inline(always)]
    fn console_register(&self, port: u16) -> Option<u64> {
        let (slot, offset) = self.map.port(port)?;
        (slot == SERIAL).then_some(offset)
    }

    /// Answers a read of an address that is not RAM.
    #[inline]
    pub(crate) fn memory_read(&mut self, addr: GuestPhys, data: &mut [u8]) -> Action {
        upkeep::undriven(data);
        let found = self.at(addr);
        self.tally.memory(found.map(|found| found.0), false);
        found.map_or(Action::None, |(slot, offset)| {
            self.access(slot, |device| device.read(offset, data))
        })
    }

    /// Takes a write to an address that is not RAM.
    #[inline]
    pub(crate) fn memory_write(&mut self, addr: GuestPhys, data: &[u8]) -> Action {
        let found = self.at(addr);
        self.tally.memory(found.map(|found| found.0), true);
        found.map_or(Action::None, |(slot, offset)| {
            self.access(slot, |device| device.write(offset, data))
        })
    }

    /// Takes over what the guest did to CR8, before it may read what follows from that.
    #[inline]
    pub(crate) fn sync_task_priority(&mut self, cr8: u8) {
        self.irqchip.lapics.own().sync_task_priority(cr8);
    }

    /// Answers `rdmsr`; `None` is #GP.
    pub(crate) fn read_msr(&mut self, index: u32) -> Option<u64> {
        self.irqchip.lapics.own().read_msr(index)
    }

    /// Takes a `wrmsr` while the guest's time-stamp counter stands at `tsc`. False is #GP.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64, tsc: u64) -> bool {
        let accepted = self.irqchip.lapics.write_msr(index, value, tsc);
        // What follows is the same as for the register page.
        self.access(LAPIC, |_| Action::None);
        if index == TSC_DEADLINE && value <= tsc {
            // One that has passed already interrupts now, not when the host's timer comes round.
            self.advance();
        }
        accepted
    }

    /// Lets `access` at a device, and takes over what it has changed: its deadline, and what the
    /// interrupt controllers have to move on.
    #[inline]
    fn access(&mut self, slot: Slot, access: impl FnOnce(&mut dyn Device) -> Action) -> Action {
        let device = self.device(slot);
        let action = access(device);
        let deadline = device.deadline();
        self.accessed(slot, deadline);
        action
    }

    /// Takes over what an access to a device has changed.
    #[inline(always)]
    fn accessed(&mut self, slot: Slot, deadline: Option<u64>) {
        let same = deadline == self.schedule.of(slot.into()) && slot >= SERIAL;
        if !(same && self.held == 0 && self.posting.is_empty()) {
            self.take_over(slot, deadline);
        }
    }

    #[inline(never)]
    fn take_over(&mut self, slot: Slot, deadline: Option<u64>) {
        if deadline != self.schedule.of(slot.into()) {
            self.reschedule(slot, deadline);
        }
        if slot < SERIAL {
            self.irqchip.settle();
            self.attention = true;
        }
        if self.held != 0 {
            self.release(slot);
        }
        if self.posting.iter().any(|posting| posting.0 == slot) {
            self.repost(slot);
        }
    }

    fn reschedule(&mut self, slot: Slot, deadline: Option<u64>) {
        self.schedule.set(slot.into(), deadline);
        self.attention = true;
    }

    /// The guest wrote `value` to the mark port, on vCPU `cpu`.
    pub(crate) fn mark(&mut self, value: u8, cpu: usize, vcpu: &mut dyn Vcpu) {
        self.windows.mark(value, &mut self.tally, cpu, vcpu);
    }

    /// Hands a closed window to the observer.
    pub(crate) fn report_windows(&mut self, vcpu: &dyn Vcpu) {
        self.windows.report(&self.tally, vcpu);
    }
}
