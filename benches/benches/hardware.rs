//! Wall time of every workload in mode `hardware`: hardware-assisted virtualization through KVM.

mod common;

fn main() {
    common::bench_mode("hardware");
}
