//! Translated code as text.

use super::BtVcpu;

impl BtVcpu {
    /// Guest and host code of every living block in `range` of guest-virtual addresses.
    pub fn listing(&self, range: std::ops::Range<u64>) -> String {
        let mut text = String::new();
        let blocks = self.cache.blocks();
        for (number, block) in blocks.filter(|(_, block)| range.contains(&block.virt)) {
            let mode = self.cache.mode(number);
            let guest_len = (block.guest_len as usize).min(4096 - (block.phys & 0xfff) as usize);
            let mut guest = vec![0; guest_len];
            self.fetch(block.phys, &mut guest);
            // SAFETY: a block's code lies in the cache, whose pages are readable.
            let host = unsafe {
                std::slice::from_raw_parts(block.code() as *const u8, block.code_len() as usize)
            };
            let bits = match mode.bits {
                crate::cpu::Bits::Bits64 => 64,
                crate::cpu::Bits::Bits32 => 32,
                crate::cpu::Bits::Bits16 => 16,
            };
            text += &format!("block {:#x} {:?}\n", block.virt, mode);
            let mut parts = vec![(bits, &guest[..], block.virt)];
            if let Some(leaf) = self.cache.leaf(number) {
                parts.push((bits, &leaf.bytes[..leaf.len as usize], leaf.virt));
            }
            parts.push((64, host, block.code()));
            for (bits, bytes, ip) in parts {
                for instr in iced_x86::Decoder::with_ip(bits, bytes, ip, 0) {
                    text += &format!("  {:#12x}  {instr}\n", instr.ip());
                }
                text += "\n";
            }
        }
        text
    }
}
