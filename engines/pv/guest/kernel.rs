//! What every scenario uses: hypercalls, the console, frames, tables, user mode.

use core::arch::{asm, global_asm};

use crate::h::layout::{KERNEL_CS, KERNEL_SS, PAGE, USER_CS, USER_SS};
use crate::h::{
    Call, MmuextOp, Registers, SharedInfo, StartInfo, TrapEntry, UpcallFrame, call, cause,
    console_io, iret, mmuext, sched,
};

/// Bits of an entry.
pub(crate) const P: u64 = 1;
pub(crate) const W: u64 = 2;
pub(crate) const U: u64 = 4;
pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;
pub(crate) const NX: u64 = 1 << 63;

static mut INFO: Option<&'static StartInfo> = None;
static mut NEXT_FRAME: u64 = 0;

pub(crate) fn init(info: &'static StartInfo) {
    unsafe {
        INFO = Some(info);
        NEXT_FRAME = info.first_free_frame;
    }
    let stack = (&raw const kernel_stack_top) as u64;
    expect(
        "stack_switch",
        hc(Call::StackSwitch, [KERNEL_SS.into(), stack, 0, 0, 0]),
        0,
    );
    let entry = |vector| TrapEntry {
        vector,
        cs: KERNEL_CS,
        address: upcall as *const () as u64,
        ..TrapEntry::default()
    };
    let mut table = [TrapEntry::default(); 33];
    for vector in 0..32 {
        table[vector] = entry(vector as u8);
    }
    expect(
        "set_trap_table",
        hc(Call::SetTrapTable, [table.as_ptr() as u64, 0, 0, 0, 0]),
        0,
    );
    let entry = upcall as *const () as u64;
    expect(
        "set_callbacks",
        hc(Call::SetCallbacks, [entry, entry, entry, 0, 0]),
        0,
    );
}

pub(crate) fn info() -> &'static StartInfo {
    unsafe { INFO.unwrap_unchecked() }
}

pub(crate) fn shared() -> &'static SharedInfo {
    unsafe { &*(info().shared_info as *const SharedInfo) }
}

pub(crate) fn command() -> &'static str {
    let info = info();
    let bytes = &info.command_line[..info.command_line_length as usize];
    core::str::from_utf8(bytes).unwrap_or("")
}

pub(crate) fn hc(which: Call, arguments: [u64; 5]) -> i64 {
    unsafe { call(info().hypercall_page, which, arguments) }
}

pub(crate) fn say(text: &str) {
    hc(
        Call::ConsoleIo,
        [
            console_io::WRITE,
            text.len() as u64,
            text.as_ptr() as u64,
            0,
            0,
        ],
    );
}

/// Says `name value` on a line.
pub(crate) fn tell(name: &str, value: i64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = value.unsigned_abs();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    say(name);
    say(if value < 0 { " -" } else { " " });
    say(core::str::from_utf8(&digits[at..]).unwrap_or("?"));
    say("\n");
}

/// Ends the guest with a message unless both are the same.
pub(crate) fn expect(what: &str, is: i64, should: i64) {
    if is != should {
        say("wrong: ");
        tell(what, is);
        tell("expected", should);
        shutdown(1);
    }
}

pub(crate) fn shutdown(code: u64) -> ! {
    loop {
        hc(Call::SchedOp, [sched::SHUTDOWN, code, 0, 0, 0]);
    }
}

/// A frame nobody uses, zeroed.
pub(crate) fn frame() -> u64 {
    unsafe {
        NEXT_FRAME += 1;
        NEXT_FRAME - 1
    }
}

/// `count` frames, of which the first is a multiple of `align`.
pub(crate) fn frames(count: u64, align: u64) -> u64 {
    unsafe {
        let first = NEXT_FRAME.next_multiple_of(align);
        NEXT_FRAME = first + count;
        first
    }
}

/// A word of a frame, through the direct map.
pub(crate) fn word(frame: u64, index: u64) -> *mut u64 {
    (info().direct_map + frame * PAGE + index * 8) as *mut u64
}

/// Puts an entry for `va` into an unpinned tree.
pub(crate) fn put(root: u64, va: u64, value: u64) {
    let table = table(root, va);
    unsafe { *word(table, va / PAGE % 512) = value };
}

/// The level-1 table for `va` in an unpinned tree, made if it is not there.
pub(crate) fn table(root: u64, va: u64) -> u64 {
    let mut table = root;
    for shift in [39, 30, 21] {
        let entry = word(table, va >> shift & 511);
        unsafe {
            if *entry & P == 0 {
                *entry = frame() * PAGE | P | W | U;
            }
            table = *entry / PAGE & 0xff_ffff_ffff;
        }
    }
    table
}

unsafe extern "C" {
    static utext_start: u8;
    static utext_end: u8;
    static kernel_stack_top: u8;
}

pub(crate) const USER_STACK: u64 = 0x7000_0000;

/// A root with user code and a stack, not pinned.
pub(crate) fn new_root() -> u64 {
    let root = frame();
    let (start, end) = unsafe { (&raw const utext_start as u64, &raw const utext_end as u64) };
    for va in (start..end).step_by(PAGE as usize) {
        // The image's virtual addresses are its physical ones.
        put(root, va, va | P | U);
    }
    put(root, USER_STACK - PAGE, frame() * PAGE | P | W | U | NX);
    put(root, USER_STACK - 2 * PAGE, frame() * PAGE | P | W | U | NX);
    root
}

pub(crate) fn ext(command: u32, argument: u64) -> i64 {
    let operation = MmuextOp {
        command,
        reserved: 0,
        argument,
    };
    hc(Call::MmuextOp, [&raw const operation as u64, 1, 0, 0, 0])
}

/// A pinned root with user code and a stack, made current.
pub(crate) fn new_space() -> u64 {
    let root = new_root();
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("new_user_baseptr", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    root
}

/// What user mode stopped for.
#[derive(Clone, Copy)]
pub(crate) struct Stopped {
    pub(crate) frame: UpcallFrame,
}

impl Stopped {
    pub(crate) fn call(&self, number: u64) -> [u64; 6] {
        if self.frame.cause != cause::SYSCALL || self.frame.number != number {
            self.tell();
            expect("syscall", self.frame.number as i64, number as i64);
            expect("cause", self.frame.cause as i64, cause::SYSCALL as i64);
        }
        self.frame.arguments
    }

    pub(crate) fn exception(&self, vector: u64) -> UpcallFrame {
        if self.frame.cause != cause::EXCEPTION || self.frame.vector != vector {
            self.tell();
            expect("vector", self.frame.vector as i64, vector as i64);
            expect("cause", self.frame.cause as i64, cause::EXCEPTION as i64);
        }
        self.frame
    }

    pub(crate) fn tell(&self) {
        tell("stopped: cause", self.frame.cause as i64);
        tell("number", self.frame.number as i64);
        tell("vector", self.frame.vector as i64);
        tell("error", self.frame.error as i64);
        tell("address", self.frame.address as i64);
        tell("rip", self.frame.registers.rip as i64);
        tell("rsp", self.frame.registers.gpr[4] as i64);
        tell("rax", self.frame.registers.gpr[0] as i64);
    }
}

// `enter` makes iret look like a call that returns at the next upcall: it keeps the callee-saved
// registers and the stack, and the upcall entry returns to them.
global_asm!(
    ".pushsection .text",
    "enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + entered_stack], rsp",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rax, rcx",
    "call rax",
    // Only an error comes here.
    "jmp 2f",
    "upcall:",
    "mov rax, rdi",
    "mov rsp, [rip + entered_stack]",
    "2:",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
    ".pushsection .bss",
    ".balign 16",
    "entered_stack: .zero 16",
    ".zero 0x4000",
    ".globl kernel_stack_top",
    "kernel_stack_top:",
    ".popsection",
);

unsafe extern "C" {
    fn enter(unused: u64, form: u64, argument: u64, entry: u64) -> i64;
    fn upcall();
}

/// Enters user mode; the upcall that ends it, or the error.
pub(crate) fn try_enter(form: u64, argument: u64) -> Result<Stopped, i64> {
    let entry = info().hypercall_page + 32 * Call::Iret as u64;
    let result = unsafe { enter(0, form, argument, entry) };
    if result < 0 {
        return Err(result);
    }
    Ok(Stopped {
        frame: unsafe { *(result as *const UpcallFrame) },
    })
}

pub(crate) fn continue_with(form: u64, argument: u64) -> Stopped {
    match try_enter(form, argument) {
        Ok(stopped) => stopped,
        Err(error) => {
            tell("iret", error);
            shutdown(1)
        }
    }
}

pub(crate) fn registers(entry: u64, argument: u64) -> Registers {
    let mut registers = Registers {
        rip: entry,
        cs: USER_CS.into(),
        ss: USER_SS.into(),
        ..Registers::default()
    };
    registers.gpr[4] = USER_STACK - 64 - 8;
    registers.gpr[7] = argument;
    registers
}

/// Starts user code with `argument` in rdi.
pub(crate) fn start_user(entry: unsafe extern "C" fn(u64) -> !, argument: u64) -> Stopped {
    let registers = registers(entry as *const () as u64, argument);
    continue_with(iret::START, &raw const registers as u64)
}

pub(crate) fn resume(value: i64) -> Stopped {
    continue_with(iret::RESUME, value as u64)
}

pub(crate) fn retry() -> Stopped {
    continue_with(iret::RESUME_FRAME, 0)
}

pub(crate) fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

/// System time in ns.
pub(crate) fn now() -> u64 {
    use core::sync::atomic::Ordering::SeqCst;
    let clock = &shared().clock;
    loop {
        let version = clock.version.load(SeqCst);
        let ticks = rdtsc() - clock.tsc_timestamp.load(SeqCst);
        let scaled = ticks << clock.shift.load(SeqCst);
        let ns = (u128::from(scaled) * u128::from(clock.multiplier.load(SeqCst)) >> 32) as u64;
        let time = clock.system_time.load(SeqCst) + ns;
        if version & 1 == 0 && clock.version.load(SeqCst) == version {
            return time;
        }
    }
}
