//! What a guest may cost its host: areas of the address space, processor time when idle, memory.

mod support;

use std::fs::read_to_string;
use std::io::Read;
use std::thread::{self, sleep};
use std::time::Duration;

use engine_core::host::console::Sink;
use engine_core::{Limits, Outcome};
use pv::Options;
use support::{start, start_with};

fn limits(seconds: u64) -> Limits {
    Limits {
        timeout: Some(Duration::from_secs(seconds)),
        max_exits: None,
    }
}

#[test]
fn two_hundred_thousand_pages_in_runs_take_few_areas_and_few_faults() {
    let mut guest = start("many-pages", None, &[]);
    let outcome = guest.run(&limits(30));
    let console = String::from_utf8_lossy(guest.console()).into_owned();
    assert!(
        matches!(outcome, Outcome::Success) && console == "ok\n",
        "{outcome:?} {console}"
    );
    let count = |reason: &str| {
        let totals = guest.totals();
        let found = totals.iter().find(|count| count.reason == reason);
        found.map_or(0, |count| count.count)
    };
    assert_eq!(count("eviction"), 0);
    // Sixteen pages a fault.
    let faults = count("shadow fault");
    assert!((12_500..13_500).contains(&faults), "{faults}");
}

/// Nanoseconds on a processor so far, by the clock of a process or a thread.
fn busy(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable for the duration of the call.
    assert_eq!(unsafe { libc::clock_gettime(clock, &mut time) }, 0);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn clock_of_process(pid: i32) -> libc::clockid_t {
    let mut clock = 0;
    // SAFETY: `clock` is writable for the duration of the call.
    assert_eq!(unsafe { libc::clock_getcpuclockid(pid, &mut clock) }, 0);
    clock
}

fn clock_of_this_thread() -> libc::clockid_t {
    let mut clock = 0;
    // SAFETY: as above; the thread is this one.
    let result = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
    assert_eq!(result, 0);
    clock
}

/// What is looked at of an idle guest at once: what idling takes of a processor shows only while time
/// passes.
const STRETCH: Duration = Duration::from_millis(130);

#[test]
fn an_idle_guest_takes_less_than_a_hundredth_of_a_processor() {
    let (mut said, console) = std::io::pipe().unwrap();
    let mut guest = start_with(
        "idle",
        Options {
            output: Sink::Descriptor(console.into()),
            ..Options::default()
        },
    );
    let mut clocks: Vec<_> = guest
        .processes()
        .into_iter()
        .map(clock_of_process)
        .collect();
    clocks.push(clock_of_this_thread());
    let watcher = thread::spawn(move || {
        let sum = || clocks.iter().map(|&clock| busy(clock)).sum::<u64>();
        // It says so, and idles for a second. The host's clocks count what else it does as well: the
        // quietest stretch says what idling takes.
        let mut line = [0; 5];
        said.read_exact(&mut line).expect("it idles");
        assert_eq!(&line, b"idle\n");
        let stretch = || {
            let before = sum();
            sleep(STRETCH);
            sum() - before
        };
        (0..5).map(|_| stretch()).min()
    });
    let outcome = guest.run(&limits(10));
    assert!(matches!(outcome, Outcome::Success), "{outcome:?}");
    // Nobody waits for a line any longer.
    drop(guest);
    let busy = watcher.join().expect("it measures").expect("a stretch");
    let most = STRETCH.as_nanos() as u64 / 100;
    assert!(busy < most, "{busy} ns of {STRETCH:?}");
}

/// Proportional set size of a process in KiB, without guest memory.
fn own_memory(pid: i32) -> u64 {
    // Another test's may have ended.
    let smaps = read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut guest_memory = false;
    let mut sum = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") if !guest_memory => {
                sum += words.next().map_or(0, |word| word.parse().unwrap_or(0));
            }
            Some(range) if !range.ends_with(':') => {
                guest_memory = line.contains("trapline-guest-ram");
            }
            _ => {}
        }
    }
    sum
}

#[test]
fn the_parties_take_less_than_16_mib_beside_guest_memory() {
    let mut guest = start("spin-user", None, &[]);
    let parties = guest.processes();
    let watcher = thread::spawn(move || {
        sleep(Duration::from_millis(300));
        // SAFETY: has no conditions.
        let vmm = unsafe { libc::getpid() };
        // The user process is V's child, as the others are: of the thread that runs the guest.
        let threads = std::fs::read_dir(format!("/proc/{vmm}/task")).expect("it lives");
        let others = threads.flatten().flat_map(|thread| {
            let children = read_to_string(thread.path().join("children")).unwrap_or_default();
            let pids = children.split_whitespace().map(str::parse);
            pids.flatten().collect::<Vec<i32>>()
        });
        let mut all: Vec<i32> = parties.into_iter().chain(others).collect();
        all.push(vmm);
        all.sort_unstable();
        all.dedup();
        assert!(all.len() >= 4, "{all:?}");
        all.into_iter().map(own_memory).sum::<u64>()
    });
    let outcome = guest.run(&Limits {
        timeout: Some(Duration::from_millis(800)),
        max_exits: None,
    });
    assert!(matches!(outcome, Outcome::Limit(_)), "{outcome:?}");
    let kib = watcher.join().expect("it measures");
    println!("{kib} KiB");
    assert!((100..16 << 10).contains(&kib), "{kib} KiB");
}
