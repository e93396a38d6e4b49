//! The harness's own place in the scheduler, and how late it was woken.
//!
//! A window is bounded by two wake-ups of the harness. On a busy host a late first one makes a
//! window look short, a wrong figure in the flattering direction; so the measuring thread asks for
//! real-time priority (it sleeps nearly all the time), and each window is held against the time
//! that the thread stood ready without a processor. Invariant: nothing that the harness starts
//! inherits its priority.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What the scheduler granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// SCHED_FIFO: woken at once, whoever else wants to run.
    RealTime,
    /// A negative nice value: woken soon.
    Nice,
    /// Nothing more than others have.
    Ordinary,
}

/// Raises the calling thread's priority as far as permitted (sched(7)). Children and threads start
/// with an ordinary one.
pub fn raise() -> Priority {
    let real_time = libc::sched_param { sched_priority: 1 };
    let ordinary = libc::sched_param { sched_priority: 0 };
    let reset = libc::SCHED_RESET_ON_FORK;
    // SAFETY: plain system calls; the parameters live through them. 0 is the calling thread.
    unsafe {
        if libc::sched_setscheduler(0, libc::SCHED_FIFO | reset, &real_time) == 0 {
            return Priority::RealTime;
        }
        let kept_apart = libc::sched_setscheduler(0, libc::SCHED_OTHER | reset, &ordinary) == 0;
        if kept_apart && libc::setpriority(libc::PRIO_PROCESS, 0, -20) == 0 {
            return Priority::Nice;
        }
    }
    Priority::Ordinary
}

/// How long this thread has stood ready without a processor, from /proc/thread-self/schedstat
/// (Documentation/scheduler/sched-stats.rst). `None` where the kernel does not count it.
#[derive(Debug)]
pub struct Delays {
    file: Option<File>,
}

impl Delays {
    /// Opens the calling thread's counter. Meaningless in another thread.
    pub fn open() -> Delays {
        Delays {
            file: File::open("/proc/thread-self/schedstat").ok(),
        }
    }

    /// The delay since the thread's start.
    pub fn total(&self) -> Option<Duration> {
        let mut text = [0; 96];
        let length = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        parse(std::str::from_utf8(&text[..length]).ok()?)
    }
}

/// Fields: time on a processor, time ready without one (both in ns), number of time slices.
fn parse(schedstat: &str) -> Option<Duration> {
    let delay = schedstat.split_whitespace().nth(1)?;
    delay.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_field_is_the_delay() {
        assert_eq!(
            parse("163508 2190372 2\n"),
            Some(Duration::from_nanos(2_190_372))
        );
        assert_eq!(parse(""), None);
    }

    #[test]
    fn children_do_not_inherit_a_raised_priority() {
        // In a thread of its own, so that other tests keep theirs.
        let (granted, policy) = std::thread::spawn(|| {
            let granted = raise();
            let child = std::process::Command::new("cat")
                .arg("/proc/self/stat")
                .output()
                .expect("cat is installed");
            let stat = String::from_utf8_lossy(&child.stdout).into_owned();
            // Field 41 of proc_pid_stat(5); field 3 is the first after the name.
            let (_, rest) = stat.rsplit_once(')').expect("a stat line");
            (
                granted,
                rest.split_whitespace().nth(41 - 3).map(str::to_owned),
            )
        })
        .join()
        .expect("no panic");
        assert_eq!(policy.as_deref(), Some("0"), "{granted:?}");
    }
}
