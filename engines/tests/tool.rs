//! `trapline` as a tool: probe and list, a mode that this host can't run, and a caller that does
//! not read.

mod support;

use std::ffi::CStr;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use engine_core::testing::{Guest, end};
use serde_json::Value;
use support::{Call, Ended, finish, on_every_mode};

const LONG: &str = "20";

fn trapline(args: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    command.args(args).envs(environment.iter().copied());
    command.stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::piped());
    let started = Instant::now();
    finish(command.spawn().unwrap(), started)
}

#[test]
fn probe_has_a_row_for_every_mode_the_baseline_and_the_peers() {
    let ended = trapline(&["probe", "--json"], &[]);
    ended.check(0, "");
    let rows: Vec<Value> = serde_json::from_slice(&ended.stdout).unwrap();
    let names: Vec<&str> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    let modes = engines::MODES.iter().map(|mode| mode.name);
    let expected: Vec<&str> = modes.chain(["native", "qemu-tcg", "qemu-kvm"]).collect();
    assert_eq!(names, expected);
    for row in &rows {
        // What is unavailable says why, and how to mend it.
        let available = row["available"].as_bool().unwrap();
        assert_eq!(row["reason"].is_null(), available, "{row}");
        assert_eq!(row["fix"].is_null(), available, "{row}");
    }
}

#[test]
fn probe_says_how_to_install_a_missing_peer() {
    let ended = trapline(&["probe"], &[("PATH", "/nonexistent")]);
    ended.check(0, "");
    let text = String::from_utf8(ended.stdout).unwrap();
    assert!(
        text.contains("sudo apt-get install qemu-system-x86"),
        "{text}"
    );
}

#[test]
fn list_names_every_mode_and_workload() {
    let ended = trapline(&["list"], &[]);
    ended.check(0, "");
    let text = String::from_utf8(ended.stdout).unwrap();
    let workloads = programs::CATALOGUE.iter().map(|workload| workload.name);
    for name in engines::MODES.iter().map(|mode| mode.name).chain(workloads) {
        assert!(text.contains(&format!("  {name} ")), "no {name} in {text}");
    }
}

/// Hides /dev/kvm behind /dev/null, for the calling process alone.
fn hide_kvm() -> std::io::Result<()> {
    let from: &CStr = c"/dev/null";
    let over: &CStr = c"/dev/kvm";
    // SAFETY: system calls and nothing else, as is needed between fork and exec; the strings are
    // static, and null stands for the arguments that a bind mount ignores.
    let done = unsafe {
        let namespaces = if libc::geteuid() == 0 {
            libc::CLONE_NEWNS
        } else {
            libc::CLONE_NEWNS | libc::CLONE_NEWUSER
        };
        let (none, root) = (std::ptr::null(), c"/".as_ptr());
        libc::unshare(namespaces) == 0
            && libc::mount(
                none,
                root,
                none,
                libc::MS_REC | libc::MS_PRIVATE,
                none.cast(),
            ) == 0
            && libc::mount(
                from.as_ptr(),
                over.as_ptr(),
                none,
                libc::MS_BIND,
                none.cast(),
            ) == 0
    };
    if done {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[test]
fn a_mode_that_this_host_cannot_run_is_unavailable_with_the_reason() {
    let image = Guest::protected(|asm| end(asm, 0)).elf();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut call = Call::new("hardware")
        .image(&image)
        .stats(OwnedFd::from(writer));
    if Path::new("/dev/kvm").exists() {
        // SAFETY: `hide_kvm` keeps to system calls.
        unsafe { call.command.pre_exec(hide_kvm) };
    }
    let started = Instant::now();
    call.command.stdout(std::process::Stdio::piped());
    call.command.stderr(std::process::Stdio::piped());
    let child = match call.command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("skipped: /dev/kvm can't be hidden here: {error}");
            return;
        }
    };
    finish(child, started).check(3, "mode hardware is unavailable: ");
    drop(call);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(end["outcome"], "unavailable", "{text}");
}

#[test]
fn a_caller_that_does_not_read_its_statistics_does_not_hold_up_the_end() {
    let image = Guest::protected(|asm| end(asm, 0)).elf();
    on_every_mode(|mode| {
        let (_reader, writer) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        while rustix::io::write(&writer, &[b'\n'; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).unwrap();
        let call = Call::new(mode.name)
            .image(&image)
            .args(&["--timeout", LONG]);
        let ended = call.stats(OwnedFd::from(writer)).run();
        ended.check(0, "");
        assert!(ended.elapsed < Duration::from_secs(8), "{ended:?}");
    });
}

/// Sends `input` to `trapline floor`; what it says, if this host has floors.
fn floor(input: &str) -> Option<(i32, String)> {
    if let Err(unavailable) = pv::probe() {
        eprintln!("skipped: {unavailable}");
        return None;
    }
    let started = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_trapline"))
        .arg("floor")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let ended = finish(child, started);
    let text = String::from_utf8(ended.stdout).unwrap();
    Some((ended.status.code().unwrap(), text))
}

#[test]
fn floors_answer_with_what_was_done_in_the_words_of_the_protocol() {
    for floor_known in engines::floors::FLOORS {
        let name = floor_known.name;
        let Some((code, text)) = floor(&format!("run {name} 0 1000\nrun {name} 0 7\nquit 0\n"))
        else {
            return;
        };
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let expected = ["begin", "end", "done"];
        assert_eq!(words[..3], ["ready", "1", "host"], "{name}: {text}");
        assert_eq!(words[3..6], expected, "{name}: {text}");
        assert_eq!(words[6], "00000000000003e8", "{name}: {text}");
        assert_eq!(words[8..11], expected, "{name}: {text}");
        assert_eq!(words[11], "0000000000000007", "{name}: {text}");
        assert_eq!(code, 0, "{name}");
    }
}

#[test]
fn bad_orders_to_the_floors_are_answered() {
    let input = "\nrun alu 0 1\nrun map_page 0 -1\ndance\nlist\n";
    let Some((code, text)) = floor(input) else {
        return;
    };
    let mut lines = text.lines().skip(1);
    assert_eq!(lines.next(), Some("unknown alu"));
    assert_eq!(lines.next(), Some("failed ITERATIONS is a number"));
    assert!(lines.next().unwrap().starts_with("failed no such command"));
    assert_eq!(lines.next(), Some("workload host_syscall"));
    assert_eq!(lines.last(), Some("listed"));
    // The console's end is a good end.
    assert_eq!(code, 0);
}

#[test]
fn options_of_the_translator_are_its_own() {
    let run = |mode: &str, more: &[&str]| {
        let fixed = [
            "run",
            "--mode",
            mode,
            "--workload",
            "alu",
            "--iterations",
            "1",
        ];
        trapline(&[&fixed, more].concat(), &[])
    };
    for mode in ["hardware", "para", "native"] {
        for option in [&["--code-cache", "1M"][..], &["--count-paths"]] {
            run(mode, option).check(2, "translates nothing: leave out --co");
        }
    }
    for size in ["63K", "2G", "64k", "-1"] {
        let ended = run("full", &["--code-cache", size]);
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    }
    for option in [&["--code-cache", "64K"][..], &["--count-paths"]] {
        run("full", option).check(0, "");
    }
}
