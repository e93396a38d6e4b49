//! Attacks from user mode. Each tells on the console what it got: `safe` if it was
//! refused, `stolen` or `reached` if it went through. Nothing here is a defence; what the attacker
//! can't do by itself (choosing its registers) the kernel does for it.

use crate::h::layout::{DIRECT_MAP, PAGE};
use crate::h::{Call, Registers, cause, evtchn, iret, mmuext, vcpu_op};
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
    ("attack-find-key", find_key),
    ("attack-gate-bytes", gate_bytes),
    ("attack-nested", nested),
    ("attack-trapping", trapping),
    ("attack-altstack", altstack),
    ("attack-blocked", blocked),
    ("attack-forged-done", forged_done),
    ("attack-preempt", unpreemptible),
    ("attack-return", forged_return),
];

pub(crate) const VA: u64 = 0x4000_0000;
const VA2: u64 = VA + 32 * PAGE;
const VA3: u64 = VA + 64 * PAGE;
const GATE: u64 = 0x7000_0000_0000;
const COMMANDS: u64 = 0x7000_0001_0000;
pub(crate) const SIGNAL_STACK: u64 = COMMANDS + PAGE;
const GATE_SIGNAL: u64 = 0x5f00;
/// A forged signal frame: between the places of a fresh one and of the host's.
const FORGED: u64 = SIGNAL_STACK + 0x2000;
/// uretprobe and uprobe: the host's kernel lets them through every filter (Linux 6.14, seccomp:
/// passthrough uretprobe), and fails them unless its own trampoline makes them.
pub(crate) const PROBES: [u64; 2] = [335, 336];
pub(crate) const SECRET: u64 = 0x5ec4_e75e_c4e7;

/// A space whose tables map a page at `VA` and one at `VA3`, and a frame with a secret that they don't.
pub(crate) fn space() -> u64 {
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

pub(crate) fn start(registers: &Registers) -> Result<Stopped, i64> {
    try_enter(iret::START, registers as *const _ as u64)
}

pub(crate) fn verdict(went_through: bool) {
    say(if went_through { "reached\n" } else { "safe\n" });
}

pub(crate) fn verdict_of_call(result: i64) {
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
pub(crate) fn forge(rip: u64, rdi: u64, stack: u64, mask: u64) {
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
pub(crate) const OWN: u64 = USER_STACK - 2 * PAGE;
/// The gate's first instruction after it has loaded the address of the command page.
pub(crate) const GATE_OWN: u64 = GATE + 0x4c;
/// The gate's `mov rsp, [r15 + 8]`, and rt_sigreturn after it.
const GATE_RETURN: u64 = GATE + 0xf1;

/// Fills the attacker's page by way of its frame: the gate is to map the secret.
fn own_page(root: u64, secret: u64) {
    own_command(root, [VA2, PAGE, 3 | 0x11 << 32, secret * PAGE]);
}

/// Fills it with a command.
pub(crate) fn own_command(root: u64, command: [u64; 4]) {
    let page = unsafe { *word(table(root, OWN), OWN / PAGE % 512) } / PAGE & 0xff_ffff;
    let words = [
        // The pretended command page: one command, the forged frame.
        (0, 96),
        (1, FORGED + 8),
        (2, 0),
        (8, command[0]),
        (9, command[1]),
        (10, command[2]),
        (11, command[3]),
    ];
    for (index, value) in words {
        unsafe { *word(page, index) = value };
    }
    // The host has it mapped from here on: a fault inside the gate would give the attacker away.
    start_user(user_read, OWN).call(nr::REPORT);
}

/// What became of an attempt to read the secret.
fn stolen(result: Result<Stopped, i64>) -> bool {
    match result {
        Ok(stopped) if stopped.frame.cause == cause::SYSCALL => {
            let [value, ..] = stopped.frame.arguments;
            if value != SECRET {
                tell("odd", value as i64);
            }
            true
        }
        Ok(stopped) if stopped.frame.vector == 8 => false,
        Ok(stopped) => {
            expect("address", stopped.exception(14).address as i64, VA2 as i64);
            false
        }
        Err(error) => {
            tell("start", error);
            false
        }
    }
}

fn verdict_of_theft(won: bool) {
    say(if won { "stolen\n" } else { "safe\n" });
}

/// A forged frame that reads the secret, a command page that maps it; the secret's frame.
fn prepare_theft() {
    let root = info().first_free_frame;
    let secret = space();
    own_page(root, secret);
    // A fault that the monitor answers: the gate has held the key once.
    start_user(user_read, VA).call(nr::REPORT);
    forge(user_read as *const () as u64, VA2, SIGNAL_STACK, 0);
}

/// Makes system call `number` as a bait, then has the gate's own code map a frame that no table names,
/// with what the bait has answered as key, and reads it.
fn steal(number: u64) {
    prepare_theft();
    let mut registers = registers(user_steal as *const () as u64, 11);
    registers.gpr[0] = number;
    registers.gpr[6] = FORGED;
    registers.gpr[15] = OWN;
    verdict_of_theft(stolen(start(&registers)));
}

/// The same with a key that was found somewhere.
fn steal_with(key: u64) -> bool {
    let mut registers = registers(user_leap as *const () as u64, 0);
    registers.gpr[1] = GATE_OWN;
    registers.gpr[0] = key;
    registers.gpr[15] = OWN;
    stolen(start(&registers))
}

/// Tries every word of what is mapped beside the guest's own memory as key.
fn find_key() {
    prepare_theft();
    let mut tried = 0;
    for at in (COMMANDS..COMMANDS + 8 * PAGE).step_by(8) {
        let [word, ..] = start_user(user_read, at).call(nr::REPORT);
        if word == 0 {
            continue;
        }
        tried += 1;
        if steal_with(word) {
            return verdict_of_theft(true);
        }
        // The process is another one now.
        forge(user_read as *const () as u64, VA2, SIGNAL_STACK, 0);
        start_user(user_read, OWN).call(nr::REPORT);
    }
    tell("tried", tried);
    verdict_of_theft(tried == 0);
}

pub(crate) fn arm(ns: u64) {
    hc(
        Call::VcpuOp,
        [vcpu_op::SET_SINGLESHOT_TIMER, 0, now() + ns, 0, 0],
    );
}

pub(crate) fn watchdog() {
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
        [10, VA2, PAGE, 3, 0, 0, 0],
        [11, OWN, PAGE, 0, 0, 0, 0],
        [GATE_SIGNAL, 11, FORGED, 0, 0, 0, 0],
        [GATE_SIGNAL + 1, 0, 0, 0, 0, 0, 0],
        [15, 0, 0, 0, 0, 0, 0],
    ];
    let mut outcomes = [0i64; 4];
    for set in sets {
        for byte in 0..0x1a0 {
            let mut registers = registers(user_leap as *const () as u64, set[1]);
            registers.gpr[1] = GATE + byte;
            registers.gpr[0] = set[0];
            registers.gpr[6] = set[2];
            registers.gpr[2] = set[3];
            registers.gpr[10] = set[4];
            registers.gpr[8] = set[5];
            registers.gpr[9] = set[6];
            registers.gpr[3] = OWN + 64;
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

/// Registers that jump to the gate's notification, and say there that the forged frame is a fault.
pub(crate) fn leap_to_notify() -> Registers {
    let mut registers = registers(user_leap as *const () as u64, 11);
    registers.gpr[1] = GATE + 0x40;
    registers.gpr[0] = GATE_SIGNAL;
    registers.gpr[6] = FORGED;
    registers
}

/// Whether it was stopped right behind the notification, where rax is the key.
pub(crate) fn in_gate_with_key(stopped: &Stopped) -> bool {
    stopped.frame.registers.rip == GATE + 0x42
}

/// Jumps to the gate with a fault that is the kernel's to answer; has it answered after `meanwhile`,
/// and the gate interrupted by a preemption as soon as it has the key, signals not being blocked.
pub(crate) fn interrupt_gate(rip: u64, rdi: u64, meanwhile: impl FnOnce()) -> Result<Stopped, i64> {
    use core::sync::atomic::Ordering::SeqCst;
    forge(rip, rdi, SIGNAL_STACK, 0);
    poke(FORGED + 224, VA2);
    let stopped = start(&leap_to_notify())?;
    expect("address", stopped.exception(14).address as i64, VA2 as i64);
    meanwhile();
    shared().upcall_pending.store(1, SeqCst);
    let result = try_enter(iret::RESUME_FRAME, 0);
    shared().upcall_pending.store(0, SeqCst);
    result
}

/// A gate that has the key is interrupted, so that the key is in a frame.
fn nested() {
    prepare_theft();
    match interrupt_gate(user_read as *const () as u64, VA2, || {}) {
        Ok(stopped) if in_gate_with_key(&stopped) => {
            forge(user_read as *const () as u64, VA2, SIGNAL_STACK, 0);
            verdict_of_theft(steal_with(stopped.frame.registers.gpr[0]));
        }
        stopped => expect_failsafe(stopped),
    }
}

/// Jumps to the gate with the trap flag set.
fn trapping() {
    space();
    forge(user_read as *const () as u64, VA, SIGNAL_STACK, 0);
    let mut registers = leap_to_notify();
    registers.rflags |= 1 << 8;
    expect_failsafe(start(&registers));
}

/// Has K return into a frame that moves the signal stack; the next fault's frame would lie where the
/// attacker wants.
fn altstack() {
    space();
    forge(user_read as *const () as u64, VA2, OWN - 0x6000, 0);
    faults_in_order();
}

/// Has K return into a frame that blocks every signal; then the process faults, for which the host would
/// end it.
fn blocked() {
    space();
    forge(user_read as *const () as u64, VA2, SIGNAL_STACK, u64::MAX);
    faults_in_order();
}

fn faults_in_order() {
    let stopped = start(&leap_to_notify());
    match stopped {
        Ok(stopped) if stopped.frame.vector == 14 => {
            expect("address", stopped.exception(14).address as i64, VA2 as i64);
            verdict(false);
        }
        Ok(stopped) => stopped.tell(),
        Err(error) => tell("start", error),
    }
}

/// Has K return into a frame that blocks every signal; then the process spins.
fn unpreemptible() {
    watchdog();
    space();
    forge(user_spin as *const () as u64, 0, SIGNAL_STACK, u64::MAX);
    arm(5_000_000);
    match start(&leap_to_notify()) {
        Ok(stopped) => {
            expect("cause", stopped.frame.cause as i64, cause::EVENT as i64);
            verdict(false);
        }
        Err(error) => tell("start", error),
    }
}

/// Returns into a forged frame without K, by the gate's own last steps.
fn forged_return() {
    space();
    own_page(info().first_free_frame, 0);
    forge(user_null as *const () as u64, 0, SIGNAL_STACK, u64::MAX);
    let mut registers = registers(user_leap as *const () as u64, 0);
    registers.gpr[1] = GATE_RETURN;
    registers.gpr[15] = OWN;
    match start(&registers) {
        Ok(stopped) if stopped.frame.cause == cause::SYSCALL => verdict(true),
        stopped => expect_failsafe(stopped),
    }
}

/// Says that commands were carried out which nobody has ordered.
fn forged_done() {
    space();
    let mut registers = registers(user_leap as *const () as u64, 0);
    registers.gpr[1] = GATE + 0x40;
    registers.gpr[0] = GATE_SIGNAL + 1;
    expect_failsafe(start(&registers));
}
