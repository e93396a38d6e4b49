//! Hand-made guests: what the system side of a processor promises, held test by test.
//!
//! | module | what |
//! |---|---|
//! | `kernel`, `run` | the guest around each test, and the ways to run it |
//! | `registers` | time-stamp counter, protection keys, sysenter, debug registers |
//! | `rig` | a bare CPU, driven instruction by instruction |
//! | `descriptors` | what loading a descriptor checks and changes |
//! | `nmi` | non-maskable interrupts |
//! | `exceptions` | frames, stacks, error codes, double and triple faults |
//! | `debug` | single steps, breakpoints, alignment checks |
//! | `access` | access rights of pages, case by case against a model |
//! | `paging` | accessed and dirty bits, permissions, invalidation |
//! | `privilege` | rings, system registers, segments |
//! | `transitions` | privilege changes and system registers that never leave translated code |
//! | `code` | self-modifying and remapped code, instructions across pages |
//! | `memory` | strings, device memory, ports, locked operations, SSE state |
//! | `interrupts` | timer, windows and shadows, task priority, kicks |
//! | `state` | what the engine shows of itself, and takes back |
//! | `protected` | 32-bit code |
//! | `real` | 16-bit code, gates, tasks, decimal arithmetic |
//! | `limits` | wild pointers, the code cache, loops that stay translated |

mod access;
mod code;
mod debug;
mod descriptors;
mod exceptions;
mod interrupts;
mod kernel;
mod limits;
mod memory;
mod nmi;
mod paging;
mod privilege;
mod protected;
mod real;
mod registers;
mod rig;
mod run;
mod state;
mod transitions;
