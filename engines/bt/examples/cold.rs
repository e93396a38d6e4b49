//! Translates the machine code in a file, from its first byte to its last, and says what came of it. Nothing
//! of it is executed, so a profiler that can't follow translated code counts the translator itself:
//!
//! ```text
//! objcopy -O binary -j .text PROGRAM code.bin
//! valgrind --tool=callgrind target/release/examples/cold code.bin
//! ```
//!
//! The code is 64-bit code of ring 0, or of ring 3 if a second argument says `user`, which accesses memory
//! through the window then.

use bt::{BtVcpu, Options};
use engine_core::{CpuState, DescriptorTable, Segment, Vcpu};
use iced_x86::{Decoder, DecoderOptions};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_MIB: u64 = 64;
const TABLES: u64 = 1 << 20;
const CODE: u64 = 8 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, ring @ ..] = arguments.as_slice() else {
        eprintln!("usage: cold FILE [user]");
        std::process::exit(2);
    };
    let user = ring.first().is_some_and(|ring| ring == "user");
    let code = std::fs::read(file).expect("the file");
    let ram = engine_core::memory::create(MEMORY_MIB).expect("guest memory");
    let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).expect("in memory");
    // Present, writable, user; in a directory, a page of 2 MiB.
    put(TABLES, TABLES + 0x1000 + 7);
    put(TABLES + 0x1000, TABLES + 0x2000 + 7);
    for page in 0..MEMORY_MIB / 2 {
        put(TABLES + 0x2000 + 8 * page, (page << 21) + 0x87);
    }
    ram.write_slice(&code, GuestAddress(CODE))
        .expect("code of less than 56 MiB");
    let mut vcpu = BtVcpu::new(ram, Options::default()).expect("a vCPU");
    vcpu.set_state(&entry(user)).expect("a state");
    let end = CODE + code.len() as u64;
    let blocks = vcpu.translate_ahead(end).expect("it translates");
    let instructions = Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE)
        .into_iter()
        .count();
    println!(
        "{} bytes, {instructions} instructions, {blocks} blocks",
        code.len()
    );
}

/// Long mode, interrupts off.
fn entry(user: bool) -> CpuState {
    let segment = Segment::flat;
    let (code, data, level) = if user {
        (0xa0fb, 0xc0f3, 3)
    } else {
        (0xa09b, 0xc093, 0)
    };
    let mut state = CpuState {
        rip: CODE,
        rflags: 2,
        segments: [segment(0x10 | level, data); 6],
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
    state.segments[CpuState::CS] = segment(0x08 | level, code);
    state
}
