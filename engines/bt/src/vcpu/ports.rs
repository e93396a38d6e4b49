//! `in` and `out`: the exits that are most frequent, by the shortest way.
//!
//! What such an exit says stays in the vCPU and isn't handed from function to function: read whole
//! just after it was written in parts, it would wait for the store buffer each time. Where the machine is
//! at hand, translated code calls [`answer`] and need not leave. String forms are in file `answer`.

use engine_core::{After, DeviceBus, Exit, ExitReason};

use super::{BtVcpu, Pending, Stop};
use crate::{context::Context, core::Core, fault::Fault, site::Port};

/// The access to a port that ended a run; what is written is in `BtVcpu::data`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PortAccess {
    number: u16,
    size: u8,
    write: bool,
}

impl BtVcpu {
    /// What the run ends with, if translated code has left for a port that it may access.
    #[inline]
    pub(super) fn left_for_port(&mut self) -> Option<Stop> {
        let number = self.core.context().site;
        // Numbers that name no site lie beyond all of them.
        let (homes, port) = self.cache.port((number >> 1) as usize)?;
        homes.settle(self.core.context());
        if number & 1 == 1 {
            self.core.rip = port.next;
            return Some(Stop::Answered);
        }
        // Refused, it comes again, with the registers where they are.
        self.port(port).is_ok().then_some(Stop::Port)
    }

    /// Has the run end with [`Stop::Port`], if the guest may access the port.
    #[inline]
    pub(super) fn port(&mut self, port: Port) -> Result<(), Fault> {
        let number = port.number(&self.core);
        self.core.check_port(number, port.size)?;
        self.counts.add(ExitReason::Helper);
        self.core.rip = port.next;
        if port.write {
            self.write_port(number, port.size, self.core.gpr(0) as u32);
        } else {
            self.read_port(number, port.size);
        }
        Ok(())
    }

    /// Has [`Stop::Port`] be a write.
    #[inline]
    pub(super) fn write_port(&mut self, number: u16, size: u8, value: u32) {
        self.data = u64::from(value).to_le_bytes();
        self.port_access = PortAccess {
            number,
            size,
            write: true,
        };
    }

    /// Has [`Stop::Port`] be a read.
    #[inline]
    pub(super) fn read_port(&mut self, number: u16, size: u8) {
        self.data = [0; 8];
        self.pending = Pending::In { size };
        self.port_access = PortAccess {
            number,
            size,
            write: false,
        };
    }

    /// The exit of [`Stop::Port`].
    #[inline]
    pub(super) fn port_exit(&mut self) -> Exit<'_> {
        let PortAccess {
            number: port,
            size,
            write,
        } = self.port_access;
        let data = &mut self.data[..usize::from(size)];
        if write {
            Exit::PioOut { port, size, data }
        } else {
            Exit::PioIn { port, size, data }
        }
    }

    /// Takes in what was read.
    #[inline]
    pub(super) fn take_port(&mut self, size: u8) {
        let [a, b, c, d, ..] = self.data;
        self.core.take_in([a, b, c, d], size);
    }

    /// Has the access of [`answer`] answered. False if the run has to end, for that or another reason.
    #[inline]
    fn answer_port(&mut self, context: &mut Context, site: u64) -> bool {
        let Some(port) = self.cache.kept_port((site >> 1) as usize) else {
            return false;
        };
        let Some(mut bus) = self.bus else {
            return false;
        };
        debug_assert!(self.core.may_access_ports(), "as the code's mode says");
        debug_assert!(!self.core.debugging(), "there is no owner then");
        // SAFETY: whoever runs this vCPU has lent it for as long as the run lasts.
        let bus = unsafe { bus.as_mut() };
        self.counts.add(ExitReason::Helper);
        // As at the end of every run.
        self.core.shortcuts.priority_matters = 0;
        let (at, size) = (port.number(context.gpr[2] as u16), usize::from(port.size));
        // Nobody looks at it if the access has the run end.
        context.resume = port.resume();
        let after = if port.write {
            let value = (context.gpr[0] as u32).to_le_bytes();
            bus.port_out(at, &value[..size])
        } else {
            let (value, after) = match size {
                1 => {
                    let ([byte], after) = read(bus, at);
                    (byte.into(), after)
                }
                2 => {
                    let (word, after) = read(bus, at);
                    (u16::from_le_bytes(word).into(), after)
                }
                _ => {
                    let (double, after) = read(bus, at);
                    (u32::from_le_bytes(double).into(), after)
                }
            };
            context.set_gpr_sized(0, value, size as u32);
            after
        };
        if after == After::Return {
            // The access is over.
            context.site |= 1;
        }
        after == After::Enter
    }
}

/// Reads a port of so many bytes, and nothing around them: a wider look at what the device has just written would
/// wait for the store buffer.
#[inline]
fn read<const SIZE: usize>(bus: &mut dyn DeviceBus, port: u16) -> ([u8; SIZE], After) {
    let mut bytes = [0; SIZE];
    let after = bus.port_in(port, &mut bytes);
    (bytes, after)
}

impl Port {
    #[inline]
    fn number(&self, core: &Core) -> u16 {
        match self.number {
            Some(number) => number.into(),
            None => core.gpr(2) as u16,
        }
    }
}

impl Core {
    /// Writes what a port of this size was read as, by the width that the device wrote.
    #[inline]
    fn take_in(&mut self, [a, b, c, d]: [u8; 4], size: u8) {
        let value = match size {
            1 => a.into(),
            2 => u16::from_le_bytes([a, b]).into(),
            _ => u32::from_le_bytes([a, b, c, d]).into(),
        };
        self.set_gpr_sized(0, value, size.into());
    }
}

/// What [`crate::callout`] calls for an access to a port whose site is stored. 0 to go on.
///
/// # Safety
/// `vcpu` runs translated code with `context`, and nobody else uses them.
pub(super) unsafe extern "C" fn answer(vcpu: *mut BtVcpu, context: *mut Context, site: u64) -> u32 {
    // SAFETY: the caller's promise; the context lies in the arena, and not in the vCPU.
    let (vcpu, context) = unsafe { (&mut *vcpu, &mut *context) };
    u32::from(!vcpu.answer_port(context, site))
}
