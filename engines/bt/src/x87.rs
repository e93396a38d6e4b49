//! x87 and MMX state: in the host's registers between runs, in a save area when Rust needs it.
//!
//! Rust code doesn't use x87, so a vCPU's state stays in the host's registers between runs. It is
//! put away when another vCPU runs on the same thread, and copied when an instruction or a caller
//! wants to see it. The area is in the layout of fxsave64 (SDM 1 table 10-2); its SSE half means
//! nothing, since XMM registers have slots of their own.
//!
//! Invariant: a thread's x87 registers hold the state of that thread's owner, or of nobody.

use std::{arch::asm, cell::Cell, ptr};

use crate::context::{Aligned, Context};

thread_local! {
    static OWNER: Cell<*mut Context> = const { Cell::new(ptr::null_mut()) };
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

/// Makes the host's x87 registers hold the state of `context`.
pub(crate) fn acquire(context: *mut Context) {
    OWNER.with(|owner| {
        let before = owner.get();
        if before == context {
            return;
        }
        // SAFETY: an owner that is dropped gives up ownership first, on this thread, so `before` is
        // live. The calling convention leaves x87 empty between calls, and after fxrstor its
        // contents are of no concern to Rust.
        unsafe {
            if !before.is_null() {
                save(&raw mut (*before).x87);
            }
            load(&raw mut (*context).x87);
        }
        owner.set(context);
    });
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

/// Gives up ownership.
pub(crate) fn release(context: *mut Context) {
    OWNER.with(|owner| {
        if owner.get() == context {
            // SAFETY: leaves the registers as the calling convention expects them.
            unsafe { asm!("fninit") };
            owner.set(ptr::null_mut());
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
