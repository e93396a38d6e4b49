//! Wall time of every workload in mode `para`: an aware guest, deprivileged, that asks by hypercall.

mod common;

fn main() {
    common::bench_mode("para");
}
