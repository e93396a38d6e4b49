# The gate: the only host code in a user process while guest code runs.
#
# Guest code may jump here, to any byte, with any registers, stack and flags. So nothing below the
# notification trusts a register: every address is an immediate, every operand comes from the
# command page, which U cannot write. The stack is not used. The descriptor of guest memory exists
# only between the recvmsg and the close below, and is there to be received only when K has sent it
# with its answer; whatever interrupts the gate in between is a signal whose frame points into the
# gate, and K ends a process that shows it one.

    .section .gate, "ax", @progbits
    .balign 4096
    .globl gate_signal
gate_signal:
    mov r12, rsp                    # the frame
    mov ebp, edi                    # the signal
    movabs r15, 0x700000010000      # u::COMMANDS
    cmp dword ptr [r15 + 4], 2      # K has sent the signal to have commands carried out
    je gate_commanded
    xor r13d, r13d
gate_told:
    mov edi, ebp
    mov rsi, r12
    mov edx, r13d
    mov eax, 0x5f00
    jmp gate_notify

    .org gate_signal + 0x40
gate_notify:
    syscall                         # returns at gate + 0x42: u::GATE_NOTIFIED
gate_commanded:
    movabs r15, 0x700000010000      # u::COMMANDS
    mov r14d, [r15]
    xor r13d, r13d
    lea rbx, [r15 + 64]
    test dword ptr [r15 + 20], 1
    jz 2f
    movabs rsi, 0x700000012000      # u::MESSAGE, a struct msghdr
    xor eax, eax
    mov [rsi], rax
    mov [rsi + 8], rax
    mov [rsi + 16], rax
    mov [rsi + 24], rax
    lea rax, [rsi + 64]
    mov [rsi + 32], rax             # control
    mov qword ptr [rsi + 40], 24
    mov edi, 3                      # u_fd::DOOR
    mov edx, 0x40                   # MSG_DONTWAIT
    mov eax, 47                     # recvmsg
    syscall
2:  test r14d, r14d
    jz 5f
    mov rdi, [rbx]
    mov rsi, [rbx + 8]
    cmp dword ptr [rbx + 20], 0
    jne 3f
    mov edx, [rbx + 16]
    mov r10d, 0x11                  # MAP_SHARED | MAP_FIXED
    xor r8d, r8d                    # u_fd::RAM
    mov r9, [rbx + 24]
    mov eax, 9                      # mmap
    syscall
    jmp 4f
3:  mov eax, 11                     # munmap
    syscall
4:  cmp rax, -4095
    jb 6f
    inc r13d
6:  add rbx, 32
    dec r14d
    jmp 2b
5:  test dword ptr [r15 + 20], 2    # a control of the attack tests leaves it open
    jnz 7f
    xor edi, edi
    mov eax, 3                      # close
    syscall
7:  cmp dword ptr [r15 + 4], 1
    je 8f
    ja gate_told
    xor edi, edi
    mov esi, r13d
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
    mov eax, 15                     # rt_sigreturn
    syscall
    hlt

# The last steps of a new user process: everything but gate and slot goes, then the jail is shut.
# The filter lies on the signal stack. rdi: not 0 keeps the mappings (a control).
    .globl gate_close
gate_close:
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
    xor edi, edi
    xor esi, esi
    mov eax, 0x5f01
    jmp gate_notify
13: hlt

    .globl gate_restorer
gate_restorer:
    hlt
