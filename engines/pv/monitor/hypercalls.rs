//! The hypercall page, and what each call does up to the module that does it.

use core::arch::global_asm;

use crate::hypercall::errno::{E2BIG, EINVAL, ENOSYS, EPERM};
use crate::hypercall::{Call, MAX_BATCH, MulticallEntry};
use crate::memory::Errno;
use crate::vmm::{self, count};
use crate::{State, ledger, state};

// Entry `nr` of the page names its call in r9, the sixth argument of `dispatch`, and the common tail
// takes the monitor's stack: the guest kernel's may be small, or anywhere.
global_asm!(
    ".pushsection .calls, \"ax\", @progbits",
    ".balign 4096",
    ".set number, 0",
    ".rept 128",
    ".balign 32",
    "mov r9d, number",
    "jmp hypercall_entry",
    ".set number, number + 1",
    ".endr",
    ".balign 4096",
    ".popsection",
    ".pushsection .text",
    "hypercall_entry:",
    "mov r11, rsp",
    "lea rsp, [rip + monitor_stack_top]",
    "push r11",
    "sub rsp, 8",
    "call {dispatch}",
    "add rsp, 8",
    "pop rsp",
    "ret",
    ".popsection",
    dispatch = sym dispatch,
);

extern "C" fn dispatch(a: u64, b: u64, c: u64, d: u64, e: u64, number: u64) -> i64 {
    // SAFETY: the only reference: the kernel called from outside the monitor.
    let state = unsafe { state() };
    let Some(call) = Call::from_number(number) else {
        return -ENOSYS;
    };
    state.call(call, [a, b, c, d, e])
}

impl State {
    fn call(&mut self, call: Call, arguments: [u64; 5]) -> i64 {
        if let Some(counter) = ledger().calls.get(call as usize) {
            count(counter);
        }
        match self.perform(call, arguments) {
            Ok(value) | Err(value) => value,
        }
    }

    fn perform(&mut self, call: Call, arguments: [u64; 5]) -> Result<i64, Errno> {
        let [a, b, c, d, _] = arguments;
        match call {
            Call::SetTrapTable => self.set_trap_table(a),
            Call::MmuUpdate => self.mmu_update(a, b, c),
            Call::StackSwitch => self.stack_switch(a, b),
            Call::SetCallbacks => self.set_callbacks(a, b, c),
            Call::FpuTaskswitch => {
                if a <= 1 {
                    Ok(0)
                } else {
                    Err(-EINVAL)
                }
            }
            Call::Multicall => self.multicall(a, b),
            Call::UpdateVaMapping => self.update_va_mapping(a, b, c, d),
            Call::ConsoleIo => self.console_io(a, b, c),
            Call::Iret => self.iret(a, b),
            Call::VcpuOp => self.vcpu_op(a, b, c),
            Call::SetSegmentBase => self.set_segment_base(a, b),
            Call::MmuextOp => self.mmuext_op(a, b, c),
            Call::SchedOp => self.sched_op(a, b),
            Call::EventChannelOp => self.event_channel_op(a, b),
            Call::Mark => self.mark(a),
        }
    }

    fn multicall(&mut self, calls: u64, amount: u64) -> Result<i64, Errno> {
        if amount > MAX_BATCH {
            return Err(-E2BIG);
        }
        let entries = self.array::<MulticallEntry>(calls, amount)?;
        for index in 0..amount {
            let at = calls + index * size_of::<MulticallEntry>() as u64;
            let result =
                self.writable::<i64>(at + core::mem::offset_of!(MulticallEntry, result) as u64)?;
            let entry = entries.get(index);
            let [a, b, c, d, e, _] = entry.arguments;
            result.put(match Call::from_number(entry.call) {
                None => -ENOSYS,
                Some(Call::Iret | Call::Multicall | Call::SchedOp) => -EPERM,
                Some(call) => self.call(call, [a, b, c, d, e]),
            });
        }
        Ok(0)
    }

    fn mark(&mut self, value: u64) -> Result<i64, Errno> {
        let known = [abi::mark::BEGIN, abi::mark::END];
        if !known.iter().any(|&mark| u64::from(mark) == value) {
            return Err(-EINVAL);
        }
        Ok(vmm::call(crate::wire::vmm::MARK, value))
    }
}
