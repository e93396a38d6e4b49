//! Hand-made guests: what the system side of a processor promises, held test by test.
//!
//! | module | what |
//! |---|---|
//! | `kernel`, `run` | the guest around each test, and the ways to run it |
//! | `registers` | time-stamp counter, protection keys, sysenter, debug registers |
//! | `msr` | model-specific registers by name |
//! | `rig` | a bare CPU, driven instruction by instruction |
//! | `branches` | near branches at the edges of a segment, instructions that are none |
//! | `descriptors` | what loading a descriptor checks and changes |
//! | `devices` | every form of memory operand on device memory |
//! | `direction` | the direction flag across everything that changes or carries it |
//! | `edges` | the last canonical address, operands beyond it, registers and encodings that aren't there |
//! | `nmi` | non-maskable interrupts |
//! | `exceptions` | frames, stacks, error codes, double and triple faults |
//! | `debug` | single steps, breakpoints, alignment checks |
//! | `traps` | single steps and breakpoints beside other debug conditions |
//! | `operands` | system instructions and port strings whose operand is device memory |
//! | `access` | access rights of pages, case by case against a model |
//! | `ports` | devices that are at hand while translated code runs |
//! | `paging` | accessed and dirty bits, permissions, invalidation |
//! | `reload` | loads of CR3, after which what was in use is looked up again |
//! | `precedence` | which of several exceptions comes, and null selectors
//! | `privilege` | rings, system registers, segments |
//! | `transitions` | privilege changes and system registers that never leave translated code |
//! | `code` | self-modifying and remapped code, instructions across pages |
//! | `stores` | every kind of store into code |
//! | `modified` | code written by strings, frames, page walks and devices, and data that becomes code |
//! | `strings` | movs and stos that translated code does by itself |
//! | `memory` | strings, device memory, ports, locked operations, SSE state |
//! | `interrupts` | timer, windows and shadows, task priority, kicks |
//! | `state` | what the engine shows of itself, and takes back |
//! | `protected` | 32-bit code |
//! | `legacy` | guests of 16 and 32 bits |
//! | `real` | 16-bit code, decimal arithmetic |
//! | `narrow` | instructions of 16-bit code, as QEMU has them |
//! | `switches` | faults of task switches, returns from nested tasks |
//! | `tasks` | gates, tasks, virtual-8086 mode, limits |
//! | `returns` | returns that remember where they went |
//! | `leaves` | callees in line with their callers |
//! | `carry` | CF in loops that count down |
//! | `shared` | accesses that share a lookup, and what else wants registers |
//! | `x87` | pointers of x87 exceptions |
//! | `limits` | wild pointers, the code cache, loops that stay translated |

mod access;
mod branches;
mod carry;
mod code;
mod debug;
mod descriptors;
mod devices;
mod direction;
mod edges;
mod exceptions;
mod halves;
mod interrupts;
mod kernel;
mod leaves;
mod legacy;
mod limits;
mod memory;
mod modified;
mod msr;
mod narrow;
mod nmi;
mod operands;
mod paging;
mod ports;
mod precedence;
mod privilege;
mod protected;
mod real;
mod registers;
mod reload;
mod returns;
mod rig;
mod run;
mod shared;
mod state;
mod stores;
mod strings;
mod switches;
mod tasks;
mod transitions;
mod traps;
mod x87;
