//! Running `trapline` on tiny guests, with a time limit on everything.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub(crate) mod everywhere;
pub(crate) mod interrupts;
pub(crate) mod parties;
pub(crate) mod smp;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use engines::Mode;
use tempfile::TempDir;

/// A run that takes longer than this hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How `trapline` ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    pub(crate) elapsed: Duration,
}

impl Ended {
    /// Checks the status, and that the last line on stderr is one clear line with `text` in it.
    #[track_caller]
    pub(crate) fn check(&self, status: i32, text: &str) -> &Self {
        assert_eq!(self.status.signal(), None, "ended by a signal: {self:?}");
        assert_eq!(self.status.code(), Some(status), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        let lines: Vec<&str> = self
            .stderr
            .lines()
            .filter(|line| line.starts_with("trapline: "))
            .collect();
        if text.is_empty() {
            assert_eq!(self.stderr, "", "{self:?}");
        } else {
            assert_eq!(lines.len(), 1, "{self:?}");
            assert_eq!(self.stderr.lines().last(), Some(lines[0]), "{self:?}");
            assert!(lines[0].contains(text), "no '{text}' in: {self:?}");
        }
        self
    }
}

/// The modes whose guests are unaware: they take the tiny guests of `engine_core::testing`.
#[allow(dead_code, reason = "not every test binary uses it")]
pub(crate) fn unaware_modes() -> impl Iterator<Item = &'static Mode> {
    engines::MODES
        .iter()
        .filter(|mode| matches!(mode.runs, engines::Runs::Vcpu(_)))
}

/// Calls `body` for every mode of unaware guests that this host can run; says why it leaves one out.
pub(crate) fn on_every_mode(body: impl Fn(&'static Mode)) {
    for mode in unaware_modes() {
        match (mode.probe)() {
            Ok(_) => {
                eprintln!("mode {}", mode.name);
                body(mode);
            }
            Err(unavailable) => eprintln!("skipped: mode {}: {unavailable}", mode.name),
        }
    }
}

/// A call of `trapline run`.
pub(crate) struct Call {
    pub(crate) command: Command,
    directory: TempDir,
    input: Vec<u8>,
}

impl Call {
    /// `trapline run --mode MODE --memory 16`, without input: enough for a tiny guest.
    pub(crate) fn new(mode: &str) -> Self {
        Self::with_memory(mode, "16")
    }

    /// `trapline run --mode MODE --memory MIB`, without input.
    pub(crate) fn with_memory(mode: &str, mib: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
        command.args(["run", "--mode", mode, "--memory", mib]);
        Call {
            command,
            directory: TempDir::new().unwrap(),
            input: Vec::new(),
        }
    }

    /// Runs this image.
    pub(crate) fn image(mut self, bytes: &[u8]) -> Self {
        let path = self.path("image");
        fs::write(&path, bytes).unwrap();
        self.command.arg("--image").arg(path);
        self
    }

    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn input(mut self, bytes: &[u8]) -> Self {
        self.input = bytes.to_vec();
        self
    }

    /// A file in this call's own directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Passes `fd` on as the stats descriptor.
    pub(crate) fn stats(mut self, fd: OwnedFd) -> Self {
        // Far from the numbers that the standard library uses between fork and exec.
        const NUMBER: i32 = 200;
        self.command.args(["--stats-fd", &NUMBER.to_string()]);
        // SAFETY: dup2 is a system call and nothing else, as is needed between fork and exec;
        // `fd` is owned by the closure and open.
        unsafe {
            self.command
                .pre_exec(move || match libc::dup2(fd.as_raw_fd(), NUMBER) {
                    NUMBER => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
        }
        self
    }

    /// Starts it with everything piped.
    pub(crate) fn start(&mut self) -> Child {
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs it to its end, reading all that it says.
    pub(crate) fn run(mut self) -> Ended {
        let started = Instant::now();
        let mut child = self.start();
        let mut input = child.stdin.take().unwrap();
        // A guest that ends without reading its input is fine.
        let _ = input.write_all(&self.input);
        drop(input);
        finish(child, started)
    }
}

/// Runs an image under QEMU's translator, if that is installed, with a console and an exit port as ours.
pub(crate) fn qemu(image: &[u8], args: &[&str], input: &[u8]) -> Option<Ended> {
    let directory = TempDir::new().unwrap();
    let [file, text] = ["image", "input"].map(|name| directory.path().join(name));
    fs::write(&file, image).unwrap();
    fs::write(&text, input).unwrap();
    let spawned = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "16", "-display", "none"])
        .args(["-no-reboot", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .args(args)
        .arg("-kernel")
        .arg(&file)
        .stdin(fs::File::open(&text).unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(child) = spawned else {
        eprintln!("skipped: no QEMU");
        return None;
    };
    Some(finish(child, Instant::now()))
}

/// Waits for the end, reading all that is said; kills what does not end in time.
pub(crate) fn finish(mut child: Child, started: Instant) -> Ended {
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let status = wait(&mut child, started);
    let elapsed = started.elapsed();
    let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
        reader.map_or(Vec::new(), |reader| reader.join().unwrap())
    };
    Ended {
        status,
        stdout: text(stdout),
        stderr: String::from_utf8_lossy(&text(stderr)).into_owned(),
        elapsed,
    }
}

/// Waits for the end; kills what does not end in time.
pub(crate) fn wait(child: &mut Child, started: Instant) -> ExitStatus {
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("trapline did not end within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_all(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}
