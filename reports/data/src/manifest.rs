//! `manifest.json`: under which circumstances a run was measured.
//!
//! Facts that a host does not tell are `None`, never guessed. [`Manifest::collect`] reads what can
//! be read; modes, images and tools are the caller's to add. No clock is read here: the caller
//! says when the run began and how long it took.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, SCHEMA_VERSION, host, json};

/// Everything that `manifest.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`] of the writer.
    pub schema_version: u32,
    /// Name of the run: the value of column `run`.
    pub run: String,
    /// When the run began, RFC 3339 in UTC.
    pub started: String,
    /// How long it took; `None` while it lasts, and for ever if it was cut off.
    pub duration_s: Option<f64>,
    /// The exact command, one element per argument.
    pub command: Vec<String>,
    /// Seed of everything random, the bootstrap included.
    pub seed: u64,
    /// The machine.
    pub host: Host,
    /// What stands behind /dev/kvm.
    pub kvm: Kvm,
    /// The source tree that was built.
    pub source: Source,
    /// How it was built.
    pub build: Build,
    /// Name of an image -> sha256 in hex.
    pub images: BTreeMap<String, String>,
    /// Every mode, peer and the baseline that the run was asked for, in the order to show them.
    pub modes: Vec<ModeInfo>,
    /// What the devices of every contender stand on; `None` in a run without I/O workloads.
    #[serde(default)]
    pub backing: Option<Backing>,
    /// Name of a tool -> its version ("qemu-system-x86_64" -> "QEMU emulator version ...").
    pub tools: BTreeMap<String, String>,
}

/// The machine that measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Host {
    /// `model name` of /proc/cpuinfo.
    pub cpu_model: Option<String>,
    /// Logical processors online.
    pub cpus: Option<u32>,
    /// `microcode` of /proc/cpuinfo.
    pub microcode: Option<String>,
    /// Kernel release and version.
    pub kernel: Option<String>,
    /// Total memory in MiB.
    pub memory_mib: Option<u64>,
    /// Name in /sys/devices/system/cpu/vulnerabilities -> state.
    pub mitigations: BTreeMap<String, String>,
    /// Frequency governor of cpu0.
    pub governor: Option<String>,
    /// Current clock source.
    pub clocksource: Option<String>,
    /// True if the CPU says that it is itself virtual (flag `hypervisor`).
    pub virtualized: Option<bool>,
    /// Steal time of all processors before the run, in clock ticks (/proc/stat).
    pub steal_ticks_before: Option<u64>,
    /// Steal time after the run.
    pub steal_ticks_after: Option<u64>,
}

/// What stands behind /dev/kvm.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kvm {
    /// `intel`, `amd`, `pvm`, or `None` if no known backend is loaded.
    pub backend: Option<String>,
    /// Whether this process may open /dev/kvm for reading and writing.
    pub accessible: bool,
}

/// The source tree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Source {
    /// Commit of the tree, from git.
    pub revision: Option<String>,
    /// True if tracked files differ from that commit.
    pub dirty: Option<bool>,
}

/// How the programs were built.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Build {
    /// `rustc --version`.
    pub rustc: Option<String>,
    /// Cargo profile ("release").
    pub profile: String,
}

/// What devices stand on, the same for every contender.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Backing {
    /// File system of the disks' files, from /proc/self/mountinfo.
    pub filesystem: Option<String>,
    /// What stands between a device and the file system.
    pub caching: String,
    /// What the network cards are connected to.
    pub network: String,
    /// Mebibytes of each disk.
    pub disk_mib: u64,
}

/// One column of the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModeInfo {
    /// Value of column `mode`.
    pub name: String,
    /// What to show: carries the backend where KVM is involved, "KVM (pvm)".
    pub label: String,
    /// What runs the guest.
    pub engine: String,
    /// How the guest reaches its machine.
    pub flavour: String,
    /// What it is to the comparison.
    pub role: Role,
    /// Whose interrupt controllers its guests have: `user` (the VMM's) or `kernel`; `None` where there
    /// are none, or nobody says.
    #[serde(default)]
    pub irqchip: Option<String>,
    /// How paravirtual drivers notify their devices: `exit`, `eventfd` or `hypercall`; `None` where
    /// nothing is paravirtual, or nobody says.
    #[serde(default)]
    pub doorbell: Option<String>,
}

crate::words::words! {
    /// What a column of the report is to the comparison.
    Role ("role") {
        /// The workload as an ordinary process.
        Baseline = "baseline",
        /// One of the modes that are compared.
        Mode = "mode",
        /// A VMM that others wrote.
        Peer = "peer",
        /// The host's own operations: no column, but what columns are held against.
        Floor = "floor",
    }
}

/// What [`Manifest::collect`] can't find out by itself.
#[derive(Clone, Debug)]
pub struct Circumstances<'a> {
    /// Name of the run.
    pub run: &'a str,
    /// When it begins, in seconds since 1970-01-01T00:00:00Z.
    pub started_unix_s: u64,
    /// The exact command.
    pub command: Vec<String>,
    /// Seed of everything random.
    pub seed: u64,
    /// Cargo profile of what is measured.
    pub profile: &'a str,
    /// Root of the source tree, for git.
    pub source_tree: &'a Path,
}

impl Manifest {
    /// A manifest with the facts of this host, source tree and toolchain. Never fails: what can't
    /// be read is `None`. `modes`, `images`, `backing` and `tools` are empty, for the caller to fill.
    pub fn collect(circumstances: Circumstances<'_>) -> Manifest {
        Manifest {
            schema_version: SCHEMA_VERSION,
            run: circumstances.run.to_owned(),
            started: host::rfc3339(circumstances.started_unix_s),
            duration_s: None,
            command: circumstances.command,
            seed: circumstances.seed,
            host: host::collect_host(),
            kvm: host::collect_kvm(),
            source: host::collect_source(circumstances.source_tree),
            build: Build {
                rustc: host::tool_version("rustc", "--version"),
                profile: circumstances.profile.to_owned(),
            },
            images: BTreeMap::new(),
            modes: Vec::new(),
            backing: None,
            tools: BTreeMap::new(),
        }
    }

    /// Closes the manifest: duration, and steal time read again.
    pub fn finish(&mut self, duration_s: f64) {
        self.duration_s = Some(duration_s);
        self.host.steal_ticks_after = host::steal_ticks();
    }

    /// Label of a mode: as listed, or its bare name if the manifest does not know it.
    pub fn label<'a>(&'a self, mode: &'a str) -> &'a str {
        let info = self.modes.iter().find(|info| info.name == mode);
        info.map_or(mode, |info| &info.label)
    }

    /// Reads `manifest.json`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Json`] for malformed JSON or another schema version.
    pub fn read(path: &Path) -> Result<Manifest, Error> {
        let manifest: Manifest = json::read(path)?;
        json::check_version(path, manifest.schema_version)?;
        Ok(manifest)
    }

    /// Writes `manifest.json`, replacing the file at once. Write it before the first sample and
    /// again after [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        json::write(path, self)
    }
}
