//! Random drivers of a PC's disk and network card.

use engine_core::devices::Device;
use engine_core::devices::ata::command::code;
use engine_core::devices::ata::{Ata, register};
use engine_core::devices::ne2000::{Ne2000, command, port};
use engine_core::interrupt::Line;
use engine_core::net::DEFAULT_MAC;

use crate::backing::{Disk, Faults, Wire};
use crate::fuzz::Choices;

const SECTORS: u64 = 32;

const COMMANDS: &[u8] = &[
    code::IDENTIFY,
    code::READ_SECTORS,
    code::READ_SECTORS_EXT,
    code::READ_MULTIPLE,
    code::READ_MULTIPLE_EXT,
    code::WRITE_SECTORS,
    code::WRITE_SECTORS_EXT,
    code::WRITE_MULTIPLE,
    code::WRITE_MULTIPLE_EXT,
    code::READ_VERIFY,
    code::READ_VERIFY_EXT,
    code::SET_MULTIPLE,
    code::SET_FEATURES,
    code::FLUSH_CACHE,
    code::INITIALIZE_PARAMETERS,
    code::EXECUTE_DIAGNOSTIC,
    code::READ_NATIVE_MAX,
    code::SEEK,
];

/// Moves a random number of bytes through a data register, in either direction.
fn data(device: &mut dyn Device, offset: u64, choices: &mut Choices<'_>) {
    let size = choices.of(&[1, 2, 2, 4]);
    let count = match choices.byte() & 3 {
        0 => 1,
        1 => 512 / size,
        2 => 4096 / size,
        _ => choices.below(2000) as usize + 1,
    };
    let mut bytes = vec![choices.byte(); count * size];
    if choices.byte() & 1 == 0 {
        device.read_items(offset, size, &mut bytes);
    } else {
        device.write_items(offset, size, &bytes);
    }
}

/// An ATA disk with faults. After a reset it identifies itself.
pub(crate) fn ata(choices: &mut Choices<'_>) -> String {
    let disk = Disk::new(SECTORS);
    // A property of the disk, not an accident that happens to it.
    let read_only = choices.byte() & 7 == 0;
    disk.fail(Faults {
        read_only,
        ..Faults::default()
    });
    let mut ata = Ata::new(disk.boxed(), Line::disconnected());
    while !choices.done() {
        match choices.byte() % 8 {
            0 => {
                let (offset, value) = (choices.below(16).into(), choices.byte());
                ata.write(offset, &[value]);
            }
            1 => {
                let offset = choices.below(16).into();
                let mut bytes = vec![0xff; choices.of(&[1, 2, 4])];
                ata.read(offset, &mut bytes);
            }
            2 => disk.with(|content| {
                let which = choices.byte();
                let code = |bit: u8| (which & bit != 0).then_some(libc::EIO);
                content.faults = Faults {
                    end: (which & 1 != 0).then_some(u64::from(choices.byte()) * 256),
                    read: code(2),
                    write: code(4),
                    flush: code(8),
                    read_only,
                };
            }),
            3 | 4 => {
                let device = choices.of(&[0x40, 0x40, 0x40, 0x00, 0x0f, 0x50]);
                ata.write(register::DEVICE, &[device]);
                for _ in 0..=choices.byte() & 1 {
                    ata.write(register::SECTOR_COUNT, &[choices.byte() % 20]);
                    ata.write(register::LBA_LOW, &[choices.byte() % 36]);
                    let high = if choices.byte() & 15 == 0 {
                        choices.byte()
                    } else {
                        0
                    };
                    ata.write(register::LBA_MID, &[high]);
                    ata.write(register::LBA_HIGH, &[high]);
                }
                ata.write(register::COMMAND, &[choices.of(COMMANDS)]);
            }
            _ => data(&mut ata, register::DATA, choices),
        }
    }
    let mut state = [0; 2];
    ata.read(register::CONTROL, &mut state[..1]);
    ata.read(register::ERROR, &mut state[1..]);
    disk.fail(Faults::default());
    ata.write(register::CONTROL, &[4]);
    ata.write(register::CONTROL, &[0]);
    ata.write(register::COMMAND, &[code::IDENTIFY]);
    let mut sector = [0; 512];
    ata.read_items(register::DATA, 2, &mut sector);
    let sum = sector.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    assert_eq!((sector[0], sum), (0x40, 0));
    assert_eq!(
        disk.with(|content| content.bytes.len() as u64),
        SECTORS * 512
    );
    format!("{:02x}-{:02x}", state[0], state[1])
}

/// An NE2000 with any ring. After a reset its PROM reads as it was.
pub(crate) fn ne2000(choices: &mut Choices<'_>) -> String {
    let wire = Wire::new();
    let mut card = Ne2000::new(wire.boxed(), DEFAULT_MAC, Line::disconnected());
    while !choices.done() {
        match choices.byte() % 8 {
            0 | 1 => {
                let (offset, value) = (choices.below(16).into(), choices.byte());
                card.write(offset, &[value]);
            }
            2 => {
                let offset = choices.below(32).into();
                let mut bytes = vec![0xff; choices.of(&[1, 2, 4])];
                card.read(offset, &mut bytes);
            }
            3 => {
                // A ring, mostly a good one, and the card started.
                card.write(0, &[command::STOP | command::ABORT_DMA]);
                let start = choices.of(&[0x40, 0x46, 0x46, 0, 0xbf, 0xff]);
                let stop = choices.of(&[0x60, 0xc0, 0x80, 0xff, 0x47, 0]);
                for (at, value) in [(1, start), (2, stop), (3, start), (0xc, 0x1f), (0xe, 0x49)] {
                    card.write(at, &[value]);
                }
                card.write(0, &[0x61]);
                card.write(7, &[start]);
                card.write(0, &[0x22]);
            }
            4 => {
                let length = choices.below(1518) as usize + 1;
                for _ in 0..=choices.byte() & 7 {
                    wire.arrive(&vec![choices.byte(); length]);
                }
                card.host_ready();
            }
            5 => {
                card.write(4, &[choices.byte()]);
                card.write(5, &[choices.byte()]);
                card.write(6, &[choices.byte() & 7]);
                card.write(0, &[0x26]);
            }
            _ => {
                for at in 8..12 {
                    card.write(at, &[choices.byte()]);
                }
                card.write(0, &[choices.of(&[0x0a, 0x12])]);
                data(&mut card, port::DATA, choices);
            }
        }
    }
    let mut state = [0];
    card.write(0, &[0x22]);
    card.read(7, &mut state);
    card.read(port::RESET, &mut [0]);
    for (at, value) in [
        (0, 0x21),
        (0xe, 0x49),
        (8, 0),
        (9, 0),
        (0xa, 12),
        (0xb, 0),
        (0, 0x0a),
    ] {
        card.write(at, &[value]);
    }
    let mut prom = [0; 12];
    card.read_items(port::DATA, 2, &mut prom);
    let expected: Vec<u8> = DEFAULT_MAC.iter().flat_map(|&byte| [byte, byte]).collect();
    assert_eq!(prom[..], expected);
    format!("{:02x}", state[0])
}
