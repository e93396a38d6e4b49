//! x87 and MMX state of vCPUs that take turns on one thread.
//!
//! Rust code doesn't use x87, so a vCPU's state stays in the host's registers between runs. Only
//! when another vCPU runs on the same thread is it put away.

use std::{arch::asm, cell::Cell, ptr};

use crate::context::Context;

thread_local! {
    static OWNER: Cell<*mut Context> = const { Cell::new(ptr::null_mut()) };
}

/// Default state after finit, as frstor wants it: FCW 0x37f, all tags empty.
pub(crate) fn reset(context: &mut Context) {
    context.x87.0 = [0; 512];
    context.x87.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    context.x87.0[8..10].copy_from_slice(&0xffffu16.to_le_bytes());
}

/// Makes the host's x87 registers hold the state of `context`.
pub(crate) fn acquire(context: *mut Context) {
    OWNER.with(|owner| {
        let before = owner.get();
        if before == context {
            return;
        }
        // SAFETY: an owner that is dropped gives up ownership first, on this thread, so `before` is
        // live; the save areas are 108 of 512 bytes. The calling convention leaves x87 empty
        // between calls, and after frstor its contents are of no concern to Rust.
        unsafe {
            if !before.is_null() {
                asm!("fnsave [{}]", in(reg) (*before).x87.0.as_mut_ptr());
            }
            asm!("frstor [{}]", in(reg) (*context).x87.0.as_ptr());
        }
        owner.set(context);
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
