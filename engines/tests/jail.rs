//! What code inside the VMM's process can still do: attacks from within, after the filter.

use std::ffi::CStr;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use engines::jail::{Jail, enter};

const INSIDE: &str = "TRAPLINE_JAIL";

type Attack = (&'static str, fn() -> i64);

fn call(number: libc::c_long, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the calls made here touch no memory of this process but what they are given.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        return -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    result
}

fn path(text: &CStr) -> u64 {
    text.as_ptr() as u64
}

const HERE: u64 = libc::AT_FDCWD as i64 as u64;

/// Nothing of this may work inside. Outside, the first two do: they are the control.
const ATTACKS: &[Attack] = &[
    ("open a file", || {
        call(libc::SYS_openat, [HERE, path(c"/etc/hostname"), 0, 0, 0, 0])
    }),
    ("map memory that can be executed", || {
        let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        call(libc::SYS_mmap, [0, 4096, protection, flags, u64::MAX, 0])
    }),
    ("make memory executable", || {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let page = call(libc::SYS_mmap, [0, 4096, 3, flags, u64::MAX, 0]);
        assert!(page > 0, "memory that can't be executed is fine");
        call(libc::SYS_mprotect, [page as u64, 4096, 5, 0, 0, 0])
    }),
    ("open by its old name", || {
        call(libc::SYS_open, [path(c"/etc/hostname"), 0, 0, 0, 0, 0])
    }),
    ("remove a file", || {
        call(
            libc::SYS_unlinkat,
            [HERE, path(c"/nonexistent/x"), 0, 0, 0, 0],
        )
    }),
    ("run a program", || {
        call(libc::SYS_execve, [path(c"/bin/true"), 0, 0, 0, 0, 0])
    }),
    ("fork", || call(libc::SYS_fork, [0; 6])),
    ("clone", || call(libc::SYS_clone, [0; 6])),
    ("clone anew", || call(libc::SYS_clone3, [0; 6])),
    ("make a socket", || {
        call(
            libc::SYS_socket,
            [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
        )
    }),
    ("connect", || call(libc::SYS_connect, [0; 6])),
    ("trace the parent", || {
        let parent = u64::from(std::os::unix::process::parent_id());
        call(
            libc::SYS_ptrace,
            [libc::PTRACE_ATTACH.into(), parent, 0, 0, 0, 0],
        )
    }),
    ("read another's memory", || {
        call(libc::SYS_process_vm_readv, [1, 0, 0, 0, 0, 0])
    }),
    ("signal the parent", || {
        let parent = u64::from(std::os::unix::process::parent_id());
        call(libc::SYS_kill, [parent, 0, 0, 0, 0, 0])
    }),
    ("signal a thread elsewhere", || {
        call(libc::SYS_tgkill, [1, 1, 0, 0, 0, 0])
    }),
    ("become root", || call(libc::SYS_setuid, [0; 6])),
    ("type into the terminal", || {
        call(libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0, 0, 0])
    }),
    ("set up io_uring", || call(libc::SYS_io_uring_setup, [0; 6])),
    ("load a program into the kernel", || {
        call(libc::SYS_bpf, [0; 6])
    }),
    ("handle faults", || call(libc::SYS_userfaultfd, [0; 6])),
    ("enter another namespace", || {
        call(libc::SYS_unshare, [0; 6])
    }),
    ("duplicate a descriptor of another", || {
        call(libc::SYS_pidfd_getfd, [0; 6])
    }),
    ("make a file in memory", || {
        call(libc::SYS_memfd_create, [path(c"x"), 0, 0, 0, 0, 0])
    }),
    ("use the other ABI's numbers", || {
        call(0x4000_0000 + libc::SYS_getpid, [0; 6])
    }),
];

/// The child's part: enters, attacks, and says what came of it.
fn inside(which: &str) {
    let jail = match which {
        "process" => Jail::Process,
        "kvm" => Jail::Kvm,
        _ => panic!("no such jail"),
    };
    assert!(ATTACKS[0].1() >= 0, "files can be opened outside");
    assert!(ATTACKS[1].1() > 0, "memory can be made executable outside");
    // SAFETY: a plain system call.
    let root = unsafe { libc::getuid() } == 0;
    enter(jail).expect("the jail closes");
    let mut open: Vec<&str> = ATTACKS
        .iter()
        .filter(|(_, attack)| attack() != -i64::from(libc::EPERM))
        .map(|(name, _)| *name)
        .collect();
    // Elsewhere too: the filter is every thread's, and the ordinary goes on working.
    if root && call(libc::SYS_getuid, [0; 6]) == 0 {
        open.push("stay root");
    }
    let kvm = call(libc::SYS_ioctl, [u64::MAX, 0xae80, 0, 0, 0, 0]);
    let expected = match jail {
        Jail::Process => libc::EPERM,
        Jail::Kvm => libc::EBADF,
    };
    if kvm != -i64::from(expected) {
        open.push("KVM_RUN");
    }
    let text = format!("open: {open:?}\n");
    call(
        libc::SYS_write,
        [2, text.as_ptr() as u64, text.len() as u64, 0, 0, 0],
    );
    // SAFETY: ends the process, of which nothing is wanted any more.
    unsafe { libc::_exit(if open.is_empty() { 77 } else { 1 }) }
}

#[test]
fn nothing_but_the_guests_business_is_possible_inside() {
    if let Ok(which) = std::env::var(INSIDE) {
        return inside(&which);
    }
    for which in ["process", "kvm"] {
        let ended = Command::new(std::env::current_exe().expect("this program"))
            .args([
                "--exact",
                "nothing_but_the_guests_business_is_possible_inside",
            ])
            .args(["--nocapture", "--test-threads", "1"])
            .env(INSIDE, which)
            .output()
            .expect("it starts");
        let text = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.signal(), None, "{which}: {text}");
        assert_eq!(ended.status.code(), Some(77), "{which}: {text}");
    }
}
