//! Builds the guest images and the native process, by calling the compiler directly.
//!
//! Cargo can't do it: an image is a bare-metal program for the host's own target, linked with its
//! own script, and the native process must contain the very object file of `programs` that the
//! image contains, so that both run the same machine code.
//!
//! The steps: `abi`, `programs` (once, for all), `guest` and the image for each flavour, then the
//! native process.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// One image for each.
const FLAVOURS: &[&str] = &["unaware", "hybrid", "aware"];

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// For every crate. The processor is the oldest with long mode, whatever the host has.
const COMMON: &[&str] = &[
    "--edition=2024",
    "--target",
    TARGET,
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Ctarget-cpu=x86-64",
    "-Cpanic=abort",
    "-Crelocation-model=static",
    "-Cdebuginfo=0",
    "-Cembed-bitcode=no",
    "-Coverflow-checks=no",
    "-Cdebug-assertions=no",
];

/// For what runs in the image. A trap in ring 0 without IST would overwrite a red zone.
const NO_REDZONE: &str = "-Cno-redzone=yes";

/// For the kernel only; see the rules at the head of `guest`. The compiler warns that
/// floats could not be passed in registers then (rust-lang/rust issue 116344): a kernel has none.
const NO_SSE: &str = "-Ctarget-feature=-sse,-sse2";

fn main() {
    let build = Build::from_environment();

    let abi = build.library("abi", "abi/src/lib.rs", &[], &[NO_REDZONE]);
    let programs = build.library(
        "programs",
        "programs/src/lib.rs",
        &[("abi", &abi)],
        &[NO_REDZONE],
    );
    for flavour in FLAVOURS {
        let guest = build.flavour(flavour, &abi, &programs);
        // Images that are entered alike are laid out alike.
        let layout = if *flavour == "aware" {
            "aware"
        } else {
            "unaware"
        };
        let script = build.workloads.join(format!("guest/image/{layout}.ld"));
        build.program(
            &format!("guest/image/{flavour}.rs"),
            &format!("{flavour}.elf"),
            &[("guest", &guest)],
            &[
                NO_REDZONE,
                NO_SSE,
                "-Clink-args=-nostartfiles -static -no-pie -Wl,--build-id=none",
                "-Clink-args=-Wl,-z,max-page-size=4096 -Wl,-z,noexecstack -Wl,--gc-sections",
                &format!("-Clink-arg=-Wl,-T,{}", script.display()),
            ],
        );
    }
    build.program(
        "images/native/main.rs",
        "native.elf",
        &[("abi", &abi), ("programs", &programs)],
        &["-Ctarget-feature=+crt-static"],
    );
}

struct Build {
    rustc: PathBuf,
    out: PathBuf,
    workloads: PathBuf,
}

impl Build {
    fn from_environment() -> Self {
        let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
        let host = variable("HOST");
        assert!(
            host.to_str() == Some(TARGET),
            "guest images are built on {TARGET}, this is {}",
            host.display()
        );
        let images = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
        let workloads = images.parent().expect("a member of the workspace").into();
        let build = Build {
            rustc: variable("RUSTC").into(),
            out: variable("OUT_DIR").into(),
            workloads,
        };
        for sources in [
            "abi/src",
            "programs/src",
            "guest/src",
            "guest/image",
            "images/native",
            "images/build.rs",
        ] {
            let path = build.workloads.join(sources);
            println!("cargo::rerun-if-changed={}", path.display());
        }
        build
    }

    /// Compiles a library; returns its path.
    fn library(
        &self,
        name: &str,
        source: &str,
        dependencies: &[(&str, &Path)],
        flags: &[&str],
    ) -> PathBuf {
        let output = self.out.join(format!("lib{name}.rlib"));
        let mut command = self.command(source, &output, dependencies, flags);
        command.args(["--crate-type=rlib", "--crate-name", name]);
        run(command, source);
        output
    }

    /// Compiles the kernel in one flavour.
    fn flavour(&self, flavour: &str, abi: &Path, programs: &Path) -> PathBuf {
        let feature = format!("--cfg=feature=\"{flavour}\"");
        let mut flags = vec![NO_REDZONE, NO_SSE, feature.as_str()];
        if *flavour != *"aware" {
            // As the features of the crate imply it.
            flags.push("--cfg=feature=\"privileged\"");
        }
        let compiled = self.library(
            "guest",
            "guest/src/lib.rs",
            &[("abi", abi), ("programs", programs)],
            &flags,
        );
        // The next flavour's has the same name.
        let own = self.out.join(format!("libguest-{flavour}.rlib"));
        std::fs::rename(&compiled, &own)
            .unwrap_or_else(|error| panic!("{}: {error}", own.display()));
        own
    }

    /// Compiles and links a program.
    fn program(&self, source: &str, output: &str, dependencies: &[(&str, &Path)], flags: &[&str]) {
        let output = self.out.join(output);
        let mut command = self.command(source, &output, dependencies, flags);
        command.args(["--crate-type=bin", "-Cstrip=debuginfo"]);
        run(command, source);
    }

    fn command(
        &self,
        source: &str,
        output: &Path,
        dependencies: &[(&str, &Path)],
        flags: &[&str],
    ) -> Command {
        let mut command = Command::new(&self.rustc);
        command
            .args(COMMON)
            .args(flags)
            // Lints are Cargo's to check; here they would only repeat themselves.
            .args(["--cap-lints=allow", "-Awarnings"])
            .arg("-o")
            .arg(output)
            .arg("-L")
            .arg(&self.out)
            // The image is the same wherever the source lies.
            .arg(format!(
                "--remap-path-prefix={}=workloads",
                self.workloads.display()
            ));
        for (name, path) in dependencies {
            command
                .arg("--extern")
                .arg(format!("{name}={}", path.display()));
        }
        command.arg(self.workloads.join(source));
        command
    }
}

/// Runs the compiler; its messages are shown when it fails.
fn run(mut command: Command, source: &str) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
    assert!(
        output.status.success(),
        "compiling {source}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
