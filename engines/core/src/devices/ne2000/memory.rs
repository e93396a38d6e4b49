//! The card's memory, as the DP8390 addresses it: the PROM with the station address at 0, packet
//! memory from 16 to 48 KiB.

use crate::net::MacAddress;

/// Each byte of the PROM appears twice: it is read through a 16-bit port.
const PROM_BYTES: usize = 32;
/// First byte of packet memory.
pub(super) const PACKETS: u16 = 16 * 1024;
/// Its end.
pub(super) const END: u16 = 48 * 1024;

pub(super) struct Memory {
    prom: [u8; PROM_BYTES],
    packets: Box<[u8]>,
}

impl Memory {
    pub(super) fn new(mac: MacAddress) -> Self {
        let mut prom = [0; PROM_BYTES];
        let mut single = [0; PROM_BYTES / 2];
        single[..6].copy_from_slice(&mac);
        // "WW": a card for a 16-bit slot.
        single[14..].fill(0x57);
        for (pair, byte) in prom.chunks_exact_mut(2).zip(single) {
            pair.fill(byte);
        }
        Memory {
            prom,
            packets: vec![0; usize::from(END - PACKETS)].into_boxed_slice(),
        }
    }

    /// Up to `most` bytes that lie together from `address` on; at least one, unless there is
    /// no memory there.
    pub(super) fn read(&self, address: u16, most: usize) -> &[u8] {
        let memory = match usize::from(address) {
            at @ 0..PROM_BYTES => &self.prom[at..],
            at if (PACKETS..END).contains(&address) => &self.packets[at - usize::from(PACKETS)..],
            _ => &[],
        };
        &memory[..memory.len().min(most)]
    }

    /// As [`read`](Memory::read), of packet memory alone.
    pub(super) fn write(&mut self, address: u16, most: usize) -> &mut [u8] {
        if !(PACKETS..END).contains(&address) {
            return &mut [];
        }
        let memory = &mut self.packets[usize::from(address - PACKETS)..];
        let most = memory.len().min(most);
        &mut memory[..most]
    }

    /// Exactly `count` bytes of packet memory, if they are there.
    pub(super) fn frame(&mut self, address: u16, count: usize) -> Option<&mut [u8]> {
        let memory = self.write(address, count);
        (memory.len() == count).then_some(memory)
    }
}
