//! Access rights: page-table entries of every kind, against control registers, against accesses.
//!
//! Each case maps one address by a leaf entry and the entry above it, with bits chosen one by one, sets
//! the control bits that say what they mean, and makes one access. A model that knows SDM 3A 4.6 and
//! 4.7, and nothing of the walker, predicts error code, CR2, accessed and dirty bits.
//!
//! There are some twelve million cases for each page size. `TRAPLINE_ACCESS_STRIDE` says which are
//! looked at: every so many-th one, by default every 127th.

use crate::rig::{End, FREE, RSP0, Rig, STACK, TABLES};

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
/// Beyond the physical address width.
const TOO_HIGH: u64 = 1 << 45;
/// Part of the frame's address in a small page, reserved in a large one.
const TOO_LOW: u64 = 1 << 13;
const KEY: u64 = 3;

/// Physical memory that is looked at, through tables of their own.
const FRAME: u64 = 0x60_0000;
const TARGET: u64 = 0x80_0000_0000 + FRAME;
const POINTERS: u64 = 0x5_0000;
const DIRECTORY: u64 = 0x5_1000;
const TABLE: u64 = 0x5_2000;
/// A large page for ring 3's code, where it lies and where ring 0's does.
const USER_CODE: u64 = 0x40_0000;
const SUPERVISOR_CODE: u64 = FREE;

const CR0_WP: u64 = 1 << 16;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_NXE: u64 = 1 << 11;
const FLAG_AC: u64 = 1 << 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// What one case sets.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB.
    size: usize,
    leaf: u64,
    above: u64,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    nxe: bool,
    /// Rights of the leaf's protection key, if there are such.
    keys: Option<u32>,
    user: bool,
    access: Access,
}

impl Case {
    /// Case number `index`; None past the last.
    fn new(size: usize, mut index: usize) -> Option<Case> {
        let mut digit = |base: usize| {
            let value = index % base;
            index /= base;
            value
        };
        let mut bits = |choices: &[u64]| {
            choices
                .iter()
                .filter(|_| digit(2) == 1)
                .fold(0, |bits, bit| bits | bit)
        };
        let large = if size > 0 { TOO_LOW } else { 0 };
        let leaf = bits(&[P, W, U, NX, A, D, TOO_HIGH | large]);
        let above = bits(&[P, W, U, NX, A]);
        let above = above | if digit(4) == 0 { TOO_HIGH } else { 0 };
        let case = Case {
            size,
            leaf: leaf | KEY << 59,
            above,
            wp: digit(2) == 1,
            smep: digit(2) == 1,
            smap: digit(2) == 1,
            ac: digit(2) == 1,
            nxe: digit(2) == 1,
            keys: [None, Some(0), Some(1), Some(2)][digit(4)],
            user: digit(2) == 1,
            access: [Access::Read, Access::Write, Access::Fetch][digit(3)],
        };
        (index == 0).then_some(case)
    }

    /// The error code of the fault that has to come.
    fn fault(&self) -> Option<u32> {
        let (write, fetch) = (self.access == Access::Write, self.access == Access::Fetch);
        let tried = u32::from(write) << 1
            | u32::from(self.user) << 2
            | u32::from(fetch && (self.nxe || self.smep)) << 4;
        for entry in [self.above, self.leaf] {
            if entry & P == 0 {
                return Some(tried);
            }
            let low = entry == self.leaf && self.size > 0 && entry & TOO_LOW != 0;
            if entry & TOO_HIGH != 0 || low || entry & NX != 0 && !self.nxe {
                return Some(tried | 1 | 8);
            }
        }
        let both = self.above & self.leaf;
        let (writable, of_user) = (both & W != 0, both & U != 0);
        let executable = (self.above | self.leaf) & NX == 0;
        let locked = of_user
            && !fetch
            && match self.keys {
                None | Some(0) => false,
                Some(1) => true,
                Some(_) => write && (self.user || self.wp),
            };
        let allowed = if self.user {
            of_user
                && match self.access {
                    Access::Read => true,
                    Access::Write => writable,
                    Access::Fetch => executable,
                }
        } else {
            match self.access {
                Access::Fetch => executable && !(self.smep && of_user),
                _ if self.smap && of_user && !self.ac => false,
                Access::Read => true,
                Access::Write => writable || !self.wp,
            }
        };
        (!allowed || locked).then_some(tried | 1 | u32::from(locked) << 5)
    }
}

fn prepare() -> Rig {
    let mut rig = Rig::long();
    rig.word(TABLES + 8, POINTERS | P | W | U);
    rig.word(TABLES + 0x2000 + 8 * 2, USER_CODE | PS | P | W | U);
    rig.put(FRAME, &[0xf4]);
    for at in [USER_CODE, SUPERVISOR_CODE] {
        // wrpkru, and without it: mov eax, [rbx + 0x800]; mov [rbx + 0x800], eax; jmp rbx.
        for (number, access) in [
            &[0x8b, 0x83, 0, 8, 0, 0, 0xf4][..],
            &[0x89, 0x83, 0, 8, 0, 0, 0xf4],
            &[0xff, 0xe3],
        ]
        .into_iter()
        .enumerate()
        {
            let mut code = vec![0x0f, 0x01, 0xef];
            code.extend(access);
            rig.put(at + 16 * number as u64, &code);
        }
    }
    rig.state.gpr[3] = TARGET;
    rig
}

/// Runs a case; what is wrong with it.
fn check(
    rig: &mut Rig,
    supervisor: &engine_core::CpuState,
    user: &engine_core::CpuState,
    case: &Case,
) -> Option<String> {
    // Where leaf and the entry above it are.
    let at = match case.size {
        0 => [TABLE, DIRECTORY + 8 * 3],
        1 => [DIRECTORY + 8 * 3, POINTERS],
        _ => [POINTERS, TABLES + 8],
    };
    let tables = [TABLE, DIRECTORY, POINTERS];
    rig.word(TABLES + 8, POINTERS | P | W | U);
    rig.word(POINTERS, DIRECTORY | P | W | U);
    rig.word(DIRECTORY + 8 * 3, TABLE | P | W | U);
    let frame = if case.size == 2 { 0 } else { FRAME };
    let leaf = case.leaf | frame | if case.size == 0 { 0 } else { PS };
    let above = case.above | tables[case.size];
    rig.word(at[0], leaf);
    rig.word(at[1], above);

    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    rig.state = if case.user { *user } else { *supervisor };
    let state = &mut rig.state;
    state.cr0 = state.cr0 & !CR0_WP | flag(case.wp, CR0_WP);
    state.cr4 |=
        flag(case.smep, CR4_SMEP) | flag(case.smap, CR4_SMAP) | flag(case.keys.is_some(), CR4_PKE);
    state.efer = state.efer & !EFER_NXE | flag(case.nxe, EFER_NXE);
    state.rflags |= flag(case.ac, FLAG_AC);
    state.gpr[0] = u64::from(case.keys.unwrap_or(0)) << (2 * KEY);
    let code = if case.user {
        USER_CODE
    } else {
        SUPERVISOR_CODE
    };
    state.rip = code + 16 * case.access as u64 + if case.keys.is_some() { 0 } else { 3 };
    let end = rig.run();
    let after = rig.after();

    let expected = case.fault();
    let found = match end {
        End::Vector(14) => Some(rig.error()),
        End::Vector(13) if case.user => None,
        End::Halt if !case.user => None,
        other => return Some(format!("{other:?} at {:#x}", after.rip)),
    };
    if found != expected {
        return Some(format!("expected {expected:x?}, found {found:x?}"));
    }
    let access = TARGET
        + if case.access == Access::Fetch {
            0
        } else {
            0x800
        };
    if expected.is_some() && after.cr2 != access {
        return Some(format!("cr2 {:#x}", after.cr2));
    }
    let (leaf_after, above_after) = (rig.read(at[0]), rig.read(at[1]));
    let good = if expected.is_some() {
        leaf_after == leaf && above_after | A == above | A
    } else {
        let dirty = flag(case.access == Access::Write, D);
        leaf_after == leaf | A | dirty && above_after == above | A
    };
    (!good).then(|| format!("entries {leaf:#x} {above:#x} became {leaf_after:#x} {above_after:#x}"))
}

#[test]
fn user_pages_are_open_to_ring_0_while_ac_is_set() {
    use iced_x86::code_asm::*;
    const PAGE: u64 = USER_CODE + 0x1000;
    // What clears AC, each followed by an access.
    let ways: [&[u8]; 3] = [
        // clac
        &[0x0f, 0x01, 0xca],
        // push 2; popfq
        &[0x6a, 0x02, 0x9d],
        // mov ecx, esp; push 0x10; push rcx; push 2; push 0x18; call +0; add dword [rsp], 8; iretq
        &[
            0x89, 0xe1, 0x6a, 0x10, 0x51, 0x6a, 0x02, 0x6a, 0x18, 0xe8, 0, 0, 0, 0, 0x83, 0x04,
            0x24, 0x06, 0x48, 0xcf,
        ],
    ];
    for way in ways {
        let mut rig = prepare();
        rig.state.cr4 |= CR4_SMAP;
        rig.expect(14, 3, |asm| {
            asm.mov(ebx, PAGE as i32)?;
            asm.mov(esi, 1000)?;
            asm.stac()?;
            let mut again = asm.create_label();
            asm.set_label(&mut again)?;
            asm.inc(dword_ptr(rbx))?;
            asm.dec(esi)?;
            asm.jnz(again)?;
            asm.mov(edi, dword_ptr(rbx))?;
            asm.db(way)?;
            asm.mov(dword_ptr(rbx), esi)
        });
        assert_eq!((rig.after().gpr[7], rig.after().cr2), (1000, PAGE));
        // A loop under AC stays in translated code.
        assert!(rig.vcpu.entries() < 100, "{}", rig.vcpu.entries());
    }
}

#[test]
fn every_access_has_the_rights_that_its_entries_give() {
    let stride =
        std::env::var("TRAPLINE_ACCESS_STRIDE").map_or(127, |text| text.parse().expect("a number"));
    let mut rig = prepare();
    let supervisor = rig.state;
    let rig_user = Rig::long().in_ring_3();
    let mut user = supervisor;
    user.segments = rig_user.state.segments;
    assert_eq!(
        (supervisor.gpr[4], rig.read(crate::rig::TSS + 4)),
        (STACK, RSP0)
    );
    let (mut cases, mut faults) = (0, 0);
    let mut wrong = Vec::new();
    for size in 0..3 {
        let mut index = 0;
        while let Some(case) = Case::new(size, index) {
            index += stride;
            cases += 1;
            faults += usize::from(case.fault().is_some());
            if let Some(what) = check(&mut rig, &supervisor, &user, &case) {
                wrong.push(format!("{what}: {case:x?}"));
            }
        }
    }
    println!("{cases} cases, {faults} faults");
    assert!(faults > 0 && faults < cases);
    let shown = wrong.len().min(10);
    assert!(
        wrong.is_empty(),
        "{} cases\n{}",
        wrong.len(),
        wrong[..shown].join("\n")
    );
}
