//! The guest's CPU outside translated code: registers, memory, and what becomes of exceptions.
//!
//! [`Core`] is what `system/` and the run loop work on. Register values are read and written in
//! the [`Context`], after the site's homes are settled.

use std::sync::Arc;

use engine_core::{CpuState, GuestRam, Segment, cpuid::Place};

use crate::{
    arena::Arena,
    context::{Context, NATIVE_FLAGS},
    cpu::{
        Bits, CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, CR4_TSD, Cpu, FLAG_AC, FLAG_IF,
        FLAG_IOPL, FLAG_VM, SYSTEM_FLAGS, Seg, XCR0_AVX, XCR0_SSE, canonical,
    },
    decode::{Fpu, Mode},
    fault::{self, Fault},
    guest,
    mmu::{Access, Mmu},
    privileged::{Leaf, Placed, Shortcuts},
    site::Homes,
    system::{self, Debugging, Nmi},
    tlb::{BANKS, Span, jump_index},
    vm::Vm,
};

/// Registers and memory of one guest CPU.
pub(crate) struct Core {
    context: *mut Context,
    pub cpu: Placed<Cpu>,
    pub shortcuts: Placed<Shortcuts>,
    pub mmu: Mmu,
    pub rip: u64,
    /// Address translations were dropped: links between pages have to go too.
    pub flushed: Flushed,
    /// What [`Core::mode`] said last of privileged and of user code, and for which
    /// [`Core::mode_key`], until something else that it depends on changes.
    modes: [Option<(u64, Mode)>; 2 * BANKS],
    /// Numbers of those: no two modes that may differ have the same.
    serials: [u64; 2 * BANKS],
    /// [`Shortcuts::enabled`] and the limit of RSP as the other bank left them.
    parked: [Option<(u32, u64)>; BANKS],
    /// The window was closed when modes were last thought of.
    window_waits: bool,
    /// Code of ring 0 and of ring 3 has used vector registers: see [`Mode::vectors`].
    pub vectors: [bool; 2],
    /// [`Shortcuts::enabled`] says what it can.
    pub settled: bool,
    pub debug: Debugging,
    pub nmi: Nmi,
    /// What devices have answered to the string comparison under way.
    pub device_values: Vec<u64>,
    /// Arithmetic flags are exact at every fault, at some cost.
    pub exact_flags: bool,
    /// What UMIP forbids ring 3 is answered all the same, as an operating system does.
    pub answers_hidden: bool,
    /// RAM with translated code that was written since the run loop last looked.
    pub code_writes: Vec<(u64, u64)>,
    /// Which of the VM's processors this is.
    pub place: Place,
}

/// Address translations dropped since the run loop last looked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Flushed {
    #[default]
    Nothing,
    Page(Span),
    /// All of ring 3's code in a bank.
    User(usize),
    /// A bank's code.
    Bank(usize),
    Everything,
}

/// The guest is beyond help: a fault while delivering a double fault.
#[derive(Debug)]
pub(crate) struct Shutdown;

/// What caused a delivery, where it matters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    Exception,
    External,
    /// `int n`, `int3`, `into`: the gate's DPL is checked.
    Software,
}

impl Core {
    /// A CPU over `ram` whose register slots are in `arena`.
    ///
    /// # Safety
    /// `arena` outlives the core and serves no other.
    pub(crate) unsafe fn new(ram: Arc<GuestRam>, arena: &Arena, vm: Arc<Vm>, place: Place) -> Core {
        let privileged = arena.privileged();
        // SAFETY: the caller's promise; both are parts of the arena's own page.
        let (cpu, shortcuts) = unsafe {
            (
                Placed::new(&raw mut (*privileged).cpu, Cpu::new(&CpuState::default())),
                Placed::new(&raw mut (*privileged).shortcuts, Shortcuts::new()),
            )
        };
        Core {
            context: arena.context(),
            cpu,
            shortcuts,
            // SAFETY: the caller's promise.
            mmu: unsafe { Mmu::new(ram, arena, vm, place.id.into()) },
            rip: 0,
            flushed: Flushed::Nothing,
            modes: [None; 2 * BANKS],
            serials: [0; 2 * BANKS],
            parked: [None; BANKS],
            settled: false,
            vectors: [false; 2],
            window_waits: false,
            debug: Debugging::default(),
            nmi: Nmi::default(),
            device_values: Vec::new(),
            exact_flags: false,
            answers_hidden: false,
            code_writes: Vec::new(),
            place,
        }
    }

    /// The shared slots.
    pub(crate) fn context(&mut self) -> &mut Context {
        // SAFETY: the arena outlives self, and translated code isn't running while Rust is.
        unsafe { &mut *self.context }
    }

    fn slots(&self) -> &Context {
        // SAFETY: as in `context`.
        unsafe { &*self.context }
    }

    pub(crate) fn gpr(&self, number: usize) -> u64 {
        self.slots().gpr[number]
    }

    pub(crate) fn set_gpr(&mut self, number: usize, value: u64) {
        self.context().gpr[number] = value;
    }

    /// Writes the low `size` bytes of a register; 4 bytes clear the rest, as instructions do.
    pub(crate) fn set_gpr_sized(&mut self, number: usize, value: u64, size: u32) {
        self.context().set_gpr_sized(number, value, size);
    }

    pub(crate) fn rflags(&self) -> u64 {
        let slots = self.slots();
        slots.flags & NATIVE_FLAGS | self.cpu.flags | slots.interrupt_flag | 2
    }

    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.context().flags = value & NATIVE_FLAGS | 0x202;
        self.cpu.flags = value & SYSTEM_FLAGS;
        if value & FLAG_AC == 0 {
            self.mmu.close_guarded();
        }
        self.set_interrupts(value & FLAG_IF != 0);
    }

    /// Maskable interrupts are enabled.
    pub(crate) fn interrupts_enabled(&self) -> bool {
        self.slots().interrupt_flag != 0
    }

    pub(crate) fn set_interrupts(&mut self, enabled: bool) {
        self.context().interrupt_flag = if enabled { FLAG_IF } else { 0 };
    }

    /// General registers and RFLAGS with `homes` taken into account.
    pub(crate) fn seen_from(&self, homes: Homes) -> ([u64; 16], u64) {
        let slots = self.slots();
        let gpr = std::array::from_fn(|register| {
            if homes.spilled >> register & 1 == 1 {
                slots.spill[register]
            } else {
                slots.gpr[register]
            }
        });
        let native = homes.flags(slots.flags, slots.lazy_flags);
        (gpr, native & NATIVE_FLAGS | self.rflags() & !NATIVE_FLAGS)
    }

    /// A YMM register as four words, lowest first.
    pub(crate) fn ymm(&self, number: usize) -> [u64; 4] {
        let slots = self.slots();
        let [a, b] = slots.xmm.0[number];
        let [c, d] = if slots.upper == 0 {
            [0; 2]
        } else {
            slots.ymm_high.0[number]
        };
        [a, b, c, d]
    }

    pub(crate) fn set_ymm(&mut self, number: usize, [a, b, c, d]: [u64; 4]) {
        let context = self.context();
        context.xmm.0[number] = [a, b];
        if context.upper == 0 {
            context.ymm_high.0 = [[0; 2]; 16];
            context.upper = 1;
        }
        context.ymm_high.0[number] = [c, d];
    }

    /// Loads XCR0.
    pub(crate) fn set_xcr0(&mut self, value: u64) {
        self.cpu.xcr0 = value;
        self.context().avx = u32::from(value & XCR0_AVX != 0);
        self.forget_modes();
    }

    /// Arithmetic flags alone.
    pub(crate) fn set_arithmetic(&mut self, mask: u64, value: u64) {
        let context = self.context();
        context.flags = context.flags & !mask | value & mask;
    }

    pub(crate) fn user(&self) -> bool {
        self.cpu.cpl() == 3
    }

    pub(crate) fn set_segment(&mut self, index: usize, segment: Segment) {
        let before = self.cpu.bits();
        self.cpu.segments[index] = segment;
        self.context().segment_base[index] = segment.base;
        if before != Bits::Bits64 || self.cpu.bits() != Bits::Bits64 {
            self.forget_modes();
        }
        if !matches!(index, Seg::CS | Seg::SS) {
            self.shortcuts.drops = u32::from(self.drops_segments());
        }
    }

    /// True if a return to ring 3 has data segments to drop.
    fn drops_segments(&self) -> bool {
        [Seg::ES, Seg::DS, Seg::FS, Seg::GS]
            .into_iter()
            .any(|index| system::drops(&self.cpu.segments[index], 3))
    }

    pub(crate) fn set_segment_base(&mut self, index: usize, base: u64) {
        self.cpu.segments[index].base = base;
        self.context().segment_base[index] = base;
    }

    /// What translation depends on, now.
    pub(crate) fn mode(&mut self) -> Mode {
        let key = self.mode_key();
        let index = self.jumps();
        if let Some((known, mode)) = self.modes[index]
            && known == key
        {
            return mode;
        }
        let window = self.user() && self.mmu.window.ready();
        let mode = self.mode_of(&self.cpu, window);
        self.modes[index] = Some((key, mode));
        self.serials[index] = 1 + self
            .serials
            .iter()
            .fold(0, |most, &serial| most.max(serial));
        mode
    }

    /// As [`Core::mode`], with what depends on registers as they are now.
    pub(crate) fn mode_here(&mut self) -> Mode {
        let mode = self.mode();
        let wide = mode.bits == Bits::Bits64;
        // Systems that spread a process over all addresses put its stack at the top, and most of what
        // it touches beyond the window: comparing would cost and lead nowhere.
        let window = mode.window && (!wide || self.gpr(4) < crate::window::SIZE);
        Mode {
            window,
            stack: window && wide,
            ..mode
        }
    }

    /// Index of the jump cache for code as it stands.
    fn jumps(&self) -> usize {
        jump_index(self.cpu.bank(), self.user())
    }

    /// Jump cache and number of the mode as it stands, if it is known.
    #[inline]
    pub(crate) fn known_mode(&self) -> Option<(usize, u64)> {
        let index = self.jumps();
        let (known, _) = self.modes[index].as_ref()?;
        (*known == self.mode_key()).then_some((index, self.serials[index]))
    }

    /// What a mode depends on and translated code changes by itself.
    fn mode_key(&self) -> u64 {
        let flags = self.cpu.flags & (FLAG_AC | FLAG_IOPL | FLAG_VM);
        let [_, cs, ss, ..] = &self.cpu.segments;
        u64::from(cs.attributes) | u64::from(ss.attributes) << 16 | flags << 32
    }

    /// Something that modes depend on has changed.
    pub(crate) fn forget_modes(&mut self) {
        self.modes = [None; 2 * BANKS];
        self.parked = [None; BANKS];
        self.shortcuts.enabled = 0;
        self.settled = false;
    }

    /// Forgets the modes if the window has been opened or closed: code made for it mustn't run on.
    pub(crate) fn follow_window(&mut self) {
        let waits = self.mmu.window.waits();
        if waits != self.window_waits {
            self.window_waits = waits;
            self.forget_modes();
        }
    }

    /// The modes of 64-bit code in ring 0 and in ring 3 as privileges change by themselves; None
    /// where they may not, since somebody is debugging, looks at every exception or waits for an iret.
    pub(crate) fn usual_modes(&mut self) -> Option<[Mode; 2]> {
        let odd = self.exact_flags || self.armed() || self.nmi_blocked() || !self.cpu.long();
        let window = self.mmu.window.ready();
        (!odd).then(|| {
            [0, 3].map(|privilege: u16| {
                let mut cpu = self.cpu.clone();
                cpu.segments[Seg::CS].attributes = 0xa09b | privilege << 5;
                cpu.segments[Seg::SS].attributes = 0xc093 | privilege << 5;
                cpu.flags = 0;
                self.mode_of(&cpu, window)
            })
        })
    }

    /// Remembers what CPUID says in leaves without subleaves.
    pub(crate) fn remember_leaves(&mut self) {
        const SUBLEAVES: [u32; 4] = [4, 7, 0xb, 0xd];
        for leaf in (0..=0xd).chain(0x8000_0000..=0x8000_0008) {
            if !SUBLEAVES.contains(&leaf) {
                let values = self.cpuid(leaf, 0);
                self.shortcuts.leaves[Leaf::index(leaf)] = Leaf::new(leaf, values);
            }
        }
    }

    fn mode_of(&self, cpu: &Cpu, window: bool) -> Mode {
        let user = cpu.cpl() == 3;
        let bits = cpu.bits();
        let long = bits == Bits::Bits64;
        let flat = long
            || [Seg::ES, Seg::CS, Seg::SS, Seg::DS]
                .iter()
                .all(|&index| cpu.segments[index].base == 0);
        // Every access has to be looked at, even in 64-bit code.
        let limited = if self.watching() || Core::aligns(cpu) {
            0xff
        } else {
            cpu.limited_segments()
        };
        Mode {
            bits,
            user,
            window: user && bits != Bits::Bits16 && !(long && limited != 0) && window,
            stack: false,
            flat,
            code_base: if flat {
                0
            } else {
                cpu.segments[Seg::CS].base as u32
            },
            code_limit: if long {
                u32::MAX
            } else {
                cpu.segments[Seg::CS].limit
            },
            narrow_stack: !long && !cpu.segments[Seg::SS].db(),
            limited,
            fpu: Fpu {
                emulated: cpu.cr0 & CR0_EM != 0,
                switched: cpu.cr0 & CR0_TS != 0,
                monitored: cpu.cr0 & (CR0_TS | CR0_MP) == CR0_TS | CR0_MP,
                sse: cpu.cr4 & CR4_OSFXSR != 0,
                avx: cpu.cr4 & CR4_OSXSAVE != 0
                    && cpu.xcr0 & (XCR0_SSE | XCR0_AVX) == XCR0_SSE | XCR0_AVX,
            },
            exact: self.exact_flags,
            ring_0: cpu.cpl() == 0,
            vectors: self.vectors[usize::from(user)],
            tsc: cpu.tsc_offset == 0 && (cpu.cr4 & CR4_TSD == 0 || !user),
            interrupts: cpu.cpl() <= cpu.iopl(),
            single: false,
            bank: cpu.bank() as u8,
        }
    }

    /// Linear address of the next instruction.
    pub(crate) fn linear_ip(&self) -> u64 {
        match self.cpu.bits() {
            Bits::Bits64 => self.rip,
            Bits::Bits32 | Bits::Bits16 => {
                self.rip.wrapping_add(self.cpu.segments[Seg::CS].base) & 0xffff_ffff
            }
        }
    }

    pub(crate) fn flush(&mut self) {
        self.mmu.flush(self.cpu.bank());
        self.flushed = Flushed::Everything;
    }

    /// CR3 was loaded, or all translations are to go, and the instruction at the linear address `next`
    /// is the next one: as [`Core::flush`], but what the tables give as before stays, and what was valid
    /// before if the load asks to `keep` it.
    pub(crate) fn reload(&mut self, next: u64, keep: bool) {
        let bank = self.cpu.bank();
        let dropped = match self.mmu.reload(&self.cpu, next, keep) {
            Some([true, true]) => return,
            Some([true, false]) => Flushed::User(bank),
            Some([false, _]) => Flushed::Bank(bank),
            None => Flushed::Everything,
        };
        self.flushed = match (self.flushed, dropped) {
            (_, Flushed::Everything) => Flushed::Everything,
            (Flushed::Nothing, dropped) => dropped,
            (Flushed::User(before), Flushed::User(_)) if before == bank => dropped,
            (Flushed::User(before) | Flushed::Bank(before), _) if before == bank => {
                Flushed::Bank(bank)
            }
            (_, _) => Flushed::Everything,
        };
    }

    /// Goes on in the bank that CR3 and CR4 say, coming from `before`.
    pub(crate) fn change_bank(&mut self, before: usize) {
        let bank = self.cpu.bank();
        if bank == before {
            return;
        }
        let known = (self.shortcuts.enabled, self.context().stack_limit);
        self.parked[before] = self.settled.then_some(known);
        let (enabled, limit) = self.parked[bank].unwrap_or_default();
        self.settled = self.parked[bank].is_some();
        self.shortcuts.enabled = enabled;
        self.context().stack_limit = limit;
    }

    /// Writes guest-virtual memory, all of it or none.
    ///
    /// # Errors
    /// The first page fault. Device memory is written as [`DeviceLog`](crate::system::DeviceLog) says.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8], user: bool) -> Result<(), Fault> {
        self.watch(address, bytes.len() as u64, true);
        let last = address.wrapping_add(bytes.len() as u64 - 1);
        if self.cpu.long() && !canonical(last) {
            return Err(Fault::gp());
        }
        // A page in a write TLB holds no translated code.
        if last & !0xfff == address & !0xfff
            && let Some(host) = self.mmu.written(address, user)
        {
            // SAFETY: `host` is in a page of RAM, and the bytes stay within it.
            unsafe { guest::write(host, bytes) };
            return Ok(());
        }
        let mut parts = [(0u64, 0usize, 0usize); 2];
        let first_len = (4096 - (address & 0xfff) as usize).min(bytes.len());
        let page = self.mmu.walk(&self.cpu, address, Access::Write, user)?;
        self.mmu.fill(address, page, Access::Write, user);
        parts[0] = (page.phys | address & 0xfff, 0, first_len);
        if first_len < bytes.len() {
            let page = self
                .mmu
                .walk(&self.cpu, last & !0xfff, Access::Write, user)?;
            parts[1] = (page.phys, first_len, bytes.len());
        }
        for (phys, from, to) in parts {
            if from < to {
                self.write_phys(phys, &bytes[from..to]);
            }
        }
        Ok(())
    }

    /// Writes RAM and notes the write if translated code lies there.
    pub(crate) fn write_phys(&mut self, phys: u64, bytes: &[u8]) {
        let Some(host) = self.mmu.host(phys, bytes.len() as u64) else {
            self.mmu.devices.get_mut().write(phys, bytes);
            return;
        };
        let code = !self.mmu.claim(phys);
        // SAFETY: `host` covers the length; guest RAM is never borrowed as Rust memory.
        unsafe { guest::write(host, bytes) };
        if code {
            self.code_writes.push((phys, bytes.len() as u64));
        }
    }

    /// Delivers `fault`, or what becomes of it.
    ///
    /// # Errors
    /// [`Shutdown`] on a triple fault.
    pub(crate) fn raise(&mut self, fault: Fault) -> Result<(), Shutdown> {
        self.forget_traps();
        let mut fault = fault;
        loop {
            if let Some(address) = fault.address {
                self.cpu.cr2 = address;
            }
            let met = match self.deliver(fault.vector, fault.error, Cause::Exception) {
                Ok(()) => {
                    if fault.vector == fault::DB {
                        self.debug_delivered();
                    }
                    return Ok(());
                }
                Err(met) => met,
            };
            // A page fault leaves its address even if it turns into something else.
            if let Some(address) = met.address {
                self.cpu.cr2 = address;
            }
            fault = fault.then(met).ok_or(Shutdown)?;
        }
    }
}
