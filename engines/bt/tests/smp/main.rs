//! Several vCPUs of one VM, each on a thread of its own, over one guest memory and without a
//! machine: what they owe each other, held test by test. Each test has a control, a VM that lacks
//! the guarantee or a guest that asks for more than it is promised, in which it fails.
//!
//! | module | what |
//! |---|---|
//! | `vm` | the guests and how they are run |
//! | `atomics` | locked instructions, accesses that are whole |
//! | `code` | cross-modifying code, by other vCPUs and by devices |
//! | `order` | which orders of loads and stores can be seen |
//! | `paging` | accessed and dirty bits |
//! | `life` | vCPUs that wait for each other, move between threads, are stopped |

mod atomics;
mod code;
mod life;
mod order;
mod paging;
mod vm;
