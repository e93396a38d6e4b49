//! sgdt, sidt, sldt, str and smsw of ring 3 under CR4.UMIP, answered as Linux answers them in place
//! of the #GP (arch/x86/kernel/umip.c): addresses and limits that say nothing, and CR0 as it always
//! is. For ring-3 code that runs without a kernel.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::{core::Core, fault::Fault};

const GDT: u64 = 0xffff_ffff_fffe_0000;
const IDT: u64 = 0xffff_ffff_ffff_0000;
/// PE MP ET NE WP AM PG.
const CR0: u64 = 0x8005_0033;

impl Core {
    pub(super) fn answer_hidden(&mut self, instr: &Instruction) -> Result<(), Fault> {
        let value = match instr.mnemonic() {
            Mnemonic::Sgdt => return self.store_table(instr, GDT),
            Mnemonic::Sidt => return self.store_table(instr, IDT),
            Mnemonic::Sldt => self.cpu.ldtr.selector.into(),
            Mnemonic::Str => self.cpu.tr.selector.into(),
            _ => CR0,
        };
        if instr.op0_kind() != OpKind::Register {
            return self.store_sized(instr, value, 2);
        }
        // The kernel writes as many bytes as the operand has and leaves the register's others.
        let register = instr.op0_register();
        let number = register.full_register().number();
        let mask = u64::MAX >> (64 - 8 * register.size());
        let before = self.gpr(number);
        self.set_gpr(number, before & !mask | value & mask);
        Ok(())
    }

    fn store_table(&mut self, instr: &Instruction, base: u64) -> Result<(), Fault> {
        let mut image = [0u8; 10];
        image[2..].copy_from_slice(&base.to_le_bytes());
        let at = self.operand(instr, 10, true)?;
        let user = self.user();
        self.write(at, &image, user)
            .map_err(|fault| self.on_operand(instr, fault))
    }
}
