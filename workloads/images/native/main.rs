//! The baseline: workloads as an ordinary process, with the console protocol on standard input and
//! output. There is no machine here but a process: what needs ring 0 is `unsupported`.

mod devices;

use devices::Devices;
use programs::{
    Kernel, Platform, Refusal,
    io::{Direction, Histogram, Io, SLOT_WORDS, SLOTS, histogram::Scale},
    micro::Micro,
    nano::{Operation, Pages},
    session::{self, Console, LINE, Next},
};
use std::{
    arch::asm,
    io::{self, BufRead, Read, StdoutLock, Write},
};

/// Words of the arena: 64 MiB, the guest's most.
const ARENA: usize = 8 << 20;

/// Why there is no privileged operation.
const NO_RING_0: &str = "ring-0 operation has no native figure";

/// Why there are no address spaces.
const NO_SPACES: &str = "a process has no address spaces of its own to manage";

/// Bytes of a page: devices want data aligned to it.
const PAGE: usize = 4096;

/// What string instructions copy from and to.
static PAGES: Pages = Pages::new();

struct Process {
    /// The arena, after as much as it takes to begin a page.
    memory: Vec<u64>,
    skipped: usize,
    devices: Devices,
}

impl Process {
    fn new() -> Self {
        let memory = vec![0; ARENA + PAGE / 8];
        let address = memory.as_ptr() as usize;
        Process {
            skipped: (address.next_multiple_of(PAGE) - address) / 8,
            memory,
            devices: Devices::inherit(),
        }
    }

    fn arena(&mut self) -> &mut [u64] {
        &mut self.memory[self.skipped..][..ARENA]
    }

    /// The slots that devices use, as bytes, and the devices.
    fn slots(&mut self) -> (&mut [u8], &mut Devices) {
        let words = &mut self.memory[self.skipped..][..(SLOTS * SLOT_WORDS) as usize];
        // SAFETY: the same memory; every byte pattern is a word, and a byte needs no alignment.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words))
        };
        (bytes, &mut self.devices)
    }
}

impl Platform for Process {
    fn arena_words(&self) -> u64 {
        ARENA as u64
    }

    fn compute(&mut self, kernel: Kernel, size: u64, iterations: u64) -> Result<u64, Refusal> {
        Ok(kernel(self.arena(), size, iterations))
    }

    fn arm(&mut self, operation: Operation) -> Result<(), Refusal> {
        match operation {
            Operation::CallRet | Operation::PushfPopf => Ok(()),
            Operation::RepMovsb | Operation::RepStosq => {
                PAGES.start();
                Ok(())
            }
            Operation::Syscall
            | Operation::Hypercall
            | Operation::In
            | Operation::Out
            | Operation::Cpuid
            | Operation::Cr3Reload
            | Operation::Cr3Touch
            | Operation::Invlpg
            | Operation::PageFault
            | Operation::DivZero
            | Operation::Int3
            | Operation::Cr8Write
            | Operation::PteMod
            | Operation::CliSti => Err(Refusal::Unsupported(NO_RING_0)),
        }
    }

    fn settle(&mut self, operation: Operation) -> u64 {
        match operation {
            Operation::CallRet | Operation::PushfPopf => 0,
            Operation::RepMovsb | Operation::RepStosq => PAGES.settled(),
            Operation::Syscall
            | Operation::Hypercall
            | Operation::In
            | Operation::Out
            | Operation::Cpuid
            | Operation::Cr3Reload
            | Operation::Cr3Touch
            | Operation::Invlpg
            | Operation::PageFault
            | Operation::DivZero
            | Operation::Int3
            | Operation::Cr8Write
            | Operation::PteMod
            | Operation::CliSti => refused(operation),
        }
    }

    fn syscalls(&mut self, _iterations: u64) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_RING_0))
    }

    fn hypercall(&mut self) -> u64 {
        refused(Operation::Hypercall)
    }

    fn port_in(&mut self) -> u8 {
        refused(Operation::In)
    }

    fn port_out(&mut self, _value: u8) {
        refused(Operation::Out)
    }

    fn cpuid(&mut self) -> u32 {
        refused(Operation::Cpuid)
    }

    fn reload_root(&mut self) {
        refused(Operation::Cr3Reload)
    }

    fn invalidate(&mut self) {
        refused(Operation::Invlpg)
    }

    fn page_fault(&mut self) -> u64 {
        refused(Operation::PageFault)
    }

    fn divide_by_zero(&mut self) -> u64 {
        refused(Operation::DivZero)
    }

    #[inline(always)]
    fn call_return(&mut self, value: u64) -> u64 {
        let result;
        // SAFETY: the callee changes rax alone; the call's word lies below the red zone.
        unsafe {
            asm!("lea rsp, [rsp - 128]", "call {callee}", "lea rsp, [rsp + 128]",
                callee = sym callee, inout("rax") value => result, options(preserves_flags));
        }
        result
    }

    fn set_priority(&mut self, _value: u64) {
        refused(Operation::Cr8Write)
    }

    fn modify_entry(&mut self, _which: u64) {
        refused(Operation::PteMod)
    }

    fn mask_unmask(&mut self) {
        refused(Operation::CliSti)
    }

    fn breakpoint(&mut self) -> u64 {
        refused(Operation::Int3)
    }

    fn reload_and_touch(&mut self) -> u64 {
        refused(Operation::Cr3Touch)
    }

    #[inline(always)]
    fn keep_carry(&mut self, value: u64) -> u64 {
        let carry: u32;
        // SAFETY: one push and one pop; without `nostack` the compiler keeps its red zone free.
        unsafe {
            asm!("xor {0:e}, {0:e}", "bt {1}, 0", "pushfq", "cmc", "popfq", "setc {0:l}",
                out(reg) carry, in(reg) value);
        }
        carry.into()
    }

    #[inline(always)]
    fn copy_page(&mut self, value: u64) -> u64 {
        PAGES.copied(value, |source, target| {
            // SAFETY: both are pages that nobody else uses; the direction flag is clear.
            unsafe {
                asm!("rep movsb", inout("rsi") source => _, inout("rdi") target => _,
                    inout("rcx") PAGE => _, options(nostack, preserves_flags));
            }
        })
    }

    #[inline(always)]
    fn fill_page(&mut self, value: u64) -> u64 {
        PAGES.filled(|target| {
            // SAFETY: as above.
            unsafe {
                asm!("rep stosq", inout("rdi") target => _, in("rax") value,
                    inout("rcx") PAGE / 8 => _, options(nostack, preserves_flags));
            }
        })
    }

    fn set_up(&mut self, _micro: Micro, _size: u64) -> Result<(), Refusal> {
        Err(Refusal::Unsupported(NO_SPACES))
    }

    fn take_down(&mut self, _micro: Micro) -> u64 {
        0
    }

    fn switch(&mut self, _space: u64) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_SPACES))
    }

    fn storm(&mut self, _pages: u64, _round: u64) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_SPACES))
    }

    fn space(&mut self, _pages: u64, _life: u64) -> Result<u64, Refusal> {
        Err(Refusal::Unsupported(NO_SPACES))
    }

    fn open(&mut self, io: Io, size: u64) -> Result<(), Refusal> {
        self.devices.open(io, size)
    }

    fn peek(&mut self, word: u64) -> u64 {
        self.arena()[word as usize]
    }

    fn poke(&mut self, word: u64, value: u64) {
        self.arena()[word as usize] = value;
    }

    fn ticks(&mut self) -> u64 {
        self.devices.nanoseconds()
    }

    fn latencies(&mut self) -> Option<&mut Histogram> {
        Some(&mut self.devices.latencies)
    }

    fn scale(&self) -> Option<Scale> {
        Scale::new(1_000_000_000)
    }

    fn transfer(
        &mut self,
        direction: Direction,
        blocks: &[u64],
        slot: u64,
    ) -> Result<(), Refusal> {
        let (slots, devices) = self.slots();
        devices.transfer(direction, blocks, slot, slots)
    }

    fn flush_disk(&mut self) -> Result<(), Refusal> {
        self.devices.flush_disk()
    }

    fn station(&mut self) -> u64 {
        devices::STATION
    }

    fn transmit(&mut self, slot: u64, count: u64, bytes: u64) -> Result<(), Refusal> {
        let (slots, devices) = self.slots();
        devices.transmit(slot, count, bytes, slots)
    }

    fn receive(&mut self) -> Result<(u64, u64), Refusal> {
        let (slots, devices) = self.slots();
        devices.receive(slots)
    }

    /// One write for each line, as a terminal's driver would get it.
    fn send_line(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let mut output = io::stdout().lock();
        let sent = output.write_all(line).and_then(|()| output.flush());
        sent.map_err(|error| Refusal::Device {
            what: "write: errno",
            code: error.raw_os_error().unwrap_or(0) as u64,
        })
    }
}

/// What the callret workload calls: the guest's instructions.
#[unsafe(naked)]
extern "C" fn callee() {
    core::arch::naked_asm!("lea rax, [rax + 2*rax + 1]", "ret")
}

/// No operation runs that was not armed, and none is.
fn refused(operation: Operation) -> ! {
    unreachable!("{operation:?} was never armed")
}

struct Pipe {
    output: StdoutLock<'static>,
}

impl Console for Pipe {
    fn write(&mut self, bytes: &[u8]) {
        // Nobody listens: nothing is left to do.
        if self.output.write_all(bytes).is_err() {
            std::process::exit(1);
        }
    }

    fn flush(&mut self) {
        if self.output.flush().is_err() {
            std::process::exit(1);
        }
    }

    /// A process has no ports: only engines take marks.
    fn mark(&mut self, _value: u8) {}

    fn cycles(&mut self) -> u64 {
        // SAFETY: every x86-64 processor has rdtsc, and Linux leaves it to processes.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
}

fn main() -> io::Result<()> {
    let mut console = Pipe {
        output: io::stdout().lock(),
    };
    let mut process = Process::new();
    session::greet(&mut console, "native");
    // `native run WORKLOAD SIZE ITERATIONS`, as on a guest's command line.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ordered =
        session::answer_command_line(&mut console, &mut process, arguments.join(" ").as_bytes());
    if let Some(ran) = ordered {
        console.flush();
        std::process::exit(i32::from(!ran));
    }
    let mut input = io::stdin().lock();
    loop {
        console.flush();
        let mut line = Vec::new();
        let limit = LINE as u64 + 1;
        if input.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && line.len() > LINE {
            input.skip_until(b'\n')?;
            session::fail(&mut console, "a line is longer than 256 bytes");
            continue;
        }
        match session::answer(&mut console, &mut process, &line) {
            Next::Go { ran: _ } => {}
            Next::Quit(code) => {
                console.flush();
                std::process::exit(code.into());
            }
        }
    }
}
