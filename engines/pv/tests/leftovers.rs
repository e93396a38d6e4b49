//! A guest's end takes everything with it: no process, descriptor or mapping stays in the VMM, however
//! the guest ended or failed to start. One test alone in its program: it looks at the whole process.

mod support;

use std::collections::BTreeSet;

use pv::{Guest, Options};
use support::{finish, start};

/// Open descriptors, memory files that are mapped, and children.
fn holdings() -> BTreeSet<String> {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let descriptors = descriptors.filter_map(|entry| {
        let path = entry.unwrap().path();
        // The directory that is being read is gone by then.
        let target = std::fs::read_link(&path).ok()?;
        let own = target.to_str()?.ends_with("/fd");
        (!own).then(|| format!("{} -> {}", path.display(), target.display()))
    });
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps.lines().filter(|line| line.contains("memfd:"));
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap();
    descriptors
        .chain(maps.map(str::to_owned))
        .chain(
            children
                .split_whitespace()
                .map(|pid| format!("child {pid}")),
        )
        .collect()
}

#[test]
fn nothing_is_left_however_a_guest_ends() {
    let before = holdings();
    #[track_caller]
    fn check(what: &str, before: &BTreeSet<String>) {
        let after = holdings();
        let left: Vec<&String> = after.difference(before).collect();
        assert!(left.is_empty(), "{what}: {left:?}");
    }
    for (scenario, timeout, exits) in [
        ("hello", None, None),
        ("exit-code", None, None),
        ("crash", None, None),
        ("spaces", None, None),
        ("spin-kernel", Some(0.2), None),
        ("spin-user", Some(0.2), None),
        ("flood-syscalls", None, Some(1000)),
        ("flood-spaces", None, Some(100)),
        ("attack-kernel-ring", Some(3.0), None),
        ("attack-blocked", Some(3.0), None),
    ] {
        finish(start(scenario, None, &[]), timeout, exits);
        check(scenario, &before);
    }
    drop(start("spin-user", None, &[]));
    check("a guest that never ran", &before);
    let long = "x".repeat(1 << 20);
    for (image, mib, command_line) in [
        (&b"nonsense"[..], 64, ""),
        (pv::TEST_GUEST, 0, ""),
        (pv::TEST_GUEST, 1, ""),
        (pv::TEST_GUEST, 1 << 40, ""),
        (pv::TEST_GUEST, 64, &long),
    ] {
        let refused = Guest::start(image, mib, command_line, Options::default());
        refused.expect_err("bad input");
        check("a guest that could not start", &before);
    }
}
