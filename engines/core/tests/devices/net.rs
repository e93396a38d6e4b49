//! The virtio network device.

use engine_core::devices::Device;
use engine_core::devices::virtio::Net;
use engine_core::devices::virtio::mmio::register::CONFIG_GENERATION;
use engine_core::devices::virtio::net::{HEADER, RECEIVE, TRANSMIT};
use engine_core::net::{DEFAULT_MAC, LONGEST};

use crate::backing::Wire;
use crate::virtio::{DATA, Driver};

const SLOT: u64 = 0x800;

fn driver(wire: &Wire) -> Driver {
    Driver::new(Box::new(Net::new(wire.boxed(), DEFAULT_MAC)), u64::MAX, 16)
}

fn offer_buffer(driver: &mut Driver, slot: u16, length: u32) {
    let at = DATA + u64::from(slot) * SLOT;
    driver.offer_chain(RECEIVE, slot, &[(at, length, true)]);
}

/// The frame in the next used buffer.
fn received(driver: &mut Driver) -> Option<Vec<u8>> {
    let (slot, length) = driver.reap(RECEIVE)?;
    let bytes = driver.bytes(DATA + u64::from(slot) * SLOT, length as usize);
    assert_eq!(bytes[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    Some(bytes[HEADER..].to_vec())
}

#[test]
fn the_configuration_has_address_and_link() {
    let wire = Wire::new();
    let mut driver = driver(&wire);
    let mut config = [0; 8];
    driver.config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0]);
    let generation = driver.get(CONFIG_GENERATION);
    wire.frames.lock().unwrap().gone = true;
    driver.device.host_ready();
    driver.config(6, &mut config[..2]);
    assert_eq!(config[..2], [0, 0]);
    assert_ne!(driver.get(CONFIG_GENERATION), generation);
    assert_eq!(driver.interrupts(), 1);
    // Frames into the void do no harm.
    driver.offer_chain(TRANSMIT, 0, &[(DATA, 12 + 60, false)]);
    driver.notify(TRANSMIT);
    assert_eq!(driver.reap(TRANSMIT), Some((0, 0)));
    assert!(!driver.needs_reset());
}

#[test]
fn frames_go_out_in_order_and_without_their_header() {
    let wire = Wire::new();
    let mut driver = driver(&wire);
    for slot in 0..4u8 {
        let at = DATA + u64::from(slot) * SLOT;
        driver.put(at, &[0; HEADER]);
        driver.put(at + HEADER as u64, &[slot; 100]);
        let parts = [(at, 5, false), (at + 5, 50, false), (at + 55, 57, false)];
        driver.offer_chain(TRANSMIT, u16::from(slot) * 3, &parts);
    }
    driver.notify(TRANSMIT);
    let expected: Vec<Vec<u8>> = (0..4).map(|slot| vec![slot; 100]).collect();
    assert_eq!(wire.sent(), expected);
    for slot in 0..4 {
        assert_eq!(driver.reap(TRANSMIT), Some((slot * 3, 0)));
    }
}

#[test]
fn frames_that_are_none_are_dropped() {
    let wire = Wire::new();
    let mut driver = driver(&wire);
    for length in [1, HEADER as u32, (HEADER + LONGEST) as u32 + 1, 1 << 20] {
        driver.offer_chain(TRANSMIT, 0, &[(DATA, length, false)]);
        driver.notify(TRANSMIT);
        assert!(driver.reap(TRANSMIT).is_some());
    }
    assert!(wire.sent().is_empty());
    let longest = (HEADER + LONGEST) as u32;
    driver.offer_chain(TRANSMIT, 0, &[(DATA, longest, false)]);
    driver.notify(TRANSMIT);
    assert_eq!(wire.sent()[0].len(), LONGEST);
}

#[test]
fn frames_come_in_when_there_are_buffers_and_wait_when_there_are_none() {
    let wire = Wire::new();
    let mut driver = driver(&wire);
    offer_buffer(&mut driver, 0, 1600);
    driver.notify(RECEIVE);
    assert_eq!(received(&mut driver), None);
    for byte in 1..=4 {
        wire.arrive(&[byte; 64]);
    }
    driver.device.host_ready();
    assert_eq!(received(&mut driver), Some(vec![1; 64]));
    assert_eq!(received(&mut driver), None);
    assert_eq!(driver.interrupts(), 1);
    // The others wait in the card; the host's descriptor is drained.
    assert!(wire.frames.lock().unwrap().inward.is_empty());
    for slot in 1..4 {
        offer_buffer(&mut driver, slot, 1600);
    }
    driver.notify(RECEIVE);
    for byte in 2..=4 {
        assert_eq!(received(&mut driver), Some(vec![byte; 64]));
    }
    // Far more than a card keeps.
    for number in 0..1000u32 {
        wire.arrive(&number.to_le_bytes().repeat(16));
    }
    for _ in 0..4 {
        driver.device.host_ready();
    }
    assert!(wire.frames.lock().unwrap().inward.is_empty());
    offer_buffer(&mut driver, 0, 1600);
    driver.notify(RECEIVE);
    assert_eq!(received(&mut driver), Some(0u32.to_le_bytes().repeat(16)));
}

#[test]
fn a_buffer_too_small_is_kept_and_its_frame_dropped() {
    let wire = Wire::new();
    let mut driver = driver(&wire);
    offer_buffer(&mut driver, 0, 40);
    wire.arrive(&[7; 64]);
    wire.arrive(&[8; 20]);
    driver.device.host_ready();
    assert_eq!(received(&mut driver), Some(vec![8; 20]));
    assert_eq!(received(&mut driver), None);
    assert!(!driver.needs_reset());
}

#[test]
fn without_a_driver_frames_are_taken_off_the_host() {
    let wire = Wire::new();
    let mut driver = Driver::cold(Box::new(Net::new(wire.boxed(), DEFAULT_MAC)));
    wire.arrive(&[1; 64]);
    driver.device.host_ready();
    assert!(wire.frames.lock().unwrap().inward.is_empty());
    // A driver that comes later finds nothing from before its time.
    driver.initialise(u64::MAX, 16);
    offer_buffer(&mut driver, 0, 1600);
    driver.notify(RECEIVE);
    assert_eq!(received(&mut driver), None);
}
