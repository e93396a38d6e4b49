//! What can be chosen about the machines of a run: how their disks are cached, whose interrupt
//! controllers they have and how their drivers notify.
//!
//! The defaults are what all modes have in common. Another choice concerns the modes that have it, and
//! is named wherever their figures are: in the label, the manifest and the report. Invariant: disks are
//! cached in one way for all contenders of a run.

use clap::ValueEnum;

/// What stands between a disk and its file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DiskCache {
    /// The host's page cache, warm: a device's own cost, and none of a medium's.
    #[default]
    Host,
    /// Nothing (O_DIRECT): the medium's cost too.
    Direct,
}

/// Whose interrupt controllers and timer guests under KVM have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Irqchip {
    /// The VMM's, as in every other mode.
    #[default]
    User,
    /// The host kernel's.
    Kernel,
}

/// How virtio drivers under KVM notify their device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Doorbell {
    /// By an exit, as in every other mode.
    #[default]
    Exit,
    /// By an eventfd of the host's kernel.
    Eventfd,
}

impl DiskCache {
    /// The manifest's words.
    pub fn text(self) -> &'static str {
        match self {
            DiskCache::Host => "page cache of the host, warm",
            DiskCache::Direct => "past the page cache (O_DIRECT)",
        }
    }
}

impl Irqchip {
    /// The name on the command line and in labels.
    pub fn name(self) -> &'static str {
        match self {
            Irqchip::User => "user",
            Irqchip::Kernel => "kernel",
        }
    }
}

impl Doorbell {
    /// The name on the command line and in labels.
    pub fn name(self) -> &'static str {
        match self {
            Doorbell::Exit => "exit",
            Doorbell::Eventfd => "eventfd",
        }
    }
}
