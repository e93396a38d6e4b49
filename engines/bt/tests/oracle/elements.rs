//! Accesses of many elements of which some may not be made: gathers that fault in the middle, masked
//! moves half in nowhere, stores that fault. The host says what is done and what isn't, and which
//! address the fault names.

use bt::insn::Case;
use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use crate::case::{CODE, Comparison, Liberty};
use crate::layout::PAGE;
use crate::snippets::Snippet;

/// Two pages; nothing lies around them.
const PLACE: u64 = 0x2_0000;
const END: u64 = PLACE + 2 * PAGE;
const NOWHERE: u64 = 0x40_0000;
/// Vectors that a case starts with: YMM0 to YMM3.
const VECTORS: u64 = PLACE;
/// What gathers read, and where their base is.
const BASE: u64 = PLACE + PAGE;

type Vector = [u8; 32];

fn encode(instrs: &[Instruction]) -> Vec<u8> {
    let mut encoder = iced_x86::Encoder::new(64);
    let mut at = CODE;
    for instr in instrs {
        at += encoder.encode(instr, at).expect("can be encoded") as u64;
    }
    encoder.take_buffer()
}

/// Loads `vectors`, then runs `instrs` and halts.
fn case(vectors: &[Vector], rest: Vec<u8>) -> Case {
    let mut asm = CodeAssembler::new(64).expect("64-bit code");
    for (register, at) in [ymm0, ymm1, ymm2, ymm3].into_iter().zip(0u64..) {
        asm.vmovdqu(register, ymmword_ptr(VECTORS + 32 * at))
            .expect("can be encoded");
    }
    asm.mov(rax, BASE).expect("can be encoded");
    let mut code = asm.assemble(CODE).expect("can be assembled");
    code.extend(rest);
    code.push(0xf4);
    let contents: Vec<u8> = (0..PAGE).map(|at| (at * 7 + (at >> 8) + 1) as u8).collect();
    Case {
        code,
        load: CODE,
        map: vec![(PLACE, 2 * PAGE)],
        mem: vec![(VECTORS, vectors.concat()), (BASE, contents)],
    }
}

/// A vector of `size`-byte elements.
fn elements(size: usize, value: impl Fn(usize) -> u64) -> Vector {
    let mut vector = [0; 32];
    for (number, place) in vector.chunks_exact_mut(size).enumerate() {
        place.copy_from_slice(&value(number).to_le_bytes()[..size]);
    }
    vector
}

#[test]
fn gathers_that_fault_in_the_middle() {
    use Code::*;
    // Form, its target and index registers, bytes of an index and of an element.
    let forms = [
        (VEX_Vpgatherdd_xmm_vm32x_xmm, false, false, 4, 4),
        (VEX_Vpgatherdd_ymm_vm32y_ymm, true, true, 4, 4),
        (VEX_Vpgatherdq_xmm_vm32x_xmm, false, false, 4, 8),
        (VEX_Vpgatherdq_ymm_vm32x_ymm, true, false, 4, 8),
        (VEX_Vpgatherqd_xmm_vm64x_xmm, false, false, 8, 4),
        (VEX_Vpgatherqd_xmm_vm64y_xmm, false, true, 8, 4),
        (VEX_Vpgatherqq_xmm_vm64x_xmm, false, false, 8, 8),
        (VEX_Vpgatherqq_ymm_vm64y_ymm, true, true, 8, 8),
        (VEX_Vgatherdps_xmm_vm32x_xmm, false, false, 4, 4),
        (VEX_Vgatherdps_ymm_vm32y_ymm, true, true, 4, 4),
        (VEX_Vgatherdpd_xmm_vm32x_xmm, false, false, 4, 8),
        (VEX_Vgatherdpd_ymm_vm32x_ymm, true, false, 4, 8),
        (VEX_Vgatherqps_xmm_vm64x_xmm, false, false, 8, 4),
        (VEX_Vgatherqps_xmm_vm64y_xmm, false, true, 8, 4),
        (VEX_Vgatherqpd_xmm_vm64x_xmm, false, false, 8, 8),
        (VEX_Vgatherqpd_ymm_vm64y_ymm, true, true, 8, 8),
    ];
    // Beyond the end, across it, below the start, and, with 64-bit indices, not canonical.
    let targets = [END, END - 2, PLACE - 4, NOWHERE, 0x8000_0000_0000];
    let mut comparison = Comparison::new();
    for (form, wide, wide_index, index_size, size) in forms {
        let register = |number: u32, wide| {
            let first = if wide { Register::YMM0 } else { Register::XMM0 };
            first + number
        };
        let memory =
            MemoryOperand::with_base_index_scale(Register::RAX, register(1, wide_index), 1);
        let instr =
            Instruction::with3(form, register(0, wide), memory, register(2, wide)).expect("a form");
        let bytes = encode(&[instr]);
        let width = |wide| if wide { 32 } else { 16 };
        let count = (width(wide) / size).min(width(wide_index) / index_size);
        for bad in 0..=count {
            for target in targets {
                if index_size == 4 && target > 1 << 32 {
                    continue;
                }
                for mask in [!0u64, 0x5555, 0xaaaa, !(1 << bad), 1 << bad] {
                    let indices = elements(index_size, |number| match number {
                        // And another one that would fault, later.
                        _ if number == bad || number == bad + 2 => target.wrapping_sub(BASE),
                        _ => 16 * number as u64 + 3,
                    });
                    // Only signs count in a mask.
                    let mask_vector = elements(size, |number| {
                        let sign = mask >> number & 1;
                        sign << (8 * size - 1) | (0x123 * number as u64)
                    });
                    let vectors = [elements(8, |_| 0xdddd_dddd_dddd_dddd), indices, mask_vector];
                    let name = format!("{instr}, {target:#x} at {bad}, mask {mask:#x}");
                    comparison.compare(&case(&vectors, bytes.clone()), Liberty::default(), || name);
                }
            }
        }
    }
    comparison.end(1000);
}

#[test]
fn masked_moves_at_the_end_of_memory() {
    let stores: [Snippet; 14] = [
        |asm| asm.vmaskmovps(xmmword_ptr(rdi), xmm1, xmm0),
        |asm| asm.vmaskmovps(ymmword_ptr(rdi), ymm1, ymm0),
        |asm| asm.vmaskmovpd(xmmword_ptr(rdi), xmm1, xmm0),
        |asm| asm.vmaskmovpd(ymmword_ptr(rdi), ymm1, ymm0),
        |asm| asm.vpmaskmovd(ymmword_ptr(rdi), ymm1, ymm0),
        |asm| asm.vpmaskmovq(ymmword_ptr(rdi), ymm1, ymm0),
        |asm| asm.vmaskmovps(xmm2, xmm1, xmmword_ptr(rdi)),
        |asm| asm.vmaskmovps(ymm2, ymm1, ymmword_ptr(rdi)),
        |asm| asm.vmaskmovpd(ymm2, ymm1, ymmword_ptr(rdi)),
        |asm| asm.vpmaskmovd(xmm2, xmm1, xmmword_ptr(rdi)),
        |asm| asm.vpmaskmovd(ymm2, ymm1, ymmword_ptr(rdi)),
        |asm| asm.vpmaskmovq(xmm2, xmm1, xmmword_ptr(rdi)),
        |asm| asm.maskmovdqu(xmm0, xmm1),
        |asm| asm.vmaskmovdqu(xmm0, xmm1),
    ];
    let mut comparison = Comparison::new();
    // This differs between processors, as with all long operands.
    let liberty = Liberty {
        byte: true,
        ..Liberty::default()
    };
    for (number, store) in stores.into_iter().enumerate() {
        for at in [END - 8, END - 6, END - 16, END, NOWHERE, PLACE - 8] {
            for mask in [
                0u32,
                3,
                0x1f,
                !0,
                0xffff_ff00,
                0xffff_0000,
                0x8000_0001,
                0x80,
                0x0f0f_0f0f,
            ] {
                // A sign for each byte, and so for each element.
                let vector: Vector = std::array::from_fn(|byte| (mask >> byte << 7) as u8);
                let data: Vector = std::array::from_fn(|byte| byte as u8 + 1);
                let mut asm = CodeAssembler::new(64).expect("64-bit code");
                asm.mov(rdi, at).expect("can be encoded");
                store(&mut asm).expect("can be encoded");
                let code = asm.assemble(0).expect("can be assembled");
                let name = format!("masked move {number} at {at:#x}, mask {mask:#x}");
                comparison.compare(&case(&[data, vector, data], code), liberty, || name);
            }
        }
    }
    comparison.end(14 * 6 * 9);
}

#[test]
fn stores_that_fault_leave_what_was() {
    let forms: [Snippet; 8] = [
        |asm| asm.vcvtps2ph(qword_ptr(rdi), xmm0, 0),
        |asm| asm.vcvtps2ph(xmmword_ptr(rdi), ymm0, 4),
        |asm| asm.vcvtps2ph(qword_ptr(rdi), xmm2, 0),
        |asm| asm.vcvtps2ph(xmmword_ptr(rdi), ymm2, 0),
        |asm| asm.cmpxchg16b(xmmword_ptr(rdi)),
        |asm| asm.lock().cmpxchg16b(xmmword_ptr(rdi)),
        |asm| asm.movnti(qword_ptr(rdi), rax),
        |asm| asm.vextracti128(xmmword_ptr(rdi), ymm2, 1),
    ];
    // Inexact and too large for a half; exact.
    let hard = elements(4, |number| {
        u64::from((70_000.1f32 * (number as f32 + 0.3)).to_bits())
    });
    let easy = elements(4, |_| u64::from(1.5f32.to_bits()));
    let mut comparison = Comparison::new();
    for (number, form) in forms.into_iter().enumerate() {
        for at in [
            BASE,
            BASE + 8,
            BASE + 4,
            BASE + 15,
            END - 16,
            END - 8,
            END - 4,
            END,
            NOWHERE,
        ] {
            let mut asm = CodeAssembler::new(64).expect("64-bit code");
            asm.mov(rdi, at).expect("can be encoded");
            form(&mut asm).expect("can be encoded");
            let code = asm.assemble(0).expect("can be assembled");
            let name = format!("store {number} at {at:#x}");
            comparison.compare(&case(&[hard, easy, easy], code), Liberty::default(), || {
                name
            });
        }
    }
    comparison.end(72);
}

#[test]
fn x87_pointers_after_memory_operands() {
    let forms: [Snippet; 6] = [
        |asm| asm.fld(qword_ptr(rax + 0x20)),
        |asm| asm.fild(dword_ptr(rax + 0x40)),
        |asm| asm.fadd(dword_ptr(rax + 0x80)),
        |asm| asm.fstp(qword_ptr(rax + 0x88)),
        |asm| asm.fidiv(word_ptr(rax + 0xa)),
        |asm| asm.fsqrt(),
    ];
    let saves: [Snippet; 5] = [
        |asm| asm.fnsave(ptr(rbx + 0x200)),
        |asm| asm.fnstenv(ptr(rbx + 0x200)),
        |asm| asm.fxsave(ptr(rbx + 0x200)),
        |asm| asm.fxsave64(ptr(rbx + 0x200)),
        |asm| asm.xsave64(ptr(rbx + 0x200)),
    ];
    let mut comparison = Comparison::new();
    for (number, form) in forms.into_iter().enumerate() {
        for (which, save) in saves.into_iter().enumerate() {
            // The header of an xsave area is partly kept. Whether vectors of zeros are in their initial
            // state is the processor's choice (SDM 1 13.6).
            let (clear, set) = (elements(8, |_| 0), elements(8, |_| 5));
            let mut asm = CodeAssembler::new(64).expect("64-bit code");
            asm.vmovups(ymmword_ptr(rax + 0x400), ymm3)
                .expect("can be encoded");
            asm.vmovups(ymmword_ptr(rax + 0x420), ymm3)
                .expect("can be encoded");
            asm.fld1().expect("can be encoded");
            form(&mut asm).expect("can be encoded");
            asm.mov(rbx, rax).expect("can be encoded");
            // What xsave is to save: x87 and SSE.
            asm.mov(eax, 3).expect("can be encoded");
            save(&mut asm).expect("can be encoded");
            let code = asm.assemble(0).expect("can be assembled");
            let name = format!("x87 form {number}, save {which}");
            comparison.compare(
                &case(&[set, set, set, clear], code),
                Liberty::default(),
                || name,
            );
        }
    }
    comparison.end(30);
}
