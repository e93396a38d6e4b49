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
//!   commands have been carried out. The user's registers lie in the signal frame on a page
//!   that U and K share. The answer lets the gate carry out the commands that stand in U's command page
//!   (map, unmap, segment bases), and then either notify again or return into the frame.
//!
//! What K changes in a U happens on this one path, because nobody but U can change its mappings. A U
//! that waits in a system call is brought to the gate first: K sends it the preemption signal and
//! answers the call; the signal is taken before the first user instruction, and the frame holds
//! the state after the call. So the value of that call is written to the frame's `rax`.
//!
//! # The memory descriptor
//!
//! A gate that is to map needs guest memory's descriptor, and user code must never have it. K sends
//! it over a socket of this one process just before it answers, and the gate receives it, maps, and
//! closes it before it returns. (SECCOMP_IOCTL_NOTIF_ADDFD would do without a socket, but the
//! target has to be woken to install the descriptor, and K to learn that it did, neither of them
//! synchronously.) K sends it only to a notification whose instruction pointer is the gate's.
//! User code can jump there and make that same notification; what it gains is that K's commands are
//! carried out and its own frame is returned into: from the notification on the gate uses nothing but
//! the command page.
//!
//! User code that forged its way in can have signals unblocked, and arrange that one comes while the
//! descriptor waits or is open (the trap flag, a preemption). Then the gate is entered again, by a
//! signal whose frame the host has just written and which points into the gate, or lies elsewhere than
//! on the signal stack. K sees that before any user code runs, and ends the process: a new one takes
//! its place, with nothing mapped and no descriptor (`replace`).
//!
//! # What is not believed
//!
//! The frame page is U's to write whenever user code runs. K takes registers from it as the user's
//! own, masks vectors and flags, checks that the frame lies on the signal stack, and treats
//! anything else (a notification nobody asked for, a signal inside the gate) as a broken signal state:
//! the process is replaced and the kernel gets the failsafe upcall.
//!
//! # Preemption
//!
//! Before U runs, K publishes its slot in the ledger and then looks for pending events; V sets an
//! event pending and then looks whose slot is published. One of the two sends the signal. A signal
//! that comes late interrupts U's next run for nothing, which is harmless.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::fence;

use crate::hypercall::Registers;
use crate::hypercall::layout::{USER_CS, USER_END, USER_SS};
use crate::spaces::Stop;
use crate::trap::user_flags;
use crate::wire::{self, Command, Commands, SLOT_SIZE, event, gate, k, k_fd, relax, u};
use crate::{State, events, ledger, sys, vmm};

/// SECCOMP_IOCTL_NOTIF_RECV, _SEND (linux/seccomp.h).
const NOTIF_RECV: u64 = 0xc050_2100;
const NOTIF_SEND: u64 = 0xc018_2101;

const EINTR: i64 = 4;
const ENOENT: i64 = 2;
const ENOSYS: i32 = 38;
const SIGILL: u64 = 4;
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

/// Sends guest memory's descriptor to the gate of a process that waits for an answer.
fn send_memory(slot: usize) {
    if !sys::send_descriptor(k_fd::DOOR + slot as i32, k_fd::RAM, 0) {
        vmm::failed(sys::nr::SENDMSG, 0);
    }
}

/// The command page of a slot.
pub(crate) fn commands(slot: usize) -> &'static mut Commands {
    // SAFETY: the slots are mapped, U only reads this page, and nobody keeps the reference.
    unsafe { &mut *((k::SLOTS + slot as u64 * SLOT_SIZE) as *mut Commands) }
}

/// `struct sigcontext_64`, and the way to it.
#[repr(C)]
pub(crate) struct Context {
    r8_to_r15: [u64; 8],
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    rflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error: u64,
    vector: u64,
    mask: u64,
    address: u64,
    fpstate: u64,
    reserved: [u64; 8],
}

/// Offset of ucontext in the signal frame, of the sigcontext in ucontext, of the signal mask there.
const UCONTEXT: u64 = 8;
const SIGCONTEXT: u64 = 40;
const SIGMASK: u64 = 296;
/// Bytes of a signal frame without FPU state: return address, ucontext, siginfo.
const FRAME_SIZE: u64 = 8 + 304 + 128;
/// Where K puts together the frame of a fresh register file: the host's frames lie at the other end.
const FRESH_FRAME: u64 = u::SIGNAL_STACK;
/// UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
const UC_FLAGS: u64 = 6;
const SS_AUTODISARM: u64 = 1 << 31;

impl Context {
    /// The sigcontext in a ucontext.
    pub(crate) fn in_ucontext(ucontext: *mut u8) -> *mut Context {
        ucontext.wrapping_add(SIGCONTEXT as usize).cast()
    }

    /// Vector, error code and address of the exception that raised the signal.
    pub(crate) fn exception(&self, signal: u64) -> (u64, u64, u64) {
        if signal == SIGILL {
            // Some come without an exception, and leave the vector of an earlier one.
            return (6, 0, 0);
        }
        let address = if self.vector == 14 { self.address } else { 0 };
        (self.vector & 31, self.error, address)
    }

    pub(crate) fn registers(&self) -> Registers {
        let mut gpr = [0; 16];
        let first = [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
        ];
        gpr[..8].copy_from_slice(&first);
        gpr[8..].copy_from_slice(&self.r8_to_r15);
        Registers {
            gpr,
            rip: self.rip,
            rflags: self.rflags,
            cs: USER_CS.into(),
            ss: USER_SS.into(),
        }
    }

    fn set_registers(&mut self, registers: &Registers) {
        let Registers {
            gpr,
            rip,
            rflags,
            cs: _,
            ss: _,
        } = *registers;
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
        ] = [
            gpr[0], gpr[1], gpr[2], gpr[3], gpr[4], gpr[5], gpr[6], gpr[7],
        ];
        self.r8_to_r15.copy_from_slice(&gpr[8..]);
        self.rip = rip;
        self.rflags = user_flags(rflags);
        self.cs = USER_CS;
        self.ss = USER_SS;
    }

    /// Continues elsewhere.
    pub(crate) fn redirect(&mut self, rip: u64, rsp: u64, rdi: u64) {
        self.rip = rip;
        self.rsp = rsp;
        self.rdi = rdi;
        self.rflags &= !(1 << 8 | 1 << 10);
    }
}

/// K's view of an address on U's signal stack.
fn signal_stack(slot: usize, address: u64) -> *mut u8 {
    (k::SLOTS + slot as u64 * SLOT_SIZE + (address - u::COMMANDS)) as *mut u8
}

/// Whether a signal frame can lie at `address`.
fn frame_fits(address: u64) -> bool {
    address.is_multiple_of(8)
        && (u::SIGNAL_STACK..=u::SIGNAL_STACK + u::SIGNAL_STACK_SIZE - FRAME_SIZE)
            .contains(&address)
}

/// The registers in the frame of a stopped process. The reference must not outlive the stop.
fn context(slot: usize, frame: u64) -> &'static mut Context {
    let ucontext = signal_stack(slot, frame + UCONTEXT);
    // SAFETY: `frame_fits` held for the frame; U, the only other one that writes there, is stopped.
    unsafe { &mut *Context::in_ucontext(ucontext) }
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
            Stop::Signal { frame, .. } => Some(context(slot, frame).registers()),
            Stop::Fresh | Stop::Call | Stop::Running => None,
        }
    }

    /// Replaces the registers of a process that is stopped in the gate.
    pub(crate) fn set_registers(&mut self, slot: usize, registers: &Registers) {
        if let Stop::Signal { frame, .. } = self.spaces[slot].stop {
            context(slot, frame).set_registers(registers);
        }
    }

    /// Puts together a frame whose return starts user mode anew.
    pub(crate) fn fresh_frame(&mut self, slot: usize, registers: &Registers) {
        let words = signal_stack(slot, FRESH_FRAME).cast::<u64>();
        // SAFETY: the frame lies at the start of the signal stack; U is stopped.
        unsafe {
            for index in 0..(FRAME_SIZE / 8) as usize {
                words.add(index).write(0);
            }
            words.add(1).write(UC_FLAGS);
            words.add(3).write(u::SIGNAL_STACK);
            words.add(4).write(SS_AUTODISARM);
            words.add(5).write(u::SIGNAL_STACK_SIZE);
            words.add(((UCONTEXT + SIGMASK) / 8) as usize).write(0);
        }
        self.spaces[slot].stop = Stop::Signal {
            frame: FRESH_FRAME,
            call: false,
        };
        // Without FPU state in the frame the host gives a fresh one.
        context(slot, FRESH_FRAME).set_registers(registers);
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

    /// Answers the gate of a stopped process, which carries out what its command page says.
    fn open_gate(&mut self, slot: usize, batch: &[Command], enter: bool) {
        let kept = self.kept();
        let space = &mut self.spaces[slot];
        let page = commands(slot);
        page.entries[..batch.len()].copy_from_slice(batch);
        page.count = batch.len() as u32;
        page.then = enter.into();
        let maps = batch.iter().any(|command| command.unmap == 0);
        page.memory = u32::from(maps) | kept;
        if enter {
            if let Stop::Signal { frame, .. } = space.stop {
                page.frame = frame + 8;
            }
            page.bases = core::mem::take(&mut space.bases);
            page.fs = space.fs;
            page.gs = space.gs;
        }
        space.stop = Stop::Running;
        if maps {
            send_memory(slot);
        }
        answer(space.id, 0, 0);
    }

    /// Whether the gate leaves the memory descriptor open: a control of the attack tests.
    fn kept(&self) -> u32 {
        u32::from(self.relax & relax::KEEP_RAM != 0) << 1
    }

    /// Brings a process that waits in a system call to the gate.
    pub(crate) fn to_gate(&mut self, slot: usize) {
        if self.spaces[slot].stop == Stop::Call {
            self.to_gate_with(slot, &[]);
        }
    }

    /// Brings it there with commands (not to map) that the gate carries out on its way; answers with
    /// the number that failed.
    fn to_gate_with(&mut self, slot: usize, batch: &[Command]) -> u64 {
        let page = commands(slot);
        page.entries[..batch.len()].copy_from_slice(batch);
        page.count = batch.len() as u32;
        page.memory = self.kept();
        page.then = 2;
        self.preempt(slot);
        self.spaces[slot].stop = Stop::Running;
        answer(self.spaces[slot].id, 0, 0);
        let notification = self.notification(slot);
        let page = commands(slot);
        page.count = 0;
        page.then = 0;
        // A process that has blocked the signal runs on: it is replaced.
        if self.stopped_by_signal(slot, &notification, true) {
            notification.arguments[2]
        } else {
            0
        }
    }

    /// Puts a new process in the place of one that has broken its signal state, or whose gate was
    /// interrupted: it may hold the memory descriptor, and it can't be commanded any more.
    fn replace(&mut self, slot: usize) {
        self.destroy_process(slot);
        if self.create_process(slot).is_err() {
            vmm::crashed(wire::crash::SIGNAL_STATE, [slot as i64, 0, 0, 0]);
        }
        self.spaces[slot].broken = true;
    }

    /// Has a stopped process carry out commands, none of which maps; answers with the number that failed.
    pub(crate) fn carry_out(&mut self, slot: usize, batch: &[Command]) -> u64 {
        if self.spaces[slot].stop == Stop::Call {
            return self.to_gate_with(slot, batch);
        }
        let stop = self.spaces[slot].stop;
        self.open_gate(slot, batch, false);
        let notification = self.notification(slot);
        if !self.from_gate(&notification) || notification.number as u64 != gate::DONE {
            // A new process has nothing mapped, which is more than any command could ask for.
            self.replace(slot);
            return 0;
        }
        commands(slot).count = 0;
        self.spaces[slot].stop = stop;
        notification.arguments[1]
    }

    /// Waits for a new process's first notification.
    pub(crate) fn await_birth(&mut self, slot: usize) {
        let notification = self.notification(slot);
        if !self.from_gate(&notification) {
            vmm::crashed(wire::crash::SIGNAL_STATE, [slot as i64, 2, 0, 0]);
        }
        self.spaces[slot].stop = Stop::Fresh;
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
            && frame_fits(frame)
            && !in_gate(context(slot, frame).rip);
        if well || self.trusting() {
            self.spaces[slot].stop = Stop::Signal { frame, call };
        } else {
            self.replace(slot);
        }
        well || self.trusting()
    }

    /// Runs user mode in the current space until the kernel is needed. `value` answers a system call.
    pub(crate) fn run(&mut self, slot: usize, value: i64) -> ! {
        let mut batch = [Command {
            address: 0,
            length: 0,
            rights: 0,
            unmap: 0,
            offset: 0,
        }; 2];
        let mut length = 0;
        events::shared().upcall_mask.store(0, Relaxed);
        if let Some(address) = self.spaces[slot].faulted.take()
            && matches!(self.spaces[slot].stop, Stop::Signal { .. })
        {
            // What the kernel has just made accessible need not fault again.
            length = self.map_in(slot, address.0, address.1, &mut batch);
        }
        loop {
            ledger().running.store(slot as u32 + 1, Relaxed);
            fence(SeqCst);
            if events::shared().upcall_pending.load(Relaxed) != 0 {
                self.preempt(slot);
            }
            match self.spaces[slot].stop {
                Stop::Call => {
                    self.spaces[slot].stop = Stop::Running;
                    answer(self.spaces[slot].id, value, 0);
                }
                Stop::Signal { .. } => self.open_gate(slot, &batch[..length], true),
                Stop::Fresh | Stop::Running => {
                    vmm::crashed(wire::crash::SIGNAL_STATE, [slot as i64, 4, 0, 0])
                }
            }
            let mut notification = self.notification(slot);
            while !self.from_gate(&notification)
                && notification.number as u64 > crate::hypercall::layout::SYSCALL_LAST
            {
                // The gate's numbers mean nothing from elsewhere.
                answer(notification.id, 0, -ENOSYS);
                notification = self.notification(slot);
            }
            ledger().running.store(0, Relaxed);
            commands(slot).count = 0;
            length = self.stopped(slot, &notification, &mut batch);
        }
    }

    /// Finds out why a process has stopped. Returns to let it go on, with that many commands.
    fn stopped(
        &mut self,
        slot: usize,
        notification: &Notification,
        batch: &mut [Command; 2],
    ) -> usize {
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
        let context = context(slot, frame);
        if notification.arguments[0] == SIGUSR1 {
            vmm::count(&ledger().events[event::PREEMPT]);
            if events::shared().upcall_pending.load(SeqCst) != 0 {
                self.upcall_event(context.registers());
            }
            return 0;
        }
        let (vector, error, address) = context.exception(notification.arguments[0]);
        if vector != 14 {
            self.upcall_exception(vector, error, address, context.registers());
        }
        let length = if address < USER_END {
            self.map_in(slot, address, error, batch)
        } else {
            0
        };
        if length != 0 {
            vmm::count(&ledger().events[event::SHADOW_FAULT]);
            return length;
        }
        self.spaces[slot].faulted = Some((address, error));
        let error = self.fault_code(slot, address, error);
        self.upcall_exception(vector, error, address, context.registers())
    }
}

fn in_gate(address: u64) -> bool {
    (u::GATE..u::GATE + u::GATE_SIZE).contains(&address)
}
