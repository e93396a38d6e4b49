//! The memory hypercalls: mmu_update, update_va_mapping, mmuext_op.

use crate::State;
use crate::hypercall::errno::{E2BIG, EBUSY, EINVAL, ENOENT, ENOSPC, ENOSYS};
use crate::hypercall::layout::USER_END;
use crate::hypercall::{MAX_BATCH, MmuUpdate, MmuextOp, mmu, mmuext, uvmf};
use crate::memory::{Errno, Place};
use crate::tables::{bit, is_leaf, span};
use crate::wire::PAGE;

impl State {
    /// The place for a batch's number of done requests.
    fn done(&self, pointer: u64) -> Result<Option<Place<u64>>, Errno> {
        if pointer == 0 {
            Ok(None)
        } else {
            self.writable(pointer).map(Some)
        }
    }

    /// Does each of a batch until one fails, and says how many were done.
    fn batch<T: Copy>(
        &mut self,
        requests: u64,
        count: u64,
        done: u64,
        mut one: impl FnMut(&mut Self, T) -> Result<(), Errno>,
    ) -> Result<i64, Errno> {
        if count > MAX_BATCH {
            return Err(-E2BIG);
        }
        let requests = self.array::<T>(requests, count)?;
        let done = self.done(done)?;
        let mut result = Ok(0);
        let mut index = 0;
        while index < count && result.is_ok() {
            match one(self, requests.get(index)) {
                Ok(()) => index += 1,
                Err(error) => result = Err(error),
            }
        }
        if let Some(done) = done {
            done.put(index);
        }
        result
    }

    pub(crate) fn mmu_update(
        &mut self,
        requests: u64,
        count: u64,
        done: u64,
    ) -> Result<i64, Errno> {
        self.batch(requests, count, done, |state, request: MmuUpdate| {
            let command = request.entry & 7;
            let address = request.entry & !7;
            let table = address / PAGE;
            if table >= state.frames || state.frame(table).level == 0 {
                return Err(-EINVAL);
            }
            let index = address % PAGE / 8;
            let kept = match command {
                mmu::NORMAL_PT_UPDATE => 0,
                mmu::PT_UPDATE_PRESERVE_AD => {
                    state.entry(table, index) & (bit::ACCESSED | bit::DIRTY)
                }
                _ => return Err(-EINVAL),
            };
            state.change(table, index, request.value | kept)
        })
    }

    pub(crate) fn update_va_mapping(
        &mut self,
        va: u64,
        value: u64,
        flags: u64,
        count: u64,
    ) -> Result<i64, Errno> {
        let slot = self.current.ok_or(-ENOENT)?;
        let count = count.max(1);
        if count > MAX_BATCH {
            return Err(-E2BIG);
        }
        if va % PAGE != 0 || va >= USER_END || flags & !(uvmf::INVLPG | uvmf::TLB_FLUSH) != 0 {
            return Err(-EINVAL);
        }
        // A value with the LARGE bit would be read as PAT in level 1: it is one.
        for page in 0..count {
            let at = va + page * PAGE;
            let found = self.find(slot, at);
            if at >= USER_END || found.level != 1 {
                return Err(-EINVAL);
            }
            let value = if value & bit::PRESENT == 0 {
                value
            } else {
                value + page * PAGE
            };
            self.change(found.table, found.index, value)?;
            if flags & uvmf::INVLPG != 0 {
                self.invalidate(slot, at);
            }
        }
        if flags & uvmf::TLB_FLUSH != 0 {
            self.queue_everything(slot);
        }
        Ok(0)
    }

    /// Flushes the translation of an address in a space.
    fn invalidate(&mut self, slot: usize, address: u64) {
        let found = self.find(slot, address);
        if found.level <= 2 {
            let first = address & !(span(found.level) - 1);
            self.revoke(slot, first, found.table, found.index);
        }
        debug_assert!(found.level <= 2 || !is_leaf(found.entry, found.level));
    }

    fn slot_of(&self, root: u64) -> Result<usize, Errno> {
        self.spaces
            .iter()
            .position(|space| space.root == root && root < self.frames)
            .ok_or(-EINVAL)
    }

    pub(crate) fn mmuext_op(
        &mut self,
        operations: u64,
        count: u64,
        done: u64,
    ) -> Result<i64, Errno> {
        self.batch(operations, count, done, |state, operation: MmuextOp| {
            let argument = operation.argument;
            match operation.command {
                mmuext::PIN_L4_TABLE => state.pin(argument)?,
                mmuext::UNPIN_TABLE => state.unpin(argument)?,
                mmuext::NEW_BASEPTR => {
                    let slot = state.slot_of(argument)?;
                    state.current = Some(slot);
                    state.queue_everything(slot);
                }
                mmuext::NEW_USER_BASEPTR => state.current = Some(state.slot_of(argument)?),
                mmuext::TLB_FLUSH_LOCAL => {
                    let slot = state.current.ok_or(-ENOENT)?;
                    state.queue_everything(slot);
                }
                mmuext::INVLPG_LOCAL => {
                    let slot = state.current.ok_or(-ENOENT)?;
                    if argument >= USER_END {
                        return Err(-EINVAL);
                    }
                    state.invalidate(slot, argument);
                }
                mmuext::TLB_FLUSH_ALL => {
                    for slot in state.used_slots() {
                        state.queue_everything(slot);
                    }
                }
                mmuext::INVLPG_ALL => {
                    if argument >= USER_END {
                        return Err(-EINVAL);
                    }
                    for slot in state.used_slots() {
                        state.invalidate(slot, argument);
                    }
                }
                _ => return Err(-ENOSYS),
            }
            Ok(())
        })
    }

    fn used_slots(&self) -> impl Iterator<Item = usize> + use<> {
        let used: u64 = self
            .spaces
            .iter()
            .enumerate()
            .filter(|(_, space)| space.root != u64::MAX)
            .fold(0, |used, (slot, _)| used | 1 << slot);
        (0..self.spaces.len()).filter(move |slot| used >> slot & 1 != 0)
    }

    fn pin(&mut self, root: u64) -> Result<(), Errno> {
        if root >= self.frames {
            return Err(-EINVAL);
        }
        if self.slot_of(root).is_ok() {
            return Err(-EBUSY);
        }
        let free = |space: &crate::spaces::Space| space.root == u64::MAX;
        let slot = self.spaces.iter().position(free).ok_or(-ENOSPC)?;
        self.take_table(slot, root, 4, 0)?;
        self.spaces[slot].root = root;
        if let Err(error) = self.create_process(slot) {
            self.drop_table(root, 4);
            self.spaces[slot].root = u64::MAX;
            return Err(error);
        }
        Ok(())
    }

    fn unpin(&mut self, root: u64) -> Result<(), Errno> {
        let slot = self.slot_of(root)?;
        self.destroy_process(slot);
        self.drop_table(root, 4);
        self.spaces[slot].root = u64::MAX;
        if self.current == Some(slot) {
            self.current = None;
        }
        Ok(())
    }
}
