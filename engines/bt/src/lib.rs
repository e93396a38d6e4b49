//! Dynamic binary translation: the engine of full virtualization.
//!
//! The guest's code, ring 0 included, is recompiled while it runs into code that is safe in an
//! unprivileged process: the guest is unaware, and /dev/kvm isn't needed. Same instruction set on
//! both sides, so most instructions run as themselves.
//!
//! | module | what |
//! |---|---|
//! | `features` | what CPUID and control registers say about an instruction |
//! | `decode` | guest bytes to a block: classes, registers, live flags |
//! | `lower` | a block to host code |
//! | `groups` | neighbouring accesses that share a lookup |
//! | `dispatch` | indirect branches of code that uses the window |
//! | `cache` | blocks, links between them, self-modifying code |
//! | `mmu`, `tlb`, `invalidation` | the guest's page tables, and the tables translated code looks into |
//! | `window`, `checks` | ring 3's memory at host addresses, and what is compared before its use |
//! | `core`, `system`, `cpu`, `fault` | privileged instructions and exceptions |
//! | `stubs`, `callout`, `signal`, `arena`, `context`, `site` | between translated code and Rust |
//! | `kick` | stopping a guest from outside |
//! | `x87` | whose x87 state is in the thread's registers |
//! | `privileged`, `transitions` | system registers that translated code reaches, privilege changes without Rust |
//! | `vcpu` | the run loop of it all |
//! | `vm`, `pages` | what the vCPUs of one VM share |
//! | `guest`, `pair` | guest memory as the runtime accesses it |
//! | `insn` | ring-3 snippets, one at a time |

mod arena;
mod cache;
#[allow(
    clippy::useless_conversion,
    reason = "dynasm! converts every register number, whatever its type"
)]
mod callout;
mod checks;
mod context;
mod core;
mod cpu;
mod decode;
#[allow(
    clippy::useless_conversion,
    reason = "dynasm! converts every register number, whatever its type"
)]
mod dispatch;
mod fault;
mod features;
mod groups;
mod guest;
pub mod insn;
mod invalidation;
mod kick;
#[allow(
    clippy::useless_conversion,
    reason = "dynasm! converts every register number, whatever its type"
)]
mod lower;
mod mmu;
mod pages;
mod pair;
mod privileged;
mod signal;
mod site;
#[allow(
    clippy::useless_conversion,
    reason = "dynasm! converts every register number, whatever its type"
)]
mod stubs;
mod system;
mod tlb;
#[allow(
    clippy::useless_conversion,
    reason = "dynasm! converts every register number, whatever its type"
)]
mod transitions;
mod vcpu;
mod vm;
mod window;
mod x87;

pub use vcpu::{BtVcpu, Extended, Options, UserStop};
#[cfg(feature = "testing")]
pub use vm::Guarantee;
