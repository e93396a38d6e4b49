//! Memory operands: address, software TLB, body.
//!
//! ```text
//! retry:  lea   a, [guest operand]        ; plus the segment base, if there is one
//!         rorx  t, a, 8                   ; or mov and shr
//!         and   t, (entries - 1) * 16     ; entry index * 16
//!         sub   a, [t + TLB]              ; offset in the page, if the page matches
//!         cmp   a, 4096 - size            ; no match, or across the end: either is above
//!         ja    slow
//!         add   a, [t + TLB + 8]          ; host address
//!         body  [a]
//! ```
//!
//! Where the address is known when the block is made, so is the entry, and the page is compared with what
//! an instruction can hold:
//!
//! ```text
//! retry:  cmp   [entry], page
//!         jne   slow
//!         mov   a, [entry + 8]            ; host address of the page
//!         body  [a + offset in the page]
//! ```
//!
//! The slow path leaves for the runtime, which puts the address together again from `a` and the entry that `t`
//! leads to, or finds it in `a`, where it was known. It fills the TLB and says `retry`; or, for device memory,
//! accesses across pages and writes to translated code, puts a buffer's address into `a` and says `body`. For a
//! write it copies the body elsewhere and has that copy run, which comes back for the buffer to be written where
//! it belongs.
//!
//! Invariant: nothing in a body depends on where it is.

mod address;

use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

pub(super) use address::{Address, address_bits, plain_address};

use super::{Cold, Lower, Path, gpr64, memory_operand, needs_flags, plain::lasting};
use crate::{
    cache::BODY,
    decode::{Class, Insn},
    groups::Member,
    site::{Homes, Ip, Kind, Place, Shared, Slow},
    tlb::TLB_ENTRIES,
};

/// An access whose body is being emitted.
#[derive(Clone, Copy)]
pub(super) struct Open {
    /// Holds the operand's host address in the body, but for `offset`.
    pub register: u8,
    pub offset: i32,
    table: u8,
    /// None if the lookup is a group's: there is no slow path of its own.
    site: Option<usize>,
}

/// A lookup just emitted.
struct Lookup {
    register: u8,
    table: u8,
    /// Of the operand from where the register leads to.
    offset: i32,
    /// The address, if it is known.
    known: Option<u64>,
    stack: bool,
    limited: Option<u8>,
    /// Where things were when it began.
    homes: Homes,
    retry: usize,
    miss: usize,
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
                let short = i8::try_from(open.offset).is_ok();
                body.set_memory_displ_size(if short { 1 } else { 8 });
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
        // A host address that a lookup has yielded is one that can be accessed.
        let strict = insn.memory.is_some_and(|memory| memory.alignment > 1);
        if insn.faults || strict {
            self.mark(Ip::At(insn.instr.ip()));
        }
        body(self, &open)?;
        self.done(insn);
        self.close(&open, Some(insn.instr.next_ip()), 0)
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
        let mut body = with_operand(&insn.instr);
        body.set_memory_base(gpr64(open.register));
        body.set_op1_register(match size {
            2 => Register::AX + u32::from(bit),
            4 => Register::EAX + u32::from(bit),
            _ => gpr64(bit),
        });
        self.encode(&body)?;
        self.done(insn);
        self.close(&open, Some(insn.instr.next_ip()), 0)
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
        self.close(&open, Some(insn.instr.next_ip()), 0)
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
        let slow = Slow {
            size: size as u16,
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
            register: lookup.register,
            table: lookup.table,
            retry: Place::new(self.address(lookup.retry)),
            body: Place::new(self.address(self.position())),
            // The end of the body is known when it is there.
            resume: Place::default(),
            after: Homes::default(),
            next_ip: None,
            rsp: 0,
            stack: lookup.stack,
            segment: lookup.limited,
            alignment: insn.memory.map_or(1, |memory| memory.alignment),
            locked: is_locked(&insn.instr),
            relied: insn.class == Class::CallInline,
            pinned: self.pins_write(),
        };
        let site = self.add_lookup(insn, &lookup, Kind::Memory(slow));
        Ok(Open {
            register: lookup.register,
            table: lookup.table,
            offset: lookup.offset,
            site: Some(site),
        })
    }

    /// Has `lookup` leave when it misses, with everything as it was when it began.
    fn add_lookup(&mut self, insn: &Insn, lookup: &Lookup, kind: Kind) -> usize {
        let here = std::mem::replace(&mut self.homes, lookup.homes);
        let site = self.add_site(insn.instr.ip(), kind);
        self.homes = here;
        let patch = lookup.miss;
        self.cold.push(match lookup.known {
            None => Cold::Exit { site, patch },
            Some(address) => Cold::Known {
                site,
                patch,
                register: lookup.register,
                address,
            },
        });
        site
    }

    /// A group of writes isn't over.
    fn pins_write(&self) -> bool {
        let mut groups = self.plan.groups[..self.looked_up].iter();
        groups.any(|group| group.write && self.pinned >> group.register & 1 == 1)
    }

    fn open_member(&mut self, insn: &Insn, member: Member, avoid: u16) -> Result<Open, String> {
        let group = self.plan.groups[member.group()];
        if group.head == self.at {
            let address = Address::Group(&group);
            let lookup =
                self.look_up(insn, address, group.bytes, group.write, avoid | group.used)?;
            self.pinned |= 1 << lookup.register;
            self.plan.groups[member.group()].register = lookup.register;
            self.looked_up = self.looked_up.max(member.group() + 1);
            let kind = Kind::Group(Shared {
                size: group.bytes as u16,
                write: group.write,
                retry: self.address(lookup.retry),
                register: lookup.register,
                table: lookup.table,
                steps: (group.last - group.head + 1) as u16,
            });
            self.add_lookup(insn, &lookup, kind);
        }
        let register = self.plan.groups[member.group()].register;
        self.busy = avoid | 1 << register;
        Ok(Open {
            register,
            offset: member.offset,
            table: register,
            site: None,
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
        if let Some(known) = self.known_address(address, size) {
            return Ok(self.look_up_known(register, known, write, avoid));
        }
        let table = self.take(avoid | 1 << register, insn);
        self.busy = avoid | 1 << register;
        let homes = self.homes;
        let retry = self.position();
        let segment = self.address_into(address, register, table, size)?;
        let limited = (self.mode.limited >> segment & 1 == 1).then_some(segment);
        let disp = self.tlb(write);
        if self.layout.rotates {
            dynasm!(self.asm ; .arch x64 ; rorx Rq(table), Rq(register), 8);
        } else {
            dynasm!(self.asm ; .arch x64 ; mov Rq(table), Rq(register) ; shr Rq(table), 8);
        }
        dynasm!(self.asm
            ; .arch x64
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
            offset: 0,
            known: None,
            stack: segment == 2,
            limited,
            homes,
            retry,
            miss,
        })
    }

    /// As [`look_up`](Lower::look_up), of an address that [`known_address`](Lower::known_address) has found.
    fn look_up_known(&mut self, register: u8, address: u64, write: bool, avoid: u16) -> Lookup {
        const NE: u8 = 5;
        self.busy = avoid | 1 << register;
        let retry = self.position();
        let page = address & !0xfff;
        let entry = self.tlb(write) + ((address >> 12) as i32 & (TLB_ENTRIES as i32 - 1)) * 16;
        dynasm!(self.asm ; .arch x64 ; cmp QWORD [entry], page as i32);
        self.asm.extend([0x0f, 0x80 | NE]);
        let miss = self.position();
        self.asm.push_i32(0);
        dynasm!(self.asm ; .arch x64 ; mov Rq(register), [entry + 8]);
        Lookup {
            register,
            table: register,
            offset: (address & 0xfff) as i32,
            known: Some(address),
            stack: false,
            limited: None,
            homes: self.homes,
            retry,
            miss,
        }
    }

    /// Ends the body. `next_ip` is where the guest goes on if nothing of the instruction is left
    /// but to move RSP by `rsp`.
    pub(super) fn close(
        &mut self,
        open: &Open,
        next_ip: Option<u64>,
        rsp: i32,
    ) -> Result<(), String> {
        self.busy = 0;
        let Some(site) = open.site else {
            let done = self
                .plan
                .member(self.at)
                .is_some_and(|member| self.plan.groups[member.group()].last == self.at);
            if done {
                self.pinned &= !(1 << open.register);
            }
            return Ok(());
        };
        let resume = Place::new(self.address(self.position()));
        if let Kind::Memory(slow) = &mut self.sites[site].kind {
            slow.resume = resume;
            slow.after = self.homes;
            slow.next_ip = next_ip;
            slow.rsp = rsp;
            let length = resume.address() - slow.body.address();
            if slow.write && length > BODY as u64 {
                return Err(format!("a body of {length} bytes"));
            }
        }
        Ok(())
    }
}

/// True if `instr` reads and writes its memory operand as one (SDM 3A 8.1.2).
fn is_locked(instr: &Instruction) -> bool {
    instr.has_lock_prefix() || instr.mnemonic() == Mnemonic::Xchg
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
