//! How vCPUs come to be.

use std::ops::RangeInclusive;
use std::sync::Arc;

use engine_core::{Error, ExitCounts, GuestRam, cpuid::Place};

use super::{
    BtVcpu, Pending, Resume, Told,
    ports::{self, PortAccess},
};
use crate::{
    arena::Arena,
    cache::Cache,
    callout,
    core::Core,
    dispatch::{self, Targets},
    kick::Doorbell,
    lower::Layout,
    stubs,
    tlb::{BANKS, jump_index},
    transitions,
    vm::{Guarantee, MOST, Vm},
    x87,
};

/// How the translator is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Room for each vCPU's translated code and what is known of it, in bytes; many vCPUs get less ([`Options::MOST_CODE`]).
    /// Full, it is emptied and filled anew.
    pub code_cache: usize,
    /// Translated code counts its branches and accesses, which costs it time
    /// ([`Vcpu::host_stats`](engine_core::Vcpu::host_stats)).
    pub count_paths: bool,
}

impl Options {
    /// Sizes of code cache that can be had: from room for the stubs and one block to what absolute
    /// displacements reach.
    pub const CODE_CACHE: RangeInclusive<usize> = Cache::MINIMUM..=1 << 30;
    /// Room for the translated code of all vCPUs together, if there are several: it lies between 1 and
    /// 2 GiB.
    pub const MOST_CODE: usize = 640 << 20;
}

impl Default for Options {
    fn default() -> Self {
        Options {
            code_cache: 64 << 20,
            count_paths: false,
        }
    }
}

impl BtVcpu {
    /// The only vCPU of a VM over `ram`, to be given its first state by `set_state`.
    ///
    /// # Errors
    /// [`Error::Host`] if memory can't be mapped, [`Error::Engine`] for a code cache too small.
    pub fn new(ram: Arc<GuestRam>, options: Options) -> Result<BtVcpu, Error> {
        let one = Self::several(ram, options, 1)?.pop();
        Ok(one.expect("as many as were asked for"))
    }

    /// The `count` vCPUs of a VM over `ram`.
    ///
    /// # Errors
    /// As [`BtVcpu::new`], and [`Error::Engine`] for more than 16.
    pub fn several(ram: Arc<GuestRam>, options: Options, count: u8) -> Result<Vec<BtVcpu>, Error> {
        Self::of_vm(ram, options, count, None)
    }

    /// As [`BtVcpu::several`], of a VM that lacks `guarantee`.
    ///
    /// # Errors
    /// As [`BtVcpu::several`].
    #[cfg(feature = "testing")]
    pub fn several_without(
        ram: Arc<GuestRam>,
        options: Options,
        count: u8,
        guarantee: Guarantee,
    ) -> Result<Vec<BtVcpu>, Error> {
        Self::of_vm(ram, options, count, Some(guarantee))
    }

    fn of_vm(
        ram: Arc<GuestRam>,
        options: Options,
        count: u8,
        without: Option<Guarantee>,
    ) -> Result<Vec<BtVcpu>, Error> {
        if count == 0 || usize::from(count) > MOST {
            return Err(Error::Engine(format!("{count} vCPUs: choose 1 to {MOST}")));
        }
        let mut options = options;
        if count > 1 {
            let share = Options::MOST_CODE / usize::from(count);
            options.code_cache = options.code_cache.min(share);
        }
        let vm = Arc::new(Vm::new(&ram, count.into(), without));
        Place::all(count)
            .map(|place| Self::create(Arc::clone(&ram), options, &vm, place))
            .collect()
    }

    fn create(
        ram: Arc<GuestRam>,
        options: Options,
        vm: &Arc<Vm>,
        place: Place,
    ) -> Result<BtVcpu, Error> {
        if !Options::CODE_CACHE.contains(&options.code_cache) {
            return Err(Error::Engine(format!(
                "code cache of {} bytes: choose {} to {}",
                options.code_cache,
                Options::CODE_CACHE.start(),
                Options::CODE_CACHE.end()
            )));
        }
        let arena = Arena::new(options.code_cache).map_err(|source| Error::Host {
            operation: "map the translator's arena",
            source,
        })?;
        let arena = Arc::new(arena);
        let (stubs, code) = stubs::emit(arena.context_disp(), arena.code());
        arena.write_code(arena.code(), &code);
        let mut next = (arena.code() + code.len() as u64).next_multiple_of(64);
        let mut place_code = |code: Vec<u8>| {
            arena.write_code(next, &code);
            next = (next + code.len() as u64).next_multiple_of(64);
            next
        };
        let mut at = place_code(Vec::new());
        let transitions = std::array::from_fn(|bank| {
            let (transitions, code) = transitions::emit(&arena, &stubs, bank, at);
            at = place_code(code);
            transitions
        });
        let miss = std::array::from_fn(|bank| {
            let jump = arena.jump(jump_index(bank, true)) as i32;
            let miss = at;
            at = place_code(dispatch::emit(arena.context_disp(), jump, stubs.exit, miss));
            miss
        });
        let callout = at;
        at = place_code(callout::emit(arena.context_disp(), &stubs, callout));
        let counting = options.count_paths;
        let layout = Layout::new(&arena, &stubs, transitions, miss, callout, counting);
        let cache = Cache::new(&arena, layout, at).map_err(|source| Error::Host {
            operation: "map what is known of translated code",
            source,
        })?;
        // SAFETY: the arena is dropped last and serves this core alone.
        let mut core = unsafe { Core::new(ram, &arena, Arc::clone(vm), place) };
        for (bank, miss) in miss.into_iter().enumerate() {
            // SAFETY: that part of the arena is for this table.
            let targets = unsafe { Targets::new(arena.targets(bank), miss) };
            core.mmu.jumps[jump_index(bank, true)].set_targets(targets);
        }
        // Guests begin there, and may never come elsewhere.
        core.mmu.jumps[jump_index(0, false)].populate();
        core.context().callee = ports::answer as *const () as u64;
        core.context().mxcsr = 0x1f80;
        core.context().window_limit = crate::window::SIZE;
        core.context().index_limit = crate::window::INDEX_LIMIT;
        x87::reset(&mut core.context().x87);
        let doorbell = Arc::new(Doorbell::new(arena.clone()));
        vm.attach(place.id.into(), Arc::clone(&doorbell));
        Ok(BtVcpu {
            core,
            cache,
            stubs,
            transitions,
            counts: ExitCounts::default(),
            counting,
            doorbell,
            window: false,
            intercept: false,
            resume: Resume::Boundary,
            misses: 0,
            raising: None,
            steps: 0,
            stepping: None,
            stepped: false,
            pending: Pending::Nothing,
            port_access: PortAccess::default(),
            bus: None,
            msr: None,
            accepted: false,
            data: [0; 8],
            strings: Vec::new(),
            stale: false,
            jump_modes: [None; 2 * BANKS],
            jump_serials: [0; 2 * BANKS],
            entries: 0,
            alone: vm.alone(),
            told: Told::default(),
            settled_ip: None,
            direct: None,
            arena,
        })
    }
}
