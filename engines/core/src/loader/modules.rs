//! Modules: files that a kernel finds in memory beside itself, each on pages of its own, in their order.
//!
//! Above the image come the list that tells the kernel of them, what it is told of each, and the modules.

use std::ops::Range;

use super::{LoadError, image};
use crate::GuestRam;

/// A file for the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// What the kernel is told of it: by custom its name and arguments.
    pub text: &'a str,
    /// Its content.
    pub content: &'a [u8],
}

/// A module in memory, as its entry of the list says it.
pub(super) struct Placed {
    pub(super) start: u64,
    pub(super) bytes: u64,
    /// Where its text is, which ends with a zero byte.
    pub(super) text: u64,
}

/// Puts modules behind `end` and outside `taken`; answers with where the list of them is, if there are any.
/// An entry of the list is what `entry` makes of a module.
pub(super) fn place<const ENTRY: usize>(
    ram: &GuestRam,
    end: u64,
    modules: &[Module<'_>],
    taken: &Range<u64>,
    entry: impl Fn(&Placed) -> [u8; ENTRY],
) -> Result<Option<u64>, LoadError> {
    if modules.is_empty() {
        return Ok(None);
    }
    let first = page(end.max(taken.end))?;
    let mut text = first + (ENTRY * modules.len()) as u64;
    let texts: Vec<u8> = modules
        .iter()
        .flat_map(|module| module.text.bytes().chain([0]))
        .collect();
    let mut at = text + texts.len() as u64;
    let mut list = Vec::new();
    for module in modules {
        if module.text.contains('\0') {
            return Err(LoadError::ModuleText);
        }
        at = page(at)?;
        let placed = Placed {
            start: at,
            bytes: module.content.len() as u64,
            text,
        };
        image::check_range(ram, at, placed.bytes, taken)?;
        image::write(ram, at, module.content, placed.bytes)?;
        list.extend(entry(&placed));
        text += module.text.len() as u64 + 1;
        at += placed.bytes;
    }
    list.extend(texts);
    image::check_range(ram, first, list.len() as u64, taken)?;
    image::write(ram, first, &list, list.len() as u64)?;
    Ok(Some(first))
}

/// The first page from `at` on.
fn page(at: u64) -> Result<u64, LoadError> {
    at.checked_next_multiple_of(4096).ok_or(LoadError::NoRoom)
}
