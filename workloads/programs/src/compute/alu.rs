//! `alu`: integer arithmetic in registers, with branches that depend on the data. No memory.

use super::nothing;
use crate::{Group, Ring, Workload, mix, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "alu",
    group: Group::Compute,
    ring: Ring::User,
    size: 20_000,
    iterations: 200,
    operation: "SIZE rounds of adds, xors, rotates and a multiply, in registers",
    program: Program::Compute {
        words: |_| Some(0),
        limit: 1 << 40,
        prepare: nothing,
        run,
    },
};

#[inline(never)]
fn run(_arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    let mut sum = 0;
    let (mut a, mut b, mut c) = (0x0123_4567_89ab_cdef_u64, 0xfedc_ba98_7654_3210_u64, 1_u64);
    for _ in 0..iterations {
        for _ in 0..size {
            a = a.wrapping_add(b.rotate_left(7));
            b ^= a >> 3;
            c = c.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(b | 1);
            // Taken once in eight: a branch, not a conditional move, since the arm is long.
            if c >> 61 == 0 {
                a = mix(a, c);
                b = mix(b, a).rotate_right(9);
                c = mix(c, b);
            }
            b = b.wrapping_sub(c.rotate_right(19));
        }
        sum = mix(sum, a ^ b ^ c);
    }
    sum
}
