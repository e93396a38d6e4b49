//! Memory operands: address, software TLB, body.
//!
//! ```text
//! retry:  lea   a, [guest operand]        ; plus the segment base, if there is one
//!         mov   t, a
//!         shr   t, 8                      ; entry index * 16
//!         and   t, (entries - 1) * 16
//!         sub   a, [t + TLB]              ; offset in the page, if the page matches
//!         cmp   a, 4096 - size            ; no match, or across the end: either is above
//!         ja    slow
//!         add   a, [t + TLB + 8]          ; host address
//!         body  [a]
//! ```
//!
//! The slow path hands the address to the runtime, which fills the TLB and says `retry`; or, for
//! device memory, accesses across pages and writes to translated code, puts a buffer's address
//! into `a` and says `bounce`: a second copy of the body, after which the buffer is written back.

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use std::mem::offset_of;

use super::{
    Cold, Lower, Path, gpr64, lasting, memory_operand, needs_flags,
    recode::{self, Parts},
};
use crate::{
    context::Context,
    cpu::Bits,
    decode::{Class, Insn, data_segment},
    groups::{Group, Member},
    site::{Homes, Ip, Kind, Mark, Place, Shared, Slow},
    tlb::TLB_ENTRIES,
};

/// Where an operand is.
#[derive(Clone, Copy)]
pub(super) enum Address<'a> {
    /// The instruction's memory operand, its displacement changed by this much.
    Operand(&'a Instruction, i64),
    /// As `Operand`, further displaced by a bit offset in this register.
    Bits(&'a Instruction, Register),
    /// RSP plus this, in the stack segment.
    Stack(i32),
    /// RBP, in the stack segment.
    Frame,
    /// The lowest byte of a group.
    Group(&'a Group),
}

/// An access whose body is being emitted.
pub(super) struct Open {
    /// Holds the operand's host address in the body, but for `offset`.
    pub register: u8,
    pub offset: i32,
    /// The lookup is a group's: there is no slow path of its own.
    grouped: bool,
    table: u8,
    ip: u64,
    size: u32,
    write: bool,
    read: bool,
    stack: bool,
    limited: Option<u8>,
    alignment: u8,
    disp: i32,
    retry: usize,
    miss: usize,
    body: usize,
    homes: Homes,
    first_mark: usize,
    locked: bool,
    relied: bool,
    pinned: bool,
}

/// A lookup just emitted.
struct Lookup {
    register: u8,
    table: u8,
    stack: bool,
    limited: Option<u8>,
    /// Where things were when it began.
    homes: Homes,
    retry: usize,
    miss: usize,
}

/// An access whose slow path is still to be emitted.
pub(super) struct Pending {
    open: Open,
    /// Of the body, behind its last one.
    last_mark: usize,
    /// Where the body ends.
    resume: usize,
    after: Homes,
    next_ip: Option<u64>,
    rsp: i32,
}

impl<'a> Lower<'a> {
    /// The instruction being lowered, taken apart, if its operand can be replaced.
    fn parts(&self) -> Option<Parts<'a>> {
        if self.mode.bits == Bits::Bits64 {
            Parts::of(self.raw)
        } else {
            None
        }
    }
}

impl Lower<'_> {
    /// An instruction with one memory operand and nothing else to it.
    pub(super) fn memory(&mut self, insn: &Insn) -> Result<(), String> {
        let Some(memory) = insn
            .memory
            .filter(|memory| memory.size != 0 && memory.size <= 512)
        else {
            return Err("no size is known".into());
        };
        self.operand(insn, memory.size, memory.write, 0, |lower, open| {
            let parts = lower.parts();
            if parts.is_some_and(|parts| {
                parts.based(open.register, open.offset, insn.high_byte, lower.asm)
            }) {
                return Ok(());
            }
            let mut body = with_operand(&insn.instr);
            body.set_memory_base(gpr64(open.register));
            if open.offset != 0 {
                body.set_memory_displacement64(open.offset as i64 as u64);
                body.set_memory_displ_size(1);
            }
            lower.encode(&body)
        })
    }

    /// Emits the access of `insn` with `body` as its last part.
    fn operand(
        &mut self,
        insn: &Insn,
        size: u32,
        write: bool,
        avoid: u16,
        body: impl FnOnce(&mut Self, &Open) -> Result<(), String>,
    ) -> Result<(), String> {
        self.need(insn.reads);
        let address = Address::Operand(&insn.instr, 0);
        let open = self.open(insn, address, size, write, avoid)?;
        self.flags_for(insn);
        self.need(insn.reads);
        self.mark(Ip::At(insn.instr.ip()));
        body(self, &open)?;
        self.done(insn);
        self.close(open, Some(insn.instr.next_ip()), 0);
        Ok(())
    }

    /// bt and its kin with a bit offset in a register, which reaches beyond the operand.
    pub(super) fn bit_string(&mut self, insn: &Insn) -> Result<(), String> {
        let size = insn.memory.map_or(0, |memory| memory.size);
        let write = insn.memory.is_some_and(|memory| memory.write);
        let offset = insn.instr.op1_register();
        self.need(insn.reads);
        let open = self.open(insn, Address::Bits(&insn.instr, offset), size, write, 0)?;
        let bit = self.take(1 << open.register | 1 << open.table, insn);
        self.busy |= 1 << bit;
        let number = offset.full_register().number() as u8;
        self.need(insn.reads);
        dynasm!(self.asm
            ; .arch x64
            ; mov Rd(bit), Rd(number)
            ; and Rd(bit), size as i32 * 8 - 1
        );
        if needs_flags(insn) && !self.homes.lazy {
            return Err("flags weren't saved".into());
        }
        self.flags_for(insn);
        self.need(insn.reads);
        self.mark(Ip::At(insn.instr.ip()));
        let mut body = with_operand(&insn.instr);
        body.set_memory_base(gpr64(open.register));
        body.set_op1_register(match size {
            2 => Register::AX + u32::from(bit),
            4 => Register::EAX + u32::from(bit),
            _ => gpr64(bit),
        });
        self.encode(&body)?;
        self.done(insn);
        self.close(open, Some(insn.instr.next_ip()), 0);
        Ok(())
    }

    /// maskmovq and maskmovdqu, whose address is RDI and nothing else: it holds the host's address
    /// during the body.
    pub(super) fn masked_move(&mut self, insn: &Insn) -> Result<(), String> {
        const RDI: u8 = 7;
        let mut operand = insn.instr;
        let (size, base) = match insn.instr.op0_kind() {
            OpKind::MemorySegRDI => (insn.instr.op1_register().size(), Register::RDI),
            OpKind::MemorySegEDI => (insn.instr.op1_register().size(), Register::EDI),
            _ => (insn.instr.op1_register().size(), Register::DI),
        };
        operand.set_memory_base(base);
        operand.set_memory_index(Register::None);
        operand.set_memory_displacement64(0);
        operand.set_memory_displ_size(0);
        self.need(insn.reads);
        let open = self.open(insn, Address::Operand(&operand, 0), size as u32, true, 0)?;
        self.need(insn.reads);
        self.spill(RDI);
        let at = open.register;
        dynasm!(self.asm ; .arch x64 ; mov rdi, Rq(at));
        self.mark(Ip::At(insn.instr.ip()));
        let mut body = insn.instr;
        body.set_op0_kind(OpKind::MemorySegRDI);
        body.set_segment_prefix(Register::None);
        self.encode(&body)?;
        self.close(open, Some(insn.instr.next_ip()), 0);
        Ok(())
    }

    /// Emits address and lookup. The body follows, then `close`.
    pub(super) fn open(
        &mut self,
        insn: &Insn,
        address: Address<'_>,
        size: u32,
        write: bool,
        avoid: u16,
    ) -> Result<Open, String> {
        if let Some(member) = self.plan.member(self.at) {
            self.count(Path::Shared);
            return self.open_member(insn, member, avoid);
        }
        self.count(Path::Lookup);
        let lookup = self.look_up(insn, address, size, write, avoid)?;
        Ok(Open {
            register: lookup.register,
            offset: 0,
            grouped: false,
            table: lookup.table,
            ip: insn.instr.ip(),
            size,
            write,
            // What pushes and pops store to is not what they read.
            read: !write
                || !matches!(
                    insn.class,
                    Class::Push
                        | Class::Pop
                        | Class::Call
                        | Class::CallIndirect
                        | Class::CallInline
                ) && insn.memory.is_some_and(|memory| memory.read),
            stack: lookup.stack,
            limited: lookup.limited,
            alignment: insn.memory.map_or(1, |memory| memory.alignment),
            disp: self.tlb(write),
            retry: lookup.retry,
            miss: lookup.miss,
            body: self.position(),
            homes: lookup.homes,
            first_mark: self.marks.len(),
            locked: is_locked(&insn.instr),
            relied: insn.class == Class::CallInline,
            pinned: self.pins_write(),
        })
    }

    /// A group of writes isn't over.
    fn pins_write(&self) -> bool {
        let mut groups = self.plan.groups[..self.looked_up].iter();
        groups.any(|group| group.write && self.pinned >> group.register & 1 == 1)
    }

    fn open_member(&mut self, insn: &Insn, member: Member, avoid: u16) -> Result<Open, String> {
        let group = self.plan.groups[member.group];
        if group.head == self.at {
            let address = Address::Group(&group);
            let lookup =
                self.look_up(insn, address, group.bytes, group.write, avoid | group.used)?;
            self.pinned |= 1 << lookup.register;
            self.plan.groups[member.group].register = lookup.register;
            self.looked_up = self.looked_up.max(member.group + 1);
            let kind = Kind::Group(Shared {
                size: group.bytes as u16,
                write: group.write,
                retry: self.address(lookup.retry),
                steps: (group.last - group.head + 1) as u16,
            });
            let here = std::mem::replace(&mut self.homes, lookup.homes);
            let site = self.add_site(insn.instr.ip(), kind);
            self.homes = here;
            let disp = self.tlb(group.write);
            let Lookup {
                register,
                table,
                miss,
                ..
            } = lookup;
            self.cold.push(Cold::Group {
                site,
                miss,
                register,
                table,
                disp,
            });
        }
        let register = self.plan.groups[member.group].register;
        self.busy = avoid | 1 << register;
        Ok(Open {
            register,
            offset: member.offset,
            grouped: true,
            table: register,
            ip: insn.instr.ip(),
            size: group.bytes,
            write: group.write,
            read: !group.write,
            stack: false,
            limited: None,
            alignment: 1,
            disp: 0,
            retry: 0,
            miss: 0,
            body: self.position(),
            homes: self.homes,
            first_mark: self.marks.len(),
            locked: false,
            relied: false,
            pinned: false,
        })
    }

    /// Emits an address and its lookup into a scratch register.
    fn look_up(
        &mut self,
        insn: &Insn,
        address: Address<'_>,
        size: u32,
        write: bool,
        avoid: u16,
    ) -> Result<Lookup, String> {
        if insn.live_in != 0 && !self.homes.lazy {
            self.save_flags(avoid);
            self.need(insn.reads);
        }
        let register = self.take(avoid, insn);
        let table = self.take(avoid | 1 << register, insn);
        self.busy = avoid | 1 << register;
        let homes = self.homes;
        let retry = self.position();
        let segment = self.address_into(address, register, table, size)?;
        let limited = (self.mode.limited >> segment & 1 == 1).then_some(segment);
        let disp = self.tlb(write);
        dynasm!(self.asm
            ; .arch x64
            ; mov Rq(table), Rq(register)
            ; shr Rq(table), 8
            ; and Rd(table), (TLB_ENTRIES as i32 - 1) << 4
            ; sub Rq(register), [Rq(table) + disp]
            ; cmp Rq(register), 4096 - size as i32
        );
        match limited {
            // Only the runtime knows whether this may be.
            Some(_) => self.asm.push(0xe9),
            None => self.asm.extend([0x0f, 0x87]),
        }
        let miss = self.position();
        self.asm.push_i32(0);
        dynasm!(self.asm ; .arch x64 ; add Rq(register), [Rq(table) + disp + 8]);
        Ok(Lookup {
            register,
            table,
            stack: segment == 2,
            limited,
            homes,
            retry,
            miss,
        })
    }

    /// Ends the body. `next_ip` is where the guest goes on if nothing of the instruction is left
    /// but to move RSP by `rsp`.
    pub(super) fn close(&mut self, open: Open, next_ip: Option<u64>, rsp: i32) {
        self.busy = 0;
        if open.grouped {
            let done = self
                .plan
                .member(self.at)
                .is_some_and(|member| self.plan.groups[member.group].last == self.at);
            if done {
                self.pinned &= !(1 << open.register);
            }
            return;
        }
        self.cold.push(Cold::Memory(Pending {
            last_mark: self.marks.len(),
            resume: self.position(),
            after: self.homes,
            next_ip,
            rsp,
            open,
        }));
    }

    /// Hands the address of a lookup that missed to the runtime.
    pub(super) fn cold_group(&mut self, site: usize, miss: usize, registers: [u8; 2], disp: i32) {
        self.bind(miss, self.position());
        let [register, table] = registers;
        let ea = self.layout.slot(offset_of!(Context, ea));
        dynasm!(self.asm
            ; .arch x64
            ; add Rq(register), [Rq(table) + disp]
            ; mov [ea], Rq(register)
        );
        self.exit_through(site, 0);
    }

    pub(super) fn cold_memory(&mut self, pending: Pending) {
        let Pending {
            open,
            last_mark,
            resume,
            after,
            next_ip,
            rsp,
        } = pending;
        self.homes = open.homes;
        self.bind(open.miss, self.position());
        let (register, table) = (open.register, open.table);
        let ea = self.layout.slot(offset_of!(Context, ea));
        dynasm!(self.asm
            ; .arch x64
            ; add Rq(register), [Rq(table) + open.disp]
            ; mov [ea], Rq(register)
        );
        let bounce_later = Slow {
            size: open.size as u16,
            write: open.write,
            register,
            retry: Place::new(self.address(open.retry)),
            bounce: Place::default(),
            resume: Place::new(self.address(resume)),
            after,
            read: open.read,
            stack: open.stack,
            segment: open.limited,
            alignment: open.alignment,
            next_ip,
            rsp,
            locked: open.locked,
            relied: open.relied,
            pinned: open.pinned,
        };
        let site = self.add_site(open.ip, Kind::Memory(bounce_later));
        self.exit_through(site, 0);
        let bounce = self.position();
        let slow = Slow {
            bounce: Place::new(self.address(bounce)),
            ..bounce_later
        };
        self.sites[site].kind = Kind::Memory(slow);
        for at in open.first_mark..last_mark {
            let mark = self.marks[at];
            self.marks.push(Mark {
                offset: mark.offset - open.body as u32 + bounce as u32,
                ..mark
            });
        }
        // Nothing in a body depends on where it is.
        self.asm.repeat(open.body..resume);
        if open.write {
            self.exit_through(site, 1);
        } else {
            let target = self.address(resume);
            self.jump_to(0xe9, target);
        }
    }

    /// Emits the guest-virtual address into `register`, with `scratch` at its disposal. Returns the
    /// segment's number.
    pub(super) fn address_into(
        &mut self,
        address: Address<'_>,
        register: u8,
        scratch: u8,
        size: u32,
    ) -> Result<u8, String> {
        let narrow = self.mode.bits != Bits::Bits64;
        let (segment, truncate) = match address {
            Address::Stack(offset) => {
                dynasm!(self.asm ; .arch x64 ; lea Rq(register), [rsp + offset]);
                (Register::SS, narrow)
            }
            Address::Frame => {
                dynasm!(self.asm ; .arch x64 ; mov Rq(register), rbp);
                (Register::SS, narrow)
            }
            Address::Group(group) => {
                let index = (group.index != Register::None)
                    .then(|| (group.index.number() as u8, group.scale));
                let base = group.base.number() as u8;
                // Far from the ends of what a displacement holds.
                recode::lea(register, base, index, group.low as i32, self.asm);
                (Register::DS, false)
            }
            Address::Operand(instr, by) => {
                self.operand_address(instr, by, register)?;
                (data_segment(instr, self.mode.bits), false)
            }
            Address::Bits(instr, offset) => {
                self.operand_address(instr, 0, register)?;
                let number = offset.full_register().number() as u8;
                match size {
                    2 => dynasm!(self.asm
                        ; .arch x64
                        ; movsx Rq(scratch), Rw(number)
                        ; sar Rq(scratch), 4
                        ; lea Rq(register), [Rq(register) + 2 * Rq(scratch)]
                    ),
                    4 => dynasm!(self.asm
                        ; .arch x64
                        ; movsxd Rq(scratch), Rd(number)
                        ; sar Rq(scratch), 5
                        ; lea Rq(register), [Rq(register) + 4 * Rq(scratch)]
                    ),
                    _ => dynasm!(self.asm
                        ; .arch x64
                        ; mov Rq(scratch), Rq(number)
                        ; sar Rq(scratch), 6
                        ; lea Rq(register), [Rq(register) + 8 * Rq(scratch)]
                    ),
                }
                match address_bits(instr, self.mode.bits) {
                    16 => {
                        dynasm!(self.asm ; .arch x64 ; movzx Rd(register), Rw(register));
                        (data_segment(instr, self.mode.bits), false)
                    }
                    bits => (data_segment(instr, self.mode.bits), bits == 32),
                }
            }
        };
        let index: u8 = match segment {
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::DS => 3,
            Register::FS => 4,
            _ => 5,
        };
        if truncate {
            dynasm!(self.asm ; .arch x64 ; mov Rd(register), Rd(register));
        }
        if index >= 4 || !self.mode.flat && narrow {
            let base = self.layout.slot(offset_of!(Context, segment_base)) + 8 * i32::from(index);
            dynasm!(self.asm ; .arch x64 ; add Rq(register), [base]);
            if narrow {
                dynasm!(self.asm ; .arch x64 ; mov Rd(register), Rd(register));
            }
        }
        Ok(index)
    }

    /// Emits the offset part of a memory operand, cut to 32 bits if it has no more.
    fn operand_address(
        &mut self,
        instr: &Instruction,
        by: i64,
        register: u8,
    ) -> Result<(), String> {
        let bits = address_bits(instr, self.mode.bits);
        let narrow = bits <= 32;
        let no_register = instr.memory_base() == Register::None
            && instr.memory_index() == Register::None
            || instr.is_ip_rel_memory_operand();
        if no_register {
            let offset = instr.memory_displacement64().wrapping_add(by as u64);
            self.load_constant(register, if narrow { offset & 0xffff_ffff } else { offset });
            return Ok(());
        }
        if let Some(parts) = self.parts().filter(|_| by == 0) {
            parts.lea(register, narrow, self.asm);
            return Ok(());
        }
        let code = if narrow {
            Code::Lea_r32_m
        } else {
            Code::Lea_r64_m
        };
        let target = if narrow {
            Register::EAX + u32::from(register)
        } else {
            gpr64(register)
        };
        let mut lea = plain_address(instr, code, target);
        if by != 0 {
            lea.set_memory_displacement64(lea.memory_displacement64().wrapping_add(by as u64));
            if lea.memory_displ_size() == 0 {
                lea.set_memory_displ_size(1);
            }
        }
        self.encode(&lea)?;
        if bits == 16 {
            dynasm!(self.asm ; .arch x64 ; movzx Rd(register), Rw(register));
        }
        Ok(())
    }
}

/// True if `instr` reads and writes its memory operand as one (SDM 3A 8.1.2).
fn is_locked(instr: &Instruction) -> bool {
    instr.has_lock_prefix() || instr.mnemonic() == Mnemonic::Xchg
}

pub(super) fn address_bits(instr: &Instruction, bits: Bits) -> u32 {
    let register = if instr.memory_base() != Register::None {
        instr.memory_base()
    } else {
        instr.memory_index()
    };
    match register {
        Register::None if bits != Bits::Bits64 => 32,
        // An address-size prefix and nothing else: iced says so by the displacement's size.
        Register::None if instr.memory_displ_size() == 4 => 32,
        Register::None => 64,
        Register::EIP => 32,
        register => register.size() as u32 * 8,
    }
}

/// `lea` of `instr`'s memory operand, spelled with 64-bit registers: the low 32 bits of a sum don't
/// depend on how wide it was added.
pub(super) fn plain_address(instr: &Instruction, code: Code, target: Register) -> Instruction {
    let wide = |register: Register| {
        if register == Register::None {
            register
        } else {
            register.full_register()
        }
    };
    let narrow = address_bits(instr, Bits::Bits64) <= 32;
    let mut lea = Instruction::new();
    // A 32-bit address in a 64-bit destination is zero-extended: the narrow form does that.
    let code = if narrow && code == Code::Lea_r64_m {
        Code::Lea_r32_m
    } else {
        code
    };
    let target = if code == Code::Lea_r32_m && target.size() == 8 {
        Register::EAX + target.number() as u32
    } else {
        target
    };
    lea.set_code(code);
    lea.set_op0_kind(OpKind::Register);
    lea.set_op0_register(target);
    lea.set_op1_kind(OpKind::Memory);
    lea.set_memory_base(wide(instr.memory_base()));
    lea.set_memory_index(wide(instr.memory_index()));
    lea.set_memory_index_scale(instr.memory_index_scale());
    let displacement = instr.memory_displacement64();
    let displacement = if narrow {
        displacement as i32 as i64 as u64
    } else {
        displacement
    };
    lea.set_memory_displacement64(displacement);
    // Without a base the displacement is there always, and whole.
    lea.set_memory_displ_size(match (instr.memory_base(), displacement) {
        (Register::None, _) => 8,
        (_, 0) => 0,
        (_, _) => 1,
    });
    lea
}

/// `instr` with an operand of no displacement, index or segment, waiting for its base register.
fn with_operand(instr: &Instruction) -> Instruction {
    let mut body = whole_operand(instr);
    body.set_memory_index(Register::None);
    body.set_memory_index_scale(1);
    body.set_memory_displacement64(0);
    body.set_memory_displ_size(0);
    body.set_segment_prefix(Register::None);
    body
}

/// `instr` in the form that 64-bit code has of it, its operand as it is.
pub(super) fn whole_operand(instr: &Instruction) -> Instruction {
    let mut body = *instr;
    body.set_code(match instr.code() {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        code => lasting(code).unwrap_or(code),
    });
    if let Some(operand) = memory_operand(instr) {
        body.set_op_kind(operand, OpKind::Memory);
    }
    body
}
