//! What a vCPU's thread does while its guest does nothing: it polls, has halted, or waits to be
//! started. The machine is let go for the time of the sleep.

use std::time::Duration;

use super::reach::Reach;
use super::{End, Limit, Outcome, Run};
use crate::Machine;
use crate::seats::Rest;

/// Polls for input, one directly after the other, after which output is written out. A guest that
/// checks the transmitter before each byte polls once per byte.
const POLLS_UNTIL_FLUSH: u32 = 2;
/// Polls for input after which the guest is held to wait for it.
const POLLS_UNTIL_NAP: u32 = 64;
/// The first nap.
const SHORTEST_NAP: Duration = Duration::from_micros(100);
/// The longest time that a polling guest is held.
const LONGEST_NAP: Duration = Duration::from_millis(50);
/// As long where interrupts don't pass the run loop, so that none can end the nap.
const LONGEST_BLIND_NAP: Duration = Duration::from_millis(1);
/// Naps after which a guest that polls for input that can't come any more is given up.
const NAPS_WITHOUT_INPUT: u32 = 20;

impl<const SHARED: bool> Run<'_, SHARED> {
    /// The guest polled for input and there is none.
    pub(super) fn polled<R: Reach>(&mut self, reach: &mut R) -> Option<End> {
        self.polls = self.polls.saturating_add(1);
        if self.polls < POLLS_UNTIL_NAP && self.polls != POLLS_UNTIL_FLUSH {
            return None;
        }
        let mut machine = reach.hold();
        if self.polls == POLLS_UNTIL_FLUSH {
            self.idle(&mut machine);
            return None;
        }
        // An interrupt that waits for the guest must not wait for the nap too.
        if machine.irqchip.waiting(self.cpu) {
            return None;
        }
        if self.naps >= NAPS_WITHOUT_INPUT
            && machine.serial.input_exhausted()
            && machine.schedule.next().is_none()
            && machine.seats.others_rest(self.cpu)
        {
            return Some(Outcome::Limit(Limit::Input).into());
        }
        let nap =
            SHORTEST_NAP
                .saturating_mul(1 << self.naps.min(16))
                .min(if machine.own_controllers {
                    LONGEST_NAP
                } else {
                    LONGEST_BLIND_NAP
                });
        self.naps += 1;
        if SHARED {
            // The last access may have news, which wait for no nap.
            machine.tell_others();
            machine.seats.set_rest(self.cpu, Rest::Nap);
        }
        drop(machine);
        self.events.sleep(Some(nap));
        if SHARED {
            reach.hold().seats.set_rest(self.cpu, Rest::None);
        }
        None
    }

    /// The guest has nothing to do: time for what must not disturb a measurement.
    fn idle(&mut self, machine: &mut Machine) {
        // A broken console is noticed at the guest's next byte.
        let _ = machine.serial.output_mut().flush_now();
        machine.report_windows(self.vcpu);
    }

    /// The guest halted: sleeps until something can be delivered.
    pub(super) fn halted<R: Reach>(&mut self, reach: &mut R) -> Option<End> {
        self.polls = 0;
        self.naps = 0;
        let mut machine = reach.hold();
        self.idle(&mut machine);
        loop {
            if let Some(end) = self.events(&mut machine) {
                return Some(end);
            }
            let interruptible = self.vcpu.interruptible();
            if self.wakes(&mut machine, interruptible) {
                self.look = true;
                return None;
            }
            machine
                .seats
                .set_rest(self.cpu, Rest::Halt { interruptible });
            if let Some(end) = self.doomed(&mut machine) {
                return Some(end);
            }
            if SHARED {
                machine.tell_others();
                machine.arm();
                drop(machine);
                self.events.sleep(None);
                machine = reach.hold();
            } else if let Some(left) = self.left(&mut machine) {
                if left != Some(Duration::ZERO) {
                    drop(machine);
                    self.events.sleep(left);
                    machine = reach.hold();
                }
                machine.advance();
            }
            machine.seats.set_rest(self.cpu, Rest::None);
        }
    }

    /// True if something has come that ends a halt.
    fn wakes(&mut self, machine: &mut Machine, interruptible: bool) -> bool {
        let irqchip = &mut machine.irqchip;
        let signal = irqchip.lapics.signal(self.cpu);
        if signal.init || signal.nmis != 0 && !self.vcpu.nmi_blocked() {
            return true;
        }
        interruptible && {
            let priority = self.vcpu.task_priority();
            irqchip.lapics.own().sync_task_priority(priority);
            irqchip.deliverable(self.cpu).is_some()
        }
    }

    /// The end of a guest of which no vCPU can ever be woken.
    fn doomed(&mut self, machine: &mut Machine) -> Option<End> {
        if !machine.seats.others_rest(self.cpu) {
            return None;
        }
        if !machine.seats.some_interruptible() && !machine.irqchip.has_unmaskable() {
            return Some(self.crashed("halted with interrupts disabled: nothing can wake it"));
        }
        if machine.may_wake() {
            return None;
        }
        if machine.input.claimed() {
            return Some(Outcome::Limit(Limit::Input).into());
        }
        Some(self.crashed("halted with no interrupt source armed: nothing can wake it"))
    }

    /// How long to sleep. The pump's timer is called off: a sleep of our own ends without another
    /// thread's help.
    fn left(&mut self, machine: &mut Machine) -> Option<Option<Duration>> {
        let Some(due) = machine.schedule.next() else {
            return Some(None);
        };
        let left = due.saturating_sub(machine.clock().now());
        if left > 0
            && let Some(time) = machine.schedule.arm(None)
        {
            machine.pump.arm_timer(time);
        }
        Some(Some(Duration::from_nanos(left)))
    }

    /// The vCPU has taken INIT or was never started: sleeps until a start-up IPI comes.
    pub(super) fn await_startup<R: Reach>(&mut self, reach: &mut R) -> Option<End> {
        let mut machine = reach.hold();
        loop {
            if let Some(end) = self.events(&mut machine) {
                return Some(end);
            }
            if machine.irqchip.lapics.signal(self.cpu).startup.is_some() {
                self.look = true;
                return None;
            }
            machine.seats.set_rest(self.cpu, Rest::Stop);
            if let Some(end) = self.doomed(&mut machine) {
                return Some(end);
            }
            machine.tell_others();
            machine.arm();
            drop(machine);
            self.events.sleep(None);
            machine = reach.hold();
            machine.seats.set_rest(self.cpu, Rest::None);
        }
    }
}
