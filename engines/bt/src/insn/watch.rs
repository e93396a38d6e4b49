//! The time limit: a thread that kicks a case that runs for too long.
//!
//! Invariant: no kick comes after the end of its case.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use engine_core::kick::KickHandle;

/// Kicks a case that runs for too long.
pub(super) struct Watch {
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

    pub(super) fn new(limit: Duration) -> Watch {
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

    pub(super) fn start(&self, handle: KickHandle) {
        self.set(Some(handle));
    }

    pub(super) fn stop(&self) {
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
