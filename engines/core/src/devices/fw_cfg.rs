//! QEMU's firmware configuration device (QEMU docs/specs/fw_cfg.rst): what a machine tells its
//! firmware or a guest without firmware, by number or by file name.
//!
//! The selector is a 16-bit port, data a stream of bytes from the next port. There is no DMA
//! interface; the feature bitmap says so.

use super::{Action, Device};
use crate::GuestPhys;

/// First port.
pub(super) const PORT: u16 = 0x510;
const SELECTOR: u64 = 0;
const DATA: u64 = 1;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const CPU_COUNT: u16 = 0x05;
const MAX_CPUS: u16 = 0x0f;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE_DATA: u16 = 0x15;
const FILE_DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Bit 14 of a selector once asked for writing.
const KEY: u16 = 0xbfff;

/// The traditional interface alone.
const FEATURES: u32 = 1;
const NAME_BYTES: usize = 56;
/// An e820 entry of usable memory.
const E820_RAM: u32 = 1;

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: Vec<(u16, Vec<u8>)>,
    /// Index of the selected item, if it exists.
    selected: Option<usize>,
    position: usize,
}

impl FwCfg {
    /// A device that tells of `cpus` processors, `memory` and `command_line`.
    pub fn new(memory: &[(GuestPhys, u64)], cpus: u8, command_line: &str) -> Self {
        let ram: u64 = memory.iter().map(|(_, size)| size).sum();
        let mut cmdline = command_line.as_bytes().to_vec();
        cmdline.push(0);
        let mut e820 = Vec::new();
        for (start, size) in memory {
            e820.extend(start.0.to_le_bytes());
            e820.extend(size.to_le_bytes());
            e820.extend(E820_RAM.to_le_bytes());
        }
        let mut items = vec![
            (SIGNATURE, b"QEMU".to_vec()),
            (ID, FEATURES.to_le_bytes().to_vec()),
            (RAM_SIZE, ram.to_le_bytes().to_vec()),
            (CPU_COUNT, u16::from(cpus).to_le_bytes().to_vec()),
            (MAX_CPUS, u16::from(cpus).to_le_bytes().to_vec()),
            (CMDLINE_SIZE, (cmdline.len() as u32).to_le_bytes().to_vec()),
            (CMDLINE_DATA, cmdline),
        ];
        let files = [("etc/e820", e820)];
        items.push((FILE_DIRECTORY, directory(&files)));
        for ((_, content), key) in files.into_iter().zip(FIRST_FILE..) {
            items.push((key, content));
        }
        FwCfg {
            items,
            selected: Some(0),
            position: 0,
        }
    }

    fn select(&mut self, key: u16) {
        let key = key & KEY;
        self.selected = self.items.iter().position(|item| item.0 == key);
        self.position = 0;
    }

    /// The next byte; zeros follow the last, and are all there is of what does not exist.
    fn next(&mut self) -> u8 {
        let content = self.selected.map(|index| &self.items[index].1);
        let byte = content.and_then(|content| content.get(self.position));
        self.position = self.position.saturating_add(1);
        byte.copied().unwrap_or(0)
    }
}

/// The file directory: big-endian, unlike the rest.
fn directory(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = (files.len() as u32).to_be_bytes().to_vec();
    for ((name, content), key) in files.iter().zip(FIRST_FILE..) {
        bytes.extend((content.len() as u32).to_be_bytes());
        bytes.extend(key.to_be_bytes());
        bytes.extend([0; 2]);
        let mut padded = [0; NAME_BYTES];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        bytes.extend(padded);
    }
    bytes
}

impl Device for FwCfg {
    fn name(&self) -> &'static str {
        "fw-cfg"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        if offset == DATA
            && let Some(byte) = data.first_mut()
        {
            *byte = self.next();
        }
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if offset == SELECTOR
            && let Some(key) = data.first_chunk()
        {
            self.select(u16::from_le_bytes(*key));
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &mut FwCfg, key: u16, length: usize) -> Vec<u8> {
        device.write(SELECTOR, &key.to_le_bytes());
        (0..length)
            .map(|_| {
                let mut data = [0xff];
                device.read(DATA, &mut data);
                data[0]
            })
            .collect()
    }

    fn device() -> FwCfg {
        let memory = [(GuestPhys(0), 3 << 30), (GuestPhys(4 << 30), 1 << 30)];
        FwCfg::new(&memory, 3, "console=ttyS0")
    }

    #[test]
    fn numbered_items_tell_of_the_machine() {
        let mut device = device();
        assert_eq!(item(&mut device, SIGNATURE, 4), b"QEMU");
        assert_eq!(item(&mut device, ID, 4), [1, 0, 0, 0]);
        assert_eq!(item(&mut device, RAM_SIZE, 8), (4u64 << 30).to_le_bytes());
        assert_eq!(item(&mut device, CPU_COUNT, 2), [3, 0]);
        assert_eq!(item(&mut device, MAX_CPUS, 2), [3, 0]);
        assert_eq!(item(&mut device, CMDLINE_SIZE, 4), [14, 0, 0, 0]);
        assert_eq!(item(&mut device, CMDLINE_DATA, 14), b"console=ttyS0\0");
        // The end, and what does not exist, are zeros.
        assert_eq!(item(&mut device, SIGNATURE, 6)[4..], [0, 0]);
        assert_eq!(item(&mut device, 0x1234, 2), [0, 0]);
    }

    #[test]
    fn files_are_found_through_the_directory() {
        let mut device = device();
        let directory = item(&mut device, FILE_DIRECTORY, 4 + 64);
        assert_eq!(directory[..4], [0, 0, 0, 1]);
        assert!(directory[12..].starts_with(b"etc/e820\0"));
        let size = u32::from_be_bytes(directory[4..8].try_into().unwrap());
        let key = u16::from_be_bytes(directory[8..10].try_into().unwrap());
        let e820 = item(&mut device, key, size as usize);
        assert_eq!(e820.len(), 40);
        assert_eq!(e820[20..28], (4u64 << 30).to_le_bytes());
        assert_eq!(e820[36..], [1, 0, 0, 0]);
    }
}
