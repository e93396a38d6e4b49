//! Wall time of every workload in mode `native`: the native baseline.

mod common;

fn main() {
    common::bench_mode("native");
}
