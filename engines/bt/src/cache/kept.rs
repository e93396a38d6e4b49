//! What is kept of sites and marks: as little as can be, for there is hardly anything of which there are more.
//!
//! Places in a block are kept relative to its first byte, and guest instruction pointers relative to the block's.
//! What hardly any site has is in lists beside.
//!
//! Invariant: what is taken out is what was put in, but for the instruction pointer of a direct branch,
//! which nobody asks for.

mod link;
mod site;

pub(super) use link::{Link, NONE, Neighbour, UNLINKED};
pub(super) use site::Kept;
pub(crate) use site::KeptPort;

use super::{Block, Mode};
use crate::{
    checks::{Levels, Outside},
    cpu::Bits,
    site::{Homes, Ip, Mark},
};

/// What places and instruction pointers are relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Base {
    /// Host address of the block's first byte.
    pub code: u64,
    /// Guest instruction pointer there.
    pub ip: u64,
    /// Instruction pointers have 64 bits.
    pub long: bool,
}

impl Base {
    pub(super) fn of(block: &Block, mode: &Mode) -> Base {
        let long = mode.bits == Bits::Bits64;
        let ip = block.virt.wrapping_sub(mode.code_base.into());
        Base {
            code: block.code(),
            ip: if long { ip } else { ip & 0xffff_ffff },
            long,
        }
    }

    fn inside(self, place: u64) -> u16 {
        debug_assert!(place >= self.code && place - self.code <= u16::MAX.into());
        (place - self.code) as u16
    }

    fn place(self, inside: u16) -> u64 {
        self.code + u64::from(inside)
    }
}

/// What hardly any site has.
#[derive(Default)]
pub(super) struct Wide {
    /// Instruction pointers far from their block.
    far: Vec<u64>,
    levels: Vec<Levels>,
    outside: Vec<Outside>,
}

impl Wide {
    pub(super) fn clear(&mut self) {
        *self = Wide::default();
    }

    pub(super) fn bytes(&self) -> usize {
        8 * (self.far.capacity() + self.levels.capacity())
            + size_of::<Outside>() * self.outside.capacity()
    }

    /// `ip` relative to `base`, and whether that is a number in the list instead.
    fn keep_ip(&mut self, ip: u64, base: Base) -> (u32, bool) {
        let relative = ip.wrapping_sub(base.ip);
        if !base.long || i32::try_from(relative as i64).is_ok() {
            return (relative as u32, false);
        }
        self.far.push(ip);
        (self.far.len() as u32 - 1, true)
    }

    fn ip(&self, kept: u32, far: bool, base: Base) -> u64 {
        if far {
            self.far[kept as usize]
        } else if base.long {
            base.ip.wrapping_add(kept as i32 as i64 as u64)
        } else {
            u64::from((base.ip as u32).wrapping_add(kept))
        }
    }

    /// One more than the number of `levels`, 0 if they say nothing.
    fn keep_levels(&mut self, levels: Levels) -> u32 {
        if levels == Levels::default() {
            return 0;
        }
        if self.levels.last() != Some(&levels) {
            self.levels.push(levels);
        }
        self.levels.len() as u32
    }

    fn levels(&self, number: u32) -> Levels {
        match number.checked_sub(1) {
            Some(index) => self.levels[index as usize],
            None => Levels::default(),
        }
    }
}

const LAZY: u8 = 1;
const CARRY: u8 = 2;
const FAR: u8 = 4;

fn homes_bits(homes: Homes) -> u8 {
    (u8::from(homes.lazy) * LAZY) | (u8::from(homes.carry) * CARRY)
}

fn homes(spilled: u16, bits: u8) -> Homes {
    Homes {
        spilled,
        lazy: bits & LAZY != 0,
        carry: bits & CARRY != 0,
        rsp: 0,
    }
}

/// A mark as it is kept.
#[derive(Clone, Copy)]
pub(super) struct KeptMark {
    pub offset: u16,
    spilled: u16,
    /// In two halves, so that it may be anywhere.
    ip: [u16; 2],
    at: u8,
    bits: u8,
    rsp: i8,
}

const _: () = assert!(size_of::<KeptMark>() == 12);

/// The guest instruction pointer is `Context::target`.
const TARGET: u8 = 16;

impl KeptMark {
    pub(super) fn new(mark: &Mark, base: Base, wide: &mut Wide) -> KeptMark {
        let (ip, bits) = match mark.ip {
            Ip::At(ip) => {
                let (ip, far) = wide.keep_ip(ip, base);
                (ip, u8::from(far) * FAR)
            }
            Ip::Target => (0, TARGET),
        };
        KeptMark {
            offset: mark.offset as u16,
            spilled: mark.homes.spilled,
            ip: [ip as u16, (ip >> 16) as u16],
            at: mark.at,
            bits: bits | homes_bits(mark.homes),
            rsp: mark.homes.rsp,
        }
    }

    pub(super) fn mark(&self, base: Base, wide: &Wide) -> Mark {
        let ip = u32::from(self.ip[0]) | u32::from(self.ip[1]) << 16;
        Mark {
            offset: self.offset.into(),
            ip: if self.bits & TARGET != 0 {
                Ip::Target
            } else {
                Ip::At(wide.ip(ip, self.bits & FAR != 0, base))
            },
            homes: Homes {
                rsp: self.rsp,
                ..homes(self.spilled, self.bits)
            },
            at: self.at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fault::Fault,
        site::{Gate, Guess, Kind, Place, Port, Shared, Site, Slow},
    };

    const CODE: u64 = 0x4123_4560;

    fn slow(next_ip: Option<u64>, rsp: i32) -> Kind {
        Kind::Memory(Slow {
            size: 8,
            write: true,
            read: false,
            register: 13,
            table: 12,
            retry: Place::new(CODE),
            body: Place::new(CODE + 0x7fff),
            resume: Place::new(CODE + 0xffff),
            after: homes(0x8001, CARRY),
            stack: true,
            segment: Some(5),
            alignment: 32,
            next_ip,
            rsp,
            locked: true,
            relied: false,
            pinned: true,
        })
    }

    /// One site of each kind, at `ip`.
    fn kinds(ip: u64) -> Vec<Kind> {
        let gate = Gate {
            at: CODE + 5,
            stub: CODE + 500,
            first: u32::MAX - 1,
        };
        let missed = Outside {
            head: 1,
            sum: 1 << 63,
            tlb: u64::MAX,
        };
        let port = Port {
            number: None,
            size: 2,
            write: true,
            next: ip + 2,
            resume: CODE + 99,
        };
        let fault = Fault::selector(crate::fault::NP, 0x1234);
        vec![
            slow(None, 0x7fff_0000),
            slow(Some(ip + 15), -0x8000),
            // A call, forwards and back.
            slow(Some(ip + 0x7654_3210), -8),
            slow(Some(ip.wrapping_sub(1)), -8),
            Kind::Outside { steps: 64, missed },
            Kind::Group(Shared {
                size: 256,
                write: true,
                retry: CODE + 77,
                register: 15,
                table: 0,
                steps: 63,
            }),
            Kind::Indirect {
                rsp: -8,
                gate: None,
            },
            Kind::Indirect {
                rsp: 0x1_0006,
                gate: Some(gate),
            },
            Kind::Guess(Guess {
                made: true,
                compared: CODE + 3,
                patch: CODE + 9,
                lazy: true,
                gate: 77,
            }),
            Kind::System { index: u32::MAX },
            Kind::Port(port),
            Kind::Port(Port {
                number: Some(0xff),
                ..port
            }),
            Kind::Window,
            Kind::Fault(fault),
            Kind::Fault(Fault::ud()),
        ]
    }

    /// Blocks, and instructions near and far from them.
    fn places() -> impl Iterator<Item = (Base, u64)> {
        let long = [0, 0x1000, 0x7fff_ffff_f000, 0xffff_8000_0000_0000].map(|ip| {
            (
                ip,
                true,
                [0, 63, 0x7fff_ffff, 0x8000_0000, 1 << 40, !0, !0 << 31],
            )
        });
        let narrow = [0, 0xffff_fff0].map(|ip| {
            (
                ip,
                false,
                [0, 63, 0x7fff_ffff, 0x8000_0000, 0xffff, !0, !63],
            )
        });
        long.into_iter()
            .chain(narrow)
            .flat_map(|(ip, long, distances)| {
                let base = Base {
                    code: CODE,
                    ip,
                    long,
                };
                let at = move |distance: u64| ip.wrapping_add(distance);
                distances.map(|distance| {
                    (
                        base,
                        if long {
                            at(distance)
                        } else {
                            at(distance) & 0xffff_ffff
                        },
                    )
                })
            })
    }

    #[test]
    fn what_is_taken_out_is_what_was_put_in() {
        let mut wide = Wide::default();
        let mut met = 0;
        for (base, ip) in places() {
            for kind in kinds(ip & 0xffff_ffff_0fff_ffff) {
                let site = Site {
                    block: 123_456,
                    ip: ip & 0xffff_ffff_0fff_ffff,
                    homes: homes(0x3000, LAZY),
                    kind,
                };
                let kept = Kept::new(&site, base, &mut wide);
                let again = kept.site(base, &wide);
                assert_eq!(format!("{again:x?}"), format!("{site:x?}"), "{base:x?}");
                met += 1;
            }
            for target in [ip, base.ip] {
                let kind = Kind::Direct {
                    target,
                    patch: CODE + 1,
                    stub: CODE + 0xfff0,
                    known: Levels::default(),
                    lazy: false,
                };
                let site = Site {
                    block: 0,
                    // Not asked for.
                    ip: target,
                    homes: homes(0, 0),
                    kind,
                };
                let kept = Kept::new(&site, base, &mut wide);
                let again = kept.site(base, &wide);
                assert_eq!(format!("{again:x?}"), format!("{site:x?}"), "{base:x?}");
            }
            for ip in [Ip::At(ip), Ip::Target] {
                let mark = Mark {
                    offset: 0xfffe,
                    ip,
                    homes: homes(0x8421, LAZY | CARRY),
                    at: 63,
                };
                let kept = KeptMark::new(&mark, base, &mut wide);
                let again = kept.mark(base, &wide);
                assert_eq!(format!("{again:x?}"), format!("{mark:x?}"), "{base:x?}");
            }
        }
        assert_eq!(met, 6 * 7 * kinds(0).len());
    }
}
