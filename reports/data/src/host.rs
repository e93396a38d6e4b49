//! Facts about this host, read from /proc, /sys, git and rustc. Whatever is absent is `None`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::manifest::{Host, Kvm, Source};

pub(crate) fn collect_host() -> Host {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo_field(&cpuinfo, "flags");
    let steal = steal_ticks();
    Host {
        cpu_model: cpuinfo_field(&cpuinfo, "model name"),
        cpus: std::thread::available_parallelism()
            .ok()
            .and_then(|n| u32::try_from(n.get()).ok()),
        microcode: cpuinfo_field(&cpuinfo, "microcode"),
        kernel: kernel(),
        memory_mib: fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| memory_mib(&text)),
        mitigations: mitigations(),
        governor: line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        clocksource: line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        virtualized: flags.map(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor")),
        steal_ticks_before: steal,
        steal_ticks_after: None,
    }
}

pub(crate) fn collect_kvm() -> Kvm {
    let loaded = |backend: &&str| Path::new(&format!("/sys/module/kvm_{backend}")).is_dir();
    Kvm {
        backend: ["intel", "amd", "pvm"]
            .iter()
            .find(|backend| loaded(backend))
            .map(|backend| (*backend).to_owned()),
        accessible: fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok(),
    }
}

pub(crate) fn collect_source(tree: &Path) -> Source {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(tree).args(arguments);
        output(command)
    };
    Source {
        revision: git(&["rev-parse", "HEAD"]).filter(|revision| !revision.is_empty()),
        dirty: git(&["status", "--porcelain", "--untracked-files=no"])
            .map(|changes| !changes.is_empty()),
    }
}

/// Steal time of all processors together, in clock ticks: field 8 of line `cpu` in /proc/stat
/// (proc_stat(5)).
pub(crate) fn steal_ticks() -> Option<u64> {
    parse_steal(&fs::read_to_string("/proc/stat").ok()?)
}

fn parse_steal(stat: &str) -> Option<u64> {
    let cpu = stat.lines().find(|line| line.starts_with("cpu "))?;
    cpu.split_whitespace().nth(8)?.parse().ok()
}

fn memory_mib(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

fn kernel() -> Option<String> {
    let release = line("/proc/sys/kernel/osrelease")?;
    Some(match line("/proc/sys/kernel/version") {
        Some(version) => format!("{release} {version}"),
        None => release,
    })
}

fn mitigations() -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") else {
        return BTreeMap::new();
    };
    let entries = entries.filter_map(Result::ok);
    entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, line(entry.path())?))
        })
        .collect()
}

fn cpuinfo_field(cpuinfo: &str, field: &str) -> Option<String> {
    cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == field).then(|| value.trim().to_owned())
    })
}

fn line(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

/// Type of the file system that a path lies on: the last mount in /proc/self/mountinfo whose mount
/// point the path begins with (proc_pid_mountinfo(5)).
pub fn file_system(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    type_of(&fs::read_to_string("/proc/self/mountinfo").ok()?, &path)
}

fn type_of(mounts: &str, path: &Path) -> Option<String> {
    let mounts = mounts.lines().filter_map(|line| {
        // Optional fields end with a hyphen; the type follows.
        let (place, kind) = line.split_once(" - ")?;
        let point = Path::new(place.split(' ').nth(4)?);
        let depth = point.components().count();
        path.starts_with(point)
            .then(|| (depth, kind.split(' ').next()))
    });
    // The last of the deepest covers the others.
    let (_, kind) = mounts.max_by_key(|(depth, _)| *depth)?;
    kind.map(str::to_owned)
}

/// First line that `program argument` prints, if it ends well; `None` if it is not installed.
pub fn tool_version(program: &str, argument: &str) -> Option<String> {
    let mut command = Command::new(program);
    command.arg(argument);
    let text = output(command)?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

fn output(mut command: Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    if !output.status.success() {
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// SHA-256 of `bytes`, 64 hex digits: what [`crate::Manifest::images`] holds.
pub fn sha256_hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since 1970 as `2026-01-31T23:59:59Z`.
///
/// Days become a date by the algorithm of Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms" (civil_from_days), which counts years from March.
pub(crate) fn rfc3339(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_lies_on_the_deepest_mount_that_covers_it() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      40 22 0:30 / /tmp rw - tmpfs tmpfs rw\n\
                      41 22 0:31 / /tm rw - btrfs none rw\n\
                      42 22 0:32 / /tmp rw master:2 - xfs /dev/vdb rw\n";
        for (path, kind) in [("/tmp/a", "xfs"), ("/tmpfile", "ext4"), ("/tm", "btrfs")] {
            assert_eq!(type_of(mounts, Path::new(path)).as_deref(), Some(kind));
        }
    }

    #[test]
    fn dates_cross_leap_days_and_year_ends() {
        for (unix_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix_s), text);
        }
    }

    #[test]
    fn steal_is_the_eighth_figure_of_the_first_line() {
        let stat = "cpu  1 2 3 4 5 6 7 88 9 10\ncpu0 1 2 3 4 5 6 7 44 9 10\n";
        assert_eq!(parse_steal(stat), Some(88));
        assert_eq!(parse_steal("cpu  1 2 3\n"), None);
        assert_eq!(parse_steal(""), None);
    }

    #[test]
    fn cpuinfo_fields_are_found_by_whole_name() {
        let cpuinfo = "model\t\t: 17\nmodel name\t: A CPU: fast\nmicrocode\t: 0x1\n";
        assert_eq!(
            cpuinfo_field(cpuinfo, "model name").as_deref(),
            Some("A CPU: fast")
        );
        assert_eq!(cpuinfo_field(cpuinfo, "flags"), None);
    }

    #[test]
    fn sha256_of_abc_is_the_standards_example() {
        // FIPS 180-4, example of "abc".
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn absent_tools_are_none() {
        assert_eq!(tool_version("no-such-tool-anywhere", "--version"), None);
        let source = collect_source(Path::new("/nonexistent"));
        assert_eq!(source, Source::default());
    }
}
