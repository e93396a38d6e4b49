//! x87 and MMX state: in the host's registers between runs, in a save area when Rust needs it.
//!
//! Rust code doesn't use x87, so the state of a VM's only vCPU stays in the host's registers between
//! runs. It is put away when another vCPU runs on the same thread, or the thread ends, and copied
//! when an instruction or a caller wants to see it. A vCPU with company puts it away after each run,
//! for its thread may change. The area is in the layout of fxsave64 (SDM 1 table 10-2); its SSE half
//! means nothing, since XMM registers have slots of their own.
//!
//! Invariant: a thread's x87 registers hold the state of that thread's owner, or of nobody.

use std::{
    arch::asm,
    cell::{Cell, RefCell},
    ptr,
    sync::{Arc, atomic::Ordering},
};

use engine_core::Error;

use crate::{
    arena::Arena,
    context::{Aligned, Context},
};

thread_local! {
    static OWNER: Cell<*mut Context> = const { Cell::new(ptr::null_mut()) };
    static STATE: RefCell<Option<Owned>> = const { RefCell::new(None) };
}

/// State in this thread's registers, with the memory it goes to.
struct Owned(Arc<Arena>);

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the arena is alive, and its state is in this thread's registers. They are left as
        // the calling convention expects them.
        unsafe {
            save(&raw mut (*self.0.context()).x87);
            asm!("fninit");
        }
        OWNER.set(ptr::null_mut());
        self.0.x87_away.store(true, Ordering::Release);
    }
}

/// Offsets in the area.
pub(crate) const FCW: usize = 0;
pub(crate) const FSW: usize = 2;
pub(crate) const FTW: usize = 4;
pub(crate) const FOP: usize = 6;
pub(crate) const FIP: usize = 8;
pub(crate) const FDP: usize = 16;
pub(crate) const MXCSR: usize = 24;
pub(crate) const ST: usize = 32;

type Area = Aligned<[u8; 512]>;

/// True if the host's CPU keeps data pointer and opcode of unmasked exceptions alone (SDM 2A CPUID: leaf 7,
/// EBX bit 6).
pub(crate) fn kept_for_exceptions() -> bool {
    engine_core::cpuid::pinned(7, 0)[1] >> 6 & 1 == 1
}

/// The last x87 opcode (SDM 1 8.1.9) of the instruction with these bytes; None if some can't be read.
pub(crate) fn opcode(byte: impl Fn(u64) -> Option<u8>, long: bool) -> Option<u16> {
    let prefix = |byte: u8| {
        let rex = long && byte >> 4 == 4;
        rex || matches!(
            byte,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
        )
    };
    for at in 0..14 {
        match byte(at)? {
            opcode @ 0xd8..=0xdf => {
                return Some(u16::from(opcode & 7) << 8 | u16::from(byte(at + 1)?));
            }
            other if prefix(other) => {}
            _ => return None,
        }
    }
    None
}

/// State after finit: FCW 0x37f, all registers empty.
pub(crate) fn reset(area: &mut Area) {
    area.0 = [0; 512];
    area.0[FCW..FCW + 2].copy_from_slice(&0x37fu16.to_le_bytes());
}

/// # Safety
/// `area` is valid.
unsafe fn save(area: *mut Area) {
    // SAFETY: 512 writable bytes, aligned to 64.
    unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack)) };
}

/// # Safety
/// `area` is valid.
unsafe fn load(area: *mut Area) {
    // SAFETY: the host's MXCSR goes into the image and so stays as it is; the XMM registers that
    // the image overwrites are declared.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) area.cast::<u8>().add(MXCSR), options(nostack));
        asm!(
            "fxrstor64 [{}]", in(reg) area,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack),
        );
    }
}

/// Makes the host's x87 registers hold the state of the vCPU in `arena`.
///
/// # Errors
/// [`Error::Engine`] if it is in the registers of another thread still.
#[inline]
pub(crate) fn acquire(arena: &Arc<Arena>) -> Result<(), Error> {
    if OWNER.get() == arena.context() {
        return Ok(());
    }
    take_over(arena)
}

#[cold]
fn take_over(arena: &Arc<Arena>) -> Result<(), Error> {
    STATE.take();
    if !arena.x87_away.swap(false, Ordering::Acquire) {
        return Err(Error::Engine(
            "the vCPU has moved, and its x87 registers are those of a thread that goes on".into(),
        ));
    }
    // SAFETY: the calling convention leaves x87 empty between calls, and after fxrstor its contents
    // are of no concern to Rust.
    unsafe { load(&raw mut (*arena.context()).x87) };
    OWNER.set(arena.context());
    STATE.replace(Some(Owned(Arc::clone(arena))));
    Ok(())
}

/// Leaves the state in its area, for whichever thread comes next.
pub(crate) fn put_away(arena: &Arena) {
    if OWNER.get() == arena.context() {
        STATE.take();
    }
}

/// Brings the area of `context` up to date.
pub(crate) fn fetch(context: *mut Context) {
    OWNER.with(|owner| {
        if owner.get() == context {
            // SAFETY: an owner is live.
            unsafe { save(&raw mut (*context).x87) };
        }
    });
}

/// Makes what was written to the area of `context` its state.
pub(crate) fn store(context: *mut Context) {
    OWNER.with(|owner| {
        if owner.get() == context {
            // SAFETY: an owner is live.
            unsafe { load(&raw mut (*context).x87) };
        }
    });
}

/// The full tag word (SDM 1 8.1.7) of an area: what fstenv stores, and the area abridges.
pub(crate) fn full_tags(area: &[u8; 512]) -> u16 {
    let top = area[FSW + 1] >> 3 & 7;
    (0..8u8).fold(0, |tags, physical| {
        let tag = if area[FTW] >> physical & 1 == 0 {
            3
        } else {
            let at = ST + 16 * usize::from(physical.wrapping_sub(top) & 7);
            let fraction = u64::from_le_bytes(std::array::from_fn(|byte| area[at + byte]));
            let exponent = u16::from_le_bytes([area[at + 8], area[at + 9]]) & 0x7fff;
            match (exponent, fraction) {
                (0, 0) => 1,
                // Infinities, NaNs, denormals and unnormals.
                (0 | 0x7fff, _) => 2,
                (_, fraction) if fraction >> 63 == 0 => 2,
                (_, _) => 0,
            }
        };
        tags | tag << (2 * physical)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_follow_the_registers_contents() {
        let mut area = Aligned([0; 512]);
        reset(&mut area);
        assert_eq!(full_tags(&area.0), 0xffff);
        // TOP 6: ST0 is R6, ST1 is R7; 1.0 and 0.
        area.0[FSW + 1] = 6 << 3;
        area.0[FTW] = 0xc0;
        area.0[ST + 7] = 0x80;
        area.0[ST + 8..ST + 10].copy_from_slice(&0x3fffu16.to_le_bytes());
        assert_eq!(full_tags(&area.0), 0x4fff);
    }
}
