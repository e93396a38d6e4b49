//! Guest images, built from programs and guest and embedded.
//!
//! The build script compiles them (see there how and why); this crate only hands them out. It
//! knows no engine and no workload.

/// The `unaware` flavour: an ELF with a PVH entry point.
pub fn unaware() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/unaware.elf"))
}

/// The `hybrid` flavour: an ELF with a PVH entry point, as [`unaware`], with virtio drivers.
pub fn hybrid() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/hybrid.elf"))
}

/// The `aware` flavour: an ELF with a Trapline note, entered as `abi::hypercall::Start`
/// says.
pub fn aware() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/aware.elf"))
}

/// The baseline: an ordinary static Linux program that speaks the console protocol on its standard
/// input and output, with the same object code of the compute workloads.
pub fn native() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/native.elf"))
}
