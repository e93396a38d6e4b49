//! The oracle: sequences run on the host's CPU, in a process of their own.
//!
//! The child has the pages of [`crate::layout`] at their addresses. For each sequence it puts the
//! data back, loads all registers, RSP included, and jumps. The exception that ends the sequence
//! arrives as a signal on an alternate stack; the handler copies registers, FPU state, vector,
//! error code and CR2 from the signal frame (arch/x86/include/uapi/asm/sigcontext.h) and returns
//! to Rust. A system call from the code slots raises SIGSYS by a seccomp filter, so no sequence can
//! reach the host.
//!
//! The child may be killed at any time; the parent starts another.

use std::ffi::c_void;
use std::io;
use std::mem::size_of;
use std::ptr;
use std::time::Duration;

use crate::layout::{
    CODE, CONTROL, DATA_BYTES, DATA_PAGES, DIRECTION, End, FX_BYTES, GS_BASE, LANDING,
    LANDING_FLAGS, MOST_NOTES, NOTE_DIRECTION, NOTE_RIP, NOTE_VECTOR, NOTED, NOTES, Note,
    OUTCOME_ENDED, OUTCOME_NONE, OUTCOME_SYSTEM_CALL, PAGE, PROLOGUE, SLOT_BYTES, SLOTS, Start,
    avx, data_page, slot,
};
use crate::prologue::{HOST_RSP, Prologue, prologue};

/// What parent and child share. Offsets in the file follow from its layout.
#[repr(C, align(4096))]
struct Shared {
    prologue: [u8; PAGE as usize],
    control: [u8; PAGE as usize],
    code: [[u8; SLOT_BYTES]; SLOTS],
    data: [u8; DATA_BYTES],
    template: [u8; DATA_BYTES],
    count: usize,
    /// Sequence that the child is at.
    progress: usize,
    starts: [Start; SLOTS],
    ends: [End; SLOTS],
}

/// Why there is no result.
#[derive(Debug)]
pub(crate) enum Lost {
    /// The sequence with this number did not end in time.
    Endless(usize),
    /// The child died at this one.
    Died(usize),
}

/// The process that runs sequences.
pub(crate) struct Native {
    shared: *mut Shared,
    file: i32,
    child: Option<Child>,
}

struct Child {
    pid: i32,
    commands: i32,
    answers: i32,
}

impl Native {
    pub(crate) fn new() -> Native {
        // SAFETY: plain system calls; the mapping is as large as the file.
        unsafe {
            let file = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
            check(file >= 0, "memfd_create");
            let size = size_of::<Shared>();
            check(libc::ftruncate(file, size as i64) == 0, "ftruncate");
            let shared = libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file,
                0,
            );
            check(shared != libc::MAP_FAILED, "mmap");
            let shared = shared.cast::<Shared>();
            let Prologue { code, .. } = prologue();
            (&mut (*shared).prologue)[..code.len()].copy_from_slice(&code);
            Native {
                shared,
                file,
                child: None,
            }
        }
    }

    /// Starts a batch: (code at its offset in the slot, registers) for each, on this data.
    pub(crate) fn start(&mut self, template: &[u8; DATA_BYTES], jobs: &[(Vec<u8>, Start)]) {
        assert!(jobs.len() <= SLOTS);
        // SAFETY: the child waits for a command, so the parent alone uses the mapping.
        let shared = unsafe { &mut *self.shared };
        shared.template = *template;
        shared.count = jobs.len();
        for (index, (code, start)) in jobs.iter().enumerate() {
            shared.code[index].copy_from_slice(code);
            shared.starts[index] = start.clone();
            shared.ends[index].outcome = OUTCOME_NONE;
        }
        let child = self
            .child
            .get_or_insert_with(|| Child::spawn(self.shared, self.file));
        child.command();
    }

    /// Waits for the batch.
    ///
    /// # Errors
    /// A sequence without an end. The ones before it have theirs.
    pub(crate) fn finish(&mut self) -> Result<(), Lost> {
        let child = self.child.as_ref().expect("a batch was started");
        let answered = child.wait(Duration::from_secs(10));
        // SAFETY: an aligned word; the child is done, dead or stuck before its next store.
        let at = unsafe { ptr::read_volatile(&raw const (*self.shared).progress) };
        match answered {
            Answer::Done => Ok(()),
            Answer::Died => {
                self.child = None;
                Err(Lost::Died(at))
            }
            Answer::Late => {
                self.child = None;
                Err(Lost::Endless(at))
            }
        }
    }

    pub(crate) fn end(&self, index: usize) -> &End {
        // SAFETY: between batches only the parent uses the mapping.
        unsafe { &(*self.shared).ends[index] }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.child = None;
        // SAFETY: the mapping and the file are this value's own.
        unsafe {
            libc::munmap(self.shared.cast(), size_of::<Shared>());
            libc::close(self.file);
        }
    }
}

enum Answer {
    Done,
    Died,
    Late,
}

impl Child {
    fn spawn(shared: *mut Shared, file: i32) -> Child {
        let mut commands = [0; 2];
        let mut answers = [0; 2];
        // SAFETY: the child calls nothing but system calls and code that neither allocates nor
        // locks, and never returns.
        unsafe {
            check(libc::pipe(commands.as_mut_ptr()) == 0, "pipe");
            check(libc::pipe(answers.as_mut_ptr()) == 0, "pipe");
            let prologue = prologue();
            let pid = libc::fork();
            check(pid >= 0, "fork");
            if pid == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(commands[1]);
                libc::close(answers[0]);
                child(shared, file, &prologue, commands[0], answers[1]);
            }
            libc::close(commands[0]);
            libc::close(answers[1]);
            Child {
                pid,
                commands: commands[1],
                answers: answers[0],
            }
        }
    }

    fn command(&self) {
        // SAFETY: one byte from a live array.
        unsafe { libc::write(self.commands, [1u8].as_ptr().cast(), 1) };
    }

    fn wait(&self, limit: Duration) -> Answer {
        let mut poll = libc::pollfd {
            fd: self.answers,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: valid arguments.
        unsafe {
            if libc::poll(&mut poll, 1, limit.as_millis() as i32) == 0 {
                return Answer::Late;
            }
            let mut byte = 0u8;
            match libc::read(self.answers, (&raw mut byte).cast(), 1) {
                1 => Answer::Done,
                _ => Answer::Died,
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child, not yet waited for, and our own descriptors.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, ptr::null_mut(), 0);
            libc::close(self.commands);
            libc::close(self.answers);
        }
    }
}

fn check(good: bool, what: &str) {
    assert!(good, "{what}: {}", io::Error::last_os_error());
}

/// What the child's signal handler needs. One thread, so plain statics.
static mut RESULT: *mut End = ptr::null_mut();
static mut BACK: u64 = 0;
static mut HAS_AVX: bool = false;

/// Life of the child.
///
/// # Safety
/// Called in a fresh child, with the parent's mapping and file.
unsafe fn child(
    shared: *mut Shared,
    file: i32,
    prologue: &Prologue,
    commands: i32,
    answers: i32,
) -> ! {
    // SAFETY: the fixed addresses are free in a process whose own mappings lie far above them
    // (MAP_FIXED_NOREPLACE proves it); everything else is a plain system call.
    unsafe {
        let map = |at: u64, offset: usize, bytes: usize, protection: i32| {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            let found = libc::mmap(
                at as *mut c_void,
                bytes,
                protection,
                flags,
                file,
                offset as i64,
            );
            if found as u64 != at {
                libc::_exit(90);
            }
        };
        // What the parent keeps below 4 GiB (the translator's arena) isn't there for sequences.
        const FIRST: usize = 0x1_0000;
        libc::munmap(FIRST as *mut c_void, (1 << 32) - FIRST);
        let page = PAGE as usize;
        let (r, rw, rx) = (
            libc::PROT_READ,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::PROT_READ | libc::PROT_EXEC,
        );
        map(PROLOGUE, std::mem::offset_of!(Shared, prologue), page, rx);
        map(CONTROL, std::mem::offset_of!(Shared, control), page, rw);
        for index in 0..SLOTS {
            let offset = std::mem::offset_of!(Shared, code) + index * SLOT_BYTES;
            map(slot(index), offset, SLOT_BYTES, rx);
        }
        for (index, (number, writable)) in DATA_PAGES.into_iter().enumerate() {
            let offset = std::mem::offset_of!(Shared, data) + index * page;
            let protection = if writable { rw } else { r };
            map(data_page(number), offset, page, protection);
        }
        BACK = prologue.back;
        HAS_AVX = avx();
        handlers();
        const ARCH_SET_GS: i32 = 0x1001;
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE);
        no_system_calls_from_code();
        let enter: extern "C" fn() = std::mem::transmute(prologue.enter as usize);
        let mut byte = 0u8;
        while libc::read(commands, (&raw mut byte).cast(), 1) == 1 {
            for index in 0..(*shared).count {
                ptr::write_volatile(&raw mut (*shared).progress, index);
                ptr::copy_nonoverlapping(
                    &raw const (*shared).starts[index],
                    CONTROL as *mut Start,
                    1,
                );
                let data = (&raw mut (*shared).data).cast::<u8>();
                let template = (&raw const (*shared).template).cast::<u8>();
                ptr::copy_nonoverlapping(template, data, DATA_BYTES);
                *(LANDING as *mut u64) = 0;
                *(NOTED as *mut u64) = NOTES;
                ptr::write_bytes(NOTES as *mut Note, 0, MOST_NOTES);
                RESULT = &raw mut (*shared).ends[index];
                enter();
                let notes = (&raw mut (*shared).ends[index].notes).cast::<Note>();
                ptr::copy_nonoverlapping(NOTES as *const Note, notes, MOST_NOTES);
                let memory = (&raw mut (*shared).ends[index].memory).cast::<u8>();
                ptr::copy_nonoverlapping(data, memory, DATA_BYTES);
            }
            libc::write(answers, [1u8].as_ptr().cast(), 1);
        }
        libc::_exit(0);
    }
}

/// # Safety
/// Called in the child, once.
unsafe fn handlers() {
    const STACK: usize = 256 * 1024;
    // SAFETY: a fresh mapping becomes the alternate stack; the handler is made for it.
    unsafe {
        let stack = libc::mmap(
            ptr::null_mut(),
            STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let stack = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: STACK,
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
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
}

/// A filter over seccomp_data (linux/seccomp.h): a system call whose instruction pointer is below
/// 4 GiB, where nothing but code under test lies, raises SIGSYS.
///
/// # Safety
/// Called in the child.
pub(crate) unsafe fn no_system_calls_from_code() {
    const INSTRUCTION_POINTER_HIGH: u32 = 12;
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut filter = [
        statement(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            INSTRUCTION_POINTER_HIGH,
        ),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: 0,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_TRAP),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    const { assert!(CODE >> 32 == 0) };
    // SAFETY: the program outlives the call.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0 {
            libc::_exit(91);
        }
    }
}

/// Indices of a signal frame's general registers in encoding order.
pub(crate) const ORDER: [i32; 16] = [
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

/// Notes a fault, and goes on where the program says.
///
/// # Safety
/// Called in the child, which has the page of notes mapped.
unsafe fn land(gregs: &mut [i64; 23]) {
    // SAFETY: as the caller says; a program goes on after as many faults as there are notes for.
    unsafe {
        let noted = NOTED as *mut u64;
        let note = &mut *(*noted as *mut Note);
        for (slot, register) in note.iter_mut().zip(ORDER) {
            *slot = gregs[register as usize] as u64;
        }
        note[NOTE_RIP] = gregs[libc::REG_RIP as usize] as u64;
        note[NOTE_VECTOR] = gregs[libc::REG_TRAPNO as usize] as u64;
        note[NOTE_DIRECTION] = gregs[libc::REG_EFL as usize] as u64 & DIRECTION;
        *noted += size_of::<Note>() as u64;
        let landing = LANDING as *mut i64;
        gregs[libc::REG_RIP as usize] = *landing;
        gregs[libc::REG_EFL as usize] = LANDING_FLAGS as i64;
        *landing = 0;
    }
}

extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes valid pointers, RESULT points to the sequence that runs, and
    // without one the child ends.
    unsafe {
        if RESULT.is_null() {
            libc::_exit(92);
        }
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let gregs = &mut machine.gregs;
        if signal != libc::SIGSYS && *(LANDING as *const u64) != 0 {
            return land(gregs);
        }
        let end = &mut *RESULT;
        RESULT = ptr::null_mut();
        for (slot, register) in end.gpr.iter_mut().zip(ORDER) {
            *slot = gregs[register as usize] as u64;
        }
        end.rip = gregs[libc::REG_RIP as usize] as u64;
        end.rflags = gregs[libc::REG_EFL as usize] as u64;
        end.vector = gregs[libc::REG_TRAPNO as usize] as u64;
        end.error = gregs[libc::REG_ERR as usize] as u64;
        end.cr2 = gregs[libc::REG_CR2 as usize] as u64;
        end.outcome = if signal == libc::SIGSYS {
            OUTCOME_SYSTEM_CALL
        } else {
            OUTCOME_ENDED
        };
        let fx = machine.fpregs.cast::<u8>();
        // With AVX the kernel's frame is an XSAVE area in standard form (sigcontext.h).
        let bytes = if HAS_AVX { FX_BYTES } else { 512 };
        ptr::copy_nonoverlapping(fx, end.fx.as_mut_ptr(), bytes);
        // Rust code runs next: default control words, empty x87 stack, DF and TF clear.
        (*machine.fpregs).mxcsr = 0x1f80;
        (*machine.fpregs).cwd = 0x37f;
        (*machine.fpregs).swd = 0;
        (*machine.fpregs).ftw = 0;
        gregs[libc::REG_RIP as usize] = BACK as i64;
        gregs[libc::REG_RSP as usize] = *(HOST_RSP as *const i64);
        gregs[libc::REG_EFL as usize] = 0x202;
    }
}
