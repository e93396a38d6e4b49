//! A guest as a child process, driven over its console as a harness drives it.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

/// For everything that a guest is waited for. Far more than it takes on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A running guest and its console. Killed when dropped.
pub(crate) struct Guest {
    child: Child,
    pub(crate) input: Option<ChildStdin>,
    pub(crate) lines: Receiver<String>,
    /// What the last run said besides its last line and the window's words.
    pub(crate) said: Vec<String>,
}

impl Guest {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Guest {
            input: child.stdin.take(),
            child,
            lines,
            said: Vec::new(),
        }
    }

    #[track_caller]
    pub(crate) fn line(&self) -> String {
        self.lines
            .recv_timeout(LIMIT)
            .expect("the guest says nothing")
    }

    pub(crate) fn send(&mut self, line: &str) {
        let input = self.input.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
        input.flush().unwrap();
    }

    #[track_caller]
    pub(crate) fn check(&mut self, command: &str, answer: &[&str]) {
        self.send(command);
        for expected in answer {
            assert_eq!(self.line(), *expected, "answer to {command}");
        }
    }

    /// Runs a workload; returns its last line without the cycles.
    pub(crate) fn run(&mut self, name: &str, size: u64, iterations: u64) -> String {
        self.said.clear();
        self.send(&format!("run {name} {size} {iterations}"));
        loop {
            let line = self.line();
            if line == "begin" || line == "end" {
                continue;
            }
            let data = line.as_bytes().first() == Some(&abi::DATA);
            if data || line.starts_with("latency ") || line.starts_with("bucket ") {
                self.said.push(line);
                continue;
            }
            return match line.strip_prefix("done ") {
                Some(result) => {
                    let (sum, cycles) = result.split_once(' ').unwrap();
                    assert!(cycles.parse::<u64>().is_ok(), "{line}");
                    format!("done {sum}")
                }
                None => line,
            };
        }
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "the guest does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file of this name with these bytes, for programs that want a path.
pub(crate) fn file(name: &str, bytes: &[u8]) -> PathBuf {
    // Tests run in parallel: each thread writes its own.
    let name = format!("{name}-{:?}", thread::current().id());
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    // One that runs can't be written.
    if fs::read(&path).is_ok_and(|old| old == bytes) {
        return path;
    }
    let _ = fs::remove_file(&path);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The image under QEMU's translator; `None`, with a word about it, where QEMU is not installed.
pub(crate) fn qemu(memory_mib: u32, command_line: &str) -> Option<Guest> {
    qemu_with(memory_mib, command_line, &[])
}

/// As [`qemu`], with more options.
pub(crate) fn qemu_with(memory_mib: u32, command_line: &str, options: &[&str]) -> Option<Guest> {
    let options: Vec<&str> = ["-serial", "stdio"]
        .iter()
        .chain(options)
        .copied()
        .collect();
    qemu_image(
        ("unaware.elf", images::unaware()),
        memory_mib,
        command_line,
        &options,
    )
}

/// An image under QEMU's translator, with no device but what the options say.
pub(crate) fn qemu_image(
    image: (&str, &[u8]),
    memory_mib: u32,
    command_line: &str,
    options: &[&str],
) -> Option<Guest> {
    const QEMU: &str = "qemu-system-x86_64";
    if Command::new(QEMU).arg("--version").output().is_err() {
        eprintln!("skipped: {QEMU} is not installed");
        return None;
    }
    let mut command = Command::new(QEMU);
    command
        .args("-accel tcg -display none -nodefaults -no-reboot".split(' '))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .args(["-m", &memory_mib.to_string(), "-append", command_line])
        .args(options)
        .arg("-kernel")
        .arg(file(image.0, image.1));
    Some(Guest::start(&mut command))
}

/// The machine that a hybrid image expects, of QEMU's: virtio-mmio, and a PC's timers and UART. The
/// console is the virtio one.
pub(crate) const MICROVM: &[&str] = &[
    "-M",
    "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off",
    "-global",
    "virtio-mmio.force-legacy=false",
    // A UART that nobody hears: its scratch register is the ports' workloads'.
    "-serial",
    "null",
    "-chardev",
    "stdio,id=console",
    "-device",
    "virtio-serial-device",
    "-device",
    "virtconsole,chardev=console",
];

/// What isa-debug-exit makes of a code.
pub(crate) fn qemu_status(code: i32) -> Option<i32> {
    Some(code << 1 | 1)
}

pub(crate) fn native<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Guest {
    let program = file("native.elf", images::native());
    Guest::start(Command::new(program).args(arguments))
}
