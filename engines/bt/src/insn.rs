//! Ring-3 snippets: 64-bit code with memory of its own, run by the translator until `hlt` or an
//! exception.
//!
//! One [`Bench`] serves any number of cases, each of which finds fresh memory and registers as a
//! processor has them after reset and finit. There is no kernel: exceptions end the run and are the
//! result. System registers are as a 64-bit operating system sets them for its processes: paging
//! with NX, AVX state enabled, FSGSBASE and UMIP on, alignment checks possible, IOPL 0, SYSCALL off.
//! What UMIP hides is answered as Linux answers it.
//!
//! Pages of a large range get memory when they are first touched.
//!
//! Invariant: nothing of a case is left when the next one starts.

use std::collections::BTreeMap;
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use engine_core::{
    CpuState, DescriptorTable, Error, GuestRam, Segment, Vcpu, kick::KickHandle, memory,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::{BtVcpu, Extended, Options, UserStop, cpu::canonical, fault};

const PAGE: u64 = 4096;
/// Guest-physical address of the top page table; everything else follows.
const ROOT: u64 = PAGE;
/// Where ring 3 can't see it: descriptor tables.
const KERNEL: u64 = 0xffff_fe00_0000_0000;
const TSS_OFFSET: u64 = 0x800;
const CODE_CACHE: usize = 4 << 20;
/// Bytes of a range from which on pages are mapped when they are touched.
const SPARSE: u64 = 16 << 20;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;

/// Selectors, as Linux gives them to a 64-bit process.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// A snippet and its memory.
#[derive(Clone, Debug, Default)]
pub struct Case {
    /// Machine code.
    pub code: Vec<u8>,
    /// Address of its first byte, where it starts.
    pub load: u64,
    /// Zeroed memory besides the code's: (address, bytes). Readable, writable and executable, in
    /// whole pages, as all memory of a case.
    pub map: Vec<(u64, u64)>,
    /// Contents: (address, bytes). Their pages are mapped too.
    pub mem: Vec<(u64, Vec<u8>)>,
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At `hlt` or in an exception.
    Stop(UserStop),
    /// Not before the time limit.
    Limit,
}

/// The registers at the end.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Everything else.
    pub extended: Extended,
}

/// A case could not be run.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// No code.
    #[error("no code")]
    Empty,
    /// Memory where there can be none.
    #[error("{bytes:#x} bytes at {address:#x} are not canonical user memory")]
    Address {
        /// First byte.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// More memory than there is.
    #[error("the case needs more than {mib} MiB of memory")]
    Memory {
        /// What there is.
        mib: u64,
    },
    /// The engine gave up; it has been replaced.
    #[error("the engine failed: {0}")]
    Engine(#[from] Error),
}

/// A virtual machine for snippets.
pub struct Bench {
    ram: Arc<GuestRam>,
    mib: u64,
    vcpu: BtVcpu,
    watch: Watch,
    /// Pages of the case: guest-virtual to guest-physical.
    pages: BTreeMap<u64, u64>,
    /// Ranges of the case whose pages are mapped as they are touched: first and last byte.
    sparse: Vec<(u64, u64)>,
    /// First guest-physical page that isn't in use.
    next: u64,
}

impl Bench {
    /// A bench whose cases may run for `limit`.
    ///
    /// # Errors
    /// [`Error`] if the host has no room for it.
    pub fn new(limit: Duration) -> Result<Bench, Error> {
        let mib = memory::limit_mib().min(1024);
        let ram = memory::create(mib)
            .map_err(|error| Error::Engine(format!("memory for cases: {error}")))?;
        Ok(Bench {
            vcpu: vcpu(&ram)?,
            ram,
            mib,
            watch: Watch::new(limit),
            pages: BTreeMap::new(),
            sparse: Vec::new(),
            next: ROOT,
        })
    }

    /// Runs one case.
    ///
    /// # Errors
    /// See [`CaseError`].
    pub fn run(&mut self, case: &Case) -> Result<Outcome, CaseError> {
        self.clear()?;
        self.lay_out(case)?;
        self.vcpu.forget_code();
        self.vcpu.reset_extended();
        self.vcpu.set_state(&start(case.load))?;
        self.watch.start(self.vcpu.kick_handle());
        let stop = loop {
            match self.vcpu.run_user() {
                Ok(UserStop::Exception {
                    vector: fault::PF,
                    address: Some(address),
                    ..
                }) if self.waits(address) => {
                    if let Err(error) = self.touch(address) {
                        self.watch.stop();
                        return Err(error);
                    }
                }
                stop => break stop,
            }
        };
        self.watch.stop();
        let outcome = stop.and_then(|stop| {
            let state = self.vcpu.state()?;
            Ok(Outcome {
                end: match stop {
                    UserStop::Interrupted => End::Limit,
                    stop => End::Stop(stop),
                },
                gpr: state.gpr,
                rip: state.rip,
                rflags: state.rflags,
                extended: self.vcpu.extended(),
            })
        });
        if outcome.is_err() {
            self.vcpu = vcpu(&self.ram)?;
        }
        Ok(outcome?)
    }

    /// The vCPU, for tests that set it up in ways that nobody else needs.
    #[doc(hidden)]
    pub fn vcpu_for_tests(&mut self) -> &mut BtVcpu {
        &mut self.vcpu
    }

    /// Memory of the last case, as it is now; None where nothing is mapped.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.wrapping_add(done as u64);
            let room = (PAGE - at % PAGE) as usize;
            let len = room.min(bytes.len() - done);
            let phys = self.pages.get(&(at & !(PAGE - 1)))? + at % PAGE;
            self.ram
                .read_slice(&mut bytes[done..done + len], GuestAddress(phys))
                .ok()?;
            done += len;
        }
        Some(())
    }

    /// Zeroes what the last case used.
    fn clear(&mut self) -> Result<(), CaseError> {
        const SMALL: u64 = 1 << 20;
        let used = self.next - ROOT;
        let region = self.ram.iter().next();
        let host = region.and_then(|region| region.get_host_address(MemoryRegionAddress(0)).ok());
        if let Some(host) = host {
            // SAFETY: pages of guest RAM that no Rust reference covers; the vCPU isn't running.
            unsafe {
                let from = host.add(ROOT as usize);
                if used <= SMALL {
                    std::ptr::write_bytes(from, 0, used as usize);
                } else if libc::madvise(from.cast(), used as usize, libc::MADV_REMOVE) != 0 {
                    return Err(CaseError::Engine(Error::Host {
                        operation: "clear the case's memory",
                        source: std::io::Error::last_os_error(),
                    }));
                }
            }
        }
        self.pages.clear();
        self.sparse.clear();
        self.next = ROOT;
        Ok(())
    }

    fn lay_out(&mut self, case: &Case) -> Result<(), CaseError> {
        if case.code.is_empty() {
            return Err(CaseError::Empty);
        }
        let root = self.page()?;
        debug_assert_eq!(root, ROOT);
        let kernel = self.page()?;
        self.enter(KERNEL, kernel, WRITABLE)?;
        for (selector, descriptor) in [
            (0x10u64, 0x00af_9b00_0000_ffffu64),
            (0x18, 0x00cf_9300_0000_ffff),
            // 32-bit code, data, 64-bit code of ring 3.
            (0x20, 0x00cf_fb00_0000_ffff),
            (0x28, 0x00cf_f300_0000_ffff),
            (0x30, 0x00af_fb00_0000_ffff),
        ] {
            self.put(kernel + selector, &descriptor.to_le_bytes());
        }
        // No I/O permission bitmap.
        self.put(kernel + TSS_OFFSET + 0x66, &0x68u16.to_le_bytes());
        for &(address, bytes) in &case.map {
            self.map(address, bytes)?;
        }
        let code = (case.load, &case.code);
        let contents = case.mem.iter().map(|(address, bytes)| (*address, bytes));
        for (address, bytes) in contents.chain([code]) {
            self.map(address, bytes.len() as u64)?;
            self.fill(address, bytes);
        }
        Ok(())
    }

    /// Maps the pages around a range.
    fn map(&mut self, address: u64, bytes: u64) -> Result<(), CaseError> {
        let Some(more) = bytes.checked_sub(1) else {
            return Ok(());
        };
        let wrong = CaseError::Address { address, bytes };
        let (first, last) = match address.checked_add(more) {
            Some(last) => (address & !(PAGE - 1), last & !(PAGE - 1)),
            None => return Err(wrong),
        };
        // A range within either half never leaves it in between.
        let same_half = first >> 63 == last >> 63;
        let hidden = (first..=last).contains(&KERNEL);
        if !canonical(first) || !canonical(last) || !same_half || hidden {
            return Err(wrong);
        }
        if last - first >= SPARSE {
            self.sparse.push((first, last));
            return Ok(());
        }
        let mut page = first;
        loop {
            if !self.pages.contains_key(&page) {
                self.touch(page)?;
            }
            if page == last {
                return Ok(());
            }
            page += PAGE;
        }
    }

    /// True if the page around `address` gets its memory when it is touched, and hasn't yet.
    fn waits(&self, address: u64) -> bool {
        let page = address & !(PAGE - 1);
        let mut ranges = self.sparse.iter();
        !self.pages.contains_key(&page)
            && ranges.any(|&(first, last)| (first..=last).contains(&page))
    }

    /// Maps the page around `address`.
    fn touch(&mut self, address: u64) -> Result<(), CaseError> {
        let page = address & !(PAGE - 1);
        let phys = self.page()?;
        self.enter(page, phys, WRITABLE | USER)?;
        self.pages.insert(page, phys);
        Ok(())
    }

    /// A zeroed page of guest-physical memory.
    fn page(&mut self) -> Result<u64, CaseError> {
        let page = self.next;
        if page + PAGE > self.mib << 20 {
            return Err(CaseError::Memory { mib: self.mib });
        }
        self.next += PAGE;
        Ok(page)
    }

    /// Enters a page into the page tables.
    fn enter(&mut self, virt: u64, phys: u64, rights: u64) -> Result<(), CaseError> {
        let mut table = ROOT;
        for level in (1..4).rev() {
            let at = table + (virt >> (12 + 9 * level) & 0x1ff) * 8;
            let entry = self.word(at);
            table = if entry & PRESENT == 0 {
                let fresh = self.page()?;
                self.put(at, &(fresh | PRESENT | WRITABLE | USER).to_le_bytes());
                fresh
            } else {
                entry & 0x000f_ffff_ffff_f000
            };
        }
        let at = table + (virt >> 12 & 0x1ff) * 8;
        self.put(at, &(phys | rights | PRESENT).to_le_bytes());
        Ok(())
    }

    /// Writes to pages that are mapped.
    fn fill(&mut self, address: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            let len = ((PAGE - at % PAGE) as usize).min(bytes.len() - done);
            let phys = self.pages[&(at & !(PAGE - 1))] + at % PAGE;
            self.put(phys, &bytes[done..done + len]);
            done += len;
        }
    }

    fn put(&self, phys: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(phys))
            .expect("pages are handed out inside RAM");
    }

    fn word(&self, phys: u64) -> u64 {
        self.ram
            .read_obj(GuestAddress(phys))
            .expect("tables are inside RAM")
    }
}

fn vcpu(ram: &Arc<GuestRam>) -> Result<BtVcpu, Error> {
    let options = Options {
        code_cache: CODE_CACHE,
        ..Options::default()
    };
    let mut vcpu = BtVcpu::new(Arc::clone(ram), options)?;
    let xsave = engine_core::cpuid::pinned(1, 0)[2] >> 26 & 1 == 1;
    if xsave {
        vcpu.set_xcr0(7);
    }
    Ok(vcpu)
}

/// The state of a process at its first instruction.
fn start(rip: u64) -> CpuState {
    let flat = |selector, attributes| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes,
    };
    let null = Segment::default();
    let xsave = engine_core::cpuid::pinned(1, 0)[2] >> 26 & 1;
    CpuState {
        rip,
        rflags: 0x202,
        segments: [
            null,
            flat(USER_CS, 0xa0fb),
            flat(USER_SS, 0xc0f3),
            null,
            null,
            null,
        ],
        ldtr: Segment {
            attributes: 0x82,
            ..null
        },
        tr: Segment {
            selector: 0x40,
            base: KERNEL + TSS_OFFSET,
            limit: 0x67,
            attributes: 0x8b,
        },
        gdtr: DescriptorTable {
            base: KERNEL,
            limit: 0x3f,
        },
        idtr: DescriptorTable {
            base: KERNEL,
            limit: 0,
        },
        // PE MP ET NE WP AM PG.
        cr0: 0x8005_0033,
        cr3: ROOT,
        // PAE OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE.
        cr4: 0x1_0e20 | u64::from(xsave) << 18,
        // LME LMA NXE, and no SCE.
        efer: 0xd00,
        ..CpuState::default()
    }
}

/// Kicks a case that runs for too long.
struct Watch {
    shared: Arc<Watched>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Watched {
    /// Counts up with each start and each end; odd while a case runs.
    round: AtomicU64,
    over: AtomicBool,
    handle: Mutex<Option<KickHandle>>,
}

impl Watch {
    /// How often a look is taken: the limit is kept to within two of these.
    const STEP: Duration = Duration::from_millis(50);

    fn new(limit: Duration) -> Watch {
        let shared = Arc::new(Watched::default());
        let watched = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let mut last = 0;
            let mut since = Instant::now();
            while !watched.over.load(Ordering::Relaxed) {
                std::thread::park_timeout(Self::STEP);
                let handle = watched
                    .handle
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                let round = watched.round.load(Ordering::Acquire);
                if round != last || round % 2 == 0 {
                    last = round;
                    since = Instant::now();
                } else if since.elapsed() >= limit
                    && let Some(handle) = &*handle
                {
                    handle.kick();
                }
            }
        });
        Watch {
            shared,
            thread: Some(thread),
        }
    }

    fn set(&self, handle: Option<KickHandle>) {
        // Under the lock, so that no kick comes after the end of its case.
        let mut slot = self
            .shared
            .handle
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        *slot = handle;
        self.shared.round.fetch_add(1, Ordering::Release);
    }

    fn start(&self, handle: KickHandle) {
        self.set(Some(handle));
    }

    fn stop(&self) {
        self.set(None);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: &[u8], map: &[(u64, u64)], end: UserStop) -> Outcome {
        let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
        let case = Case {
            code: code.to_vec(),
            load: 0x1_0000,
            map: map.to_vec(),
            mem: Vec::new(),
        };
        let outcome = bench.run(&case).expect("a case");
        assert_eq!(outcome.end, End::Stop(end));
        outcome
    }

    #[test]
    fn a_snippet_ends_at_hlt_with_its_registers() {
        // mov eax, 5; add rax, rax; hlt
        let outcome = check(b"\xb8\x05\0\0\0\x48\x01\xc0\xf4", &[], UserStop::Halt);
        assert_eq!((outcome.gpr[0], outcome.rip), (10, 0x1_0008));
        assert_eq!(outcome.extended.ftw, 0xffff);
    }

    #[test]
    fn a_page_fault_says_where_and_why() {
        // mov [rax], eax
        let fault = UserStop::Exception {
            vector: 14,
            error: Some(6),
            address: Some(0),
        };
        check(b"\x89\x00", &[], fault);
    }

    #[test]
    fn flags_are_exact_at_a_fault_even_if_nobody_reads_them() {
        // sub eax, 1; mov rbx, [rcx]; xor edx, edx; hlt
        let fault = UserStop::Exception {
            vector: 14,
            error: Some(4),
            address: Some(0),
        };
        let outcome = check(b"\x83\xe8\x01\x48\x8b\x19\x31\xd2\xf4", &[], fault);
        assert_eq!(outcome.rflags & 0x8d5, 0x95);
    }

    #[test]
    fn nothing_is_left_for_the_next_case() {
        let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
        // mov [0x20000], esp; inc eax; hlt
        let mut case = Case {
            code: b"\xff\x04\x25\0\0\x02\0\x8b\x04\x25\0\0\x02\0\xf4".to_vec(),
            load: 0x1_0000,
            map: vec![(0x2_0000, 4096), (0x10_0000_0000, 4 << 20)],
            mem: Vec::new(),
        };
        for _ in 0..2 {
            assert_eq!(bench.run(&case).expect("a case").gpr[0], 1);
        }
        case.mem = vec![(0x2_0000, vec![7])];
        assert_eq!(bench.run(&case).expect("a case").gpr[0], 8);
    }

    #[test]
    fn a_loop_without_an_end_is_stopped() {
        let mut bench = Bench::new(Duration::from_millis(100)).expect("a bench");
        let case = Case {
            code: b"\xeb\xfe".to_vec(),
            load: 0x1_0000,
            ..Case::default()
        };
        assert_eq!(bench.run(&case).expect("a case").end, End::Limit);
        let short = Case {
            code: b"\xf4".to_vec(),
            ..case
        };
        let end = bench.run(&short).expect("a case").end;
        assert_eq!(end, End::Stop(UserStop::Halt));
    }

    #[test]
    fn a_large_range_has_memory_where_it_is_touched() {
        let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
        // mov rdi, 0x500000000; mov ecx, 64; l: inc dword [rdi]; add rdi, 0x4000000; loop l; hlt
        let code =
            b"\x48\xbf\0\0\0\0\x05\0\0\0\xb9\x40\0\0\0\xff\x07\x48\x81\xc7\0\0\0\x04\xe2\xf5\xf4";
        let mut case = Case {
            code: code.to_vec(),
            load: 0x1_0000,
            map: vec![(0x5_0000_0000, 1 << 32)],
            mem: vec![(0x5_0000_0000, vec![0x41])],
        };
        let outcome = bench.run(&case).expect("a case");
        assert_eq!(outcome.end, End::Stop(UserStop::Halt));
        let mut byte = [0];
        bench.read(0x5_0000_0000, &mut byte).expect("mapped");
        assert_eq!(byte, [0x42]);
        assert_eq!(bench.read(0x5_0000_1000, &mut byte), None, "never touched");
        // Behind its end it faults.
        case.map[0].1 = 1 << 31;
        let outcome = bench.run(&case).expect("a case");
        let fault = UserStop::Exception {
            vector: 14,
            error: Some(6),
            address: Some(0x5_8000_0000),
        };
        assert_eq!(outcome.end, End::Stop(fault));
        // More than there is memory for: stosb over all of it.
        case.code = b"\x48\xbf\0\0\0\0\x05\0\0\0\x48\xc7\xc1\xff\xff\xff\x7f\xf3\xaa\xf4".to_vec();
        let outcome = bench.run(&case);
        assert!(matches!(
            outcome,
            Err(CaseError::Memory { .. })
                | Ok(Outcome {
                    end: End::Limit,
                    ..
                })
        ));
    }

    #[test]
    fn memory_that_can_not_be_is_refused() {
        let mut bench = Bench::new(Duration::from_secs(2)).expect("a bench");
        for (address, bytes) in [
            (1 << 47, 1),
            (u64::MAX, 2),
            (0, u64::MAX),
            (0x7fff_ffff_f000, 1 << 40),
        ] {
            let case = Case {
                code: vec![0xf4],
                load: 0x1_0000,
                map: vec![(address, bytes)],
                mem: Vec::new(),
            };
            assert!(bench.run(&case).is_err(), "{address:#x} {bytes:#x}");
        }
    }
}
