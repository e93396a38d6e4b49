//! Interrupts of a PC's devices, as guests use them: the same small guests in every mode of unaware
//! guests, with the VMM's interrupt controllers and with the kernel's, and under QEMU.

mod support;

use std::time::{Duration, Instant};

use engine_core::testing::{Guest, end};
use iced_x86::code_asm::*;
use support::everywhere::succeeds;
use support::interrupts::*;
use support::{Call, PATIENCE, on_every_mode};

const IOAPIC: u64 = 0xfec0_0000;

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
        expect_count(asm, 1, 2)?;
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
        // Before the counter starts, or a host that is away in between would have it end too soon.
        asm.mov(dx, 0x608)?;
        asm.in_(eax, dx)?;
        asm.mov(ebx, eax)?;
        out(asm, 0x42, 0x9c)?;
        out(asm, 0x42, 0x2e)?;
        asm.mov(dx, 0x608)?;
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
