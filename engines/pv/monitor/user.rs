//! The transport between K and its user processes: seccomp user notifications.
//!
//! # How user code runs and stops
//!
//! A user process U is always in one of two places: running guest code, or waiting for K's answer to
//! a notification. K waits for notifications while a U runs, so that exactly one of them has the
//! virtual CPU, and with SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP the host's scheduler hands the CPU
//! over without looking for another one.
//!
//! Two kinds of notification reach K (seccomp_unotify(2)):
//!
//! - a guest system call, from any `syscall` instruction with a number from 0x5000: U keeps its
//!   registers, K sees number, six arguments and the instruction pointer, and the value of the
//!   answer becomes `rax`. Two host system calls in K, none in U but the call itself;
//! - the gate's own (stub/gate.s): a signal arrived (a fault, or the preemption that V or K sent), or
//!   a command has failed. The user's registers lie in the signal frame on a page
//!   that U and K share. The answer lets the gate carry out the commands that stand in U's command page
//!   (map, unmap, segment bases), and then either notify again or return into the frame.
//!
//! What K changes in a U happens on this one path, because nobody but U can change its mappings. A U
//! that waits in a system call is brought to the gate first: K sends it the preemption signal and
//! answers the call; the signal is taken before the first user instruction, since no user process
//! can block it, and the frame holds the state after the call. So the value of that call is written to
//! the frame's `rax`.
//!
//! # The key
//!
//! A user process has guest memory's descriptor open, and its jail allows mmap of it and rt_sigreturn
//! to who passes the process's key (`filter`). The key is drawn by the new process itself, lies in
//! the code of its jail, and is told to K with the first notification; no memory of U holds it. K
//! answers notifications of the gate's own instruction with it and no others. The gate maps what
//! the command page says and returns into the frame that it says, with the key in registers that
//! rt_sigreturn then replaces. User code can jump to the gate's instruction and make that same
//! notification; what it gains is that K's commands are carried out and its own frame is returned
//! into, since from the notification on the gate trusts no register but the one with the key.
//!
//! User code that jumped there can have arranged that a signal comes while the gate has the key (the
//! trap flag, a preemption, signals not being blocked then). The gate is entered again, by a frame
//! that the host has just written, key and all, and which points into the gate or lies elsewhere than
//! on the signal stack. K sees that before any user code runs, and ends the process: a new one takes
//! its place, with nothing mapped and another key (`replace`).
//!
//! The descriptor could be handed over each time instead, by a socket or by ADDFD, and closed after
//! use. That costs a page fault 4 us; and with the key rt_sigreturn can be kept from user code too.
//!
//! # What is not believed
//!
//! The frame page is U's to write whenever user code runs: see `frame`. K checks that the frame lies
//! on the signal stack, and treats anything else (a notification nobody asked for, a signal inside
//! the gate) as a broken signal state: the process is replaced and the kernel gets the failsafe
//! upcall.
//!
//! # Preemption
//!
//! Before U runs, K publishes its slot in the ledger and then looks for pending events; V sets an
//! event pending and then looks whose slot is published. One of the two sends the signal. A signal
//! that comes late interrupts U's next run for nothing, which is harmless.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::fence;

use crate::hypercall::Registers;
use crate::hypercall::layout::{SYSCALL_LAST, USER_END};
use crate::spaces::Stop;
use crate::wire::{self, Commands, SLOT_SIZE, event, gate, k, k_fd, relax, u};
use crate::{State, events, frame, ledger, sys, vmm};

/// SECCOMP_IOCTL_NOTIF_RECV, _SEND (linux/seccomp.h).
const NOTIF_RECV: u64 = 0xc050_2100;
const NOTIF_SEND: u64 = 0xc018_2101;

const EINTR: i64 = 4;
const ENOENT: i64 = 2;
const ENOSYS: i32 = 38;
pub(crate) const SIGUSR1: u64 = 10;

/// `struct seccomp_notif`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Notification {
    pub(crate) id: u64,
    pub(crate) pid: u32,
    flags: u32,
    pub(crate) number: i32,
    arch: u32,
    pub(crate) ip: u64,
    pub(crate) arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

fn listener(request: u64, argument: u64) -> i64 {
    // SAFETY: each request gets a pointer to the structure it takes.
    unsafe {
        sys::call(
            sys::nr::IOCTL,
            [k_fd::LISTENER as u64, request, argument, 0, 0, 0],
        )
    }
}

/// Waits for the next notification.
pub(crate) fn receive() -> Notification {
    loop {
        // The kernel wants it zeroed.
        let mut notification = Notification::default();
        match listener(NOTIF_RECV, &raw mut notification as u64) {
            0 => {
                vmm::count_exit();
                return notification;
            }
            // ENOENT: the sender was interrupted, or the host was suspended; it will come again.
            error if error == -EINTR || error == -ENOENT => {}
            error => vmm::failed(sys::nr::IOCTL, error),
        }
    }
}

/// Answers a notification.
fn answer(id: u64, value: i64, error: i32) {
    let answer = Answer {
        id,
        value,
        error,
        flags: 0,
    };
    match listener(NOTIF_SEND, &raw const answer as u64) {
        0 => {}
        error => vmm::failed(NOTIF_SEND, error),
    }
}

/// The command page of a slot.
pub(crate) fn commands(slot: usize) -> &'static mut Commands {
    // SAFETY: the slots are mapped, U only reads this page, and nobody keeps the reference.
    unsafe { &mut *((k::SLOTS + slot as u64 * SLOT_SIZE) as *mut Commands) }
}

impl State {
    fn trusting(&self) -> bool {
        self.relax & relax::TRUST_NOTIFICATIONS != 0
    }

    /// Whether a notification was made by the gate's own instruction.
    fn from_gate(&self, notification: &Notification) -> bool {
        (notification.ip == u::GATE_NOTIFIED || self.trusting())
            && matches!(notification.number as u64, gate::SIGNAL | gate::DONE)
    }

    /// The registers of a process that is stopped in the gate.
    pub(crate) fn registers(&self, slot: usize) -> Option<Registers> {
        match self.spaces[slot].stop {
            Stop::Signal { frame, .. } => Some(frame::context(slot, frame).registers()),
            Stop::Fresh | Stop::Call | Stop::Running => None,
        }
    }

    /// Replaces the registers of a process that is stopped in the gate.
    pub(crate) fn set_registers(&mut self, slot: usize, registers: &Registers) {
        if let Stop::Signal { frame, .. } = self.spaces[slot].stop {
            frame::context(slot, frame).set_registers(registers);
        }
    }

    /// Has a process that is stopped in the gate continue by a fresh register file.
    pub(crate) fn start_afresh(&mut self, slot: usize, registers: &Registers) {
        frame::fresh(slot, registers);
        self.spaces[slot].stop = Stop::Signal {
            frame: frame::FRESH,
            call: false,
        };
    }

    /// Sends the preemption signal.
    pub(crate) fn preempt(&self, slot: usize) {
        let process = (k_fd::PROCESS + slot as i32) as u64;
        // SAFETY: plain numbers.
        let result =
            unsafe { sys::call(sys::nr::PIDFD_SEND_SIGNAL, [process, SIGUSR1, 0, 0, 0, 0]) };
        if result != 0 {
            vmm::failed(sys::nr::PIDFD_SEND_SIGNAL, result);
        }
    }

    /// Answers the gate of a stopped process, which carries out what is queued for it and returns into
    /// the frame.
    fn open_gate(&mut self, slot: usize, frame: u64) {
        if self.relax & relax::RAW_FRAMES == 0 {
            frame::clean(slot, frame);
        }
        let page = self.post(slot);
        let space = &mut self.spaces[slot];
        page.frame = frame + 8;
        page.bases = core::mem::take(&mut space.bases);
        page.fs = space.fs;
        page.gs = space.gs;
        space.stop = Stop::Running;
        answer(space.id, space.key as i64, 0);
    }

    /// Brings a process that waits in a system call to the gate.
    pub(crate) fn to_gate(&mut self, slot: usize) {
        if self.spaces[slot].stop != Stop::Call {
            return;
        }
        self.preempt(slot);
        self.spaces[slot].stop = Stop::Running;
        answer(self.spaces[slot].id, 0, 0);
        let notification = self.notification(slot);
        self.stopped_by_signal(slot, &notification, true);
    }

    /// Puts a new process in the place of one that has broken its signal state, or whose gate was
    /// interrupted: it may have seen its key, and it can't be commanded any more.
    fn replace(&mut self, slot: usize) {
        self.destroy_process(slot);
        if self.create_process(slot).is_err() {
            vmm::crashed(wire::crash::SIGNAL_STATE, [slot as i64, 0, 0, 0]);
        }
        self.spaces[slot].broken = true;
    }

    /// Waits for a new process's first notification.
    pub(crate) fn await_birth(&mut self, slot: usize) {
        let notification = self.notification(slot);
        if !self.from_gate(&notification) {
            vmm::crashed(wire::crash::SIGNAL_STATE, [slot as i64, 2, 0, 0]);
        }
        let space = &mut self.spaces[slot];
        space.key = notification.arguments[2];
        space.stop = Stop::Fresh;
        if self.relax & relax::SHOW_KEY != 0 {
            commands(slot).key = self.spaces[slot].key;
        }
        self.taken(slot);
    }

    /// The next notification, which must be this process's: all others wait.
    fn notification(&mut self, slot: usize) -> Notification {
        let notification = receive();
        if notification.pid != self.spaces[slot].pid && !self.trusting() {
            vmm::crashed(
                wire::crash::SIGNAL_STATE,
                [slot as i64, 3, notification.pid.into(), 0],
            );
        }
        self.spaces[slot].id = notification.id;
        notification
    }

    /// Takes in a signal notification; false, the process replaced, if it is not one, its frame is not
    /// where it belongs, or the gate was interrupted.
    fn stopped_by_signal(&mut self, slot: usize, notification: &Notification, call: bool) -> bool {
        let frame = notification.arguments[1];
        let well = self.from_gate(notification)
            && notification.number as u64 == gate::SIGNAL
            && frame::fits(frame)
            && !in_gate(frame::context(slot, frame).rip);
        if well || self.trusting() {
            self.spaces[slot].stop = Stop::Signal { frame, call };
        } else {
            self.replace(slot);
        }
        well || self.trusting()
    }

    /// Runs user mode in the current space until the kernel is needed. `value` answers a system call.
    pub(crate) fn run(&mut self, slot: usize, value: i64) -> ! {
        events::shared().upcall_mask.store(0, Relaxed);
        if let Some((address, error)) = self.spaces[slot].faulted.take()
            && matches!(self.spaces[slot].stop, Stop::Signal { .. })
        {
            // What the kernel has just made accessible need not fault again.
            self.map_again(slot, address, error);
        }
        loop {
            ledger().running.store(slot as u32 + 1, Relaxed);
            fence(SeqCst);
            if events::shared().upcall_pending.load(Relaxed) != 0 {
                self.preempt(slot);
            }
            let stop = self.spaces[slot].stop;
            match stop {
                Stop::Call => {
                    self.spaces[slot].stop = Stop::Running;
                    answer(self.spaces[slot].id, value, 0);
                }
                Stop::Signal { frame, .. } => self.open_gate(slot, frame),
                Stop::Fresh | Stop::Running => {
                    vmm::crashed(wire::crash::SIGNAL_STATE, [slot as i64, 4, 0, 0])
                }
            }
            let mut notification = self.notification(slot);
            while !self.from_gate(&notification) && notification.number as u64 > SYSCALL_LAST {
                // The gate's numbers mean nothing from elsewhere.
                answer(notification.id, 0, -ENOSYS);
                notification = self.notification(slot);
            }
            ledger().running.store(0, Relaxed);
            self.taken(slot);
            let done = notification.number as u64 == gate::DONE
                && notification.arguments[2] == self.spaces[slot].key;
            if done && stop != Stop::Call && self.from_gate(&notification) {
                // Commands failed, so the gate has not returned into the frame.
                self.evict(slot);
                self.spaces[slot].stop = stop;
                continue;
            }
            self.stopped(slot, &notification);
        }
    }

    /// Finds out why a process has stopped. Returns to let it go on.
    fn stopped(&mut self, slot: usize, notification: &Notification) {
        if !self.from_gate(notification) {
            self.spaces[slot].stop = Stop::Call;
            self.spaces[slot].result = 0;
            let Notification {
                number,
                arguments,
                ip,
                ..
            } = *notification;
            self.upcall_syscall(number as u64, arguments, ip);
        }
        if !self.stopped_by_signal(slot, notification, false) {
            self.upcall_failsafe();
        }
        let Stop::Signal { frame, .. } = self.spaces[slot].stop else {
            self.upcall_failsafe();
        };
        let context = frame::context(slot, frame);
        if notification.arguments[0] == SIGUSR1 {
            vmm::count(&ledger().events[event::PREEMPT]);
            if events::shared().upcall_pending.load(SeqCst) != 0 {
                self.upcall_event(context.registers());
            }
            return;
        }
        let (vector, error, address) = context.exception(notification.arguments[0]);
        if vector != 14 {
            self.upcall_exception(vector, error, address, context.registers());
        }
        if address < USER_END && self.map_in(slot, address, error) {
            vmm::count(&ledger().events[event::SHADOW_FAULT]);
            return;
        }
        self.spaces[slot].faulted = Some((address, error));
        let error = self.fault_code(slot, address, error);
        self.upcall_exception(vector, error, address, context.registers())
    }
}

fn in_gate(address: u64) -> bool {
    (u::GATE..u::GATE + u::GATE_SIZE).contains(&address)
}
