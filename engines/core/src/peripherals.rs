//! Disk, network and console of a machine, as the guest's drivers expect them.
//!
//! The backing is the same for every mode; what differs is the device in front of it. Guests that
//! know nothing of their host find a PC's own: an ATA disk and an NE2000. Guests with
//! paravirtual drivers find eight virtio transports, where QEMU's microvm machine has them.

use std::io;
use std::sync::Arc;

use crate::devices::virtio::{self, Block, Console, Core, Mmio, Net, VirtioDevice};
use crate::devices::{Ata, Ne2000, ata, ne2000};
use crate::dma::{AliasError, DeviceMemory};
use crate::host::console::{Output, Sink};
use crate::net::{DEFAULT_MAC, MacAddress, NetBackend};
use crate::storage::Storage;
use crate::{GuestPhys, GuestRam, Machine};

/// Which devices stand in front of the backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// Those of a PC: ATA, NE2000; the console is the UART.
    #[default]
    Emulated,
    /// Virtio over MMIO: block, network, console.
    Virtio,
}

/// What a machine has besides processor, memory and board.
#[derive(Default)]
pub struct Peripherals {
    /// The devices in front.
    pub family: Family,
    /// The disk.
    pub disk: Option<Box<dyn Storage>>,
    /// The network.
    pub net: Option<Box<dyn NetBackend>>,
    /// The card's address; [`DEFAULT_MAC`] without.
    pub mac: Option<MacAddress>,
    /// Where a paravirtual console writes to; its input is the machine's.
    pub console: Option<Sink>,
}

/// A machine can't have its peripherals.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Devices can't reach guest memory.
    #[error(transparent)]
    Memory(#[from] AliasError),
    /// The host refused.
    #[error("devices: {0}")]
    Host(#[from] io::Error),
}

impl Machine {
    /// Gives the machine its peripherals. `ram` is the guest's memory; `keeps_code` says that the
    /// engine has to hear of what devices write to it
    /// ([`Vcpu::keeps_code`](crate::Vcpu::keeps_code)).
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(
        &mut self,
        peripherals: Peripherals,
        ram: &GuestRam,
        keeps_code: bool,
    ) -> Result<(), AttachError> {
        let Peripherals {
            family,
            disk,
            net,
            mac,
            console,
        } = peripherals;
        let mac = mac.unwrap_or(DEFAULT_MAC);
        match family {
            Family::Emulated => {
                if let Some(disk) = disk {
                    let disk = Ata::new(disk, self.line(ata::IRQ));
                    let ports = [ata::COMMAND_PORTS, ata::CONTROL_PORTS];
                    self.add_ports(&ports, Box::new(disk))?;
                }
                if let Some(net) = net {
                    let card = Ne2000::new(net, mac, self.line(ne2000::IRQ));
                    self.add_ports(&[ne2000::PORTS], Box::new(card))?;
                }
            }
            Family::Virtio => {
                let memory = DeviceMemory::new(ram, keeps_code)?;
                let console = console.map(|sink| self.virtio_console(sink));
                let devices: [Option<Box<dyn VirtioDevice>>; 3] = [
                    disk.map(|disk| Box::new(Block::new(disk)) as _),
                    net.map(|net| Box::new(Net::new(net, mac)) as _),
                    console.map(|console| Box::new(console) as _),
                ];
                self.add_transports(devices.into_iter().flatten(), &memory)?;
                if let Some(log) = memory.log() {
                    self.log_writes(Arc::clone(log));
                }
            }
        }
        Ok(())
    }

    fn virtio_console(&self, sink: Sink) -> Console {
        let output = Output::new(sink, Arc::clone(&self.events));
        let resume = Arc::clone(&self.pump);
        let resume = Box::new(move || resume.resume_input());
        Console::new(output, Arc::clone(&self.input), resume)
    }

    fn add_transports(
        &mut self,
        devices: impl Iterator<Item = Box<dyn VirtioDevice>>,
        memory: &DeviceMemory,
    ) -> io::Result<()> {
        let mut devices = devices.fuse();
        for number in 0..virtio::mmio::COUNT {
            let line = self.line(virtio::mmio::FIRST_LINE + number as u8);
            let start = GuestPhys(virtio::mmio::BASE + number * virtio::mmio::SIZE);
            let device = devices.next();
            let is_console = device
                .as_ref()
                .is_some_and(|device| device.id() == virtio::console::ID);
            let transport = match device {
                Some(device) => Mmio::new(Core::new(device, memory), line),
                None => Mmio::vacant(line),
            };
            let slot = self.add_memory(start, virtio::mmio::SIZE, Box::new(transport))?;
            if is_console {
                self.set_console(slot);
            }
        }
        Ok(())
    }
}
