//! The code for RIP: looked up, translated if need be.

use engine_core::ExitReason;

use super::{BtVcpu, Missing};
use crate::{
    cache::{Key, Refusal, Source},
    core::Core,
    cpu::{Bits, Seg},
    decode::{
        Mode,
        leaf::{Leaf, ROOM},
    },
    fault::Fault,
    guest,
    mmu::Access,
    system::Trap,
};

impl BtVcpu {
    /// Address of the code for RIP, and its block's number if it is one to link to.
    pub(super) fn find(&mut self, single: bool) -> Result<(u64, Option<u32>), Missing> {
        let mode = Mode {
            single,
            ..self.core.mode_here()
        };
        let index = mode.jumps();
        let virt = self.core.linear_ip();
        if !single {
            if self.jump_modes[index] != Some(mode) {
                self.core.mmu.jumps[index].flush();
                self.jump_modes[index] = Some(mode);
                self.core.settled = false;
            }
            if let Some((_, serial)) = self.core.known_mode() {
                self.jump_serials[index] = serial;
            }
            if let Some(entry) = self.core.mmu.jumps[index].get(virt, mode.window) {
                return Ok((entry, None));
            }
        }
        let number = self.block(mode, virt)?;
        let block = self.cache.block(number);
        let entry = block.lazy_entry();
        // Translated code looks a branch's offset up, which is the address only in a flat segment.
        if !single && block.links() && mode.flat && self.stepping.is_none() {
            let checked = block.checked_entry();
            let jumps = &self.core.mmu.jumps[index];
            jumps.fill(virt, entry, checked);
            if let Some(leaf) = self.cache.leaf(number) {
                jumps.lean_on(leaf.virt);
            }
        }
        Ok((entry, Some(number)))
    }

    /// The block at `virt`, translated if need be.
    pub(super) fn block(&mut self, mode: Mode, virt: u64) -> Result<u32, Missing> {
        if mode.bits != Bits::Bits64 {
            // EIP wraps behind the last byte of a segment of 4 GiB.
            self.core.rip &= 0xffff_ffff;
        }
        if mode.limited >> Seg::CS & 1 == 1 {
            self.core.check_target(self.core.rip)?;
        }
        let page = self
            .core
            .mmu
            .translate(&self.core.cpu, virt, Access::Fetch, mode.user)?;
        self.core.mmu.fetched(virt, page, mode.jumps());
        let key = Key {
            virt,
            phys: page.phys | virt & 0xfff,
            mode,
        };
        if let Some(number) = self.cache.find(&key) {
            let block = self.cache.block(number);
            let leaf = self.cache.leaf(number).copied();
            let leans = leaf.is_none_or(|leaf| self.leans(leaf, mode));
            match block.second() {
                None if leans => return Ok(number),
                Some(second) if self.next_page(virt, mode)? == second => return Ok(number),
                Some(_) | None => {}
            }
        }
        if self.cache.full() {
            self.counts.add(ExitReason::CacheFlush);
            self.settle_x87();
            self.cache.empty(&mut self.core.mmu);
        }
        self.counts.add(ExitReason::Translate);
        if mode.window {
            self.core.mmu.jumps[mode.jumps()].prepare_targets();
        }
        self.enter_pages(&[key.phys])?;
        let room = 4096 - (virt & 0xfff) as usize;
        let inside = self.core.code_left();
        if let Some(number) = self.translate_inside(key, room.min(inside))? {
            return Ok(number);
        }
        if inside <= room {
            return Err(Fault::gp().into());
        }
        let second = self.next_page(virt, mode)?;
        self.enter_pages(&[key.phys, second])?;
        let mut bytes = vec![0xff; inside.min(15)];
        self.fetch(key.phys, &mut bytes[..room]);
        self.fetch(second, &mut bytes[room..]);
        let source = Source {
            key,
            second: Some(second),
            bytes: &bytes,
            ip: self.core.rip,
            more: 0,
            leaves: &|_| None,
        };
        match self.cache.translate(&source, &self.arena) {
            Ok(number) if self.still_there(number, &bytes) => Ok(number),
            Ok(_) => self.block(mode, virt),
            // Fifteen bytes hold any instruction: it is one that is too long, or it leaves the
            // code segment.
            Err(Refusal::Crosses | Refusal::More | Refusal::Leans(_)) => Err(Fault::gp().into()),
            Err(Refusal::Bug(message)) => Err(Trap::Unsupported(message).into()),
        }
    }

    /// Translates the block of `key` from the next `left` bytes of its page. None if its first instruction
    /// has more.
    fn translate_inside(&mut self, key: Key, left: usize) -> Result<Option<u32>, Missing> {
        /// Most blocks, and where they lead, are seen with the first of these; no block, with its
        /// surroundings, needs more than the second.
        const READ: [usize; 2] = [256, 1024];
        let (mut first, mut second);
        for read in READ {
            // Room that isn't needed costs its zeroing.
            let bytes: &mut [u8] = if read == READ[0] {
                first = [0; READ[0]];
                &mut first
            } else {
                second = [0; READ[1]];
                &mut second
            };
            let bytes = &mut bytes[..read.min(left)];
            let more = if read == READ[1] {
                0
            } else {
                left - bytes.len()
            };
            self.fetch(key.phys, bytes);
            let source = Source {
                key,
                second: None,
                bytes,
                ip: self.core.rip,
                more,
                leaves: &|virt| code_at(&self.core, virt, key.mode),
            };
            match self.cache.translate(&source, &self.arena) {
                Ok(number) if self.still_there(number, bytes) => {
                    if let Some(leaf) = self.cache.leaf(number) {
                        self.leans(*leaf, key.mode);
                    }
                    return Ok(Some(number));
                }
                Err(Refusal::Leans(leaf)) => {
                    self.enter_pages(&[key.phys, leaf])?;
                    return self.block(key.mode, key.virt).map(Some);
                }
                Ok(_) => return self.block(key.mode, key.virt).map(Some),
                Err(Refusal::Bug(message)) => return Err(Trap::Unsupported(message).into()),
                Err(Refusal::Crosses) => return Ok(None),
                Err(Refusal::More) => {}
            }
        }
        Ok(None)
    }

    /// True if `leaf` is where it was, and may be executed. Then it counts as fetched.
    fn leans(&self, leaf: Leaf, mode: Mode) -> bool {
        let mmu = &self.core.mmu;
        match mmu.walk(&self.core.cpu, leaf.virt, Access::Fetch, mode.user) {
            Ok(page) if page.phys == leaf.phys & !0xfff => {
                mmu.fetched(leaf.virt, page, mode.jumps());
                true
            }
            Ok(_) | Err(_) => false,
        }
    }

    pub(super) fn next_page(&self, virt: u64, mode: Mode) -> Result<u64, Fault> {
        let next = match (virt & !0xfff).wrapping_add(4096) {
            next if mode.bits == Bits::Bits64 => next,
            next => next & 0xffff_ffff,
        };
        let page = (self.core.mmu).walk(&self.core.cpu, next, Access::Fetch, mode.user)?;
        self.core.mmu.fetched(next, page, mode.jumps());
        Ok(page.phys)
    }

    /// Code bytes; memory that isn't RAM reads as all ones, as an empty bus does.
    pub(super) fn fetch(&self, phys: u64, bytes: &mut [u8]) {
        if let Some(host) = self.core.mmu.host(phys, bytes.len() as u64) {
            // SAFETY: `host` covers the length.
            unsafe { guest::read(host, bytes) };
        } else {
            bytes.fill(0xff);
        }
    }
}

/// Code at `virt`, if it may be executed: where it is, and what there is of it in its page. Who looks
/// ahead may set accessed bits (SDM 3A 4.8).
fn code_at(core: &Core, virt: u64, mode: Mode) -> Option<(u64, [u8; ROOM], usize)> {
    let page = (core.mmu)
        .walk(&core.cpu, virt, Access::Fetch, mode.user)
        .ok()?;
    let len = (4096 - (virt & 0xfff) as usize).min(ROOM);
    let phys = page.phys | virt & 0xfff;
    let host = core.mmu.host(phys, len as u64)?;
    let mut bytes = [0; ROOM];
    // SAFETY: `host` covers the length.
    unsafe { guest::read(host, &mut bytes[..len]) };
    Some((phys, bytes, len))
}
