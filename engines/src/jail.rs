//! What is left to the VMM's process once its guest runs: the calls it needs, and no privileges.
//!
//! A guest that breaks out of its engine finds a process that can read, write and wait on the
//! descriptors it has, and nothing else: no file can be opened, no program started, no other
//! process reached, no memory made executable. Everything that needs more (images, disks, sockets,
//! /dev/kvm, the code cache, threads) is set up before.
//!
//! One filter an engine (seccomp(2)); what it doesn't list fails with EPERM in every thread. The
//! engine of processes has filters of its own (see `pv`).
//!
//! Invariant: nothing here is undone.

use std::io;
use std::ptr;

/// Whose calls are let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jail {
    /// An engine that is an ordinary process.
    Process,
    /// An engine that runs its guest through /dev/kvm: its ioctls besides.
    Kvm,
}

/// User and group that root becomes: nobody's.
const NOBODY: u32 = 65534;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Numbers from here on are those of the x32 ABI.
const X32: u32 = 0x4000_0000;
/// `KVMIO`, as the second byte of an ioctl's number.
const KVM_TYPE: u32 = 0xae << 8;

/// Calls on descriptors that are open, on the process's own memory and threads, and on clocks.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Gives up every privilege and all calls but those that a running guest needs, in all threads.
///
/// # Errors
/// The host's, if it has no seccomp or refuses.
pub fn enter(jail: Jail) -> io::Result<()> {
    drop_privileges()?;
    let program = filter(jail);
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program outlives the call, which copies it.
    let installed = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const program,
        )
    };
    // A positive answer is the thread that couldn't follow.
    match installed {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!(
            "thread {thread} has a filter of its own"
        ))),
    }
}

fn drop_privileges() -> io::Result<()> {
    let check = |result: i32| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain system calls with valid arguments; the C library changes identities in all
    // threads at once.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        check(libc::setrlimit(libc::RLIMIT_CORE, &raw const none))?;
        if libc::geteuid() != 0 {
            return Ok(());
        }
        // Changing identity forgets the signal that ties this process to its parent (prctl(2)).
        let mut at_parents_death = 0;
        check(libc::prctl(
            libc::PR_GET_PDEATHSIG,
            &raw mut at_parents_death,
        ))?;
        // A container's root may lack the right to be anybody else; then it has little to lose.
        let changed = check(libc::setgroups(0, ptr::null()))
            .and_then(|()| check(libc::setresgid(NOBODY, NOBODY, NOBODY)))
            .and_then(|()| check(libc::setresuid(NOBODY, NOBODY, NOBODY)));
        match changed {
            // EINVAL: this user namespace has no such user.
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => {
                return Err(error);
            }
            Ok(()) | Err(_) => {}
        }
        check(libc::prctl(libc::PR_SET_PDEATHSIG, at_parents_death))
    }
}

/// The filter as BPF: a list of numbers, then those whose arguments matter.
fn filter(jail: Jail) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let jump = |test: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | test | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    };
    let load = |offset: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let argument = |index: u32| load(16 + 8 * index);
    let allow = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW);
    let deny = statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
    );
    let (equal, at_least) = (libc::BPF_JEQ, libc::BPF_JGE);
    let mut program = vec![
        load(4),
        jump(equal, AUDIT_ARCH_X86_64, 1, 0),
        deny,
        load(0),
        jump(at_least, X32, 0, 1),
        deny,
    ];
    for &call in CALLS {
        program.extend([jump(equal, call as u32, 0, 1), allow]);
    }
    // Memory that can be executed was made before.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        program.extend([
            jump(equal, call as u32, 0, 4),
            argument(2),
            jump(libc::BPF_JSET, libc::PROT_EXEC as u32, 0, 1),
            deny,
            allow,
        ]);
    }
    // What the standard library asks before it closes a descriptor, in debug builds.
    program.extend([
        jump(equal, libc::SYS_fcntl as u32, 0, 4),
        argument(1),
        jump(equal, libc::F_GETFD as u32, 1, 0),
        deny,
        allow,
    ]);
    // Signals go to threads of this process.
    program.extend([
        jump(equal, libc::SYS_tgkill as u32, 0, 4),
        argument(0),
        jump(equal, std::process::id(), 1, 0),
        deny,
        allow,
    ]);
    if jail == Jail::Kvm {
        program.extend([
            jump(equal, libc::SYS_ioctl as u32, 0, 5),
            argument(1),
            statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0xff00),
            jump(equal, KVM_TYPE, 1, 0),
            deny,
            allow,
        ]);
    }
    program.push(deny);
    program
}
