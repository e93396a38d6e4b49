//! Two engines in lockstep: what one makes of each piece of guest code is held against the other.
//!
//! A [`Lockstep`] is a [`Vcpu`] over two. The *subject* runs in the machine, a block at a time; the
//! *reference* has a copy of guest memory and no machine. After each step of the subject the
//! reference goes on, instruction by instruction, until it stands where the subject stands. Whatever
//! the machine answered the subject with, the reference is answered with; what it writes must be what
//! the subject wrote; interrupts come to both at the same place. A state that the reference does not
//! come to is a divergence: the run ends with both states and the way there.
//!
//! Compared: general registers, RIP, RFLAGS but for the arithmetic flags (a block may leave flags that
//! nobody reads as they are; a wrong one shows in what is made of it), segments' selectors and bases,
//! CR0, CR2, CR3, CR4, EFER; at the end, and after each [`MEMORY_STEPS`] steps, all of memory.
//!
//! Not compared: vector and x87 registers, but by what they leave in memory. Instructions whose result
//! is the processor's own (time-stamp counter, random numbers, CPUID): there the reference takes over the
//! subject's state and memory.
//!
//! A reference may step over more than one instruction at once, as KVM does over some branches. So a
//! step of the subject that it did not stop at is followed by single instructions, of which it has to
//! meet one.

mod state;
mod vcpu;

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::devices::lapic;
use crate::{CpuState, Error, Exit, GuestRam, Stepping, Supply, Vcpu};
use state::{difference, has_own_result, linear, same};

/// Instructions that the reference may need for one step of the subject: a block has fewer, and a
/// string instruction counts once for each element.
const MOST_INSTRUCTIONS: usize = 20_000;
/// Instructions after a step, of which the reference has to meet one.
const GRACE: usize = 8;
/// Steps between two looks at all of memory.
const MEMORY_STEPS: u64 = 1 << 18;
/// Steps of the subject that the reference may wait for it at an access.
const MOST_STALLS: u32 = 64;
/// Places kept for the report.
const KEPT: usize = 24;
/// Arithmetic flags, and RF.
const UNCOMPARED_FLAGS: u64 = 0x8d5 | 1 << 16;

/// An access that the subject made, one item.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Access {
    /// Port, or physical address.
    at: u64,
    memory: bool,
    write: bool,
    bytes: Vec<u8>,
}

/// The exit of the subject that waits for the machine's answer.
#[derive(Clone, Copy, Debug)]
enum Asked {
    Nothing,
    Items { at: u64, memory: bool, size: usize },
    Msr { index: u32 },
    Accepted { index: u32 },
}

/// The answer to an access to an MSR.
#[derive(Clone, Copy, Debug)]
enum MsrAnswer {
    Read(u32, Option<u64>),
    Write(u32, bool),
}

/// What the reference has asked for.
#[derive(Debug)]
enum Held {
    Items(Vec<Access>),
    Msr { index: u32 },
}

/// How far the reference came.
enum Step {
    Done,
    /// It is at an access that the subject has not made yet, since it ran past where that stands.
    Stalled,
    Diverged(String),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    /// Steps of the subject that the reference has met.
    steps: u64,
    /// Steps of the reference.
    instructions: u64,
    /// States taken over, because an instruction's result is the processor's own.
    taken_over: u64,
}

/// Makes `copy`, which is fresh, hold what `memory` holds.
///
/// # Errors
/// [`Error::Engine`] if they are not of one size.
pub fn copy(memory: &GuestRam, copy: &GuestRam) -> Result<(), Error> {
    let mut chunk = vec![0; 1 << 20];
    for region in memory.iter() {
        for offset in (0..region.len()).step_by(chunk.len()) {
            let bytes = chunk.len().min((region.len() - offset) as usize);
            let at = GuestAddress(region.start_addr().0 + offset);
            let chunk = &mut chunk[..bytes];
            let read = memory.read_slice(chunk, at);
            // What is zero is so in the copy too, and need not be touched.
            let done = match chunk.iter().any(|&byte| byte != 0) {
                true => read.and_then(|()| copy.write_slice(chunk, at)),
                false => read,
            };
            done.map_err(|error| Error::Engine(format!("copy of guest memory: {error}")))?;
        }
    }
    Ok(())
}

/// A subject and its reference, as one vCPU.
pub struct Lockstep {
    subject: Box<dyn Vcpu>,
    reference: Box<dyn Vcpu>,
    memory: Arc<GuestRam>,
    copy: Arc<GuestRam>,
    accesses: VecDeque<Access>,
    msrs: VecDeque<MsrAnswer>,
    asked: Asked,
    buffer: Vec<u8>,
    msr: Option<u64>,
    accepted: bool,
    progress: Progress,
    /// Where the subject stood after its last steps.
    places: VecDeque<u64>,
    /// What the reference waits for.
    held: Option<Held>,
    /// It has executed an instruction whose result is its own since the last state that both had.
    own_result: bool,
    /// Steps in a row at which it did.
    stalls: u32,
    /// The reference stands at the subject's last compared state.
    level: bool,
}

impl Lockstep {
    /// `subject` over `memory`, `reference` over `copy`, whose contents are the same; both in the state
    /// that the guest starts in.
    ///
    /// # Errors
    /// [`Error::Engine`] if one of them can't be stepped.
    pub fn new(
        mut subject: Box<dyn Vcpu>,
        memory: Arc<GuestRam>,
        mut reference: Box<dyn Vcpu>,
        copy: Arc<GuestRam>,
    ) -> Result<Lockstep, Error> {
        subject.set_stepping(Some(Stepping::Block))?;
        reference.set_stepping(Some(Stepping::Instruction))?;
        Ok(Lockstep {
            subject,
            reference,
            memory,
            copy,
            accesses: VecDeque::new(),
            msrs: VecDeque::new(),
            asked: Asked::Nothing,
            buffer: Vec::new(),
            msr: None,
            accepted: false,
            progress: Progress::default(),
            places: VecDeque::with_capacity(KEPT),
            held: None,
            own_result: false,
            stalls: 0,
            level: true,
        })
    }

    /// Hands the machine's answer on to the subject, and keeps it for the reference.
    fn answered(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.asked, Asked::Nothing) {
            Asked::Nothing => {}
            Asked::Items { at, memory, size } => {
                self.subject.supply(Supply::Data(&self.buffer))?;
                self.keep(at, memory, false, size);
            }
            Asked::Msr { index } => {
                self.subject.supply(Supply::Msr(self.msr))?;
                self.msrs.push_back(MsrAnswer::Read(index, self.msr));
            }
            Asked::Accepted { index } => {
                self.subject.supply(Supply::Accepted(self.accepted))?;
                self.msrs.push_back(MsrAnswer::Write(index, self.accepted));
            }
        }
        Ok(())
    }

    fn keep(&mut self, at: u64, memory: bool, write: bool, size: usize) {
        for bytes in self.buffer.chunks(size.max(1)) {
            self.accesses.push_back(Access {
                at,
                memory,
                write,
                bytes: bytes.to_vec(),
            });
        }
    }

    /// Brings the reference to where the subject stands.
    fn catch_up(&mut self) -> Result<Step, Error> {
        let mut wanted = self.subject.state()?;
        let mut met = vec![self.reference.state()?];
        for extra in 0..=GRACE {
            if extra > 0 {
                // The reference may have run past it: let the subject follow.
                self.subject.set_stepping(Some(Stepping::Instruction))?;
                let stepped = matches!(self.subject.run()?, Exit::Stepped);
                self.subject.set_stepping(Some(Stepping::Block))?;
                if !stepped {
                    break;
                }
                wanted = self.subject.state()?;
            }
            if self.meets(&met, &wanted)? {
                return Ok(Step::Done);
            }
            // Of the states that it has come by, only the last can be gone on from.
            let most = if extra == 0 { MOST_INSTRUCTIONS } else { GRACE };
            let goal = wanted.segments[CpuState::CS].base.wrapping_add(wanted.rip);
            for _ in 0..most {
                if let Some(last) = met.last() {
                    self.look_for_own_result(last);
                }
                let here = met.last().is_some_and(|last| last.rip == wanted.rip);
                self.reference.set_stepping(Some(match here {
                    true => Stepping::Instruction,
                    false => Stepping::Towards(goal),
                }))?;
                match self.step_reference()? {
                    Step::Done => {}
                    other => return Ok(other),
                }
                met.push(self.reference.state()?);
                if self.meets(&met, &wanted)? {
                    return Ok(Step::Done);
                }
            }
        }
        let last = met.last().copied().unwrap_or_default();
        // The state that stands nearest: the same place, if it has come by there.
        let near = met.iter().rev().find(|state| state.rip == wanted.rip);
        Ok(Step::Diverged(difference(near.unwrap_or(&last), &wanted)))
    }

    /// True if the last of the reference's states is the wanted one, or would be but for a result that
    /// is the processor's own: then it takes the subject's.
    fn meets(&mut self, met: &[CpuState], wanted: &CpuState) -> Result<bool, Error> {
        let Some(last) = met.last() else {
            return Ok(false);
        };
        if !same(last, wanted) {
            let place = last.rip == wanted.rip && last.cr3 == wanted.cr3;
            if !place || !self.own_result {
                return Ok(false);
            }
            self.reference.set_state(wanted)?;
            // What it made of the result may stand in memory by now.
            let mut pages = Vec::new();
            self.differing_pages(|at, ours, _| {
                let _ = self.copy.write_slice(ours, GuestAddress(at));
                pages.push(at >> 12);
                true
            });
            self.reference.memory_written(&pages);
            self.progress.taken_over += 1;
        }
        self.own_result = false;
        Ok(true)
    }

    /// Looks whether the reference is at an instruction with a result of its own.
    fn look_for_own_result(&mut self, state: &CpuState) {
        let mut code = [0; 4];
        let at = state.segments[CpuState::CS].base.wrapping_add(state.rip);
        let at = linear(&self.copy, state, at).map(GuestAddress);
        let read = at.is_some_and(|at| self.copy.read_slice(&mut code, at).is_ok());
        self.own_result |= read && has_own_result(&code);
    }

    /// One instruction of the reference.
    fn step_reference(&mut self) -> Result<Step, Error> {
        loop {
            if let Some(held) = self.held.take() {
                let step = self.settle(&held)?;
                if matches!(step, Step::Stalled) {
                    self.held = Some(held);
                }
                self.progress.instructions += 1;
                return Ok(step);
            }
            let (at, memory, write, size, bytes) = match self.reference.run()? {
                Exit::Stepped => {
                    self.progress.instructions += 1;
                    return Ok(Step::Done);
                }
                Exit::PioIn { port, size, data } => {
                    (port.into(), false, false, size.into(), data.to_vec())
                }
                Exit::PioOut { port, size, data } => {
                    (port.into(), false, true, size.into(), data.to_vec())
                }
                Exit::MmioRead { addr, data, .. } => {
                    (addr.0, true, false, data.len(), data.to_vec())
                }
                Exit::MmioWrite { addr, data } => (addr.0, true, true, data.len(), data.to_vec()),
                Exit::MsrRead { index, .. } => {
                    self.held = Some(Held::Msr { index });
                    continue;
                }
                Exit::MsrWrite { index, .. } => {
                    self.held = Some(Held::Msr { index });
                    continue;
                }
                Exit::Hlt => return Ok(Step::Done),
                Exit::InterruptWindow | Exit::Interrupted => continue,
                Exit::Shutdown => {
                    return Ok(Step::Diverged("the reference: triple fault".to_owned()));
                }
                Exit::Internal { message } => {
                    return Ok(Step::Diverged(format!("the reference: {message}")));
                }
            };
            let items = bytes.chunks(size).map(|bytes| Access {
                at,
                memory,
                write,
                bytes: bytes.to_vec(),
            });
            self.held = Some(Held::Items(items.collect()));
        }
    }

    /// Answers what the reference asks for, if the subject has asked for it already.
    fn settle(&mut self, held: &Held) -> Result<Step, Error> {
        let items = match held {
            Held::Items(items) => items,
            &Held::Msr { index } => {
                let answer = match self.msrs.front() {
                    Some(&MsrAnswer::Read(other, value)) if other == index => Supply::Msr(value),
                    Some(&MsrAnswer::Write(other, value)) if other == index => {
                        Supply::Accepted(value)
                    }
                    Some(_) | None if lapic::owns_msr(index) => return Ok(Step::Stalled),
                    // One that the subject did not leave for faults.
                    Some(_) | None => {
                        self.reference.supply(Supply::Nothing)?;
                        return Ok(Step::Done);
                    }
                };
                self.msrs.pop_front();
                self.reference.supply(answer)?;
                return Ok(Step::Done);
            }
        };
        if self.accesses.len() < items.len() {
            return Ok(Step::Stalled);
        }
        let mut data = Vec::new();
        for item in items {
            let Some(ours) = self.accesses.pop_front() else {
                return Ok(Step::Stalled);
            };
            let alike = ours.at == item.at
                && (ours.memory, ours.write) == (item.memory, item.write)
                && ours.bytes.len() == item.bytes.len()
                && (!item.write || ours.bytes == item.bytes);
            if !alike {
                return Ok(Step::Diverged(format!("{ours}, the reference {item}")));
            }
            data.extend(ours.bytes);
        }
        self.reference.supply(match items.first() {
            Some(item) if !item.write => Supply::Data(&data),
            Some(_) | None => Supply::Nothing,
        })?;
        Ok(Step::Done)
    }

    /// Compares, unless that has been done for this state.
    fn compare(&mut self) -> Result<Option<String>, Error> {
        if std::mem::replace(&mut self.level, true) {
            return Ok(None);
        }
        let place = self.subject.state()?.rip;
        if self.places.len() == KEPT {
            self.places.pop_front();
        }
        self.places.push_back(place);
        match self.catch_up()? {
            Step::Done => self.stalls = 0,
            Step::Stalled if self.stalls < MOST_STALLS => {
                self.stalls += 1;
                return Ok(None);
            }
            Step::Stalled => {
                let reason = match &self.held {
                    Some(Held::Items(items)) => items.first().map(Access::to_string),
                    Some(Held::Msr { index }) => Some(format!("accesses MSR {index:#x}")),
                    None => None,
                };
                let reason = reason.unwrap_or_default();
                return Ok(Some(
                    self.report(&format!("the reference {reason}, the subject does not")),
                ));
            }
            Step::Diverged(reason) => return Ok(Some(self.report(&reason))),
        }
        self.progress.steps += 1;
        if self.progress.steps.is_multiple_of(MEMORY_STEPS)
            && let Some(reason) = self.memory_differs()
        {
            return Ok(Some(self.report(&reason)));
        }
        Ok(None)
    }

    /// The first difference in memory, in words.
    fn memory_differs(&self) -> Option<String> {
        let mut found = None;
        self.differing_pages(|at, ours, theirs| {
            let byte = ours.iter().zip(theirs).position(|(a, b)| a != b);
            found = byte.map(|byte| {
                format!(
                    "memory at {:#x}: {:#04x}, the reference has {:#04x}",
                    at + byte as u64,
                    ours[byte],
                    theirs[byte]
                )
            });
            false
        });
        found
    }

    /// Calls `each` with address and both contents of the pages that differ, until it says no.
    fn differing_pages(&self, mut each: impl FnMut(u64, &[u8], &[u8]) -> bool) {
        let mut pages = [[0u8; 4096]; 2];
        for region in self.memory.iter() {
            for offset in (0..region.len()).step_by(4096) {
                let at = region.start_addr().0 + offset;
                let bytes = (region.len() - offset).min(4096) as usize;
                let [ours, theirs] = pages.each_mut().map(|page| &mut page[..bytes]);
                let read = |ram: &GuestRam, page: &mut [u8]| {
                    ram.read_slice(page, GuestAddress(at)).is_ok()
                };
                let both = read(&self.memory, ours) && read(&self.copy, theirs);
                if both && ours != theirs && !each(at, ours, theirs) {
                    return;
                }
            }
        }
    }

    fn report(&self, reason: &str) -> String {
        let mut text = format!(
            "lockstep: diverged after {} steps ({} instructions): {reason}; the way there:",
            self.progress.steps, self.progress.instructions
        );
        for place in &self.places {
            let _ = write!(text, " {place:#x}");
        }
        text
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Access {
            at,
            memory,
            write,
            bytes,
        } = self;
        let place = if *memory { "address" } else { "port" };
        match write {
            true => write!(f, "writes {bytes:02x?} to {place} {at:#x}"),
            false => write!(f, "reads {} bytes of {place} {at:#x}", bytes.len()),
        }
    }
}
