//! Interrupts and timers, as guests use them: the same small guests in every mode of unaware
//! guests, with the VMM's interrupt controllers and with the kernel's, and under QEMU.
//!
//! A guest ends with 0 if all is well, with [`ABSENT`] if the machine says that it lacks what is
//! tried, and else with the number of the check that failed.

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use engine_core::devices::lapic;
use engine_core::testing::{Guest, end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, PATIENCE, on_every_mode};

type Built = Result<(), IcedError>;
type Asm = CodeAssembler;

/// The machine does not announce the feature.
const ABSENT: u32 = 77;

const IDT: u64 = 0x28_0000;
const LAPIC: u64 = lapic::BASE.0;
const IOAPIC: u64 = 0xfec0_0000;
/// Ticks after which a guest has seen enough.
const ENOUGH: i32 = 5;

/// Runs a guest everywhere and expects it to end well.
fn succeeds(guest: &Guest, input: &[u8], output: &[u8]) {
    let image = guest.elf();
    succeeds_in_modes(&image, &["user", "kernel"], input, output);
    qemu(&image, input, output);
}

/// As `succeeds`, without QEMU and with some interrupt controllers.
fn succeeds_in_modes(image: &[u8], irqchips: &[&str], input: &[u8], output: &[u8]) {
    on_every_mode(|mode| {
        for &irqchip in irqchips {
            if irqchip == "kernel" {
                match mode.kernel_irqchip.map(|probe| probe()) {
                    Some(Ok(())) => {}
                    Some(Err(unavailable)) => {
                        eprintln!("skipped: mode {}: {unavailable}", mode.name);
                        continue;
                    }
                    None => continue,
                }
            }
            let call =
                Call::new(mode.name)
                    .image(image)
                    .args(&["--timeout", "10", "--irqchip", irqchip]);
            let ended = call.input(input).run();
            let label = format!("mode {}, irqchip {irqchip}: {ended:?}", mode.name);
            if ended.status.code() == Some(1) && ended.stderr.contains("code 77") {
                // Only KVM may lack what the pinned CPUID announces.
                assert_eq!(mode.engine, "kvm", "{label}");
                eprintln!("skipped: {label}");
                continue;
            }
            assert_eq!(ended.status.code(), Some(0), "{label}");
            assert_eq!(ended.stdout, output, "{label}");
        }
    });
}

/// Runs the image under QEMU's translator, where it is installed.
fn qemu(image: &[u8], input: &[u8], output: &[u8]) {
    let directory = tempfile::TempDir::new().unwrap();
    let (file, text) = (
        directory.path().join("image"),
        directory.path().join("input"),
    );
    std::fs::write(&file, image).unwrap();
    std::fs::write(&text, input).unwrap();
    let spawned = Command::new("qemu-system-x86_64")
        .args([
            "-accel", "tcg", "-cpu", "max", "-m", "16", "-display", "none",
        ])
        .args(["-nodefaults", "-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .arg("-kernel")
        .arg(&file)
        .stdin(std::fs::File::open(&text).unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(child) = spawned else {
        eprintln!("skipped: no QEMU");
        return;
    };
    let ended = support::finish(child, Instant::now());
    // isa-debug-exit ends with 2 * code + 1.
    match ended.status.code() {
        Some(code) if code == (2 * ABSENT + 1) as i32 => eprintln!("skipped: QEMU lacks it"),
        code => {
            assert_eq!(code, Some(1), "QEMU: {ended:?}");
            assert_eq!(ended.stdout, output, "QEMU: {ended:?}");
        }
    }
}

fn out(asm: &mut Asm, port: u32, value: u8) -> Built {
    asm.mov(dx, port)?;
    asm.mov(al, u32::from(value))?;
    asm.out(dx, al)
}

/// Lets the CPU take interrupts: an empty IDT, and all that counts zero. Handlers count in r12 and
/// may use rax and rdx.
fn prepare(asm: &mut Asm) -> Built {
    asm.xor(r12d, r12d)?;
    asm.mov(rax, IDT)?;
    asm.push(rax)?;
    asm.mov(rax, 0x0fff_0000_0000_0000u64)?;
    asm.push(rax)?;
    asm.lidt(ptr(rsp + 6))?;
    asm.add(rsp, 16)?;
    // The 8259s: vectors 0x20 and 0x28, everything masked.
    for (port, words) in [(0x20, [0x11, 0x20, 4, 1]), (0xa0, [0x11, 0x28, 2, 1])] {
        out(asm, port, words[0])?;
        for word in &words[1..] {
            out(asm, port + 1, *word)?;
        }
        out(asm, port + 1, 0xff)?;
    }
    Ok(())
}

/// Installs a handler of `vector` that counts, does `body` and returns.
fn handler(asm: &mut Asm, vector: u64, body: impl FnOnce(&mut Asm) -> Built) -> Built {
    let mut handler = asm.create_label();
    let mut after = asm.create_label();
    asm.jmp(after)?;
    asm.set_label(&mut handler)?;
    asm.push(rax)?;
    asm.push(rdx)?;
    asm.inc(r12)?;
    body(asm)?;
    asm.pop(rdx)?;
    asm.pop(rax)?;
    asm.iretq()?;
    asm.set_label(&mut after)?;
    asm.lea(rax, ptr(handler))?;
    asm.mov(rbx, IDT + vector * 16)?;
    asm.mov(word_ptr(rbx), ax)?;
    asm.mov(word_ptr(rbx + 2), 8)?;
    asm.mov(word_ptr(rbx + 4), 0x8e00)?;
    asm.shr(rax, 16)?;
    asm.mov(word_ptr(rbx + 6), ax)
}

/// Ends service at the 8259 that has `irq`, and at the master.
fn end_at_pic(asm: &mut Asm, irq: u8) -> Built {
    if irq >= 8 {
        out(asm, 0xa0, 0x20)?;
    }
    out(asm, 0x20, 0x20)
}

/// Lets `irq` through the 8259s.
fn unmask(asm: &mut Asm, irq: u8) -> Built {
    let mask = !(1u16 << irq) & if irq >= 8 { !4 } else { !0 };
    out(asm, 0x21, mask as u8)?;
    out(asm, 0xa1, (mask >> 8) as u8)
}

fn end_at_lapic(asm: &mut Asm) -> Built {
    asm.mov(rax, LAPIC)?;
    asm.mov(dword_ptr(rax + 0xb0), 0)
}

fn enable_lapic(asm: &mut Asm) -> Built {
    asm.mov(rbx, LAPIC)?;
    asm.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// Halts until `count` interrupts have come.
fn halt_until(asm: &mut Asm, count: i32) -> Built {
    let mut again = asm.create_label();
    let mut done = asm.create_label();
    asm.set_label(&mut again)?;
    asm.cli()?;
    asm.cmp(r12, count)?;
    asm.jae(done)?;
    asm.sti()?;
    asm.hlt()?;
    asm.jmp(again)?;
    asm.set_label(&mut done)?;
    asm.nop()
}

/// Time for an interrupt to arrive: `wrmsr` to an x2APIC register does not serialise (SDM 3A
/// 11.12.3).
fn settle(asm: &mut Asm) -> Built {
    let mut wait = asm.create_label();
    asm.mov(ecx, 1000)?;
    asm.set_label(&mut wait)?;
    asm.dec(ecx)?;
    asm.jne(wait)
}

/// Ends with `code` unless eax holds `expected`.
fn expect(asm: &mut Asm, expected: i32, code: u32) -> Built {
    let mut right = asm.create_label();
    asm.cmp(eax, expected)?;
    asm.je(right)?;
    end(asm, code)?;
    asm.set_label(&mut right)?;
    asm.nop()
}

/// Ends with [`ABSENT`] unless bit `bit` of CPUID.1:ECX is set.
fn need(asm: &mut Asm, bit: u32) -> Built {
    let mut present = asm.create_label();
    asm.mov(eax, 1)?;
    asm.cpuid()?;
    asm.bt(ecx, bit)?;
    asm.jc(present)?;
    end(asm, ABSENT)?;
    asm.set_label(&mut present)?;
    asm.nop()
}

/// Sets counter 0 to mode 2, some 1 kHz.
fn start_pit(asm: &mut Asm) -> Built {
    out(asm, 0x43, 0x34)?;
    out(asm, 0x40, 0xa9)?;
    out(asm, 0x40, 0x04)
}

#[test]
fn the_pit_ticks_through_the_8259s() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x20, |asm| end_at_pic(asm, 0))?;
        start_pit(asm)?;
        unmask(asm, 0)?;
        halt_until(asm, ENOUGH)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn the_pit_ticks_through_the_io_apic() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x40, end_at_lapic)?;
        enable_lapic(asm)?;
        asm.mov(rbx, IOAPIC)?;
        // Pin 2: fixed, edge, to APIC 0.
        asm.mov(dword_ptr(rbx), 0x15)?;
        asm.mov(dword_ptr(rbx + 0x10), 0)?;
        asm.mov(dword_ptr(rbx), 0x14)?;
        asm.mov(dword_ptr(rbx + 0x10), 0x40)?;
        start_pit(asm)?;
        halt_until(asm, ENOUGH)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn the_pit_interrupts_once_in_mode_0() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x20, |asm| end_at_pic(asm, 0))?;
        // Mode 0 first: its output is low until the count has run out.
        out(asm, 0x43, 0x30)?;
        unmask(asm, 0)?;
        out(asm, 0x40, 0xa9)?;
        out(asm, 0x40, 0x04)?;
        halt_until(asm, 1)?;
        // The count goes on, the interrupt does not come again.
        asm.sti()?;
        asm.mov(ecx, 20_000)?;
        let mut wait = asm.create_label();
        asm.set_label(&mut wait)?;
        asm.in_(al, 0x61)?;
        asm.dec(ecx)?;
        asm.jne(wait)?;
        asm.cli()?;
        asm.mov(eax, r12d)?;
        expect(asm, 1, 2)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn counter_2_times_what_the_pm_timer_times() {
    let guest = Guest::long(|asm| {
        // As kernels calibrate: gate high, speaker off, mode 0, 10 ms.
        asm.in_(al, 0x61)?;
        asm.and(al, 0xfc)?;
        asm.or(al, 1)?;
        asm.out(0x61, al)?;
        out(asm, 0x43, 0xb0)?;
        out(asm, 0x42, 0x9c)?;
        out(asm, 0x42, 0x2e)?;
        asm.mov(dx, 0x608)?;
        asm.in_(eax, dx)?;
        asm.mov(ebx, eax)?;
        let mut wait = asm.create_label();
        asm.set_label(&mut wait)?;
        asm.in_(al, 0x61)?;
        asm.test(al, 0x20)?;
        asm.je(wait)?;
        asm.in_(eax, dx)?;
        asm.sub(eax, ebx)?;
        asm.and(eax, 0x00ff_ffff)?;
        // 10 ms are 35,795 ticks; a busy host may be late, never early.
        let mut early = asm.create_label();
        let mut late = asm.create_label();
        asm.cmp(eax, 35_700)?;
        asm.jb(early)?;
        asm.cmp(eax, 3_579_545)?;
        asm.ja(late)?;
        end(asm, 0)?;
        asm.set_label(&mut early)?;
        end(asm, 2)?;
        asm.set_label(&mut late)?;
        end(asm, 3)
    });
    // QEMU's machine needs firmware to place the PM timer: ours only.
    let image = guest.elf();
    on_every_mode(|mode| {
        let call = Call::new(mode.name).image(&image);
        call.args(&["--timeout", "10"]).run().check(0, "");
    });
}

#[test]
fn the_clock_ticks_through_the_slave() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x28, |asm| {
            // Register C acknowledges.
            out(asm, 0x70, 0x0c)?;
            asm.in_(al, 0x71)?;
            end_at_pic(asm, 8)
        })?;
        out(asm, 0x70, 0x0a)?;
        out(asm, 0x71, 0x26)?;
        out(asm, 0x70, 0x0b)?;
        out(asm, 0x71, 0x42)?;
        out(asm, 0x70, 0x0c)?;
        asm.in_(al, 0x71)?;
        unmask(asm, 8)?;
        halt_until(asm, ENOUGH)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn the_local_apics_timer_ticks() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x50, end_at_lapic)?;
        enable_lapic(asm)?;
        asm.mov(dword_ptr(rbx + 0x3e0), 0b1011)?;
        asm.mov(dword_ptr(rbx + 0x320), 0x50 | 1 << 17)?;
        asm.mov(dword_ptr(rbx + 0x380), 1_000_000)?;
        halt_until(asm, ENOUGH)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn a_tsc_deadline_is_met_and_never_early() {
    const TSC_DEADLINE: u32 = lapic::TSC_DEADLINE;
    let guest = Guest::long(|asm| {
        need(asm, 24)?;
        prepare(asm)?;
        // The handler leaves its own time in r14.
        handler(asm, 0x51, |asm| {
            asm.rdtsc()?;
            asm.shl(rdx, 32)?;
            asm.lea(r14, ptr(rax + rdx))?;
            end_at_lapic(asm)
        })?;
        enable_lapic(asm)?;
        asm.mov(dword_ptr(rbx + 0x320), 0x51 | 2 << 17)?;
        asm.mfence()?;
        for shot in 1..=ENOUGH {
            // Some 1 to 5 ms on.
            asm.rdtsc()?;
            asm.shl(rdx, 32)?;
            asm.lea(r15, ptr(rax + rdx + shot * 2_000_000))?;
            asm.mov(rax, r15)?;
            asm.mov(rdx, r15)?;
            asm.shr(rdx, 32)?;
            asm.mov(ecx, TSC_DEADLINE)?;
            asm.wrmsr()?;
            halt_until(asm, shot)?;
            let mut right = asm.create_label();
            asm.cmp(r14, r15)?;
            asm.jae(right)?;
            end(asm, 2)?;
            asm.set_label(&mut right)?;
            asm.mov(ecx, TSC_DEADLINE)?;
            asm.rdmsr()?;
            asm.or(eax, edx)?;
            expect(asm, 0, 3)?;
        }
        // One that has passed comes at once.
        asm.mov(eax, 1)?;
        asm.xor(edx, edx)?;
        asm.wrmsr()?;
        halt_until(asm, ENOUGH + 1)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn a_tsc_deadline_that_has_passed_interrupts_after_the_wrmsr() {
    let guest = Guest::long(|asm| {
        need(asm, 24)?;
        prepare(asm)?;
        handler(asm, 0x51, end_at_lapic)?;
        enable_lapic(asm)?;
        asm.mov(dword_ptr(rbx + 0x320), 0x51 | 2 << 17)?;
        asm.mfence()?;
        asm.sti()?;
        for shot in 1..=ENOUGH {
            asm.mov(ecx, 0x10)?;
            asm.rdmsr()?;
            asm.mov(ecx, lapic::TSC_DEADLINE)?;
            asm.wrmsr()?;
            asm.nop()?;
            asm.mov(eax, r12d)?;
            expect(asm, shot, 2)?;
            asm.rdmsr()?;
            asm.or(eax, edx)?;
            expect(asm, 0, 3)?;
        }
        end(asm, 0)
    });
    // Elsewhere it comes when the host's timers are looked at.
    succeeds_in_modes(&guest.elf(), &["user"], b"", b"");
}

#[test]
fn x2apic_sends_to_itself() {
    let guest = Guest::long(|asm| {
        need(asm, 21)?;
        prepare(asm)?;
        handler(asm, 0x52, |asm| {
            asm.push(rcx)?;
            asm.mov(ecx, 0x80b)?;
            asm.xor(eax, eax)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()?;
            asm.pop(rcx)
        })?;
        let write = |asm: &mut Asm, index: u32, value: u32| {
            asm.mov(ecx, index)?;
            asm.mov(eax, value)?;
            asm.xor(edx, edx)?;
            asm.wrmsr()
        };
        asm.mov(ecx, lapic::APIC_BASE)?;
        asm.rdmsr()?;
        asm.or(eax, 0xc00)?;
        asm.wrmsr()?;
        write(asm, 0x80f, 0x1ff)?;
        // Id and version.
        asm.mov(ecx, 0x802)?;
        asm.rdmsr()?;
        expect(asm, 0, 2)?;
        asm.mov(ecx, 0x803)?;
        asm.rdmsr()?;
        asm.and(eax, 0xff)?;
        expect(asm, 0x14, 3)?;
        asm.sti()?;
        for (count, (index, value)) in [(0x83f, 0x52), (0x830, 0x52 | 1 << 18), (0x830, 0x52)]
            .into_iter()
            .enumerate()
        {
            write(asm, index, value)?;
            settle(asm)?;
            asm.mov(eax, r12d)?;
            expect(asm, count as i32 + 1, 4 + count as u32)?;
        }
        // Held back by the task priority until that falls.
        asm.cli()?;
        write(asm, 0x808, 0x60)?;
        write(asm, 0x83f, 0x52)?;
        asm.sti()?;
        settle(asm)?;
        asm.mov(eax, r12d)?;
        expect(asm, 3, 8)?;
        write(asm, 0x808, 0)?;
        settle(asm)?;
        asm.mov(eax, r12d)?;
        expect(asm, 4, 9)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"");
}

#[test]
fn the_uart_interrupts_when_it_can_send() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x24, |asm| {
            // The identification must say so: transmitter empty.
            let mut right = asm.create_label();
            asm.mov(dx, 0x3fa)?;
            asm.in_(al, dx)?;
            asm.and(al, 0xf)?;
            asm.cmp(al, 2)?;
            asm.je(right)?;
            end(asm, 2)?;
            asm.set_label(&mut right)?;
            // The next byte, which interrupts again; none after the last.
            let mut done = asm.create_label();
            asm.cmp(r12d, ENOUGH)?;
            asm.jae(done)?;
            asm.mov(dx, 0x3f8)?;
            asm.lea(eax, ptr(r12 + 0x30))?;
            asm.out(dx, al)?;
            asm.set_label(&mut done)?;
            end_at_pic(asm, 4)
        })?;
        out(asm, 0x3fc, 0x0b)?;
        unmask(asm, 4)?;
        out(asm, 0x3f9, 2)?;
        halt_until(asm, ENOUGH)?;
        end(asm, 0)
    });
    succeeds(&guest, b"", b"1234");
}

#[test]
fn input_wakes_a_halted_guest() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x24, |asm| {
            asm.mov(dx, 0x3fa)?;
            asm.in_(al, dx)?;
            let mut again = asm.create_label();
            let mut empty = asm.create_label();
            asm.set_label(&mut again)?;
            asm.mov(dx, 0x3fd)?;
            asm.in_(al, dx)?;
            asm.test(al, 1)?;
            asm.je(empty)?;
            asm.mov(dx, 0x3f8)?;
            asm.in_(al, dx)?;
            asm.out(dx, al)?;
            asm.mov(r13b, al)?;
            asm.jmp(again)?;
            asm.set_label(&mut empty)?;
            end_at_pic(asm, 4)
        })?;
        out(asm, 0x3fc, 0x0b)?;
        unmask(asm, 4)?;
        asm.xor(r13d, r13d)?;
        out(asm, 0x3f9, 1)?;
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.sti()?;
        asm.hlt()?;
        asm.cli()?;
        asm.cmp(r13b, i32::from(b'.'))?;
        asm.jne(again)?;
        end(asm, 0)
    });
    let mut text: Vec<u8> = (0..300u32)
        .flat_map(|n| n.to_string().into_bytes())
        .collect();
    text.push(b'.');
    succeeds(&guest, &text, &text);
}

#[test]
fn a_halted_guest_that_waits_for_input_burns_no_processor() {
    let guest = Guest::long(|asm| {
        prepare(asm)?;
        handler(asm, 0x24, |asm| end_at_pic(asm, 4))?;
        out(asm, 0x3fc, 0x0b)?;
        unmask(asm, 4)?;
        out(asm, 0x3f9, 1)?;
        asm.sti()?;
        asm.hlt()?;
        end(asm, 0)
    });
    let image = guest.elf();
    on_every_mode(|mode| {
        let mut call = Call::new(mode.name).image(&image).args(&["--timeout", "1"]);
        let started = Instant::now();
        let mut child = call.start();
        let input = child.stdin.take();
        std::thread::sleep(Duration::from_millis(700));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        // User and system time, fields 14 and 15 (proc_pid_stat(5)), in ticks of 10 ms.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        assert!(ticks < 35, "mode {}: {ticks} of 70 ticks", mode.name);
        let ended = support::finish(child, started);
        assert!(started.elapsed() < PATIENCE);
        ended.check(5, "time limit");
        drop(input);
    });
}

#[test]
fn every_reset_line_ends_the_run() {
    // The keyboard controller's, control port A's, the chipset's.
    for (port, values) in [(0x64, &[0xfe][..]), (0x92, &[2, 3]), (0xcf9, &[2, 6])] {
        let guest = Guest::long(|asm| {
            for &value in values {
                out(asm, port, value)?;
            }
            end(asm, 0)
        });
        let image = guest.elf();
        on_every_mode(|mode| {
            let call = Call::new(mode.name).image(&image);
            call.run().check(1, "the guest reset the machine");
        });
    }
}

#[test]
fn the_debug_console_goes_to_its_file() {
    let guest = Guest::long(|asm| {
        for &byte in b"seen" {
            asm.mov(al, u32::from(byte))?;
            asm.out(0xe9, al)?;
        }
        asm.in_(al, 0xe9)?;
        asm.movzx(eax, al)?;
        expect(asm, 0xe9, 2)?;
        end(asm, 0)
    });
    let image = guest.elf();
    on_every_mode(|mode| {
        let call = Call::new(mode.name).image(&image);
        let directory = tempfile::TempDir::new().unwrap();
        let kept = directory.path().join("debug");
        let call = call.args(&["--debug-console", kept.to_str().unwrap()]);
        call.run().check(0, "");
        assert_eq!(std::fs::read(kept).unwrap(), b"seen");
    });
}

#[test]
fn the_kernels_controllers_are_refused_where_there_are_none() {
    let image = Guest::long(|asm| end(asm, 0)).elf();
    let call = Call::new("full").image(&image);
    call.args(&["--irqchip", "kernel"])
        .run()
        .check(2, "no interrupt controllers in the kernel");
}
