//! Attacks by user mode on what the kernel has taken from it: `reached` if it went through.

use crate::attacks::{
    GATE_OWN, OWN, SECRET, SIGNAL_STACK, VA, forge, in_gate_with_key, interrupt_gate,
    leap_to_notify, own_command, space, start, verdict,
};
use crate::h::layout::PAGE;
use crate::h::{Call, cause, iret, mmuext};
use crate::kernel::*;
use crate::user::*;

pub(crate) const ALL: &[(&str, fn())] = &[
    ("attack-revoked-blocked", revoked_blocked),
    ("attack-revoked-nested", revoked_nested),
    ("attack-revoked-protect", revoked_protect),
];

/// The frame behind `VA`, revoked; nothing but the kernel may write to it from here on.
fn revoke() -> u64 {
    let table = table(info().first_free_frame, VA);
    let frame = unsafe { *word(table, VA / PAGE % 512) } / PAGE & 0xff_ffff;
    expect("unmap", hc(Call::UpdateVaMapping, [VA, 0, 0, 1, 0]), 0);
    unsafe { *word(frame, 0) = SECRET };
    frame
}

fn verdict_of_revocation(frame: u64) {
    verdict(unsafe { word(frame, 0).read_volatile() } != SECRET);
}

/// Blocks every signal, so that nothing brings it to the gate, and waits in a system call while a page
/// is taken from it; then writes there.
fn revoked_blocked() {
    space();
    start_user(user_write, VA).call(nr::REPORT);
    forge(user_rewrite as *const () as u64, VA, SIGNAL_STACK, u64::MAX);
    let stopped = start(&leap_to_notify());
    match stopped {
        Ok(stopped) => _ = stopped.call(nr::REPORT),
        Err(error) => tell("start", error),
    }
    let frame = revoke();
    let after = try_enter(iret::RESUME, VA);
    match after {
        Ok(stopped) if stopped.frame.vector == 14 => _ = stopped.exception(14),
        Ok(stopped) => _ = stopped.exception(8),
        Err(error) => tell("resume", error),
    }
    verdict_of_revocation(frame);
}

/// Waits in the gate while a page is taken from it, and is interrupted there before it carries out
/// anything; then writes there.
fn revoked_nested() {
    space();
    start_user(user_write, VA).call(nr::REPORT);
    let mut frame = 0;
    let stopped = interrupt_gate(user_write as *const () as u64, VA, || frame = revoke());
    match stopped {
        Ok(one) if in_gate_with_key(&one) => {
            // The monitor takes the interrupted gate for user code. Out of it, with what was to go.
            let mut registers = one.frame.registers;
            registers.rip = user_write as *const () as u64;
            registers.gpr[7] = VA;
            match try_enter(iret::RESUME_FRAME, &raw const registers as u64) {
                Ok(stopped) => _ = stopped.call(nr::REPORT),
                Err(error) => tell("resume", error),
            }
        }
        Ok(stopped) => {
            stopped.exception(8);
            start_user(user_write, VA).exception(14);
        }
        Err(error) => tell("resume", error),
    }
    verdict_of_revocation(frame);
}

/// Gives itself access again to a page that was taken away, whose mapping the host may still have.
fn revoked_protect() {
    space();
    own_command(info().first_free_frame, [VA, PAGE, 3 | 1 << 63, 0]);
    start_user(user_write, VA).call(nr::REPORT);
    // A flushed page keeps its mapping, without rights, also when it goes away afterwards.
    expect("invlpg", ext(mmuext::INVLPG_LOCAL, VA), 0);
    let frame = revoke();
    forge(user_write as *const () as u64, VA, SIGNAL_STACK, 0);
    let mut registers = registers(user_leap as *const () as u64, 0);
    registers.gpr[1] = GATE_OWN;
    registers.gpr[15] = OWN;
    match start(&registers) {
        Ok(stopped) if stopped.frame.cause == cause::SYSCALL => {}
        Ok(stopped) => _ = stopped.exception(8),
        Err(error) => tell("start", error),
    }
    verdict_of_revocation(frame);
}
