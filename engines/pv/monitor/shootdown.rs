//! Changes to what user processes have mapped: queued by hypercalls, carried out before a user process
//! runs again.
//!
//! What a hypercall revokes must be gone when it returns, in every process. A process that holds it is
//! stopped then, like all of them: only K's answer lets one go on, in the gate, and the gate carries
//! out what is queued before it returns to user code. That no user instruction comes in between is
//! what makes a queue as good as a change at once:
//!
//! - a process stopped in the gate goes on with the gate's own instructions, which U cannot write and
//!   which trust no register. They return into a frame only if every command went well; otherwise
//!   they notify, and K has the process unmap everything;
//! - a process stopped in a system call is brought to the gate by a signal, which the host delivers
//!   before the first user instruction. No user process can block it, since it returns into a frame
//!   by way of K alone, which clears the frame's mask (`frame`);
//! - a signal in the gate makes it notify again, and K ends the process, with all it had mapped.
//!
//! The queue is the slot's command page itself: the commands stand there until the process is let go.
//! Neighbouring ranges are merged, so a run of pages costs one call of the host. When the queue is
//! full the whole space is unmapped instead: it fills again by faults.

use crate::hypercall::layout::{USER_END, USER_START};
use crate::user::commands;
use crate::wire::{Command, Commands, PAGE, PROTECT, event};
use crate::{State, ledger, sys, vmm};

/// Commands that are gathered; the page has room for more.
const MOST: usize = 64;

const NOTHING: Command = Command {
    address: 0,
    length: 0,
    rights: 0,
    flags: 0,
    offset: 0,
};
const EVERYTHING: Command = Command {
    address: USER_START,
    length: USER_END - USER_START,
    ..NOTHING
};

impl Command {
    /// Makes this command do what `next` says also, if they are of one kind and neighbours.
    fn join(&mut self, next: &Command) -> bool {
        let alike = self.flags == next.flags && self.rights == next.rights;
        let maps = self.flags & sys::MAP_SHARED as u32 != 0;
        if alike
            && self.address + self.length == next.address
            && (!maps || self.offset + self.length == next.offset)
        {
            self.length += next.length;
            return true;
        }
        if alike && !maps && next.address + next.length == self.address {
            self.address = next.address;
            self.length += next.length;
            return true;
        }
        false
    }
}

impl State {
    /// Puts a command behind the others, if it can't be made one with the last of them.
    fn queue(&mut self, slot: usize, command: Command) {
        let queued = self.spaces[slot].queued;
        if let Some(last) = queued.checked_sub(1)
            && commands(slot).entries[last].join(&command)
        {
            return;
        }
        if queued >= MOST {
            self.queue_everything(slot);
            return;
        }
        self.push(slot, command);
    }

    fn push(&mut self, slot: usize, command: Command) {
        let queued = &mut self.spaces[slot].queued;
        commands(slot).entries[*queued] = command;
        *queued += 1;
    }

    /// Queues the unmapping of a range.
    pub(crate) fn queue_unmap(&mut self, slot: usize, address: u64, length: u64) {
        if !self.spaces[slot].mapped {
            return;
        }
        let unmap = Command {
            address,
            length,
            ..NOTHING
        };
        self.queue(slot, unmap);
    }

    /// Queues a change of the rights to a page that is mapped.
    pub(crate) fn queue_protect(&mut self, slot: usize, address: u64, rights: u32) {
        let protect = Command {
            address,
            length: PAGE,
            rights,
            flags: PROTECT,
            offset: 0,
        };
        self.queue(slot, protect);
    }

    /// Queues the unmapping of all that a space has mapped.
    pub(crate) fn queue_everything(&mut self, slot: usize) {
        if !self.spaces[slot].mapped {
            return;
        }
        let space = &mut self.spaces[slot];
        space.epoch += 1;
        space.mapped = false;
        space.queued = 0;
        self.push(slot, EVERYTHING);
    }

    /// Queues it whatever the books say: a command has failed, or a page that they have as mapped
    /// faulted. (Unmapping the middle of an area needs one more of them, as mapping does, and there
    /// may be none left: vm.max_map_count.)
    pub(crate) fn evict(&mut self, slot: usize) {
        vmm::count(&ledger().events[event::EVICTION]);
        self.spaces[slot].mapped = true;
        self.queue_everything(slot);
    }

    /// Queues a mapping or a change of rights for a page that faulted: the last command before the
    /// process goes on, for which there is always room.
    pub(crate) fn queue_answer(&mut self, slot: usize, command: Command) {
        self.push(slot, command);
    }

    /// Queues a mapping in the place of another one.
    pub(crate) fn queue_map(&mut self, slot: usize, command: Command) {
        self.queue(slot, command);
    }

    /// Makes what is queued the command page's content.
    pub(crate) fn post(&mut self, slot: usize) -> &'static mut Commands {
        let page = commands(slot);
        let queued = self.spaces[slot].queued;
        let takes = |command: &Command| command.flags == 0 || command.rights == 0;
        if page.entries[..queued].iter().any(takes) {
            vmm::count(&ledger().events[event::SHOOTDOWN]);
        }
        page.end =
            (core::mem::offset_of!(Commands, entries) + queued * size_of::<Command>()) as u32;
        page
    }

    /// Notes that the gate has seen it.
    pub(crate) fn taken(&mut self, slot: usize) {
        let page = commands(slot);
        page.end = 0;
        self.spaces[slot].queued = 0;
    }
}
