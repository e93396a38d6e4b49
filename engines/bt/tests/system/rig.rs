//! A bare CPU on hand-made tables, without a guest around it: a test sets registers and memory, runs a
//! few instructions, and looks at the state that they leave.
//!
//! Every vector's handler is a `hlt`, so an exception ends a run like the code's own `hlt`, and shows
//! in RIP. Memory is mapped one to one in 2 MiB pages, for ring 0 alone but where a test says more.
//!
//! ```text
//! 0x0000  vectors of real mode   0x6000  TSS        0x1_0000  code
//! 0x1000  GDT                    0x7000  handlers   0x3_0000  stack, growing down
//! 0x2000  IDT                    0x8000  LDT        0x4_0000  free for tests
//! 0x3000  page tables            0x9000  TSS 2
//! ```

use std::sync::Arc;

use bt::{BtVcpu, Options};
use engine_core::testing::assemble;
use engine_core::{
    After, CpuState, DescriptorTable, DeviceBus, Exit, GuestPhys, GuestRam, Segment, Vcpu,
};
use vm_memory::{Bytes, GuestAddress};

use crate::kernel::{Asm, Built};

pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TABLES: u64 = 0x3000;
pub(crate) const TSS: u64 = 0x6000;
pub(crate) const HANDLERS: u64 = 0x7000;
pub(crate) const LDT: u64 = 0x8000;
pub(crate) const TSS_2: u64 = 0x9000;
pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const STACK: u64 = 0x3_0000;
/// Stack of ring 0 in the TSS.
pub(crate) const RSP0: u64 = 0x3_8000;
pub(crate) const FREE: u64 = 0x4_0000;
/// Where there is no RAM.
pub(crate) const DEVICE: u64 = 0x3000_0000;

/// Selectors of the first descriptors.
pub(crate) const CS_32: u16 = 0x08;
pub(crate) const DATA: u16 = 0x10;
pub(crate) const CS_64: u16 = 0x18;
pub(crate) const USER_CS_32: u16 = 0x23;
pub(crate) const USER_DATA: u16 = 0x2b;
pub(crate) const USER_CS_64: u16 = 0x33;
pub(crate) const TSS_SELECTOR: u16 = 0x38;
/// The first descriptor that is a test's own; the TSS's takes two.
pub(crate) const SPARE: u16 = 0x48;

const PRESENT_WRITABLE_LARGE: u64 = 0x83;
const MEMORY_MIB: u64 = 16;
const HLT: u8 = 0xf4;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The code's own `hlt`.
    Halt,
    /// The handler of this vector.
    Vector(u8),
    /// A triple fault.
    Shutdown,
}

/// The CPU and its memory.
pub(crate) struct Rig {
    pub(crate) vcpu: BtVcpu,
    ram: Arc<GuestRam>,
    /// State that each run starts from.
    pub(crate) state: CpuState,
    pub(crate) devices: Devices,
    /// The devices are at hand while the code runs, and say this after each access.
    pub(crate) at_hand: Option<After>,
}

/// What is not RAM.
#[derive(Default)]
pub(crate) struct Devices {
    /// Ports written and what to, in the last run.
    pub(crate) written: Vec<(u16, u32)>,
    /// What every read of a device answers.
    pub(crate) device: u8,
    /// A device that is memory, from [`DEVICE`] on.
    pub(crate) device_memory: Vec<u8>,
    /// Device accesses of the last run: write, address, bytes.
    pub(crate) accesses: Vec<(bool, u64, usize)>,
    after: Option<After>,
}

impl Devices {
    fn after(&self) -> After {
        self.after.expect("asked only while at hand")
    }
}

impl DeviceBus for Devices {
    fn port_in(&mut self, _port: u16, data: &mut [u8]) -> After {
        data.fill(self.device);
        self.after()
    }

    fn port_out(&mut self, port: u16, data: &[u8]) -> After {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        self.written.push((port, u32::from_le_bytes(value)));
        self.after()
    }

    fn memory_read(&mut self, addr: GuestPhys, data: &mut [u8], _: u8) -> After {
        self.accesses.push((false, addr.0, data.len()));
        let at = addr.0.wrapping_sub(DEVICE) as usize;
        match self.device_memory.get(at..at + data.len()) {
            Some(memory) => data.copy_from_slice(memory),
            None => data.fill(self.device),
        }
        self.after()
    }

    fn memory_write(&mut self, addr: GuestPhys, data: &[u8]) -> After {
        self.accesses.push((true, addr.0, data.len()));
        let at = addr.0.wrapping_sub(DEVICE) as usize;
        if let Some(memory) = self.device_memory.get_mut(at..at + data.len()) {
            memory.copy_from_slice(data);
        }
        self.after()
    }
}

impl std::ops::Deref for Rig {
    type Target = Devices;

    fn deref(&self) -> &Devices {
        &self.devices
    }
}

impl std::ops::DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut Devices {
        &mut self.devices
    }
}

pub(crate) fn segment(selector: u16, base: u64, limit: u32, attributes: u16) -> Segment {
    Segment {
        selector,
        base,
        limit,
        attributes,
    }
}

/// A system descriptor's first 8 bytes: kind is the byte with type, DPL and P.
pub(crate) fn system_descriptor(kind: u64, base: u64, limit: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56
}

/// A gate of 8 bytes, or the first half of one of 16.
pub(crate) fn gate(kind: u64, selector: u16, target: u64) -> u64 {
    target & 0xffff | u64::from(selector) << 16 | kind << 40 | (target >> 16 & 0xffff) << 48
}

impl Rig {
    fn new() -> Rig {
        let ram = engine_core::memory::create(MEMORY_MIB).expect("guest memory");
        let vcpu = BtVcpu::new(Arc::clone(&ram), Options::default()).expect("a vCPU");
        let mut rig = Rig {
            vcpu,
            ram,
            state: CpuState::default(),
            devices: Devices::default(),
            at_hand: None,
        };
        for (index, entry) in [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            system_descriptor(0x8b, TSS, 0x67),
            0,
        ]
        .into_iter()
        .enumerate()
        {
            rig.put(GDT + 8 * index as u64, &u64::to_le_bytes(entry));
        }
        for vector in 0..256 {
            rig.put(HANDLERS + 16 * vector, &[HLT]);
        }
        rig.put(TSS + 0x66, &0x68u16.to_le_bytes());
        rig.state = CpuState {
            rip: CODE,
            rflags: 2,
            gdtr: DescriptorTable {
                base: GDT,
                limit: 0xfff,
            },
            idtr: DescriptorTable {
                base: IDT,
                limit: 0xfff,
            },
            ldtr: segment(0, 0, 0, 0x82),
            tr: segment(TSS_SELECTOR, TSS, 0x67, 0x8b),
            cr0: 0x11,
            ..CpuState::default()
        };
        rig.state.gpr[4] = STACK;
        rig
    }

    /// 64-bit mode, ring 0.
    pub(crate) fn long() -> Rig {
        let mut rig = Rig::new();
        rig.word(TABLES, (TABLES + 0x1000) | 7);
        rig.word(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for page in 0..512 {
            let entry = page << 21 | PRESENT_WRITABLE_LARGE;
            rig.word(TABLES + 0x2000 + 8 * page, entry);
        }
        for vector in 0..256u64 {
            let target = HANDLERS + 16 * vector;
            rig.word(IDT + 16 * vector, gate(0x8e, CS_64, target));
        }
        rig.word(TSS + 4, RSP0);
        let data = Segment::flat(DATA, 0xc093);
        rig.state = CpuState {
            segments: [data, Segment::flat(CS_64, 0xa09b), data, data, data, data],
            cr0: 0x8001_0033,
            cr3: TABLES,
            // PAE OSFXSR OSXMMEXCPT.
            cr4: 0x620,
            // SCE LME LMA NXE.
            efer: 0xd01,
            ..rig.state
        };
        rig
    }

    /// 32-bit protected mode without paging, ring 0.
    pub(crate) fn protected() -> Rig {
        let mut rig = Rig::new();
        for vector in 0..256u64 {
            let target = HANDLERS + 16 * vector;
            rig.word(IDT + 8 * vector, gate(0x8e, CS_32, target));
        }
        rig.put(TSS + 4, &(RSP0 as u32).to_le_bytes());
        rig.put(TSS + 8, &DATA.to_le_bytes());
        let data = Segment::flat(DATA, 0xc093);
        rig.state.segments = [data, Segment::flat(CS_32, 0xc09b), data, data, data, data];
        rig
    }

    /// Real-address mode; CS, DS, ES and SS begin at the code.
    pub(crate) fn real() -> Rig {
        let mut rig = Rig::new();
        for vector in 0..256u64 {
            let target = ((HANDLERS >> 4) << 16) | (16 * vector);
            rig.put(4 * vector, &(target as u32).to_le_bytes());
        }
        let data = segment((CODE >> 4) as u16, CODE, 0xffff, 0x93);
        let code = segment((CODE >> 4) as u16, CODE, 0xffff, 0x9b);
        rig.state = CpuState {
            rip: 0,
            segments: [data, code, data, data, data, data],
            idtr: DescriptorTable {
                base: 0,
                limit: 0x3ff,
            },
            cr0: 0x10,
            ..rig.state
        };
        rig.state.gpr[4] = 0xf000;
        rig
    }

    /// Maps the first 2 MiB with nothing but 4 KiB pages, and returns where their entries are.
    pub(crate) fn small_pages(&mut self) -> u64 {
        let table = TABLES + 0x1_0000;
        for page in 0..512u64 {
            self.word(table + 8 * page, page << 12 | 3);
        }
        self.word(TABLES + 0x2000, table | 3);
        table
    }

    /// Goes on in ring 3, 64-bit or 32-bit as in ring 0.
    pub(crate) fn in_ring_3(mut self) -> Rig {
        let code = if self.state.segments[CpuState::CS].long() {
            Segment::flat(USER_CS_64, 0xa0fb)
        } else {
            Segment::flat(USER_CS_32, 0xc0fb)
        };
        let data = Segment::flat(USER_DATA, 0xc0f3);
        self.state.segments = [data, code, data, data, data, data];
        // The large pages, for everybody.
        for page in 0..512 {
            let at = TABLES + 0x2000 + 8 * page;
            let entry = self.read(at);
            self.word(at, entry | if entry == 0 { 0 } else { 4 });
        }
        self
    }

    /// Writes memory as a device does.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(at))
            .expect("guest memory");
        let last = at + bytes.len().max(1) as u64 - 1;
        let pages: Vec<u64> = (at >> 12..=last >> 12).collect();
        self.vcpu.memory_written(&pages);
    }

    pub(crate) fn word(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn read(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).expect("guest memory")
    }

    pub(crate) fn read_32(&self, at: u64) -> u32 {
        self.read(at) as u32
    }

    pub(crate) fn byte(&self, at: u64) -> u8 {
        self.read(at) as u8
    }

    fn bits(&self) -> u32 {
        let code = &self.state.segments[CpuState::CS];
        match (code.long(), code.db()) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        }
    }

    /// Puts code where the next run starts, and a `hlt` behind it.
    pub(crate) fn code(&mut self, body: impl FnOnce(&mut Asm) -> Built) {
        let mut bytes = assemble(self.bits(), self.state.rip, body);
        bytes.push(HLT);
        self.bytes(&bytes);
    }

    /// As `code`, with code that is ready and no `hlt`.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        let base = if self.bits() == 64 {
            0
        } else {
            self.state.segments[CpuState::CS].base
        };
        self.put(base + self.state.rip, bytes);
    }

    /// Runs what `bytes` or `code` has put there, from the given state.
    pub(crate) fn run(&mut self) -> End {
        self.vcpu.set_state(&self.state).expect("a state");
        self.go_on()
    }

    /// As `run`, from where the last one ended.
    pub(crate) fn go_on(&mut self) -> End {
        self.written.clear();
        self.accesses.clear();
        let Rig {
            vcpu,
            devices,
            at_hand,
            ..
        } = self;
        for _ in 0..100_000 {
            devices.after = *at_hand;
            let exit = match at_hand {
                None => vcpu.run().map(Some),
                Some(_) => vcpu.run_on(devices),
            };
            // What comes after an exit that has ended the run is of no concern.
            devices.after = Some(After::Return);
            match exit.expect("it runs") {
                // A device has answered.
                None => assert_eq!(*at_hand, Some(After::Return)),
                Some(Exit::Hlt) => {
                    let state = vcpu.state().expect("a state");
                    let at = if state.cr0 & 1 == 0 {
                        state.rip + state.segments[CpuState::CS].base
                    } else {
                        state.rip
                    };
                    return match at.checked_sub(HANDLERS + 1) {
                        Some(offset) if offset < 0x1000 && offset % 16 == 0 => {
                            End::Vector((offset / 16) as u8)
                        }
                        _ => End::Halt,
                    };
                }
                Some(Exit::Shutdown) => return End::Shutdown,
                Some(Exit::PioOut { port, data, .. }) => {
                    let _ = devices.port_out(port, data);
                }
                Some(Exit::PioIn { data, .. }) => data.fill(devices.device),
                Some(Exit::MmioRead {
                    addr,
                    data,
                    priority,
                }) => {
                    let _ = devices.memory_read(addr, data, priority);
                }
                Some(Exit::MmioWrite { addr, data }) => {
                    let _ = devices.memory_write(addr, data);
                }
                Some(Exit::Interrupted) => {}
                other => panic!("{other:?}"),
            }
        }
        panic!("it doesn't end");
    }

    /// Runs a few instructions, to `hlt` or an exception.
    pub(crate) fn try_code(&mut self, body: impl FnOnce(&mut Asm) -> Built) -> End {
        self.code(body);
        self.run()
    }

    /// The state after the run.
    pub(crate) fn after(&self) -> CpuState {
        self.vcpu.state().expect("a state")
    }

    /// The word at the stack's top: the error code, in a handler that has one.
    pub(crate) fn error(&self) -> u32 {
        let state = self.after();
        self.read_32(state.gpr[4] + state.segments[CpuState::SS].base)
    }

    /// Vector and error code of an exception that has one.
    #[track_caller]
    pub(crate) fn expect(&mut self, vector: u8, error: u32, body: impl FnOnce(&mut Asm) -> Built) {
        assert_eq!(self.try_code(body), End::Vector(vector));
        assert_eq!(self.error(), error, "error code of vector {vector}");
    }
}
