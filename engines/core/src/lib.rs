//! What every engine shares: guest memory, CPU state, exits and their counters, the device bus,
//! devices, image loaders and the run loop.
//!
//! Invariant: nothing here knows which engine runs the guest, which workload the guest runs, or
//! what time a measurement took.

mod addr;
pub mod exit;
pub mod kick;
pub mod state;
pub mod vcpu;

pub use addr::{GuestPhys, GuestVirt};
pub use exit::{Exit, ExitCounts, ExitKind, ExitReason};
pub use kick::Kick;
pub use state::{CpuState, DescriptorTable, Segment};
pub use vcpu::{Error, Unavailable, Vcpu};

/// Guest RAM: what vm-memory maps, used by every engine.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
