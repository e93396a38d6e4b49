//! What the vCPUs of one VM share, and how one makes the others let go of something.
//!
//! Each vCPU has its own TLBs, its own translations and its own thread, and nothing on the fast path
//! is shared but guest memory. Two things have to be told all the same.
//!
//! **A page becomes code.** Its translation holds only if every later write is seen, and a vCPU that
//! has the page in a write TLB writes without being seen. So before a byte of it is read, the page
//! is [entered](Pages::enter), and each vCPU that has claimed it is asked to empty its write TLBs,
//! and waited for. Code translated from a page was read after the last unseen write to it.
//!
//! **Code is overwritten.** Every such write is seen, by the writer. It is told to all vCPUs with
//! code from those [lines](Pages::watchers), and before the writer's next instruction each of them
//! has dropped that code, or will before it runs on. So whoever learns of the write in any way runs
//! the new code, serializing instruction or not; a processor promises less (SDM 3A 8.1.3). A write
//! that comes between a translator's reading and its noting of lines finds no line: the translator
//! reads again after noting them, and starts over if it reads something else.
//!
//! # Asking
//!
//! [`ask`](Vm::ask) leaves a [`Request`] in the other's [`Slot`], draws a ticket and takes the other's
//! doorbell page away, so that its translated code leaves at the next backward or indirect branch.
//! The other answers at a *boundary*: between two instructions, with nothing that translated code
//! has looked up still in a register: it gives up pages, drops what was overwritten, and answers all
//! tickets so far.
//!
//! A *parked* vCPU, one that is halted, in the VMM, or waiting for others itself, has answered by
//! being parked: it looks at its slot before it does anything else. Flag and ticket are written
//! before the other's is read, on both sides, so a vCPU that stops being parked sees the ticket or
//! is seen awake. Whoever waits is parked, so nobody waits for one who waits, and a circle of
//! vCPUs that want each other's pages resolves itself. A vCPU that has left in the middle of a
//! block with a looked-up address still in use is not parked; it comes back soon. Should the VMM
//! be what keeps it, and be waiting for the asker: a kick ends the asker's wait, and it asks again
//! when it runs again.
//!
//! Whoever asks nobody pays one atomic word: a vCPU of several when it fills a write TLB with a page for
//! the first time or translates from one, and an only vCPU not even that, since it has plain words.
//!
//! Devices write through a mapping of their own; the run loop tells one vCPU, which tells the rest.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use engine_core::{GuestRam, dma::KeptCode};

use crate::{
    kick::Doorbell,
    pages::{Pages, Set},
};

/// Most vCPUs of one VM: as many as [`Pages`] has bits for.
pub(crate) const MOST: usize = Set::BITS as usize;

/// Looks at a ticket before sleeping over it: some microseconds, in which a running vCPU answers.
const LOOKS: u32 = 200;
/// How long a kick of one who waits may go unnoticed: it can't wake anybody, since it may come from
/// a signal handler.
const KICK_RECHECK: Duration = Duration::from_millis(1);

/// What tests do without, to see that it was needed.
#[cfg_attr(
    not(feature = "testing"),
    allow(unreachable_pub, reason = "tests' alone")
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarantee {
    /// Writers of a page that becomes code are waited for.
    Acknowledgement,
    /// Writes to code are told to other vCPUs.
    Invalidation,
    /// Instructions on slow paths run on the memory itself.
    Atomicity,
    /// Accessed and dirty bits are set in the entry that was looked at, or not at all.
    EntryBits,
    /// Whoever waits has answered.
    Parking,
    /// Who is in the middle of a block that writes has not.
    Pins,
}

/// One vCPU, as the others see it.
#[repr(align(128))]
#[derive(Default)]
struct Slot {
    /// It runs nothing, and answers before it does again.
    parked: AtomicBool,
    asked: AtomicU64,
    answered: AtomicU64,
    requests: Mutex<Vec<Request>>,
    doorbell: OnceLock<Arc<Doorbell>>,
}

/// What a vCPU is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// Not to write to the page at this address unseen any more.
    GiveUp(u64),
    /// To drop what it has made of RAM: address and length.
    Drop(u64, u64),
}

/// A question to a vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    vcpu: usize,
    number: u64,
}

/// What the vCPUs of one VM share.
pub(crate) struct Vm {
    pub pages: Pages,
    slots: Box<[Slot]>,
    /// Those that sleep over a ticket.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    changed: Condvar,
    #[cfg_attr(not(feature = "testing"), allow(dead_code, reason = "tests' alone"))]
    without: Option<Guarantee>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KeptCode for Vm {
    /// Becoming a holder comes before the code's bytes are read.
    fn holds(&self, address: u64) -> bool {
        if !self.alone() {
            // What was written is in memory before it is looked up who has read it.
            fence(Ordering::SeqCst);
        }
        self.pages.is_code(address)
    }
}

impl Vm {
    /// A VM of `count` vCPUs, all parked.
    pub(crate) fn new(ram: &GuestRam, count: usize, without: Option<Guarantee>) -> Vm {
        assert!(count <= MOST, "{count} vCPUs");
        let slots: Box<[Slot]> = (0..count).map(|_| Slot::default()).collect();
        for slot in &slots {
            slot.parked.store(true, Ordering::SeqCst);
        }
        Vm {
            pages: Pages::new(ram, count == 1),
            slots,
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::default(),
            changed: Condvar::new(),
            without,
        }
    }

    /// True if there is one vCPU, which has nobody to ask.
    pub(crate) fn alone(&self) -> bool {
        self.slots.len() == 1
    }

    /// Says how to stop vCPU `me`.
    pub(crate) fn attach(&self, me: usize, doorbell: Arc<Doorbell>) {
        assert!(
            self.slots[me].doorbell.set(doorbell).is_ok(),
            "vCPU {me} twice"
        );
    }

    /// True if a test does without this.
    #[inline]
    pub(crate) fn without(&self, guarantee: Guarantee) -> bool {
        #[cfg(feature = "testing")]
        return self.without == Some(guarantee);
        #[cfg(not(feature = "testing"))]
        {
            let _ = guarantee;
            false
        }
    }

    /// Asks `vcpu` for something.
    pub(crate) fn ask(&self, vcpu: usize, request: Request) -> Ticket {
        let slot = &self.slots[vcpu];
        lock(&slot.requests).push(request);
        let number = slot.asked.fetch_add(1, Ordering::SeqCst) + 1;
        if !slot.parked.load(Ordering::SeqCst)
            && let Some(doorbell) = slot.doorbell.get()
        {
            doorbell.ring();
        }
        Ticket { vcpu, number }
    }

    /// Asks all of `vcpus` for the same.
    pub(crate) fn ask_all(&self, vcpus: Set, request: Request) -> impl Iterator<Item = Ticket> {
        (0..self.slots.len())
            .filter(move |vcpu| vcpus >> vcpu & 1 == 1)
            .map(move |vcpu| self.ask(vcpu, request))
    }

    fn is_answered(&self, ticket: Ticket) -> bool {
        let slot = &self.slots[ticket.vcpu];
        slot.answered.load(Ordering::SeqCst) >= ticket.number || slot.parked.load(Ordering::SeqCst)
    }

    /// Waits until all tickets are answered, or `enough` says so. False if some are not.
    ///
    /// Whoever waits is parked.
    pub(crate) fn wait(&self, tickets: &[Ticket], enough: impl Fn() -> bool) -> bool {
        let answered = || tickets.iter().all(|&ticket| self.is_answered(ticket));
        for _ in 0..LOOKS {
            if answered() {
                return true;
            }
            std::hint::spin_loop();
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut guard = lock(&self.sleep);
        let done = loop {
            if answered() {
                break true;
            }
            if enough() {
                break false;
            }
            guard = self
                .changed
                .wait_timeout(guard, KICK_RECHECK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        drop(guard);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        done
    }

    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            drop(lock(&self.sleep));
            self.changed.notify_all();
        }
    }

    /// `me` runs nothing from here on, and holds nothing that was looked up.
    pub(crate) fn park(&self, me: usize) {
        self.slots[me].parked.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// `me` is about to run something: it looks at [`asked`](Vm::asked) next.
    pub(crate) fn unpark(&self, me: usize) {
        self.slots[me].parked.store(false, Ordering::SeqCst);
    }

    /// True if `me` is parked.
    pub(crate) fn is_parked(&self, me: usize) -> bool {
        self.slots[me].parked.load(Ordering::Relaxed)
    }

    /// The last ticket that `me` was given, if it isn't answered.
    #[inline]
    pub(crate) fn asked(&self, me: usize) -> Option<u64> {
        let slot = &self.slots[me];
        let asked = slot.asked.load(Ordering::SeqCst);
        (asked != slot.answered.load(Ordering::Relaxed)).then_some(asked)
    }

    /// What `me` is asked for: that of the last ticket, and all before.
    pub(crate) fn requests(&self, me: usize) -> Vec<Request> {
        std::mem::take(&mut *lock(&self.slots[me].requests))
    }

    /// `me` has done what it was asked for: answers all tickets up to `number`.
    pub(crate) fn answer(&self, me: usize, number: u64) {
        self.slots[me].answered.store(number, Ordering::SeqCst);
        self.wake();
    }
}
