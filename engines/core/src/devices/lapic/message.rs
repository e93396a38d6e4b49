//! Messages between local APICs, and from the I/O APIC to them (SDM 3A 11.6): what is delivered, and
//! whom an address means.
//!
//! Addresses have 8 bits, or 32 if they come from an x2APIC. An x2APIC takes an 8-bit one as the
//! lower part of its own, so its logical addresses from the I/O APIC are those of cluster 0.

use super::{Lapic, SEND_ILLEGAL};

/// How a message is delivered: the ICR's, a redirection entry's and an LVT entry's bits 10:8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// As a vector, to everybody that is addressed.
    Fixed,
    /// As a vector, to the one with the least to do.
    LowestPriority,
    /// System management: there is none here.
    Smi,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; for the I/O APIC and LVT entries reserved.
    StartUp,
    /// The vector comes from the 8259s; for the ICR reserved.
    External,
    /// Reserved.
    Reserved,
}

impl Delivery {
    /// The delivery that bits 10:8 of `word` ask for.
    pub fn of(word: u32) -> Self {
        match word >> 8 & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            6 => Delivery::StartUp,
            7 => Delivery::External,
            _ => Delivery::Reserved,
        }
    }
}

/// How a message names its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Physical id, or logical address.
    pub address: u32,
    /// The address is logical.
    pub logical: bool,
    /// All bits are set: everybody.
    pub everybody: bool,
}

impl Destination {
    /// An address of 8 bits.
    pub fn narrow(address: u8, logical: bool) -> Self {
        Destination {
            address: address.into(),
            logical,
            everybody: address == u8::MAX,
        }
    }

    /// An address of 32 bits, from an x2APIC.
    pub fn wide(address: u32, logical: bool) -> Self {
        Destination {
            address,
            logical,
            everybody: address == u32::MAX,
        }
    }
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// How.
    pub delivery: Delivery,
    /// Which vector; a start-up IPI's page.
    pub vector: u8,
    /// It is level-triggered, so its end must be told.
    pub level: bool,
}

/// For whom an interprocessor interrupt is: the ICR's shorthands, and none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Whoever is addressed.
    Addressed(Destination),
    /// The sender.
    Sender,
    /// Everybody.
    Everybody,
    /// Everybody but the sender.
    Others,
}

impl Lapic {
    /// True if a message to `destination` is for this local APIC.
    pub fn hears(&self, destination: Destination) -> bool {
        let Destination {
            address,
            logical,
            everybody,
        } = destination;
        if everybody {
            return true;
        }
        if self.x2apic() {
            let mine = self.logical_destination();
            return if logical {
                address >> 16 == mine >> 16 && address & mine & 0xffff != 0
            } else {
                address == u32::from(self.number)
            };
        }
        let Ok(address) = u8::try_from(address) else {
            return false;
        };
        if !logical {
            return address == self.id;
        }
        let mine = (self.logical_id >> 24) as u8;
        if self.destination_format >> 28 == 0xf {
            address & mine != 0
        } else {
            // Clusters: four bits of cluster, four of member (SDM 3A 11.6.2.2).
            address >> 4 == mine >> 4 && address & mine & 0xf != 0
        }
    }

    /// LDR: in x2APIC mode it follows from the id (SDM 3A 11.12.10.2).
    pub(super) fn logical_destination(&self) -> u32 {
        if self.x2apic() {
            u32::from(self.number >> 4) << 16 | 1 << (self.number & 0xf)
        } else {
            self.logical_id
        }
    }

    /// The interprocessor interrupt that the guest has sent since the last call.
    pub fn take_sent(&mut self) -> Option<(Target, Message)> {
        self.sent.take()
    }

    pub(super) fn send_to_self(&mut self, vector: u8) {
        if vector < 16 {
            self.record(SEND_ILLEGAL);
        } else {
            self.request(vector, false);
        }
    }

    /// Sends what the ICR says. Delivery is the board's business, at the end of this access.
    pub(super) fn send_command(&mut self) {
        const ASSERT: u32 = 1 << 14;
        const LEVEL: u32 = 1 << 15;
        let command = self.command_low;
        let (delivery, vector) = (Delivery::of(command), command as u8);
        let logical = command >> 11 & 1 == 1;
        let target = match command >> 18 & 3 {
            0b00 if self.x2apic() => {
                Target::Addressed(Destination::wide(self.command_high, logical))
            }
            0b00 => Target::Addressed(Destination::narrow(
                (self.command_high >> 24) as u8,
                logical,
            )),
            0b01 => Target::Sender,
            0b10 => Target::Everybody,
            _ => Target::Others,
        };
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority if vector < 16 => {
                self.record(SEND_ILLEGAL);
                return;
            }
            // Its end is of no meaning to processors since the Pentium 4 (SDM 3A 11.6.1).
            Delivery::Init if command & (LEVEL | ASSERT) == LEVEL => return,
            // Not to oneself, by a shorthand (SDM 3A table 11-3). The same table has INIT so too, which
            // KVM (lapic.c) and QEMU (hw/intc/apic.c) send all the same, and guests know.
            Delivery::StartUp if matches!(target, Target::Sender | Target::Everybody) => return,
            Delivery::Smi | Delivery::External | Delivery::Reserved => return,
            Delivery::Fixed
            | Delivery::LowestPriority
            | Delivery::Nmi
            | Delivery::Init
            | Delivery::StartUp => {}
        }
        let message = Message {
            delivery,
            vector,
            level: false,
        };
        self.sent = Some((target, message));
    }
}
