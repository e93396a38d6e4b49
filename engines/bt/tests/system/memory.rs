//! Accesses that need more than a host load: strings, device memory, ports, locked operations.

use std::sync::{Arc, Mutex};

use bt::Options;
use engine_core::{Exit, Vcpu};
use iced_x86::code_asm::*;

use crate::kernel::{ALL, Asm, Built, Kernel, PRESENT, RESULTS, SCRATCH, Steps, page, window};
use crate::run::{boot, report, report_as_qemu};

/// Where there is neither RAM nor a device of the machine.
const DEVICE: u64 = 0xd000_0000;
const DEVICE_PAGE: u64 = 300;

fn device(offset: u64) -> u64 {
    window(DEVICE_PAGE) + offset
}

#[test]
fn repeated_strings_stop_exactly_where_they_fault() {
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(1) | ALL)
            .map(3, page(3) | ALL)
            .map(4, page(4) | PRESENT),
        |asm| {
            let mut number = 0;
            let mut keep = |asm: &mut Asm| -> Built {
                asm.result(number, rcx)?;
                asm.result(number + 1, rsi)?;
                asm.result(number + 2, rdi)?;
                number += 3;
                asm.cld()
            };
            // Forward into a hole, backward into a hole, onto a read-only page.
            asm.xor(esi, esi)?;
            asm.mov(rdi, window(1) + 0xff5)?;
            asm.mov(ecx, 100)?;
            asm.expect(|asm| asm.rep().stosd())?;
            keep(asm)?;
            asm.mov(rsi, window(0))?;
            asm.mov(rdi, window(1) + 0xfe8)?;
            asm.mov(ecx, 1000)?;
            asm.expect(|asm| asm.rep().movsq())?;
            keep(asm)?;
            asm.std()?;
            asm.mov(rsi, window(3) + 0x100)?;
            asm.mov(rdi, window(0) + 0x800)?;
            asm.mov(ecx, 1000)?;
            asm.expect(|asm| asm.rep().movsw())?;
            keep(asm)?;
            asm.mov(rdi, window(3) + 0xff0)?;
            asm.mov(ecx, 1000)?;
            asm.expect(|asm| asm.rep().stosb())?;
            keep(asm)?;
            asm.mov(rsi, window(1) + 0xffc)?;
            asm.mov(ecx, 10)?;
            asm.expect(|asm| asm.rep().lodsb())?;
            keep(asm)?;
            asm.mov(rdi, window(1) + 0xf00)?;
            asm.mov(eax, 0x77)?;
            asm.mov(ecx, 1000)?;
            asm.expect(|asm| {
                asm.mov(eax, 0x77)?;
                asm.repne().scasb()
            })?;
            keep(asm)
        },
    );
    assert_eq!(
        report.faults(),
        [
            (14, 2, window(2)),
            (14, 2, window(2)),
            (14, 0, window(2) + 0xffe),
            (14, 3, window(4)),
            (14, 0, window(2)),
            (14, 0, window(2)),
        ]
    );
    // The element across the page's end isn't stored at all.
    assert_eq!(report.results[0], 98);
    assert_eq!(report.results[2], window(1) + 0xffd);
    assert_eq!(report.results[3], 997);
    assert_eq!(report.results[4..6], [window(0) + 24, window(2)]);
    assert_eq!(report.results[6], 1000 - 0x81);
}

#[test]
fn overlapping_copies_replicate() {
    let report = report_as_qemu(
        Kernel::new()
            .map(0, page(0) | ALL)
            .map(1, page(1) | ALL)
            .put(page(0), (0..=255).collect()),
        |asm| {
            // Forward by one: the first byte everywhere. Backward by one: shifted.
            asm.mov(rsi, window(0))?;
            asm.mov(rdi, window(0) + 1)?;
            asm.mov(ecx, 100)?;
            asm.rep().movsb()?;
            asm.mov(rax, qword_ptr(window(0) + 96))?;
            asm.result(0, rax)?;
            asm.std()?;
            asm.mov(rsi, window(0) + 0xf8)?;
            asm.mov(rdi, window(0) + 0xfb)?;
            asm.mov(ecx, 20)?;
            asm.rep().movsd()?;
            asm.cld()?;
            for number in 0..8 {
                asm.mov(rax, qword_ptr(window(0) + 0xa0 + 8 * number))?;
                asm.result(1 + number, rax)?;
            }
            // Across a page, five bytes apart, in words.
            asm.mov(dword_ptr(window(1) - 64), 0x1234_5678)?;
            asm.mov(rsi, window(1) - 64)?;
            asm.mov(rdi, window(1) - 59)?;
            asm.mov(ecx, 100)?;
            asm.rep().movsw()?;
            for number in 0..8 {
                asm.mov(rax, qword_ptr(window(1) - 32 + 8 * number))?;
                asm.result(9 + number, rax)?;
            }
            Ok(())
        },
    );
    // The same, one element at a time.
    let mut memory = vec![0u8; 0x2000];
    for (index, byte) in memory[..256].iter_mut().enumerate() {
        *byte = index as u8;
    }
    let mut copy = |from: usize, to: usize, count: usize, size: usize, step: isize| {
        for element in 0..count as isize {
            let at = |start: usize| (start as isize + element * step) as usize;
            memory.copy_within(at(from)..at(from) + size, at(to));
        }
        memory.clone()
    };
    let first = copy(0, 1, 100, 1, 1);
    let second = copy(0xf8, 0xfb, 20, 4, -4);
    memory[0xfc0..0xfc4].copy_from_slice(&0x1234_5678u32.to_le_bytes());
    for element in 0..100 {
        let from = 0xfc0 + 2 * element;
        memory.copy_within(from..from + 2, from + 5);
    }
    let words = |memory: &[u8], at: usize, count: usize| -> Vec<u64> {
        memory[at..at + 8 * count]
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
            .collect()
    };
    assert_eq!(report.results[..1], words(&first, 96, 1));
    assert_eq!(report.results[1..9], words(&second, 0xa0, 8));
    assert_eq!(report.results[9..17], words(&memory, 0x1000 - 32, 8));
}

/// What a device saw: (address within the device, bytes written; none for a read).
type Accesses = Vec<(u64, Vec<u8>)>;

/// Runs `body` with a device of registers that read as their own address's bytes; returns its
/// accesses and the results.
fn with_device(body: impl FnOnce(&mut Asm) -> Built) -> (Accesses, Vec<u64>) {
    let guest = Kernel::new()
        .map(DEVICE_PAGE, DEVICE | ALL)
        .map(DEVICE_PAGE + 1, (DEVICE + 0x1000) | ALL)
        .map(DEVICE_PAGE - 1, page(20) | ALL)
        .guest(body);
    let (mut vcpu, ram) = boot(&guest, Options::default());
    let accesses = Arc::new(Mutex::new(Accesses::new()));
    loop {
        let mut seen = accesses.lock().expect("not poisoned");
        match vcpu.run().expect("it runs") {
            Exit::MmioRead { addr, data, .. } => {
                seen.push((addr.0 - DEVICE, Vec::new()));
                for (index, byte) in data.iter_mut().enumerate() {
                    *byte = (addr.0 as u8).wrapping_add(index as u8) | 0x80;
                }
            }
            Exit::MmioWrite { addr, data } => seen.push((addr.0 - DEVICE, data.to_vec())),
            Exit::PioOut { port: 0xf4, .. } => break,
            Exit::PioOut { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    let mut results = vec![0; 40 * 8];
    vm_memory::Bytes::read_slice(&*ram, &mut results, vm_memory::GuestAddress(RESULTS))
        .expect("guest memory");
    let results = results
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
        .collect();
    let seen = accesses.lock().expect("not poisoned").clone();
    (seen, results)
}

#[test]
fn device_memory_is_read_and_written_in_the_size_of_the_access() {
    let (seen, results) = with_device(|asm| {
        asm.movzx(eax, byte_ptr(device(0x11)))?;
        asm.result(0, rax)?;
        asm.movzx(eax, word_ptr(device(0x12)))?;
        asm.result(1, rax)?;
        asm.mov(eax, dword_ptr(device(0x14)))?;
        asm.result(2, rax)?;
        asm.mov(rax, qword_ptr(device(0x18)))?;
        asm.result(3, rax)?;
        asm.mov(byte_ptr(device(0x21)), 1)?;
        asm.mov(word_ptr(device(0x22)), 0x202)?;
        asm.mov(dword_ptr(device(0x24)), 0x404)?;
        asm.mov(rax, 0x0808_0808_0808u64)?;
        asm.mov(qword_ptr(device(0x28)), rax)
    });
    assert_eq!(
        results[..4],
        [0x91, 0x9392, 0x9796_9594, 0x9f9e_9d9c_9b9a_9998]
    );
    assert_eq!(
        seen,
        [
            (0x11, vec![]),
            (0x12, vec![]),
            (0x14, vec![]),
            (0x18, vec![]),
            (0x21, vec![1]),
            (0x22, vec![2, 2]),
            (0x24, vec![4, 4, 0, 0]),
            (0x28, vec![8, 8, 8, 8, 8, 8, 0, 0]),
        ]
    );
}

#[test]
fn read_modify_write_and_wide_accesses_reach_the_device_in_pieces() {
    let (seen, results) = with_device(|asm| {
        asm.stc()?;
        asm.adc(dword_ptr(device(0x10)), 1)?;
        asm.mov(eax, 5)?;
        asm.xchg(dword_ptr(device(0x20)), eax)?;
        asm.result(0, rax)?;
        asm.lock().inc(byte_ptr(device(0x30)))?;
        asm.movups(xmm3, xmmword_ptr(device(0x40)))?;
        asm.movups(xmmword_ptr(device(0x50)), xmm3)?;
        // From RAM into the device, across the boundary.
        asm.mov(rax, 0x1122_3344_5566_7788u64)?;
        asm.mov(qword_ptr(device(0) - 4), rax)?;
        asm.mov(eax, dword_ptr(device(0) - 4))?;
        asm.result(1, rax)?;
        asm.push(qword_ptr(device(0x60)))?;
        asm.pop(qword_ptr(device(0x68)))
    });
    assert_eq!(results[..2], [0xa3a2_a1a0, 0x5566_7788]);
    let sum = 0x9392_9190u32.wrapping_add(2).to_le_bytes().to_vec();
    let low: Vec<u8> = (0xc0..0xc8).collect();
    let high: Vec<u8> = (0xc8..0xd0).collect();
    assert_eq!(
        seen,
        [
            (0x10, vec![]),
            (0x10, sum),
            (0x20, vec![]),
            (0x20, vec![5, 0, 0, 0]),
            (0x30, vec![]),
            (0x30, vec![0xb1]),
            (0x40, vec![]),
            (0x48, vec![]),
            (0x50, low),
            (0x58, high),
            (0, vec![0x44, 0x33, 0x22, 0x11]),
            (0x60, vec![]),
            (0x68, (0xe0..0xe8).collect()),
        ]
    );
}

#[test]
fn strings_reach_devices_element_by_element() {
    let (seen, results) = with_device(|asm| {
        asm.mov(eax, 0x0a0b_0c0d)?;
        asm.mov(rdi, device(0x10))?;
        asm.mov(ecx, 2)?;
        asm.rep().stosd()?;
        asm.result(0, rcx)?;
        asm.result(1, rdi)?;
        // RAM to device, device to RAM, device to device.
        asm.mov(dword_ptr(SCRATCH), 0x0403_0201)?;
        asm.mov(rsi, SCRATCH)?;
        asm.mov(rdi, device(0x20))?;
        asm.mov(ecx, 2)?;
        asm.rep().movsw()?;
        asm.mov(rsi, device(0x30))?;
        asm.mov(rdi, SCRATCH)?;
        asm.mov(ecx, 3)?;
        asm.rep().movsb()?;
        asm.result(2, rsi)?;
        asm.mov(eax, dword_ptr(SCRATCH))?;
        asm.result(3, rax)?;
        asm.mov(rsi, device(0x40))?;
        asm.mov(rdi, device(0x50))?;
        asm.movsq()?;
        asm.mov(rsi, device(0x60))?;
        asm.lodsw()?;
        asm.result(4, rax)?;
        asm.result(5, rsi)
    });
    assert_eq!(results[..2], [0, device(0x18)]);
    assert_eq!(results[2..4], [device(0x33), 0x04b2_b1b0]);
    assert_eq!(results[4] & 0xffff, 0xe1e0);
    assert_eq!(results[5], device(0x62));
    let word = vec![0x0d, 0x0c, 0x0b, 0x0a];
    assert_eq!(
        seen,
        [
            (0x10, word.clone()),
            (0x14, word),
            (0x20, vec![1, 2]),
            (0x22, vec![3, 4]),
            (0x30, vec![]),
            (0x31, vec![]),
            (0x32, vec![]),
            (0x40, vec![]),
            (0x50, (0xc0..0xc8).collect()),
            (0x60, vec![]),
        ]
    );
}

#[test]
fn port_strings_leave_page_by_page() {
    let guest = Kernel::new().map(0, page(0) | ALL).guest(|asm| {
        asm.mov(edx, 0x1f0)?;
        asm.mov(rdi, window(0) + 0xffa)?;
        asm.mov(ecx, 5)?;
        // The fourth element lies on a page that isn't there.
        asm.expect(|asm| asm.rep().insw())?;
        asm.result(0, rcx)?;
        asm.result(1, rdi)?;
        asm.mov(rsi, window(0) + 0xffa)?;
        asm.mov(ecx, 3)?;
        asm.rep().outsw()?;
        asm.result(2, rsi)?;
        asm.std()?;
        asm.mov(rsi, window(0) + 0xffe)?;
        asm.outsb()?;
        asm.cld()?;
        asm.result(3, rsi)?;
        // Downwards and without a prefix: one by one.
        asm.std()?;
        asm.mov(rdi, window(0) + 0x102)?;
        asm.mov(ecx, 2)?;
        asm.rep().insw()?;
        asm.cld()?;
        asm.insw()?;
        asm.result(4, rdi)?;
        asm.mov(rax, qword_ptr(window(0) + 0xfe))?;
        asm.result(5, rax)?;
        // Nothing to do is no exit.
        asm.rep().insw()
    });
    let (mut vcpu, ram) = boot(&guest, Options::default());
    let mut written = Vec::new();
    let mut read = Vec::new();
    let mut next = 0u8;
    loop {
        match vcpu.run().expect("it runs") {
            Exit::PioIn { port, size, data } => {
                assert_eq!((port, size), (0x1f0, 2));
                read.push(data.len());
                for byte in data {
                    *byte = next;
                    next += 1;
                }
            }
            Exit::PioOut {
                port: 0x1f0, data, ..
            } => written.push(data.to_vec()),
            Exit::PioOut { port: 0xf4, .. } => break,
            Exit::PioOut { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(written, [vec![0, 1, 2, 3, 4, 5], vec![4]]);
    // A port isn't read for an element that can't be stored.
    assert_eq!(read, [6, 2, 2, 2]);
    let mut results = [0; 48];
    vm_memory::Bytes::read_slice(&*ram, &mut results, vm_memory::GuestAddress(RESULTS))
        .expect("guest memory");
    let word = |at: usize| u64::from_le_bytes(results[at * 8..at * 8 + 8].try_into().expect("8"));
    assert_eq!((word(0), word(1)), (2, window(1)));
    assert_eq!((word(2), word(3)), (window(1), window(0) + 0xffd));
    assert_eq!(word(4), window(0) + 0x100);
    assert_eq!(word(5) & 0xffff_ffff_ffff, 0x0706_0908_0b0a);
}

#[test]
fn locked_operations_work_across_pages() {
    // Not compared with QEMU, whose locked accesses fault as reads.
    let report = report(
        Kernel::new().map(0, page(0) | ALL).map(1, page(7) | ALL),
        |asm| {
            let at = window(1) - 3;
            asm.mov(qword_ptr(at), 5)?;
            asm.mov(eax, 5)?;
            asm.mov(rbx, 0x1122_3344_5566_7788u64)?;
            asm.lock().cmpxchg(qword_ptr(at), rbx)?;
            asm.setz(cl)?;
            asm.movzx(ecx, cl)?;
            asm.result(0, rcx)?;
            asm.lock().xadd(qword_ptr(at), rcx)?;
            asm.result(1, rcx)?;
            asm.lock().inc(qword_ptr(at))?;
            asm.mov(rax, qword_ptr(at))?;
            asm.result(2, rax)?;
            // The pages are apart in physical memory.
            asm.movzx(eax, byte_ptr(page(1)))?;
            asm.result(3, rax)?;
            asm.movzx(eax, byte_ptr(page(7)))?;
            asm.result(4, rax)?;
            // 16 bytes have to be aligned, so they never cross.
            asm.expect(|asm| asm.lock().cmpxchg16b(xmmword_ptr(window(1) - 8)))?;
            // cmpxchg8b may.
            asm.mov(qword_ptr(window(1) - 4), 0)?;
            asm.xor(eax, eax)?;
            asm.xor(edx, edx)?;
            asm.mov(ebx, 1)?;
            asm.mov(ecx, 2)?;
            asm.lock().cmpxchg8b(qword_ptr(window(1) - 4))?;
            asm.mov(rax, qword_ptr(window(1) - 4))?;
            asm.result(5, rax)?;
            // Nothing is stored when the second page is missing.
            asm.remap_now(1, 0)?;
            asm.expect(|asm| asm.lock().add(dword_ptr(window(1) - 2), -1))?;
            asm.movzx(eax, word_ptr(window(1) - 2))?;
            asm.result(6, rax)
        },
    );
    let value = 0x1122_3344_5566_7788u64 + 2;
    assert_eq!(report.results[..3], [1, value - 2, value]);
    assert_eq!(report.results[3], 0);
    assert_eq!(report.results[4], value >> 24 & 0xff);
    assert_eq!(report.results[5..7], [0x2_0000_0001, 0]);
    assert_eq!(report.faults(), [(13, 0, 0), (14, 2, window(1))]);
}

#[test]
fn sse_state_survives_every_way_out() {
    // All sixteen registers and MXCSR across TLB misses, device accesses, CPUID and faults.
    let (_, results) = with_device(|asm| {
        let registers = [
            xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13,
            xmm14, xmm15,
        ];
        for (index, register) in registers.into_iter().enumerate() {
            asm.mov(eax, 0x100 + index as i32)?;
            asm.movd(register, eax)?;
            asm.pshufd(register, register, 0)?;
        }
        asm.mov(dword_ptr(SCRATCH), 0x7f80)?;
        asm.ldmxcsr(dword_ptr(SCRATCH))?;
        asm.fld1()?;
        asm.xor(eax, eax)?;
        asm.cpuid()?;
        asm.mov(eax, dword_ptr(device(0)))?;
        asm.mov(eax, dword_ptr(window(DEVICE_PAGE - 1)))?;
        for (index, register) in registers.into_iter().enumerate() {
            asm.movups(xmmword_ptr(SCRATCH + 0x10), register)?;
            asm.mov(rax, qword_ptr(SCRATCH + 0x18))?;
            asm.result(index as u64, rax)?;
        }
        asm.stmxcsr(dword_ptr(SCRATCH))?;
        asm.mov(eax, dword_ptr(SCRATCH))?;
        asm.result(16, rax)?;
        asm.fstp(qword_ptr(SCRATCH))?;
        asm.mov(rax, qword_ptr(SCRATCH))?;
        asm.result(17, rax)
    });
    for (index, value) in results[..16].iter().enumerate() {
        let word = 0x100 + index as u64;
        assert_eq!(*value, word << 32 | word);
    }
    assert_eq!(results[16..18], [0x7f80, 1f64.to_bits()]);
}

#[test]
fn the_apic_answers_through_device_memory() {
    let report = report(Kernel::new().map(511, 0xfee0_0000 | ALL), |asm| {
        asm.mov(eax, dword_ptr(window(511) + 0x30))?;
        asm.result(0, rax)?;
        // By string, too.
        asm.mov(eax, 0x1ff)?;
        asm.mov(rdi, window(511) + 0xf0)?;
        asm.stosd()?;
        asm.mov(rsi, window(511) + 0xf0)?;
        asm.xor(eax, eax)?;
        asm.lodsd()?;
        asm.result(1, rax)
    });
    assert_eq!(report.results[..2], [0x5_0014, 0x1ff]);
}

#[test]
fn strings_are_compared_with_device_memory_on_either_side() {
    // The device's bytes are their own addresses with bit 7 set.
    let (_, results) = with_device(|asm| {
        asm.cld()?;
        asm.mov(rdi, device(0x10))?;
        asm.mov(al, 0x93u32 as i32)?;
        asm.mov(ecx, 8)?;
        asm.repne().scasb()?;
        asm.result(0, rcx)?;
        asm.mov(rsi, device(0x20))?;
        asm.mov(rdi, device(0x20))?;
        asm.mov(ecx, 4)?;
        asm.repe().cmpsw()?;
        asm.setz(al)?;
        asm.movzx(eax, al)?;
        asm.shl(eax, 8)?;
        asm.mov(al, cl)?;
        asm.result(1, rax)?;
        // Against RAM that is the same for three bytes.
        asm.mov(dword_ptr(crate::kernel::SCRATCH), 0x00b2_b1b0)?;
        asm.mov(rsi, crate::kernel::SCRATCH)?;
        asm.mov(rdi, device(0x30))?;
        asm.mov(ecx, 8)?;
        asm.repe().cmpsb()?;
        asm.result(2, rcx)?;
        asm.mov(rax, device(0x30))?;
        asm.sub(rdi, rax)?;
        asm.result(3, rdi)
    });
    assert_eq!(results[..4], [4, 0x100, 4, 4]);
}
