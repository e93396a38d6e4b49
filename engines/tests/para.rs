//! The command line around the engine of processes: bad aware images, and a good one.

mod support;

use support::Call;

const PARA: &str = "para";

fn refused(image: &[u8], text: &str) {
    Call::new(PARA).image(image).run().check(2, text);
}

/// The built-in image with the word of its Trapline note at `index` replaced.
fn with_note(index: usize, value: u32) -> Vec<u8> {
    let mut image = images::aware().to_vec();
    let name = b"Trapline\0\0\0\0";
    let at = image
        .windows(name.len())
        .position(|window| window == name)
        .expect("the image has the note");
    let at = at + name.len() + 4 * index;
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    image
}

#[test]
fn images_that_no_host_can_run_are_refused_with_the_reason() {
    refused(b"", "not a loadable ELF image");
    refused(&images::aware()[..100], "not a loadable ELF image");
    refused(images::unaware(), "has no Trapline note");
    refused(&with_note(0, 77), "wants hypercall ABI version 77");
    refused(&with_note(1, 0x8000_0000), "wants features 0x80000000");
    let mut entry = images::aware().to_vec();
    entry[24..32].copy_from_slice(&0x7777_0000u64.to_le_bytes());
    refused(
        &entry,
        "entry point 0x77770000 lies in no executable segment",
    );
    Call::with_memory(PARA, "1")
        .image(images::aware())
        .run()
        .check(2, "outside guest memory (1 MiB)");
}

/// A loadable segment of the built-in image, by number, with one field replaced: offsets as in
/// Elf64_Phdr (elf(5)).
fn with_segment(number: usize, field: usize, value: u64) -> Vec<u8> {
    let mut image = images::aware().to_vec();
    let at = segment(&image, number) + field;
    image[at..at + 8].copy_from_slice(&value.to_le_bytes());
    image
}

/// Where the header of a loadable segment is.
fn segment(image: &[u8], number: usize) -> usize {
    let word = |at: usize, bytes: usize| {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&image[at..at + bytes]);
        u64::from_le_bytes(word) as usize
    };
    let (table, size, count) = (word(32, 8), word(54, 2), word(56, 2));
    let headers = (0..count).map(|index| table + index * size);
    let mut loads = headers.filter(|at| word(*at, 4) == 1);
    loads.nth(number).expect("that many segments")
}

/// Fields of Elf64_Phdr.
mod field {
    pub(super) const OFFSET: usize = 8;
    pub(super) const VIRTUAL: usize = 16;
    pub(super) const PHYSICAL: usize = 24;
    pub(super) const FILE_SIZE: usize = 32;
    pub(super) const MEMORY_SIZE: usize = 40;
}

fn value(number: usize, field: usize) -> u64 {
    let image = images::aware();
    let at = segment(image, number) + field;
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

#[test]
fn segments_that_are_truncated_overlap_or_lie_outside_are_refused() {
    let whole = images::aware();
    for length in [1, 63, 64, segment(whole, 0) + 20, whole.len() / 2] {
        refused(&whole[..length], "not a loadable ELF image");
    }
    let last = value(1, field::OFFSET) + value(1, field::FILE_SIZE) - 1;
    refused(&whole[..last as usize], "not a loadable ELF image");
    for (image, text) in [
        (
            with_segment(1, field::OFFSET, whole.len() as u64),
            "not a loadable ELF image",
        ),
        (
            with_segment(1, field::OFFSET, u64::MAX - 8),
            "not a loadable ELF image",
        ),
        (
            with_segment(1, field::MEMORY_SIZE, 1),
            "a segment is larger in the file than in memory",
        ),
        // The same addresses; the same memory at two addresses; not on pages of its own.
        (
            with_segment(1, field::VIRTUAL, value(0, field::VIRTUAL)),
            "does not lie on pages of its own",
        ),
        (
            with_segment(1, field::PHYSICAL, value(0, field::PHYSICAL)),
            "does not lie on pages of its own",
        ),
        (
            with_segment(1, field::PHYSICAL, value(1, field::PHYSICAL) + 8),
            "does not lie on pages of its own",
        ),
        (
            with_segment(1, field::MEMORY_SIZE, 1 << 50),
            "lies outside the kernel's addresses",
        ),
        (
            with_segment(0, field::VIRTUAL, 0),
            "lies outside the kernel's addresses",
        ),
        (
            with_segment(1, field::VIRTUAL, u64::MAX - 0xfff),
            "lies outside the kernel's addresses",
        ),
        (
            with_segment(1, field::PHYSICAL, 1 << 40),
            "lies outside guest memory (16 MiB)",
        ),
        (
            with_segment(1, field::PHYSICAL, u64::MAX - 0xfff),
            "lies outside guest memory (16 MiB)",
        ),
    ] {
        refused(&image, text);
    }
    let mut writable = whole.to_vec();
    // Flags: executable, writable, readable.
    writable[segment(whole, 0) + 4] = 7;
    refused(&writable, "both writable and executable");
}

#[test]
fn every_prefix_and_every_damaged_header_is_an_error_and_not_a_panic() {
    let whole = images::aware();
    for length in (0..whole.len()).step_by(997) {
        let _ = pv::check(&whole[..length]);
    }
    for at in 0..512 {
        for value in [0, 0x7f, 0xff] {
            let mut image = whole.to_vec();
            image[at] = value;
            let _ = pv::check(&image);
        }
    }
}

#[test]
fn a_workload_runs_and_ends_well() {
    Call::with_memory(PARA, "128")
        .args(&["--workload", "fib"])
        .run()
        .check(0, "");
}
