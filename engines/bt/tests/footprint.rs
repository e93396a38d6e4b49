//! The code cache is bounded with all that is known of the code in it.
//!
//! Read from proc_pid_smaps(5) of this very process, which is why nothing else is tested here.

use std::{fs, sync::Arc};

use bt::{BtVcpu, Options};
use engine_core::testing::Guest;
use engine_core::{Exit, ExitReason, Vcpu};
use iced_x86::code_asm::*;

const SIZE: usize = 4 << 20;
/// What the host is asked for at once, by the code and by each list of what is known of it.
const ROUNDING: usize = 8 * (64 << 10);
/// What else a VMM may come to need by running code.
const REST: usize = 2 << 20;
const CODE: u64 = 4 << 20;
/// Code that takes several times the cache's size: a load and a store that share nothing, arithmetic, a branch.
const LINE: &[u8] = b"\x48\x8b\x47\x10\x48\x89\x56\x20\x48\x01\xc8\x75\x00";
const LINES: usize = 100_000;
const HLT: u8 = 0xf4;

/// Enters the lines, which end with a hlt.
fn guest() -> Guest {
    let mut guest = Guest::long(|asm| {
        asm.mov(edi, 0x30_0000)?;
        asm.mov(esi, 0x30_1000)?;
        asm.mov(eax, CODE as u32)?;
        asm.jmp(rax)
    });
    let mut code = LINE.repeat(LINES);
    code.push(HLT);
    let bytes = code.len() as u64;
    guest.segments.push((CODE, code, bytes));
    guest
}

/// Resident bytes of code, where it is written, of what is known of it, and of all else but guest memory.
fn resident() -> [usize; 3] {
    let maps = fs::read_to_string("/proc/self/smaps").expect("procfs");
    let mut sums = [0; 3];
    let mut which = None;
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Rss:") {
            if let Some(which) = which {
                let size: usize = size.trim().trim_end_matches(" kB").parse().expect("a size");
                sums[which] += size << 10;
            }
        } else if line.contains("trapline-code-records") {
            which = Some(1);
        } else if line.contains("trapline-code") {
            // Its pages are mapped once more where they are executed.
            which = line.contains("rw-s").then_some(0);
        } else if line.contains("trapline-guest-ram") {
            which = None;
        } else if line.split(' ').next().is_some_and(|at| at.contains('-')) {
            which = Some(2);
        }
    }
    sums
}

#[test]
fn a_code_cache_is_bounded_with_what_is_known_of_its_code() {
    let options = Options {
        code_cache: SIZE,
        ..Options::default()
    };
    let ram = engine_core::memory::create(16).expect("guest memory");
    let entry = engine_core::loader::load(&ram, &guest().elf(), "").expect("it loads");
    let mut vcpu = BtVcpu::new(Arc::clone(&ram), options).expect("a vCPU");
    vcpu.set_state(&entry).expect("a state");
    let [.., before] = resident();
    let exit = vcpu.run().expect("it runs");
    assert!(matches!(exit, Exit::Hlt), "{exit:?}");
    let flushes = vcpu.counts().get(ExitReason::CacheFlush);
    let links = vcpu.counts().get(ExitReason::Chain);
    let [code, known, rest] = resident();
    let rest = rest.saturating_sub(before);
    println!("{flushes} flushes, {links} links; bytes: code {code}, known {known}, else {rest}");
    assert!(flushes > 1, "all of it had room");
    assert!(links > LINES as u64 / 2);
    assert!(code > SIZE / 4 && known > SIZE / 8);
    assert!(code + known <= SIZE + ROUNDING, "{code} + {known} bytes");
    assert!(rest <= REST, "{rest} bytes more");
}
