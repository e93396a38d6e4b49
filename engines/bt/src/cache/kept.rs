//! What is kept of sites and marks: as little as can be, for there is hardly anything of which there are more.
//!
//! Places in a block are kept relative to its first byte, and guest instruction pointers relative to the block's.
//! What hardly any site has is in lists beside.
//!
//! Invariant: what is taken out is what was put in, but for the instruction pointer of a direct branch,
//! which nobody asks for.

use super::{Block, Mode};
use crate::{
    checks::{Levels, Outside},
    cpu::Bits,
    fault::Fault,
    site::{Gate, Guess, Homes, Ip, Kind, Mark, Place, Port, Shared, Site, Slow},
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
        self.far.clear();
        self.levels.clear();
        self.outside.clear();
    }

    pub(super) fn bytes(&self) -> usize {
        8 * self.far.len() + 8 * self.levels.len() + size_of::<Outside>() * self.outside.len()
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
    }
}

/// Where a linked branch is among those that lead to the same block.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub previous: Neighbour,
    /// A site's number, or [`NONE`].
    pub next: u32,
}

/// No site.
pub(super) const NONE: u32 = u32::MAX;

/// Who comes before a linked branch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Neighbour(u32);

impl Neighbour {
    /// It isn't linked.
    pub(super) const NOBODY: Neighbour = Neighbour(u32::MAX);
    const BLOCK: u32 = 1 << 31;

    pub(super) fn site(number: u32) -> Neighbour {
        Neighbour(number)
    }

    /// The block that it leads to: it is the first.
    pub(super) fn block(number: u32) -> Neighbour {
        Neighbour(number | Self::BLOCK)
    }

    pub(super) fn as_site(self) -> Option<u32> {
        (self.0 & Self::BLOCK == 0).then_some(self.0)
    }

    /// A block's number, if it is one.
    pub(super) fn as_block(self) -> Option<u32> {
        (self.0 & Self::BLOCK != 0 && self != Self::NOBODY).then_some(self.0 & !Self::BLOCK)
    }
}

pub(super) const UNLINKED: Link = Link {
    previous: Neighbour::NOBODY,
    next: NONE,
};

/// A site as it is kept.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    pub block: u32,
    /// Of a direct branch, its target.
    ip: u32,
    spilled: u16,
    bits: u8,
    what: What,
}

/// [`Kind`], as it is kept.
#[derive(Clone, Copy)]
enum What {
    Memory {
        size: u16,
        retry: u16,
        body: u16,
        resume: u16,
        spilled: u16,
        bits: u16,
        registers: u8,
        alignment: u8,
        rsp: i32,
    },
    Outside {
        steps: u16,
        missed: u32,
    },
    Group {
        size: u16,
        write: bool,
        retry: u16,
        steps: u16,
        registers: u8,
    },
    Direct {
        patch: u16,
        stub: u16,
        known: u32,
        link: Link,
    },
    Indirect {
        rsp: i32,
        gated: bool,
        at: u16,
        stub: u16,
        first: u32,
    },
    Guess {
        made: bool,
        compared: u16,
        patch: u16,
        gate: u32,
        link: Link,
    },
    System {
        index: u32,
    },
    /// On its own: who answers it has no time to look at the block.
    Port {
        number: u8,
        any: bool,
        size: u8,
        write: bool,
        next: [u32; 2],
        resume: u32,
    },
    Window,
    Fault {
        vector: u8,
        error: Option<u32>,
    },
}

const _: () = assert!(size_of::<Kept>() == 32);

/// Bits of [`What::Memory`], above those of its homes: flags, the length of the instruction or 0, one more than
/// the number of the segment or 0, and whether it is a call's push. What follows a call is its target: its number
/// in the list stands for the way that RSP has to go, which is the operand's size.
mod memory {
    pub(super) const WRITE: u16 = 1 << 2;
    pub(super) const READ: u16 = 1 << 3;
    pub(super) const STACK: u16 = 1 << 4;
    pub(super) const LOCKED: u16 = 1 << 5;
    pub(super) const RELIED: u16 = 1 << 6;
    pub(super) const PINNED: u16 = 1 << 7;
    pub(super) const LENGTH: u32 = 8;
    pub(super) const SEGMENT: u32 = 12;
    pub(super) const CALL: u16 = 1 << 15;
}

/// What a branch's flags are where it leads, beside the homes of its site.
const LEFT_LAZY: u8 = 8;

impl Kept {
    /// Keeps `site`, of a block at `base`.
    pub(super) fn new(site: &Site, base: Base, wide: &mut Wide) -> Kept {
        let mut bits = homes_bits(site.homes);
        let mut ip = site.ip;
        let what = match site.kind {
            Kind::Memory(slow) => memory_of(&slow, site.ip, base, wide),
            Kind::Outside { steps, missed } => {
                wide.outside.push(missed);
                let missed = wide.outside.len() as u32 - 1;
                What::Outside { steps, missed }
            }
            Kind::Group(shared) => What::Group {
                size: shared.size,
                write: shared.write,
                retry: base.inside(shared.retry),
                steps: shared.steps,
                registers: shared.register | shared.table << 4,
            },
            Kind::Direct {
                target,
                patch,
                stub,
                known,
                lazy,
            } => {
                ip = target;
                bits |= u8::from(lazy) * LEFT_LAZY;
                What::Direct {
                    patch: base.inside(patch),
                    stub: base.inside(stub),
                    known: wide.keep_levels(known),
                    link: UNLINKED,
                }
            }
            Kind::Indirect { rsp, gate } => What::Indirect {
                rsp,
                gated: gate.is_some(),
                at: gate.map_or(0, |gate| base.inside(gate.at)),
                stub: gate.map_or(0, |gate| base.inside(gate.stub)),
                first: gate.map_or(0, |gate| gate.first),
            },
            Kind::Guess(guess) => {
                bits |= u8::from(guess.lazy) * LEFT_LAZY;
                What::Guess {
                    made: guess.made,
                    compared: base.inside(guess.compared),
                    patch: base.inside(guess.patch),
                    gate: guess.gate,
                    link: UNLINKED,
                }
            }
            Kind::System { index } => What::System { index },
            Kind::Port(port) => What::Port {
                number: port.number.unwrap_or_default(),
                any: port.number.is_none(),
                size: port.size,
                write: port.write,
                next: [port.next as u32, (port.next >> 32) as u32],
                resume: port.resume as u32,
            },
            Kind::Window => What::Window,
            Kind::Fault(fault) => {
                debug_assert_eq!(fault.address, None, "code doesn't know of a page fault");
                What::Fault {
                    vector: fault.vector,
                    error: fault.error,
                }
            }
        };
        let (ip, far) = wide.keep_ip(ip, base);
        Kept {
            block: site.block,
            ip,
            spilled: site.homes.spilled,
            bits: bits | (u8::from(far) * FAR),
            what,
        }
    }

    /// The site that was kept.
    pub(super) fn site(&self, base: Base, wide: &Wide) -> Site {
        let ip = wide.ip(self.ip, self.bits & FAR != 0, base);
        let lazy = self.bits & LEFT_LAZY != 0;
        let kind = match self.what {
            What::Memory { .. } => Kind::Memory(self.slow(ip, base, wide).expect("an access")),
            What::Outside { steps, missed } => Kind::Outside {
                steps,
                missed: wide.outside[missed as usize],
            },
            What::Group {
                size,
                write,
                retry,
                steps,
                registers,
            } => Kind::Group(Shared {
                size,
                write,
                retry: base.place(retry),
                register: registers & 15,
                table: registers >> 4,
                steps,
            }),
            What::Direct {
                patch, stub, known, ..
            } => Kind::Direct {
                target: ip,
                patch: base.place(patch),
                stub: base.place(stub),
                known: wide.levels(known),
                lazy,
            },
            What::Indirect {
                rsp,
                gated,
                at,
                stub,
                first,
            } => Kind::Indirect {
                rsp,
                gate: gated.then(|| Gate {
                    at: base.place(at),
                    stub: base.place(stub),
                    first,
                }),
            },
            What::Guess {
                made,
                compared,
                patch,
                gate,
                ..
            } => Kind::Guess(Guess {
                made,
                compared: base.place(compared),
                patch: base.place(patch),
                lazy,
                gate,
            }),
            What::System { index } => Kind::System { index },
            What::Port { .. } => Kind::Port(self.port().expect("a port").1),
            What::Window => Kind::Window,
            What::Fault { vector, error } => Kind::Fault(Fault {
                vector,
                error,
                address: None,
            }),
        };
        Site {
            block: self.block,
            ip,
            homes: homes(self.spilled, self.bits),
            kind,
        }
    }

    /// Homes and port of an `in` or `out`.
    #[inline]
    pub(super) fn port(&self) -> Option<(Homes, Port)> {
        let What::Port {
            number,
            any,
            size,
            write,
            next,
            resume,
        } = self.what
        else {
            return None;
        };
        let port = Port {
            number: (!any).then_some(number),
            size,
            write,
            next: u64::from(next[0]) | u64::from(next[1]) << 32,
            resume: resume.into(),
        };
        Some((homes(self.spilled, self.bits), port))
    }

    /// Where the body of an access begins, relative to its block.
    pub(super) fn body(&self) -> Option<u16> {
        if let What::Memory { body, .. } = self.what {
            Some(body)
        } else {
            None
        }
    }

    /// Of a branch that can be linked.
    pub(super) fn link(&mut self) -> Option<&mut Link> {
        if let What::Direct { link, .. } | What::Guess { link, .. } = &mut self.what {
            Some(link)
        } else {
            None
        }
    }

    /// Whether a guess has been made, if this is one.
    pub(super) fn made(&mut self) -> Option<&mut bool> {
        if let What::Guess { made, .. } = &mut self.what {
            Some(made)
        } else {
            None
        }
    }

    fn slow(&self, ip: u64, base: Base, wide: &Wide) -> Option<Slow> {
        let What::Memory {
            size,
            retry,
            body,
            resume,
            spilled,
            bits,
            registers,
            alignment,
            rsp,
        } = self.what
        else {
            return None;
        };
        let is = |bit: u16| bits & bit != 0;
        let length = bits >> memory::LENGTH & 15;
        let next = ip.wrapping_add(length.into());
        let next = (length != 0).then_some(if base.long { next } else { next & 0xffff_ffff });
        let (next_ip, rsp) = if is(memory::CALL) {
            (Some(wide.far[rsp as usize]), -i32::from(size))
        } else {
            (next, rsp)
        };
        Some(Slow {
            size,
            write: is(memory::WRITE),
            read: is(memory::READ),
            register: registers & 15,
            table: registers >> 4,
            retry: Place::new(base.place(retry)),
            body: Place::new(base.place(body)),
            resume: Place::new(base.place(resume)),
            after: homes(spilled, bits as u8),
            stack: is(memory::STACK),
            segment: (bits >> memory::SEGMENT & 7)
                .checked_sub(1)
                .map(|segment| segment as u8),
            alignment,
            next_ip,
            rsp,
            locked: is(memory::LOCKED),
            relied: is(memory::RELIED),
            pinned: is(memory::PINNED),
        })
    }
}

fn memory_of(slow: &Slow, ip: u64, base: Base, wide: &mut Wide) -> What {
    let flags = [
        (slow.write, memory::WRITE),
        (slow.read, memory::READ),
        (slow.stack, memory::STACK),
        (slow.locked, memory::LOCKED),
        (slow.relied, memory::RELIED),
        (slow.pinned, memory::PINNED),
    ];
    let flags = flags
        .into_iter()
        .fold(0, |bits, (is, bit)| bits | (u16::from(is) * bit));
    let ahead = |next: u64| next.wrapping_sub(ip) as u32;
    let (length, call, rsp) = match slow.next_ip {
        None => (0, 0, slow.rsp),
        Some(next) if matches!(ahead(next), 1..=15) => (ahead(next) as u16, 0, slow.rsp),
        Some(target) => {
            debug_assert_eq!(slow.rsp, -i32::from(slow.size), "a call pushes");
            wide.far.push(target);
            (0, memory::CALL, wide.far.len() as i32 - 1)
        }
    };
    let segment = slow.segment.map_or(0, |segment| u16::from(segment) + 1);
    What::Memory {
        size: slow.size,
        retry: base.inside(slow.retry.address()),
        body: base.inside(slow.body.address()),
        resume: base.inside(slow.resume.address()),
        spilled: slow.after.spilled,
        bits: u16::from(homes_bits(slow.after))
            | flags
            | length << memory::LENGTH
            | segment << memory::SEGMENT
            | call,
        registers: slow.register | slow.table << 4,
        alignment: slow.alignment,
        rsp,
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
}

const _: () = assert!(size_of::<KeptMark>() == 10);

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
            homes: homes(self.spilled, self.bits),
            at: self.at,
        }
    }
}
