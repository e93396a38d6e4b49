//! The host's CPU for one snippet: a child process with the snippet's memory at its addresses and
//! registers as after reset, which ends at the first signal.
//!
//! Unlike [`crate::native`] a child serves one snippet: whatever that does to itself, to segment
//! bases or to its flags, is gone with it. It knows what the test process had mapped below 4 GiB no
//! longer, and system calls of the snippet raise SIGSYS.

use std::ffi::c_void;
use std::mem::size_of;
use std::ptr;

use crate::layout::FX_BYTES;
use crate::native::{ORDER, no_system_calls_from_code};

/// Where the code that loads registers lies: an address that nobody comes by.
const TRAMPOLINE: u64 = 0x6b5a_9000;
const AREA: u64 = TRAMPOLINE + 0x400;
const TARGET: u64 = TRAMPOLINE + 0x800;
const TRAMPOLINE_BYTES: usize = 4096;

/// Memory of a snippet.
pub(crate) struct Pages {
    /// (first byte, bytes), whole pages.
    pub(crate) ranges: Vec<(u64, usize)>,
    /// (address, contents).
    pub(crate) contents: Vec<(u64, Vec<u8>)>,
}

/// How it ended.
#[repr(C)]
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// 0 for nothing, else the signal.
    pub(crate) signal: u64,
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) vector: u64,
    pub(crate) error: u64,
    pub(crate) cr2: u64,
    pub(crate) fx: [u8; FX_BYTES],
    /// Of the ranges, one after the other, as much as fits.
    pub(crate) memory: [u8; MEMORY],
}

/// Bytes of memory that an end shows.
pub(crate) const MEMORY: usize = 16 * 4096;

/// Room for an end that parent and child share.
pub(crate) struct Process {
    shared: *mut Ended,
}

static mut RESULT: *mut Ended = ptr::null_mut();
static mut RANGES: *const [(u64, usize)] = &[];

impl Process {
    pub(crate) fn new() -> Process {
        // SAFETY: a fresh mapping.
        let shared = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<Ended>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(shared != libc::MAP_FAILED, "mmap");
        Process {
            shared: shared.cast(),
        }
    }

    /// Runs the code at `start` until a signal; None if it took more than two seconds or left no
    /// result.
    pub(crate) fn run(&mut self, pages: &Pages, start: u64) -> Option<Ended> {
        // SAFETY: the child calls system calls and code that neither allocates nor locks, and never
        // returns; the parent reads the result after its end.
        unsafe {
            ptr::write_bytes(self.shared.cast::<u8>(), 0, size_of::<Ended>());
            let pid = libc::fork();
            assert!(pid >= 0, "fork");
            if pid == 0 {
                child(self.shared, pages, start);
            }
            let mut status = 0;
            libc::waitpid(pid, &mut status, 0);
            let ended = (*self.shared).clone();
            (ended.signal != 0 && libc::WIFEXITED(status)).then_some(ended)
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: its own mapping.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Ended>()) };
    }
}

/// xrstor of an area whose header asks for initial state, FS and GS base 0, flags, zeros, jump.
const CODE: &[u8] = &[
    0xb8, 0x07, 0x00, 0x00, 0x00, // mov eax, 7
    0x31, 0xd2, // xor edx, edx
    0x0f, 0xae, 0x2c, 0x25, 0x00, 0x94, 0x5a, 0x6b, // xrstor [AREA]
    0x31, 0xc0, // xor eax, eax
    0xf3, 0x48, 0x0f, 0xae, 0xd0, // wrfsbase rax
    0xf3, 0x48, 0x0f, 0xae, 0xd8, // wrgsbase rax
    0xbc, 0x00, 0x9f, 0x5a, 0x6b, // mov esp, STACK
    0x68, 0x02, 0x02, 0x00, 0x00, 0x9d, // push 0x202; popfq
    0xbb, 0, 0, 0, 0, 0xb9, 0, 0, 0, 0, 0xba, 0, 0, 0, 0, // mov ebx, ecx, edx
    0xbe, 0, 0, 0, 0, 0xbf, 0, 0, 0, 0, 0xbd, 0, 0, 0, 0, // mov esi, edi, ebp
    0x41, 0xb8, 0, 0, 0, 0, 0x41, 0xb9, 0, 0, 0, 0, // mov r8d, r9d
    0x41, 0xba, 0, 0, 0, 0, 0x41, 0xbb, 0, 0, 0, 0, // mov r10d, r11d
    0x41, 0xbc, 0, 0, 0, 0, 0x41, 0xbd, 0, 0, 0, 0, // mov r12d, r13d
    0x41, 0xbe, 0, 0, 0, 0, 0x41, 0xbf, 0, 0, 0, 0, // mov r14d, r15d
    0xb8, 0, 0, 0, 0, // mov eax, 0
    0xbc, 0, 0, 0, 0, // mov esp, 0
    0xff, 0x24, 0x25, 0x00, 0x98, 0x5a, 0x6b, // jmp [TARGET]
];

/// # Safety
/// Called in a fresh child.
unsafe fn child(shared: *mut Ended, pages: &Pages, start: u64) -> ! {
    // SAFETY: fixed mappings below 4 GiB replace what was unmapped there; the rest is plain system
    // calls, and the trampoline's fields lie inside its page.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // Two seconds of its own time, however busy the machine is.
        let limit = libc::itimerval {
            it_interval: std::mem::zeroed(),
            it_value: libc::timeval {
                tv_sec: 2,
                tv_usec: 0,
            },
        };
        libc::setitimer(libc::ITIMER_PROF, &limit, ptr::null_mut());
        const FIRST: usize = 0x1_0000;
        libc::munmap(FIRST as *mut c_void, (1 << 32) - FIRST);
        let map = |at: u64, bytes: usize| {
            let found = libc::mmap(
                at as *mut c_void,
                bytes,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            );
            if found as u64 != at {
                libc::_exit(90);
            }
        };
        map(TRAMPOLINE, TRAMPOLINE_BYTES);
        ptr::copy_nonoverlapping(CODE.as_ptr(), TRAMPOLINE as *mut u8, CODE.len());
        *((AREA + 24) as *mut u32) = 0x1f80;
        *(TARGET as *mut u64) = start;
        for &(at, bytes) in &pages.ranges {
            map(at, bytes);
        }
        for (at, contents) in &pages.contents {
            ptr::copy_nonoverlapping(contents.as_ptr(), *at as *mut u8, contents.len());
        }
        RESULT = shared;
        RANGES = &raw const *pages.ranges;
        const ALTERNATE: usize = 256 * 1024;
        let stack = libc::mmap(
            ptr::null_mut(),
            ALTERNATE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
            0,
        );
        let stack = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: ALTERNATE,
        };
        libc::sigaltstack(&stack, ptr::null_mut());
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGSYS,
        ] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = entry as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
        no_system_calls_from_code();
        let run: extern "C" fn() -> ! = std::mem::transmute(TRAMPOLINE as usize);
        run()
    }
}

/// The kernel leaves AC as the snippet had it, and Rust code is not made for it.
#[unsafe(naked)]
extern "C" fn entry(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    std::arch::naked_asm!(
        "pushfq",
        "and dword ptr [rsp], {mask}",
        "popfq",
        "jmp {handler}",
        mask = const !0x4_0500i32,
        handler = sym handler,
    )
}

/// It runs without thread-local storage, since FS is the snippet's.
extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes valid pointers; RESULT is the mapping shared with the parent, and
    // the ranges are mapped.
    unsafe {
        let end = &mut *RESULT;
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let gregs = &machine.gregs;
        for (slot, register) in end.gpr.iter_mut().zip(ORDER) {
            *slot = gregs[register as usize] as u64;
        }
        end.rip = gregs[libc::REG_RIP as usize] as u64;
        end.rflags = gregs[libc::REG_EFL as usize] as u64;
        end.vector = gregs[libc::REG_TRAPNO as usize] as u64;
        end.error = gregs[libc::REG_ERR as usize] as u64;
        end.cr2 = gregs[libc::REG_CR2 as usize] as u64;
        let fx = machine.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(fx, end.fx.as_mut_ptr(), FX_BYTES);
        let mut at = 0;
        for &(from, bytes) in &*RANGES {
            let bytes = bytes.min(MEMORY - at);
            ptr::copy_nonoverlapping(from as *const u8, end.memory.as_mut_ptr().add(at), bytes);
            at += bytes;
        }
        end.signal = signal as u64;
        libc::syscall(libc::SYS_exit_group, 0);
    }
}
