# Trap entries. Every gate switches to an IST stack and masks interrupts.
#
# Five paths: the faults that nano workloads and the storm provoke are mended here, with as few
# instructions as it takes; everything else saves all registers and calls trap(). trap() does not
# return: it resumes whoever called enter_user or guarded last, or reports a crash.

    .pushsection .text.traps, "ax", @progbits

# Divide error. `divide_armed` is 1 while the divzero workload runs; its instruction is 2 bytes.
    .balign 16
trap_0:
    cmp byte ptr [divide_armed], 0
    je 1f
    add qword ptr [rsp], 2
    inc qword ptr [trap_count]
    iretq
1:  push 0
    push 0
    jmp trap_common

# Breakpoint. `breakpoint_armed` is 1 while the int3 workload runs.
    .balign 16
trap_3:
    cmp byte ptr [breakpoint_armed], 0
    je 1f
    inc qword ptr [trap_count]
    iretq
1:  push 0
    push 3
    jmp trap_common

# Page fault. `expected_fault` is the probe page's address while the pgfault workload runs, else
# an address that never faults. The first `storm_bytes` from the storm's address on are mapped to
# the next of its frames at the first touch; see spaces.rs.
    .balign 16
trap_14:
    push rax
    mov rax, cr2
    cmp rax, [expected_fault]
    jne 1f
    mov rax, [probe_entry_a]
    mov [probe_table], rax
    inc qword ptr [trap_count]
    pop rax
    add rsp, 8
    iretq
1:  sub rax, 0x7fa00000
    cmp rax, [storm_bytes]
    jae 1f
    test byte ptr [rsp + 8], 1  # the page was there: no first touch
    jnz 1f
    cmp qword ptr [storm_left], 0
    je 1f
    dec qword ptr [storm_left]
    shr rax, 12
    push rcx
    mov rcx, [storm_next]
    mov [storm_table + 8*rax], rcx
    add qword ptr [storm_next], 4096
    pop rcx
    inc qword ptr [trap_count]
    pop rax
    add rsp, 8
    iretq
1:  pop rax
    push 14
    jmp trap_common

    .macro entry vector, has_error
    .balign 16
trap_\vector:
    .if \has_error == 0
    push 0
    .endif
    push \vector
    jmp trap_common
    .endm

    entry 1, 0
    entry 2, 0
    entry 4, 0
    entry 5, 0
    entry 6, 0
    entry 7, 0
    entry 8, 1
    entry 9, 0
    entry 10, 1
    entry 11, 1
    entry 12, 1
    entry 13, 1
    entry 15, 0
    entry 16, 0
    entry 17, 1
    entry 18, 0
    entry 19, 0
    entry 20, 0
    entry 21, 1
    entry 22, 0
    entry 23, 0
    entry 24, 0
    entry 25, 0
    entry 26, 0
    entry 27, 0
    entry 28, 0
    entry 29, 1
    entry 30, 1
    entry 31, 0

# Interrupts, 32 to 63: what a function may change is saved around interrupt(vector), which comes
# back. The processor aligns the stack.
    .macro interrupt vector
    .balign 16
interrupt_\vector:
    push rdi
    mov edi, \vector
    jmp interrupt_common
    .endm

    .altmacro
    .set vector, 32
    .rept 32
    interrupt %vector
    .set vector, vector + 1
    .endr

interrupt_common:
    push rax
    push rcx
    push rdx
    push rsi
    push r8
    push r9
    push r10
    push r11
    cld
    call interrupt
    pop r11
    pop r10
    pop r9
    pop r8
    pop rsi
    pop rdx
    pop rcx
    pop rax
    pop rdi
    iretq

# Builds the `Frame` of traps.rs.
trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rdi, rsp
    and rsp, -16
    cld
    call trap
    ud2

# extern "C" fn enter_user(function, a, b, c, d, e) -> Ended
#
# Calls user_call(function, a, b, c, d, e) in ring 3. Comes back when ring 3 traps, whatever the
# trap.
    .globl enter_user
enter_user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [resume_stack], rsp
    push 0x23                   # SS: user data
    push 0x7fdffff8             # RSP: as after a call, 8 below a multiple of 16
    push 2                      # RFLAGS: interrupts masked, IOPL 0
    push 0x2b                   # CS: user code
    push offset user_call
    iretq

# extern "C" fn guarded(function: extern "C" fn(u64) -> u64, argument) -> Ended
#
# Calls function(argument) in ring 0. Comes back when it returns, or when it traps.
    .globl guarded
guarded:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [resume_stack], rsp
    mov rax, rdi
    mov rdi, rsi
    sub rsp, 8
    call rax
    add rsp, 8
    xor edx, edx
    jmp 1f
# fn resume() -> !: makes the last enter_user or guarded return with `trapped` set.
    .globl resume
resume:
    mov rsp, [resume_stack]
    xor eax, eax
    mov edx, 1
1:  mov qword ptr [resume_stack], 0
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# System call: no stack is needed to answer. `syscall_key` can be read in ring 0 alone.
    .globl syscall_entry
    .balign 16
syscall_entry:
    mov rax, rdi
    xor rax, [syscall_key]
    sysretq

# fn callee(value in rax) -> 3 * value + 1 in rax: what the callret workload calls.
    .globl callee
    .balign 16
callee:
    lea rax, [rax + 2*rax + 1]
    ret

# fn triple_fault() -> !: an IDT without entries, and a fault.
    .globl triple_fault
triple_fault:
    lidt [no_idt]
    ud2
    jmp triple_fault
    .popsection

# Where ring 3 ends: the trap handler knows this address.
    .pushsection .utext, "ax", @progbits
    .globl user_return
user_return:
    ud2
# The trial of syscall enters here, on a page that ring 3 may execute: an engine that does not
# raise the privilege gets a readable answer instead of a fault.
    .globl syscall_trial
syscall_trial:
    mov eax, cs
    test al, 3
    jnz syscall_unraised
    mov rax, rdi
    xor rax, [syscall_key]
    sysretq
    .globl syscall_unraised
syscall_unraised:
    ud2
    .popsection

    .pushsection .rodata.traps, "a", @progbits
    .balign 8
    .globl trap_entries
trap_entries:
    .quad trap_0, trap_1, trap_2, trap_3, trap_4, trap_5, trap_6, trap_7
    .quad trap_8, trap_9, trap_10, trap_11, trap_12, trap_13, trap_14, trap_15
    .quad trap_16, trap_17, trap_18, trap_19, trap_20, trap_21, trap_22, trap_23
    .quad trap_24, trap_25, trap_26, trap_27, trap_28, trap_29, trap_30, trap_31
    .macro interrupt_entry vector
    .quad interrupt_\vector
    .endm
    .set vector, 32
    .rept 32
    interrupt_entry %vector
    .set vector, vector + 1
    .endr
    .noaltmacro
no_idt:
    .quad 0, 0
    .popsection
