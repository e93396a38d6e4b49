# The gate: the only host code in a user process while guest code runs.
#
# Guest code may jump here, to any byte, with any registers, stack and flags. So nothing below the
# notification trusts a register: every address is an immediate, every operand comes from the
# command page, which U cannot write. The stack is not used.
#
# Every host call behind the notification passes the process's key with it, in the halves of r8 and r10 that the host's calls ignore and the jail compares. The key comes from K
# as the result of the notification, and is in registers alone until rt_sigreturn replaces them all.
# So a jump to anything behind the notification lacks it. Whatever interrupts the gate while it has
# the key is a signal whose frame points into the gate, and K ends a process that shows it one.

    .section .gate, "ax", @progbits
    .balign 4096
    .globl gate_signal
gate_signal:
    mov rsi, rsp                    # the frame; rdi is the signal
    mov eax, 0x5f00
    jmp gate_notify

    .org gate_signal + 0x40
gate_notify:
    syscall                         # returns at gate + 0x42: u::GATE_NOTIFIED
    movabs r15, 0x700000010000      # u::COMMANDS
    lea rbx, [r15 + 64]
    xor r13d, r13d                  # commands that failed
    mov r8, rax
    shr r8, 32
    shl r8, 32                      # high half of the key, above u_fd::RAM
    mov r14, rax
    shl r14, 32                     # low half, to go above the flags
2:  mov eax, ebx
    sub eax, r15d
    cmp eax, [r15]
    jae 5f
    mov rdi, [rbx]
    mov rsi, [rbx + 8]
    mov edx, [rbx + 16]
    mov r9, [rbx + 24]
    mov r10d, [rbx + 20]
    mov eax, 11                     # munmap
    test r10d, r10d
    jz 3f
    mov eax, 10                     # mprotect
    js 3f
    mov eax, 9                      # mmap
3:  or r10, r14
    syscall
    add rbx, 32
    cmp rax, -4095
    jb 2b
    inc r13d
    jmp 2b
5:  test r13d, r13d                 # user code must not run on what should be gone
    jz 8f
    xor edi, edi
    mov esi, r13d
    mov rdx, r14                    # the key again: nobody else can say this
    shr rdx, 32
    or rdx, r8
    mov eax, 0x5f01
    jmp gate_notify
8:  mov ecx, [r15 + 16]
    test ecx, 1
    jz 9f
    mov rax, [r15 + 24]
    wrfsbase rax
9:  test ecx, 2
    jz 10f
    mov rax, [r15 + 32]
    wrgsbase rax
10: mov rsp, [r15 + 8]
    mov r10, r14
    mov eax, 15                     # rt_sigreturn
    syscall
    hlt

# The last steps of a new user process: everything but gate and slot goes, then the jail is shut,
# and the key that the filter's code holds is wiped from the signal stack, where it lay. rdi: not 0
# keeps the mappings (a control). rsi: the key, which K is told.
    .globl gate_close
gate_close:
    mov rbx, rsi
    test rdi, rdi
    jnz 12f
    xor edi, edi
    movabs rsi, 0x700000000000
    mov eax, 11
    syscall
    movabs rdi, 0x700000001000
    mov esi, 0xf000
    mov eax, 11
    syscall
    movabs rdi, 0x700000018000      # after the slot
    movabs rsi, 0x7ffffffff000
    sub rsi, rdi
    mov eax, 11
    syscall
12: mov edi, 1                      # SECCOMP_SET_MODE_FILTER
    xor esi, esi
    movabs rdx, 0x700000011000      # u::SIGNAL_STACK
    mov eax, 317
    syscall
    test rax, rax
    jnz 13f
    movabs rdi, 0x700000011000
    mov ecx, 0x1000
    rep stosb
    xor edi, edi
    xor esi, esi
    mov rdx, rbx
    mov eax, 0x5f01
    jmp gate_notify
13: hlt

    .globl gate_restorer
gate_restorer:
    hlt
