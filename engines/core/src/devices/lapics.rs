//! The local APICs of a machine's processors, and what goes between them.
//!
//! Each vCPU has one, which alone its own accesses reach: the run loop says whose turn it is
//! ([`Lapics::set_current`]) before it answers an exit. What has no vector (INIT, start-up, NMI) is
//! kept here as a [`Signal`] until the vCPU's thread takes it.
//!
//! Invariant: whoever got something new since the last look is in `news`, so that its thread can be
//! told.

#[cfg(test)]
mod tests;

use super::lapic::{APIC_BASE, BASE, Delivery, Destination, Lapic, Message, Target};
use super::{Action, Device};
use crate::clock::Clock;

/// What waits for a vCPU besides vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signal {
    /// INIT.
    pub init: bool,
    /// The page of a start-up IPI.
    pub startup: Option<u8>,
    /// Non-maskable interrupts: at most two, one to be delivered at once and one to wait for its
    /// `iret`.
    pub nmis: u8,
}

impl Signal {
    const NONE: Signal = Signal {
        init: false,
        startup: None,
        nmis: 0,
    };
}

/// The local APICs, by vCPU.
#[derive(Debug)]
pub struct Lapics {
    all: Vec<Lapic>,
    signals: Vec<Signal>,
    /// vCPUs, as bits, that INIT has stopped and no start-up IPI has reached.
    stopped: u32,
    /// vCPUs, as bits, that something has come for.
    news: u32,
    current: usize,
    /// Some register page does not lie where it does after reset.
    moved: bool,
    /// Who was last chosen among equals.
    chosen: usize,
}

impl Lapics {
    /// Those of `count` vCPUs, as firmware leaves them: all but the first wait for a start-up IPI.
    pub fn new(clock: &Clock, count: u8) -> Self {
        Lapics {
            all: (0..count)
                .map(|number| Lapic::new(clock.clone(), number))
                .collect(),
            signals: vec![Signal::NONE; count.into()],
            stopped: all_of(count.into()) & !1,
            news: 0,
            current: 0,
            moved: false,
            chosen: 0,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Whose accesses these are from now on.
    #[inline]
    pub fn set_current(&mut self, cpu: usize) {
        self.current = cpu;
    }

    /// Whose accesses these are.
    #[inline]
    pub fn current(&self) -> usize {
        self.current
    }

    /// The local APIC whose turn it is.
    #[inline]
    pub fn own(&mut self) -> &mut Lapic {
        &mut self.all[self.current]
    }

    /// That of `cpu`.
    #[inline]
    pub fn of(&self, cpu: usize) -> &Lapic {
        &self.all[cpu]
    }

    /// That of `cpu`.
    pub fn of_mut(&mut self, cpu: usize) -> &mut Lapic {
        &mut self.all[cpu]
    }

    /// Takes a `wrmsr` of the vCPU whose turn it is ([`Lapic::write_msr`]).
    pub fn write_msr(&mut self, index: u32, value: u64, guest_tsc: u64) -> bool {
        let accepted = self.own().write_msr(index, value, guest_tsc);
        if index == APIC_BASE {
            self.moved = self.all.iter().any(|lapic| lapic.page() != BASE.0);
        }
        accepted
    }

    /// True if some register page does not lie where it does after reset.
    #[inline]
    pub fn moved(&self) -> bool {
        self.moved
    }

    /// True while `cpu` waits for a start-up IPI.
    pub fn stopped(&self, cpu: usize) -> bool {
        self.stopped >> cpu & 1 == 1
    }

    /// What waits for `cpu`.
    #[inline]
    pub fn signal(&self, cpu: usize) -> Signal {
        self.signals[cpu]
    }

    /// Takes what waits for `cpu`.
    pub fn take_signal(&mut self, cpu: usize) -> Signal {
        std::mem::replace(&mut self.signals[cpu], Signal::NONE)
    }

    /// The vCPUs, as bits, that something has come for since the last call.
    #[inline]
    pub fn take_news(&mut self) -> u32 {
        std::mem::take(&mut self.news)
    }

    /// Delivers what the vCPU whose turn it is has sent.
    pub fn deliver_sent(&mut self) {
        if let Some((target, message)) = self.own().take_sent() {
            let sender = 1 << self.current;
            let receivers = match target {
                Target::Addressed(destination) => self.hearers(destination),
                Target::Sender => sender,
                Target::Everybody => all_of(self.all.len()),
                Target::Others => all_of(self.all.len()) & !sender,
            };
            self.deliver(receivers, message);
        }
    }

    /// Delivers a message from the I/O APIC. False if nobody took it.
    pub fn accept(&mut self, destination: Destination, message: Message) -> bool {
        if message.delivery == Delivery::StartUp {
            return false;
        }
        let receivers = self.hearers(destination);
        self.deliver(receivers, message)
    }

    /// The 8259s' output has risen: it is at everybody's LINT0.
    pub fn external_rose(&mut self) {
        for cpu in 0..self.all.len() {
            if self.all[cpu].takes_external() {
                self.news |= 1 << cpu;
            } else if self.all[cpu].lint0_is_nmi() {
                self.nmi(cpu);
            }
        }
    }

    fn hearers(&self, destination: Destination) -> u32 {
        self.those(|lapic| lapic.hears(destination))
    }

    fn those(&self, test: impl Fn(&Lapic) -> bool) -> u32 {
        self.all
            .iter()
            .enumerate()
            .filter(|(_, lapic)| test(lapic))
            .fold(0, |found, (cpu, _)| found | 1 << cpu)
    }

    fn deliver(&mut self, receivers: u32, message: Message) -> bool {
        let Message {
            delivery,
            vector,
            level,
        } = message;
        // One that is switched off hears nothing.
        let receivers = receivers & self.those(Lapic::is_on);
        let mut taken = false;
        match delivery {
            Delivery::Fixed => {
                for cpu in bits(receivers) {
                    taken |= self.request(cpu, vector, level);
                }
            }
            Delivery::LowestPriority => {
                if let Some(cpu) = self.least_busy(receivers) {
                    taken = self.request(cpu, vector, level);
                }
            }
            Delivery::Nmi => {
                bits(receivers).for_each(|cpu| self.nmi(cpu));
                taken = receivers != 0;
            }
            Delivery::Init => {
                bits(receivers).for_each(|cpu| self.init(cpu));
                taken = receivers != 0;
            }
            Delivery::StartUp => {
                // Whoever runs takes no notice; the second of a pair finds the first's work done.
                for cpu in bits(receivers & self.stopped) {
                    self.stopped &= !(1 << cpu);
                    self.signals[cpu].startup = Some(vector);
                    self.news |= 1 << cpu;
                    taken = true;
                }
            }
            Delivery::Smi | Delivery::External | Delivery::Reserved => {}
        }
        taken
    }

    fn request(&mut self, cpu: usize, vector: u8, level: bool) -> bool {
        self.news |= 1 << cpu;
        self.all[cpu].request(vector, level)
    }

    /// A processor that waits for its start-up IPI takes none.
    fn nmi(&mut self, cpu: usize) {
        if !self.stopped(cpu) {
            let nmis = &mut self.signals[cpu].nmis;
            *nmis = (*nmis + 1).min(2);
            self.news |= 1 << cpu;
        }
    }

    /// Sends every processor an INIT, as a machine does that has been suspended or is reset, and leaves
    /// the boot processor's as firmware does.
    pub fn init_all(&mut self) {
        (0..self.all.len()).for_each(|cpu| self.init(cpu));
        self.all[0].wire();
    }

    /// All but the boot processor wait for a start-up IPI then (SDM 3A 9.4.3).
    fn init(&mut self, cpu: usize) {
        self.all[cpu].init();
        self.stopped |= 1 << cpu & !1;
        self.signals[cpu] = Signal {
            init: true,
            ..Signal::NONE
        };
        self.news |= 1 << cpu;
    }

    /// Who of them takes an interrupt of lowest priority: the one whose priority is lowest, in turn
    /// among equals (SDM 3A 11.6.2.4).
    fn least_busy(&mut self, receivers: u32) -> Option<usize> {
        let count = self.all.len();
        let from = self.chosen + 1;
        let chosen = (from..from + count)
            .map(|cpu| cpu % count)
            .filter(|&cpu| receivers >> cpu & 1 == 1 && self.all[cpu].enabled())
            .min_by_key(|&cpu| self.all[cpu].processor_priority())?;
        self.chosen = chosen;
        Some(chosen)
    }
}

/// The lowest `count` bits.
fn all_of(count: usize) -> u32 {
    u32::MAX >> (32 - count)
}

/// The numbers of the bits that are set.
pub(crate) fn bits(mut set: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = set.trailing_zeros() as usize;
        (set != 0).then(|| {
            set &= set - 1;
            lowest
        })
    })
}

impl Device for Lapics {
    fn name(&self) -> &'static str {
        "lapic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        self.own().read(offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        self.own().write(offset, data)
    }

    fn deadline(&self) -> Option<u64> {
        self.all.iter().filter_map(Device::deadline).min()
    }

    fn advance(&mut self, now: u64) {
        for (cpu, lapic) in self.all.iter_mut().enumerate() {
            if lapic.deadline().is_some_and(|deadline| deadline <= now) {
                lapic.advance(now);
                self.news |= 1 << cpu;
            }
        }
    }
}
