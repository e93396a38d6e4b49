//! Attacks, from user mode and from the kernel. Each tells on the console what it got: `safe` if it was
//! refused, `stolen` or `reached` if it went through. Nothing here is a defence; what the attacker
//! can't do by itself (choosing its registers) the kernel does for it.

use core::arch::asm;

use crate::h::layout::{DIRECT_MAP, PAGE};
use crate::h::{Call, MmuUpdate, Registers, cause, console_io, evtchn, iret, mmuext, vcpu_op};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("attack-read", read),
    ("attack-stub", || probe(0x7000_1000_0000)),
    ("attack-other-slot", || {
        probe(GATE - 0x1000_0000 + 0x8000 + 0x1000)
    }),
    ("attack-commands", || write(COMMANDS)),
    ("attack-host-calls", host_calls),
    ("attack-getppid", || one_host_call(110)),
    ("attack-steal", || steal(GATE_SIGNAL)),
    ("attack-steal-idle", || steal(0x5fff)),
    ("attack-gate-bytes", gate_bytes),
    ("attack-nested", nested),
    ("attack-altstack", altstack),
    ("attack-blocked", blocked),
    ("attack-forged-done", forged_done),
    ("attack-preempt", unpreemptible),
    ("attack-kernel-calls", kernel_calls),
    ("attack-kernel-getppid", || {
        verdict_of_call(unsafe { host(110, [0; 6]) })
    }),
    ("attack-kernel-answer", kernel_answer),
    ("attack-kernel-vmm", kernel_vmm),
    ("attack-kernel-kill", kernel_kill),
    ("attack-kernel-table", kernel_table),
    ("attack-kernel-pointer", kernel_pointer),
    ("attack-kernel-ring", || unsafe {
        let ring = &*(info().console as *const crate::h::ConsoleRing);
        ring.output_producer
            .store(u32::MAX, core::sync::atomic::Ordering::SeqCst);
        hc(Call::ConsoleIo, [console_io::FLUSH, 0, 0, 0, 0]);
    }),
    ("attack-kernel-ledger", kernel_ledger),
    ("attack-kernel-stack", || unsafe {
        asm!("mov rsp, 8", "push rax", "hlt", options(noreturn));
    }),
];

const VA: u64 = 0x4000_0000;
const VA2: u64 = VA + 32 * PAGE;
const VA3: u64 = VA + 64 * PAGE;
const GATE: u64 = 0x7000_0000_0000;
const COMMANDS: u64 = 0x7000_0001_0000;
const SIGNAL_STACK: u64 = COMMANDS + PAGE;
const GATE_SIGNAL: u64 = 0x5f00;
/// A forged signal frame: between the places of a fresh one and of the host's.
const FORGED: u64 = SIGNAL_STACK + 0x2000;
/// uretprobe and uprobe: the host's kernel lets them through every filter (Linux 6.14, seccomp:
/// passthrough uretprobe), and fails them unless its own trampoline makes them.
const PROBES: [u64; 2] = [335, 336];
const SECRET: u64 = 0x5ec4_e75e_c4e7;

/// A space whose tables map a page at `VA` and one at `VA3`, and a frame with a secret that they don't.
fn space() -> u64 {
    let root = new_root();
    table(root, VA);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    expect("base", ext(mmuext::NEW_USER_BASEPTR, root), 0);
    for va in [VA, VA3] {
        let value = frame() * PAGE | P | W | U;
        expect("map", hc(Call::UpdateVaMapping, [va, value, 0, 1, 0]), 0);
    }
    let secret = frame();
    unsafe { *word(secret, 0) = SECRET };
    secret
}

fn start(registers: &Registers) -> Result<Stopped, i64> {
    try_enter(iret::START, registers as *const _ as u64)
}

fn verdict(went_through: bool) {
    say(if went_through { "reached\n" } else { "safe\n" });
}

fn verdict_of_call(result: i64) {
    verdict(result != -38);
}

/// Reads `address` in user mode.
fn probe(address: u64) {
    space();
    let registers = registers(user_read as *const () as u64, address);
    match start(&registers) {
        Ok(stopped) => verdict(stopped.frame.cause == cause::SYSCALL),
        Err(error) => tell("start", error),
    }
}

fn write(address: u64) {
    space();
    let stopped = start_user(user_write, address);
    verdict(stopped.frame.cause == cause::SYSCALL);
}

fn read() {
    let secret = space();
    let other = secret;
    let addresses = [
        DIRECT_MAP,
        DIRECT_MAP + secret * PAGE,
        0x6000_0000_0000,
        0x6000_0000_3000,
        0x6100_0000_0000,
        0x6200_0000_0000,
        0x6800_0000_0000,
        GATE - PAGE,
        GATE + PAGE,
        COMMANDS - PAGE,
        COMMANDS + 8 * PAGE,
        0x7000_1000_0000,
        0x7fff_ffff_e000,
        0xffff_8000_0000_0000,
        VA2,
        start as *const () as u64,
    ];
    for address in addresses {
        for code in [
            user_read as *const () as u64,
            user_write as *const () as u64,
        ] {
            match start(&registers(code, address)) {
                Ok(stopped) if stopped.frame.cause == cause::EXCEPTION => {}
                _ => {
                    tell("reached", address as i64);
                    return;
                }
            }
        }
    }
    // Another space's memory, at an address that only its own tables map.
    let neighbour = new_root();
    put(neighbour, VA2, other * PAGE | P | W | U);
    expect("pin", ext(mmuext::PIN_L4_TABLE, neighbour), 0);
    expect("base", ext(mmuext::NEW_USER_BASEPTR, neighbour), 0);
    let [value, ..] = start_user(user_read, VA2).call(nr::REPORT);
    expect("the neighbour's own", value as i64, SECRET as i64);
    let first = info().first_free_frame;
    expect("base", ext(mmuext::NEW_USER_BASEPTR, first), 0);
    start_user(user_read, VA2).exception(14);
    verdict(false);
}

fn host_calls() {
    space();
    let mut stopped = start_user(user_host, 0);
    for number in 0..=600 {
        if PROBES.contains(&(number as u64)) && stopped.frame.cause == cause::EXCEPTION {
            expect("probe", stopped.exception(6).registers.gpr[0] as i64, -1);
            stopped = retry();
        }
        let [result, ..] = stopped.call(nr::REPORT);
        if result as i64 != -38 && !(PROBES.contains(&(number as u64)) && (result as i64) < 0) {
            tell("reached", number);
            tell("result", result as i64);
            return;
        }
        stopped = resume(number + 1);
    }
    verdict(false);
}

fn one_host_call(number: u64) {
    space();
    let [result, ..] = start_user(user_host, number).call(nr::REPORT);
    verdict_of_call(result as i64);
}

fn poke(address: u64, value: u64) {
    let mut registers = registers(user_poke as *const () as u64, address);
    registers.gpr[6] = value;
    match start(&registers) {
        Ok(stopped) => _ = stopped.call(nr::REPORT),
        Err(error) => expect("poke", error, 0),
    }
}

/// Writes a signal frame that continues at `rip` with `rdi`, and claims a page fault at `VA3`.
fn forge(rip: u64, rdi: u64, stack: u64, mask: u64) {
    let words = [
        (8, 6),
        (24, stack),
        (32, 1 << 31),
        (40, 0x7000),
        (112, rdi),
        (168, USER_STACK - 72),
        (176, rip),
        (184, 0x202),
        (192, 0x33 | 0x2b << 48),
        (200, 4),
        (208, 14),
        (224, VA3),
        (232, 0),
        (304, mask),
    ];
    for (offset, value) in words {
        poke(FORGED + offset, value);
    }
}

/// Where the attacker keeps what the gate is to believe: the page below its stack.
const OWN: u64 = USER_STACK - 2 * PAGE;

/// Fills the attacker's page by way of its frame.
fn own_page(root: u64, secret: u64) {
    let page = unsafe { *word(table(root, OWN), OWN / PAGE % 512) } / PAGE & 0xff_ffff;
    let words = [
        // The pretended command page: no commands, enter, the forged frame.
        (0, 1 << 32),
        (1, FORGED + 8),
        (2, 0),
        // A command: map the secret.
        (16, VA2),
        (17, PAGE),
        (18, 3),
        (19, secret * PAGE),
        // A message with room for a descriptor.
        (36, OWN + 512),
        (37, 24),
    ];
    for (index, value) in words {
        unsafe { *word(page, index) = value };
    }
    // The host has it mapped from here on: a fault inside the gate would give the attacker away.
    start_user(user_read, OWN).call(nr::REPORT);
}

/// Makes system call `number` as a bait, then maps a frame that no table names through the gate's own
/// code, and reads it.
fn steal(number: u64) {
    let root = info().first_free_frame;
    let secret = space();
    own_page(root, secret);
    // A fault that the monitor answers: the gate has held the descriptor once.
    start_user(user_read, VA).call(nr::REPORT);
    forge(user_read as *const () as u64, VA2, SIGNAL_STACK, 0);
    let mut registers = registers(user_steal as *const () as u64, 11);
    registers.gpr[0] = number;
    registers.gpr[6] = FORGED;
    registers.gpr[3] = OWN + 128;
    registers.gpr[12] = OWN + 256;
    registers.gpr[14] = 1;
    registers.gpr[15] = OWN;
    match start(&registers) {
        Ok(stopped) if stopped.frame.cause == cause::SYSCALL => {
            let [value, ..] = stopped.frame.arguments;
            say(if value == SECRET { "stolen\n" } else { "odd\n" });
        }
        Ok(stopped) => {
            expect("address", stopped.exception(14).address as i64, VA2 as i64);
            verdict(false);
        }
        Err(error) => tell("start", error),
    }
}

fn arm(ns: u64) {
    hc(
        Call::VcpuOp,
        [vcpu_op::SET_SINGLESHOT_TIMER, 0, now() + ns, 0, 0],
    );
}

fn watchdog() {
    let port = hc(
        Call::EventChannelOp,
        [evtchn::BIND_VIRQ, evtchn::VIRQ_TIMER, 0, 0, 0],
    );
    hc(Call::EventChannelOp, [evtchn::UNMASK, port as u64, 0, 0, 0]);
}

fn quiet() {
    use core::sync::atomic::Ordering::SeqCst;
    hc(Call::VcpuOp, [vcpu_op::STOP_SINGLESHOT_TIMER, 0, 0, 0, 0]);
    shared().upcall_pending.store(0, SeqCst);
    shared().pending.store(0, SeqCst);
}

/// Jumps to every byte of the gate with registers that fit each of its system calls.
fn gate_bytes() {
    watchdog();
    let root = info().first_free_frame;
    let secret = space();
    own_page(root, secret);
    forge(user_read as *const () as u64, VA2, SIGNAL_STACK, 0);
    // rax, rdi, rsi, rdx, r10, r8, r9
    let sets = [
        [9, VA2, PAGE, 3, 0x11, 0, secret * PAGE],
        [47, 3, OWN + 256, 0x40, 0, 0, 0],
        [GATE_SIGNAL, 11, FORGED, 0, 0, 0, 0],
        [GATE_SIGNAL + 1, 0, 0, 0, 0, 0, 0],
        [15, 0, 0, 0, 0, 0, 0],
    ];
    let mut outcomes = [0i64; 4];
    for set in sets {
        for byte in 0..0x1b0 {
            let mut registers = registers(user_leap as *const () as u64, set[1]);
            registers.gpr[1] = GATE + byte;
            registers.gpr[0] = set[0];
            registers.gpr[6] = set[2];
            registers.gpr[2] = set[3];
            registers.gpr[10] = set[4];
            registers.gpr[8] = set[5];
            registers.gpr[9] = set[6];
            registers.gpr[3] = OWN + 128;
            registers.gpr[14] = 1;
            registers.gpr[15] = OWN;
            arm(2_000_000);
            match start(&registers) {
                Ok(stopped) => {
                    outcomes[stopped.frame.cause as usize] += 1;
                    if stopped.frame.cause == cause::SYSCALL && stopped.frame.arguments[0] == SECRET
                    {
                        tell("stolen at", byte as i64);
                        return;
                    }
                }
                Err(_) => outcomes[3] += 1,
            }
            quiet();
            let after = start_user(user_read, VA2);
            if after.frame.cause != cause::EXCEPTION {
                tell("reached at", byte as i64);
                return;
            }
        }
    }
    tell("system calls", outcomes[0]);
    tell("exceptions", outcomes[1]);
    tell("events", outcomes[2]);
    tell("errors", outcomes[3]);
    verdict(false);
}

/// The failsafe upcall, and a new start afterwards.
fn expect_failsafe(result: Result<Stopped, i64>) {
    match result {
        Ok(stopped) => stopped.exception(8),
        Err(error) => return tell("start", error),
    };
    expect("resume", iret_error(iret::RESUME), 8);
    let [value, ..] = start_user(user_read, VA).call(nr::REPORT);
    expect("fresh", value as i64, 0);
    verdict(false);
}

/// Continuing a broken process is a failsafe upcall again: its vector.
fn iret_error(form: u64) -> i64 {
    match try_enter(form, 0) {
        Ok(stopped) => stopped.frame.vector as i64,
        Err(error) => error,
    }
}

/// A gate that carries out commands is interrupted: by the trap flag, signals not being blocked.
fn nested() {
    space();
    forge(user_read as *const () as u64, VA, SIGNAL_STACK, 0);
    let mut registers = registers(user_leap as *const () as u64, 11);
    registers.gpr[1] = GATE + 0x40;
    registers.gpr[0] = GATE_SIGNAL;
    registers.gpr[6] = FORGED;
    let plain = registers;
    // Without the flag the forged fault is answered, and the forged frame returned into.
    match start(&plain) {
        Ok(stopped) => _ = stopped.call(nr::REPORT),
        Err(error) => tell("start", error),
    }
    ext(mmuext::TLB_FLUSH_LOCAL, 0);
    registers.rflags |= 1 << 8;
    // The jump itself traps first: go on with the flag set.
    let mut stopped = start(&registers);
    for _ in 0..2 {
        match &stopped {
            Ok(one) if one.frame.vector == 1 && one.frame.cause == cause::EXCEPTION => {
                if (GATE..GATE + PAGE).contains(&one.frame.registers.rip) {
                    // The gate's address is the user's own rip here; it can't be entered by iret.
                    let error = iret_error(iret::RESUME_FRAME);
                    tell("into the gate", error);
                    return verdict(false);
                }
                stopped = try_enter(iret::RESUME_FRAME, 0);
            }
            _ => break,
        }
    }
    expect_failsafe(stopped);
}

/// A forged return moves the signal stack; the next fault's frame lies where the attacker wants.
fn altstack() {
    space();
    forge(user_read as *const () as u64, VA2, OWN - 0x6000, 0);
    leap_to_return();
}

fn leap_to_return() {
    let mut registers = registers(user_leap as *const () as u64, 0);
    // The gate's `mov rsp, [r15 + 8]` and what follows, with the attacker's r15.
    registers.gpr[1] = GATE + 0x137;
    registers.gpr[15] = OWN;
    own_page(info().first_free_frame, 0);
    let result = start(&registers);
    expect_failsafe(result);
}

/// A forged return blocks every signal; then the process faults: the host ends it.
fn blocked() {
    space();
    forge(user_read as *const () as u64, VA2, SIGNAL_STACK, u64::MAX);
    leap_to_return();
}

/// A forged return blocks every signal; then the process spins.
fn unpreemptible() {
    watchdog();
    space();
    forge(user_spin as *const () as u64, 0, SIGNAL_STACK, u64::MAX);
    arm(5_000_000);
    leap_to_return();
}

/// Says that commands were carried out which nobody has ordered.
fn forged_done() {
    space();
    let mut registers = registers(user_leap as *const () as u64, 0);
    registers.gpr[1] = GATE + 0x40;
    registers.gpr[0] = GATE_SIGNAL + 1;
    expect_failsafe(start(&registers));
}

unsafe fn host(number: u64, arguments: [u64; 6]) -> i64 {
    let result: i64;
    let [a, b, c, d, e, f] = arguments;
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
            in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _);
    }
    result
}

fn kernel_calls() {
    for number in 0..=600 {
        // sched_yield and rt_sigreturn are allowed as they are; the latter would be the end of it.
        if number == 15 || number == 24 || PROBES.contains(&number) {
            continue;
        }
        for argument in [0, 3, 4, u64::MAX] {
            let arguments = [argument, 1, argument, argument, argument, argument];
            let result = unsafe { host(number, arguments) };
            if result != -38 {
                tell("reached", number as i64);
                return;
            }
        }
    }
    verdict(false);
}

/// Answers notifications that do not exist.
fn kernel_answer() {
    for id in [0, 1, 2, 77, u64::MAX] {
        let answer = [id, 0, 0];
        let at = &raw const answer as u64;
        expect(
            "answer",
            unsafe { host(16, [6, 0xc018_2101, at, 0, 0, 0]) },
            -2,
        );
    }
    // Let the system call run after all, as a hostile kernel would (the CONTINUE flag).
    new_space();
    start_user(user_null, 0);
    verdict(false);
}

/// Calls V with arguments that make no sense.
fn kernel_vmm() {
    for slot in [64, 1000, u64::MAX] {
        expect(
            "create",
            unsafe { host(0x6000, [slot, 0, 0, 0, 0, 0]) },
            -22,
        );
        expect("destroy", unsafe { host(0x6001, [slot, 0, 0, 0, 0, 0]) }, 0);
    }
    expect(
        "create",
        unsafe { host(0x6000, [63, 0, 0, 0, 0, 0]) }.signum(),
        1,
    );
    expect("again", unsafe { host(0x6000, [63, 0, 0, 0, 0, 0]) }, -16);
    expect("destroy", unsafe { host(0x6001, [63, 0, 0, 0, 0, 0]) }, 0);
    expect("mark", unsafe { host(0x6002, [99, 0, 0, 0, 0, 0]) }, 0);
    expect("beyond", unsafe { host(0x6007, [0; 6]) }, -38);
    verdict(false);
}

/// Signals whatever it has a descriptor of, and whoever it guesses.
fn kernel_kill() {
    new_space();
    for fd in 0..64 {
        expect("pidfd", unsafe { host(424, [fd, 10, 0, 0, 0, 0]) }, -38);
    }
    expect(
        "kill by pidfd",
        unsafe { host(424, [64, 9, 0, 0, 0, 0]) },
        -38,
    );
    expect("kill", unsafe { host(62, [1, 9, 0, 0, 0, 0]) }, -38);
    expect("tgkill", unsafe { host(234, [1, 1, 9, 0, 0, 0]) }, -38);
    verdict(false);
}

/// Maps a page table writable into user mode.
fn kernel_table() {
    let root = new_root();
    let leaf = table(root, VA);
    expect("pin", ext(mmuext::PIN_L4_TABLE, root), 0);
    let request = MmuUpdate {
        entry: leaf * PAGE,
        value: leaf * PAGE | P | W | U,
    };
    verdict(hc(Call::MmuUpdate, [&raw const request as u64, 1, 0, 0, 0]) == 0);
}

/// Has the monitor read its own memory out on the console.
fn kernel_pointer() {
    let result = hc(
        Call::ConsoleIo,
        [console_io::WRITE, 8, 0x6800_0000_1000, 0, 0],
    );
    verdict(result >= 0);
}

/// Writes nonsense over what V reads, and has V use it.
fn kernel_ledger() {
    for index in 0..512 {
        unsafe {
            (0x6000_0000_3000 as *mut u64)
                .add(index)
                .write_volatile(!0 - index as u64 * 0x101)
        };
    }
    watchdog();
    arm(1_000_000);
    hc(Call::Mark, [1, 0, 0, 0, 0]);
    hc(Call::Mark, [2, 0, 0, 0, 0]);
    hc(Call::SchedOp, [crate::h::sched::BLOCK, 0, 0, 0, 0]);
    verdict(false);
}
