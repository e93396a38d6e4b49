//! User code of the scenarios: all in the section that is mapped to user mode, and self-contained.

use core::arch::global_asm;

/// Guest system calls of the scenarios; anything from 0x5000.
pub(crate) mod nr {
    pub(crate) const REPORT: u64 = 0x5000;
    pub(crate) const NULL: u64 = 0x5001;
}

global_asm!(
    ".pushsection .utext, \"ax\", @progbits",
    // Reports its argument plus one, then the result of that call plus one, ...; checks that its
    // other registers stay.
    "user_echo:",
    "mov rbx, 0x1111",
    "mov r12, 0x2222",
    "lea rdi, [rdi + 1]",
    "1:",
    "mov esi, 2",
    "mov edx, 3",
    "mov r10d, 4",
    "mov r8d, 5",
    "mov r9, rbx",
    "mov eax, 0x5000",
    "syscall",
    "cmp rbx, 0x1111",
    "jne 2f",
    "cmp r12, 0x2222",
    "jne 2f",
    "cmp r8, 5",
    "jne 2f",
    "lea rdi, [rax + 1]",
    "jmp 1b",
    "2: hlt",
    // Calls the null system call for ever.
    "user_null:",
    "1: mov eax, 0x5001",
    "syscall",
    "jmp 1b",
    // Reads the word at rdi and reports it, then continues with the address it is given.
    "user_read:",
    "1: mov rsi, rdi",
    "mov rdi, [rdi]",
    "mov eax, 0x5000",
    "syscall",
    "mov rdi, rax",
    "jmp 1b",
    // Writes rdi to the word at rdi, reports rdi and goes on with the address it is given.
    "user_write:",
    "1: mov [rdi], rdi",
    "mov eax, 0x5000",
    "syscall",
    "mov rdi, rax",
    "jmp 1b",
    // Writes rdi to the word at rdi and reports it, for ever.
    "user_rewrite:",
    "1: mov [rdi], rdi",
    "mov eax, 0x5000",
    "syscall",
    "jmp 1b",
    // Jumps to rdi; code there reports.
    "user_jump:",
    "jmp rdi",
    // Divides by zero at a known place, then reports rbx.
    "user_divide:",
    "mov ebx, 7",
    "xor ecx, ecx",
    "mov eax, 1",
    "cdq",
    ".globl user_divide_at",
    "user_divide_at: div ecx",
    "mov rdi, rbx",
    "mov eax, 0x5000",
    "syscall",
    "hlt",
    // Counts in rbx for ever.
    "user_spin:",
    "1: inc rbx",
    "jmp 1b",
    // Makes the host system call with number rdi and six arguments -1, and reports its result; goes
    // on with the number it is given.
    "user_host:",
    "1: mov rax, rdi",
    "mov rdi, -1",
    "mov rsi, -1",
    "mov rdx, -1",
    "mov r10, -1",
    "mov r8, -1",
    "mov r9, -1",
    "syscall",
    "mov rdi, rax",
    "mov eax, 0x5000",
    "syscall",
    "mov rdi, rax",
    "jmp 1b",
    // Reads FS and GS at offset 0 and reports them.
    "user_bases:",
    "1: rdfsbase rdi",
    "rdgsbase rsi",
    "mov eax, 0x5000",
    "syscall",
    "jmp 1b",
    // Jumps to rcx with every other register as it was started.
    "user_leap:",
    "jmp rcx",
    // Stores rsi at rdi and reports.
    "user_poke:",
    "mov [rdi], rsi",
    "mov eax, 0x5000",
    "syscall",
    "hlt",
    // Makes the call in rax, whatever it is, then jumps into the gate behind its first address, with the
    // answer as key and the attacker's r15.
    "user_steal:",
    "syscall",
    "movabs rcx, 0x70000000004c",
    "jmp rcx",
    ".popsection",
);

unsafe extern "C" {
    pub(crate) fn user_echo(argument: u64) -> !;
    pub(crate) fn user_null(argument: u64) -> !;
    pub(crate) fn user_read(argument: u64) -> !;
    pub(crate) fn user_write(argument: u64) -> !;
    pub(crate) fn user_rewrite(argument: u64) -> !;
    pub(crate) fn user_jump(argument: u64) -> !;
    pub(crate) fn user_divide(argument: u64) -> !;
    pub(crate) fn user_spin(argument: u64) -> !;
    pub(crate) fn user_host(argument: u64) -> !;
    pub(crate) fn user_bases(argument: u64) -> !;
    pub(crate) fn user_leap(argument: u64) -> !;
    pub(crate) fn user_poke(argument: u64) -> !;
    pub(crate) fn user_steal(argument: u64) -> !;
    pub(crate) static user_divide_at: u8;
}
