//! The processes and memory files of a running `trapline`, and that nothing of them is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the parties may take to come up, and what is left to go.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the names of all memory files of a guest begin with.
const FILES: &str = "memfd:trapline";

/// A VMM's child processes and the memory files of all.
#[derive(Debug)]
pub(crate) struct Parties {
    /// Process ids of the children, oldest first: zygote, kernel, then user processes.
    pub(crate) children: Vec<u32>,
    vmm: u32,
    files: BTreeSet<u64>,
}

impl Parties {
    /// Waits until the VMM has `count` children that are what they are to be, and notes what there is.
    pub(crate) fn of(vmm: u32, count: usize) -> Self {
        let start = Instant::now();
        let children = loop {
            let children = children(vmm);
            if children.len() >= count && children.iter().all(|pid| name(*pid).is_some()) {
                break children;
            }
            assert!(start.elapsed() < PATIENCE, "{children:?} of {count}");
            std::thread::sleep(Duration::from_millis(5));
        };
        let files = children.iter().chain([&vmm]).flat_map(|pid| files(*pid));
        let parties = Parties {
            vmm,
            files: files.collect(),
            children,
        };
        assert!(!parties.files.is_empty(), "guest memory is a memory file");
        parties
    }

    /// The oldest child whose program is `name`.
    pub(crate) fn named(&self, name: &str) -> u32 {
        let named = |pid: &&u32| self::name(**pid).as_deref() == Some(name);
        *self.children.iter().find(named).expect(name)
    }

    /// Resident memory of the VMM and of each child that lives, in KiB.
    pub(crate) fn resident_kib(&self) -> Vec<u64> {
        let pids = self.children.iter().chain([&self.vmm]);
        pids.map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let word = line.and_then(|line| line.split_whitespace().next());
            word.map_or(0, |word| word.parse().unwrap())
        })
        .collect()
    }

    /// Processor time that the VMM itself has used.
    pub(crate) fn vmm_time(&self) -> Duration {
        let status = fs::read_to_string(format!("/proc/{}/stat", self.vmm)).unwrap();
        let (_, fields) = status.rsplit_once(") ").unwrap();
        // utime and stime of proc_pid_stat(5), counted from the state; user space has 100 ticks a second.
        let ticks = fields.split(' ').skip(11).take(2);
        let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// No process is left, and nobody has one of the files open or mapped.
    #[track_caller]
    pub(crate) fn assert_gone(&self) {
        let start = Instant::now();
        loop {
            let alive: Vec<&u32> = self.children.iter().filter(|pid| alive(**pid)).collect();
            let users: Vec<u32> = processes()
                .filter(|pid| files(*pid).any(|file| self.files.contains(&file)))
                .collect();
            if alive.is_empty() && users.is_empty() {
                return;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "left: processes {alive:?}, users of memory files {users:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn children(parent: u32) -> Vec<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let list = fs::read_to_string(path).unwrap();
    list.split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

/// The program of a party, as its memory file is called; `None` before it has become one. Not its
/// command line, which it has unmapped with everything else.
fn name(pid: u32) -> Option<String> {
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = program.to_str()?.strip_prefix("/memfd:")?;
    Some(name.split(' ').next()?.to_owned())
}

/// A zombie that its new parent has not reaped yet runs no more.
fn alive(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(status) => !status.contains(") Z "),
        Err(_) => Path::new(&format!("/proc/{pid}")).exists(),
    }
}

fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Inodes of the guests' memory files that a process has mapped or open.
fn files(pid: u32) -> impl Iterator<Item = u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mapped: Vec<u64> = maps
        .lines()
        .filter(|line| line.contains(FILES))
        .filter_map(|line| line.split_whitespace().nth(4)?.parse().ok())
        .collect();
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            use std::os::unix::fs::MetadataExt;
            let path = entry.ok()?.path();
            let name = fs::read_link(&path).ok()?;
            let ours = name.to_str()?.contains(FILES);
            ours.then(|| fs::metadata(&path).ok())?
                .map(|file| file.ino())
        });
    mapped.into_iter().chain(open.collect::<Vec<_>>())
}
