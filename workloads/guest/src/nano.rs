//! The machine that workloads see: every operation as its bare instruction, tried before it is
//! measured.

use crate::{
    console::SCRATCH_PORT,
    cpu,
    devices::Devices,
    memory, spaces,
    traps::{self, NO_FAULT, breakpoint_armed, divide_armed, expected_fault, trap_count},
    user,
};
use core::{
    arch::asm,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use programs::{
    Kernel, Platform, Refusal, Ring,
    io::{Direction, Histogram, Io, Timer, histogram::Scale},
    micro::Micro,
    nano::{Operation, Pages, WORD_A, WORD_B, cpuid, port_in, syscall},
};

unsafe extern "C" {
    static syscall_entry: u8;
    static syscall_trial: u8;
    static syscall_unraised: u8;
}

/// What the system call mixes into its answer: data of the kernel, which ring 3 can't read.
#[unsafe(no_mangle)]
static syscall_key: AtomicU64 = AtomicU64::new(syscall::KEY);

/// Why there is no hypercall.
const NO_HYPERCALL: &str = "an unaware guest knows of no host to call";

/// What string instructions copy from and to.
static PAGES: Pages = Pages::new();

/// RFLAGS.IF.
const INTERRUPTS: u64 = 1 << 9;

/// This machine.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Size of the arena.
    pub(crate) words: u64,
    /// What does I/O.
    pub(crate) devices: Devices,
}

impl Platform for Machine {
    fn arena_words(&self) -> u64 {
        self.words
    }

    fn compute(&mut self, kernel: Kernel, size: u64, iterations: u64) -> Result<u64, Refusal> {
        user::call(kernel, memory::ARENA, self.words, size, iterations).map_err(Refusal::Fault)
    }

    fn arm(&mut self, operation: Operation) -> Result<(), Refusal> {
        if operation == Operation::Syscall {
            return self.arm_syscall();
        }
        if operation == Operation::Hypercall {
            return Err(Refusal::Unsupported(NO_HYPERCALL));
        }
        // The probe page is known to work before its operations are tried.
        start(operation);
        let mut parts = Trial {
            operation,
            machine: self,
        };
        let tried = traps::guard(trial, &raw mut parts as u64);
        disarm();
        let (expected, otherwise) = expectation(operation);
        match tried {
            Err(fault) => return Err(Refusal::Fault(fault)),
            Ok(value) if value != expected => return Err(Refusal::Broken(otherwise)),
            Ok(_) => {}
        }
        start(operation);
        Ok(())
    }

    fn settle(&mut self, operation: Operation) -> u64 {
        let left = match operation {
            Operation::Out => cpu::port_in(SCRATCH_PORT).into(),
            Operation::Cr3Reload | Operation::Cr3Touch | Operation::Invlpg => memory::read_probe(),
            Operation::PageFault | Operation::DivZero | Operation::Int3 => trap_count.load(Relaxed),
            Operation::RepMovsb | Operation::RepStosq => PAGES.settled(),
            Operation::Cr8Write => cpu::priority(),
            Operation::PteMod => {
                cpu::invalidate(memory::PROBE);
                memory::read_probe()
            }
            Operation::CliSti => (cpu::flags() & INTERRUPTS != 0).into(),
            Operation::Syscall
            | Operation::Hypercall
            | Operation::In
            | Operation::Cpuid
            | Operation::CallRet
            | Operation::PushfPopf => 0,
        };
        disarm();
        if operation == Operation::Cr8Write {
            cpu::set_priority(0);
        }
        left
    }

    fn syscalls(&mut self, iterations: u64) -> Result<u64, Refusal> {
        self.compute(user::syscalls, 1, iterations)
    }

    /// Never called: [`Platform::arm`] refuses.
    fn hypercall(&mut self) -> u64 {
        0
    }

    #[inline(always)]
    fn port_in(&mut self) -> u8 {
        cpu::port_in(SCRATCH_PORT)
    }

    #[inline(always)]
    fn port_out(&mut self, value: u8) {
        cpu::port_out(SCRATCH_PORT, value);
    }

    #[inline(always)]
    fn cpuid(&mut self) -> u32 {
        cpu::feature_flags()
    }

    #[inline(always)]
    fn reload_root(&mut self) {
        let root = ROOT.load(Relaxed);
        // SAFETY: `start` stored the root in use.
        unsafe { cpu::set_root(root) };
    }

    #[inline(always)]
    fn invalidate(&mut self) {
        cpu::invalidate(memory::PROBE);
    }

    #[inline(always)]
    fn page_fault(&mut self) -> u64 {
        let word = memory::read_probe();
        memory::set_probe_entry(0);
        cpu::invalidate(memory::PROBE);
        word.wrapping_add(trap_count.load(Relaxed))
    }

    #[inline(always)]
    fn divide_by_zero(&mut self) -> u64 {
        // SAFETY: the handler skips the instruction, whose length of 2 bytes it knows.
        unsafe {
            asm!("div ecx", in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _,
                options(nostack));
        }
        trap_count.load(Relaxed)
    }

    #[inline(always)]
    fn call_return(&mut self, value: u64) -> u64 {
        let result;
        // SAFETY: callee changes rax alone; the kernel has no red zone.
        unsafe {
            asm!("call callee", inout("rax") value => result, options(nomem, preserves_flags))
        };
        result
    }

    #[inline(always)]
    fn set_priority(&mut self, value: u64) {
        cpu::set_priority(value);
    }

    #[inline(always)]
    fn modify_entry(&mut self, which: u64) {
        memory::set_probe_entry(memory::probe_entry(which));
    }

    #[inline(always)]
    fn mask_unmask(&mut self) {
        cpu::mask_unmask();
    }

    #[inline(always)]
    fn breakpoint(&mut self) -> u64 {
        // SAFETY: the handler counts and comes back.
        unsafe { asm!("int3", options(nostack)) };
        trap_count.load(Relaxed)
    }

    #[inline(always)]
    fn reload_and_touch(&mut self) -> u64 {
        self.reload_root();
        memory::read_probe()
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
        spaces::start(micro, size)
    }

    fn take_down(&mut self, micro: Micro) -> u64 {
        spaces::finish(micro)
    }

    #[inline(always)]
    fn switch(&mut self, space: u64) -> Result<u64, Refusal> {
        spaces::switch(space)
    }

    #[inline(always)]
    fn storm(&mut self, pages: u64, round: u64) -> Result<u64, Refusal> {
        spaces::storm(pages, round)
    }

    #[inline(always)]
    fn space(&mut self, pages: u64, life: u64) -> Result<u64, Refusal> {
        spaces::space(pages, life)
    }

    fn open(&mut self, io: Io, size: u64) -> Result<(), Refusal> {
        self.devices.open(io, size)
    }

    fn close(&mut self, _io: Io) -> u64 {
        self.devices.close()
    }

    #[inline(always)]
    fn peek(&mut self, word: u64) -> u64 {
        // SAFETY: the arena is mapped as itself; devices and ring 3 use it besides, while this
        // code waits for them.
        unsafe { (memory::arena_word(word) as *const u64).read_volatile() }
    }

    #[inline(always)]
    fn poke(&mut self, word: u64, value: u64) {
        // SAFETY: as above.
        unsafe { (memory::arena_word(word) as *mut u64).write_volatile(value) };
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

    #[inline(always)]
    fn transfer(&mut self, direction: Direction, blocks: &[u64], slot: u64) -> Result<(), Refusal> {
        self.devices.transfer(direction, blocks, slot)
    }

    fn flush_disk(&mut self) -> Result<(), Refusal> {
        self.devices.flush_disk()
    }

    fn station(&mut self) -> u64 {
        self.devices.station()
    }

    #[inline(always)]
    fn transmit(&mut self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        self.devices.transmit(slot, count, bytes)
    }

    #[inline(always)]
    fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        self.devices.receive()
    }

    fn send_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        self.devices.send_line(line)
    }

    #[inline(always)]
    fn expire(&mut self, _timer: Timer, microseconds: u64) -> Result<u64, Refusal> {
        self.devices.expire(microseconds, false)
    }

    #[inline(always)]
    fn wake(&mut self, microseconds: u64) -> Result<u64, Refusal> {
        self.devices.expire(microseconds, true)
    }

    #[inline(always)]
    fn self_interrupt(&mut self) -> Result<u64, Refusal> {
        self.devices.self_interrupt()
    }
}

/// The paging root that the cr3_reload workload loads.
static ROOT: AtomicU64 = AtomicU64::new(0);

impl Machine {
    /// Points syscall at the trial entry, makes one call, points it at the entry proper.
    fn arm_syscall(&mut self) -> Result<(), Refusal> {
        let trial_entry = (&raw const syscall_trial) as u64;
        let unraised = (&raw const syscall_unraised) as u64;
        // SAFETY: the selectors are the GDT's, the entries this kernel's; TF, IF, DF, IOPL, NT
        // and AC are cleared on entry.
        unsafe {
            cpu::write_msr(cpu::STAR, 0x0018_0008 << 32);
            cpu::write_msr(cpu::SFMASK, 0x4_7700);
            cpu::write_msr(cpu::LSTAR, trial_entry);
        }
        match user::call(user::syscalls, memory::ARENA, self.words, 1, 1) {
            Err(fault)
                if fault.ring == Ring::User && [trial_entry, unraised].contains(&fault.rip) =>
            {
                return Err(Refusal::Broken("syscall does not raise privilege"));
            }
            Err(fault) => return Err(Refusal::Fault(fault)),
            Ok(value) if value != syscall::answer(0) => {
                return Err(Refusal::Broken(
                    "syscall does not return the kernel's answer",
                ));
            }
            Ok(_) => {}
        }
        // SAFETY: as above.
        unsafe { cpu::write_msr(cpu::LSTAR, (&raw const syscall_entry) as u64) };
        Ok(())
    }
}

/// Brings about the state that an operation starts from, as [`Operation`] documents it.
fn start(operation: Operation) {
    trap_count.store(0, Relaxed);
    ROOT.store(cpu::root(), Relaxed);
    match operation {
        Operation::In => cpu::port_out(SCRATCH_PORT, port_in::VALUE),
        Operation::Cr3Reload | Operation::Cr3Touch | Operation::Invlpg => {
            map_probe();
            memory::set_probe_entry(memory::probe_entry(1));
        }
        Operation::PteMod => map_probe(),
        Operation::PageFault => {
            memory::set_probe_entry(0);
            cpu::invalidate(memory::PROBE);
            expected_fault.store(memory::PROBE, Relaxed);
        }
        Operation::DivZero => divide_armed.store(1, Relaxed),
        Operation::Int3 => breakpoint_armed.store(1, Relaxed),
        Operation::RepMovsb | Operation::RepStosq => PAGES.start(),
        Operation::Syscall
        | Operation::Hypercall
        | Operation::Out
        | Operation::Cpuid
        | Operation::CallRet
        | Operation::Cr8Write
        | Operation::CliSti
        | Operation::PushfPopf => {}
    }
}

/// Maps the probe page to frame A and uses the translation.
fn map_probe() {
    memory::set_probe_entry(memory::probe_entry(0));
    cpu::invalidate(memory::PROBE);
    memory::read_probe();
}

/// Faults are crashes again, interrupts masked.
fn disarm() {
    expected_fault.store(NO_FAULT, Relaxed);
    divide_armed.store(0, Relaxed);
    breakpoint_armed.store(0, Relaxed);
    cpu::mask();
}

/// What [`trial`] returns where the operation works, and what is wrong where it returns anything
/// else.
fn expectation(operation: Operation) -> (u64, &'static str) {
    match operation {
        Operation::Syscall | Operation::Hypercall => (0, ""),
        Operation::In => (
            port_in::VALUE.into(),
            "in does not read the UART's scratch register",
        ),
        Operation::Out => (0xa5, "out does not write the UART's scratch register"),
        Operation::Cpuid => (
            cpuid::ALWAYS.into(),
            "cpuid lacks features that every long-mode processor has",
        ),
        Operation::Cr3Reload => (WORD_B, "a load of CR3 does not flush translations"),
        Operation::Invlpg => (WORD_B, "invlpg does not flush the translation"),
        Operation::PageFault => (WORD_A + 1, "the page fault was not taken once"),
        Operation::DivZero => (1, "the divide error was not taken once"),
        Operation::CallRet => (22, "call and ret do not come back"),
        Operation::Cr8Write => (5, "CR8 does not read what was written"),
        Operation::PteMod => (WORD_B, "a changed page-table entry has no effect"),
        Operation::CliSti => (1, "sti does not unmask interrupts"),
        Operation::Int3 => (1, "the breakpoint was not taken once"),
        Operation::Cr3Touch => (WORD_B, "a load of CR3 does not flush translations"),
        Operation::PushfPopf => (1, "popf does not restore the flags"),
        Operation::RepMovsb => (27, "rep movsb does not copy"),
        Operation::RepStosq => (42, "rep stosq does not fill"),
    }
}

/// What [`trial`] needs.
struct Trial<'a> {
    operation: Operation,
    machine: &'a mut Machine,
}

/// Does the operation once. `trial` is the address of a [`Trial`].
extern "C" fn trial(trial: u64) -> u64 {
    // SAFETY: `arm` passes the address of one that lives until this has ended.
    let Trial { operation, machine } = unsafe { &mut *(trial as *mut Trial<'_>) };
    match *operation {
        Operation::Syscall | Operation::Hypercall => 0,
        Operation::In => machine.port_in().into(),
        Operation::Out => {
            machine.port_out(0xa5);
            machine.port_in().into()
        }
        Operation::Cpuid => (machine.cpuid() & cpuid::ALWAYS).into(),
        Operation::Cr3Reload => {
            machine.reload_root();
            memory::read_probe()
        }
        Operation::Invlpg => {
            machine.invalidate();
            memory::read_probe()
        }
        Operation::PageFault => machine.page_fault(),
        Operation::DivZero => machine.divide_by_zero(),
        Operation::CallRet => machine.call_return(7),
        Operation::Cr8Write => {
            machine.set_priority(5);
            let value = cpu::priority();
            machine.set_priority(0);
            value
        }
        Operation::PteMod => {
            machine.modify_entry(1);
            machine.invalidate();
            memory::read_probe()
        }
        Operation::CliSti => {
            machine.mask_unmask();
            (cpu::flags() & INTERRUPTS != 0).into()
        }
        Operation::Int3 => machine.breakpoint(),
        Operation::Cr3Touch => machine.reload_and_touch(),
        Operation::PushfPopf => machine.keep_carry(1),
        Operation::RepMovsb => machine.copy_page(7),
        Operation::RepStosq => machine.fill_page(7),
    }
}
