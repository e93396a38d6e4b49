//! Port and memory accesses, as kvm_run describes them (api.rst 5, KVM_EXIT_IO and KVM_EXIT_MMIO).

use engine_core::{Exit, GuestPhys};
use kvm_bindings as kb;

/// The port or memory access that `run` describes.
pub(crate) fn access(run: &mut kb::kvm_run) -> Exit<'_> {
    if run.exit_reason == kb::KVM_EXIT_MMIO {
        let priority = run.cr8 as u8;
        // SAFETY: the exit reason says that `mmio` is the union's valid member.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        let addr = GuestPhys(mmio.phys_addr);
        let length = (mmio.len as usize).min(mmio.data.len());
        let data = &mut mmio.data[..length];
        return if mmio.is_write != 0 {
            Exit::MmioWrite { addr, data }
        } else {
            Exit::MmioRead {
                addr,
                data,
                priority,
            }
        };
    }
    // SAFETY: the exit reason says that `io` is the union's valid member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = usize::from(io.size) * io.count as usize;
    // SAFETY: `data_offset` leads from the start of kvm_run to `size * count` bytes inside the
    // same mapping (api.rst 5, KVM_EXIT_IO), which is longer than the structure. The slice borrows
    // `run` and so the vCPU, and KVM leaves the bytes alone until the next KVM_RUN.
    let data = unsafe {
        let start = std::ptr::from_mut(run)
            .cast::<u8>()
            .add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(start, length)
    };
    if u32::from(io.direction) == kb::KVM_EXIT_IO_IN {
        Exit::PioIn {
            port: io.port,
            size: io.size,
            data,
        }
    } else {
        Exit::PioOut {
            port: io.port,
            size: io.size,
            data,
        }
    }
}
