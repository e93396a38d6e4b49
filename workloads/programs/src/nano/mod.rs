//! Nano workloads: one privileged operation per iteration.
//!
//! Each file holds the loop of one operation, generic over the machine. What an operation returns
//! is folded in the loop; what it leaves behind is folded once, by [`Platform::settle`].

pub mod callret;
pub mod cli_sti;
pub mod cpuid;
pub mod cr3_reload;
pub mod cr3_touch;
pub mod cr8wr;
pub mod divzero;
pub mod hypercall;
pub mod int3;
pub mod invlpg;
mod pages;
pub mod pgfault;
pub mod port_in;
pub mod port_out;
pub mod ptemod;
pub mod pushf_popf;
pub mod rep_movsb;
pub mod rep_stosq;
pub mod syscall;

pub use pages::Pages;

use crate::{Platform, Refusal};

/// Word at the start of the probe page's frame A.
pub const WORD_A: u64 = 0xaaaa_0000_5555_0001;
/// Word at the start of the probe page's frame B.
pub const WORD_B: u64 = 0xbbbb_0000_6666_0002;

/// A privileged operation. Each says which state it starts from, and what settling returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Settles with 0.
    Syscall,
    /// Settles with 0.
    Hypercall,
    /// Starts with [`port_in::VALUE`] in the scratch register; settles with 0.
    In,
    /// Settles with what the scratch register reads.
    Out,
    /// Settles with 0.
    Cpuid,
    /// Starts with the probe page's translation to frame A in use and its entry changed to frame
    /// B; settles with the word that the page reads.
    Cr3Reload,
    /// As [`Operation::Cr3Reload`].
    Invlpg,
    /// Starts with the probe page not present and the count of faults 0; settles with the count.
    PageFault,
    /// Starts with the count of faults 0; settles with the count.
    DivZero,
    /// Settles with 0.
    CallRet,
    /// Settles with what CR8 reads.
    Cr8Write,
    /// Starts with the probe page mapped to frame A; settles with the word that the page reads
    /// once invalidated.
    PteMod,
    /// Settles with 1 if interrupts are unmasked, else 0; leaves them masked.
    CliSti,
    /// Starts with the count of breakpoints 0; settles with the count.
    Int3,
    /// As [`Operation::Cr3Reload`].
    Cr3Touch,
    /// Settles with 0.
    PushfPopf,
    /// Starts and settles as [`Pages`] says.
    RepMovsb,
    /// As [`Operation::RepMovsb`].
    RepStosq,
}

impl Operation {
    /// Does it `iterations` times.
    #[inline]
    pub(crate) fn run<P: Platform>(
        self,
        platform: &mut P,
        iterations: u64,
    ) -> Result<u64, Refusal> {
        Ok(match self {
            Operation::Syscall => platform.syscalls(iterations)?,
            Operation::Hypercall => hypercall::calls(platform, iterations),
            Operation::In => port_in::reads(platform, iterations),
            Operation::Out => port_out::writes(platform, iterations),
            Operation::Cpuid => cpuid::reads(platform, iterations),
            Operation::Cr3Reload => cr3_reload::reloads(platform, iterations),
            Operation::Invlpg => invlpg::invalidations(platform, iterations),
            Operation::PageFault => platform.page_faults(iterations)?,
            Operation::DivZero => platform.divide_errors(iterations)?,
            Operation::CallRet => callret::calls(platform, iterations),
            Operation::Cr8Write => cr8wr::writes(platform, iterations),
            Operation::PteMod => platform.modify_entries(iterations)?,
            Operation::CliSti => cli_sti::pairs(platform, iterations),
            Operation::Int3 => platform.breakpoints(iterations)?,
            Operation::Cr3Touch => cr3_touch::touches(platform, iterations),
            Operation::PushfPopf => pushf_popf::pairs(platform, iterations),
            Operation::RepMovsb => rep_movsb::copies(platform, iterations),
            Operation::RepStosq => rep_stosq::fills(platform, iterations),
        })
    }
}
