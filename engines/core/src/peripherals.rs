//! Disk, network and console of a machine, as the guest's drivers expect them.
//!
//! The backing is the same for every mode; what differs is the device in front of it. Guests that
//! know nothing of their host find a PC's own: an ATA disk and an NE2000. Guests with
//! paravirtual drivers find eight virtio transports, where QEMU's microvm machine has them.
//!
//! The doorbells of virtio disks and networks are exits, or eventfds of the host's kernel that an I/O
//! thread serves ([`Peripherals::doorbells`]). The console's are exits in any case: writing it out may
//! have to wait for a reader, which only the vCPU's thread can do without holding the other devices up.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use crate::devices::virtio::{self, Block, Console, Core, Mmio, Net, VirtioDevice};
use crate::devices::{Ata, Ne2000, ata, ne2000};
use crate::dma::{AliasError, DeviceMemory};
use crate::doorbell::{Doorbells, Passed};
use crate::host::console::{Output, Sink};
use crate::host::io_thread::{self, IoThread, Remote, Signal, Station};
use crate::net::{DEFAULT_MAC, MacAddress, NetBackend};
use crate::storage::{Paced, Storage};
use crate::{GuestPhys, GuestRam, Line, Machine};

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
    /// Whoever takes the doorbells of virtio devices; without, they are exits. Not for engines that
    /// must hear of what devices write to memory: nobody could tell them in time.
    pub doorbells: Option<Arc<dyn Doorbells>>,
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
    /// The host's kernel does not take a doorbell, or drive a line, that it was asked to.
    #[error("doorbell of {device}: {source}")]
    Doorbell {
        /// Which device's.
        device: &'static str,
        /// What the host said.
        source: io::Error,
    },
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
            doorbells,
        } = peripherals;
        let mac = mac.unwrap_or(DEFAULT_MAC);
        let disk = disk.map(|disk| {
            let events = Arc::clone(&self.events);
            Box::new(Paced::new(disk, events)) as Box<dyn Storage>
        });
        match family {
            Family::Emulated => {
                if let Some(disk) = disk {
                    let disk = Ata::new(disk, self.line(ata::IRQ));
                    let ports = [ata::COMMAND_PORTS, ata::CONTROL_PORTS];
                    self.add_posted(&ports, ata::COMMAND_PORTS.0, Box::new(disk))?;
                }
                if let Some(net) = net {
                    let card = Ne2000::new(net, mac, self.line(ne2000::IRQ));
                    self.add_posted(&[ne2000::PORTS], ne2000::DATA_PORT, Box::new(card))?;
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
                let devices = devices.into_iter().flatten();
                self.add_transports(devices, &memory, doorbells.as_deref())?;
                if let Some(log) = memory.log() {
                    assert!(
                        self.io.is_none(),
                        "writes can't be told to this engine in time"
                    );
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
        doorbells: Option<&dyn Doorbells>,
    ) -> Result<(), AttachError> {
        let mut devices = devices.fuse();
        let mut stations = Vec::new();
        for number in 0..virtio::mmio::COUNT {
            let line = virtio::mmio::FIRST_LINE + number as u8;
            let start = GuestPhys(virtio::mmio::BASE + number * virtio::mmio::SIZE);
            let device = devices.next();
            let is_console = device
                .as_ref()
                .is_some_and(|device| device.id() == virtio::console::ID);
            let transport = match (device, doorbells) {
                (None, _) => Mmio::vacant(self.line(line)),
                (Some(device), Some(doorbells)) if !is_console => {
                    let core = Core::new(device, memory);
                    let (remote, station) = self.listen(core, start, line, doorbells)?;
                    stations.push(station);
                    self.add_memory(start, virtio::mmio::SIZE, Box::new(remote))?;
                    continue;
                }
                (Some(device), _) => Mmio::new(Core::new(device, memory), self.line(line)),
            };
            let slot = self.add_memory(start, virtio::mmio::SIZE, Box::new(transport))?;
            if is_console {
                self.set_console(slot);
            }
        }
        if !stations.is_empty() {
            self.io = Some(IoThread::start(stations)?);
        }
        Ok(())
    }

    /// A transport whose doorbells the host's kernel takes, and its two ends.
    fn listen(
        &mut self,
        core: Core,
        start: GuestPhys,
        line: u8,
        doorbells: &dyn Doorbells,
    ) -> Result<(Remote, Station), AttachError> {
        let device = core.name();
        let refused = |source| AttachError::Doorbell { device, source };
        let passed = Arc::new(Passed::new(device));
        let bells = (0..core.queues()).map(|queue| {
            let event = io_thread::event()?;
            let address = GuestPhys(start.0 + virtio::mmio::register::QUEUE_NOTIFY);
            let listening = doorbells.listen(address, queue as u32, event.as_fd());
            listening.map_err(refused)?;
            Ok(event)
        });
        let bells = bells.collect::<Result<Vec<_>, AttachError>>()?;
        let (signal, ended) = (io_thread::event()?, io_thread::event()?);
        let by_kernel = doorbells.interrupt(line, signal.as_fd(), ended.as_fd());
        let by_kernel = by_kernel.map_err(refused)?;
        let wire = match by_kernel {
            true => Line::new(Arc::new(Signal::new(signal, Arc::clone(&passed))), line),
            false => self.line(line),
        };
        let backend = core.descriptor().map(|fd| fd.try_clone_to_owned());
        let backend = backend.transpose()?;
        let transport = Arc::new(Mutex::new(Mmio::new(core, wire)));
        self.tally.add_passed(Arc::clone(&passed));
        let station = Station {
            transport: Arc::clone(&transport),
            doorbells: bells,
            backend,
            ended: by_kernel.then_some(ended),
            passed,
        };
        Ok((Remote::new(device, transport), station))
    }
}
