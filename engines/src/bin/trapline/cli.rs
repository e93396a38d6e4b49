//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::devices::{Disk, Net};

/// The baseline's name on the command line.
pub(crate) const NATIVE: &str = "native";
/// Names an embedded image instead of a file.
pub(crate) const BUILTIN: &str = "builtin:";

const EXAMPLES: &str = "\
Examples:
  trapline probe
  trapline run --mode hardware --workload alu
  trapline run --mode hardware --workload sieve --size 100000 --iterations 10 --timeout 30
  trapline run --mode hardware --image builtin:unaware        (then type: run alu 0 0, quit 0)
  trapline run --mode para --workload sieve
  trapline run --mode full --kernel test.elf --cmdline 'all' --exit-port raw --timeout 60
  trapline run --mode hardware --kernel smp.elf --smp 4 --timeout 60
  trapline run --mode full --kernel xen --initrd 'vmlinuz console=hvc0,initrd.gz' --memory 1024
  trapline run --mode full --workload blk_seqread --disk disk.img,readonly
  trapline run --mode hybrid --workload net_rr --net tap:t0 --irqchip kernel --doorbell eventfd
  trapline run --mode hardware --image vmlinux --cmdline 'console=ttyS0' --stats-fd 3 3>stats.json

Exit status:
  0 guest success      1 guest failure      2 usage      3 mode unavailable on this host
  4 guest crashed      5 limit reached      128+N ended by signal N
  A guest that switches its machine off has ended with success, one that resets it with failure, unless
  it has left a shutdown code (5 or 0Ah in CMOS 0Fh) by which its firmware goes on at 40:67.";

/// Runs one guest in one virtualization mode, and counts what traps.
#[derive(Debug, Parser)]
#[command(name = "trapline", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a guest: its console is stdin and stdout
    #[command(after_help = EXAMPLES)]
    Run(Box<Run>),
    /// Say what this host can run, and how to mend what it can't
    Probe(Probe),
    /// Run ring-3 snippets through the translator and print their registers
    #[command(after_help = crate::insn::HELP)]
    Insn(Insn),
    /// List modes and workloads
    List,
    /// Do the host's own operations on order: what mode para is made of, without a guest
    ///
    /// Stdin and stdout are the console, as in a run; `list` names the operations, `run NAME 0 COUNT`
    /// does one COUNT times.
    Floor,
}

#[derive(Args, Debug)]
pub(crate) struct Run {
    /// How to run it
    #[arg(long, value_parser = modes())]
    pub(crate) mode: String,
    #[command(flatten)]
    pub(crate) guest: Guest,
    /// Size of the workload; 0 is its default
    #[arg(long, requires = "workload", default_value_t = 0)]
    pub(crate) size: u64,
    /// Iterations of the workload; 0 is its default
    #[arg(long, requires = "workload", default_value_t = 0)]
    pub(crate) iterations: u64,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub(crate) memory: u64,
    /// How many vCPUs the guest has; those beside the first wait for INIT and SIPI
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=i64::from(engines::MOST_CPUS)))]
    pub(crate) smp: u8,
    /// End the guest after this many seconds
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,
    /// End the guest after this many exits to the VMM, of all vCPUs together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max_exits: Option<u64>,
    /// Write counters as JSON lines to this descriptor
    #[arg(long, value_name = "FD")]
    pub(crate) stats_fd: Option<i32>,
    /// Disk: a raw image or block device; with ,readonly and ,direct (past the page cache)
    #[arg(long, value_name = "FILE[,OPTION]...")]
    pub(crate) disk: Option<Disk>,
    /// Network: a TAP device, or the datagram socket that a peer has bound
    #[arg(long, value_name = "tap:NAME|unix:PATH")]
    pub(crate) net: Option<Net>,
    /// Command line for the guest
    #[arg(long, value_name = "TEXT", conflicts_with = "workload")]
    pub(crate) cmdline: Option<String>,
    /// Modules for the kernel: files, each with what it is to be told of it, as "vmlinuz quiet,initrd.gz".
    /// A comma in a name is written twice, unless there is a file of just that name. May be repeated
    #[arg(long, value_name = "FILE [TEXT],...", requires = "kernel")]
    pub(crate) initrd: Vec<OsString>,
    /// Take the kernel for a flat binary, to be loaded at this address and entered there
    #[arg(long, value_name = "ADDRESS", requires = "kernel", value_parser = address)]
    pub(crate) load: Option<u64>,
    /// Write what the guest says at the debug console (port 0xe9) to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) debug_console: Option<PathBuf>,
    /// Whose interrupt controllers and timer the guest has
    #[arg(long, value_name = "WHOSE", value_enum, default_value_t = Irqchip::User)]
    pub(crate) irqchip: Irqchip,
    /// How drivers' notifications reach virtio devices
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Doorbell::Exit)]
    pub(crate) doorbell: Doorbell,
    /// Room for translated code and what is known of it, as 64K or 16M; default 64M (full, hybrid-bt)
    #[arg(long, value_name = "SIZE", value_parser = code_cache)]
    pub(crate) code_cache: Option<usize>,
    /// Count the branches and accesses that translated code does by itself too; slower (full, hybrid-bt)
    #[arg(long)]
    pub(crate) count_paths: bool,
    /// Hold every block against a second vCPU that goes one instruction at a time, and end where they
    /// differ; slow (full, hybrid-bt)
    #[arg(long, value_name = "REFERENCE", value_enum)]
    pub(crate) lockstep: Option<Reference>,
    /// What the guest's exit code becomes as exit status
    #[arg(long, value_name = "HOW", value_enum, default_value_t = ExitPort::Plain)]
    pub(crate) exit_port: ExitPort,
}

/// Whose interrupt controllers the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Irqchip {
    /// The VMM's, the same in every mode
    User,
    /// The host kernel's (KVM)
    Kernel,
}

impl From<Irqchip> for engine_core::Irqchip {
    fn from(choice: Irqchip) -> Self {
        match choice {
            Irqchip::User => engine_core::Irqchip::User,
            Irqchip::Kernel => engine_core::Irqchip::Kernel,
        }
    }
}

/// How a driver's notification reaches a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Doorbell {
    /// By an exit; the vCPU's thread serves it, the same in every mode
    Exit,
    /// By an eventfd of the host's kernel (KVM); an I/O thread serves it, and the guest runs on
    Eventfd,
}

impl From<Doorbell> for engine_core::Doorbell {
    fn from(choice: Doorbell) -> Self {
        match choice {
            Doorbell::Exit => engine_core::Doorbell::Exit,
            Doorbell::Eventfd => engine_core::Doorbell::Eventfd,
        }
    }
}

/// What a translator is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Reference {
    /// The translator itself, each instruction a block of its own
    Instructions,
    /// KVM, by single step; a backend that emulates ring 0 may lose it
    Hardware,
}

/// What a write to the exit port becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExitPort {
    /// 0 is success, all else failure
    Plain,
    /// Code c becomes exit status (c << 1) | 1, as with QEMU's isa-debug-exit, and a reset 4, which no
    /// code becomes; test devices as QEMU's pc-testdev come with it
    Raw,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct Guest {
    /// ELF image with a PVH note (para: a Trapline note), or builtin:FLAVOUR
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// Bare-metal kernel: Multiboot or PVH image, or a flat binary, which goes to 1 MiB
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Workload of the embedded image; `trapline list` names them
    #[arg(long, value_name = "NAME")]
    pub(crate) workload: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Probe {
    /// One JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Insn {
    /// Take cases from stdin, one JSON object a line
    #[arg(long, required = true)]
    pub(crate) batch: bool,
}

fn modes() -> PossibleValuesParser {
    let names = engines::MODES.iter().map(|mode| mode.name);
    PossibleValuesParser::new(names.chain([NATIVE]))
}

/// A number as C writes it: decimal, or hexadecimal after 0x.
fn address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("'{text}' is no address: {error}"))
}

/// A size: decimal, with K, M or G for the powers of 1024.
fn bytes(text: &str) -> Result<usize, String> {
    let wrong = || format!("'{text}' is no size: a number with K, M or G");
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(wrong()),
    };
    let number: usize = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn code_cache(text: &str) -> Result<usize, String> {
    let range = bt::Options::CODE_CACHE;
    let (least, most) = (range.start() >> 10, range.end() >> 20);
    bytes(text).and_then(|bytes| match range.contains(&bytes) {
        true => Ok(bytes),
        false => Err(format!("choose {least}K to {most}M")),
    })
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a number of seconds above 0");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses_are_decimal_or_hexadecimal() {
        assert_eq!(address("0x7c00"), Ok(0x7c00));
        assert_eq!(address("4096"), Ok(4096));
        for text in ["", "0x", "7c00", "-1"] {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_take_the_powers_of_1024() {
        assert_eq!(bytes("65536"), Ok(65536));
        assert_eq!(bytes("64K"), Ok(64 << 10));
        assert_eq!(bytes("16M"), Ok(16 << 20));
        for text in ["", "K", "-1", "1T", "1KK", "16 M", "99999999999999999999G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_positive_times_are_taken() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "nan", "inf", "1e300", "soon", ""] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
