//! One image, run translated and by Bochs.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use bt::{BtVcpu, Options};
use engine_core::testing::assemble;
use engine_core::{CpuState, DescriptorTable, Exit, GuestRam, Segment, Vcpu};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

use crate::case::Case;
use crate::executive::{executive, handlers};
use crate::layout::*;
use crate::sandbox::{Sandbox, descriptor, own_descriptors};

const MEMORY_MIB: u64 = 32;
/// Without a word for so long a case hangs.
const QUIET: Duration = Duration::from_secs(4);

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A handler was reached.
    Handler {
        /// What it found, by [`saved`].
        state: Vec<u32>,
        /// Words of the sandbox that have changed, by offset.
        changes: Vec<(u32, u32)>,
    },
    Shutdown,
    /// Nothing for a while.
    Hang,
}

/// Everything from [`IMAGE`] on, with cases from `first` on to be run.
pub(crate) fn image(cases: &[Case], first: usize) -> Vec<u8> {
    let parts = executive();
    let mut image = parts.code;
    let mut put = |at: u32, bytes: &[u8]| {
        let at = (at - IMAGE) as usize;
        if image.len() < at + bytes.len() {
            image.resize(at + bytes.len(), 0xcc);
        }
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(COUNT, &(cases.len() as u32).to_le_bytes());
    put(FIRST, &(first as u32).to_le_bytes());
    let pointer = |limit: u16, base: u32| {
        let mut bytes = limit.to_le_bytes().to_vec();
        bytes.extend(base.to_le_bytes());
        bytes
    };
    put(OWN_GDT, &pointer(0x3ff, OWN_GDT_TABLE));
    put(OWN_IDT, &pointer(0, 0));
    put(DIGITS, b"0123456789abcdef");
    for (selector, value) in own_descriptors() {
        put(OWN_GDT_TABLE + u32::from(selector), &value.to_le_bytes());
    }
    let mut task = [0; 0x68 / 4];
    task[0x20 / 4] = HANDLERS + 8 * HANDLER_STEP;
    task[0x24 / 4] = 2;
    task[0x38 / 4] = STACK - 0x1000;
    for segment in 0..6 {
        let own = if segment == 1 { OWN_CODE } else { OWN_DATA };
        task[0x48 / 4 + segment] = u32::from(own);
    }
    for (number, word) in (0..).zip(task) {
        put(OWN_TASK_STATE + 4 * number, &u32::to_le_bytes(word));
    }
    put(IMAGE_HANDLERS, &handlers(HANDLERS, parts.save));
    put(
        IMAGE_HANDLERS + 0x1000,
        &handlers(LONG_HANDLERS, parts.save_long),
    );
    for long in [false, true] {
        let at = TEMPLATES + u32::from(long) * SANDBOX_SIZE;
        put(at, &Sandbox::new(long).bytes);
    }
    let mut at = CASES;
    for (number, case) in cases.iter().enumerate() {
        if number == first {
            put(FIRST_RECORD, &at.to_le_bytes());
        }
        let record = case.record();
        put(at, &record);
        at += record.len() as u32;
    }
    image
}

/// Runs `cases` by `run`, which is asked again, from the next one on, if one hangs.
fn all(cases: &[Case], mut run: impl FnMut(usize) -> Vec<Ending>) -> Vec<Ending> {
    let mut endings = Vec::new();
    while endings.len() < cases.len() {
        endings.extend(run(endings.len()));
        if endings.len() < cases.len() {
            endings.push(Ending::Hang);
        }
    }
    endings
}

/// What a line says, None for others than the executive's.
fn parse(line: &str) -> Option<Ending> {
    let (_, text) = line.rsplit_once('@')?;
    let mut words = text.split_whitespace();
    match words.next()? {
        "X" => Some(Ending::Shutdown),
        "S" => {
            let words: Vec<u32> = words
                .map(|word| u32::from_str_radix(word, 16).ok())
                .collect::<Option<_>>()?;
            let (state, changes) = words.split_at_checked(SAVED_WORDS as usize)?;
            Some(Ending::Handler {
                state: state.to_vec(),
                changes: changes
                    .chunks_exact(2)
                    .map(|pair| (pair[0], pair[1]))
                    .collect(),
            })
        }
        _ => None,
    }
}

/// What the firmware leaves: 32-bit protected mode with flat segments.
fn entry() -> CpuState {
    let data = Segment::flat(OWN_DATA, 0xc093);
    let mut state = CpuState {
        rip: IMAGE.into(),
        rflags: 2,
        segments: [
            data,
            Segment::flat(OWN_CODE, 0xc09b),
            data,
            data,
            data,
            data,
        ],
        gdtr: DescriptorTable {
            base: OWN_GDT_TABLE.into(),
            limit: 0x3ff,
        },
        ldtr: Segment::no_ldt(),
        tr: Segment::tss(0, 0),
        cr0: 0x11,
        ..CpuState::default()
    };
    state.gpr[4] = STACK.into();
    state
}

struct Here {
    vcpu: BtVcpu,
    ram: Arc<GuestRam>,
}

impl Here {
    fn new() -> Here {
        let ram = engine_core::memory::create(MEMORY_MIB).expect("guest memory");
        let vcpu = BtVcpu::new(Arc::clone(&ram), Options::default()).expect("a vCPU");
        Here { vcpu, ram }
    }

    fn put(&mut self, at: u32, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(at.into()))
            .expect("guest memory");
        let pages: Vec<u64> =
            (u64::from(at) >> 12..=(u64::from(at) + bytes.len() as u64) >> 12).collect();
        self.vcpu.memory_written(&pages);
    }

    /// Runs to the end, or to a case that hangs.
    fn run(&mut self) -> Vec<Ending> {
        let mut endings = Vec::new();
        let mut line = Vec::new();
        self.vcpu.set_state(&entry()).expect("a state");
        let kick = self.vcpu.kick_handle();
        let (stop, stopped) = channel::<()>();
        let watch = std::thread::spawn(move || {
            while stopped.recv_timeout(QUIET / 2) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let mut quiet = 0;
        let mut ended = false;
        while !ended {
            match self.vcpu.run().expect("it runs") {
                Exit::PioOut {
                    port: 0xe9, data, ..
                } => {
                    quiet = 0;
                    line.push(data[0]);
                    if data[0] == b'\n' {
                        endings.extend(parse(&String::from_utf8_lossy(&line)));
                        line.clear();
                    }
                }
                Exit::PioOut { port: 0xf4, .. } => ended = true,
                Exit::PioIn { data, .. } => data.fill(0xff),
                // The firmware's end, elsewhere.
                Exit::MmioRead { addr, data, .. } => {
                    data.fill(if addr.0 >= 0xffff_fff0 { 0 } else { 0xff })
                }
                Exit::Shutdown => self.vcpu.set_state(&entry()).expect("a state"),
                Exit::Hlt => ended = true,
                Exit::Interrupted => {
                    quiet += 1;
                    ended = quiet == 2;
                }
                Exit::PioOut { .. } | Exit::MmioWrite { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        drop(stop);
        let _ = watch.join();
        endings
    }
}

/// Runs cases translated.
pub(crate) fn here(cases: &[Case]) -> Vec<Ending> {
    all(cases, |first| {
        let mut here = Here::new();
        here.put(IMAGE, &image(cases, first));
        // Where a PC has video memory and firmware, of which Bochs has nothing to say.
        here.put(0xa_0000, &[0xff; 0x6_0000]);
        here.run()
    })
}

/// Firmware with the image in front of it: copies the image to its place and goes on to the executive.
fn firmware(image: &[u8]) -> Vec<u8> {
    let mut rom = image.to_vec();
    rom.resize(rom.len().next_multiple_of(0x1_0000), 0);
    let words = rom.len() as u32 / 4;
    let from = 0u32.wrapping_sub(rom.len() as u32 + 0x1_0000);
    let mut boot = assemble(16, 0, |asm| {
        asm.cli()?;
        asm.mov(al, 0xff)?;
        asm.out(0x21, al)?;
        asm.out(0xa1, al)?;
        // lgdt cs:[0x100]
        asm.db(&[0x66, 0x2e, 0x0f, 0x01, 0x16, 0x00, 0x01])?;
        asm.mov(eax, 0x11)?;
        asm.mov(cr0, eax)?;
        asm.mov(ax, 8)?;
        asm.mov(ds, ax)?;
        asm.mov(es, ax)?;
        asm.mov(esi, from)?;
        asm.mov(edi, IMAGE)?;
        asm.mov(ecx, words)?;
        asm.cld()?;
        // rep movsd of 32-bit addresses
        asm.db(&[0x67, 0x66, 0xf3, 0xa5])?;
        let mut jump = vec![0x66, 0xea];
        jump.extend_from_slice(&IMAGE.to_le_bytes());
        jump.extend_from_slice(&0x10u16.to_le_bytes());
        asm.db(&jump)
    });
    boot.resize(0x100, 0);
    boot.extend(0x17u16.to_le_bytes());
    boot.extend(0xf_0110u32.to_le_bytes());
    boot.resize(0x118, 0);
    boot.extend(descriptor(0, 0xf_ffff, 0x93, 0xc).to_le_bytes());
    boot.extend(descriptor(0, 0xf_ffff, 0x9b, 0xc).to_le_bytes());
    boot.resize(0xfff0, 0);
    boot.extend([0xea, 0, 0, 0, 0xf0]);
    boot.resize(0x1_0000, 0);
    rom.extend(boot);
    rom
}

/// A directory of a reference's files, gone with its value.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Files {
        let thread = std::thread::current().id();
        let name = format!("trapline-rings-{name}-{}-{thread:?}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Files(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("a temporary file");
        path.to_str().expect("a path that is text").to_owned()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Reads endings until all are there, the child ends, or nothing comes for a while.
fn listen(mut child: Child, mut wanted: usize) -> Vec<Ending> {
    let output = child.stdout.take().expect("piped");
    let (send, lines): (_, Receiver<String>) = channel();
    let reader = std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output
            .read_until(b'\n', &mut line)
            .is_ok_and(|count| count > 0)
        {
            if send
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                break;
            }
            line.clear();
        }
    });
    let mut endings = Vec::new();
    while wanted > 0 {
        match lines.recv_timeout(QUIET) {
            Ok(line) => {
                if let Some(ending) = parse(&line) {
                    endings.push(ending);
                    wanted -= 1;
                }
            }
            Err(_) => break,
        }
    }
    drop(lines);
    // What was started may be a script around what runs.
    // SAFETY: a signal to a process group of ours.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
    let _ = child.wait();
    let _ = reader.join();
    endings
}

/// True if Bochs is installed.
fn installed() -> bool {
    let status = Command::new("bochs")
        .args(["--help", "cpu"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok()
}

/// Runs cases under Bochs; None where it isn't installed, or doesn't run at all.
pub(crate) fn bochs(cases: &[Case]) -> Option<Vec<Ending>> {
    if !installed() {
        return None;
    }
    let files = Files::new("bochs");
    let video = files.file("video", &[0; 0x8000]);
    let log = files.file("log", &[]);
    let mut dead = false;
    let endings = all(cases, |first| {
        if dead {
            return vec![Ending::Hang; cases.len() - first];
        }
        let rom = files.file("rom", &firmware(&image(cases, first)));
        let settings = format!(
            "display_library: term\n\
             romimage: file={rom}\n\
             vgaromimage: file={video}\n\
             megs: {MEMORY_MIB}\n\
             cpu: model=corei7_haswell_4770, count=1, ips=500000000, reset_on_triple_fault=1, ignore_bad_msrs=0\n\
             port_e9_hack: enabled=1\n\
             log: {log}\n\
             panic: action=report\n\
             error: action=ignore\n\
             info: action=ignore\n\
             debug: action=ignore\n\
             clock: sync=none\n\
             pci: enabled=0\n"
        );
        let settings = files.file("settings", settings.as_bytes());
        // A reset stops at the debugger, where Bochs was built with one.
        let orders = files.file("orders", "c\n".repeat(4000).as_bytes());
        // Whatever becomes of the test, it ends.
        let child = Command::new("timeout")
            .args([
                "-s", "KILL", "300", "bochs", "-q", "-f", &settings, "-rc", &orders,
            ])
            .env("TERM", "vt100")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("timeout of coreutils");
        let endings = listen(child, cases.len() - first);
        dead = first == 0 && endings.is_empty();
        endings
    });
    (!dead).then_some(endings)
}
