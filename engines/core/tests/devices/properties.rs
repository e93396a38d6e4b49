//! Disk devices against a model: whatever an honest driver asks, in whatever layout, the disk holds
//! afterwards what a plain array would.

use engine_core::devices::Device;
use engine_core::devices::ata::command::code;
use engine_core::devices::ata::{Ata, register, status};
use engine_core::devices::ne2000::{Ne2000, command, port};
use engine_core::devices::virtio::block::{Block, request};
use engine_core::devices::virtio::net::{Net, RECEIVE};
use engine_core::interrupt::Line;
use engine_core::net::DEFAULT_MAC;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::backing::{Disk, Wire};
use crate::virtio::{DATA, Driver};

const SECTORS: u64 = 64;

/// One request: write or read, first sector, sectors.
fn requests() -> impl Strategy<Value = Vec<(bool, u64, u64)>> {
    let request = (any::<bool>(), 0..SECTORS, 1..9u64)
        .prop_map(|(write, first, count)| (write, first, count.min(SECTORS - first)));
    vec(request, 1..20)
}

/// What request `number` writes.
fn data(number: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + number * 17) as u8).collect()
}

/// Cuts `total` bytes where `cuts` say.
fn pieces(total: u32, cuts: &[u32]) -> Vec<u32> {
    let mut ends: Vec<u32> = cuts.iter().map(|cut| cut % total).chain([total]).collect();
    ends.sort_unstable();
    let mut start = 0;
    let parts = ends
        .iter()
        .map(|end| end - std::mem::replace(&mut start, *end));
    parts.collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn virtio_requests_in_any_layout_do_what_a_disk_does(
        requests in requests(),
        cuts in vec(any::<u32>(), 0..5),
        features in any::<u64>(),
        size in 4u32..8,
    ) {
        let disk = Disk::new(SECTORS);
        let mut model = disk.with(|content| content.bytes.clone());
        let mut driver = Driver::new(Box::new(Block::new(disk.boxed())), features, 1 << size);
        for (number, (write, first, count)) in requests.into_iter().enumerate() {
            let bytes = (count * 512) as usize;
            let range = (first * 512) as usize..(first * 512) as usize + bytes;
            let kind = if write { request::OUT } else { request::IN };
            let mut readable = kind.to_le_bytes().to_vec();
            readable.extend([0; 4]);
            readable.extend(first.to_le_bytes());
            if write {
                readable.extend(data(number, bytes));
            }
            driver.put(DATA, &readable);
            let answer = DATA + 0x8000;
            let room = if write { 1 } else { bytes as u32 + 1 };
            let mut parts = Vec::new();
            for (start, total, device) in [(DATA, readable.len() as u32, false), (answer, room, true)] {
                let mut at = start;
                for length in pieces(total, &cuts) {
                    parts.push((at, length, device));
                    at += u64::from(length);
                }
            }
            driver.offer_chain(0, 0, &parts);
            driver.notify(0);
            prop_assert_eq!(driver.reap(0), Some((0, room)));
            let mut seen = driver.bytes(answer, room as usize);
            prop_assert_eq!(seen.pop(), Some(request::S_OK));
            if write {
                model[range].copy_from_slice(&data(number, bytes));
            } else {
                prop_assert!(seen == model[range]);
            }
        }
        prop_assert!(disk.with(|content| content.bytes == model));
    }

    #[test]
    fn ata_commands_do_what_a_disk_does(
        requests in requests(),
        multiple in 0u32..5,
        wide in any::<bool>(),
        item in prop::sample::select(vec![2usize, 4]),
    ) {
        let disk = Disk::new(SECTORS);
        let mut model = disk.with(|content| content.bytes.clone());
        let mut ata = Ata::new(disk.boxed(), Line::disconnected());
        let put = |ata: &mut Ata, at: u64, value: u8| {
            ata.write(at, &[value]);
        };
        put(&mut ata, register::SECTOR_COUNT, 1 << multiple);
        put(&mut ata, register::COMMAND, code::SET_MULTIPLE);
        for (number, (write, first, count)) in requests.into_iter().enumerate() {
            let bytes = (count * 512) as usize;
            let range = (first * 512) as usize..(first * 512) as usize + bytes;
            let many = number % 2 == 0;
            let command = match (write, many, wide) {
                (false, false, false) => code::READ_SECTORS,
                (false, false, true) => code::READ_SECTORS_EXT,
                (false, true, false) => code::READ_MULTIPLE,
                (false, true, true) => code::READ_MULTIPLE_EXT,
                (true, false, false) => code::WRITE_SECTORS,
                (true, false, true) => code::WRITE_SECTORS_EXT,
                (true, true, false) => code::WRITE_MULTIPLE,
                (true, true, true) => code::WRITE_MULTIPLE_EXT,
            };
            for value in [0, 1] {
                // The high halves of 48-bit registers come first.
                let low = |full: u8| if value == 1 { full } else { 0 };
                put(&mut ata, register::SECTOR_COUNT, low(count as u8));
                put(&mut ata, register::LBA_LOW, low(first as u8));
                put(&mut ata, register::LBA_MID, 0);
                put(&mut ata, register::LBA_HIGH, 0);
            }
            put(&mut ata, register::DEVICE, 0x40);
            put(&mut ata, register::COMMAND, command);
            if write {
                let data = data(number, bytes);
                ata.write_items(register::DATA, item, &data);
                model[range].copy_from_slice(&data);
            } else {
                let mut seen = vec![0; bytes];
                ata.read_items(register::DATA, item, &mut seen);
                prop_assert!(seen == model[range]);
            }
            let mut state = [0];
            ata.read(register::STATUS, &mut state);
            prop_assert_eq!(state[0], status::DRDY | status::DSC);
        }
        prop_assert!(disk.with(|content| content.bytes == model));
    }

    #[test]
    fn frames_arrive_whole_and_in_order(lengths in vec(1usize..1515, 1..60), buffers in 1u16..16) {
        let frames: Vec<Vec<u8>> = (0..)
            .zip(&lengths)
            .map(|(number, &length)| data(number, length))
            .collect();
        let wire = Wire::new();
        let mut driver = Driver::new(Box::new(Net::new(wire.boxed(), DEFAULT_MAC)), u64::MAX, 16);
        let mut seen = Vec::new();
        let mut slot = 0;
        for frame in &frames {
            wire.arrive(frame);
        }
        driver.device.host_ready();
        while seen.len() < frames.len() {
            for _ in 0..buffers {
                let at = DATA + u64::from(slot % 16) * 0x800;
                driver.offer_chain(RECEIVE, slot % 16, &[(at, 1526, true)]);
                slot += 1;
            }
            driver.notify(RECEIVE);
            while let Some((slot, length)) = driver.reap(RECEIVE) {
                let at = DATA + u64::from(slot) * 0x800 + 12;
                seen.push(driver.bytes(at, length as usize - 12));
            }
        }
        prop_assert!(seen == frames);
    }

    #[test]
    fn packet_memory_holds_what_was_written_however_it_is_read(
        start in 0x40u16..0xa0,
        parts in vec(1usize..400, 1..8),
    ) {
        let mut card = Ne2000::new(Wire::new().boxed(), DEFAULT_MAC, Line::disconnected());
        let total: usize = parts.iter().map(|part| part * 2).sum();
        let bytes = data(1, total);
        let order = |card: &mut Ne2000, direction: u8| {
            for (at, value) in [
                (0, 0x22),
                (0x0e, 0x49),
                (8, 0),
                (9, start as u8),
                (0x0a, total as u8),
                (0x0b, (total >> 8) as u8),
                (0, command::START | direction),
            ] {
                card.write(at, &[value]);
            }
        };
        order(&mut card, command::REMOTE_WRITE);
        let mut rest = &bytes[..];
        for part in &parts {
            let (now, later) = rest.split_at(part * 2);
            card.write_items(port::DATA, 2, now);
            rest = later;
        }
        order(&mut card, command::REMOTE_READ);
        let mut seen = vec![0; total];
        for word in seen.chunks_mut(2) {
            card.read(port::DATA, word);
        }
        prop_assert!(seen == bytes);
    }
}
