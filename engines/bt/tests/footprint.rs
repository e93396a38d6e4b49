//! The code cache is bounded with all that is known of the code in it.
//!
//! Read from proc_pid_smaps(5) of this very process, which is why nothing else is tested here.

use std::{fs, sync::Arc};

use bt::{BtVcpu, Options};
use engine_core::{CpuState, DescriptorTable, ExitReason, GuestRam, Segment, Vcpu};
use vm_memory::{Bytes, GuestAddress};

const SIZE: usize = 4 << 20;
/// What the host is asked for at once, by the code and by each list of what is known of it.
const ROUNDING: usize = 8 * (64 << 10);
const TABLES: u64 = 1 << 20;
const CODE: u64 = 4 << 20;
/// Code that takes several times the cache's size: a load and a store that share nothing, arithmetic, a branch.
const LINE: &[u8] = b"\x48\x8b\x47\x10\x48\x89\x56\x20\x48\x01\xc8\x75\x00";
const LINES: usize = 100_000;

fn memory() -> Arc<GuestRam> {
    let ram = engine_core::memory::create(16).expect("guest memory");
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).expect("in memory");
    put(TABLES, TABLES + 0x1000 + 3);
    put(TABLES + 0x1000, TABLES + 0x2000 + 3);
    for page in 0..8 {
        put(TABLES + 0x2000 + 8 * page, (page << 21) + 0x83);
    }
    ram.write_slice(&LINE.repeat(LINES), GuestAddress(CODE))
        .expect("in memory");
    ram
}

fn entry() -> CpuState {
    let segment = |selector, attributes| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    };
    let mut state = CpuState {
        rip: CODE,
        rflags: 2,
        segments: [segment(0x10, 0xc093); 6],
        ldtr: segment(0, 0x82),
        tr: segment(0x18, 0x8b),
        gdtr: DescriptorTable::default(),
        idtr: DescriptorTable::default(),
        cr0: 0x8001_0033,
        cr3: TABLES,
        cr4: 0x620,
        efer: 0x500,
        ..CpuState::default()
    };
    state.segments[CpuState::CS] = segment(0x08, 0xa09b);
    state
}

/// Resident bytes of code, where it is written, and of what is known of it.
fn resident() -> [usize; 2] {
    let maps = fs::read_to_string("/proc/self/smaps").expect("procfs");
    let mut sums = [0; 2];
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
        } else if line.split(' ').next().is_some_and(|at| at.contains('-')) {
            which = None;
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
    let mut vcpu = BtVcpu::new(memory(), options).expect("a vCPU");
    vcpu.set_state(&entry()).expect("a state");
    let blocks = vcpu
        .translate_ahead(CODE + (LINE.len() * LINES) as u64)
        .expect("code");
    let flushes = vcpu.counts().get(ExitReason::CacheFlush);
    let [code, known] = resident();
    println!("{blocks} blocks, {code} bytes of code, {known} of what is known");
    assert!(flushes > 1, "all of it had room");
    assert!(code > SIZE / 4 && known > SIZE / 8);
    assert!(code + known <= SIZE + ROUNDING, "{code} + {known} bytes");
}
