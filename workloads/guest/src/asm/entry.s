# Entry: from the PVH entry point (32-bit, paging off) to 64-bit Rust, and the tables that stand
# in the image ready made.

# XEN_ELFNOTE_PHYS32_ENTRY (Xen public/elfnote.h): the 32-bit physical entry point.
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 4                     # name size
    .long 4                     # descriptor size
    .long 18                    # type
    .asciz "Xen"
    .long pvh_entry
    .popsection

    .pushsection .text.entry, "ax", @progbits
    .code32
    .globl pvh_entry
    .type pvh_entry, @function
pvh_entry:
    cli
    cld
    lgdt [gdt_pointer]
    # PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE2.
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    # EFER: SCE, LME, NXE.
    mov ecx, 0xc0000080
    xor edx, edx
    mov eax, 0x901
    wrmsr
    # CR0: PG, WP, NE, ET, MP, PE.
    mov eax, 0x80010033
    mov cr0, eax
    # Far jump to 0x08:entry64; written out, since assemblers differ about its spelling.
    .byte 0xea
    .long entry64
    .word 0x08
    .code64
entry64:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset kernel_stack_top
    xor ebp, ebp
    mov edi, ebx
    call kernel_start
    ud2
    .popsection

    .pushsection .data.tables, "aw", @progbits
    .balign 16
# Selectors: see cpu.rs. The order of the last three is what sysret wants.
    .globl gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 kernel code, 64-bit
    .quad 0x00cf93000000ffff    # 0x10 kernel data
    .quad 0x00cffb000000ffff    # 0x18 user code, 32-bit: unused, sysret's base
    .quad 0x00cff3000000ffff    # 0x20 user data
    .quad 0x00affb000000ffff    # 0x28 user code, 64-bit
    .globl gdt_tss
gdt_tss:
    .quad 0, 0                  # 0x30 TSS, filled by traps.rs
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

# Entries: 1 present, 2 writable, 4 user, 0x80 large page, bit 63 no-execute.
    .balign 4096
    .globl boot_pml4
boot_pml4:
    .quad boot_pdpt + 7
    .fill 511, 8, 0
    .globl boot_pdpt
boot_pdpt:
    .quad low_directory + 7     # 0 - 1 GiB
    .quad user_directory + 7    # 1 - 2 GiB
    .fill 510, 8, 0
# 0 - 1 GiB as itself. The first 2 MiB can be executed until memory.rs puts low_table in their place.
    .globl low_directory
low_directory:
    .quad 0x83
    .set address, 0x200000
    .rept 511
    .quad 0x8000000000000083 + address
    .set address, address + 0x200000
    .endr
# 0 - 2 MiB in 4 KiB pages: not executable, page 0 not present. memory.rs sets the image's rights.
    .globl low_table
low_table:
    .quad 0
    .set address, 0x1000
    .rept 511
    .quad 0x8000000000000003 + address
    .set address, address + 0x1000
    .endr
    .popsection

    .pushsection .bss.tables, "aw", @nobits
    .balign 4096
    .globl user_directory
user_directory:
    .skip 4096
    .globl device_directory
device_directory:
    .skip 4096
    .globl probe_table
probe_table:
    .skip 4096
    .globl storm_table
storm_table:
    .skip 4096
    .globl probe_frame_a
probe_frame_a:
    .skip 4096
    .globl probe_frame_b
probe_frame_b:
    .skip 4096
# Stacks: a guard page would need one more table entry each; an overflow runs into the neighbour
# below and is caught by nothing, so they are ample.
    .skip 16384
    .globl kernel_stack_top
kernel_stack_top:
    .skip 4096
    .globl trap_stack_top
trap_stack_top:
    .skip 4096
    .globl nested_stack_top
nested_stack_top:
    .popsection
