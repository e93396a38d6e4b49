//! Virtio over MMIO, version 2 (4.2): registers around a [`Core`].
//!
//! The interrupt is a level: it is up while InterruptStatus is not zero, and the driver takes it
//! down by acknowledging. Registers are 32 bits wide; other accesses to them are ignored, and read
//! as ones. The configuration takes accesses of any size.

use std::os::fd::BorrowedFd;

use super::core::{Core, Notice};
use crate::devices::{Action, Device};
use crate::interrupt::Line;

/// Bytes of one transport's registers, configuration included.
pub const SIZE: u64 = 0x200;
/// First transport of a PC, where QEMU's microvm machine has it.
pub const BASE: u64 = 0xfeb0_0000;
/// Transports of a PC.
pub const COUNT: u64 = 8;
/// Interrupt line of the first transport; the others follow.
pub const FIRST_LINE: u8 = 5;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "TRPL".
const VENDOR: u32 = 0x4c50_5254;

/// Register offsets (4.2.2).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// InterruptStatus: a used buffer.
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus: a configuration change.
pub const CONFIG_CHANGE: u32 = 2;

/// A transport and the device behind it, or none.
#[derive(Debug)]
pub struct Mmio {
    core: Option<Core>,
    line: Line,
    interrupts: u32,
    /// DeviceFeaturesSel, DriverFeaturesSel and QueueSel.
    device_half: u32,
    driver_half: u32,
    queue: usize,
    /// DriverFeatures as written so far.
    driver: u64,
    /// Queues in which requests were left, one bit each.
    left: u32,
}

impl Mmio {
    /// A transport whose interrupt is `line`.
    pub fn new(core: Core, line: Line) -> Self {
        Mmio {
            core: Some(core),
            ..Mmio::vacant(line)
        }
    }

    /// A transport without a device: its device type is 0 (4.2.2.1).
    pub fn vacant(line: Line) -> Self {
        Mmio {
            core: None,
            line,
            interrupts: 0,
            device_half: 0,
            driver_half: 0,
            queue: 0,
            driver: 0,
            left: 0,
        }
    }

    /// The device.
    pub fn core(&self) -> Option<&Core> {
        self.core.as_ref()
    }

    /// The driver notifies of queue `index`. What a round leaves over waits for
    /// [`advance`](Device::advance), so that the guest and whoever limits it get a word in between.
    pub(crate) fn notify(&mut self, index: usize) -> Action {
        let Some(core) = &mut self.core else {
            return Action::None;
        };
        let notice = core.notify(index);
        if notice.more {
            self.left |= 1u32.checked_shl(index as u32).unwrap_or(0);
        }
        self.tell(notice)
    }

    /// Asks for the interrupt anew if it is still wanted: somebody else has lowered the line.
    pub(crate) fn ask_again(&mut self) {
        self.line.set(false);
        self.line.set(self.interrupts != 0);
    }

    fn tell(&mut self, notice: Notice) -> Action {
        if notice.used != 0 {
            self.interrupts |= USED_BUFFER;
        }
        if notice.config {
            self.interrupts |= CONFIG_CHANGE;
        }
        self.line.set(self.interrupts != 0);
        notice.action
    }

    fn register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => return MAGIC,
            register::VERSION => return VERSION,
            register::VENDOR_ID => return VENDOR,
            register::INTERRUPT_STATUS => return self.interrupts,
            _ => {}
        }
        let Some(core) = &self.core else {
            return 0;
        };
        match offset {
            register::DEVICE_ID => core.id(),
            register::DEVICE_FEATURES => half(core.offered(), self.device_half),
            register::QUEUE_SIZE_MAX => core.queue_most(self.queue).into(),
            register::QUEUE_READY => core.queue_ready(self.queue).into(),
            register::STATUS => core.status().into(),
            register::CONFIG_GENERATION => core.generation(),
            // SHMLen and SHMBase: there is no shared memory (4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) -> Action {
        let Some(core) = &mut self.core else {
            return Action::None;
        };
        let queue = self.queue;
        let low = |word: u64| word & !0xffff_ffff | u64::from(value);
        let high = |word: u64| word & 0xffff_ffff | u64::from(value) << 32;
        let mut layout = |change: &dyn Fn(&mut super::ring::Layout)| {
            if let Some(layout) = core.layout(queue) {
                change(layout);
            }
        };
        match offset {
            register::QUEUE_NOTIFY => return self.notify(value as usize),
            register::INTERRUPT_ACK => {
                self.interrupts &= !value;
                self.line.set(self.interrupts != 0);
            }
            register::DEVICE_FEATURES_SEL => self.device_half = value,
            register::DRIVER_FEATURES_SEL => self.driver_half = value,
            register::DRIVER_FEATURES => {
                self.driver = match self.driver_half {
                    0 => low(self.driver),
                    1 => high(self.driver),
                    // Bits that there are none of: only zeros are a promise that can be kept.
                    _ => self.driver,
                };
                core.accept(self.driver);
            }
            register::QUEUE_SEL => self.queue = value as usize,
            register::QUEUE_SIZE => {
                // A size beyond 16 bits is as wrong as zero, and found so when it is used.
                layout(&|layout| layout.size = u16::try_from(value).unwrap_or(0));
            }
            register::QUEUE_DESC_LOW => {
                layout(&|layout| layout.descriptors = low(layout.descriptors))
            }
            register::QUEUE_DESC_HIGH => {
                layout(&|layout| layout.descriptors = high(layout.descriptors));
            }
            register::QUEUE_DRIVER_LOW => {
                layout(&|layout| layout.available = low(layout.available))
            }
            register::QUEUE_DRIVER_HIGH => {
                layout(&|layout| layout.available = high(layout.available));
            }
            register::QUEUE_DEVICE_LOW => layout(&|layout| layout.used = low(layout.used)),
            register::QUEUE_DEVICE_HIGH => layout(&|layout| layout.used = high(layout.used)),
            register::QUEUE_READY => {
                let notice = core.set_queue_ready(queue, value & 1 != 0);
                return self.tell(notice);
            }
            register::STATUS => {
                // Only the low byte is defined; zero of all 32 bits is a reset.
                let status = if value == 0 { 0 } else { value as u8 };
                let notice = core.set_status(status);
                if value == 0 {
                    self.interrupts = 0;
                    self.driver = 0;
                    self.queue = 0;
                    self.left = 0;
                }
                return self.tell(notice);
            }
            _ => {}
        }
        Action::None
    }
}

fn half(bits: u64, which: u32) -> u32 {
    match which {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

impl Device for Mmio {
    fn name(&self) -> &'static str {
        self.core.as_ref().map_or("virtio-none", Core::name)
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        if offset >= register::CONFIG {
            if let Some(core) = &self.core {
                core.read_config(offset - register::CONFIG, data);
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if offset >= register::CONFIG {
            if let Some(core) = &mut self.core {
                core.write_config(offset - register::CONFIG, data);
            }
            return Action::None;
        }
        match data.try_into() {
            Ok(word) if offset.is_multiple_of(4) => {
                self.set_register(offset, u32::from_le_bytes(word))
            }
            _ => Action::None,
        }
    }

    /// At once, if requests were left.
    fn deadline(&self) -> Option<u64> {
        (self.left != 0).then_some(0)
    }

    fn advance(&mut self, _now: u64) {
        let mut left = std::mem::take(&mut self.left);
        while left != 0 {
            let index = left.trailing_zeros();
            left &= left - 1;
            self.notify(index as usize);
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.core.as_ref().and_then(Core::descriptor)
    }

    fn host_ready(&mut self) -> Action {
        let Some(core) = &mut self.core else {
            return Action::None;
        };
        let notice = core.host_ready();
        self.tell(notice)
    }
}
