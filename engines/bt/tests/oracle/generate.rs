//! Random sequences, from seeds.

use crate::families::stack;
use crate::layout::{DATA, FX_AVX, FX_BYTES, FX_PRESENT, PAGE, Start, avx};
use crate::operands::Builder;
use crate::random::Random;
use crate::sequence::{Item, Sequence, offset};
use crate::table::Table;

/// A sequence for this seed, not yet checked for undefined flags.
pub(crate) fn sequence(table: &Table, seed: u64) -> Sequence {
    let mut random = Random::new(seed);
    let mut gpr: [u64; 16] = std::array::from_fn(|_| {
        if random.chance(55) {
            DATA + random.below(4 * PAGE)
        } else {
            random.value()
        }
    });
    gpr[4] = DATA + PAGE + 0x800;
    let rflags = random.next() & 0x8d5 | 0x202;
    let fx = fx_image(&mut random);
    let offset = offset(&mut random);
    let open_end = random.chance(2);
    let mut builder = Builder::new(&mut random, gpr);
    let length = 6 + builder.random.below(36) as usize;
    let mut joins: Vec<Join> = Vec::new();
    while builder.items.len() < length {
        refresh(&mut builder);
        if let Some(join) = unit(&mut builder, table) {
            joins.push(join);
        }
        joins.retain_mut(|join| join.passed(&mut builder));
    }
    for join in joins {
        join.land(&mut builder);
    }
    Sequence {
        items: builder.items,
        start: Start {
            fx,
            gpr,
            rflags,
            rip: 0,
        },
        offset,
        open_end,
    }
}

/// A forward branch on its way to its target.
struct Join {
    item: usize,
    units: u64,
    known: [Option<u64>; 16],
}

impl Join {
    /// One more unit lies between the branch and its target. False when it is there.
    fn passed(&mut self, builder: &mut Builder<'_>) -> bool {
        if self.units > 0 {
            self.units -= 1;
            return true;
        }
        self.land(builder);
        false
    }

    fn land(&self, builder: &mut Builder<'_>) {
        let here = builder.items.len();
        if let Item::Branch { to, .. } = &mut builder.items[self.item] {
            *to = here;
        }
        // Only what both ways agree on is known.
        for (known, before) in builder.known.iter_mut().zip(self.known) {
            if *known != before {
                *known = None;
            }
        }
    }
}

/// Loads some registers anew when few are known, and RSP before it is used.
fn refresh(builder: &mut Builder<'_>) {
    let known = builder.known.iter().flatten().count();
    if known < 7 {
        for _ in 0..2 {
            let number = loop {
                let number = builder.register();
                if number != 4 {
                    break number;
                }
            };
            let value = if builder.random.chance(60) {
                DATA + builder.random.below(4 * PAGE)
            } else {
                builder.random.value()
            };
            builder.set(number, value);
        }
    }
    if builder.known[4].is_none() && builder.random.chance(90) {
        let rsp = stack(builder);
        builder.set(4, rsp);
    }
}

/// Adds one unit; returns a forward branch that wants a target.
fn unit(builder: &mut Builder<'_>, table: &Table) -> Option<Join> {
    let form = |builder: &mut Builder<'_>, group: &[iced_x86::Code]| {
        let code = builder.random.pick(group);
        if let Some(instr) = builder.form(code) {
            builder.push(instr);
        }
    };
    match builder.random.below(1000) {
        0..250 => form(builder, &table.integer),
        250..320 if !table.late.is_empty() => form(builder, &table.late),
        250..330 => form(builder, &table.integer),
        330..335 if avx() => builder.extended_state(),
        330..490 if avx() => form(builder, &table.avx),
        330..580 => form(builder, &table.sse),
        580..610 => form(builder, &table.x87),
        610..640 => form(builder, &table.mmx),
        640..710 => {
            form(builder, &table.stack);
        }
        710..740 => builder.string(table),
        740..775 => builder.bit_string(),
        775..800 => builder.division(),
        800..830 => builder.exchange(),
        830..850 => builder.set_flags(),
        850..870 => builder.counted_loop(table),
        870..890 => builder.call(table),
        890..910 => builder.jump(),
        910..930 => builder.odd_bytes(table),
        930..932 => builder.trap(table),
        932..935 => builder.masked_move(),
        935..940 => builder.define_flags(),
        _ => {
            let item = builder.forward();
            return Some(Join {
                item,
                units: builder.random.below(4),
                known: builder.known,
            });
        }
    }
    None
}

/// FPU, SSE and AVX state in the layout of xsave64 (SDM 1 13.4).
pub(crate) fn fx_image(random: &mut Random) -> [u8; FX_BYTES] {
    let mut image = [0; FX_BYTES];
    image[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    // Which x87 registers hold something.
    image[4] = random.next() as u8;
    let mut mxcsr = 0x1f80u32;
    if random.chance(15) {
        mxcsr |= random.next() as u32 & 0xe040;
    }
    if random.chance(4) {
        mxcsr &= !(1 << (7 + random.below(6)));
    }
    image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for register in 0..8 {
        let at = 32 + 16 * register;
        image[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
        let exponent = random.pick(&[0x3fffu16, 0x4005, 0xbffe, 0xffff, 0]);
        image[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    }
    for lane in 0..64 {
        let at = 160 + 4 * lane;
        let word = match random.below(4) {
            0 => random.next() as u32,
            1 => (random.below(2000) as f32 - 1000.0).to_bits(),
            2 => random.pick(&[0, 0x8000_0000, 0x3f80_0000, 0x7f80_0000, 0x7fc0_0000, 1]),
            _ => random.value() as u32,
        };
        image[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    // Upper halves that are all zero are a state of their own.
    let mut present = 3;
    if random.chance(70) {
        present |= 4;
        for lane in 0..64 {
            let at = FX_AVX + 4 * lane;
            let word = random.next() as u32;
            image[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    image[FX_PRESENT] = present;
    image
}
