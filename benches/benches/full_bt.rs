//! Wall time of every workload in mode `full`: full virtualization by binary translation.

mod common;

fn main() {
    common::bench_mode("full");
}
