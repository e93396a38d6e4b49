# Entry of the `aware` flavour, its way into user mode and out of it again.

# The note that names the ABI version wanted (1) and the features needed (none).
    .pushsection .note.Trapline, "a", @note
    .balign 4
    .long 9                     # name size
    .long 8                     # descriptor size
    .long 1                     # type
    .asciz "Trapline"
    .balign 4
    .long 1
    .long 0
    .popsection

    .pushsection .text.entry, "ax", @progbits
# extern "C" fn(info: *const StartInfo) -> !, on the boot stack.
    .globl aware_entry
    .type aware_entry, @function
aware_entry:
    xor ebp, ebp
    call aware_start
    ud2

# extern "C" fn aware_enter(form, argument) -> Ended
#
# iret. Comes back by aware_leave, or with the call's error in rax and rdx 0.
    .globl aware_enter
aware_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
    mov [aware_resume_stack], rsp
    mov rax, [aware_hypercalls]
    add rax, 23 * 32            # iret
    call rax
    xor edx, edx
    jmp 1f

# extern "C" fn aware_leave(value) -> !: makes the last aware_enter return, rdx 1.
    .globl aware_leave
aware_leave:
    mov rsp, [aware_resume_stack]
    mov rax, rdi
    mov edx, 1
1:  add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# fn(value in rax) -> 3 * value + 1 in rax: what the callret workload calls.
    .globl aware_callee
    .balign 16
aware_callee:
    lea rax, [rax + 2*rax + 1]
    ret
    .popsection

    .pushsection .bss.stacks, "aw", @nobits
    .balign 4096
    .skip 16384
    .globl aware_upcall_stack_top
aware_upcall_stack_top:
    .popsection
