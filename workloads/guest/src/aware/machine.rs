//! The machine that workloads see: what an unaware kernel does by privileged instruction is done
//! here by hypercall, and what it does with ring 0's page tables here with a user process's.
//!
//! | operation | here |
//! |---|---|
//! | `syscall` | a loop in user mode; the kernel is entered and left for each call |
//! | `hypercall` | fpu_taskswitch, which has nothing to do |
//! | `in`, `cr8wr` | no meaning: an aware guest has neither ports nor a task priority |
//! | `out` | the console's doorbell; the value rides along in memory |
//! | `cpuid` | the instruction, which no one traps |
//! | `cr3_reload` | mmuext_op NEW_BASEPTR of the current root |
//! | `invlpg` | mmuext_op INVLPG_LOCAL of the probe page |
//! | `pgfault` | user mode reads probe page after probe page; the handler maps each with update_va_mapping, and after [`PROBES`] of them one system call and one update_va_mapping take all away |
//! | `divzero` | in user mode; the handler skips the instruction |
//! | `callret` | in the kernel |
//! | `ptemod` | [`PROBES`] entries in use, each changed by an update_va_mapping, in one multicall that moves neighbouring pages to neighbouring frames; then user mode reads all pages and compares, since entries that nobody uses cost nothing to change |
//! | `cli_sti` | stores to the shared page, and the test of pending events |
//! | `int3` | in user mode; the handler counts |
//! | `cr3_touch` | as `cr3_reload`, then user mode reads the probe page |
//! | `pushf_popf`, `rep_movsb`, `rep_stosq` | the instructions, in the kernel |

mod trial;

use super::{
    bus,
    devices::Devices,
    events,
    frames::Number,
    hypercall,
    space::{First, PROBE, PROBES, STORM, Space},
    tables::{CONSTANTS, entry},
    upcalls::{MENDED, STORM_LEFT, STORM_NEXT, STORM_PAGES},
    user,
};
use crate::cpu;
use abi::hypercall::{MulticallEntry, mmuext};
use core::{arch::asm, sync::atomic::Ordering::Relaxed};
use programs::{
    Kernel, Platform, Refusal,
    io::{Direction, Histogram, Io, Timer, histogram::Scale},
    micro::{Micro, PAGE_WORDS, aspace, ctxsw, pfstorm},
    nano::{Operation, Pages, WORD_A, WORD_B},
};

/// What settling returns once a hypercall has failed: no checksum comes out right.
const BROKEN: u64 = 0xbad0_bad0_bad0_bad0;

/// What string instructions copy from and to.
static PAGES: Pages = Pages::new();

/// The probe pages, as an arena.
const PROBE_ARENA: (u64, u64) = (PROBE, PROBES * PAGE_WORDS as u64);

/// This machine.
#[derive(Debug)]
pub(super) struct Machine {
    first: First,
    /// The spaces of ctxsw.
    spaces: [Option<Space>; ctxsw::MOST],
    /// Spaces created less spaces destroyed.
    alive: u64,
    /// The value of the last `out`.
    scratch: u8,
    /// A hypercall of the measured loop has failed, or a page did not show what it should.
    broken: bool,
    /// Bit of each probe page whose entry is that of frame B.
    shown: u64,
    /// Entries changed since `ptemod` started.
    changed: u64,
    queue: [MulticallEntry; PROBES as usize],
    devices: Devices,
}

impl Machine {
    /// The machine with this first space.
    pub(super) fn new(first: First, devices: Devices) -> Self {
        Machine {
            first,
            spaces: [const { None }; ctxsw::MOST],
            alive: 0,
            scratch: 0,
            broken: false,
            shown: 0,
            changed: 0,
            queue: [MulticallEntry::default(); PROBES as usize],
            devices,
        }
    }

    /// A probe page's entry for its frame A (even) or B (odd).
    #[inline(always)]
    fn probe_entry(&self, page: u64, which: u64) -> u64 {
        let [a, b] = self.first.probes;
        let first = if which & 1 == 0 { a } else { b };
        entry(Number(first.0 + page), CONSTANTS)
    }

    #[inline(always)]
    fn note<T, E>(&mut self, result: Result<T, E>) {
        self.broken |= result.is_err();
    }

    /// Reads the first probe page in user mode.
    fn read_probe(&mut self) -> u64 {
        self.peek_page(0)
    }

    fn peek_page(&mut self, page: u64) -> u64 {
        let arena = (PROBE + page * 4096, PAGE_WORDS as u64);
        let word = self.first.call(user::peek, arena, 1, 1);
        self.note(word);
        word.unwrap_or(BROKEN)
    }

    fn unmap_probes(&mut self) {
        let unmapped = hypercall::update_va_mapping(PROBE, 0, PROBES);
        self.note(unmapped);
    }

    fn end_spaces(&mut self) -> Result<(), Refusal> {
        for slot in &mut self.spaces {
            if let Some(space) = slot.take() {
                self.alive -= 1;
                space.destroy()?;
            }
        }
        Ok(())
    }
}

impl Platform for Machine {
    fn arena_words(&self) -> u64 {
        self.first.words
    }

    fn compute(&mut self, kernel: Kernel, size: u64, iterations: u64) -> Result<u64, Refusal> {
        let arena = (super::space::ARENA, self.first.words);
        self.first.call(kernel, arena, size, iterations)
    }

    fn arm(&mut self, operation: Operation) -> Result<(), Refusal> {
        match operation {
            Operation::In => {
                return Err(Refusal::Unsupported("an aware guest has no ports to read"));
            }
            Operation::Cr8Write => {
                return Err(Refusal::Unsupported("an aware guest has no task priority"));
            }
            Operation::Syscall
            | Operation::Hypercall
            | Operation::Out
            | Operation::Cpuid
            | Operation::Cr3Reload
            | Operation::Invlpg
            | Operation::PageFault
            | Operation::DivZero
            | Operation::CallRet
            | Operation::PteMod
            | Operation::CliSti
            | Operation::Int3
            | Operation::Cr3Touch
            | Operation::PushfPopf
            | Operation::RepMovsb
            | Operation::RepStosq => {}
        }
        self.start(operation);
        let (expected, otherwise) = trial::expectation(operation);
        let tried = self.trial(operation);
        if tried? != expected || self.broken {
            self.stop();
            return Err(Refusal::Broken(otherwise));
        }
        self.start(operation);
        Ok(())
    }

    fn settle(&mut self, operation: Operation) -> u64 {
        let left = match operation {
            Operation::Out => self.scratch.into(),
            Operation::Cr3Reload | Operation::Cr3Touch | Operation::Invlpg => self.read_probe(),
            Operation::PageFault | Operation::DivZero | Operation::Int3 => MENDED.load(Relaxed),
            Operation::RepMovsb | Operation::RepStosq => PAGES.settled(),
            Operation::PteMod => {
                let last = self.changed.wrapping_sub(1);
                let word = self.peek_page(last % PROBES);
                // A batch moves all pages to A or all to B; a single page would go to and fro.
                if (last ^ (last / PROBES)) & 1 == 0 {
                    word
                } else {
                    word ^ WORD_A ^ WORD_B
                }
            }
            Operation::CliSti => events::unmasked().into(),
            Operation::Syscall
            | Operation::Hypercall
            | Operation::In
            | Operation::Cpuid
            | Operation::CallRet
            | Operation::Cr8Write
            | Operation::PushfPopf => 0,
        };
        self.stop();
        if self.broken { BROKEN } else { left }
    }

    fn syscalls(&mut self, iterations: u64) -> Result<u64, Refusal> {
        self.compute(user::syscalls, 1, iterations)
    }

    #[inline(always)]
    fn hypercall(&mut self) -> u64 {
        hypercall::fpu_taskswitch().unwrap_or(BROKEN)
    }

    /// Never called: [`Platform::arm`] refuses.
    fn port_in(&mut self) -> u8 {
        self.scratch
    }

    #[inline(always)]
    fn port_out(&mut self, value: u8) {
        self.scratch = value;
        let rung = hypercall::doorbell();
        self.note(rung);
    }

    #[inline(always)]
    fn cpuid(&mut self) -> u32 {
        cpu::feature_flags()
    }

    #[inline(always)]
    fn reload_root(&mut self) {
        let reloaded = hypercall::mmuext(mmuext::NEW_BASEPTR, self.first.tree.root.0);
        self.note(reloaded);
    }

    #[inline(always)]
    fn invalidate(&mut self) {
        let flushed = hypercall::mmuext(mmuext::INVLPG_LOCAL, PROBE);
        self.note(flushed);
    }

    fn page_fault(&mut self) -> u64 {
        let word = self.read_probe();
        self.unmap_probes();
        word.wrapping_add(MENDED.load(Relaxed))
    }

    fn page_faults(&mut self, iterations: u64) -> Result<u64, Refusal> {
        let sum = self.first.call(user::touches, PROBE_ARENA, 1, iterations)?;
        self.unmap_probes();
        Ok(sum)
    }

    fn divide_by_zero(&mut self) -> u64 {
        let divided = self.divide_errors(1);
        self.note(divided);
        MENDED.load(Relaxed)
    }

    fn divide_errors(&mut self, iterations: u64) -> Result<u64, Refusal> {
        self.compute(user::divisions, 1, iterations)
    }

    #[inline(always)]
    fn call_return(&mut self, value: u64) -> u64 {
        let result;
        // SAFETY: aware_callee changes rax alone; the kernel has no red zone.
        unsafe {
            asm!("call aware_callee", inout("rax") value => result, options(nomem, preserves_flags))
        };
        result
    }

    /// Never called: [`Platform::arm`] refuses.
    fn set_priority(&mut self, _value: u64) {}

    fn modify_entry(&mut self, which: u64) {
        let modified = hypercall::update_va_mapping(PROBE, self.probe_entry(0, which), 1);
        self.note(modified);
    }

    fn modify_entries(&mut self, iterations: u64) -> Result<u64, Refusal> {
        let mut left = iterations;
        while left != 0 {
            let batch = left.min(PROBES);
            for page in 0..batch {
                let which = (self.changed / PROBES) & 1;
                self.changed += 1;
                let entry = self.probe_entry(page, which);
                if let Some(slot) = self.queue.get_mut(page as usize) {
                    *slot = hypercall::queued_update(PROBE + page * 4096, entry);
                }
                self.shown = self.shown & !(1 << page) | which << page;
            }
            let queue = self.queue.get_mut(..batch as usize).unwrap_or_default();
            let done = hypercall::multicall(queue);
            self.broken |= queue.iter().any(|call| call.result != 0);
            self.note(done);
            self.check_probes();
            left -= batch;
        }
        Ok(iterations)
    }

    #[inline(always)]
    fn mask_unmask(&mut self) {
        events::mask();
        events::unmask();
    }

    fn breakpoint(&mut self) -> u64 {
        let hit = self.breakpoints(1);
        self.note(hit);
        MENDED.load(Relaxed)
    }

    fn breakpoints(&mut self, iterations: u64) -> Result<u64, Refusal> {
        self.compute(user::breakpoints, 1, iterations)
    }

    #[inline(always)]
    fn reload_and_touch(&mut self) -> u64 {
        self.reload_root();
        self.read_probe()
    }

    #[inline(always)]
    fn keep_carry(&mut self, value: u64) -> u64 {
        cpu::keep_carry(value)
    }

    #[inline(always)]
    fn copy_page(&mut self, value: u64) -> u64 {
        // SAFETY: both are pages, and no one else uses them.
        PAGES.copied(value, |source, target| unsafe {
            cpu::copy_page(source, target)
        })
    }

    #[inline(always)]
    fn fill_page(&mut self, value: u64) -> u64 {
        // SAFETY: as above.
        PAGES.filled(|target| unsafe { cpu::fill_page(target, value) })
    }

    fn set_up(&mut self, micro: Micro, size: u64) -> Result<(), Refusal> {
        self.end_spaces()?;
        match micro {
            Micro::Switch { spaces } => {
                for number in 0..spaces {
                    let space = Space::new(1, |_| ctxsw::seed(number))?;
                    self.alive += 1;
                    if let Some(slot) = self.spaces.get_mut(number as usize) {
                        *slot = Some(space);
                    }
                }
                for number in 0..spaces {
                    if self.switch(number)? != ctxsw::after(ctxsw::seed(number)) {
                        return Err(Refusal::Broken(
                            "an address space does not show its own page",
                        ));
                    }
                }
                for (number, space) in (0..).zip(self.spaces.iter().flatten()) {
                    space.own.words()[0].store(ctxsw::seed(number), Relaxed);
                }
            }
            Micro::Storm => {
                for fault in 0..pfstorm::MOST {
                    let word = &self.storm_frame(fault).words()[0];
                    word.store(pfstorm::tag(fault), Relaxed);
                }
                MENDED.store(0, Relaxed);
                self.storm(size, 0)?;
                if MENDED.swap(0, Relaxed) != size {
                    return Err(Refusal::Broken("first touches did not fault once each"));
                }
            }
            Micro::Space => {
                self.space(size, 0)?;
            }
        }
        Ok(())
    }

    fn take_down(&mut self, micro: Micro) -> u64 {
        if self.end_spaces().is_err() {
            return BROKEN;
        }
        match micro {
            Micro::Switch { .. } => 0,
            Micro::Storm => MENDED.load(Relaxed),
            Micro::Space => self.alive,
        }
    }

    #[inline(always)]
    fn switch(&mut self, space: u64) -> Result<u64, Refusal> {
        match self.spaces.get(space as usize) {
            Some(Some(space)) => space.call(ctxsw::step),
            Some(None) | None => Err(Refusal::Broken("there is no such address space")),
        }
    }

    fn storm(&mut self, pages: u64, round: u64) -> Result<u64, Refusal> {
        STORM_NEXT.store(entry(self.first.storm, super::tables::DATA), Relaxed);
        STORM_LEFT.store(pages, Relaxed);
        STORM_PAGES.store(pages, Relaxed);
        let arena = (STORM, pages * PAGE_WORDS as u64);
        let sum = self.first.call(pfstorm::storm, arena, pages, round);
        STORM_PAGES.store(0, Relaxed);
        let unmapped = hypercall::update_va_mapping(STORM, 0, pages);
        let sum = sum?;
        match unmapped {
            Ok(_) => Ok(sum),
            Err(_) => Err(Refusal::Broken("the storm's pages can't be unmapped")),
        }
    }

    fn space(&mut self, pages: u64, life: u64) -> Result<u64, Refusal> {
        let space = Space::new(pages, |page| aspace::content(life, page))?;
        self.alive += 1;
        let sum = space.call(aspace::visit);
        space.destroy()?;
        self.alive -= 1;
        sum
    }

    fn open(&mut self, io: Io, size: u64) -> Result<(), Refusal> {
        self.devices.open(io, size)
    }

    #[inline(always)]
    fn peek(&mut self, word: u64) -> u64 {
        bus::peek(word)
    }

    #[inline(always)]
    fn poke(&mut self, word: u64, value: u64) {
        bus::poke(word, value);
    }

    #[inline(always)]
    fn transfer(&mut self, direction: Direction, blocks: &[u64], slot: u64) -> Result<(), Refusal> {
        self.devices.disk()?.transfer(direction, blocks, slot)
    }

    fn flush_disk(&mut self) -> Result<(), Refusal> {
        self.devices.disk()?.flush()
    }

    fn station(&mut self) -> u64 {
        self.devices.card().map_or(0, |card| card.station)
    }

    #[inline(always)]
    fn transmit(&mut self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        self.devices.card()?.transmit(slot, count, bytes)
    }

    #[inline(always)]
    fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        self.devices.card()?.receive()
    }

    fn close(&mut self, _io: Io) -> u64 {
        self.devices.close()
    }

    #[inline(always)]
    fn ticks(&mut self) -> u64 {
        cpu::time_stamp()
    }

    #[inline(always)]
    fn latencies(&mut self) -> Option<&mut Histogram> {
        Some(self.devices.latencies())
    }

    fn scale(&self) -> Option<Scale> {
        self.devices.scale()
    }

    fn send_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        self.devices.send_line(line);
        Ok(())
    }

    #[inline(always)]
    fn expire(&mut self, _timer: Timer, microseconds: u64) -> Result<u64, Refusal> {
        self.devices.expire(microseconds)
    }

    #[inline(always)]
    fn wake(&mut self, microseconds: u64) -> Result<u64, Refusal> {
        self.devices.expire(microseconds)
    }

    #[inline(always)]
    fn self_interrupt(&mut self) -> Result<u64, Refusal> {
        self.devices.self_interrupt()
    }
}

impl Machine {
    fn storm_frame(&self, fault: u64) -> Number {
        Number(self.first.storm.0 + fault)
    }
}
