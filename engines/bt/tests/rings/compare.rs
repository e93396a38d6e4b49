//! What counts as the same. All that the manuals leave open, and all in which Bochs (2.7) is known to be
//! less exact than they are, is here, but for what cases avoid from the start (`generate`, `long`,
//! `instructions`, each where it is avoided).
//!
//! - Frames that don't fit: Bochs has written the words that do when it raises #SS, #GP or #DF.
//! - Selectors that are pushed as 32 bits: Bochs writes 16 of them (SDM 2B, PUSH, allows both).
//! - Registers of a 16-bit task: Bochs sets their upper halves.
//! - Faults in a new task, whose stack isn't defined: Bochs switches to that of ring 0.
//! - VIF and VIP, and RTM's bit of DR7: Bochs's processor has them.

use crate::generate::Maker;
use crate::layout::*;
use crate::machine::Ending;

/// OF SF ZF AF PF CF, VIF and VIP.
const OPEN_FLAGS: u32 = 0x18_08d5;
/// What memory of no other use is filled with.
const FILLED: u32 = 0xcccc_cccc;
const ACCESSED: u32 = 0x20;
const DIRTY: u32 = 0x40;

/// Bytes are the same, or zeros that the other has not written.
fn zeros(a: u32, b: u32) -> bool {
    a.to_le_bytes()
        .into_iter()
        .zip(b.to_le_bytes())
        .all(|(a, b)| a == b || a == 0 && b == 0xcc)
}

fn of_page_tables(at: u32) -> bool {
    (at::TABLES..at::CODE).contains(&at)
}

/// A word of memory.
fn same_word(at: u32, a: u32, b: u32) -> bool {
    let flags = |word: u32| word & 0xffc0_802a == 2;
    a == b
        // Flags that nobody reads before they are overwritten may be anything in an image of them.
        || flags(a) && flags(b) && (a ^ b) & !OPEN_FLAGS == 0
        || zeros(a, b)
        // Pages may be accessed ahead.
        || of_page_tables(at) && (a ^ b) & !ACCESSED == 0
}

/// A word of what a handler has found.
fn same_state(at: u32, a: u32, b: u32) -> bool {
    let register = (saved::GPR..saved::ES).contains(&at);
    a == b
        || at == saved::FLAGS && same_word(at::STACK, a, b)
        || at == saved::DR7 && a ^ b == 0x800
        || register && a & 0xffff == b & 0xffff && b >> 16 == 0xffff
        // Upper halves in compatibility mode (SDM 1 3.4.1.1).
        || register && at % 8 == 4 && a == 0
}

/// Whether two ends are the same; `there` is Bochs's.
pub(crate) fn same(here: &Ending, there: &Ending) -> bool {
    let (
        Ending::Handler {
            state: a,
            changes: c,
        },
        Ending::Handler {
            state: b,
            changes: d,
        },
    ) = (here, there)
    else {
        return here == there || *there == Ending::Hang;
    };
    let vector = b[0] >> 16;
    let task = b[saved::TR as usize / 4];
    let first = u32::from(crate::sandbox::select::TSS);
    // The new task's faults find no stack that is defined.
    let lost = task != first && task != u32::from(OWN_TASK) && matches!(vector, 8 | 10..=13);
    // Nor do frame upon frame in the IDT show anything.
    let frames = d
        .iter()
        .filter(|(at, _)| (at::IDT..at::TABLES).contains(at));
    if lost || frames.count() > 8 {
        return true;
    }
    let faulted = matches!(vector, 8 | 12 | 13);
    let find = |changes: &[(u32, u32)], at: u32| {
        let found = changes.iter().find(|change| change.0 == at);
        found.map(|change| change.1)
    };
    let words = (0..).step_by(4).zip(a.iter().zip(b));
    let mut places = c.iter().chain(d).map(|&(at, _)| at);
    words.into_iter().all(|(at, (&a, &b))| same_state(at, a, b))
        && places.all(|at| match (find(c, at), find(d, at)) {
            (Some(_), Some(_)) if faulted && at < 0x10 => true,
            // Pages of the frame that didn't fit.
            (Some(a), Some(b)) if faulted && of_page_tables(at) => {
                (a ^ b) & !(ACCESSED | DIRTY) == 0
            }
            (Some(a), Some(b)) => same_word(at, a, b),
            (None, Some(_)) if faulted && !(0x10..at::STACKS).contains(&at) => true,
            (Some(a), None) if at >= at::STACKS => zeros(a, FILLED),
            _ => of_page_tables(at),
        })
}

/// A case and how it has ended, for people.
pub(crate) fn show(maker: &Maker, here: &Ending, there: &Ending) -> String {
    let mut text = format!(
        "ring {}, {} bits{}, code {:02x?}\n",
        maker.ring,
        maker.bits,
        if maker.virtual_8086 { ", VM" } else { "" },
        maker.code
    );
    for (at, bytes) in &maker.case.patches {
        text += &format!("  {at:#06x} {bytes:02x?}\n");
    }
    for (at, word) in maker.case.header.iter().enumerate() {
        if *word != 0 {
            text += &format!("  header {} {word:#x}\n", 4 * at);
        }
    }
    let (
        Ending::Handler {
            state: a,
            changes: c,
        },
        Ending::Handler {
            state: b,
            changes: d,
        },
    ) = (here, there)
    else {
        return text + &format!("  here {here:x?}\n  there {there:x?}");
    };
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        if a != b {
            text += &format!("  state {}: {a:#x} here, {b:#x} there\n", 4 * at);
        }
    }
    for (name, one, other) in [("here", c, d), ("there", d, c)] {
        let only = one.iter().filter(|change| !other.contains(change));
        text += &format!("  only {name}: {:x?}\n", only.collect::<Vec<_>>());
    }
    text
}
