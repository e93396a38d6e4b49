//! The ATA disk, register by register.

use std::sync::Arc;

use engine_core::devices::Device;
use engine_core::devices::ata::command::code;
use engine_core::devices::ata::register::*;
use engine_core::devices::ata::{Ata, error, status};
use engine_core::interrupt::Line;

use crate::backing::{Disk, Faults};
use crate::virtio::Wire;

const SECTORS: u64 = 2048;
const READY: u8 = status::DRDY | status::DSC;
const DATA_READY: u8 = READY | status::DRQ;
const FAILED: u8 = READY | status::ERR;
const LBA: u8 = 0x40;

/// A driver for the primary channel.
struct Driver {
    ata: Ata,
    wire: Arc<Wire>,
}

impl Driver {
    fn new(disk: &Disk) -> Driver {
        let wire = Arc::new(Wire::default());
        let line = Line::new(wire.clone(), 14);
        let mut driver = Driver {
            ata: Ata::new(disk.boxed(), line),
            wire,
        };
        driver.put(DEVICE, LBA);
        driver
    }

    fn get(&mut self, offset: u64) -> u8 {
        let mut byte = [0xff];
        self.ata.read(offset, &mut byte);
        byte[0]
    }

    fn put(&mut self, offset: u64, value: u8) {
        self.ata.write(offset, &[value]);
    }

    /// The line, without touching it.
    fn interrupted(&self) -> bool {
        self.wire.0.lock().unwrap().0
    }

    /// Takes one interrupt: the status that comes with it.
    fn take(&mut self) -> u8 {
        assert!(self.interrupted());
        assert_eq!(self.get(CONTROL), self.ata_status());
        let status = self.get(STATUS);
        assert!(!self.interrupted());
        status
    }

    fn ata_status(&mut self) -> u8 {
        self.get(CONTROL)
    }

    /// Names sectors by LBA28 and gives a command.
    fn order(&mut self, command: u8, sector: u64, count: u64) {
        self.put(SECTOR_COUNT, count as u8);
        self.put(LBA_LOW, sector as u8);
        self.put(LBA_MID, (sector >> 8) as u8);
        self.put(LBA_HIGH, (sector >> 16) as u8);
        self.put(DEVICE, LBA | (sector >> 24) as u8 & 0xf);
        self.put(COMMAND, command);
    }

    /// The same by LBA48.
    fn order_wide(&mut self, command: u8, sector: u64, count: u64) {
        for shift in [1, 0] {
            self.put(SECTOR_COUNT, (count >> (8 * shift)) as u8);
            self.put(LBA_LOW, (sector >> (24 * shift)) as u8);
            self.put(LBA_MID, (sector >> (24 * shift + 8)) as u8);
            self.put(LBA_HIGH, (sector >> (24 * shift + 16)) as u8);
        }
        self.put(DEVICE, LBA);
        self.put(COMMAND, command);
    }

    /// Reads one DRQ block as `rep insw` does it.
    fn read_block(&mut self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0xee; bytes];
        self.ata.read_items(DATA, 2, &mut data);
        data
    }

    /// Reads `count` sectors in DRQ blocks of `block`.
    fn read_all(&mut self, count: u64, block: u64) -> Vec<u8> {
        let mut data = Vec::new();
        let mut left = count;
        while left > 0 {
            assert_eq!(self.take(), DATA_READY);
            let now = left.min(block);
            data.extend(self.read_block(now as usize * 512));
            left -= now;
        }
        assert!(!self.interrupted());
        assert_eq!(self.get(STATUS), READY);
        data
    }

    fn write_all(&mut self, data: &[u8], block: usize) {
        // The first block is asked for without an interrupt.
        assert!(!self.interrupted());
        for (number, part) in data.chunks(block * 512).enumerate() {
            if number > 0 {
                assert_eq!(self.take(), DATA_READY);
            }
            assert_eq!(self.get(STATUS), DATA_READY);
            self.ata.write_items(DATA, 2, part);
        }
        assert_eq!(self.take(), READY);
    }

    fn sector(&mut self) -> u64 {
        let mut sector = u64::from(self.get(DEVICE) & 0xf) << 24;
        for (at, shift) in [(LBA_LOW, 0), (LBA_MID, 8), (LBA_HIGH, 16)] {
            sector |= u64::from(self.get(at)) << shift;
        }
        sector
    }

    fn identify(&mut self) -> Vec<u16> {
        self.put(COMMAND, code::IDENTIFY);
        self.read_all(1, 1)
            .chunks(2)
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
            .collect()
    }
}

fn content(disk: &Disk, first: u64, count: u64) -> Vec<u8> {
    (first..first + count)
        .flat_map(|sector| disk.sector(sector))
        .collect()
}

#[test]
fn identify_says_what_the_disk_is() {
    let mut driver = Driver::new(&Disk::new(SECTORS));
    let words = driver.identify();
    assert_eq!(words[0], 0x40);
    assert_eq!((words[1], words[3], words[6]), (2, 16, 63));
    let text = |range: std::ops::Range<usize>| {
        let bytes: Vec<u8> = words[range]
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect();
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(text(27..47).trim_end(), "TRAPLINE DISK");
    assert_eq!(text(10..20).trim_end(), "memory-disk");
    assert_eq!(words[47] & 0xff, 16);
    assert_eq!(words[49] & 0x300, 0x200);
    assert_eq!([words[60], words[61]], [SECTORS as u16, 0]);
    assert_eq!(words[100..104], [SECTORS as u16, 0, 0, 0]);
    assert_eq!(words[83] & 0xc400, 0x4400);
    let sum: u32 = words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .map(u32::from)
        .sum();
    assert_eq!((words[255] & 0xff, sum & 0xff), (0xa5, 0));
}

#[test]
fn the_signature_is_there_after_power_on_and_after_each_reset() {
    let mut driver = Driver::new(&Disk::new(SECTORS));
    let signature = |driver: &mut Driver| {
        [ERROR, SECTOR_COUNT, LBA_LOW, LBA_MID, LBA_HIGH].map(|at| driver.get(at))
    };
    assert_eq!(signature(&mut driver), [1, 1, 1, 0, 0]);
    driver.order(code::READ_SECTORS, 77, 9);
    driver.put(CONTROL, 4);
    assert_eq!(driver.get(STATUS), status::BSY);
    assert!(!driver.interrupted());
    // Deaf while it resets.
    driver.put(COMMAND, code::IDENTIFY);
    assert_eq!(driver.get(STATUS), status::BSY);
    driver.put(CONTROL, 0);
    assert_eq!(driver.get(STATUS), READY);
    assert_eq!(signature(&mut driver), [1, 1, 1, 0, 0]);
    driver.put(COMMAND, code::EXECUTE_DIAGNOSTIC);
    assert_eq!(driver.take(), READY);
    assert_eq!(signature(&mut driver), [1, 1, 1, 0, 0]);
}

#[test]
fn there_is_no_second_device() {
    let mut driver = Driver::new(&Disk::new(SECTORS));
    driver.put(DEVICE, 0x10);
    driver.put(COMMAND, code::IDENTIFY);
    assert_eq!((driver.get(STATUS), driver.get(CONTROL)), (0, 0));
    assert_eq!(driver.read_block(2), [0xee; 2]);
    driver.put(DEVICE, 0);
    assert_eq!(driver.get(STATUS), READY);
}

#[test]
fn sectors_are_read_one_by_one_or_many_at_a_time() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    for (first, count) in [(0, 1), (5, 3), (1000, 200), (SECTORS - 1, 1)] {
        driver.order(code::READ_SECTORS, first, count);
        let data = driver.read_all(count, 1);
        assert!(data == content(&disk, first, count));
        assert_eq!(driver.sector(), first + count - 1);
    }
    // Count 0 is 256, or 65536, of which there are not so many.
    driver.order(code::READ_SECTORS, 0, 256);
    assert!(driver.read_all(256, 1) == content(&disk, 0, 256));
    driver.order_wide(code::READ_SECTORS_EXT, 7, 700);
    assert!(driver.read_all(700, 1) == content(&disk, 7, 700));
    driver.order_wide(code::READ_SECTORS_EXT, 0, 0);
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::IDNF));
    driver.put(SECTOR_COUNT, 16);
    driver.put(COMMAND, code::SET_MULTIPLE);
    assert_eq!(driver.take(), READY);
    driver.order(code::READ_MULTIPLE, 3, 200);
    assert!(driver.read_all(200, 16) == content(&disk, 3, 200));
    driver.order_wide(code::READ_MULTIPLE_EXT, 3, 500);
    assert!(driver.read_all(500, 16) == content(&disk, 3, 500));
    assert_eq!(driver.identify()[59], 0x110);
}

#[test]
fn data_may_be_moved_in_any_width_and_across_blocks() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    driver.order(code::READ_SECTORS, 40, 2);
    let mut data = vec![0; 512];
    for item in data.chunks_mut(4) {
        driver.ata.read(DATA, item);
    }
    data.extend(driver.read_block(512));
    assert!(data == content(&disk, 40, 2));
    // A loop that runs on over the blocks, and over the end.
    driver.order(code::READ_SECTORS, 40, 3);
    let data = driver.read_block(4 * 512);
    assert!(data[..1536] == content(&disk, 40, 3));
    assert_eq!(data[1536..], [0xee; 512]);
}

#[test]
fn sectors_are_written_and_made_durable() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    let data: Vec<u8> = (0..300 * 512u32).map(|at| (at / 7) as u8).collect();
    driver.order(code::WRITE_SECTORS, 100, 200);
    driver.write_all(&data[..200 * 512], 1);
    assert!(content(&disk, 100, 200) == data[..200 * 512]);
    driver.put(SECTOR_COUNT, 8);
    driver.put(COMMAND, code::SET_MULTIPLE);
    driver.take();
    driver.order(code::WRITE_MULTIPLE, 500, 30);
    driver.write_all(&data[..30 * 512], 8);
    assert!(content(&disk, 500, 30) == data[..30 * 512]);
    driver.order_wide(code::WRITE_SECTORS_EXT, 700, 300);
    driver.write_all(&data, 1);
    assert!(content(&disk, 700, 300) == data);
    driver.order_wide(code::WRITE_MULTIPLE_EXT, 1100, 300);
    driver.write_all(&data, 8);
    assert!(content(&disk, 1100, 300) == data);
    assert!(disk.with(|content| content.durable != content.bytes));
    driver.put(COMMAND, code::FLUSH_CACHE);
    assert_eq!(driver.take(), READY);
    assert!(disk.with(|content| content.durable == content.bytes));
    // Without the cache each write is durable when its last status comes.
    driver.put(FEATURES, 0x82);
    driver.put(COMMAND, code::SET_FEATURES);
    assert_eq!(driver.take(), READY);
    assert_eq!(driver.identify()[85] & 0x20, 0);
    driver.order(code::WRITE_SECTORS, 0, 2);
    driver.write_all(&data[..1024], 1);
    assert!(disk.with(|content| content.durable == content.bytes));
    driver.put(COMMAND, code::FLUSH_CACHE_EXT);
    assert_eq!(driver.take(), READY);
}

#[test]
fn cylinders_heads_and_sectors_name_the_same_sectors() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    let order = |driver: &mut Driver, cylinder: u16, head: u8, sector: u8| {
        driver.put(SECTOR_COUNT, 1);
        driver.put(LBA_LOW, sector);
        driver.put(LBA_MID, cylinder as u8);
        driver.put(LBA_HIGH, (cylinder >> 8) as u8);
        driver.put(DEVICE, head);
        driver.put(COMMAND, code::READ_SECTORS);
    };
    order(&mut driver, 1, 15, 63);
    assert!(driver.read_all(1, 1) == content(&disk, 2 * 1008 - 1, 1));
    for (cylinder, head, sector) in [(0, 0, 0), (0, 0, 64), (3, 0, 1), (u16::MAX, 15, 63)] {
        order(&mut driver, cylinder, head, sector);
        assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::IDNF));
    }
    driver.put(SECTOR_COUNT, 32);
    driver.put(DEVICE, 3);
    driver.put(COMMAND, code::INITIALIZE_PARAMETERS);
    assert_eq!(driver.take(), READY);
    order(&mut driver, 1, 1, 2);
    assert!(driver.read_all(1, 1) == content(&disk, (4 + 1) * 32 + 1, 1));
    assert_eq!(driver.identify()[54..57], [16, 4, 32]);
}

#[test]
fn what_is_not_there_is_an_error_and_nothing_is_touched() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    for (sector, count) in [(SECTORS, 1), (SECTORS - 1, 2), (0x0fff_ffff, 256)] {
        for command in [code::READ_SECTORS, code::WRITE_SECTORS, code::READ_VERIFY] {
            driver.order(command, sector, count);
            assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::IDNF));
            driver.order_wide(
                command + if command == 0x40 { 2 } else { 4 },
                u64::MAX >> 16,
                1,
            );
            assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::IDNF));
        }
    }
    // Not supported, not set up, not a power of two, or defined to fail.
    for (command, count) in [
        (code::NOP, 0),
        (0xc8, 1),
        (0xa1, 0),
        (0xff, 0),
        (code::READ_MULTIPLE, 1),
        (code::WRITE_MULTIPLE, 1),
        (code::SET_MULTIPLE, 3),
        (code::SET_MULTIPLE, 32),
        (code::INITIALIZE_PARAMETERS, 0),
    ] {
        driver.order(command, 0, count);
        assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::ABRT));
    }
    driver.put(COMMAND, code::READ_NATIVE_MAX);
    assert_eq!(driver.take(), READY);
    assert_eq!(driver.sector(), SECTORS - 1);
    for command in [
        code::SEEK,
        code::RECALIBRATE,
        code::IDLE,
        code::CHECK_POWER_MODE,
    ] {
        driver.order(command, 0, 1);
        assert_eq!(driver.take(), READY);
    }
    assert!(disk.with(|content| content.bytes == content.durable));
}

#[test]
fn faults_of_the_backing_name_the_sector_and_what_comes_before_is_moved() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    disk.fail(Faults {
        end: Some(12 * 512),
        ..Faults::default()
    });
    driver.order(code::READ_SECTORS, 10, 4);
    for sector in 10..12 {
        assert_eq!(driver.take(), DATA_READY);
        assert!(driver.read_block(512) == disk.sector(sector));
    }
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::UNC));
    assert_eq!(driver.sector(), 12);
    assert_eq!(driver.read_block(2), [0xee; 2]);
    driver.order(code::READ_VERIFY, 10, 4);
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::UNC));
    assert_eq!(driver.sector(), 12);
    disk.fail(Faults {
        read: Some(libc::EIO),
        write: Some(libc::ENOSPC),
        flush: Some(libc::EIO),
        ..Faults::default()
    });
    driver.order(code::READ_SECTORS, 10, 4);
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::UNC));
    driver.order(code::WRITE_SECTORS, 20, 1);
    driver.ata.write_items(DATA, 2, &[1; 512]);
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::ABRT));
    assert_eq!(driver.sector(), 20);
    driver.put(COMMAND, code::FLUSH_CACHE);
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::ABRT));
    // The device lives.
    disk.fail(Faults::default());
    driver.order(code::READ_SECTORS, 30, 1);
    assert!(driver.read_all(1, 1) == content(&disk, 30, 1));
    disk.fail(Faults {
        read_only: true,
        ..Faults::default()
    });
    driver.order(code::WRITE_SECTORS, 20, 1);
    assert_eq!((driver.take(), driver.get(ERROR)), (FAILED, error::ABRT));
}

#[test]
fn interrupts_can_be_masked_and_wait() {
    let disk = Disk::new(SECTORS);
    let mut driver = Driver::new(&disk);
    driver.put(CONTROL, 2);
    driver.order(code::READ_SECTORS, 0, 1);
    assert!(!driver.interrupted());
    driver.put(CONTROL, 0);
    assert!(driver.interrupted());
    driver.put(CONTROL, 2);
    assert!(!driver.interrupted());
    assert_eq!(driver.get(STATUS), DATA_READY);
    driver.put(CONTROL, 0);
    assert!(!driver.interrupted());
}

#[test]
fn the_previous_content_of_registers_can_be_read() {
    let mut driver = Driver::new(&Disk::new(SECTORS));
    driver.put(LBA_LOW, 0x12);
    driver.put(LBA_LOW, 0x34);
    driver.put(CONTROL, 0x80);
    assert_eq!(driver.get(LBA_LOW), 0x12);
    driver.put(LBA_MID, 0);
    assert_eq!(driver.get(LBA_LOW), 0x34);
}
