//! Upcalls: what the host enters this kernel for.
//!
//! System calls are answered, the faults that workloads provoke are mended, and user mode goes on;
//! anything else ends the application, and `user::call` returns. Entries run on a stack of
//! their own, which is dropped as it is: nothing on it outlives an upcall.

use super::{
    crash, events,
    hypercall::{self, Errno},
    space::{PROBE, PROBES, STORM},
    user::{ANSWER, LEAVE, UNMAP},
};
use abi::hypercall::{TrapEntry, UpcallFrame, errno, layout};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use programs::{Fault, Ring, nano::syscall};

/// Vectors with an entry: all that an instruction can raise (SDM 3A, table 6-1).
const VECTORS: [u8; 15] = [0, 1, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19];
const DIVIDE_ERROR: u64 = 0;
const BREAKPOINT: u64 = 3;
const DOUBLE_FAULT: u64 = 8;
const PAGE_FAULT: u64 = 14;
/// Length of the division that the divzero workload does.
const DIVISION: u64 = 2;

unsafe extern "C" {
    static aware_upcall_stack_top: u8;
    safe fn aware_leave(value: u64) -> !;
}

/// Stack pointer of the `aware_enter` under way.
#[unsafe(no_mangle)]
static aware_resume_stack: AtomicU64 = AtomicU64::new(0);
/// What the system call mixes into its answer: data of the kernel, which user mode can't read.
static KEY: AtomicU64 = AtomicU64::new(syscall::KEY);

/// Faults mended.
pub(super) static MENDED: AtomicU64 = AtomicU64::new(0);
/// Divide errors are skipped.
pub(super) static DIVISIONS: AtomicBool = AtomicBool::new(false);
/// Breakpoints are counted.
pub(super) static BREAKPOINTS: AtomicBool = AtomicBool::new(false);
/// The entry that a probe page gets at its first touch; 0 is off.
pub(super) static PROBE_ENTRY: AtomicU64 = AtomicU64::new(0);
/// Pages of the storm that are mapped at their first touch; 0 is off.
pub(super) static STORM_PAGES: AtomicU64 = AtomicU64::new(0);
/// Faults that are still mended so: no more than there are frames, whatever the host does.
pub(super) static STORM_LEFT: AtomicU64 = AtomicU64::new(0);
/// The entry that the next one gets.
pub(super) static STORM_NEXT: AtomicU64 = AtomicU64::new(0);

/// An application has faulted: [`LAST`] says how.
static FAULTED: AtomicBool = AtomicBool::new(false);
/// Vector, error, rip, address.
static LAST: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// Registers the entries.
pub(super) fn set_up() -> Result<(), Errno> {
    let mut table = [TrapEntry::default(); VECTORS.len() + 1];
    for (slot, vector) in table.iter_mut().zip(VECTORS) {
        *slot = TrapEntry {
            vector,
            cs: layout::KERNEL_CS,
            address: exception as *const () as u64,
            ..TrapEntry::default()
        };
    }
    hypercall::set_trap_table(&table)?;
    hypercall::set_callbacks(
        event as *const () as u64,
        beyond_help as *const () as u64,
        system_call as *const () as u64,
    )?;
    hypercall::stack_switch((&raw const aware_upcall_stack_top) as u64)?;
    Ok(())
}

/// The fault that ended the last application, if one did.
pub(super) fn fault() -> Option<Fault> {
    if !FAULTED.swap(false, Relaxed) {
        return None;
    }
    let [vector, error, rip, address] = LAST.each_ref().map(|word| word.load(Relaxed));
    Some(Fault {
        ring: Ring::User,
        vector: vector as u8,
        error,
        rip,
        address,
    })
}

unsafe extern "C" fn system_call(frame: *mut UpcallFrame) -> ! {
    // SAFETY: the host passes its frame, which nothing else touches until the next iret.
    let frame = unsafe { &*frame };
    let [argument, ..] = frame.arguments;
    let value = match frame.number {
        ANSWER => argument ^ KEY.load(Relaxed),
        LEAVE => aware_leave(argument),
        UNMAP => match hypercall::update_va_mapping(PROBE, 0, PROBES) {
            Ok(_) => 0,
            Err(errno) => errno.0.wrapping_neg() as u64,
        },
        _ => errno::ENOSYS.wrapping_neg() as u64,
    };
    crash::host_refuses("to continue a system call", hypercall::resume(value))
}

unsafe extern "C" fn exception(frame: *mut UpcallFrame) -> ! {
    // SAFETY: as above.
    let frame = unsafe { &mut *frame };
    if frame.ring == 0 {
        crash::fault(frame);
    }
    match mend(frame) {
        Ok(true) => {}
        Ok(false) => end(frame, frame.vector),
        Err(errno) => crash::host_refuses("to mend a fault", errno),
    }
    MENDED.fetch_add(1, Relaxed);
    crash::host_refuses("to continue after an exception", hypercall::resume_frame())
}

/// Mends a fault that a workload provokes; says whether it was one.
#[inline(always)]
fn mend(frame: &mut UpcallFrame) -> Result<bool, Errno> {
    match frame.vector {
        // Bit 0: the page was there, so this is no first touch (SDM 3A 4.7).
        PAGE_FAULT if frame.error & 1 == 0 => {
            let page = frame.address & !(layout::PAGE - 1);
            let probe = PROBE_ENTRY.load(Relaxed);
            let storm = STORM_PAGES.load(Relaxed);
            let entry = if probe != 0 && page.wrapping_sub(PROBE) < PROBES * layout::PAGE {
                probe
            } else if page.wrapping_sub(STORM) < storm * layout::PAGE
                && STORM_LEFT.load(Relaxed) != 0
            {
                STORM_LEFT.fetch_sub(1, Relaxed);
                STORM_NEXT.fetch_add(layout::PAGE, Relaxed)
            } else {
                return Ok(false);
            };
            hypercall::update_va_mapping(page, entry, 1)?;
            Ok(true)
        }
        DIVIDE_ERROR if DIVISIONS.load(Relaxed) => {
            frame.registers.rip += DIVISION;
            Ok(true)
        }
        BREAKPOINT if BREAKPOINTS.load(Relaxed) => Ok(true),
        _ => Ok(false),
    }
}

unsafe extern "C" fn event(_frame: *mut UpcallFrame) -> ! {
    events::deliver();
    crash::host_refuses("to continue after an event", hypercall::resume_frame())
}

/// A user process has destroyed what the host needs to continue it.
unsafe extern "C" fn beyond_help(frame: *mut UpcallFrame) -> ! {
    // SAFETY: as above.
    end(unsafe { &*frame }, DOUBLE_FAULT)
}

/// Ends the application.
fn end(frame: &UpcallFrame, vector: u64) -> ! {
    let words = [vector, frame.error, frame.registers.rip, frame.address];
    for (slot, word) in LAST.iter().zip(words) {
        slot.store(word, Relaxed);
    }
    FAULTED.store(true, Relaxed);
    aware_leave(0)
}
