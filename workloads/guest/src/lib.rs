//! The guest kernel: entry, page tables, traps, drivers.
