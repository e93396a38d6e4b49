//! Hypercalls, one function for each that this kernel makes. What they do stands in
//! [`abi::hypercall`]; here is only how their arguments are laid out.
//!
//! These functions are safe because everything a call can change is user mode's and the host's: no
//! hypercall writes kernel memory but where a `&mut` says so.

use abi::hypercall::{
    Call, MmuextOp, MulticallEntry, StartInfo, TrapEntry, console_io, evtchn, iret, layout, sched,
    uvmf, vcpu_op,
};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The hypercall page. asm/user.s reads it.
#[unsafe(no_mangle)]
static aware_hypercalls: AtomicU64 = AtomicU64::new(0);

/// Takes note of where the hypercall page is. Before any other function of this module.
pub(super) fn set_up(info: &StartInfo) {
    aware_hypercalls.store(info.hypercall_page, Relaxed);
}

/// An error number of a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Errno(pub(super) i64);

#[inline(always)]
fn call(number: Call, arguments: [u64; 5]) -> Result<u64, Errno> {
    // SAFETY: `set_up` has stored the page. The callers below pass pointers to what the call needs.
    match unsafe { abi::hypercall::call(aware_hypercalls.load(Relaxed), number, arguments) } {
        error @ ..0 => Err(Errno(error.wrapping_neg())),
        value => Ok(value as u64),
    }
}

/// Registers entries for exceptions; the last one ends the table.
pub(super) fn set_trap_table(entries: &[TrapEntry]) -> Result<u64, Errno> {
    call(Call::SetTrapTable, [entries.as_ptr() as u64, 0, 0, 0, 0])
}

/// Registers entries for events, for user processes beyond help, and for system calls.
pub(super) fn set_callbacks(event: u64, failsafe: u64, syscall: u64) -> Result<u64, Errno> {
    call(Call::SetCallbacks, [event, failsafe, syscall, 0, 0])
}

/// Sets the stack for upcalls from user mode.
pub(super) fn stack_switch(top: u64) -> Result<u64, Errno> {
    call(Call::StackSwitch, [layout::KERNEL_SS.into(), top, 0, 0, 0])
}

/// The call that does least of all: what a hypercall costs by itself.
#[inline(always)]
pub(super) fn fpu_taskswitch() -> Result<u64, Errno> {
    call(Call::FpuTaskswitch, [0; 5])
}

/// Makes calls in order.
pub(super) fn multicall(entries: &mut [MulticallEntry]) -> Result<u64, Errno> {
    let (calls, count) = (entries.as_mut_ptr() as u64, entries.len() as u64);
    call(Call::Multicall, [calls, count, 0, 0, 0])
}

/// The entry of a multicall for [`update_va_mapping`] of one page.
#[inline(always)]
pub(super) fn queued_update(va: u64, value: u64) -> MulticallEntry {
    MulticallEntry {
        call: Call::UpdateVaMapping as u64,
        result: 0,
        arguments: [va, value, uvmf::INVLPG, 1, 0, 0],
    }
}

/// Changes the entries of `count` pages of the current space, frames going up.
#[inline(always)]
pub(super) fn update_va_mapping(va: u64, value: u64, count: u64) -> Result<u64, Errno> {
    call(Call::UpdateVaMapping, [va, value, uvmf::INVLPG, count, 0])
}

/// One extended operation, see [`abi::hypercall::mmuext`].
#[inline(always)]
pub(super) fn mmuext(command: u32, argument: u64) -> Result<u64, Errno> {
    let operation = MmuextOp {
        command,
        reserved: 0,
        argument,
    };
    call(Call::MmuextOp, [&raw const operation as u64, 1, 0, 0, 0])
}

/// Continues a system call with `value`.
#[inline(always)]
pub(super) fn resume(value: u64) -> Errno {
    failed(call(Call::Iret, [iret::RESUME, value, 0, 0, 0]))
}

/// Continues after an exception or an event, with the registers of the upcall frame.
#[inline(always)]
pub(super) fn resume_frame() -> Errno {
    failed(call(Call::Iret, [iret::RESUME_FRAME, 0, 0, 0, 0]))
}

/// What a call that returns only on error has returned.
fn failed(result: Result<u64, Errno>) -> Errno {
    match result {
        Ok(_) => Errno(0),
        Err(errno) => errno,
    }
}

/// An operation on an event channel, see [`evtchn`].
#[inline(always)]
pub(super) fn event_channel(command: u64, argument: u64) -> Result<u64, Errno> {
    call(Call::EventChannelOp, [command, argument, 0, 0, 0])
}

/// Rings the console's doorbell.
#[inline(always)]
pub(super) fn doorbell() -> Result<u64, Errno> {
    event_channel(evtchn::SEND, evtchn::CONSOLE_PORT)
}

/// Has the timer's port raised at that system time.
#[inline(always)]
pub(super) fn set_timer(nanoseconds: u64) -> Result<u64, Errno> {
    let command = vcpu_op::SET_SINGLESHOT_TIMER;
    call(Call::VcpuOp, [command, 0, nanoseconds, 0, 0])
}

/// Has it raised no more.
pub(super) fn stop_timer() -> Result<u64, Errno> {
    call(Call::VcpuOp, [vcpu_op::STOP_SINGLESHOT_TIMER, 0, 0, 0, 0])
}

/// Waits until the host has taken all output.
pub(super) fn flush_console() -> Result<u64, Errno> {
    call(Call::ConsoleIo, [console_io::FLUSH, 0, 0, 0, 0])
}

/// Sleeps until one of these ports is pending.
pub(super) fn poll(ports: u64) -> Result<u64, Errno> {
    call(Call::SchedOp, [sched::POLL, ports, 0, 0, 0])
}

/// Brackets the measured window.
pub(super) fn mark(value: u8) -> Result<u64, Errno> {
    call(Call::Mark, [value.into(), 0, 0, 0, 0])
}

/// Ends the guest.
pub(super) fn shutdown(code: u8) -> ! {
    loop {
        // It does not return; a host that gets that wrong is asked again.
        let _ = call(Call::SchedOp, [sched::SHUTDOWN, code.into(), 0, 0, 0]);
    }
}
