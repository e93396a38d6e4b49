//! What must hold whatever a guest does: the VMM's memory is out of its reach, loops run
//! translated, and a small code cache changes nothing but the speed.

use bt::Options;
use engine_core::{Exit, ExitReason, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{Kernel, RESULTS, Steps, page};
use crate::run::{boot, run, run_with};

#[test]
fn a_hot_loop_stays_in_translated_code() {
    const ROUNDS: i32 = 10_000_000;
    let guest = Kernel::new().guest(|asm| {
        let mut head = asm.create_label();
        asm.xor(eax, eax)?;
        asm.mov(ecx, ROUNDS)?;
        asm.set_label(&mut head)?;
        asm.lea(rax, ptr(rax + rax * 2 + 1))?;
        asm.xor(rax, rcx)?;
        asm.dec(ecx)?;
        asm.jne(head)?;
        asm.mov(qword_ptr(RESULTS), rax)?;
        asm.mov(edx, 0xf4)?;
        asm.xor(eax, eax)?;
        asm.out(dx, al)
    });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    while let Exit::PioOut { port, .. } = vcpu.run().expect("it runs")
        && port != 0xf4
    {}
    let mut expected = 0u64;
    for left in (1..=ROUNDS as u64).rev() {
        expected = expected.wrapping_mul(3).wrapping_add(1) ^ left;
    }
    let mut found = [0; 8];
    vm_memory::Bytes::read_slice(&*ram, &mut found, vm_memory::GuestAddress(RESULTS))
        .expect("guest memory");
    assert_eq!(u64::from_le_bytes(found), expected);
    assert!(vcpu.entries() < 100, "{} entries", vcpu.entries());
}

/// Guest addresses worth trying: every power of two, its neighbours, and where this process has
/// its own memory.
fn wild_addresses() -> Vec<u64> {
    let mut addresses = vec![0, u64::MAX, u64::MAX - 7];
    for bit in 30..64 {
        let address = 1u64 << bit;
        addresses.extend([address - 8, address, address + 0x123, !address]);
    }
    addresses.extend((0..64).map(|index| 0xffff_8000_0000_0000u64 + index * 0x123_4567_8000));
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    for line in maps.lines() {
        let range = line.split(' ').next().expect("a range");
        let (start, end) = range.split_once('-').expect("two ends");
        for text in [start, end] {
            let address = u64::from_str_radix(text, 16).expect("hexadecimal");
            addresses.extend([address, address.wrapping_sub(8)]);
        }
    }
    // The identity maps of RAM and of device memory and the window belong to the guest.
    addresses.retain(|address| {
        !(0..0x4020_0000).contains(address) && !(0xbfff_0000..=0x1_0000_1000).contains(address)
    });
    addresses
}

/// Memory that must come out as it went in, in places where a translator might slip.
struct Canaries {
    heap: Vec<u64>,
    low: *mut u64,
}

const CANARY: u64 = 0x5aa5_c33c_9669_f00f;
const LOW_BYTES: usize = 4 << 20;

impl Canaries {
    fn new() -> Canaries {
        // SAFETY: a fresh anonymous mapping.
        let low = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LOW_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(low, libc::MAP_FAILED);
        let low = low.cast::<u64>();
        for index in 0..LOW_BYTES / 8 {
            // SAFETY: inside the mapping.
            unsafe { low.add(index).write(CANARY) };
        }
        Canaries {
            heap: vec![CANARY; 1 << 20],
            low,
        }
    }

    fn check(&self) {
        assert!(self.heap.iter().all(|&word| word == CANARY), "heap");
        for index in 0..LOW_BYTES / 8 {
            // SAFETY: inside the mapping.
            assert_eq!(unsafe { self.low.add(index).read_volatile() }, CANARY);
        }
    }
}

impl Drop for Canaries {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.low.cast(), LOW_BYTES) };
    }
}

#[test]
fn no_wild_pointer_reaches_the_vmm() {
    let canaries = Canaries::new();
    let mut addresses = wild_addresses();
    let heap = canaries.heap.as_ptr() as u64;
    addresses.extend([
        heap,
        heap + 4096,
        canaries.low as u64,
        canaries.low as u64 + 4096,
    ]);
    for user in [false, true] {
        // R8 holds the address: load, store, read-modify-write, push, string, wide load, jump.
        let pieces: [&[u8]; 9] = [
            b"\x49\x8b\x00",         // mov rax, [r8]
            b"\x49\x89\x00",         // mov [r8], rax
            b"\xf0\x49\xff\x00",     // lock inc qword [r8]
            b"\x4c\x89\xc4\x50",     // mov rsp, r8; push rax
            b"\x4c\x89\xc7\x48\xab", // mov rdi, r8; stosq
            b"\x41\x0f\x11\x00",     // movups [r8], xmm0
            b"\x41\x0f\xae\x00",     // fxsave [r8]
            b"\x41\xff\x20",         // jmp [r8]
            b"\x41\xff\xe0",         // jmp r8
        ];
        // Faults get a stack of their own: that of ring 0 is wild at times.
        let mut kernel = [6, 12, 13, 14]
            .into_iter()
            .fold(Kernel::new(), Kernel::on_ist);
        for (index, bytes) in pieces.iter().enumerate() {
            let mut bytes = bytes.to_vec();
            // What doesn't fault shows up as #UD.
            bytes.extend(b"\x0f\x0b");
            kernel = kernel.put(page(0) + 32 * index as u64, bytes);
        }
        let table: Vec<u8> = addresses
            .iter()
            .flat_map(|address| address.to_le_bytes())
            .collect();
        kernel = kernel.put(page(16), table);
        let count = addresses.len() as u64;
        let guest = kernel.guest(|asm| {
            let mut head = asm.create_label();
            asm.mov(r14, rsp)?;
            asm.xor(r12d, r12d)?;
            asm.set_label(&mut head)?;
            asm.mov(r8, qword_ptr(r12 * 8 + page(16) as i32))?;
            for index in 0..pieces.len() as u64 {
                let piece = page(0) + 32 * index;
                if user {
                    asm.in_ring_3(piece, 0x202)?;
                } else {
                    asm.expect(|asm| {
                        asm.mov(rax, piece)?;
                        asm.jmp(rax)
                    })?;
                }
                asm.mov(rsp, r14)?;
                // The log would overflow: count, and start over.
                asm.mov(rax, qword_ptr(0x41_0000u64))?;
                asm.add(r15, rax)?;
                asm.mov(rax, qword_ptr(0x41_0008u64))?;
                asm.cmp(rax, 6)?;
                let mut fine = asm.create_label();
                asm.jne(fine)?;
                asm.inc(r13)?;
                asm.result(3, r8)?;
                asm.set_label(&mut fine)?;
                asm.mov(qword_ptr(0x41_0000u64), 0)?;
            }
            asm.inc(r12)?;
            asm.cmp(r12, count as i32)?;
            asm.jb(head)?;
            asm.result(0, r12)?;
            asm.result(1, r15)?;
            asm.result(2, r13)
        });
        let report = run(&guest).report();
        assert_eq!(report.results[0], count);
        assert_eq!(report.results[1], count * pieces.len() as u64);
        assert_eq!(
            report.results[2], 0,
            "accesses that did not fault, the last at {:#x}",
            report.results[3]
        );
    }
    canaries.check();
}

#[test]
fn wild_stack_pointers_in_ring_3_are_the_guests_own_problem() {
    let canaries = Canaries::new();
    // Every interrupt and fault switches to RSP0, wherever RSP pointed.
    let own = &raw const canaries as u64;
    for rsp_value in [
        0,
        8,
        own,
        canaries.low as u64,
        1 << 47,
        u64::MAX,
        0x7fff_ffff_f000,
    ] {
        let guest = Kernel::new()
            .code(page(0), page(0), |asm| {
                asm.mov(rsp, rsp_value)?;
                asm.cpuid()?;
                asm.mov(eax, dword_ptr(RESULTS))?;
                asm.add(dword_ptr(RESULTS), 1)?;
                asm.xor(edx, edx)?;
                asm.div(edx)
            })
            .guest(|asm| asm.in_ring_3(page(0), 0x202));
        let report = run(&guest).report();
        assert_eq!(report.faults(), [(0, 0, 0)]);
        assert_eq!(report.log[0].rsp, rsp_value);
    }
    canaries.check();
}

#[test]
fn the_whole_image_runs_in_the_smallest_code_cache() {
    let ram = engine_core::memory::create(128).expect("guest memory");
    let command = "run sort 1000 3";
    let entry = engine_core::loader::load(&ram, images::unaware(), command).expect("it loads");
    let options = Options {
        code_cache: 64 * 1024,
        ..Options::default()
    };
    let mut vcpu = bt::BtVcpu::new(ram, options).expect("a vCPU");
    vcpu.set_state(&entry).expect("a state");
    let mut machine =
        engine_core::Machine::new(engine_core::MachineOptions::default()).expect("a machine");
    let limits = engine_core::Limits {
        timeout: Some(std::time::Duration::from_secs(60)),
        max_exits: None,
    };
    let outcome = engine_core::drive(&mut vcpu, &mut machine, &limits);
    let console = String::from_utf8_lossy(machine.console()).into_owned();
    assert!(
        matches!(outcome, engine_core::Outcome::Success),
        "{outcome:?}\n{console}"
    );
    let workload = programs::find("sort").expect("it is there");
    let expected = programs::oracle(workload, 1000, 3).expect("an oracle");
    assert!(
        console.contains(&format!("done {expected:016x} ")),
        "{console}"
    );
    assert!(vcpu.cache_flushes() > 0);
    assert_eq!(
        vcpu.counts().get(ExitReason::CacheFlush),
        vcpu.cache_flushes()
    );
}

#[test]
fn a_code_cache_that_overflows_in_a_loop_keeps_the_results() {
    // A thousand functions, called in turn, several times over: more than 64 KiB of code.
    const FUNCTIONS: u64 = 1000;
    let mut bytes = Vec::new();
    for index in 0..FUNCTIONS as u32 {
        // add eax, index; xor eax, [RESULTS + 8]; ret
        bytes.push(0x05);
        bytes.extend(index.to_le_bytes());
        bytes.extend(b"\x33\x04\x25");
        bytes.extend((RESULTS as u32 + 8).to_le_bytes());
        bytes.push(0xc3);
        bytes.resize((index as usize + 1) * 16, 0x90);
    }
    let guest = Kernel::new().put(page(0), bytes).guest(|asm| {
        let mut outer = asm.create_label();
        let mut inner = asm.create_label();
        asm.mov(dword_ptr(RESULTS + 8), 0x1357)?;
        asm.xor(eax, eax)?;
        asm.mov(r12d, 5)?;
        asm.set_label(&mut outer)?;
        asm.mov(rbx, page(0))?;
        asm.mov(ecx, FUNCTIONS as i32)?;
        asm.set_label(&mut inner)?;
        asm.call(rbx)?;
        asm.add(rbx, 16)?;
        asm.dec(ecx)?;
        asm.jne(inner)?;
        asm.dec(r12d)?;
        asm.jne(outer)?;
        asm.result(0, rax)
    });
    let mut expected = 0u32;
    for _ in 0..5 {
        for index in 0..FUNCTIONS as u32 {
            expected = expected.wrapping_add(index) ^ 0x1357;
        }
    }
    let small = Options {
        code_cache: 64 * 1024,
        ..Options::default()
    };
    let ended = run_with(&guest, small);
    assert_eq!(ended.report().results[0], u64::from(expected));
    assert!(ended.vcpu.cache_flushes() > 4);
    let ended = run_with(&guest, Options::default());
    assert_eq!(ended.report().results[0], u64::from(expected));
    assert_eq!(ended.vcpu.cache_flushes(), 0);
}
