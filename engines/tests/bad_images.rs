//! Images and command lines that make no sense: usage errors with one clear line, in every mode
//! and whatever this host can run.

mod support;

use engine_core::testing::{CODE, Guest, end};
use support::Call;

/// Runs the image in every mode of unaware guests, available or not, and expects a usage error.
#[track_caller]
fn refused(image: &[u8], text: &str) {
    for mode in support::unaware_modes() {
        Call::new(mode.name).image(image).run().check(2, text);
    }
}

fn good() -> Guest {
    Guest::protected(|asm| end(asm, 0))
}

/// A generator of bytes that only have to look random (xorshift64).
fn noise(mut seed: u64, count: usize) -> Vec<u8> {
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn truncated_images_are_refused_wherever_they_end() {
    let whole = Guest::long(|asm| end(asm, 0)).elf();
    let headers = 64 + 3 * 56;
    for length in [
        0,
        1,
        4,
        15,
        16,
        63,
        64,
        65,
        headers - 1,
        headers,
        headers + 8,
        whole.len() - 1,
    ] {
        refused(&whole[..length], "not a loadable ELF image");
    }
}

#[test]
fn every_prefix_of_an_image_is_an_error_and_not_a_panic() {
    let whole = good().elf();
    for length in 0..whole.len() {
        assert!(
            engine_core::loader::check(&whole[..length]).is_err(),
            "{length} bytes"
        );
    }
    assert!(engine_core::loader::check(&whole).is_ok());
}

#[test]
fn random_bytes_are_refused() {
    refused(&noise(1, 4096), "not a loadable ELF image");
}

#[test]
fn images_with_flipped_bytes_never_panic_the_loader() {
    let whole = Guest::long(|asm| end(asm, 0)).elf();
    let headers = 64 + 3 * 56 + 20;
    let ram = engine_core::memory::create(4).unwrap();
    for at in 0..headers {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut image = whole.clone();
            image[at] = value;
            // Whether it loads depends on the byte; that it returns is the point.
            let _ = engine_core::loader::load(&ram, &image, "");
        }
    }
}

#[test]
fn an_image_for_another_machine_is_refused() {
    let mut image = good().elf();
    image[18] = 0xb7; // EM_AARCH64
    refused(&image, "not an x86 image: ELF machine type is 183");
}

#[test]
fn an_image_without_a_pvh_note_is_refused() {
    let guest = Guest {
        entry: None,
        ..good()
    };
    refused(&guest.elf(), "no PVH note");
}

#[test]
fn an_image_without_segments_is_refused() {
    let guest = Guest {
        segments: Vec::new(),
        ..good()
    };
    refused(&guest.elf(), "no loadable segment");
}

#[test]
fn segments_outside_memory_are_refused() {
    for address in [16 << 20, 0x10_0000_0000, u64::MAX - 1] {
        let mut guest = good();
        guest.segments.push((address, vec![0; 64], 64));
        refused(&guest.elf(), "lies outside guest memory (16 MiB)");
    }
    let mut huge = good();
    huge.segments[0].2 = 1 << 40;
    refused(&huge.elf(), "lies outside guest memory (16 MiB)");
}

#[test]
fn a_segment_over_the_boot_information_is_refused() {
    let mut guest = good();
    guest.segments.push((0x5fff, vec![0; 2], 2));
    refused(&guest.elf(), "overlaps the boot information");
}

#[test]
fn an_entry_point_outside_the_image_is_refused() {
    let guest = Guest {
        entry: Some(CODE as u32 - 1),
        ..good()
    };
    refused(&guest.elf(), "entry point 0xfffff lies in no segment");
}

#[test]
fn files_that_are_not_there_or_not_files_are_refused() {
    for mode in engines::MODES {
        let call = Call::new(mode.name);
        let missing = call.path("missing");
        call.args(&["--image", missing.to_str().unwrap()])
            .run()
            .check(2, "No such file");
        Call::new(mode.name)
            .args(&["--image", "/"])
            .run()
            .check(2, "directory");
        Call::new(mode.name)
            .args(&["--image", "builtin:nonsense"])
            .run()
            .check(2, "no built-in image 'nonsense'");
    }
}

#[test]
fn an_unknown_workload_is_answered_with_the_known_ones() {
    for mode in engines::MODES {
        let ended = Call::new(mode.name).args(&["--workload", "nonsense"]).run();
        ended.check(2, "no workload is called 'nonsense'");
        for workload in programs::CATALOGUE {
            assert!(ended.stderr.contains(workload.name), "{}", ended.stderr);
        }
    }
    Call::new("native")
        .args(&["--workload", "nonsense"])
        .run()
        .check(2, "no workload is called 'nonsense'");
}

#[test]
fn no_memory_and_too_much_memory_are_refused() {
    for mode in engines::MODES {
        for (memory, text) in [
            ("0", "at least 1 MiB"),
            ("1099511627776", "more than this host has"),
            ("18446744073709551615", "more than this host has"),
        ] {
            Call::with_memory(mode.name, memory)
                .args(&["--workload", "empty"])
                .run()
                .check(2, text);
        }
    }
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    for mode in support::unaware_modes() {
        Call::new(mode.name)
            .image(&good().elf())
            .args(&["--cmdline", &"x".repeat(5000)])
            .run()
            .check(2, "the command line has 5000 bytes, at most 4095 fit");
    }
}

#[test]
fn stats_descriptors_that_are_not_open_are_refused() {
    for mode in engines::MODES {
        for (fd, text) in [("1", "descriptors 0 to 2"), ("977", "Bad file descriptor")] {
            Call::new(mode.name)
                .image(&good().elf())
                .args(&["--stats-fd", fd])
                .run()
                .check(2, text);
        }
    }
}

#[test]
fn options_that_clap_refuses_end_with_the_same_status() {
    for args in [
        &["--workload", "alu", "--timeout", "0"][..],
        &["--workload", "alu", "--timeout", "-1"],
        &["--workload", "alu", "--max-exits", "0"],
        &["--workload", "alu", "--image", "x"],
        &["--size", "1"],
        &[],
    ] {
        let ended = Call::new("native").args(args).run();
        assert_eq!(ended.status.code(), Some(2), "{args:?}: {ended:?}");
        assert!(ended.stderr.starts_with("error: "), "{ended:?}");
    }
    let ended = Call::new("nonsense").args(&["--workload", "alu"]).run();
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
}
