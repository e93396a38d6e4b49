//! What the built files are, without running them: rights, entry point, machine code.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, OpKind};

/// The parts of an ELF file that the tests look at (System V ABI, gABI chapters 4 and 5).
struct Elf<'a> {
    bytes: &'a [u8],
}

struct Segment {
    kind: u32,
    flags: u32,
    offset: usize,
    address: u64,
    file_size: usize,
    memory_size: u64,
}

struct Symbol<'a> {
    name: &'a str,
    address: u64,
    code: &'a [u8],
    section: String,
}

impl Symbol<'_> {
    /// Code of a compute workload; not what the catalogue says about it.
    fn is_kernel(&self) -> bool {
        self.name.contains("programs7compute") && !self.name.contains("WORKLOAD")
    }

    /// As [`Symbol::is_kernel`], or an application's part of a micro workload, which native
    /// processes have not.
    fn is_application(&self) -> bool {
        self.is_kernel() || self.name.contains("programs5micro") && !self.name.contains("WORKLOAD")
    }
}

const LOAD: u32 = 1;
const NOTE: u32 = 4;
const EXECUTE: u32 = 1;
const WRITE: u32 = 2;

impl<'a> Elf<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        assert_eq!(bytes[..6], *b"\x7fELF\x02\x01", "64-bit little-endian ELF");
        Elf { bytes }
    }

    fn number(&self, at: usize, size: usize) -> u64 {
        let mut number = [0; 8];
        number[..size].copy_from_slice(&self.bytes[at..at + size]);
        u64::from_le_bytes(number)
    }

    fn entry(&self) -> u64 {
        self.number(24, 8)
    }

    fn segments(&self) -> Vec<Segment> {
        let table = self.number(32, 8) as usize;
        (0..self.number(56, 2) as usize)
            .map(|index| table + 56 * index)
            .map(|at| Segment {
                kind: self.number(at, 4) as u32,
                flags: self.number(at + 4, 4) as u32,
                offset: self.number(at + 8, 8) as usize,
                address: self.number(at + 24, 8),
                file_size: self.number(at + 32, 8) as usize,
                memory_size: self.number(at + 40, 8),
            })
            .collect()
    }

    /// Section header `index`: name offset, type, address, offset, size, link.
    fn section(&self, index: usize) -> [u64; 6] {
        let at = self.number(40, 8) as usize + 64 * index;
        [(0, 4), (4, 4), (16, 8), (24, 8), (32, 8), (40, 4)]
            .map(|(offset, size)| self.number(at + offset, size))
    }

    fn text(&self, at: usize) -> &'a str {
        let end = self.bytes[at..].iter().position(|&byte| byte == 0).unwrap();
        std::str::from_utf8(&self.bytes[at..at + end]).unwrap()
    }

    /// Functions, and code symbols of the assembler that have a size.
    fn functions(&self) -> Vec<Symbol<'a>> {
        let names = self.section(self.number(62, 2) as usize)[3] as usize;
        let table = (0..self.number(60, 2) as usize)
            .map(|index| self.section(index))
            .find(|section| section[1] == 2)
            .expect("a symbol table");
        let strings = self.section(table[5] as usize)[3] as usize;
        let mut symbols = Vec::new();
        for at in (table[3] as usize..(table[3] + table[4]) as usize).step_by(24) {
            const FUNCTION: u64 = 2;
            let (address, size) = (self.number(at + 8, 8), self.number(at + 16, 8) as usize);
            if self.number(at + 4, 1) & 15 != FUNCTION || size == 0 {
                continue;
            }
            let section = self.section(self.number(at + 6, 2) as usize);
            let start = (address - section[2] + section[3]) as usize;
            symbols.push(Symbol {
                name: self.text(strings + self.number(at, 4) as usize),
                address,
                code: &self.bytes[start..start + size],
                section: self.text(names + section[0] as usize).to_owned(),
            });
        }
        symbols
    }
}

#[test]
fn the_image_has_a_pvh_note_with_its_entry() {
    for image in [images::unaware(), images::hybrid()] {
        check_pvh(&Elf::new(image));
    }
}

fn check_pvh(elf: &Elf<'_>) {
    let segments = elf.segments();
    let note = segments.iter().find(|s| s.kind == NOTE).expect("a note");
    let at = note.offset;
    // Name size, descriptor size, type XEN_ELFNOTE_PHYS32_ENTRY, name, entry.
    assert_eq!(
        [0, 4, 8].map(|offset| elf.number(at + offset, 4)),
        [4, 4, 18]
    );
    assert_eq!(elf.bytes[at + 12..at + 16], *b"Xen\0");
    assert_eq!(elf.number(at + 16, 4), elf.entry());
    assert!(
        segments
            .iter()
            .any(|s| s.kind == LOAD && s.flags & EXECUTE != 0 && s.address == elf.entry() & !0xfff),
        "the entry opens an executable segment"
    );
}

#[test]
fn the_aware_image_has_a_note_with_its_abi_version() {
    let elf = Elf::new(images::aware());
    let segments = elf.segments();
    let note = segments.iter().find(|s| s.kind == NOTE).expect("a note");
    let at = note.offset;
    let name = abi::hypercall::note::NAME;
    assert_eq!(
        [0, 4, 8].map(|offset| elf.number(at + offset, 4)),
        [name.len() as u64, 8, abi::hypercall::note::TYPE.into()]
    );
    assert_eq!(elf.bytes[at + 12..at + 12 + name.len()], *name);
    // The descriptor: version wanted, features needed.
    assert_eq!(
        [24, 28].map(|offset| elf.number(at + offset, 4)),
        [abi::hypercall::VERSION.into(), 0]
    );
    assert!(segments.iter().any(|s| s.kind == LOAD
        && s.flags & EXECUTE != 0
        && (s.address..s.address + s.memory_size).contains(&elf.entry())));
}

#[test]
fn no_segment_is_writable_and_executable() {
    for bytes in [
        images::unaware(),
        images::hybrid(),
        images::aware(),
        images::native(),
    ] {
        for segment in Elf::new(bytes).segments() {
            assert_ne!(segment.flags & (WRITE | EXECUTE), WRITE | EXECUTE);
        }
    }
}

#[test]
fn the_images_lie_between_1_and_2_mib_in_order() {
    for image in [images::unaware(), images::hybrid(), images::aware()] {
        let mut end = 0x10_0000;
        for segment in Elf::new(image).segments() {
            if segment.kind != LOAD {
                continue;
            }
            assert!(segment.address >= end, "segments ascend and don't overlap");
            assert_eq!(segment.address % 4096, 0, "rights end at page borders");
            assert!(segment.file_size as u64 <= segment.memory_size);
            end = segment.address + segment.memory_size;
        }
        assert!(end <= 0x20_0000);
    }
}

/// Every instruction of every kernel is the same in all of them, but for the addresses it names.
#[test]
fn images_and_native_process_run_the_same_machine_code() {
    let check = |one: &[u8], other: &[u8], chosen: fn(&Symbol<'_>) -> bool, least: usize| {
        let (one, other) = (Elf::new(one).functions(), Elf::new(other).functions());
        let mut compared = 0;
        for function in one.iter().filter(|function| chosen(function)) {
            let same = other
                .iter()
                .find(|other| other.name == function.name)
                .unwrap_or_else(|| panic!("{} is missing", function.name));
            assert_eq!(shape(function), shape(same), "{}", function.name);
            compared += 1;
        }
        assert!(compared >= least, "only {compared} functions");
    };
    check(images::unaware(), images::native(), |f| f.is_kernel(), 11);
    check(images::hybrid(), images::native(), |f| f.is_kernel(), 11);
    check(images::aware(), images::native(), |f| f.is_kernel(), 11);
    check(
        images::unaware(),
        images::aware(),
        |f| f.is_application(),
        14,
    );
    check(
        images::aware(),
        images::unaware(),
        |f| f.is_application(),
        14,
    );
}

/// A function's instructions, with every number that may be an address left out: both programs
/// are linked at 1 MiB or above, and the kernels' own constants stay below it or are 64 bits wide.
fn shape(function: &Symbol<'_>) -> Vec<String> {
    let own = function.address..function.address + function.code.len() as u64;
    let number = |value: u64| {
        if (1 << 20..1 << 31).contains(&value) {
            "address".to_owned()
        } else {
            value.to_string()
        }
    };
    Decoder::with_ip(64, function.code, own.start, DecoderOptions::NONE)
        .iter()
        .map(|instruction| {
            let operands: Vec<String> = (0..instruction.op_count())
                .map(|operand| match instruction.op_kind(operand) {
                    OpKind::Register => format!("{:?}", instruction.op_register(operand)),
                    OpKind::NearBranch64 => {
                        let target = instruction.near_branch64();
                        if own.contains(&target) {
                            format!("+{}", target - own.start)
                        } else {
                            "address".to_owned()
                        }
                    }
                    OpKind::Memory => format!(
                        "{:?} {:?} {} {}",
                        instruction.memory_base(),
                        instruction.memory_index(),
                        instruction.memory_index_scale(),
                        if instruction.is_ip_rel_memory_operand() {
                            "address".to_owned()
                        } else {
                            number(instruction.memory_displacement64())
                        }
                    ),
                    _ => number(instruction.immediate(operand)),
                })
                .collect();
            let code = instruction.code();
            format!("{} {code:?} {operands:?}", instruction.len())
        })
        .collect()
}

/// An engine that emulates ring 0 fails on SSE, and a trap does not save ring 3's registers.
/// `core` is compiled with SSE: its formatting is linked, since panics name it, but not reached.
#[test]
fn the_kernel_has_no_sse() {
    let mut seen = 0;
    let images = [images::unaware(), images::hybrid()];
    for function in images.iter().flat_map(|image| Elf::new(image).functions()) {
        if function.section != ".text" || function.name.contains("4core") {
            continue;
        }
        seen += 1;
        for instruction in
            Decoder::with_ip(64, function.code, function.address, DecoderOptions::NONE).iter()
        {
            assert!(
                !instruction.cpuid_features().iter().any(|feature| matches!(
                    feature,
                    CpuidFeature::SSE | CpuidFeature::SSE2 | CpuidFeature::MMX
                )) || instruction.mnemonic() == iced_x86::Mnemonic::Pause,
                "{}: {instruction}",
                function.name
            );
        }
    }
    assert!(seen > 5, "only {seen} functions");
}

/// Ring 3 can execute one section; what it calls must lie there.
#[test]
fn compute_kernels_lie_where_ring_3_may_execute() {
    for image in [images::unaware(), images::hybrid(), images::aware()] {
        let mut seen = 0;
        for function in Elf::new(image).functions() {
            if function.is_application() {
                assert_eq!(function.section, ".utext", "{}", function.name);
                seen += 1;
            }
        }
        assert!(seen >= 10);
    }
}

/// A user process of an aware guest has no other text: a call that leaves the section faults. The
/// compiler puts calls of `core`'s panics there that it can't prove away; they may fault.
#[test]
fn user_text_of_the_aware_image_calls_nothing_else() {
    let elf = Elf::new(images::aware());
    let functions = elf.functions();
    let user: Vec<&Symbol<'_>> = functions.iter().filter(|f| f.section == ".utext").collect();
    let start = user.iter().map(|f| f.address).min().expect("user text") & !0xfff;
    let segment = elf.segments().into_iter().find(|s| s.address == start);
    let end = start + segment.expect("its segment").memory_size;
    for function in user {
        for instruction in
            Decoder::with_ip(64, function.code, function.address, DecoderOptions::NONE).iter()
        {
            if instruction.op_count() == 1 && instruction.op0_kind() == OpKind::NearBranch64 {
                let target = instruction.near_branch64();
                let panics = functions
                    .iter()
                    .any(|f| f.address == target && f.name.contains("panic"));
                assert!(
                    panics || (start..end).contains(&target),
                    "{}: {instruction}",
                    function.name
                );
            }
        }
    }
}
