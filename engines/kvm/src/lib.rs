//! Hardware-assisted virtualization through /dev/kvm.
//!
//! "Hardware" is what stands behind /dev/kvm, which need not be VMX or SVM: [`probe`] finds out
//! and [`Backend`] names it, and that name belongs to every figure taken here.
//!
//! [`KvmVcpu`] is a vCPU of one VM, which has one or several. Interrupt control is left to the VMM unless KVM's own
//! controllers are asked for ([`Options::irqchip`]): so the machine is the same as every other
//! engine's, and every access and interrupt is counted. KVM adds what it counts itself ([`stats`]).
//!
//! Sources: Documentation/virt/kvm/api.rst, by section number where one is cited.

mod access;
mod backend;
mod cpuid;
mod doorbell;
mod irqchip;
mod kick;
mod msr;
mod posted;
mod registers;
pub mod stats;
mod vcpu;

pub use backend::{Backend, Host, probe, probe_device};
pub use doorbell::probe_doorbells;
pub use irqchip::probe_irqchip;
pub use vcpu::{KvmVcpu, Options};
