//! A site as it is kept.

use super::{Base, FAR, Link, UNLINKED, Wide, homes, homes_bits};
use crate::{
    fault::Fault,
    site::{Gate, Guess, Homes, Kind, Place, Port, Shared, Site, Slow},
};

/// A site.
#[derive(Clone, Copy)]
pub(in crate::cache) struct Kept {
    pub(in crate::cache) block: u32,
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
    Port(KeptPort),
    Window,
    Fault {
        vector: u8,
        error: Option<u32>,
    },
}

/// [`Port`], as it is kept: on its own, for who answers it has no time to look at the block.
#[derive(Clone, Copy)]
pub(crate) struct KeptPort {
    /// Nothing if it is DX's.
    number: u8,
    by_register: bool,
    pub size: u8,
    pub write: bool,
    next: [u32; 2],
    resume: u32,
}

impl KeptPort {
    fn new(port: &Port) -> KeptPort {
        KeptPort {
            number: port.number.unwrap_or_default(),
            by_register: port.number.is_none(),
            size: port.size,
            write: port.write,
            next: [port.next as u32, (port.next >> 32) as u32],
            resume: port.resume as u32,
        }
    }

    fn port(&self) -> Port {
        Port {
            number: (!self.by_register).then_some(self.number),
            size: self.size,
            write: self.write,
            next: u64::from(self.next[0]) | u64::from(self.next[1]) << 32,
            resume: self.resume(),
        }
    }

    /// The port, if DX holds `register`.
    #[inline]
    pub(crate) fn number(&self, register: u16) -> u16 {
        if self.by_register {
            register
        } else {
            self.number.into()
        }
    }

    #[inline]
    pub(crate) fn resume(&self) -> u64 {
        self.resume.into()
    }
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
    pub(in crate::cache) fn new(site: &Site, base: Base, wide: &mut Wide) -> Kept {
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
            Kind::Port(port) => What::Port(KeptPort::new(&port)),
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
    pub(in crate::cache) fn site(&self, base: Base, wide: &Wide) -> Site {
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
            What::Port(port) => Kind::Port(port.port()),
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
    pub(in crate::cache) fn port(&self) -> Option<(Homes, Port)> {
        let port = self.kept_port()?;
        Some((homes(self.spilled, self.bits), port.port()))
    }

    /// The port of an `in` or `out`, where it is: taken apart and put together it would wait for the store
    /// buffer.
    #[inline]
    pub(in crate::cache) fn kept_port(&self) -> Option<&KeptPort> {
        if let What::Port(port) = &self.what {
            Some(port)
        } else {
            None
        }
    }

    /// Where the body of an access begins, relative to its block.
    pub(in crate::cache) fn body(&self) -> Option<u16> {
        if let What::Memory { body, .. } = self.what {
            Some(body)
        } else {
            None
        }
    }

    /// Of a branch that can be linked.
    pub(in crate::cache) fn link(&mut self) -> Option<&mut Link> {
        if let What::Direct { link, .. } | What::Guess { link, .. } = &mut self.what {
            Some(link)
        } else {
            None
        }
    }

    /// Whether a guess has been made, if this is one.
    pub(in crate::cache) fn made(&mut self) -> Option<&mut bool> {
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
