//! Devices behind rings in guest memory: V's side of `abi::device`.
//!
//! The devices are engine-core's virtio ones, with the page of `abi::device` as their transport. V
//! serves them on its own thread when the guest rings the doorbell; K goes on meanwhile.
//!
//! Nothing in the page is trusted, and everything in it is read once for each use: a guest that
//! changes it behind V's back gets what it has written last. What rings and requests hold is for the
//! devices to check.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use abi::device::{self, Device, Page, answer, order};
use engine_core::devices::virtio::core::status;
use engine_core::devices::virtio::{Core, Notice, VirtioDevice};
use engine_core::dma::DeviceMemory;

use crate::Error;
use crate::pages::Shared;
use crate::wire::PAGE;

/// The devices that a guest is to have; what is beyond the page's room is left out.
#[derive(Default)]
pub struct Devices(pub Vec<Box<dyn VirtioDevice>>);

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|device| device.name()))
            .finish()
    }
}

/// What serving has led to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Served {
    /// The guest is to be told.
    pub(crate) tell: bool,
    /// Requests are left.
    pub(crate) more: bool,
}

impl Served {
    fn take(&mut self, notice: Notice) {
        self.tell |= notice.used != 0 || notice.config;
        self.more |= notice.more;
    }
}

/// The devices of a running guest.
#[derive(Debug)]
pub(crate) struct Rings {
    /// Without devices there is nothing to look at.
    page: Option<Shared<Page>>,
    cores: Vec<Core>,
}

impl Rings {
    /// Puts `devices` into the page in that frame of guest memory; frame 0 is none.
    pub(crate) fn new(devices: Devices, ram: &File, bytes: u64, frame: u64) -> Result<Self, Error> {
        if devices.0.is_empty() || frame == 0 {
            return Ok(Rings {
                page: None,
                cores: Vec::new(),
            });
        }
        let file = ram.try_clone().map_err(Error::host("dup"))?;
        let memory = DeviceMemory::of_file(file, bytes).map_err(|error| Error::Host {
            operation: "mapping guest memory for devices",
            source: std::io::Error::other(error),
        })?;
        // SAFETY: the page is made of atomics; the frame lies in the file, which is sealed.
        let page = unsafe { Shared::<Page>::map(ram, frame * PAGE) }
            .map_err(Error::host("mapping the devices' page"))?;
        let cores: Vec<Core> = devices
            .0
            .into_iter()
            .take(device::DEVICES)
            .map(|device| Core::new(device, &memory))
            .collect();
        for (core, entry) in cores.iter().zip(&page.get().devices) {
            announce(core, entry);
        }
        Ok(Rings {
            page: Some(page),
            cores,
        })
    }

    /// Carries out orders, then serves every queue.
    pub(crate) fn serve(&mut self) -> Served {
        let mut served = Served::default();
        let Some(page) = &self.page else {
            return served;
        };
        for (core, entry) in self.cores.iter_mut().zip(&page.get().devices) {
            let done = match entry.order.swap(order::NONE, Acquire) {
                order::NONE => None,
                order::START => Some(start(core, entry)),
                order::STOP => {
                    core.set_status(0);
                    Some(true)
                }
                _ => Some(false),
            };
            if let Some(done) = done {
                let answer = if done { answer::DONE } else { answer::REFUSED };
                entry.answer.store(answer, Release);
                served.tell = true;
            }
            for queue in 0..core.queues() {
                served.take(core.notify(queue));
            }
        }
        served
    }

    /// Descriptors to wait for, with the numbers of their devices.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let cores = self.cores.iter().enumerate();
        cores.filter_map(|(number, core)| Some((number, core.descriptor()?)))
    }

    /// A device's descriptor is readable; true if the guest is to be told.
    pub(crate) fn host_ready(&mut self, number: usize) -> bool {
        let mut served = Served::default();
        if let Some(core) = self.cores.get_mut(number) {
            served.take(core.host_ready());
        }
        served.tell
    }
}

/// Writes what the guest is to know of a device.
fn announce(core: &Core, entry: &Device) {
    let mut configuration = [0; 64];
    core.read_config(0, &mut configuration);
    for (word, bytes) in entry.configuration.iter().zip(configuration.chunks(4)) {
        let bytes = bytes.try_into().expect("64 is a multiple of 4");
        word.store(u32::from_le_bytes(bytes), Relaxed);
    }
    for (index, place) in entry.queues.iter().enumerate() {
        place.most.store(core.queue_most(index).into(), Relaxed);
    }
    entry.offered.store(core.offered(), Relaxed);
    entry.id.store(core.id(), Relaxed);
}

/// Resets a device and starts it as the page says; false if it does not take that.
fn start(core: &mut Core, entry: &Device) -> bool {
    core.set_status(0);
    core.set_status(status::ACKNOWLEDGE | status::DRIVER);
    core.accept(entry.accepted.load(Relaxed));
    core.set_status(status::FEATURES_OK);
    if core.status() & status::FEATURES_OK == 0 {
        core.set_status(0);
        return false;
    }
    for (index, place) in entry.queues.iter().enumerate() {
        let size = place.size.load(Relaxed);
        let Some(layout) = core.layout(index) else {
            continue;
        };
        let Ok(size) = u16::try_from(size) else {
            core.set_status(0);
            return false;
        };
        layout.size = size;
        layout.descriptors = place.descriptors.load(Relaxed);
        layout.available = place.driver.load(Relaxed);
        layout.used = place.device.load(Relaxed);
        if size != 0 {
            core.set_queue_ready(index, true);
        }
    }
    core.set_status(status::DRIVER_OK);
    if core.broken().is_some() {
        core.set_status(0);
        return false;
    }
    true
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use engine_core::devices::virtio::{Block, feature};
    use engine_core::storage::{FileOptions, RawFile};

    use super::*;
    use crate::pages::memory_file;

    const RAM: u64 = 1 << 20;
    const FRAME: u64 = 3;

    /// A disk of 8 sectors behind the page in frame 3, and the guest's view of the page.
    fn disk() -> (Rings, Shared<Page>, File) {
        let ram = memory_file(c"test-ram", RAM).unwrap();
        let path = std::env::temp_dir().join(format!(
            "trapline-rings-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        File::create(&path).unwrap().write_all(&[7; 4096]).unwrap();
        let storage = RawFile::open(&path, FileOptions::default()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let devices = Devices(vec![Box::new(Block::new(Box::new(storage)))]);
        let rings = Rings::new(devices, &ram, RAM, FRAME).unwrap();
        // SAFETY: as in Rings::new.
        let page = unsafe { Shared::<Page>::map(&ram, FRAME * PAGE) }.unwrap();
        (rings, page, ram)
    }

    /// Orders a start with one queue; returns the answer.
    fn order_start(rings: &mut Rings, page: &Page, size: u32, places: [u64; 3]) -> u32 {
        let device = &page.devices[0];
        let place = &device.queues[0];
        place.size.store(size, Relaxed);
        place.descriptors.store(places[0], Relaxed);
        place.driver.store(places[1], Relaxed);
        place.device.store(places[2], Relaxed);
        device.answer.store(0, Relaxed);
        device.order.store(order::START, Relaxed);
        assert!(rings.serve().tell);
        assert_eq!(device.order.load(Relaxed), order::NONE);
        device.answer.load(Relaxed)
    }

    #[test]
    fn the_page_tells_of_the_device() {
        let (_rings, page, _ram) = disk();
        let device = &page.get().devices[0];
        assert_eq!(device.id.load(Relaxed), 2);
        assert_eq!(device.configuration[0].load(Relaxed), 8);
        assert!(device.queues[0].most.load(Relaxed) > 0);
        assert_eq!(device.queues[1].most.load(Relaxed), 0);
        assert!(device.offered.load(Relaxed) & feature::VERSION_1 != 0);
        assert_eq!(page.get().devices[1].id.load(Relaxed), 0);
    }

    #[test]
    fn orders_that_make_no_sense_are_refused_and_good_ones_work_after_them() {
        let (mut rings, page, _ram) = disk();
        let page = page.get();
        let device = &page.devices[0];
        let good = [0x8000, 0x9000, 0xa000];
        // No features agreed upon, and features that nobody offers.
        for accepted in [0, u64::MAX] {
            device.accepted.store(accepted, Relaxed);
            assert_eq!(order_start(&mut rings, page, 16, good), answer::REFUSED);
        }
        device.accepted.store(feature::VERSION_1, Relaxed);
        for (size, places) in [
            (15, good),
            (1 << 16, good),
            (u32::MAX, good),
            (16, [0x8008, 0x9000, 0xa000]),
            (16, [RAM, 0x9000, 0xa000]),
            (16, [0x8000, u64::MAX - 1, 0xa000]),
            (16, [0x8000, 0x9000, RAM - 8]),
        ] {
            let answer = order_start(&mut rings, page, size, places);
            assert_eq!(answer, answer::REFUSED, "{size} {places:x?}");
            assert!(!rings.serve().tell);
        }
        device.order.store(99, Relaxed);
        assert!(rings.serve().tell);
        assert_eq!(device.answer.load(Relaxed), answer::REFUSED);
        assert_eq!(order_start(&mut rings, page, 16, good), answer::DONE);
        device.order.store(order::STOP, Relaxed);
        assert!(rings.serve().tell);
        assert_eq!(device.answer.load(Relaxed), answer::DONE);
    }
}
