//! What every engine shares: guest memory, CPU state, exits and their counters, the device bus,
//! devices, image loaders and the run loop.
//!
//! Invariant: nothing here knows which engine runs the guest, which workload the guest runs, or
//! what time a measurement took.

mod addr;
pub mod buffer;
pub mod bus;
pub mod clock;
pub mod cpuid;
pub mod devices;
pub mod dma;
pub mod doorbell;
pub mod exit;
pub mod host;
pub mod interrupt;
pub mod kick;
pub mod loader;
pub mod lockstep;
pub mod machine;
pub mod memory;
pub mod net;
pub mod peripherals;
pub mod run;
mod schedule;
mod seats;
pub mod state;
pub mod storage;
pub mod tally;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vcpu;
mod window;

pub use addr::{GuestPhys, GuestVirt};
pub use clock::Clock;
pub use doorbell::{Doorbell, Doorbells};
pub use exit::{Exit, ExitCounts, ExitKind, ExitReason};
pub use interrupt::{Interrupts, Line};
pub use kick::Kick;
pub use machine::{Machine, MachineOptions};
pub use run::{Crew, Limit, Limits, Outcome, drive};
pub use state::{CpuState, DescriptorTable, Segment};
pub use vcpu::{After, DeviceBus, Error, Irqchip, Stepping, Supply, Unavailable, Vcpu};

/// Guest RAM: what vm-memory maps, used by every engine.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
