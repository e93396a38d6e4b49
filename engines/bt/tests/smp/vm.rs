//! vCPUs in 64-bit ring 0, each with a program of its own.
//!
//! ```text
//! 0x0_1000  page tables: RAM as it is in 2 MiB pages, a window of 4 KiB pages at 1 GiB, device
//!           memory at 3 GiB
//! 0x8_0000  stacks, 16 KiB each, growing down
//! 0x10_0000 programs, 64 KiB each
//! 0x20_0000 free for tests
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bt::{BtVcpu, Guarantee, Options};
use engine_core::testing::assemble;
use engine_core::{CpuState, Exit, GuestRam, Segment, Vcpu};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};

const ROOT: u64 = 0x1000;
/// Page table of the window.
pub(crate) const TABLE: u64 = 0x6000;
pub(crate) const WINDOW: u64 = 1 << 30;
/// Reads and writes there leave for the test.
pub(crate) const DEVICE: u64 = 3 << 30;
/// Counts vCPUs that have begun.
const ARRIVED: u64 = 0x7000;
const STACKS: u64 = 0x8_0000;
const PROGRAMS: u64 = 0x10_0000;
/// Free for tests, up to [`END`].
pub(crate) const FREE: u64 = 0x20_0000;
pub(crate) const END: u64 = 0x80_0000;

/// Ports: the program has ended, waits for others to begin, has something for the test to do.
const EXIT: i32 = 0xf4;
const WAIT: i32 = 0xf6;
pub(crate) const CALL: u16 = 0xf5;

const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 2;
const LARGE: u64 = 1 << 7;
/// Open to ring 3.
pub(crate) const ENTRY: u64 = PRESENT | WRITABLE | 4;

/// Longer than any test takes on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) type Built = Result<(), IcedError>;
type Program = Box<dyn FnOnce(&mut CodeAssembler) -> Built>;

/// What a vCPU's test does for an exit.
pub(crate) type Answer = Box<dyn FnMut(&Called) + Send>;

/// An exit for the test.
pub(crate) enum Called {
    Port,
    Read,
    Write,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Every program came to its end.
    Done,
    /// Time ran out.
    Stuck,
}

/// A VM in the making.
pub(crate) struct Vm {
    pub(crate) ram: Arc<GuestRam>,
    programs: Vec<Program>,
    answers: Vec<Option<Answer>>,
    without: Option<Guarantee>,
    patience: Duration,
    ring: u8,
    /// Pages that devices have written are told to the vCPU whose exit it was.
    log: Option<Arc<engine_core::dma::WriteLog>>,
}

/// A VM that has run.
pub(crate) struct Ran {
    pub(crate) end: End,
    ram: Arc<GuestRam>,
}

impl Ran {
    pub(crate) fn word(&self, at: u64) -> u64 {
        assert_eq!(self.end, End::Done);
        self.ram.read_obj(GuestAddress(at)).expect("guest memory")
    }
}

impl Vm {
    pub(crate) fn new() -> Vm {
        let ram = engine_core::memory::create(END >> 20).expect("guest memory");
        let entry = |at: u64, value: u64| {
            ram.write_obj(value, GuestAddress(at))
                .expect("guest memory");
        };
        let [pdpt, low, window, devices] = [0x2000, 0x3000, 0x4000, 0x5000];
        entry(ROOT, pdpt | ENTRY);
        entry(pdpt, low | ENTRY);
        entry(pdpt + 8, window | ENTRY);
        entry(pdpt + 24, devices | ENTRY);
        for index in 0..END >> 21 {
            entry(low + 8 * index, index << 21 | LARGE | ENTRY);
        }
        entry(window, TABLE | ENTRY);
        entry(devices, DEVICE | LARGE | ENTRY);
        Vm {
            ram,
            programs: Vec::new(),
            answers: Vec::new(),
            without: None,
            patience: PATIENCE,
            ring: 0,
            log: None,
        }
    }

    /// Adds a vCPU that runs `program`.
    pub(crate) fn cpu(mut self, program: impl FnOnce(&mut CodeAssembler) -> Built + 'static) -> Vm {
        self.programs.push(Box::new(program));
        self.answers.push(None);
        self
    }

    /// What happens at exits of the vCPU added last.
    pub(crate) fn answer(mut self, answer: impl FnMut(&Called) + Send + 'static) -> Vm {
        *self.answers.last_mut().expect("a vCPU") = Some(Box::new(answer));
        self
    }

    pub(crate) fn without(mut self, guarantee: Option<Guarantee>) -> Vm {
        self.without = guarantee;
        self
    }

    /// All programs run there.
    pub(crate) fn ring(mut self, ring: u8) -> Vm {
        self.ring = ring;
        self
    }

    /// Ends earlier if nothing comes of it.
    pub(crate) fn patience(mut self, patience: Duration) -> Vm {
        self.patience = patience;
        self
    }

    pub(crate) fn log(mut self, log: &Arc<engine_core::dma::WriteLog>) -> Vm {
        self.log = Some(Arc::clone(log));
        self
    }

    /// Maps page `number` of the window.
    pub(crate) fn map(self, number: u64, entry: u64) -> Vm {
        self.put(TABLE + 8 * number, &entry.to_le_bytes())
    }

    pub(crate) fn put(self, at: u64, bytes: &[u8]) -> Vm {
        self.ram
            .write_slice(bytes, GuestAddress(at))
            .expect("guest memory");
        self
    }

    /// Loads all programs, for whoever makes his own vCPUs.
    pub(crate) fn load(mut self) -> Arc<GuestRam> {
        self.load_programs();
        self.ram
    }

    fn load_programs(&mut self) {
        let count = self.programs.len() as i32;
        for (index, program) in self.programs.drain(..).enumerate() {
            let at = program_at(index);
            let code = assemble(64, at, |asm| {
                begin_together(asm, count)?;
                program(asm)?;
                asm.out(EXIT, al)?;
                asm.hlt()
            });
            assert!(code.len() < 0x1_0000);
            self.ram
                .write_slice(&code, GuestAddress(at))
                .expect("guest memory");
        }
    }

    /// Runs all programs to their end.
    pub(crate) fn run(mut self) -> Ran {
        let count = self.programs.len() as u8;
        self.load_programs();
        let options = Options {
            code_cache: 4 << 20,
            ..Options::default()
        };
        let ram = Arc::clone(&self.ram);
        let made = match self.without {
            None => BtVcpu::several(ram, options, count),
            Some(guarantee) => BtVcpu::several_without(ram, options, count, guarantee),
        };
        let mut vcpus = made.expect("vCPUs");
        let kicks: Vec<_> = vcpus.iter().map(Vcpu::kick_handle).collect();
        let over = AtomicBool::new(false);
        let log = self.log.as_ref();
        let ends: Vec<End> = std::thread::scope(|scope| {
            let over = &over;
            let threads: Vec<_> = vcpus
                .iter_mut()
                .zip(self.answers)
                .enumerate()
                .map(|(index, (vcpu, mut answer))| {
                    vcpu.set_state(&state(index, self.ring)).expect("a state");
                    scope.spawn(move || {
                        drive(vcpu, over, log, |called| {
                            answer.as_mut().expect("an answer to exits")(called);
                        })
                    })
                })
                .collect();
            let deadline = Instant::now() + self.patience;
            while !threads.iter().all(|thread| thread.is_finished()) {
                if Instant::now() > deadline {
                    over.store(true, Ordering::SeqCst);
                    kicks.iter().for_each(|kick| kick.kick());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        let stuck = ends.contains(&End::Stuck);
        Ran {
            end: if stuck { End::Stuck } else { End::Done },
            ram: self.ram,
        }
    }
}

/// Waits until all vCPUs have come here: on a busy host the first may be done before the last begins.
fn begin_together(asm: &mut CodeAssembler, count: i32) -> Built {
    let mut again = asm.create_label();
    let mut go = asm.create_label();
    asm.lock().inc(dword_ptr(ARRIVED))?;
    asm.set_label(&mut again)?;
    asm.cmp(dword_ptr(ARRIVED), count)?;
    asm.jae(go)?;
    asm.out(WAIT, al)?;
    asm.jmp(again)?;
    asm.set_label(&mut go)?;
    asm.nop()
}

pub(crate) fn program_at(index: usize) -> u64 {
    PROGRAMS + 0x1_0000 * index as u64
}

fn drive(
    vcpu: &mut BtVcpu,
    over: &AtomicBool,
    log: Option<&Arc<engine_core::dma::WriteLog>>,
    mut answer: impl FnMut(&Called),
) -> End {
    let mut pages = Vec::new();
    loop {
        match vcpu.run().expect("it runs") {
            Exit::PioOut { port, .. } if i32::from(port) == EXIT => return End::Done,
            Exit::PioOut { port, .. } if i32::from(port) == WAIT => std::thread::yield_now(),
            Exit::PioOut { port: CALL, .. } => answer(&Called::Port),
            Exit::MmioRead { .. } => answer(&Called::Read),
            Exit::MmioWrite { .. } => answer(&Called::Write),
            Exit::Interrupted if over.load(Ordering::SeqCst) => return End::Stuck,
            Exit::Interrupted => {}
            other => panic!("{other:?}"),
        }
        if let Some(log) = log
            && log.take(&mut pages)
        {
            vcpu.memory_written(&pages);
        }
    }
}

/// 64-bit mode, at the start of its program.
pub(crate) fn state(index: usize, ring: u8) -> CpuState {
    let segment = |selector: u16, attributes: u16| {
        Segment::flat(
            selector | u16::from(ring),
            attributes | u16::from(ring) << 5,
        )
    };
    let data = segment(0x10, 0xc093);
    let mut state = CpuState {
        rip: program_at(index),
        // Ports are open to every ring.
        rflags: 0x3002,
        segments: [data, segment(8, 0xa09b), data, data, data, data],
        // PE MP ET NE WP PG; PAE OSFXSR; LME LMA.
        cr0: 0x8001_0033,
        cr3: ROOT,
        cr4: 0x220,
        efer: 0x500,
        ..CpuState::default()
    };
    state.gpr[4] = STACKS + 0x4000 * (index as u64 + 1);
    state
}

/// True if `what` comes true once: on a busy host two vCPUs may not meet at the first try.
pub(crate) fn happens(what: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(30) {
        if what() {
            return true;
        }
    }
    false
}

/// `mov eax, value; ret`, as one word.
pub(crate) fn function(value: u32) -> u64 {
    0xc3 << 40 | u64::from(value) << 8 | 0xb8
}
