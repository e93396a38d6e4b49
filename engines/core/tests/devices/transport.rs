//! The MMIO transport: registers, negotiation, resets, and drivers that break the rules.

use engine_core::devices::Device;
use engine_core::devices::virtio::block::{Block, request};
use engine_core::devices::virtio::core::status;
use engine_core::devices::virtio::mmio::{CONFIG_CHANGE, register::*};
use engine_core::devices::virtio::{Broken, Mmio, feature};
use engine_core::interrupt::Line;

use crate::backing::Disk;
use crate::virtio::{DATA, Driver, INDIRECT, NEXT, WRITE};

fn cold() -> Driver {
    Driver::cold(Box::new(Block::new(Disk::new(8).boxed())))
}

fn ready() -> Driver {
    let mut driver = cold();
    driver.initialise(u64::MAX, 16);
    driver
}

#[test]
fn a_vacant_transport_shows_itself_as_one() {
    let mut vacant = Mmio::vacant(Line::disconnected());
    let mut word = [0xff; 4];
    for (offset, expected) in [(MAGIC_VALUE, 0x7472_6976u32), (VERSION, 2), (DEVICE_ID, 0)] {
        vacant.read(offset, &mut word);
        assert_eq!(u32::from_le_bytes(word), expected);
    }
    for offset in (0..0x200).step_by(4) {
        vacant.write(offset, &[0xff; 4]);
    }
    vacant.host_ready();
    assert!(vacant.descriptor().is_none());
}

#[test]
fn features_are_agreed_upon_or_not() {
    let mut driver = cold();
    assert_eq!(driver.get(DEVICE_ID), 2);
    let offered = driver.offered();
    assert_eq!(offered & feature::COMMON, feature::COMMON);
    for (wanted, fits) in [
        (0, false),
        (offered & !feature::VERSION_1, false),
        (feature::VERSION_1, true),
        (offered, true),
        (offered | 1 << 50, false),
        (u64::MAX, false),
    ] {
        driver.set(STATUS, 0);
        driver.set(STATUS, 3);
        driver.accept(wanted);
        driver.set(STATUS, (3 | status::FEATURES_OK).into());
        let agreed = driver.status() & status::FEATURES_OK != 0;
        assert_eq!(agreed, fits, "{wanted:#x}");
        // Too late to change one's mind, or to go on without.
        driver.accept(0);
        driver.set(STATUS, (3 | status::FEATURES_OK | status::DRIVER_OK).into());
        assert_eq!(driver.status() & status::DRIVER_OK != 0, fits);
        let expected = if fits { wanted } else { 0 };
        assert_eq!(driver.device.core().unwrap().accepted(), expected);
    }
}

#[test]
fn narrow_and_misaligned_accesses_to_registers_do_nothing() {
    let mut driver = ready();
    for length in [1, 2, 8] {
        let mut data = vec![0xff; length];
        driver.device.read(MAGIC_VALUE, &mut data);
        assert!(data.iter().all(|&byte| byte == 0xff));
        driver.device.write(STATUS, &vec![0; length]);
    }
    driver.device.write(STATUS - 2, &[0; 4]);
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = ready();
    driver.set(QUEUE_SEL, 0);
    driver.set(STATUS, 0);
    assert_eq!(driver.get(QUEUE_READY), 0);
    assert_eq!(driver.get(INTERRUPT_STATUS), 0);
    assert_eq!(driver.device.core().unwrap().accepted(), 0);
    // A notification without a driver is not even looked at.
    driver.offer_chain(0, 0, &[(DATA, 16, false)]);
    driver.notify(0);
    assert_eq!(driver.reap(0), None);
    driver.initialise(u64::MAX, 8);
    assert!(!driver.needs_reset());
}

#[test]
fn a_queue_in_use_stays_where_it_is() {
    let mut driver = ready();
    driver.set(QUEUE_SEL, 0);
    driver.set(QUEUE_DESC_LOW, 0xdead_0000);
    driver.set(QUEUE_SIZE, 1);
    driver.put(DATA, &request::FLUSH.to_le_bytes());
    driver.put(DATA + 4, &[0; 12]);
    driver.offer_chain(0, 5, &[(DATA, 16, false), (DATA + 64, 1, true)]);
    driver.notify(0);
    assert_eq!(driver.reap(0), Some((5, 1)));
}

#[test]
fn rings_in_impossible_places_need_a_reset() {
    let good = (16, 0x10_0000u64, 0x10_1000u64, 0x10_2000u64);
    let cases = [
        (0, good.1, good.2, good.3),
        (3, good.1, good.2, good.3),
        (512, good.1, good.2, good.3),
        (0x1_0010, good.1, good.2, good.3),
        (16, good.1 + 8, good.2, good.3),
        (16, good.1, good.2 + 1, good.3),
        (16, good.1, good.2, good.3 + 2),
        (16, 4 << 20, good.2, good.3),
        (16, good.1, (4 << 20) - 16, good.3),
        (16, good.1, good.2, (4 << 20) - 64),
        (16, !15, good.2, good.3),
        (16, good.1, !1, good.3),
        (16, good.1, good.2, !3),
        (16, good.1, 0, good.3),
    ];
    for case in cases {
        let (size, table, available, used) = case;
        let mut driver = cold();
        driver.set(STATUS, 3);
        driver.accept(feature::VERSION_1);
        driver.set(STATUS, 0xb);
        driver.set(QUEUE_SEL, 0);
        driver.set(QUEUE_SIZE, size);
        for (low, address) in [
            (QUEUE_DESC_LOW, table),
            (QUEUE_DRIVER_LOW, available),
            (QUEUE_DEVICE_LOW, used),
        ] {
            driver.set(low, address as u32);
            driver.set(low + 4, (address >> 32) as u32);
        }
        driver.set(QUEUE_READY, 1);
        assert_eq!(driver.get(QUEUE_READY), 0, "{case:x?}");
        assert!(driver.needs_reset(), "{case:x?}");
        let core = driver.device.core().unwrap();
        assert_eq!(core.broken(), Some(Broken::Ring));
    }
}

#[test]
fn queues_that_do_not_exist_are_ignored() {
    let mut driver = ready();
    for queue in [1, 7, u32::MAX] {
        driver.set(QUEUE_SEL, queue);
        assert_eq!(driver.get(QUEUE_SIZE_MAX), 0);
        driver.set(QUEUE_SIZE, 8);
        driver.set(QUEUE_READY, 1);
        assert_eq!(driver.get(QUEUE_READY), 0);
        driver.set(QUEUE_NOTIFY, queue);
    }
    assert!(!driver.needs_reset());
}

/// Breaks one rule on a fresh device; what it says about that.
fn breaks(rule: impl FnOnce(&mut Driver)) -> Broken {
    let mut driver = ready();
    rule(&mut driver);
    driver.notify(0);
    assert!(driver.needs_reset());
    assert_eq!(driver.get(INTERRUPT_STATUS), CONFIG_CHANGE);
    assert_eq!(driver.reap(0), None);
    let broken = driver.device.core().unwrap().broken().unwrap();
    // Nothing is served any more, and a reset mends it.
    driver.notify(0);
    assert!(driver.needs_reset());
    driver.initialise(u64::MAX, 16);
    driver.put(DATA, &request::FLUSH.to_le_bytes());
    driver.put(DATA + 4, &[0; 12]);
    driver.offer_chain(0, 0, &[(DATA, 16, false), (DATA + 64, 1, true)]);
    driver.notify(0);
    assert_eq!(driver.reap(0), Some((0, 1)));
    broken
}

#[test]
fn each_broken_rule_needs_a_reset_and_has_a_name() {
    let end = 4u64 << 20;
    let table = 0x10_0000;
    let chain =
        |parts: &'static [(u64, u32, bool)]| breaks(move |driver| driver.offer_chain(0, 0, parts));
    // An index that jumped.
    let jump = breaks(|driver| {
        let at = driver.queues[0].available() + 2;
        driver.put_half(at, 17);
    });
    assert_eq!(jump, Broken::Index);
    // A head that is no descriptor.
    assert_eq!(breaks(|driver| driver.offer(0, 16)), Broken::Chain);
    // Loops, of one and of all descriptors.
    let short = breaks(|driver| {
        driver.describe(table, 0, (DATA, 16, NEXT, 0));
        driver.offer(0, 0);
    });
    assert_eq!(short, Broken::Chain);
    let long = breaks(|driver| {
        for index in 0..16 {
            driver.describe(table, index, (DATA, 0, NEXT, (index + 1) % 16));
        }
        driver.offer(0, 0);
    });
    assert_eq!(long, Broken::Chain);
    // A next that is no descriptor.
    let wild = breaks(|driver| {
        driver.describe(table, 0, (DATA, 16, NEXT, 16));
        driver.offer(0, 0);
    });
    assert_eq!(wild, Broken::Chain);
    // More than 2^32 bytes, from memory that is there.
    let vast = breaks(|driver| {
        for index in 0..2 {
            driver.describe(table, index, (DATA, u32::MAX, NEXT, index + 1));
        }
        driver.describe(table, 2, (DATA, 1, WRITE, 0));
        driver.offer(0, 0);
    });
    assert!(matches!(vast, Broken::Address | Broken::Chain));
    // Readable behind writable; not in memory; no status; no header; nothing at all.
    assert_eq!(
        chain(&[(DATA, 16, false), (DATA, 1, true), (DATA, 1, false)]),
        Broken::Order
    );
    assert_eq!(
        chain(&[(4 << 20, 16, false), (DATA, 1, true)]),
        Broken::Address
    );
    assert_eq!(
        chain(&[((4 << 20) - 8, 16, false), (DATA, 1, true)]),
        Broken::Address
    );
    assert_eq!(
        chain(&[(u64::MAX - 4, 16, false), (DATA, 1, true)]),
        Broken::Address
    );
    assert_eq!(
        chain(&[(DATA, u32::MAX, false), (DATA, 1, true)]),
        Broken::Address
    );
    assert_eq!(chain(&[(DATA, 16, false)]), Broken::Request);
    assert_eq!(
        chain(&[(DATA, 15, false), (DATA, 1, true)]),
        Broken::Request
    );
    assert_eq!(chain(&[(DATA, 0, false)]), Broken::Request);
    // Indirect tables: of a length that is none, outside of memory, in themselves, too long.
    for (address, length) in [
        (DATA, 8),
        (DATA, 0),
        (end, 16),
        (end - 16, 64),
        (u64::MAX, 16),
    ] {
        let found = breaks(|driver| {
            driver.describe(table, 0, (address, length, INDIRECT, 0));
            if length == 64 {
                driver.describe(end - 16, 0, (DATA, 16, NEXT, 1));
            }
            driver.offer(0, 0);
        });
        assert_eq!(found, Broken::Chain, "{address:#x} {length}");
    }
    let nested = breaks(|driver| {
        driver.describe(DATA, 0, (DATA, 16, INDIRECT, 0));
        driver.describe(table, 0, (DATA, 16, INDIRECT, 0));
        driver.offer(0, 0);
    });
    assert_eq!(nested, Broken::Chain);
    let many = breaks(|driver| {
        for index in 0..17 {
            let flags = if index == 16 { 0 } else { NEXT };
            driver.describe(DATA, index, (DATA, 1, flags, index + 1));
        }
        driver.describe(table, 0, (DATA, 17 * 16, INDIRECT, 0));
        driver.offer(0, 0);
    });
    assert_eq!(many, Broken::Chain);
}

#[test]
fn a_device_that_overwrites_its_own_ring_comes_to_an_end() {
    // Every request is answered into the available ring: the index jumps or goes on, and the
    // device must return all the same.
    let mut driver = ready();
    let available = driver.queues[0].available();
    for offset in 0..24 {
        driver.put(DATA, &[0; 16]);
        driver.put(DATA, &request::GET_ID.to_le_bytes());
        driver.offer_chain(0, 0, &[(DATA, 16, false), (available + offset, 21, true)]);
        driver.notify(0);
        if driver.needs_reset() {
            driver.initialise(u64::MAX, 16);
        }
    }
}
