//! Several vCPUs: start-up, interprocessor interrupts, atomic memory, and how such guests end.

mod support;

use std::io::Read;
use std::time::Instant;

use engine_core::testing::{Guest, assemble, end};
use engines::Mode;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, finish, on_every_mode, smp};

/// Calls `body` for every mode with several vCPUs that this host can run.
fn on_smp_modes(body: impl Fn(&'static Mode)) {
    on_every_mode(|mode| {
        if mode.cpus > 1 {
            body(mode);
        }
    });
}

fn kernel(mode: &Mode, image: &[u8], args: &[&str]) -> Call {
    let call = Call::new(mode.name);
    let path = call.path("kernel");
    std::fs::write(&path, image).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let call = call.args(&["--kernel", &path]).args(args);
    match args.contains(&"--timeout") {
        true => call,
        false => call.args(&["--timeout", "25"]),
    }
}

#[test]
fn four_processors_start_and_interrupt_each_other() {
    for x2apic in [false, true] {
        let image = smp::image(x2apic);
        on_smp_modes(|mode| {
            let ended = kernel(mode, &image, &["--smp", "4"]).run();
            ended.check(0, "");
            assert_eq!(ended.stdout, b"smp ok\n");
            let has_chips = mode.kernel_irqchip.is_some_and(|probe| probe().is_ok());
            if has_chips {
                let args = ["--smp", "4", "--irqchip", "kernel"];
                kernel(mode, &image, &args).run().check(0, "");
            }
        });
    }
}

#[test]
fn qemu_agrees_about_the_image() {
    let Some(ended) = support::qemu(&smp::image(false), &["-smp", "4"], b"") else {
        return;
    };
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let text = String::from_utf8_lossy(&ended.stdout);
    assert!(text.contains("smp ok"), "{text}");
}

/// A guest whose second processor does `second` in real mode, and whose first starts it and then
/// does `first`.
fn pair(
    first: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    second: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    const START_PAGE: u32 = 8;
    const ICR: u32 = 0xfee0_0300;
    let mut guest = Guest::protected(|asm| {
        for command in [5 << 8, 6 << 8 | START_PAGE] {
            asm.mov(dword_ptr(ICR), 0b11 << 18 | 1 << 14 | command)?;
        }
        first(asm)
    });
    let code = assemble(16, 0, second);
    let size = code.len() as u64;
    guest
        .segments
        .push((u64::from(START_PAGE) << 12, code, size));
    guest.elf()
}

fn spin(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = asm.create_label();
    asm.set_label(&mut again)?;
    asm.pause()?;
    asm.jmp(again)
}

fn halt(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.cli()?;
    asm.hlt()
}

#[test]
fn any_processor_ends_the_guest_wherever_the_others_are() {
    let leave = |asm: &mut CodeAssembler| {
        asm.mov(eax, 7)?;
        asm.out(0xf4, eax)
    };
    for image in [pair(spin, leave), pair(halt, leave)] {
        on_smp_modes(|mode| {
            let ended = kernel(mode, &image, &["--smp", "3"]).run();
            ended.check(1, "failed with code 7");
        });
    }
}

#[test]
fn all_processors_that_there_can_be_start() {
    const STARTED: u32 = 0x8800;
    on_smp_modes(|mode| {
        let all = |asm: &mut CodeAssembler| {
            let mut again = asm.create_label();
            asm.set_label(&mut again)?;
            asm.pause()?;
            asm.cmp(byte_ptr(STARTED), i32::from(mode.cpus - 1))?;
            asm.jne(again)?;
            end(asm, 0)
        };
        let here = |asm: &mut CodeAssembler| {
            asm.xor(ax, ax)?;
            asm.mov(ds, ax)?;
            asm.lock().inc(byte_ptr(STARTED))?;
            halt(asm)
        };
        let most = mode.cpus.to_string();
        kernel(mode, &pair(all, here), &["--smp", &most])
            .run()
            .check(0, "");
    });
}

#[test]
fn a_crash_names_the_processor() {
    let fault = |asm: &mut CodeAssembler| {
        // A limit of 0: no exception can be delivered. Not every KVM gets as far as the triple fault.
        asm.xor(ax, ax)?;
        asm.mov(ds, ax)?;
        asm.lidt(ptr(0x8f00))?;
        asm.ud2()
    };
    let image = pair(spin, fault);
    on_smp_modes(|mode| {
        let ended = kernel(mode, &image, &["--smp", "2"]).run();
        ended.check(4, "on vCPU 1");
        assert!(ended.stderr.starts_with("state on vCPU 1\n"), "{ended:?}");
    });
    let image = pair(halt, halt);
    on_smp_modes(|mode| {
        let ended = kernel(mode, &image, &["--smp", "4"]).run();
        ended.check(4, "nothing can wake it");
    });
}

#[test]
fn limits_hold_for_all_processors_together() {
    let flood = |asm: &mut CodeAssembler| {
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.out(0x80, al)?;
        asm.jmp(again)
    };
    let image = pair(spin, spin);
    on_smp_modes(|mode| {
        let ended = kernel(mode, &image, &["--smp", "2", "--timeout", "0.3"]).run();
        ended.check(5, "time limit reached (0.3 s)");
    });
    for image in [pair(halt, flood), pair(flood, flood)] {
        on_smp_modes(|mode| {
            let ended = kernel(mode, &image, &["--smp", "2", "--max-exits", "5000"]).run();
            ended.check(5, "exit limit reached (5000)");
        });
    }
}

#[test]
fn a_host_signal_ends_all_processors() {
    let speak = |asm: &mut CodeAssembler| {
        asm.mov(dx, 0x3f8)?;
        asm.mov(al, 0x21)?;
        asm.out(dx, al)?;
        spin(asm)
    };
    let image = pair(halt, speak);
    on_smp_modes(|mode| {
        let started = Instant::now();
        let mut call = kernel(mode, &image, &["--smp", "2"]);
        let mut child = call.start();
        // The second processor runs once it has spoken.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        // SAFETY: kill takes plain numbers; the child has not been waited for, so the id is its.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        finish(child, started).check(128 + libc::SIGINT, "ended by signal 2");
    });
}

#[test]
fn more_processors_than_there_can_be_are_usage_errors() {
    let image = Guest::protected(|asm| end(asm, 0)).elf();
    for mode in engines::MODES {
        for number in ["0", "17", "x"] {
            let ended = kernel(mode, &image, &["--smp", number]).run();
            assert_eq!(ended.status.code(), Some(2), "{ended:?}");
            assert!(ended.stderr.contains("--smp"), "{ended:?}");
        }
        if mode.cpus == 1 {
            kernel(mode, &image, &["--smp", "2"])
                .run()
                .check(2, "at most 1 vCPU");
        }
    }
    let call = Call::new("native").args(&["--workload", "alu", "--smp", "2"]);
    call.run().check(2, "has no vCPU");
}

#[test]
fn a_local_apic_that_is_switched_off_is_gone_from_cpuid_and_comes_back() {
    const BASE: u32 = 0xfee0_0000;
    const VERSION: u32 = 0x30;
    const APIC_BASE: u32 = 0x1b;
    const ELSEWHERE: u32 = 0x3200_0000;
    let image = Guest::long(|asm| {
        let mut bad = asm.create_label();
        // (IA32_APIC_BASE, CPUID's bit)
        for (number, (base, bit)) in [
            (BASE | 0x100, 0),
            (BASE | 0x900, 1),
            (ELSEWHERE | 0x900, 1),
            (BASE | 0x900, 1),
        ]
        .into_iter()
        .enumerate()
        {
            asm.mov(r8d, 2 + number as u32)?;
            asm.mov(ecx, APIC_BASE)?;
            asm.mov(eax, base)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()?;
            asm.rdmsr()?;
            asm.mov(ebx, base)?;
            asm.cmp(eax, ebx)?;
            asm.jne(bad)?;
            asm.mov(eax, 1)?;
            asm.cpuid()?;
            asm.shr(edx, 9)?;
            asm.and(edx, 1)?;
            asm.cmp(edx, bit)?;
            asm.jne(bad)?;
            // The registers are where the page is, if anywhere. Both places lie where there is no
            // memory, and in the identity map.
            for page in [BASE, ELSEWHERE] {
                let there = bit == 1 && base & 0xffff_f000 == page;
                asm.mov(ebx, page + VERSION)?;
                asm.mov(eax, dword_ptr(rbx))?;
                asm.mov(ebx, if there { 0x0005_0014 } else { u32::MAX })?;
                asm.cmp(eax, ebx)?;
                asm.jne(bad)?;
            }
        }
        end(asm, 0)?;
        asm.set_label(&mut bad)?;
        asm.mov(eax, r8d)?;
        asm.out(0xf4, eax)
    })
    .elf();
    on_smp_modes(|mode| {
        for smp in ["1", "2"] {
            kernel(mode, &image, &["--smp", smp]).run().check(0, "");
        }
    });
}

/// A guest whose boot processor leaves `code` in CMOS 0Fh and a pointer to page 8 in 40:67, and then does
/// `first`. What it finds there says so, and halts; the guest is done when it has been there twice.
fn warm_start(
    code: u32,
    first: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    const PAGE: u64 = 8;
    const VISITS: u32 = 0x8f00;
    let mut guest = Guest::protected(|asm| {
        asm.mov(eax, 0x0f)?;
        asm.out(0x70, al)?;
        asm.mov(eax, code)?;
        asm.out(0x71, al)?;
        asm.mov(dword_ptr(0x467), 0x0800_0000)?;
        first(asm)
    });
    let page = assemble(16, 0, |asm| {
        let mut again = asm.create_label();
        // CMOS 0Fh is 0 again, and the processor in real mode.
        asm.mov(al, 0x0f)?;
        asm.out(0x70, al)?;
        asm.in_(al, 0x71)?;
        asm.smsw(bx)?;
        asm.and(bl, 1)?;
        asm.or(al, bl)?;
        asm.add(al, i32::from(b'w'))?;
        asm.mov(dx, 0x3f8)?;
        asm.out(dx, al)?;
        asm.inc(byte_ptr(VISITS))?;
        asm.cmp(byte_ptr(VISITS), 2)?;
        asm.jb(again)?;
        asm.xor(eax, eax)?;
        asm.out(0xf4, eax)?;
        asm.set_label(&mut again)?;
        // Anew, by an INIT to all, from real mode: the register's page lies above the limit of DS.
        asm.mov(al, 0x0f)?;
        asm.out(0x70, al)?;
        asm.mov(al, 5)?;
        asm.out(0x71, al)?;
        asm.mov(ecx, 0x1b)?;
        asm.rdmsr()?;
        asm.or(ax, 1 << 10)?;
        asm.wrmsr()?;
        asm.mov(ecx, 0x830)?;
        asm.xor(edx, edx)?;
        asm.mov(eax, 0b10 << 18 | 1 << 14 | 5 << 8)?;
        asm.wrmsr()?;
        asm.cli()?;
        asm.hlt()
    });
    let size = page.len() as u64;
    guest.segments.push((PAGE << 12, page, size));
    guest.elf()
}

/// Sends itself an INIT and waits for it, halted.
fn init_itself(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.mov(dword_ptr(0xfee0_0300u32), 0b01 << 18 | 1 << 14 | 5 << 8)?;
    halt(asm)
}

#[test]
fn init_of_the_boot_processor_goes_on_where_the_shutdown_code_says() {
    on_every_mode(|mode| {
        for code in [5, 0x0a] {
            let image = warm_start(code, init_itself);
            let ended = kernel(mode, &image, &[]).run();
            ended.check(0, "");
            assert_eq!(ended.stdout, b"ww");
        }
        // Nobody waits for the boot processor there.
        let image = warm_start(0, init_itself);
        let ended = kernel(mode, &image, &[]).run();
        ended.check(1, "the guest reset the machine");
        assert_eq!(ended.stdout, b"");
    });
}

/// The ways to pull the reset line: (port, value) written one after the other.
const RESETS: [&[(u32, u32)]; 5] = [
    // Port A's bit rises, whatever it was.
    &[(0x92, 2), (0x92, 3)],
    // The keyboard controller pulses the line, and holds it low.
    &[(0x64, 0xfe)],
    &[(0x64, 0xd1), (0x60, 2)],
    // The chipset, soft and hard.
    &[(0xcf9, 0), (0xcf9, 4)],
    &[(0xcf9, 2), (0xcf9, 6)],
];

fn reset(asm: &mut CodeAssembler, writes: &[(u32, u32)]) -> Result<(), IcedError> {
    for &(port, value) in writes {
        asm.mov(edx, port)?;
        asm.mov(eax, value)?;
        asm.out(dx, al)?;
    }
    halt(asm)
}

#[test]
fn a_reset_goes_on_where_the_shutdown_code_says_and_ends_the_run_without_one() {
    on_every_mode(|mode| {
        for writes in RESETS {
            for (code, status, text, output) in [
                (5, 0, "", &b"ww"[..]),
                (10, 0, "", b"ww"),
                (0, 1, "the guest reset the machine", b""),
                (9, 1, "the guest reset the machine", b""),
            ] {
                let image = warm_start(code, |asm| reset(asm, writes));
                let ended = kernel(mode, &image, &[]).run();
                ended.check(status, text);
                assert_eq!(ended.stdout, output, "{writes:x?} {code}");
            }
        }
    });
}

#[test]
fn a_reset_by_another_processor_resets_the_boot_processor() {
    const PAGE: u32 = 0xb000;
    let image = warm_start(0x0a, |asm| {
        let second = assemble(16, 0, |asm| {
            asm.mov(dx, 0xcf9)?;
            asm.mov(al, 6)?;
            asm.out(dx, al)?;
            halt(asm)
        });
        put(asm, PAGE, &second)?;
        start_others(asm, PAGE)?;
        spin(asm)
    });
    on_smp_modes(|mode| {
        let ended = kernel(mode, &image, &["--smp", "2"]).run();
        ended.check(0, "");
        assert_eq!(ended.stdout, b"ww");
    });
}

/// Has code written to `page`.
fn put(asm: &mut CodeAssembler, page: u32, code: &[u8]) -> Result<(), IcedError> {
    for (index, word) in code.chunks(4).enumerate() {
        let mut bytes = [0; 4];
        bytes[..word.len()].copy_from_slice(word);
        asm.mov(
            dword_ptr(page + 4 * index as u32),
            i32::from_le_bytes(bytes),
        )?;
    }
    Ok(())
}

/// INIT and start-up at `page` to all others.
fn start_others(asm: &mut CodeAssembler, page: u32) -> Result<(), IcedError> {
    for command in [5 << 8, 6 << 8 | page >> 12] {
        asm.mov(
            dword_ptr(0xfee0_0300u32),
            (0b11 << 18 | 1 << 14 | command) as i32,
        )?;
    }
    Ok(())
}

#[test]
fn another_processor_can_have_the_boot_processor_start_anew() {
    let image = warm_start(0x0a, |asm| {
        const PAGE: u32 = 0xb000;
        // Page 11 has the second processor send the boot processor, number 0, an INIT.
        let second = assemble(16, 0, |asm| {
            asm.mov(ecx, 0x1b)?;
            asm.rdmsr()?;
            asm.or(ax, 1 << 10)?;
            asm.wrmsr()?;
            asm.mov(ecx, 0x830)?;
            asm.xor(edx, edx)?;
            asm.mov(eax, 1 << 14 | 5 << 8)?;
            asm.wrmsr()?;
            asm.cli()?;
            asm.hlt()
        });
        put(asm, PAGE, &second)?;
        start_others(asm, PAGE)?;
        spin(asm)
    });
    on_smp_modes(|mode| {
        let ended = kernel(mode, &image, &["--smp", "2"]).run();
        ended.check(0, "");
        assert_eq!(ended.stdout, b"ww");
    });
}
