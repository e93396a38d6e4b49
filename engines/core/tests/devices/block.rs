//! The virtio block device.

use engine_core::devices::virtio::block::{self, Block, request};
use engine_core::devices::virtio::feature;
use engine_core::storage::SECTOR;

use crate::backing::{Disk, Faults};
use crate::virtio::{DATA, Driver, INDIRECT, NEXT, WRITE};

const SECTORS: u64 = 64;
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;
const ALL: u64 = u64::MAX;

fn driver(disk: &Disk, features: u64) -> Driver {
    Driver::new(Box::new(Block::new(disk.boxed())), features, 64)
}

/// Puts a request's header in place `slot`.
fn header(driver: &Driver, slot: u64, kind: u32, sector: u64) -> u64 {
    let at = HEADER + slot * 16;
    driver.put(at, &kind.to_le_bytes());
    driver.put(at + 4, &[0; 4]);
    driver.put(at + 8, &sector.to_le_bytes());
    at
}

/// One request with data in parts of these lengths: its status and its used length.
fn ask(driver: &mut Driver, kind: u32, sector: u64, parts: &[u32]) -> (u8, u32) {
    let at = header(driver, 0, kind, sector);
    driver.put(STATUS, &[0xee]);
    let mut chain = vec![(at, 16, false)];
    let mut data = BUFFER;
    for &length in parts {
        chain.push((data, length, kind != request::OUT));
        data += u64::from(length);
    }
    chain.push((STATUS, 1, true));
    driver.offer_chain(0, 3, &chain);
    driver.notify(0);
    let (head, written) = driver
        .reap(0)
        .expect("a completion on return from the doorbell");
    assert_eq!(head, 3);
    (driver.bytes(STATUS, 1)[0], written)
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    let mut config = [0; 32];
    driver.config(0, &mut config[..8]);
    driver.config(12, &mut config[12..16]);
    driver.config(20, &mut config[20..24]);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    // Beyond the end: nothing there.
    driver.config(0xf0, &mut config[..4]);
    assert_eq!(config[..4], [0xff; 4]);
    assert_eq!(driver.offered() & block::RO, 0);
    disk.fail(Faults {
        read_only: true,
        ..Faults::default()
    });
    let mut read_only = self::driver(&disk, ALL);
    assert_ne!(read_only.offered() & block::RO, 0);
}

#[test]
fn data_goes_both_ways_in_any_layout() {
    for features in [0, feature::EVENT_IDX, ALL] {
        let disk = Disk::new(SECTORS);
        let mut driver = driver(&disk, features);
        assert_eq!(
            ask(&mut driver, request::IN, 5, &[512, 100, 412]),
            (0, 1025)
        );
        let expected = [disk.sector(5), disk.sector(6)].concat();
        assert_eq!(driver.bytes(BUFFER, 1024), expected);
        driver.put(BUFFER, &[0x77; 1536]);
        assert_eq!(ask(&mut driver, request::OUT, 61, &[1, 1535]), (0, 1));
        assert_eq!(disk.sector(63), [0x77; 512]);
        assert_eq!(disk.sector(60)[0], (60 + 60 * 512u64) as u8);
        assert_eq!(ask(&mut driver, request::FLUSH, 0, &[]), (0, 1));
        assert_eq!(ask(&mut driver, request::GET_ID, 0, &[20]), (0, 21));
        assert_eq!(driver.bytes(BUFFER, 12), b"memory-disk\0");
        assert!(!driver.needs_reset());
    }
}

#[test]
fn header_and_status_need_no_descriptors_of_their_own() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    // Header in two halves, the second with the data behind it.
    driver.put(BUFFER, &[0x42; 528]);
    driver.put(BUFFER, &request::OUT.to_le_bytes());
    driver.put(BUFFER + 4, &[0; 4]);
    driver.put(BUFFER + 8, &7u64.to_le_bytes());
    let chain = [
        (BUFFER, 5, false),
        (BUFFER + 5, 523, false),
        (STATUS, 1, true),
    ];
    driver.offer_chain(0, 0, &chain);
    driver.notify(0);
    assert_eq!(driver.reap(0), Some((0, 1)));
    assert_eq!(disk.sector(7), [0x42; 512]);
    // Data and status in one.
    let at = header(&driver, 0, request::IN, 7);
    driver.offer_chain(0, 0, &[(at, 16, false), (BUFFER + 0x800, 513, true)]);
    driver.notify(0);
    assert_eq!(driver.reap(0), Some((0, 513)));
    let mut expected = vec![0x42; 512];
    expected.push(0);
    assert_eq!(driver.bytes(BUFFER + 0x800, 513), expected);
}

#[test]
fn wrong_requests_get_the_devices_own_error() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    let cases = [
        (request::IN, SECTORS, &[512][..], request::S_IOERR),
        (request::IN, SECTORS - 1, &[1024], request::S_IOERR),
        (request::IN, u64::MAX, &[512], request::S_IOERR),
        (request::OUT, u64::MAX / 512, &[512], request::S_IOERR),
        (request::IN, 0, &[511], request::S_IOERR),
        (request::OUT, 0, &[513], request::S_IOERR),
        (77, 0, &[512], request::S_UNSUPP),
        (request::IN, SECTORS, &[], request::S_OK),
    ];
    for (kind, sector, parts, status) in cases {
        let found = ask(&mut driver, kind, sector, parts);
        assert_eq!(found.0, status, "{kind} at {sector}");
    }
    assert!(!driver.needs_reset());
    assert!(disk.with(|content| content.bytes == content.durable));
}

#[test]
fn faults_of_the_backing_are_errors_of_the_device_and_nothing_acknowledged_is_lost() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    let short = Faults {
        end: Some(8 * SECTOR),
        ..Faults::default()
    };
    let sick = Faults {
        read: Some(libc::EIO),
        write: Some(libc::ENOSPC),
        flush: Some(libc::EIO),
        ..Faults::default()
    };
    disk.fail(short);
    assert_eq!(ask(&mut driver, request::IN, 7, &[512]).0, request::S_OK);
    assert_eq!(
        ask(&mut driver, request::IN, 7, &[1024]),
        (request::S_IOERR, 0)
    );
    disk.fail(sick);
    assert_eq!(
        ask(&mut driver, request::IN, 0, &[512]),
        (request::S_IOERR, 0)
    );
    assert_eq!(
        ask(&mut driver, request::OUT, 0, &[1024]),
        (request::S_IOERR, 1)
    );
    assert_eq!(
        ask(&mut driver, request::FLUSH, 0, &[]),
        (request::S_IOERR, 1)
    );
    disk.fail(Faults::default());
    driver.put(BUFFER, &[0x99; 512]);
    assert_eq!(ask(&mut driver, request::OUT, 9, &[512]).0, request::S_OK);
    assert_eq!(ask(&mut driver, request::FLUSH, 0, &[]).0, request::S_OK);
    let durable = disk.with(|content| content.durable[9 * 512..10 * 512].to_vec());
    assert_eq!(durable, [0x99; 512]);
    assert!(!driver.needs_reset());
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let disk = Disk::new(SECTORS);
    disk.fail(Faults {
        read_only: true,
        ..Faults::default()
    });
    let mut driver = driver(&disk, ALL);
    assert_eq!(
        ask(&mut driver, request::OUT, 0, &[512]).0,
        request::S_IOERR
    );
    assert_eq!(ask(&mut driver, request::IN, 0, &[512]).0, request::S_OK);
}

#[test]
fn without_flush_each_write_is_durable_when_it_is_acknowledged() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, !block::FLUSH);
    driver.put(BUFFER, &[0x31; 512]);
    assert_eq!(ask(&mut driver, request::OUT, 3, &[512]).0, 0);
    assert!(disk.with(|content| content.durable == content.bytes && content.flushes == 1));
    disk.fail(Faults {
        flush: Some(libc::EIO),
        ..Faults::default()
    });
    assert_eq!(
        ask(&mut driver, request::OUT, 3, &[512]).0,
        request::S_IOERR
    );
}

#[test]
fn a_batch_needs_one_notification_and_one_interrupt_at_most() {
    let disk = Disk::new(SECTORS);
    for (features, expected) in [(0, 1), (feature::EVENT_IDX, 1)] {
        let mut driver = driver(&disk, features);
        for slot in 0..16 {
            let at = header(&driver, slot, request::IN, slot);
            let data = BUFFER + slot * 512;
            let parts = [(at, 16, false), (data, 512, true), (STATUS + slot, 1, true)];
            driver.offer_chain(0, slot as u16 * 3, &parts);
        }
        driver.notify(0);
        for slot in 0..16 {
            assert_eq!(driver.reap(0), Some((slot * 3, 513)));
            let data = driver.bytes(BUFFER + u64::from(slot) * 512, 512);
            assert_eq!(data, disk.sector(slot.into()));
        }
        assert_eq!(driver.reap(0), None);
        assert_eq!(driver.interrupts(), expected);
    }
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let disk = Disk::new(SECTORS);
    // By used_event: the driver wants to hear of the one after the next three.
    let mut driver = self::driver(&disk, feature::EVENT_IDX);
    let event = driver.queues[0].available() + 4 + 64 * 2;
    driver.put_half(event, 3);
    for expected in [0, 0, 0, 1, 1] {
        ask(&mut driver, request::IN, 0, &[512]);
        assert_eq!(driver.interrupts(), expected);
    }
    // avail_event says that the next request is worth a notification.
    let event = driver.queues[0].used() + 4 + 64 * 8;
    assert_eq!(driver.half(event), 5);
    // By the flag.
    let mut driver = self::driver(&disk, 0);
    driver.put_half(driver.queues[0].available(), 1);
    ask(&mut driver, request::IN, 0, &[512]);
    assert_eq!(driver.interrupts(), 0);
    driver.put_half(driver.queues[0].available(), 0);
    ask(&mut driver, request::IN, 0, &[512]);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn indirect_tables_hold_whole_requests() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    let table = DATA + 0x8000;
    let at = header(&driver, 0, request::IN, 2);
    driver.describe(table, 0, (at, 16, NEXT, 1));
    driver.describe(table, 1, (BUFFER, 512, WRITE | NEXT, 2));
    driver.describe(table, 2, (STATUS, 1, WRITE, 0));
    let entry = driver.queues[0].descriptors();
    driver.describe(entry, 9, (table, 48, INDIRECT, 0));
    driver.offer(0, 9);
    driver.notify(0);
    assert_eq!(driver.reap(0), Some((9, 513)));
    assert_eq!(driver.bytes(BUFFER, 512), disk.sector(2));
}

#[test]
fn the_ring_wraps_around() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    for round in 0..70_000u64 {
        let sector = round % SECTORS;
        assert_eq!(ask(&mut driver, request::IN, sector, &[512]), (0, 513));
    }
    assert_eq!(driver.bytes(BUFFER, 512), disk.sector(69_999 % SECTORS));
}

#[test]
fn pages_that_the_device_writes_are_logged() {
    let disk = Disk::new(SECTORS);
    let mut driver = driver(&disk, ALL);
    let log = driver.memory.log().unwrap().clone();
    let mut pages = Vec::new();
    log.take(&mut pages);
    ask(&mut driver, request::IN, 0, &[4096, 512]);
    assert!(log.take(&mut pages));
    pages.sort_unstable();
    let used = driver.queues[0].used() >> 12;
    let expected = [used, STATUS >> 12, BUFFER >> 12, (BUFFER >> 12) + 1];
    assert_eq!(pages, expected);
}
