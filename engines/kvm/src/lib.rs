//! Hardware-assisted virtualization through /dev/kvm.
//!
//! "Hardware" is what stands behind /dev/kvm, which need not be VMX or SVM: [`probe`] finds out
//! and [`Backend`] names it, and that name belongs to every figure taken here.
//!
//! [`KvmVcpu`] is one VM with one vCPU. Interrupt control is left to the VMM (no in-kernel
//! irqchip), so the machine is the same as every other engine's; KVM adds what it counts itself
//! ([`stats`]).
//!
//! Sources: Documentation/virt/kvm/api.rst, by section number where one is cited.

mod backend;
mod cpuid;
mod kick;
mod registers;
pub mod stats;
mod vcpu;

pub use backend::{Backend, Host, probe, probe_device};
pub use vcpu::{KvmVcpu, Options};
