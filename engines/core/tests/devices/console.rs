//! The virtio console.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use engine_core::devices::virtio::Console;
use engine_core::devices::virtio::console::{RECEIVE, TRANSMIT};
use engine_core::devices::virtio::mmio::register::QUEUE_NOTIFY;
use engine_core::devices::{Action, Device};
use engine_core::host::console::{Output, Sink};
use engine_core::host::events::Events;
use engine_core::host::input::Input;

use crate::virtio::{DATA, Driver};

fn driver(input: Input) -> (Driver, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let events = Arc::new(Events::new().unwrap());
    let output = Output::new(Sink::Descriptor(writer), events);
    let console = Console::new(output, Arc::new(input), Box::new(|| ()));
    (Driver::new(Box::new(console), u64::MAX, 16), reader)
}

#[test]
fn bytes_go_out_as_they_are_notified() {
    let (mut driver, reader) = driver(Input::default());
    driver.put(DATA, b"hello, world\n");
    driver.offer_chain(TRANSMIT, 0, &[(DATA, 5, false), (DATA + 5, 8, false)]);
    driver.offer_chain(TRANSMIT, 2, &[(DATA, 2, false)]);
    driver.notify(TRANSMIT);
    assert_eq!(driver.reap(TRANSMIT), Some((0, 0)));
    assert_eq!(driver.reap(TRANSMIT), Some((2, 0)));
    let mut bytes = [0; 64];
    let count = rustix::io::read(&reader, &mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"hello, world\nhe");
}

#[test]
fn input_fills_the_buffers_that_there_are() {
    let (mut driver, _reader) = driver(Input::closed(b"0123456789"));
    driver.device.host_ready();
    for slot in 0..3 {
        let at = DATA + u64::from(slot) * 16;
        driver.offer_chain(RECEIVE, slot, &[(at, 4, true)]);
    }
    driver.notify(RECEIVE);
    let mut text = Vec::new();
    while let Some((slot, length)) = driver.reap(RECEIVE) {
        text.extend(driver.bytes(DATA + u64::from(slot) * 16, length as usize));
    }
    assert_eq!(text, b"0123456789");
}

#[test]
fn a_reader_that_is_gone_ends_the_run() {
    let (mut driver, reader) = driver(Input::default());
    drop(reader);
    driver.put(DATA, b"x");
    driver.offer_chain(TRANSMIT, 0, &[(DATA, 1, false)]);
    let action = driver.device.write(QUEUE_NOTIFY, &1u32.to_le_bytes());
    assert_eq!(action, Action::ConsoleClosed);
}
