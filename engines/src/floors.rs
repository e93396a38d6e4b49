//! Registry of floors: operations of the host alone, of which mode `para` is made.
//!
//! A floor is no mode and runs no guest. `trapline floor` does them on order, over the console
//! protocol that guests speak, so that a harness measures them exactly as it measures guests.
//! Invariant: a floor answers with how often it found its operation done, and never with what it
//! was asked for.

use std::io;

use pv::floor::{Faults, Maps, Notifications, syscalls};

/// Does an operation a number of times; answers with how often it found it done.
pub type Operation = Box<dyn FnMut(u64) -> io::Result<u64>>;

/// One operation of the host.
#[derive(Debug)]
pub struct Floor {
    /// Its name on the console and in csv.
    pub name: &'static str,
    /// What one operation is, in one line.
    pub about: &'static str,
    /// Readies it.
    pub start: fn() -> io::Result<Operation>,
}

/// The window's own cost: does nothing, as the workload of that name.
pub static EMPTY: Floor = Floor {
    name: "empty",
    about: "nothing",
    start: || Ok(Box::new(Ok)),
};

/// Every floor.
pub static FLOORS: &[Floor] = &[
    Floor {
        name: "host_syscall",
        about: "a system call of the host: getppid",
        start: || Ok(Box::new(|count| Ok(syscalls(count)))),
    },
    Floor {
        name: "notification",
        about: "a system call of one process that another answers (seccomp user notification)",
        start: || {
            let mut notifications = Notifications::start(true)?;
            Ok(Box::new(move |count| notifications.round_trips(count)))
        },
    },
    Floor {
        name: "map_page",
        about: "mmap of one page of a memory file in place of another",
        start: || {
            let mut maps = Maps::start()?;
            Ok(Box::new(move |count| Ok(maps.map(count))))
        },
    },
    Floor {
        name: "sigsegv",
        about: "a page fault, its SIGSEGV handler and the way back",
        start: || {
            let mut faults = Faults::start()?;
            Ok(Box::new(move |count| faults.round_trips(count)))
        },
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_floor_counts_what_it_has_done() {
        for floor in FLOORS.iter().chain([&EMPTY]) {
            let mut operation = (floor.start)().unwrap();
            for count in [1, 100, 0] {
                assert_eq!(operation(count).unwrap(), count, "{}", floor.name);
            }
        }
    }
}
