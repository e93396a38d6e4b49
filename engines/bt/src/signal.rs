//! Host signals that translated code takes: divide errors, SSE exceptions, alignment faults and
//! the doorbell.
//!
//! The handler does one thing: if the interrupted instruction lies in the active vCPU's code
//! cache, it copies the integer registers to the [`Context`], notes the fault and continues at
//! the exit stub, so that the run loop sees an ordinary exit. Any other fault belongs to the host
//! program and goes to whoever handled the signal before.
//!
//! It runs on an alternate stack with SS_AUTODISARM: the guest's RSP is in the host's RSP and may
//! point anywhere, into that stack too.

use std::{
    cell::{Cell, RefCell},
    io, mem, ptr,
    sync::OnceLock,
};

use crate::context::{Context, HOST_FAULT, HostFault};

/// What the handler needs to know about the vCPU that this thread is running.
#[derive(Clone, Copy)]
pub(crate) struct Active {
    pub context: *mut Context,
    pub code_start: u64,
    pub code_end: u64,
    pub exit_after_signal: u64,
}

thread_local! {
    static ACTIVE: Cell<Option<Active>> = const { Cell::new(None) };
    static STACK: Cell<bool> = const { Cell::new(false) };
    static MEMORY: RefCell<Option<Stack>> = const { RefCell::new(None) };
}

const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGBUS,
    libc::SIGTRAP,
];
static PREVIOUS: OnceLock<[libc::sigaction; 5]> = OnceLock::new();

/// True if this thread runs the vCPU of `context` already.
#[inline]
pub(crate) fn is_active(context: *mut Context) -> bool {
    ACTIVE.get().is_some_and(|known| known.context == context)
}

/// Says which vCPU this thread runs, until another one runs here or [`release`] says that it is gone.
/// Between two runs it is of no effect: nothing is executed in its code cache then.
pub(crate) fn activate(active: Active) -> io::Result<()> {
    if is_active(active.context) {
        return Ok(());
    }
    if !STACK.get() {
        install()?;
        stack()?;
    }
    ACTIVE.set(Some(active));
    Ok(())
}

/// The vCPU of `context` is no more. A thread that ran it earlier may remember it, but executes
/// nothing of its code cache either.
pub(crate) fn release(context: *mut Context) {
    if is_active(context) {
        ACTIVE.set(None);
    }
}

fn install() -> io::Result<()> {
    static INSTALLED: std::sync::Mutex<bool> = std::sync::Mutex::new(false);
    let mut installed = INSTALLED
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if *installed {
        return Ok(());
    }
    // SAFETY: all-zero is a valid sigaction; the calls below get valid pointers.
    let mut previous: [libc::sigaction; 5] = unsafe { mem::zeroed() };
    for (slot, signal) in previous.iter_mut().zip(SIGNALS) {
        // SAFETY: query only.
        if unsafe { libc::sigaction(signal, ptr::null(), slot) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let _ = PREVIOUS.set(previous);
    for signal in SIGNALS {
        // SAFETY: the handler is async-signal-safe and runs on the alternate stack.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            if libc::sigaction(signal, &action, ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    *installed = true;
    Ok(())
}

const STACK_BYTES: usize = 64 * 1024;

/// A thread's alternate stack, until it ends.
struct Stack(*mut libc::c_void);

impl Drop for Stack {
    fn drop(&mut self) {
        STACK.set(false);
        let off = libc::stack_t {
            ss_sp: ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: 0,
        };
        // SAFETY: the mapping is this value's own. It goes only if it isn't, or isn't any more, this
        // thread's alternate stack.
        unsafe {
            let mut now: libc::stack_t = mem::zeroed();
            let known = libc::sigaltstack(ptr::null(), &mut now) == 0;
            let ours = known && now.ss_sp == self.0;
            if known && (!ours || libc::sigaltstack(&off, ptr::null_mut()) == 0) {
                libc::munmap(self.0, STACK_BYTES);
            }
        }
    }
}

/// Gives this thread an alternate stack of its own, once.
fn stack() -> io::Result<()> {
    /// `SS_AUTODISARM` of linux/signal.h, which libc doesn't name.
    const SS_AUTODISARM: i32 = 1 << 31;
    // SAFETY: a fresh mapping becomes this thread's alternate stack.
    unsafe {
        let memory = libc::mmap(
            ptr::null_mut(),
            STACK_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = libc::stack_t {
            ss_sp: memory,
            ss_flags: SS_AUTODISARM,
            ss_size: STACK_BYTES,
        };
        if libc::sigaltstack(&stack, ptr::null_mut()) != 0 {
            let error = io::Error::last_os_error();
            libc::munmap(memory, STACK_BYTES);
            return Err(error);
        }
        MEMORY.replace(Some(Stack(memory)));
    }
    STACK.set(true);
    Ok(())
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers; the active context outlives its guard.
    unsafe {
        let ucontext = &mut *context.cast::<libc::ucontext_t>();
        let gregs = &mut ucontext.uc_mcontext.gregs;
        let rip = gregs[libc::REG_RIP as usize] as u64;
        if let Some(active) = ACTIVE.get()
            && (active.code_start..active.code_end).contains(&rip)
        {
            let target = &mut *active.context;
            const ORDER: [i32; 16] = [
                libc::REG_RAX,
                libc::REG_RCX,
                libc::REG_RDX,
                libc::REG_RBX,
                libc::REG_RSP,
                libc::REG_RBP,
                libc::REG_RSI,
                libc::REG_RDI,
                libc::REG_R8,
                libc::REG_R9,
                libc::REG_R10,
                libc::REG_R11,
                libc::REG_R12,
                libc::REG_R13,
                libc::REG_R14,
                libc::REG_R15,
            ];
            for (slot, register) in target.gpr.iter_mut().zip(ORDER) {
                *slot = gregs[register as usize] as u64;
            }
            target.flags = gregs[libc::REG_EFL as usize] as u64;
            target.site = HOST_FAULT;
            target.fault = HostFault {
                signal,
                vector: gregs[libc::REG_TRAPNO as usize] as u8,
                code: (*info).si_code,
                rip,
                address: (*info).si_addr() as u64,
                error: gregs[libc::REG_ERR as usize] as u32,
            };
            gregs[libc::REG_RIP as usize] = active.exit_after_signal as i64;
            gregs[libc::REG_RSP as usize] = target.host_rsp as i64;
            // The host's code expects DF clear, and TF must not follow us out.
            gregs[libc::REG_EFL as usize] &= !0x500;
            return;
        }
        chain(signal, info, context);
    }
}

/// Hands a fault that isn't ours to the handler that was there before.
///
/// # Safety
/// Called from the handler with the kernel's own arguments.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let slot = SIGNALS.iter().position(|&known| known == signal);
    let previous = slot.and_then(|slot| Some(&PREVIOUS.get()?[slot]));
    // SAFETY: a handler address that sigaction reported is callable with its own signature.
    unsafe {
        match previous {
            Some(action) if action.sa_sigaction == libc::SIG_IGN => {}
            Some(action)
                if action.sa_sigaction != libc::SIG_DFL
                    && action.sa_flags & libc::SA_SIGINFO != 0 =>
            {
                let call: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    mem::transmute(action.sa_sigaction);
                call(signal, info, context);
            }
            Some(action) if action.sa_sigaction != libc::SIG_DFL => {
                let call: extern "C" fn(i32) = mem::transmute(action.sa_sigaction);
                call(signal);
            }
            Some(_) | None => {
                // Default action: restore it and let the instruction fault again.
                let mut action: libc::sigaction = mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &action, ptr::null_mut());
            }
        }
    }
}
