//! Builds the monitor and the stub, and the guests of the tests, by calling the compiler directly:
//! they are static programs without any library, for the host's own target.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Code is addressed relative to rip, so that it can be linked at high addresses.
const COMMON: &[&str] = &[
    "--edition=2024",
    "--target",
    TARGET,
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Ctarget-cpu=x86-64",
    "-Cpanic=abort",
    "-Crelocation-model=pic",
    "-Cdebuginfo=0",
    "-Cembed-bitcode=no",
    "-Coverflow-checks=no",
    "-Cdebug-assertions=no",
    "-Cno-redzone=yes",
    "--cap-lints=allow",
    "-Awarnings",
];

/// (source, linker script) of each program.
const PROGRAMS: &[(&str, &str)] = &[
    ("monitor/main.rs", "monitor/monitor.ld"),
    ("stub/main.rs", "stub/stub.ld"),
    ("guest/main.rs", "guest/guest.ld"),
];

fn main() {
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let host = variable("HOST");
    assert!(
        host.to_str() == Some(TARGET),
        "the pv engine is built on {TARGET}, this is {}",
        host.display()
    );
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = here.ancestors().nth(2).expect("a member of the workspace");
    let out = PathBuf::from(variable("OUT_DIR"));
    let rustc = PathBuf::from(variable("RUSTC"));
    let mem = workspace.join("workloads/guest/image/mem.s");
    let abi = workspace.join("workloads/abi/src");
    for path in [
        here.join("build.rs"),
        here.join("monitor"),
        here.join("stub"),
        here.join("guest"),
        here.join("src/wire.rs"),
        abi.clone(),
        mem,
    ] {
        println!("cargo::rerun-if-changed={}", path.display());
    }

    let remap = format!("--remap-path-prefix={}=.", workspace.display());
    let library = out.join("libabi.rlib");
    let mut command = Command::new(&rustc);
    command
        .args(COMMON)
        .args(["--crate-type=rlib", "--crate-name=abi", &remap, "-o"])
        .arg(&library)
        .arg(abi.join("lib.rs"));
    run(command);

    for (source, script) in PROGRAMS {
        let name = Path::new(source).parent().expect("has a directory");
        let mut command = Command::new(&rustc);
        command
            .args(COMMON)
            .args(["--crate-type=bin", "-Cstrip=debuginfo", &remap])
            .arg("--extern")
            .arg(format!("abi={}", library.display()))
            .arg("-Clink-args=-nostartfiles -nostdlib -static -no-pie -Wl,--build-id=none")
            .arg("-Clink-args=-Wl,-z,max-page-size=4096 -Wl,-z,noexecstack -Wl,--gc-sections")
            .arg(format!("-Clink-arg=-Wl,-T,{}", here.join(script).display()))
            .arg("-o")
            .arg(out.join(name).with_extension("elf"))
            .arg(here.join(source));
        run(command);
    }
}

/// Runs the compiler; its messages are shown when it fails.
fn run(mut command: Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
