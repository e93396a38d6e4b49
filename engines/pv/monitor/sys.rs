//! Host system calls, bare: neither the monitor nor the stub has a C library.
//!
//! Results are the kernel's: negative error numbers.

use core::arch::asm;

/// System call numbers (Linux x86-64, asm/unistd_64.h).
pub(crate) mod nr {
    pub(crate) const READ: u64 = 0;
    pub(crate) const WRITE: u64 = 1;
    pub(crate) const MMAP: u64 = 9;
    pub(crate) const MUNMAP: u64 = 11;
    pub(crate) const SIGACTION: u64 = 13;
    pub(crate) const SIGPROCMASK: u64 = 14;
    pub(crate) const IOCTL: u64 = 16;
    pub(crate) const YIELD: u64 = 24;
    pub(crate) const SENDMSG: u64 = 46;
    pub(crate) const DUP2: u64 = 33;
    pub(crate) const CLONE: u64 = 56;
    pub(crate) const CAPSET: u64 = 126;
    pub(crate) const SIGALTSTACK: u64 = 131;
    pub(crate) const PRCTL: u64 = 157;
    pub(crate) const GETPPID: u64 = 110;
    pub(crate) const EXIT_GROUP: u64 = 231;
    pub(crate) const TIMERFD_SETTIME: u64 = 286;
    pub(crate) const SECCOMP: u64 = 317;
    pub(crate) const GETRANDOM: u64 = 318;
    pub(crate) const PIDFD_SEND_SIGNAL: u64 = 424;
    pub(crate) const CLOSE_RANGE: u64 = 436;
}

pub(crate) const PROT_READ: u64 = 1;
pub(crate) const PROT_WRITE: u64 = 2;
pub(crate) const PROT_EXEC: u64 = 4;
pub(crate) const MAP_SHARED: u64 = 1;
pub(crate) const MAP_PRIVATE: u64 = 2;
pub(crate) const MAP_FIXED: u64 = 0x10;
pub(crate) const MAP_ANONYMOUS: u64 = 0x20;
pub(crate) const MAP_NORESERVE: u64 = 0x4000;
pub(crate) const MAP_POPULATE: u64 = 0x8000;

/// Makes a system call.
///
/// # Safety
/// Whatever the call does must be sound here.
#[inline(always)]
pub(crate) unsafe fn call(number: u64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    let result: i64;
    // SAFETY: the caller's promise; the clobbers are those of the instruction.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Maps, at a fixed address.
///
/// # Safety
/// What was mapped there is in nobody's use.
pub(crate) unsafe fn map(
    address: u64,
    length: u64,
    rights: u64,
    flags: u64,
    fd: i32,
    offset: u64,
) -> bool {
    let arguments = [
        address,
        length,
        rights,
        flags | MAP_FIXED,
        fd as u64,
        offset,
    ];
    // SAFETY: the caller's promise.
    unsafe { call(nr::MMAP, arguments) == address as i64 }
}

/// Unmaps from `from` to `to`.
///
/// # Safety
/// What was mapped there is in nobody's use.
pub(crate) unsafe fn unmap(from: u64, to: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe { call(nr::MUNMAP, [from, to - from, 0, 0, 0, 0]) == 0 }
}

/// Ends the process: setting up failed at this step.
pub(crate) fn exit(code: u64) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { call(nr::EXIT_GROUP, [code, 0, 0, 0, 0, 0]) };
    }
}

/// `sock_fprog`.
#[repr(C)]
struct Program {
    length: u16,
    code: *const u64,
}

const SET_MODE_FILTER: u64 = 1;
const NEW_LISTENER: u64 = 1 << 3;
const WAIT_KILLABLE_RECV: u64 = 1 << 5;

/// Installs a filter; with `listen` answers with its listener.
pub(crate) fn filter(program: &[u64], listen: bool) -> i64 {
    let program = Program {
        length: program.len() as u16,
        code: program.as_ptr(),
    };
    let flags = if listen {
        NEW_LISTENER | WAIT_KILLABLE_RECV
    } else {
        0
    };
    // SAFETY: `program` describes readable memory for the duration of the call.
    unsafe {
        call(
            nr::SECCOMP,
            [SET_MODE_FILTER, flags, &raw const program as u64, 0, 0, 0],
        )
    }
}

/// Gives up every capability.
pub(crate) fn drop_capabilities() -> bool {
    // _LINUX_CAPABILITY_VERSION_3, this process; two words for each of three sets.
    let header: [u32; 2] = [0x2008_0522, 0];
    let sets = [0u32; 6];
    // SAFETY: both are readable for the duration of the call.
    unsafe {
        call(
            nr::CAPSET,
            [&raw const header as u64, &raw const sets as u64, 0, 0, 0, 0],
        ) == 0
    }
}

/// A control message that holds one descriptor.
#[repr(C)]
struct Control {
    length: u64,
    level: i32,
    kind: i32,
    fd: i32,
    padding: i32,
}

/// Sends descriptor `fd` over `socket`, with `bytes` bytes of zero beside it.
pub(crate) fn send_descriptor(socket: i32, fd: i32, bytes: u64) -> bool {
    // SOL_SOCKET, SCM_RIGHTS; CMSG_LEN(4).
    let control = Control {
        length: 20,
        level: 1,
        kind: 1,
        fd,
        padding: 0,
    };
    let byte = 0u8;
    let vector = [&raw const byte as u64, bytes];
    // msghdr: name, its length, vector, its length, control, its length, flags.
    let message: [u64; 7] = [
        0,
        0,
        &raw const vector as u64,
        bytes,
        &raw const control as u64,
        size_of::<Control>() as u64,
        0,
    ];
    // SAFETY: all of it is readable for the duration of the call.
    let sent = unsafe {
        call(
            nr::SENDMSG,
            [socket as u64, &raw const message as u64, 0, 0, 0, 0],
        )
    };
    sent == bytes as i64
}

/// Handles `signal` by `handler`, on the alternate stack, every signal blocked meanwhile.
pub(crate) fn handle(signal: u64, handler: u64, restorer: u64) -> bool {
    // SA_SIGINFO | SA_RESTORER | SA_ONSTACK | SA_RESTART
    const FLAGS: u64 = 4 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000;
    let action: [u64; 4] = [handler, FLAGS, restorer, u64::MAX];
    // SAFETY: `action` is readable for the duration of the call.
    unsafe {
        call(
            nr::SIGACTION,
            [signal, &raw const action as u64, 0, 8, 0, 0],
        ) == 0
    }
}

/// Sets the alternate signal stack.
pub(crate) fn signal_stack(address: u64, size: u64, flags: u64) -> bool {
    let stack: [u64; 3] = [address, flags, size];
    // SAFETY: `stack` is readable for the duration of the call.
    unsafe { call(nr::SIGALTSTACK, [&raw const stack as u64, 0, 0, 0, 0, 0]) == 0 }
}
