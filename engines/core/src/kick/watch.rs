//! A time limit: a thread that kicks what runs for too long.
//!
//! Invariant: no kick comes after the end of what it was meant for.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::KickHandle;

/// After a kick the next one comes this much later, should what runs have begun another part.
const AGAIN: Duration = Duration::from_millis(50);

/// Kicks what runs for longer than a limit.
pub struct Watch {
    limit: Duration,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What runs, and when it is to be kicked.
    running: Option<(KickHandle, Instant)>,
    /// The thread waits without a time, and has to be told of a start.
    resting: bool,
    over: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A state is whole between any two of its changes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_the_limit(&self) {
        let mut state = self.state();
        while !state.over {
            let now = Instant::now();
            let wait = match &mut state.running {
                None => {
                    state.resting = true;
                    let woken = self.changed.wait(state);
                    state = woken.unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Some((handle, at)) if *at <= now => {
                    handle.kick();
                    *at = now + AGAIN;
                    AGAIN
                }
                Some((_, at)) => *at - now,
            };
            // An end isn't told: what has begun since is found when this time is up, which is before its
            // own, or within `AGAIN`.
            let woken = self.changed.wait_timeout(state, wait);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Watch {
    /// A watch over one thing after the other, each of which may run for `limit`.
    pub fn new(limit: Duration) -> Watch {
        let shared = Arc::new(Shared::default());
        let watched = Arc::clone(&shared);
        Watch {
            limit,
            shared,
            thread: Some(std::thread::spawn(move || watched.keep_the_limit())),
        }
    }

    /// What `handle` stops runs from now on.
    pub fn start(&self, handle: KickHandle) {
        let mut state = self.shared.state();
        state.running = Some((handle, Instant::now() + self.limit));
        if std::mem::take(&mut state.resting) {
            self.shared.changed.notify_one();
        }
    }

    /// It runs no longer.
    pub fn stop(&self) {
        self.shared.state().running = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state().over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::kick::Kick;

    struct Told(Sender<Instant>);

    impl Kick for Told {
        fn kick(&self) {
            let _ = self.0.send(Instant::now());
        }
    }

    fn told() -> (KickHandle, Receiver<Instant>) {
        let (sender, receiver) = channel();
        (Arc::new(Told(sender)), receiver)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_runs_too_long_is_kicked_until_it_stops() {
        let limit = Duration::from_millis(20);
        let watch = Watch::new(limit);
        for _ in 0..3 {
            let (handle, kicks) = told();
            let begun = Instant::now();
            watch.start(handle);
            let first = kicks.recv_timeout(LONG).expect("a kick");
            assert!(first - begun >= limit);
            kicks.recv_timeout(LONG).expect("another kick");
            watch.stop();
            // The handle is gone, and with it whatever could still come.
            while kicks.try_recv().is_ok() {}
            assert!(kicks.recv().is_err());
        }
    }

    #[test]
    fn what_ends_in_time_is_not_kicked_and_the_next_has_all_of_its_time() {
        let limit = Duration::from_millis(200);
        let watch = Watch::new(limit);
        let (handle, kicks) = told();
        watch.start(handle);
        watch.stop();
        assert!(kicks.recv().is_err(), "the watch lets go of what has ended");
        let (handle, kicks) = told();
        let begun = Instant::now();
        watch.start(handle);
        let first = kicks.recv_timeout(LONG).expect("a kick");
        assert!(first - begun >= limit);
    }

    #[test]
    fn a_watch_that_has_nothing_to_watch_or_much_time_ends_at_once() {
        let begun = Instant::now();
        drop(Watch::new(LONG));
        let watch = Watch::new(LONG);
        let (handle, _kicks) = told();
        watch.start(handle);
        drop(watch);
        assert!(begun.elapsed() < LONG);
    }
}
