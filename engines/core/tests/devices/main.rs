//! Disk and network devices, driven through their registers as a guest's driver does it.
//!
//! | module | what |
//! |---|---|
//! | `backing` | disks in memory with faults to order, networks in memory |
//! | `virtio` | a small virtio driver over MMIO |
//! | `block`, `net`, `console`, `transport` | what virtio devices promise |
//! | `ata`, `ne2000` | what a PC's disk and network card promise |
//! | `properties` | the same against models, for requests of all shapes |
//! | `fuzz`, `fuzz_virtio`, `fuzz_pc` | hostile drivers by the thousand |

mod ata;
mod backing;
mod block;
mod console;
mod fuzz;
mod fuzz_pc;
mod fuzz_virtio;
mod ne2000;
mod net;
mod properties;
mod transport;
mod virtio;
