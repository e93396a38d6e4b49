//! A machine that does what the architecture says, in plain software: the oracle's platform.
//!
//! It models exactly the state that an operation can leave behind: a scratch register, one page
//! with its entry and its cached translation, a count of faults, the task priority, the interrupt
//! flag; for address spaces the pages of each; for devices what was written to the disk, the peer on
//! the network, and a count of interrupts. Its rings are one, and nothing ever fails.

use crate::{
    Kernel, Platform, Refusal, Workload,
    io::{Direction, Io, SLOT_WORDS, SLOTS, Timer, block, net},
    micro::{Micro, PAGE_WORDS, aspace, ctxsw, pfstorm},
    nano::{
        Operation, Pages, WORD_A, WORD_B, cpuid, port_in,
        syscall::{self, Syscalls},
    },
};

use alloc::collections::BTreeMap;

/// What the probe page's entry points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    A,
    B,
}

/// The oracle's machine.
#[derive(Debug)]
pub struct Model<'a> {
    arena: &'a mut [u64],
    scratch: u8,
    /// The probe page's entry; `None` is not present.
    entry: Option<Frame>,
    /// The translation in use, if one is cached: survives a change of the entry.
    cached: Option<Frame>,
    faults: u64,
    priority: u64,
    unmasked: bool,
    pages: alloc::boxed::Box<Pages>,
    /// The own page of each space of ctxsw.
    spaces: [[u64; PAGE_WORDS]; ctxsw::MOST],
    /// Blocks that were written; all others are as the disk came.
    written: BTreeMap<u64, Page>,
    peer: net::Peer,
    answer: Option<u64>,
    interrupts: u64,
}

/// A block of the disk.
type Page = [u64; SLOT_WORDS as usize];

impl<'a> Model<'a> {
    /// A machine with that much memory.
    pub fn new(arena: &'a mut [u64]) -> Self {
        Model {
            arena,
            scratch: 0,
            entry: None,
            cached: None,
            faults: 0,
            priority: 0,
            unmasked: false,
            pages: alloc::boxed::Box::new(Pages::new()),
            spaces: [[0; PAGE_WORDS]; ctxsw::MOST],
            written: BTreeMap::new(),
            peer: net::Peer::default(),
            answer: None,
            interrupts: 0,
        }
    }

    /// A slot of the arena.
    fn slot(&mut self, slot: u64) -> &mut [u64] {
        let first = (slot % SLOTS * SLOT_WORDS) as usize;
        &mut self.arena[first..first + SLOT_WORDS as usize]
    }

    /// Takes an interrupt; returns how many it has taken.
    fn interrupt(&mut self) -> u64 {
        self.interrupts += 1;
        self.interrupts
    }

    /// Reads the probe page; a fault maps it to frame A, as the guest's handler does.
    fn probe(&mut self) -> u64 {
        let frame = match self.cached.or(self.entry) {
            Some(frame) => frame,
            None => {
                self.faults += 1;
                self.entry = Some(Frame::A);
                Frame::A
            }
        };
        self.cached = Some(frame);
        match frame {
            Frame::A => WORD_A,
            Frame::B => WORD_B,
        }
    }
}

impl Platform for Model<'_> {
    fn arena_words(&self) -> u64 {
        self.arena.len() as u64
    }

    fn compute(&mut self, kernel: Kernel, size: u64, iterations: u64) -> Result<u64, Refusal> {
        Ok(kernel(self.arena, size, iterations))
    }

    fn arm(&mut self, operation: Operation) -> Result<(), Refusal> {
        match operation {
            Operation::In => self.scratch = port_in::VALUE,
            Operation::Cr3Reload | Operation::Cr3Touch | Operation::Invlpg => {
                self.cached = Some(Frame::A);
                self.entry = Some(Frame::B);
            }
            Operation::PageFault => {
                self.cached = None;
                self.entry = None;
                self.faults = 0;
            }
            Operation::DivZero | Operation::Int3 => self.faults = 0,
            Operation::RepMovsb | Operation::RepStosq => self.pages.start(),
            Operation::PteMod => {
                self.entry = Some(Frame::A);
                self.cached = Some(Frame::A);
            }
            Operation::Syscall
            | Operation::Hypercall
            | Operation::Out
            | Operation::Cpuid
            | Operation::CallRet
            | Operation::Cr8Write
            | Operation::CliSti
            | Operation::PushfPopf => {}
        }
        Ok(())
    }

    fn settle(&mut self, operation: Operation) -> u64 {
        match operation {
            Operation::Out => self.scratch.into(),
            Operation::Cr3Reload | Operation::Cr3Touch | Operation::Invlpg => self.probe(),
            Operation::PageFault | Operation::DivZero | Operation::Int3 => self.faults,
            Operation::RepMovsb | Operation::RepStosq => self.pages.settled(),
            Operation::Cr8Write => self.priority,
            Operation::PteMod => {
                self.invalidate();
                self.probe()
            }
            Operation::CliSti => self.unmasked.into(),
            Operation::Syscall
            | Operation::Hypercall
            | Operation::In
            | Operation::Cpuid
            | Operation::CallRet
            | Operation::PushfPopf => 0,
        }
    }

    fn syscalls(&mut self, iterations: u64) -> Result<u64, Refusal> {
        Ok(syscall::calls(self, iterations))
    }

    fn hypercall(&mut self) -> u64 {
        0
    }

    fn port_in(&mut self) -> u8 {
        self.scratch
    }

    fn port_out(&mut self, value: u8) {
        self.scratch = value;
    }

    fn cpuid(&mut self) -> u32 {
        cpuid::ALWAYS
    }

    fn reload_root(&mut self) {
        self.cached = None;
    }

    fn invalidate(&mut self) {
        self.cached = None;
    }

    fn page_fault(&mut self) -> u64 {
        let word = self.probe();
        self.entry = None;
        self.invalidate();
        word.wrapping_add(self.faults)
    }

    fn divide_by_zero(&mut self) -> u64 {
        self.faults += 1;
        self.faults
    }

    fn call_return(&mut self, value: u64) -> u64 {
        value.wrapping_mul(3).wrapping_add(1)
    }

    fn set_priority(&mut self, value: u64) {
        self.priority = value;
    }

    fn modify_entry(&mut self, which: u64) {
        self.entry = Some(if which & 1 == 0 { Frame::A } else { Frame::B });
    }

    fn mask_unmask(&mut self) {
        self.unmasked = true;
    }

    fn breakpoint(&mut self) -> u64 {
        self.faults += 1;
        self.faults
    }

    fn reload_and_touch(&mut self) -> u64 {
        self.reload_root();
        self.probe()
    }

    fn keep_carry(&mut self, value: u64) -> u64 {
        value & 1
    }

    fn copy_page(&mut self, value: u64) -> u64 {
        self.pages.copy(value)
    }

    fn fill_page(&mut self, value: u64) -> u64 {
        self.pages.fill(value)
    }

    fn set_up(&mut self, micro: Micro, _size: u64) -> Result<(), Refusal> {
        match micro {
            Micro::Switch { spaces } => {
                for (space, page) in (0..spaces).zip(&mut self.spaces) {
                    page[0] = ctxsw::seed(space);
                }
            }
            Micro::Storm => self.faults = 0,
            Micro::Space => {}
        }
        Ok(())
    }

    fn take_down(&mut self, micro: Micro) -> u64 {
        match micro {
            Micro::Storm => self.faults,
            Micro::Switch { .. } | Micro::Space => 0,
        }
    }

    fn switch(&mut self, space: u64) -> Result<u64, Refusal> {
        Ok(ctxsw::step(&mut self.spaces[space as usize], 1, 1))
    }

    /// Faults can't be taken in plain software: what they lead to is laid out beforehand.
    fn storm(&mut self, pages: u64, round: u64) -> Result<u64, Refusal> {
        let mut memory = alloc::vec![0; pages as usize * PAGE_WORDS];
        let touched = (0..pages.next_power_of_two())
            .map(|touch| pfstorm::order(touch, pages, round))
            .filter(|&page| page < pages);
        for (fault, page) in (0..).zip(touched) {
            memory[page as usize * PAGE_WORDS] = pfstorm::tag(fault);
            self.faults += 1;
        }
        Ok(pfstorm::storm(&mut memory, pages, round))
    }

    fn space(&mut self, pages: u64, life: u64) -> Result<u64, Refusal> {
        let mut memory = alloc::vec![0; pages as usize * PAGE_WORDS];
        for (page, words) in (0..).zip(memory.chunks_mut(PAGE_WORDS)) {
            words[0] = aspace::content(life, page);
        }
        Ok(aspace::visit(&mut memory, pages, 1))
    }

    fn open(&mut self, _io: Io, _size: u64) -> Result<(), Refusal> {
        self.interrupts = 0;
        Ok(())
    }

    fn close(&mut self, io: Io) -> u64 {
        match io {
            Io::Timer(_) | Io::HaltWake | Io::SelfInterrupt => self.interrupts,
            Io::Console | Io::Block(_) | Io::Echo | Io::Stream => 0,
        }
    }

    fn peek(&mut self, word: u64) -> u64 {
        self.arena[word as usize]
    }

    fn poke(&mut self, word: u64, value: u64) {
        self.arena[word as usize] = value;
    }

    fn transfer(&mut self, direction: Direction, blocks: &[u64], slot: u64) -> Result<(), Refusal> {
        for (slot, &number) in (slot..).zip(blocks) {
            match direction {
                Direction::Read => {
                    let page = self.written.get(&number).copied();
                    let page = page.unwrap_or_else(|| block::whole(number));
                    self.slot(slot).copy_from_slice(&page);
                }
                Direction::Write => {
                    let mut page = [0; SLOT_WORDS as usize];
                    page.copy_from_slice(self.slot(slot));
                    self.written.insert(number, page);
                }
            }
        }
        Ok(())
    }

    fn flush_disk(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn transmit(&mut self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        for slot in slot..slot + count {
            let words = self.slot(slot).iter();
            let mut frame: alloc::vec::Vec<u8> = words.flat_map(|w| w.to_le_bytes()).collect();
            let Some(length) = self.peer.answer(&mut frame, bytes as usize) else {
                continue;
            };
            for (word, bytes) in self.slot(net::SENT).iter_mut().zip(frame.chunks(8)) {
                let bytes = bytes.try_into().expect("a page is words");
                *word = u64::from_le_bytes(bytes);
            }
            self.answer = Some(length as u64);
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        match self.answer.take() {
            Some(length) => Ok((net::SENT, length)),
            None => Err(Refusal::Broken("the model's peer has no answer")),
        }
    }

    fn send_line(&mut self, _line: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn expire(&mut self, _timer: Timer, _microseconds: u64) -> Result<u64, Refusal> {
        Ok(self.interrupt())
    }

    fn wake(&mut self, _microseconds: u64) -> Result<u64, Refusal> {
        Ok(self.interrupt())
    }

    fn self_interrupt(&mut self) -> Result<u64, Refusal> {
        Ok(self.interrupt())
    }
}

impl Syscalls for Model<'_> {
    fn syscall(&mut self, argument: u64) -> u64 {
        syscall::answer(argument)
    }
}

/// The checksum that every machine must come to. Size 0 and iterations 0 stand for the
/// catalogue's defaults. Takes as long as the workload takes natively.
///
/// # Errors
/// The size is refused, or there is no memory for it here.
pub fn oracle(workload: &Workload, size: u64, iterations: u64) -> Result<u64, Refusal> {
    let (size, iterations) = workload.resolve(size, iterations);
    let words = workload.words(size).unwrap_or(u64::MAX);
    let mut arena = alloc::vec::Vec::new();
    if usize::try_from(words).map(|words| arena.try_reserve_exact(words)) != Ok(Ok(())) {
        return Err(Refusal::TooLarge {
            size,
            words,
            available: 0,
        });
    }
    arena.resize(words as usize, 0);
    crate::run(&mut Model::new(&mut arena), workload, size, iterations)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_translation_shows_in_the_checksum() {
        // What a machine would settle with whose cr3 reload flushes nothing.
        let mut model = Model::new(&mut []);
        model.arm(Operation::Cr3Reload).unwrap();
        assert_eq!(model.probe(), WORD_A);
        model.reload_root();
        assert_eq!(model.settle(Operation::Cr3Reload), WORD_B);
    }

    #[test]
    fn every_page_fault_faults() {
        let mut model = Model::new(&mut []);
        model.arm(Operation::PageFault).unwrap();
        for count in 1..5 {
            assert_eq!(model.page_fault(), WORD_A + count);
        }
        assert_eq!(model.settle(Operation::PageFault), 4);
    }
}
