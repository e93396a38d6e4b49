//! Wall time of every workload in mode `hybrid`: hardware for the processor, paravirtual devices.

mod common;

fn main() {
    common::bench_mode("hybrid");
}
