//! Events, time and console, as far as K does them itself.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::fence;

use crate::hypercall::errno::{E2BIG, EFAULT, EINVAL, ENOENT, ENOSPC, ENOSYS};
use crate::hypercall::{ConsoleRing, SharedInfo, console_io, evtchn, sched};
use crate::memory::Errno;
use crate::wire::{self, event, k, k_fd};
use crate::{State, ledger, sys, vmm};

const EINTR: i64 = 4;
const TFD_TIMER_ABSTIME: u64 = 1;

/// The timer's port. Fixed, so that V need not ask.
const TIMER_PORT: u64 = 0;
/// Ports that are bound from the start or once asked for.
const FIXED_PORTS: u64 = 1 << TIMER_PORT | 1 << evtchn::CONSOLE_PORT;

/// Which ports are bound.
pub(crate) struct Ports {
    timer: bool,
    ipi: u64,
}

impl Ports {
    pub(crate) const NONE: Ports = Ports {
        timer: false,
        ipi: 0,
    };

    fn bound(&self, port: u64) -> bool {
        let timer = if self.timer { 1 << TIMER_PORT } else { 0 };
        port < evtchn::PORTS && (timer | 1 << evtchn::CONSOLE_PORT | self.ipi) >> port & 1 != 0
    }
}

/// The page that V and the kernel share.
pub(crate) fn shared() -> &'static SharedInfo {
    // SAFETY: mapped at the start; all its fields are atomic.
    unsafe { &*(k::SHARED_INFO as *const SharedInfo) }
}

fn console() -> &'static ConsoleRing {
    // SAFETY: as above.
    unsafe { &*(k::CONSOLE as *const ConsoleRing) }
}

/// Sets the timer to a time of the host's monotonic clock, or clears it (0).
pub(crate) fn arm(deadline_ns: u64) -> i64 {
    vmm::count_exit();
    const SECOND: u64 = 1_000_000_000;
    // struct itimerspec: interval, value. A time beyond what the host takes never comes.
    let seconds = (deadline_ns / SECOND).min(i64::MAX as u64 / SECOND);
    let setting = [0, 0, seconds, deadline_ns % SECOND];
    let arguments = [
        k_fd::TIMER as u64,
        TFD_TIMER_ABSTIME,
        &raw const setting as u64,
        0,
        0,
        0,
    ];
    // SAFETY: `setting` is readable for the duration of the call.
    match unsafe { sys::call(sys::nr::TIMERFD_SETTIME, arguments) } {
        0 => 0,
        error => vmm::failed(sys::nr::TIMERFD_SETTIME, error),
    }
}

/// Sleeps until `awake`.
fn sleep(awake: impl Fn() -> bool) {
    let ledger = ledger();
    while !awake() {
        ledger.asleep.store(1, Relaxed);
        fence(SeqCst);
        if !awake() {
            vmm::count_exit();
            let mut count = 0u64;
            let arguments = [k_fd::WAKE as u64, &raw mut count as u64, 8, 0, 0, 0];
            // SAFETY: `count` is writable for the duration of the call.
            let result = unsafe { sys::call(sys::nr::READ, arguments) };
            if result < 0 && result != -EINTR {
                vmm::failed(sys::nr::READ, result);
            }
        }
        ledger.asleep.store(0, Relaxed);
    }
}

impl State {
    pub(crate) fn sched_op(&mut self, command: u64, argument: u64) -> Result<i64, Errno> {
        match command {
            sched::YIELD => {
                vmm::count_exit();
                // SAFETY: has no arguments.
                unsafe { sys::call(sys::nr::YIELD, [0; 6]) };
                Ok(0)
            }
            sched::BLOCK => {
                shared().upcall_mask.store(0, Relaxed);
                sleep(|| shared().upcall_pending.load(SeqCst) != 0);
                Ok(0)
            }
            sched::SHUTDOWN => Ok(vmm::call(wire::vmm::SHUTDOWN, argument & 0xffff_ffff)),
            sched::POLL if argument != 0 => {
                sleep(|| shared().pending.load(SeqCst) & argument != 0);
                Ok(0)
            }
            sched::POLL => Err(-EINVAL),
            _ => Err(-ENOSYS),
        }
    }

    pub(crate) fn event_channel_op(&mut self, command: u64, argument: u64) -> Result<i64, Errno> {
        match command {
            evtchn::BIND_VIRQ if argument == evtchn::VIRQ_TIMER => {
                self.events.timer = true;
                Ok(TIMER_PORT as i64)
            }
            evtchn::BIND_VIRQ => Err(-EINVAL),
            evtchn::BIND_IPI if argument != 0 => Err(-ENOENT),
            evtchn::BIND_IPI => {
                let port = (!(self.events.ipi | FIXED_PORTS)).trailing_zeros();
                if port >= evtchn::PORTS as u32 {
                    return Err(-ENOSPC);
                }
                self.events.ipi |= 1 << port;
                Ok(port.into())
            }
            evtchn::CLOSE | evtchn::UNMASK | evtchn::SEND if !self.events.bound(argument) => {
                Err(-EINVAL)
            }
            evtchn::CLOSE => {
                let bit = 1 << argument;
                shared().mask.fetch_or(bit, SeqCst);
                shared().pending.fetch_and(!bit, SeqCst);
                self.events.timer &= argument != TIMER_PORT;
                self.events.ipi &= !bit;
                Ok(0)
            }
            evtchn::UNMASK => {
                let bit = 1 << argument;
                shared().mask.fetch_and(!bit, SeqCst);
                if shared().pending.load(SeqCst) & bit != 0 {
                    shared().upcall_pending.store(1, SeqCst);
                }
                Ok(0)
            }
            evtchn::SEND if argument == evtchn::CONSOLE_PORT => {
                vmm::count(&ledger().events[event::DOORBELL]);
                vmm::count_exit();
                let one = 1u64;
                let arguments = [k_fd::BELL as u64, &raw const one as u64, 8, 0, 0, 0];
                // SAFETY: `one` is readable for the duration of the call. A full counter (EAGAIN)
                // means that V has rings enough to answer.
                unsafe { sys::call(sys::nr::WRITE, arguments) };
                Ok(0)
            }
            evtchn::SEND if self.events.ipi >> argument & 1 != 0 => {
                let bit = 1 << argument;
                shared().pending.fetch_or(bit, SeqCst);
                if shared().mask.load(SeqCst) & bit == 0 {
                    shared().upcall_pending.store(1, SeqCst);
                }
                Ok(0)
            }
            evtchn::SEND => Err(-EINVAL),
            _ => Err(-ENOSYS),
        }
    }

    pub(crate) fn console_io(
        &mut self,
        command: u64,
        count: u64,
        buffer: u64,
    ) -> Result<i64, Errno> {
        match command {
            console_io::WRITE => {
                if count > 4096 {
                    return Err(-E2BIG);
                }
                let bytes = self.array::<u8>(buffer, count)?;
                let ring = console();
                let size = ring.output.len() as u32;
                for index in 0..count {
                    let producer = ring.output_producer.load(Relaxed);
                    if producer.wrapping_sub(ring.output_consumer.load(Acquire)) >= size {
                        flush_console();
                    }
                    ring.output[(producer % size) as usize].store(bytes.get(index), Relaxed);
                    ring.output_producer
                        .store(producer.wrapping_add(1), Release);
                }
                flush_console();
                Ok(count as i64)
            }
            console_io::READ => {
                if !self.kernel_has(buffer, count, sys::PROT_WRITE) {
                    return Err(-EFAULT);
                }
                let ring = console();
                let size = ring.input.len() as u32;
                let mut taken = 0;
                while taken < count {
                    let consumer = ring.input_consumer.load(Relaxed);
                    if consumer == ring.input_producer.load(Acquire) {
                        break;
                    }
                    let byte = ring.input[(consumer % size) as usize].load(Relaxed);
                    // SAFETY: the buffer was found to be the kernel's to write.
                    unsafe { ((buffer + taken) as *mut u8).write(byte) };
                    ring.input_consumer.store(consumer.wrapping_add(1), Release);
                    taken += 1;
                }
                Ok(taken as i64)
            }
            console_io::FLUSH => {
                flush_console();
                Ok(0)
            }
            _ => Err(-ENOSYS),
        }
    }
}

/// Waits until V has taken all output.
fn flush_console() {
    vmm::call(wire::vmm::CONSOLE, 0);
}
