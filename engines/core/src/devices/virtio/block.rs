//! The block device (5.2), on any [`Storage`].
//!
//! Reads and writes go straight between the file and the request's buffers. Without FLUSH accepted
//! the driver has no way to ask for durability, so each write is made durable before it is
//! acknowledged (5.2.6.2, writethrough).

use std::io;

use super::chain::length;
use super::{Broken, Chain, Ring, VirtioDevice, copy_config};
use crate::buffer::{gather, scatter, window};
use crate::storage::{SECTOR, Storage, range};

/// Device type.
pub const ID: u32 = 2;

/// VIRTIO_BLK_F_SEG_MAX.
pub const SEG_MAX: u64 = 1 << 2;
/// VIRTIO_BLK_F_RO.
pub const RO: u64 = 1 << 5;
/// VIRTIO_BLK_F_BLK_SIZE.
pub const BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub const FLUSH: u64 = 1 << 9;

/// Request types and status values (5.2.6).
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const S_OK: u8 = 0;
    pub const S_IOERR: u8 = 1;
    pub const S_UNSUPP: u8 = 2;
    /// Bytes of a request's header.
    pub const HEADER: usize = 16;
    /// Bytes of GET_ID's answer.
    pub const ID_BYTES: usize = 20;
}

const QUEUE: u16 = 256;
/// A request's buffers besides header and status, which have a descriptor each.
const SEGMENTS: u32 = QUEUE as u32 - 2;
const CONFIG_BYTES: usize = 24;

/// A disk.
pub struct Block {
    storage: Box<dyn Storage>,
    config: [u8; CONFIG_BYTES],
    writethrough: bool,
}

/// What became of a request: the bytes written into its buffers, or the status that says why not.
type Done = Result<usize, u8>;

impl Block {
    /// A disk with this content.
    pub fn new(storage: Box<dyn Storage>) -> Self {
        let mut config = [0; CONFIG_BYTES];
        config[..8].copy_from_slice(&storage.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        Block {
            storage,
            config,
            writethrough: true,
        }
    }

    fn serve(&mut self, chain: &Chain) -> Result<usize, Broken> {
        let mut header = [0; request::HEADER];
        if gather(chain.readable(), 0, &mut header) != header.len() {
            return Err(Broken::Request);
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let room = length(chain.writable())
            .checked_sub(1)
            .ok_or(Broken::Request)?;
        let done = match word(0) {
            request::IN => self.read(chain, sector, room),
            request::OUT => self.write(chain, sector),
            request::FLUSH => self.storage.flush().map(|()| 0).map_err(refused),
            request::GET_ID => {
                let mut id = [0; request::ID_BYTES];
                let text = self.storage.id().as_bytes();
                let count = text.len().min(id.len());
                id[..count].copy_from_slice(&text[..count]);
                Ok(scatter(chain.writable(), 0, &id[..room.min(id.len())]))
            }
            _ => Err(request::S_UNSUPP),
        };
        let status = done.err().unwrap_or(request::S_OK);
        scatter(chain.writable(), room, &[status]);
        // The length counts from the first writable byte without a gap (2.7.8.2): the status
        // belongs to it only if the data before it was written.
        let filled = done.unwrap_or(0);
        Ok(if filled == room { room + 1 } else { filled })
    }

    fn read(&mut self, chain: &Chain, sector: u64, room: usize) -> Done {
        let offset = self.offset(sector, room)?;
        let data = window(chain.writable(), 0, room);
        self.storage
            .read_at(offset, &data)
            .map(|()| room)
            .map_err(refused)
    }

    fn write(&mut self, chain: &Chain, sector: u64) -> Done {
        let count = length(chain.readable()) - request::HEADER;
        let offset = self.offset(sector, count)?;
        if self.storage.read_only() {
            return Err(request::S_IOERR);
        }
        let data = window(chain.readable(), request::HEADER, count);
        self.storage.write_at(offset, &data).map_err(refused)?;
        if self.writethrough {
            self.storage.flush().map_err(refused)?;
        }
        Ok(0)
    }

    /// Byte offset of a request for `count` bytes from `sector` on, if the disk has them.
    fn offset(&self, sector: u64, count: usize) -> Result<u64, u8> {
        let count = count as u64;
        if !count.is_multiple_of(SECTOR) {
            return Err(request::S_IOERR);
        }
        range(&*self.storage, sector, count / SECTOR).ok_or(request::S_IOERR)
    }
}

/// Whatever the host says, the driver knows one error.
fn refused(_: io::Error) -> u8 {
    request::S_IOERR
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn features(&self) -> u64 {
        let read_only = if self.storage.read_only() { RO } else { 0 };
        SEG_MAX | BLK_SIZE | FLUSH | read_only
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config, offset, data);
    }

    fn activate(&mut self, features: u64) {
        self.writethrough = features & FLUSH == 0;
    }

    fn reset(&mut self) {
        self.writethrough = true;
    }

    fn notified(&mut self, index: usize, rings: &mut [Ring]) -> Result<(), Broken> {
        rings[index].serve_all(|chain| self.serve(chain))
    }
}
