//! Guests that misbehave: each ends `trapline` with the status that says so and one clear line,
//! never a panic, a hang or a signal. One body for every mode that this host can run.

mod support;

use std::io::Read;
use std::time::{Duration, Instant};

use engine_core::testing::{Guest, MAPPED, STACK, end, selector};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::{Call, Ended, finish, on_every_mode, wait};

/// Time limit of a guest that is to end by itself: only a defect reaches it.
const LONG: &str = "20";
const COM1: u32 = 0x3f8;

/// Runs a guest in every mode and hands the end to `check`.
fn run(guest: &Guest, args: &[&str], check: impl Fn(&Ended)) {
    let image = guest.elf();
    on_every_mode(|mode| check(&Call::new(mode.name).image(&image).args(args).run()));
}

/// Ends with 0 if eax holds `expected`, with `code` if not.
fn expect(asm: &mut CodeAssembler, expected: u32, code: u32) -> Result<(), IcedError> {
    let mut right = asm.create_label();
    asm.cmp(eax, expected as i32)?;
    asm.je(right)?;
    end(asm, code)?;
    asm.set_label(&mut right)
}

/// Enters ring 3 at the code that follows.
fn enter_user(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut user = asm.create_label();
    asm.push(i32::from(selector::USER_DATA))?;
    asm.push(STACK as i32 - 0x1000)?;
    asm.push(2)?;
    asm.push(i32::from(selector::USER_CODE))?;
    asm.lea(rax, ptr(user))?;
    asm.push(rax)?;
    asm.iretq()?;
    asm.set_label(&mut user)?;
    // Takes the label, so that what follows may have its own.
    asm.nop()
}

#[test]
fn success_and_failure_are_passed_on() {
    for make in [Guest::protected, Guest::long] as [fn(fn(&mut CodeAssembler) -> _) -> Guest; 2] {
        run(&make(|asm| end(asm, 0)), &["--timeout", LONG], |ended| {
            ended.check(0, "");
        });
        run(&make(|asm| end(asm, 7)), &["--timeout", LONG], |ended| {
            ended.check(1, "the guest failed with code 7");
        });
    }
}

#[test]
fn a_triple_fault_shows_the_processor_state() {
    // No IDT: the fault can't be delivered, nor can the double fault.
    let guest = Guest::protected(|asm| {
        asm.mov(eax, 0x1234_5678)?;
        asm.ud2()
    });
    run(&guest, &["--timeout", LONG], |ended| {
        ended.check(4, "the guest crashed: triple fault at rip 0x100005");
        for text in [
            "rax=0000000012345678",
            "rip=0000000000100005",
            "cs  =0008",
            "cr0=00000011",
        ] {
            assert!(
                ended.stderr.contains(text),
                "no '{text}' in {}",
                ended.stderr
            );
        }
    });
}

/// Mapped by nobody, in each part of the address space.
const WILD: [u64; 4] = [
    MAPPED + 5,
    0x7fff_ffff_f000,
    u64::MAX - 7,
    0x8000_0000_0000_0000,
];

#[test]
fn wild_pointers_in_ring_0_crash_the_guest_alone() {
    for address in WILD {
        let read = Guest::long(|asm| {
            asm.mov(rbx, address)?;
            asm.mov(rax, qword_ptr(rbx))
        });
        let write = Guest::long(|asm| {
            asm.mov(rbx, address)?;
            asm.mov(qword_ptr(rbx), rax)
        });
        let call = Guest::long(|asm| {
            asm.mov(rbx, address)?;
            asm.call(rbx)
        });
        for guest in [read, write, call] {
            run(&guest, &["--timeout", LONG], |ended| {
                ended.check(4, "the guest crashed: triple fault at rip 0x");
                let register = format!("rbx={address:016x}");
                assert!(ended.stderr.contains(&register), "{}", ended.stderr);
            });
        }
    }
}

#[test]
fn wild_pointers_in_ring_3_crash_the_guest_alone() {
    for address in WILD {
        let guest = Guest::long(|asm| {
            enter_user(asm)?;
            asm.mov(rbx, address)?;
            asm.mov(rax, qword_ptr(rbx))
        });
        run(&guest, &["--timeout", LONG], |ended| {
            ended.check(4, "the guest crashed: triple fault");
            let register = format!("rbx={address:016x}");
            assert!(ended.stderr.contains(&register), "{}", ended.stderr);
        });
    }
}

#[test]
fn running_into_unbacked_memory_ends_the_guest() {
    let guest = Guest::long(|asm| {
        asm.mov(rbx, 0x3000_0000u64)?;
        asm.jmp(rbx)
    });
    run(&guest, &["--timeout", LONG], |ended| {
        ended.check(4, "0x30000000");
    });
}

#[test]
fn a_guest_that_spins_for_ever_meets_its_time_limit() {
    let spin = |asm: &mut CodeAssembler| {
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.jmp(again)
    };
    let user = Guest::long(|asm| {
        enter_user(asm)?;
        spin(asm)
    });
    for guest in [Guest::protected(spin), Guest::long(spin), user] {
        run(&guest, &["--timeout", "0.5"], |ended| {
            ended.check(5, "time limit reached (0.5 s) at rip 0x");
            assert!(ended.elapsed >= Duration::from_millis(500), "{ended:?}");
            assert!(ended.elapsed < Duration::from_secs(5), "{ended:?}");
        });
    }
}

#[test]
fn a_guest_that_exits_for_ever_meets_its_exit_limit() {
    let guest = Guest::protected(|asm| {
        let mut again = asm.create_label();
        asm.set_label(&mut again)?;
        asm.out(0x80, al)?;
        asm.jmp(again)
    });
    run(
        &guest,
        &["--max-exits", "1000", "--timeout", LONG],
        |ended| {
            ended.check(5, "exit limit reached (1000)");
        },
    );
}

/// Prints as fast as it can, for ever.
fn flood() -> Guest {
    Guest::protected(|asm| {
        let mut again = asm.create_label();
        asm.mov(dx, COM1)?;
        asm.set_label(&mut again)?;
        asm.mov(al, u32::from(b'x'))?;
        for _ in 0..31 {
            asm.out(dx, al)?;
        }
        asm.mov(al, u32::from(b'\n'))?;
        asm.out(dx, al)?;
        asm.jmp(again)
    })
}

#[test]
fn a_console_flood_is_read_until_the_time_limit() {
    run(&flood(), &["--timeout", "0.5"], |ended| {
        ended.check(5, "time limit reached");
        assert!(ended.stdout.len() > 4096, "{} bytes", ended.stdout.len());
        assert!(
            ended
                .stdout
                .starts_with(b"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n")
        );
    });
}

#[test]
fn a_console_flood_that_nobody_reads_meets_the_time_limit() {
    on_every_mode(|mode| {
        let started = Instant::now();
        let mut call = Call::new(mode.name)
            .image(&flood().elf())
            .args(&["--timeout", "1"]);
        let mut child = call.start();
        // Held open, never read.
        let stdout = child.stdout.take();
        let ended = finish(child, started);
        ended.check(5, "time limit reached");
        assert!(ended.elapsed < Duration::from_secs(6), "{ended:?}");
        drop(stdout);
    });
}

#[test]
fn a_console_whose_reader_leaves_ends_the_guest() {
    on_every_mode(|mode| {
        let started = Instant::now();
        let mut call = Call::new(mode.name)
            .image(&flood().elf())
            .args(&["--timeout", LONG]);
        let mut child = call.start();
        let mut some = [0; 64];
        child.stdout.take().unwrap().read_exact(&mut some).unwrap();
        finish(child, started).check(128 + libc::SIGPIPE, "ended by signal 13");
    });
}

#[test]
fn unknown_ports_read_as_ones_and_take_writes() {
    let guest = Guest::protected(|asm| {
        for port in [0x0u32, 0x2f1, 0x3f0, 0x400, 0x500, 0xffff] {
            asm.mov(dx, port)?;
            asm.xor(eax, eax)?;
            asm.out(dx, eax)?;
            asm.in_(eax, dx)?;
            expect(asm, u32::MAX, 2)?;
            asm.xor(eax, eax)?;
            asm.out(dx, al)?;
            asm.in_(al, dx)?;
            expect(asm, 0xff, 3)?;
        }
        end(asm, 0)
    });
    run(&guest, &["--timeout", LONG], |ended| {
        ended.check(0, "");
    });
}

#[test]
fn string_port_access_moves_every_item() {
    const BUFFER: u32 = 0x18_0000;
    let guest = Guest::protected(|asm| {
        asm.cld()?;
        // Text to the console, byte by byte.
        asm.mov(edi, BUFFER)?;
        for chunk in b"strings\n".chunks(4) {
            let word = u32::from_le_bytes(chunk.try_into().unwrap());
            asm.mov(eax, word)?;
            asm.stosd()?;
        }
        asm.mov(esi, BUFFER)?;
        asm.mov(ecx, 8)?;
        asm.mov(dx, COM1)?;
        asm.rep().outsb()?;
        // Ones from nowhere.
        asm.mov(edi, BUFFER)?;
        asm.mov(ecx, 5)?;
        asm.mov(dx, 0x500)?;
        asm.rep().insw()?;
        asm.mov(eax, dword_ptr(BUFFER + 6))?;
        expect(asm, u32::MAX, 2)?;
        end(asm, 0)
    });
    run(&guest, &["--timeout", LONG], |ended| {
        ended.check(0, "");
        assert_eq!(ended.stdout, b"strings\n");
    });
}

#[test]
fn unmapped_physical_addresses_read_as_ones_and_take_writes() {
    let guest = Guest::long(|asm| {
        // Above RAM, in the device hole, and where no register of the local APIC is.
        for address in [0x3000_0000u64, 0xd000_0000, 0xfed8_0000] {
            asm.mov(rbx, address)?;
            asm.mov(dword_ptr(rbx), 0)?;
            asm.mov(eax, dword_ptr(rbx))?;
            expect(asm, u32::MAX, 2)?;
            asm.xor(eax, eax)?;
            asm.mov(al, byte_ptr(rbx + 3))?;
            expect(asm, 0xff, 3)?;
        }
        end(asm, 0)
    });
    run(&guest, &["--timeout", LONG], |ended| {
        ended.check(0, "");
    });
}

#[test]
fn a_halt_that_nothing_can_end_is_a_crash() {
    let disabled = Guest::protected(|asm| {
        asm.cli()?;
        asm.hlt()
    });
    run(&disabled, &["--timeout", LONG], |ended| {
        ended.check(4, "halted with interrupts disabled");
        assert!(ended.elapsed < Duration::from_secs(10), "{ended:?}");
    });
    let enabled = Guest::protected(|asm| {
        asm.sti()?;
        asm.hlt()
    });
    run(&enabled, &["--timeout", LONG], |ended| {
        ended.check(4, "halted with no interrupt source armed");
    });
}

#[test]
fn a_guest_that_waits_for_input_after_its_end_is_given_up() {
    let guest = Guest::protected(|asm| {
        let mut again = asm.create_label();
        asm.mov(dx, COM1 + 5)?;
        asm.set_label(&mut again)?;
        asm.in_(al, dx)?;
        asm.test(al, 1)?;
        asm.je(again)?;
        end(asm, 1)
    });
    run(&guest, &["--timeout", LONG], |ended| {
        ended.check(5, "the guest waits for console input, which has ended");
    });
}

#[test]
fn random_code_never_hurts_the_vmm() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..24 {
        let code: Vec<u8> = (0..512)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        let limits = ["--timeout", "0.3", "--max-exits", "10000"];
        run(&Guest::from_code(&code), &limits, |ended| {
            assert!(
                matches!(ended.status.code(), Some(0 | 1 | 4 | 5)),
                "{seed:#x}: {ended:?}"
            );
            assert!(!ended.stderr.contains("panicked"), "{seed:#x}: {ended:?}");
        });
    }
}

#[test]
fn host_signals_end_the_guest_with_their_status() {
    let guest = Guest::protected(|asm| {
        let mut again = asm.create_label();
        asm.mov(dx, COM1)?;
        asm.mov(al, u32::from(b'!'))?;
        asm.out(dx, al)?;
        asm.set_label(&mut again)?;
        asm.jmp(again)
    });
    for signal in [libc::SIGINT, libc::SIGTERM] {
        on_every_mode(|mode| {
            let started = Instant::now();
            let mut call = Call::new(mode.name)
                .image(&guest.elf())
                .args(&["--timeout", LONG]);
            let mut child = call.start();
            // The guest runs once it has spoken.
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            // SAFETY: kill takes plain numbers; the child has not been waited for, so the id is its.
            unsafe { libc::kill(child.id() as i32, signal) };
            let text = format!("ended by signal {signal}");
            finish(child, started).check(128 + signal, &text);
        });
    }
}

#[test]
fn a_killed_vmm_leaves_nothing_running() {
    on_every_mode(|mode| {
        let started = Instant::now();
        let mut call = Call::new(mode.name)
            .image(&flood().elf())
            .args(&["--timeout", LONG]);
        let mut child = call.start();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 64]).unwrap();
        child.kill().unwrap();
        wait(&mut child, started);
        // The pipe ends only when its last writer is gone.
        stdout.read_to_end(&mut Vec::new()).unwrap();
    });
}
