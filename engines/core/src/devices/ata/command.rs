//! Commands: what each does with the registers.

use super::{Ata, Deep, Geometry, LBA, error, status};
use crate::storage::{self, SECTOR};

/// Command codes (ATA/ATAPI-6 8).
#[allow(missing_docs, reason = "the names are the standard's")]
pub mod code {
    pub const NOP: u8 = 0x00;
    pub const RECALIBRATE: u8 = 0x10;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_NATIVE_MAX_EXT: u8 = 0x27;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const READ_VERIFY: u8 = 0x40;
    pub const READ_VERIFY_EXT: u8 = 0x42;
    pub const SEEK: u8 = 0x70;
    pub const EXECUTE_DIAGNOSTIC: u8 = 0x90;
    pub const INITIALIZE_PARAMETERS: u8 = 0x91;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const SET_MULTIPLE: u8 = 0xc6;
    pub const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub const IDLE_IMMEDIATE: u8 = 0xe1;
    pub const STANDBY: u8 = 0xe2;
    pub const IDLE: u8 = 0xe3;
    pub const CHECK_POWER_MODE: u8 = 0xe5;
    pub const FLUSH_CACHE: u8 = 0xe7;
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    pub const IDENTIFY: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
    pub const READ_NATIVE_MAX: u8 = 0xf8;
}

/// Most sectors of a DRQ block; what IDENTIFY DEVICE says.
pub(super) const MOST_MULTIPLE: u8 = 16;

/// What a command that moves sectors does with them.
#[derive(Clone, Copy)]
enum Move {
    Read,
    Write,
    Verify,
}

impl Ata {
    /// Executes `command`.
    pub(super) fn command(&mut self, command: u8) {
        if self.absent() && command != code::EXECUTE_DIAGNOSTIC {
            return;
        }
        self.transfer.stop();
        self.set_interrupt(false);
        self.error = 0;
        self.status = status::DRDY | status::DSC;
        match command {
            code::IDENTIFY => {
                let sector = self.identify();
                self.start_answer(&sector);
            }
            // The second code of each asks not to retry.
            code::READ_SECTORS | 0x21 => self.sectors(Move::Read, false, 1),
            code::READ_SECTORS_EXT => self.sectors(Move::Read, true, 1),
            code::READ_MULTIPLE => self.sectors(Move::Read, false, self.multiple),
            code::READ_MULTIPLE_EXT => self.sectors(Move::Read, true, self.multiple),
            code::WRITE_SECTORS | 0x31 => self.sectors(Move::Write, false, 1),
            code::WRITE_SECTORS_EXT => self.sectors(Move::Write, true, 1),
            code::WRITE_MULTIPLE => self.sectors(Move::Write, false, self.multiple),
            code::WRITE_MULTIPLE_EXT => self.sectors(Move::Write, true, self.multiple),
            code::READ_VERIFY | 0x41 => self.sectors(Move::Verify, false, 1),
            code::READ_VERIFY_EXT => self.sectors(Move::Verify, true, 1),
            code::SEEK..=0x7f => match self.first_sector(false) {
                Some(sector) if sector < self.storage.sectors() => self.finish(),
                Some(_) | None => self.fail(error::IDNF),
            },
            code::SET_MULTIPLE => self.set_multiple(),
            code::FLUSH_CACHE | code::FLUSH_CACHE_EXT => match self.storage.flush() {
                Ok(()) => self.finish(),
                Err(_) => self.fail(error::ABRT),
            },
            code::EXECUTE_DIAGNOSTIC => {
                let control = self.control;
                self.reset();
                self.control = control;
                self.set_interrupt(true);
            }
            code::INITIALIZE_PARAMETERS => self.initialize_parameters(),
            code::SET_FEATURES => self.set_features(),
            code::CHECK_POWER_MODE => {
                // Active or idle.
                self.count.now = 0xff;
                self.finish();
            }
            code::RECALIBRATE..=0x1f
            | code::STANDBY_IMMEDIATE
            | code::IDLE_IMMEDIATE
            | code::STANDBY
            | code::IDLE => self.finish(),
            code::READ_NATIVE_MAX => self.native_max(false),
            code::READ_NATIVE_MAX_EXT => self.native_max(true),
            // NOP is defined to fail; DMA and packets are what this device does not have.
            _ => self.fail(error::ABRT),
        }
    }

    /// Ends the command with an error.
    pub(super) fn fail(&mut self, code: u8) {
        self.transfer.stop();
        self.error = code;
        self.status = status::DRDY | status::DSC | status::ERR;
        self.set_interrupt(true);
    }

    /// Ends the command with an error at `sector`.
    pub(super) fn fail_at(&mut self, sector: u64, code: u8) {
        self.set_sector(sector);
        self.fail(code);
    }

    fn sectors(&mut self, what: Move, wide: bool, block: u8) {
        if block == 0 {
            return self.fail(error::ABRT);
        }
        let count = match (wide, self.count.wide(), self.count.now) {
            (true, 0, _) => 0x1_0000,
            (true, count, _) => count,
            (false, _, 0) => 0x100,
            (false, _, count) => count.into(),
        };
        self.wide = wide;
        let Some(first) = self.first_sector(wide) else {
            return self.fail(error::IDNF);
        };
        if storage::range(&*self.storage, first, count).is_none() {
            return self.fail(error::IDNF);
        }
        match what {
            Move::Read => self.start_read(first, count, block),
            Move::Write if self.storage.read_only() => self.fail(error::ABRT),
            Move::Write => self.start_write(first, count, block),
            Move::Verify => self.verify(first, count),
        }
    }

    fn verify(&mut self, first: u64, count: u64) {
        let mut bytes = [0; SECTOR as usize];
        for sector in first..first + count {
            let part = [crate::buffer::Buffer::new(&mut bytes)];
            if self.storage.read_at(sector * SECTOR, &part).is_err() {
                return self.fail_at(sector, error::UNC);
            }
        }
        self.set_sector(first + count - 1);
        self.finish();
    }

    /// Sector that the registers name; None if they name none.
    fn first_sector(&self, wide: bool) -> Option<u64> {
        let [low, mid, high] = self.lba;
        if wide {
            let byte = |value: u8, shift: u32| u64::from(value) << shift;
            return Some(
                byte(low.now, 0)
                    | byte(mid.now, 8)
                    | byte(high.now, 16)
                    | byte(low.before, 24)
                    | byte(mid.before, 32)
                    | byte(high.before, 40),
            );
        }
        let head = u64::from(self.device & 0xf);
        let cylinder = u64::from(high.now) << 8 | u64::from(mid.now);
        if self.device & LBA != 0 {
            return Some(head << 24 | cylinder << 8 | u64::from(low.now));
        }
        let Geometry { heads, sectors, .. } = self.geometry;
        let sector = u64::from(low.now).checked_sub(1)?;
        if head >= heads.into() || sector >= sectors.into() {
            return None;
        }
        Some((cylinder * u64::from(heads) + head) * u64::from(sectors) + sector)
    }

    /// Puts `sector` into the registers, in the form of the last command.
    pub(super) fn set_sector(&mut self, sector: u64) {
        let byte = |shift: u32| (sector >> shift) as u8;
        if self.wide {
            for (index, register) in self.lba.iter_mut().enumerate() {
                *register = Deep {
                    now: byte(8 * index as u32),
                    before: byte(24 + 8 * index as u32),
                };
            }
        } else if self.device & LBA != 0 {
            for (index, register) in self.lba.iter_mut().enumerate() {
                register.now = byte(8 * index as u32);
            }
            self.device = self.device & !0xf | byte(24) & 0xf;
        } else {
            let Geometry { heads, sectors, .. } = self.geometry;
            let track = sector / u64::from(sectors);
            let cylinder = track / u64::from(heads);
            self.lba[0].now = (sector % u64::from(sectors)) as u8 + 1;
            self.lba[1].now = cylinder as u8;
            self.lba[2].now = (cylinder >> 8) as u8;
            self.device = self.device & !0xf | (track % u64::from(heads)) as u8;
        }
    }

    fn set_multiple(&mut self) {
        let wanted = self.count.now;
        if wanted != 0 && (wanted > MOST_MULTIPLE || !wanted.is_power_of_two()) {
            return self.fail(error::ABRT);
        }
        self.multiple = wanted;
        self.finish();
    }

    fn initialize_parameters(&mut self) {
        let heads = (self.device & 0xf) + 1;
        let sectors = self.count.now;
        if sectors == 0 {
            return self.fail(error::ABRT);
        }
        let track = u64::from(heads) * u64::from(sectors);
        self.geometry = Geometry {
            cylinders: (self.storage.sectors() / track).clamp(1, 65535) as u16,
            heads,
            sectors,
        };
        self.finish();
    }

    fn set_features(&mut self) {
        match self.features.now {
            0x02 => self.write_cache = true,
            0x82 => {
                // What was cached is written before the command ends (8.46.3).
                if self.storage.flush().is_err() {
                    return self.fail(error::ABRT);
                }
                self.write_cache = false;
            }
            // Transfer mode: PIO default, with or without IORDY, and modes 0 to 4.
            0x03 if matches!(self.count.now, 0 | 1 | 8..=12) => {}
            // Read look-ahead; revert to power-on defaults or not.
            0x55 | 0x66 | 0xaa | 0xcc => {}
            _ => return self.fail(error::ABRT),
        }
        self.finish();
    }

    fn native_max(&mut self, wide: bool) {
        self.wide = wide;
        let last = self.storage.sectors() - 1;
        self.device |= LBA;
        self.set_sector(if wide { last } else { last.min(0x0fff_ffff) });
        self.finish();
    }
}
