//! Guest instructions to host code.
//!
//! # What runs as itself
//!
//! All sixteen general registers, the arithmetic flags, x87, MMX and SSE state are in the host's
//! own registers, so an instruction without memory operand is copied as it is. Everything that
//! needs scratch borrows a guest register: its value goes to `Context::spill`, and it comes back
//! when the guest's code next reads it, not before (`need`). Registers that are overwritten first
//! never come back. Where blocks meet, R12 and R13 are borrowed and everything else is home: blocks
//! link freely, and most accesses find two scratch registers that cost nothing. Blocks that use the
//! window need little scratch and meet with every register at home.
//!
//! # Memory
//!
//! An access computes its address into a scratch register, looks it up in the software TLB and
//! uses the host address found there (see [`memory`]), or stays as it is and goes through the window
//! (see [`window`]). The lookup ruins the flags; if somebody
//! still reads them they move to `Context::lazy_flags` first and come back, again, when read.
//!
//! # Faults
//!
//! Nothing of an instruction is committed before the last thing in it that can fault. For every
//! point where it can, a [`Site`] or a [`Mark`] says where the registers are, so the guest sees
//! exact registers. Arithmetic flags are exact if anything reads them before they are
//! overwritten; flags that are dead may be scratch in the frame that an exception pushes.
//!
//! One file per family: `plain` (registers), `memory` (operands), `window` (operands there), `stack`,
//! `strings`, `branch`, `returns`, `privileged`, `invlpg`. Beside them: `registers` what is borrowed meanwhile,
//! `carry` loops that keep CF, `recode` operands in an instruction's own bytes, `buffer` and `layout` where bytes
//! go and what they refer to, `count` runs that count.

mod branch;
mod buffer;
mod carry;
mod count;
mod invlpg;
mod layout;
mod memory;
mod plain;
mod privileged;
mod recode;
mod registers;
mod returns;
mod stack;
mod strings;
mod window;

pub(crate) use count::Path;
pub(crate) use layout::{LEAVING, Layout};
pub(crate) use privileged::inline;

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Encoder, Instruction, OpKind, Register};
use std::mem::offset_of;

use buffer::Buffer;

use crate::{
    checks::{self, Checks, Levels, Outside},
    context::Context,
    cpu::{Bits, FLAG_IF},
    decode::{Class, Decoded, Insn, Mode},
    fault::Fault,
    groups::{self, Plan},
    site::{Gate, Homes, Ip, Kind, Mark, Site, number},
    tlb::{tlb_index, tlb_kind},
    transitions::Transitions,
};

pub(crate) const RAX: u16 = 1;
pub(crate) const RSP: u16 = 1 << 4;
/// Registers that are borrowed wherever blocks of a mode meet: the last that compilers hand out. None
/// where accesses go through the window, which needs no scratch.
pub(crate) fn contract(mode: Mode) -> u16 {
    if mode.window { 0 } else { 1 << 12 | 1 << 13 }
}

/// What lowering a block yields, in buffers that are used again for the next: most blocks are a
/// handful of instructions, and making room for each list anew would cost more than filling it.
#[derive(Default)]
pub(crate) struct Lowered {
    pub code: Buffer,
    /// Offset of the entry for who has everything in place; before it, if not at 0, is the checked one.
    pub entry: u32,
    /// Offset of the entry for who has everything in place and its registers at least at these levels.
    pub inner_entry: u32,
    pub needs: Levels,
    /// Offset of the entry for who has the flags in `Context::lazy_flags`.
    pub lazy_entry: u32,
    pub sites: Vec<Site>,
    pub marks: Vec<Mark>,
    pub system: Vec<Instruction>,
    cold: Vec<Cold>,
    upcoming: Vec<u16>,
    plan: Plan,
    scratch: Vec<u8>,
}

impl Lowered {
    fn clear(&mut self) {
        self.code.clear();
        self.sites.clear();
        self.marks.clear();
        self.system.clear();
        self.cold.clear();
        self.upcoming.clear();
    }
}

/// Lowers one block.
pub(crate) struct Lower<'a> {
    asm: &'a mut Buffer,
    /// What the encoder writes to.
    scratch: &'a mut Vec<u8>,
    /// Bytes of the instruction being lowered.
    raw: &'a [u8],
    /// Address of the block's first byte.
    base: u64,
    block: u32,
    first_site: usize,
    first_system: usize,
    layout: &'a Layout,
    encoder: &'a mut Encoder,
    mode: Mode,
    homes: Homes,
    /// Borrowed registers that hold something until the access being emitted is done.
    busy: u16,
    plan: &'a mut Plan,
    checks: Checks,
    /// Registers that hold a group's host address, and how many groups have had one.
    pinned: u16,
    looked_up: usize,
    sites: &'a mut Vec<Site>,
    marks: &'a mut Vec<Mark>,
    system: &'a mut Vec<Instruction>,
    cold: &'a mut Vec<Cold>,
    /// Registers used by the instructions from each index on, for choosing scratch.
    upcoming: &'a mut Vec<u16>,
    at: usize,
    /// The doorbell of the branch that comes next has been rung.
    rung: bool,
    /// The instruction that comes next [branches back](carry::goes_around) to the head; whether CF lives
    /// there.
    goes_around: Option<bool>,
    /// How the flags can be made again behind this instruction.
    recipe: Option<returns::Recipe>,
}

/// Code to be placed after the block's straight line.
enum Cold {
    String(strings::More),
    /// The way out of `site`, which the rel32 at `patch` leads to.
    Exit {
        site: usize,
        patch: usize,
    },
    /// As `Exit`, of an access whose address the runtime finds in a register.
    Known {
        site: usize,
        patch: usize,
        register: u8,
        address: u64,
    },
    Raise {
        patch: usize,
        homes: Homes,
        ip: u64,
        fault: Fault,
    },
}

/// Where a block goes and what its numbers start at.
pub(crate) struct Place {
    /// Guest instruction pointer of the first byte.
    pub ip: u64,
    pub base: u64,
    pub block: u32,
    pub first_site: usize,
    pub first_system: usize,
    /// Accesses may share lookups.
    pub groups: bool,
    /// Accesses that the window is not for.
    pub outside: Outside,
}

/// Lowers `decoded`, whose first byte is `bytes[0]`, into the buffers of `lowered`.
///
/// # Errors
/// The text of an encoding that couldn't be made: a bug, reported with the instruction.
pub(crate) fn lower<'a>(
    decoded: &'a Decoded,
    bytes: &'a [u8],
    mode: Mode,
    place: Place,
    layout: &'a Layout,
    encoder: &'a mut Encoder,
    lowered: &'a mut Lowered,
) -> Result<(), String> {
    lowered.clear();
    let ip = place.ip;
    let Lowered {
        code,
        sites,
        marks,
        system,
        cold,
        upcoming,
        plan,
        scratch,
        ..
    } = lowered;
    plan.clear();
    if place.groups && !mode.window {
        groups::plan(&decoded.insns, mode, plan);
    }
    let mut lower = Lower {
        asm: code,
        scratch,
        raw: &[],
        base: place.base,
        block: place.block,
        first_site: place.first_site,
        first_system: place.first_system,
        layout,
        encoder,
        mode,
        homes: Homes {
            spilled: contract(mode),
            lazy: false,
            carry: false,
            rsp: 0,
        },
        busy: 0,
        pinned: 0,
        looked_up: 0,
        plan,
        checks: checks::plan(&decoded.insns, mode, place.outside),
        sites,
        marks,
        system,
        cold,
        upcoming,
        at: 0,
        rung: false,
        goes_around: None,
        recipe: None,
    };
    lower.checked_entry(ip);
    let entry = lower.position() as u32;
    if let Some(first) = decoded.insns.first() {
        lower.compare_head(first);
    }
    let inner_entry = lower.position() as u32;
    let needs = lower.checks.needs;
    let saved = (!mode.window && registers::saves_first(&decoded.insns)).then(|| {
        lower.save_flags(0);
        lower.position() as u32
    });
    let mut seen = 0;
    lower.upcoming.resize(decoded.insns.len(), 0);
    for (slot, insn) in lower.upcoming.iter_mut().zip(&decoded.insns).rev() {
        // Nearest use wins: a register used soon shadows the rest.
        *slot = seen;
        seen |= insn.used();
    }
    for (at, insn) in decoded.insns.iter().enumerate() {
        lower.at = at;
        if let Some(next) = decoded.insns.get(at + 1) {
            lower.ring_early(insn, next);
            lower.goes_around = (!mode.window && carry::goes_around(&decoded.insns, next))
                .then(|| decoded.insns[0].live_in != 0);
        }
        if !lower.may_wait(insn, decoded.insns.get(at + 1)) {
            lower.settle_rsp();
        }
        if mode.window && insn.class == Class::Return && mode.bits == Bits::Bits64 {
            lower.recipe = returns::recipe(&decoded.insns[..at]);
        }
        let raw = decoded.raw(bytes, ip, insn);
        lower.raw = raw;
        lower
            .insn(insn, raw)
            .map_err(|error| format!("{error} for `{}` at {:#x}", insn.instr, insn.instr.ip()))?;
        let shadow = at > 0 && matches!(decoded.insns[at - 1].class, Class::Sti);
        if shadow && !insn.class.ends_block() {
            lower.interrupt_window(insn);
        }
    }
    lower.settle_rsp();
    let goes_on = |last: &&Insn| last.class == Class::Branch || !last.class.ends_block();
    if let Some(last) = decoded.insns.last().filter(goes_on) {
        lower.leave_lazily(last.live_out != 0);
        if last.class != Class::Branch {
            lower.count(Path::Direct);
        }
        if lower.checks.lost {
            let kind = Kind::Outside {
                steps: 0,
                missed: Outside::default(),
            };
            lower.exit(last.instr.next_ip(), kind);
        } else {
            lower.direct(last.instr.ip(), last.instr.next_ip());
        }
    }
    lower.cold();
    let live = decoded
        .insns
        .first()
        .is_some_and(|first| first.live_in != 0);
    let lazy_entry = match saved {
        Some(position) => position,
        None if live => lower.lazy_entry(entry),
        None => entry,
    };
    if !lower.asm.fits() {
        return Err(format!("a block of {} bytes", lower.asm.length()));
    }
    lowered.entry = entry;
    lowered.inner_entry = inner_entry;
    lowered.needs = needs;
    lowered.lazy_entry = lazy_entry;
    Ok(())
}

impl Lower<'_> {
    /// An entry that brings the flags home first.
    fn lazy_entry(&mut self, entry: u32) -> u32 {
        let position = self.position() as u32;
        self.homes = Homes {
            spilled: contract(self.mode),
            lazy: true,
            carry: false,
            rsp: 0,
        };
        self.restore_flags(0);
        self.settle_registers();
        let start = self.base + u64::from(entry);
        self.jump_to(0xe9, start);
        position
    }

    fn insn(&mut self, insn: &Insn, raw: &[u8]) -> Result<(), String> {
        self.compare(insn);
        if self.windowed() {
            self.count(Path::Window);
        }
        if let Some(done) = self.in_window(insn, raw) {
            return done;
        }
        match insn.class {
            Class::Nop => Ok(()),
            Class::Plain => self.plain(insn, raw),
            Class::Lea => self.lea(insn),
            Class::Memory => self.memory(insn),
            Class::BitString => self.bit_string(insn),
            Class::MaskedMove => self.masked_move(insn),
            Class::Push => self.push(insn),
            Class::Pop => self.pop(insn),
            Class::Leave => self.leave_frame(insn),
            Class::Cli | Class::Sti => {
                let flag = self.layout.slot(offset_of!(Context, interrupt_flag));
                let enabled = if insn.class == Class::Sti { FLAG_IF } else { 0 };
                dynasm!(self.asm ; .arch x64 ; mov QWORD [flag], enabled as i32);
                Ok(())
            }
            Class::Jump => {
                self.jump(insn);
                Ok(())
            }
            Class::Branch => self.branch(insn),
            Class::Loop => self.loop_branch(insn),
            Class::JumpIndirect => self.jump_indirect(insn),
            Class::Call => self.call(insn),
            Class::CallIndirect => self.call_indirect(insn),
            Class::Return => self.ret(insn),
            Class::CallInline => self.call_inline(insn),
            Class::ReturnInline => {
                self.return_inline(insn);
                Ok(())
            }
            Class::Privileged => self.privileged(insn),
            Class::System if self.transition(insn) || self.port(insn) => Ok(()),
            Class::System => {
                let index = (self.first_system + self.system.len()) as u32;
                self.system.push(insn.instr);
                self.exit(insn.instr.ip(), Kind::System { index });
                Ok(())
            }
            Class::Fault(raised) => {
                self.raise(insn.instr.ip(), raised.into());
                Ok(())
            }
        }
    }

    /// Bookkeeping after the body of `insn` has been emitted.
    fn done(&mut self, insn: &Insn) {
        self.homes.spilled &= !insn.writes;
        if insn.flags.modified != 0 {
            self.homes.lazy = false;
        }
    }

    fn encode(&mut self, instr: &Instruction) -> Result<(), String> {
        let rip = self.address(self.position());
        self.scratch.clear();
        self.encoder.set_buffer(std::mem::take(self.scratch));
        let encoded = self.encoder.encode(instr, rip);
        *self.scratch = self.encoder.take_buffer();
        self.asm.slice(self.scratch);
        encoded.map(drop).map_err(|error| error.to_string())
    }

    fn position(&self) -> usize {
        self.asm.length()
    }

    fn address(&self, position: usize) -> u64 {
        self.base + position as u64
    }

    fn mark(&mut self, ip: Ip) {
        self.marks.push(Mark {
            offset: self.position() as u32,
            ip,
            homes: self.homes,
            at: self.at as u8,
        });
    }

    fn add_site(&mut self, ip: u64, kind: Kind) -> usize {
        debug_assert_eq!(self.homes.rsp, 0, "RSP waits at a site");
        self.sites.push(Site {
            block: self.block,
            ip,
            homes: self.homes,
            kind,
        });
        self.sites.len() - 1
    }

    /// Leaves for the runtime here and now.
    fn exit(&mut self, ip: u64, kind: Kind) {
        let site = self.add_site(ip, kind);
        self.exit_through(site, 0);
    }

    fn exit_through(&mut self, site: usize, phase: u64) {
        let number = number(self.first_site + site, phase);
        let at = self.address(self.position());
        self.asm.array(self.layout.leaving(number, at));
    }

    /// `opcode rel32` to an absolute address.
    fn jump_to(&mut self, opcode: u8, address: u64) {
        self.asm.push(opcode);
        let next = self.address(self.position() + 4);
        self.asm.push_i32(address.wrapping_sub(next) as i32);
    }

    /// Fills in the rel32 at `patch` to reach `position`.
    fn bind(&mut self, patch: usize, position: usize) {
        let rel = position as i32 - (patch as i32 + 4);
        self.asm.patch(patch, rel.to_le_bytes());
    }

    fn cold(&mut self) {
        let mut colds = std::mem::take(self.cold);
        for cold in colds.drain(..) {
            match cold {
                Cold::String(more) => self.cold_string(more),
                Cold::Raise {
                    patch,
                    homes,
                    ip,
                    fault,
                } => self.cold_raise(patch, homes, ip, fault),
                Cold::Exit { site, patch } => {
                    self.bind(patch, self.position());
                    let here = self.address(self.position());
                    if let Kind::Direct { stub, .. }
                    | Kind::Indirect {
                        gate: Some(Gate { stub, .. }),
                        ..
                    } = &mut self.sites[site].kind
                    {
                        *stub = here;
                    }
                    self.exit_through(site, 0);
                }
                Cold::Known {
                    site,
                    patch,
                    register,
                    address,
                } => {
                    self.bind(patch, self.position());
                    self.load_constant(register, address);
                    self.exit_through(site, 0);
                }
            }
        }
        *self.cold = colds;
    }

    fn transitions(&self) -> Transitions {
        self.layout.transitions[usize::from(self.mode.bank)]
    }

    fn tlb(&self, write: bool) -> i32 {
        let kind = tlb_kind(self.mode.user, write);
        self.layout.tlb[tlb_index(self.mode.bank.into(), kind)]
    }
}

/// Puts settled registers and flags where blocks and stubs may look for them: flags in either place,
/// the registers that modes without a window borrow in their slots.
pub(crate) fn lend(context: &mut Context) {
    context.lazy_flags = (context.flags & 0xd5) << 8 | context.flags >> 11 & 1;
    context.spill[12] = context.gpr[12];
    context.spill[13] = context.gpr[13];
}

/// True if the body of `insn` wants the host's flags to be the guest's.
fn needs_flags(insn: &Insn) -> bool {
    insn.flags.read != 0 || insn.flags.modified != 0 && insn.live_out & !insn.kills() != 0
}

/// The 64-bit register with this number.
fn gpr64(number: u8) -> Register {
    Register::RAX + u32::from(number)
}

/// Operand that is memory, if there is one.
fn memory_operand(instr: &Instruction) -> Option<u32> {
    (0..instr.op_count()).find(|&operand| instr.op_kind(operand) == OpKind::Memory)
}
