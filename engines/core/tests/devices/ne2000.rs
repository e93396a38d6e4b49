//! The NE2000 card, register by register.

use std::sync::Arc;

use engine_core::devices::ne2000::{Ne2000, command, interrupt, port};
use engine_core::devices::{Action, Device};
use engine_core::interrupt::Line;
use engine_core::net::{DEFAULT_MAC, LONGEST};

use crate::backing::Wire;
use crate::virtio;

const TRANSMIT_PAGE: u8 = 0x40;
const START: u8 = 0x46;
const STOP: u8 = 0x60;
const RUN: u8 = command::START | command::ABORT_DMA;

struct Driver {
    card: Ne2000,
    line: Arc<virtio::Wire>,
}

impl Driver {
    fn cold(wire: &Wire) -> Driver {
        let line = Arc::new(virtio::Wire::default());
        let card = Ne2000::new(wire.boxed(), DEFAULT_MAC, Line::new(line.clone(), 9));
        Driver { card, line }
    }

    /// Initialised as the data sheet has it, for word-wide transfers.
    fn new(wire: &Wire) -> Driver {
        let mut driver = Driver::cold(wire);
        driver.get(port::RESET);
        assert_eq!(driver.get(7), interrupt::RESET);
        driver.put(0, command::STOP | command::ABORT_DMA);
        driver.put(0x0e, 0x49);
        driver.put(0x0c, 0x04);
        driver.put(0x0d, 0);
        driver.put(0x01, START);
        driver.put(0x02, STOP);
        driver.put(0x03, START);
        driver.put(0x07, 0xff);
        driver.put(0x0f, 0x3f);
        driver.put(0, 0x40 | command::STOP | command::ABORT_DMA);
        for (at, byte) in (1..).zip(DEFAULT_MAC) {
            driver.put(at, byte);
        }
        driver.put(7, START);
        driver.put(0, RUN);
        assert_eq!(driver.get(7), 0);
        driver
    }

    fn get(&mut self, offset: u64) -> u8 {
        let mut byte = [0xff];
        self.card.read(offset, &mut byte);
        byte[0]
    }

    fn put(&mut self, offset: u64, value: u8) {
        self.card.write(offset, &[value]);
    }

    fn current(&mut self) -> u8 {
        self.put(0, 0x40 | RUN);
        let page = self.get(7);
        self.put(0, RUN);
        page
    }

    fn remote(&mut self, address: u16, count: usize, direction: u8) {
        self.put(8, address as u8);
        self.put(9, (address >> 8) as u8);
        self.put(0x0a, count as u8);
        self.put(0x0b, (count >> 8) as u8);
        self.put(0, command::START | direction);
    }

    fn done(&mut self) {
        assert_ne!(self.get(7) & interrupt::REMOTE_DONE, 0);
        self.put(7, interrupt::REMOTE_DONE);
    }

    fn read(&mut self, address: u16, count: usize) -> Vec<u8> {
        self.remote(address, count, command::REMOTE_READ);
        let mut data = vec![0xee; count];
        self.card.read_items(port::DATA, 2, &mut data);
        self.done();
        data
    }

    fn write(&mut self, address: u16, data: &[u8]) {
        self.remote(address, data.len(), command::REMOTE_WRITE);
        self.card.write_items(port::DATA, 2, data);
        self.done();
    }

    fn send(&mut self, frame: &[u8]) {
        let mut padded = frame.to_vec();
        padded.resize(frame.len().next_multiple_of(2), 0);
        self.write(u16::from(TRANSMIT_PAGE) << 8, &padded);
        self.put(4, TRANSMIT_PAGE);
        self.put(5, frame.len() as u8);
        self.put(6, (frame.len() >> 8) as u8);
        self.put(0, RUN | command::TRANSMIT);
        assert_eq!(self.get(0) & command::TRANSMIT, 0);
    }

    /// Takes the next frame out of the ring.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let boundary = self.get(3);
        if self.current() == boundary {
            return None;
        }
        let page = u16::from(boundary) << 8;
        let header = self.read(page, 4);
        assert_eq!(header[0] & 1, 1);
        let length = usize::from(u16::from_le_bytes([header[2], header[3]])) - 4;
        let frame = self.read(page + 4, length.next_multiple_of(2));
        self.put(3, header[1]);
        Some(frame[..length].to_vec())
    }

    fn interrupted(&self) -> bool {
        self.line.0.lock().unwrap().0
    }
}

fn frame(number: u32, length: usize) -> Vec<u8> {
    let mut frame = [&DEFAULT_MAC[..], &[2, 0, 0, 0, 0, 1, 0x88, 0xb5]].concat();
    let words = (number..).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes());
    frame.extend(words.take(length - frame.len()));
    frame
}

#[test]
fn the_prom_holds_the_address_twice_and_a_signature() {
    let mut driver = Driver::new(&Wire::new());
    let prom = driver.read(0, 32);
    let expected: Vec<u8> = DEFAULT_MAC.iter().flat_map(|&byte| [byte, byte]).collect();
    assert_eq!(prom[..12], expected);
    assert_eq!(prom[28..], [0x57; 4]);
    // By bytes, as a driver does it that does not know the width yet.
    driver.put(0x0e, 0x48);
    driver.remote(0, 32, command::REMOTE_READ);
    let bytes: Vec<u8> = (0..32).map(|_| driver.get(port::DATA)).collect();
    assert_eq!(bytes, prom);
    driver.done();
    // It is read-only.
    driver.put(0x0e, 0x49);
    driver.write(0, &[0xaa; 32]);
    assert_eq!(driver.read(0, 32), prom);
}

#[test]
fn packet_memory_takes_bytes_in_any_width() {
    let mut driver = Driver::new(&Wire::new());
    let data: Vec<u8> = (0..1000u32).map(|at| (at * 7) as u8).collect();
    driver.write(0x4000, &data);
    assert_eq!(driver.read(0x4000, 1000), data);
    driver.remote(0x4000, 1000, command::REMOTE_READ);
    let mut back = vec![0; 1000];
    driver.card.read_items(port::DATA, 4, &mut back);
    assert_eq!(back, data);
    driver.done();
    // Nothing beyond the count, and nothing where there is no memory.
    driver.remote(0x4000, 4, command::REMOTE_READ);
    let mut more = [0xee; 8];
    driver.card.read_items(port::DATA, 2, &mut more);
    assert_eq!(more[..4], data[..4]);
    assert_eq!(more[4..], [0xee; 4]);
    driver.write(0xc000, &[1; 16]);
    assert_eq!(driver.read(0xc000, 16), [0xee; 16]);
    driver.write(0xbff8, &[1; 16]);
    assert_eq!(driver.read(0xbff8, 8), [1; 8]);
    // A transfer of nothing is done at once.
    driver.put(7, 0xff);
    driver.remote(0x4000, 0, command::REMOTE_WRITE);
    driver.done();
}

#[test]
fn frames_go_out() {
    let wire = Wire::new();
    let mut driver = Driver::new(&wire);
    for length in [14, 60, 61, 1500, LONGEST] {
        let frame = frame(length as u32, length);
        driver.send(&frame);
        assert_eq!(wire.sent(), [frame]);
        assert!(driver.interrupted());
        assert_eq!(driver.get(7), interrupt::TRANSMITTED);
        assert_eq!(driver.get(4), 1);
        driver.put(7, interrupt::TRANSMITTED);
        assert!(!driver.interrupted());
    }
    // Too long, of no length, and from where there is no memory.
    for (page, length) in [
        (TRANSMIT_PAGE, 1519),
        (TRANSMIT_PAGE, 0),
        (0xbf, 512),
        (0, 60),
    ] {
        driver.put(4, page);
        driver.put(5, length as u8);
        driver.put(6, (length >> 8) as u8);
        driver.put(0, RUN | command::TRANSMIT);
        assert_eq!(driver.get(7), interrupt::TRANSMIT_ERROR);
        driver.put(7, 0xff);
    }
    assert!(wire.sent().is_empty());
    assert_eq!(driver.card.counts().send_dropped, 4);
}

#[test]
fn frames_come_in_around_the_ring_and_wait_outside_when_it_is_full() {
    let wire = Wire::new();
    let mut driver = Driver::new(&wire);
    let frames: Vec<_> = (0..200u32)
        .map(|n| frame(n, 60 + (n as usize * 37) % 1450))
        .collect();
    for frame in &frames {
        wire.arrive(frame);
    }
    let mut seen = Vec::new();
    let mut held = 0;
    while seen.len() < frames.len() {
        held += usize::from(driver.card.host_ready() == Action::Hold);
        assert!(driver.interrupted());
        driver.put(7, interrupt::RECEIVED);
        while let Some(frame) = driver.receive() {
            seen.push(frame);
        }
    }
    assert!(seen == frames);
    // 26 pages hold a few of them at a time.
    assert!(held > 10);
    assert_eq!(driver.card.counts().receive_dropped, 0);
    assert_eq!(driver.card.host_ready(), Action::None);
}

#[test]
fn a_card_takes_what_it_is_set_to_take() {
    let wire = Wire::new();
    let mut driver = Driver::new(&wire);
    let to = |address: [u8; 6]| {
        let mut frame = frame(1, 64);
        frame[..6].copy_from_slice(&address);
        frame
    };
    let group = [1, 0, 0x5e, 0, 0, 0xfb];
    let (broadcast, other) = ([0xff; 6], [2, 2, 2, 2, 2, 2]);
    for (config, accepted) in [
        (0x00, vec![DEFAULT_MAC]),
        (0x04, vec![DEFAULT_MAC, broadcast]),
        (0x08, vec![DEFAULT_MAC, group]),
        (0x1c, vec![DEFAULT_MAC, broadcast, group, other]),
        (0x3c, vec![]),
    ] {
        // All groups.
        driver.put(0, 0x40 | RUN);
        (8..16).for_each(|at| driver.put(at, 0xff));
        driver.put(0, RUN);
        driver.put(0x0c, config);
        for address in [DEFAULT_MAC, broadcast, group, other] {
            wire.arrive(&to(address));
        }
        driver.card.host_ready();
        let mut seen = Vec::new();
        while let Some(frame) = driver.receive() {
            seen.push(<[u8; 6]>::try_from(&frame[..6]).unwrap());
        }
        assert_eq!(seen, accepted, "{config:#x}");
    }
}

#[test]
fn short_frames_are_padded_and_a_stopped_card_takes_none() {
    let wire = Wire::new();
    let mut driver = Driver::new(&wire);
    wire.arrive(&frame(3, 20));
    driver.card.host_ready();
    let mut expected = frame(3, 20);
    expected.resize(60, 0);
    assert_eq!(driver.receive(), Some(expected));
    driver.put(0, command::STOP | command::ABORT_DMA);
    wire.arrive(&frame(4, 60));
    driver.card.host_ready();
    driver.put(0, RUN);
    driver.card.host_ready();
    assert_eq!(driver.receive(), None);
    assert_eq!(driver.card.counts().receive_dropped, 1);
}

#[test]
fn rings_that_are_none_lead_nowhere() {
    let wire = Wire::new();
    for (start, stop, boundary, current) in [
        (0, 0, 0, 0),
        (0x46, 0x46, 0x46, 0x46),
        (0x60, 0x46, 0x46, 0x46),
        (0x00, 0xff, 0x46, 0x46),
        (0x46, 0xff, 0x46, 0x46),
        (0x3f, 0x60, 0x46, 0x46),
        (0x46, 0x47, 0x46, 0x46),
        (0x46, 0xc0, 0xff, 0xff),
        (0x46, 0xc0, 0x00, 0x00),
    ] {
        let mut driver = Driver::new(&wire);
        driver.put(1, start);
        driver.put(2, stop);
        driver.put(3, boundary);
        driver.put(0, 0x40 | RUN);
        driver.put(7, current);
        driver.put(0, RUN);
        for number in 0..300 {
            wire.arrive(&frame(number, LONGEST));
        }
        driver.card.host_ready();
        driver.remote(0, 0xffff, command::REMOTE_READ);
        let mut all = vec![0; 0x1_0000];
        driver.card.read_items(port::DATA, 2, &mut all);
        driver.remote(0x8001, 0xffff, command::REMOTE_WRITE);
        driver.card.write_items(port::DATA, 4, &all);
        wire.frames.lock().unwrap().inward.clear();
    }
}
