//! `translate`: how fast a translator gets through code that it has never seen.
//!
//! The code is what compilers make most of: moves, arithmetic, loads, stores, calls, and a branch
//! every five instructions or so. Each instruction runs once, in ring 0 and long mode, so the time is
//! the translation's and that of the way between the blocks; criterion's elements are guest
//! instructions. Every iteration has a vCPU of its own, whose code cache is empty; making it and
//! laying out memory are not timed.
//!
//! Invariant: an iteration counts only if the guest came to its end with the sum that the code
//! computes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use engine_core::{CpuState, DescriptorTable, Exit, GuestRam, Segment, Vcpu};
use engines::{Runs, Setup};
use vm_memory::{Bytes, GuestAddress};

/// Guest memory in MiB; all of it is mapped as itself.
const MEMORY_MIB: u64 = 16;
/// Where the code is.
const CODE: u64 = 8 << 20;
/// What the code loads and stores: one page.
const DATA: u64 = 2 << 20;
const STACK: u64 = 3 << 20;
const TABLES: u64 = 1 << 20;
/// Rounds of [`LINES`].
const ROUNDS: usize = 4000;

/// Instructions in the order in which they stand, one line each. rdi holds [`DATA`], rcx 1.
const LINES: &[&[u8]] = &[
    &[0x48, 0x8b, 0x47, 0x10],          // mov rax, [rdi + 16]
    &[0x48, 0x01, 0xc8],                // add rax, rcx
    &[0x48, 0x89, 0x47, 0x10],          // mov [rdi + 16], rax
    &[0x48, 0x8d, 0x54, 0x88, 0x08],    // lea rdx, [rax + rcx * 4 + 8]
    &[0x48, 0x39, 0xd0],                // cmp rax, rdx
    &[0x74, 0x00],                      // je to the next, not taken
    &[0x31, 0xf6],                      // xor esi, esi
    &[0x0f, 0xb6, 0x5f, 0x20],          // movzx ebx, byte [rdi + 32]
    &[0x48, 0xc1, 0xe2, 0x03],          // shl rdx, 3
    &[0x89, 0x5f, 0x24],                // mov [rdi + 36], ebx
    &[0x85, 0xf6],                      // test esi, esi
    &[0x74, 0x00],                      // je to the next, taken
    &[0x53],                            // push rbx
    &[0x4c, 0x8b, 0x04, 0xcf],          // mov r8, [rdi + rcx * 8]
    &[0x4d, 0x89, 0xc1],                // mov r9, r8
    &[0x49, 0x83, 0xe1, 0x0f],          // and r9, 15
    &[0x5b],                            // pop rbx
    &[0xe8, 0x00, 0x00, 0x00, 0x00],    // call the next
    &[0x48, 0x83, 0xc4, 0x08],          // add rsp, 8
    &[0x4d, 0x0f, 0xaf, 0xc1],          // imul r8, r9
    &[0xc7, 0x47, 0x40, 0x07, 0, 0, 0], // mov dword [rdi + 64], 7
    &[0x48, 0x63, 0xdb],                // movsxd rbx, ebx
    &[0xeb, 0x00],                      // jmp to the next
    &[0x0f, 0x10, 0x47, 0x50],          // movups xmm0, [rdi + 80]
    &[0x0f, 0x11, 0x47, 0x60],          // movups [rdi + 96], xmm0
];

/// Benchmarks `mode`'s translator.
pub(crate) fn bench(criterion: &mut Criterion, mode: &str) {
    let Some(Runs::Vcpu(boot)) = engines::find(mode).map(|mode| mode.runs) else {
        return;
    };
    let mut group = criterion.benchmark_group("translator");
    group.throughput(Throughput::Elements((LINES.len() * ROUNDS) as u64));
    group.bench_function("translate", |bencher| {
        bencher.iter_custom(|iterations| {
            (0..iterations)
                .map(|_| {
                    let ram = memory();
                    let mut vcpus = boot(Arc::clone(&ram), Setup::default()).expect("a vCPU");
                    once(&mut *vcpus[0], &ram)
                })
                .sum()
        });
    });
    group.finish();
}

/// Guest memory with page tables and code.
fn memory() -> Arc<GuestRam> {
    /// Present and writable; in a directory, a page of 2 MiB.
    const TABLE: u64 = 3;
    const LARGE: u64 = 0x83;
    let ram = engine_core::memory::create(MEMORY_MIB).expect("guest memory");
    let put = |at: u64, value: u64| {
        ram.write_obj(value, GuestAddress(at)).expect("in memory");
    };
    put(TABLES, TABLES + 0x1000 + TABLE);
    put(TABLES + 0x1000, TABLES + 0x2000 + TABLE);
    for page in 0..MEMORY_MIB / 2 {
        put(TABLES + 0x2000 + 8 * page, (page << 21) + LARGE);
    }
    let mut code: Vec<u8> = LINES.concat().repeat(ROUNDS);
    code.push(0xf4); // hlt
    ram.write_slice(&code, GuestAddress(CODE))
        .expect("in memory");
    ram
}

fn once(vcpu: &mut dyn Vcpu, ram: &GuestRam) -> Duration {
    vcpu.set_state(&entry()).expect("a state");
    let started = Instant::now();
    let exit = vcpu.run().expect("it runs");
    let elapsed = started.elapsed();
    assert!(matches!(exit, Exit::Hlt), "{exit:?}");
    let sum: u64 = ram.read_obj(GuestAddress(DATA + 16)).expect("in memory");
    assert_eq!(sum, ROUNDS as u64);
    elapsed
}

/// Long mode, ring 0, interrupts off.
fn entry() -> CpuState {
    let segment = |selector, attributes| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    };
    let data = segment(0x10, 0xc093);
    let mut state = CpuState {
        rip: CODE,
        rflags: 2,
        segments: [data; 6],
        ldtr: segment(0, 0x82),
        tr: segment(0x18, 0x8b),
        gdtr: DescriptorTable::default(),
        idtr: DescriptorTable::default(),
        // PE, MP, ET, NE, WP, PG.
        cr0: 0x8001_0033,
        cr3: TABLES,
        // PAE, OSFXSR, OSXMMEXCPT.
        cr4: 0x620,
        // LME, LMA.
        efer: 0x500,
        ..CpuState::default()
    };
    state.segments[CpuState::CS] = segment(0x08, 0xa09b);
    state.gpr[1] = 1;
    state.gpr[4] = STACK;
    state.gpr[7] = DATA;
    state
}
