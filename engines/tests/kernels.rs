//! Bare-metal kernels of other origin: Multiboot, PVH and flat images, their command lines and
//! modules, and exit statuses as QEMU's isa-debug-exit gives them.

mod support;

use engine_core::testing::{CODE, Guest, assemble, end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, on_every_mode};

const MAGIC: u32 = 0x1bad_b002;
const BOOTED: u32 = 0x2bad_b002;

/// A Multiboot header, then code, as a guest with one segment.
fn multiboot(body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
    const FLAGS: u32 = 3;
    let header = [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC + FLAGS)];
    // The image is entered at its segment's first byte: the header follows the code.
    let code = assemble(32, CODE, body);
    let mut guest = Guest::from_code(&code);
    let content = &mut guest.segments[0].1;
    content.resize(content.len().next_multiple_of(4), 0x90);
    content.extend(header.into_iter().flat_map(u32::to_le_bytes));
    guest.segments[0].2 = content.len() as u64;
    guest
}

/// Prints the zero-terminated text that `esi` leads to.
fn print(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = asm.create_label();
    let mut done = asm.create_label();
    asm.mov(dx, 0x3f8)?;
    asm.set_label(&mut next)?;
    asm.lodsb()?;
    asm.test(al, al)?;
    asm.jz(done)?;
    asm.out(dx, al)?;
    asm.jmp(next)?;
    asm.set_label(&mut done)?;
    asm.nop()
}

fn kernel(call: Call, image: &[u8], args: &[&str]) -> Call {
    let path = call.path("kernel");
    std::fs::write(&path, image).unwrap();
    let path = path.to_str().unwrap().to_owned();
    call.args(&["--timeout", "20", "--kernel", &path])
        .args(args)
}

#[test]
fn a_multiboot_kernel_finds_its_command_line_and_its_modules() {
    let image = multiboot(|asm| {
        let mut bad = asm.create_label();
        asm.cmp(eax, BOOTED as i32)?;
        asm.jne(bad)?;
        asm.mov(esi, dword_ptr(ebx + 16))?;
        print(asm)?;
        asm.cmp(dword_ptr(ebx + 20), 3)?;
        asm.jne(bad)?;
        asm.mov(ecx, dword_ptr(ebx + 24))?;
        for module in 0..3 {
            let field = |number: i32| dword_ptr(ecx + 16 * module + 4 * number);
            asm.mov(esi, field(0))?;
            asm.test(esi, 0xfff)?;
            asm.jne(bad)?;
            print(asm)?;
            // The module ends after its zero byte.
            asm.cmp(esi, field(1))?;
            asm.jne(bad)?;
            // What is told of it, from its file's name on.
            asm.mov(esi, field(2))?;
            let mut again = asm.create_label();
            let mut found = asm.create_label();
            asm.set_label(&mut again)?;
            asm.lodsb()?;
            asm.cmp(al, b',' as i32)?;
            asm.je(found)?;
            asm.test(al, al)?;
            asm.jne(again)?;
            asm.jmp(bad)?;
            asm.set_label(&mut found)?;
            print(asm)?;
        }
        asm.mov(eax, 21)?;
        asm.out(0xf4, ax)?;
        asm.set_label(&mut bad)?;
        end(asm, 1)
    })
    .elf();
    on_every_mode(|mode| {
        let call = Call::new(mode.name);
        let file = |name: &str, content: &[u8]| {
            let path = call.path(name);
            std::fs::write(&path, content).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let single = file(",0", b" zero\0");
        let pair = [file(",1", b" one\0"), file(",2", b" two\0")];
        let pair = pair.map(|name| name.replace(',', ",,"));
        let pair = format!("{},{} x=1 y", pair[0], pair[1]);
        let args = [
            "--cmdline",
            "one two",
            "--initrd",
            &single,
            "--initrd",
            &pair,
            "--exit-port",
            "raw",
        ];
        let ended = kernel(call, &image, &args).run();
        ended.check(43, "");
        let text = String::from_utf8_lossy(&ended.stdout);
        assert!(
            text.ends_with("/kernel one two zero0 one1 two2 x=1 y"),
            "{text}"
        );
    });
}

#[test]
fn a_kernel_may_take_exceptions_before_it_has_descriptors_of_its_own() {
    const TABLE: i32 = 0x20_0000;
    let image = multiboot(|asm| {
        let mut begin = asm.create_label();
        // The handler is where this returns to.
        asm.call(begin)?;
        end(asm, 0)?;
        asm.set_label(&mut begin)?;
        asm.pop(eax)?;
        // A gate for #UD, with the selector that CS has.
        asm.mov(word_ptr(TABLE + 6 * 8), ax)?;
        asm.shr(eax, 16)?;
        asm.mov(word_ptr(TABLE + 6 * 8 + 6), ax)?;
        asm.mov(word_ptr(TABLE + 6 * 8 + 2), cs)?;
        asm.mov(word_ptr(TABLE + 6 * 8 + 4), 0x8e00u32)?;
        asm.push(TABLE)?;
        asm.push((7 * 8 - 1) << 16)?;
        asm.lidt(fword_ptr(esp + 2))?;
        asm.mov(ebx, ds)?;
        asm.mov(es, ebx)?;
        asm.ud2()?;
        end(asm, 1)
    })
    .elf();
    on_every_mode(|mode| {
        kernel(Call::new(mode.name), &image, &[]).run().check(0, "");
    });
}

#[test]
fn exit_codes_of_every_width_become_statuses() {
    for (code, width, status) in [(0u32, 4, 1), (1, 1, 3), (0x7f, 2, 255), (0x1234, 4, 0x69)] {
        let image = Guest::protected(|asm| {
            asm.mov(eax, code)?;
            match width {
                1 => asm.out(0xf4, al),
                2 => asm.out(0xf4, ax),
                _ => asm.out(0xf4, eax),
            }
        })
        .elf();
        on_every_mode(|mode| {
            let call = kernel(Call::new(mode.name), &image, &["--exit-port", "raw"]);
            call.run().check(status, "");
        });
    }
}

#[test]
fn test_devices_keep_what_is_written() {
    let image = Guest::protected(|asm| {
        let mut bad = asm.create_label();
        asm.mov(eax, 0x1234_5678)?;
        asm.out(0xe0, eax)?;
        asm.in_(al, 0xe0)?;
        asm.cmp(al, 0x78)?;
        asm.jne(bad)?;
        asm.mov(ebx, 0xff00_0010u32)?;
        asm.mov(dword_ptr(ebx), 0x55)?;
        asm.add(byte_ptr(ebx + 1), 2)?;
        asm.cmp(dword_ptr(ebx), 0x255)?;
        asm.jne(bad)?;
        end(asm, 0)?;
        asm.set_label(&mut bad)?;
        end(asm, 1)
    })
    .elf();
    on_every_mode(|mode| {
        let call = kernel(Call::new(mode.name), &image, &["--exit-port", "raw"]);
        call.run().check(1, "");
    });
}

#[test]
fn a_flat_binary_is_entered_at_its_first_byte() {
    for (at, args) in [(0x10_0000, vec![]), (0x40_0000, vec!["--load", "0x400000"])] {
        let code = assemble(32, at, |asm| {
            let mut here = asm.create_label();
            let mut bad = asm.create_label();
            asm.mov(esp, 0x20_0000)?;
            asm.call(here)?;
            asm.set_label(&mut here)?;
            asm.pop(eax)?;
            asm.cmp(eax, (at + 10) as i32)?;
            asm.jne(bad)?;
            // hvm_start_info's magic.
            asm.cmp(dword_ptr(ebx), 0x336e_c578)?;
            asm.jne(bad)?;
            end(asm, 0)?;
            asm.set_label(&mut bad)?;
            end(asm, 1)
        });
        on_every_mode(|mode| {
            kernel(Call::new(mode.name), &code, &args)
                .run()
                .check(0, "");
        });
    }
}

#[test]
fn kernels_that_make_no_sense_are_usage_errors() {
    let image = Guest::protected(|asm| end(asm, 0)).elf();
    for mode in support::unaware_modes() {
        let call = || Call::new(mode.name);
        kernel(call(), &[], &[])
            .run()
            .check(2, "no loadable segment");
        kernel(call(), &image, &["--load", "0x40000000"])
            .run()
            .check(2, "outside guest memory");
        kernel(call(), &image, &["--initrd", "/nonexistent"])
            .run()
            .check(2, "initrd /nonexistent");
        let mut linux = vec![0; 4096];
        linux[0x202..0x206].copy_from_slice(b"HdrS");
        kernel(call(), &linux, &[])
            .run()
            .check(2, "give the vmlinux that is in it");
        let mut bad = multiboot(|asm| end(asm, 0));
        let content = &mut bad.segments[0].1;
        let at = content.len() - 12;
        // Flag 5 is unknown, and demanded.
        content[at + 4] |= 32;
        content[at + 8..].copy_from_slice(&0u32.wrapping_sub(MAGIC + 35).to_le_bytes());
        kernel(call(), &bad.elf(), &[]).run().check(2, "flags 0x20");
    }
    kernel(Call::new("para"), &image, &[])
        .run()
        .check(2, "takes no bare-metal kernel");
}

/// Leads EBX to the fixed description table, by way of the root pointer.
fn find_fadt(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut search = asm.create_label();
    asm.mov(ebx, 0xe_0000 - 16)?;
    asm.set_label(&mut search)?;
    asm.add(ebx, 16)?;
    asm.cmp(dword_ptr(ebx), i32::from_le_bytes(*b"RSD "))?;
    asm.jne(search)?;
    asm.mov(ebx, dword_ptr(ebx + 16))?;
    asm.mov(ebx, dword_ptr(ebx + 36))?;
    let mut found = asm.create_label();
    asm.cmp(dword_ptr(ebx), i32::from_le_bytes(*b"FACP"))?;
    asm.je(found)?;
    end(asm, 1)?;
    asm.set_label(&mut found)?;
    asm.nop()
}

/// Enters the sleep state of type `kind` by PM1a_CNT_BLK of the table that EBX leads to.
fn sleep(asm: &mut CodeAssembler, kind: u32) -> Result<(), IcedError> {
    asm.mov(edx, dword_ptr(ebx + 64))?;
    asm.mov(eax, 1 << 13 | kind << 10)?;
    asm.out(dx, ax)
}

#[test]
fn a_guest_that_switches_its_machine_off_has_ended_well() {
    let image = Guest::protected(|asm| {
        find_fadt(asm)?;
        sleep(asm, 0)?;
        end(asm, 1)
    })
    .elf();
    on_every_mode(|mode| {
        for args in [&[][..], &["--exit-port", "raw"]] {
            kernel(Call::new(mode.name), &image, args)
                .run()
                .check(0, "");
        }
    });
}

#[test]
fn a_reset_is_never_taken_for_a_good_end() {
    let image = Guest::protected(|asm| {
        asm.mov(eax, 6)?;
        asm.mov(edx, 0xcf9)?;
        asm.out(dx, al)?;
        end(asm, 0)
    })
    .elf();
    on_every_mode(|mode| {
        for (args, status) in [(&[][..], 1), (&["--exit-port", "raw"], 4)] {
            kernel(Call::new(mode.name), &image, args)
                .run()
                .check(status, "the guest reset the machine");
        }
    });
}

#[test]
fn real_mode_code_finds_a_timer_that_ticks_and_handlers_for_it() {
    // To real mode by a reset, after which the boot processor takes the 8259s' interrupts again.
    const PAGE: u64 = 8;
    const TICKS: u32 = 0x46c;
    let mut guest = Guest::protected(|asm| {
        for (port, value) in [(0x70, 0x0f), (0x71, 0x0a)] {
            asm.mov(eax, value)?;
            asm.out(port, al)?;
        }
        asm.mov(dword_ptr(0x467), (PAGE as u32) << 24)?;
        // The last tick of a day is next.
        asm.mov(dword_ptr(TICKS), 0x18_00af)?;
        asm.mov(eax, 0xfe)?;
        asm.out(0x64, al)?;
        asm.hlt()
    });
    let page = assemble(16, 0, |asm| {
        let mut again = asm.create_label();
        let mut bad = asm.create_label();
        // The timer's line and the cascade are open.
        asm.in_(al, 0x21)?;
        asm.cmp(al, 0xfa_u32 as i32)?;
        asm.jne(bad)?;
        asm.mov(cx, 3)?;
        asm.set_label(&mut again)?;
        asm.sti()?;
        asm.hlt()?;
        asm.cli()?;
        asm.loop_(again)?;
        asm.cmp(dword_ptr(TICKS), 2)?;
        asm.jne(bad)?;
        asm.cmp(byte_ptr(0x470), 1)?;
        asm.jne(bad)?;
        asm.xor(eax, eax)?;
        asm.out(0xf4, eax)?;
        asm.set_label(&mut bad)?;
        asm.mov(eax, 1)?;
        asm.out(0xf4, eax)
    });
    let size = page.len() as u64;
    guest.segments.push((PAGE << 12, page, size));
    let image = guest.elf();
    on_every_mode(|mode| {
        let ended = kernel(Call::new(mode.name), &image, &[]).run();
        ended.check(0, "");
    });
}

#[test]
fn a_machine_that_is_suspended_goes_on_at_its_waking_vector() {
    const VECTOR: u64 = 0x8003;
    let guest = |alarm: bool| {
        let mut guest = Guest::protected(|asm| {
            find_fadt(asm)?;
            asm.mov(ecx, dword_ptr(ebx + 36))?;
            asm.mov(dword_ptr(ecx + 12), VECTOR as u32)?;
            asm.mov(dword_ptr(0x7000), 0x5a5a_1234)?;
            // The clock's alarm: every second, and enabled or not.
            let enable = if alarm { 0x22 } else { 2 };
            for (register, value) in [(1u32, 0xc0u32), (3, 0xc0), (5, 0xc0), (0xb, enable)] {
                asm.mov(eax, register)?;
                asm.out(0x70, al)?;
                asm.mov(eax, value)?;
                asm.out(0x71, al)?;
            }
            sleep(asm, 1)?;
            end(asm, 1)
        });
        let page = assemble(16, 3, |asm| {
            let mut bad = asm.create_label();
            // In real mode, with memory as it was and WAK_STS set.
            asm.xor(ax, ax)?;
            asm.mov(ds, ax)?;
            asm.cmp(dword_ptr(0x7000), 0x5a5a_1234)?;
            asm.jne(bad)?;
            asm.smsw(ax)?;
            asm.test(al, 1)?;
            asm.jne(bad)?;
            asm.mov(dx, 0x600)?;
            asm.in_(ax, dx)?;
            asm.test(ah, 0x80)?;
            asm.je(bad)?;
            asm.xor(eax, eax)?;
            asm.out(0xf4, eax)?;
            asm.set_label(&mut bad)?;
            asm.mov(eax, 2)?;
            asm.out(0xf4, eax)
        });
        let size = page.len() as u64;
        guest.segments.push((VECTOR, page, size));
        guest.elf()
    };
    on_every_mode(|mode| {
        let ended = kernel(Call::new(mode.name), &guest(true), &[]).run();
        ended.check(0, "");
        // Nothing else wakes it.
        let ended = kernel(Call::new(mode.name), &guest(false), &[]).run();
        ended.check(4, "nothing can wake it");
    });
}
