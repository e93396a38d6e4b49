//! `sse_matmul`: a product of f64 matrices with SSE2. Vector loads, multiplies and adds.
//!
//! The inner loop runs along rows, so it vectorises without reordering any sum: the result is the
//! same to the last bit on every machine that follows IEEE 754 (Rust never contracts a
//! multiplication and an addition into one).

use super::Random;
use crate::{Group, Ring, Workload, mix, workload::Program};

pub(crate) const WORKLOAD: Workload = Workload {
    name: "sse_matmul",
    group: Group::Compute,
    ring: Ring::User,
    size: 64,
    iterations: 40,
    operation: "product of two SIZE x SIZE matrices of f64",
    program: Program::Compute {
        words: |size| size.checked_mul(size)?.checked_mul(3),
        limit: u64::MAX,
        prepare,
        run,
    },
};

/// Left factor, right factor, product: each `size` squared elements, row by row.
fn matrices(arena: &mut [u64], size: usize) -> Option<(&mut [f64], &mut [f64], &mut [f64])> {
    let square = size.checked_mul(size)?;
    let words = arena.get_mut(..square.checked_mul(3)?)?;
    // SAFETY: the same memory, exclusively borrowed; f64 has the size and alignment of u64 and no
    // invalid values.
    let floats =
        unsafe { core::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<f64>(), words.len()) };
    let (left, rest) = floats.split_at_mut_checked(square)?;
    let (right, product) = rest.split_at_mut_checked(square)?;
    Some((left, right, product))
}

/// A number in [-1, 1) from the top bits of a word.
fn unit(word: u64) -> f64 {
    (word as i64 >> 11) as f64 * (1.0 / (1u64 << 52) as f64)
}

#[inline(never)]
fn prepare(arena: &mut [u64], size: u64, _iterations: u64) -> u64 {
    let Some((left, right, _)) = matrices(arena, size as usize) else {
        return 0;
    };
    let mut random = Random::new(0x6d61_746d_756c);
    for element in left.iter_mut().chain(right) {
        *element = unit(random.next());
    }
    size
}

#[inline(never)]
fn run(arena: &mut [u64], size: u64, iterations: u64) -> u64 {
    // A row is never empty: sizes are resolved to at least 1.
    let size = (size as usize).max(1);
    let Some((left, right, product)) = matrices(arena, size) else {
        return 0;
    };
    let mut sum = 0;
    for iteration in 0..iterations {
        multiply(left, right, product, size);
        for element in product.iter() {
            sum = mix(sum, element.to_bits());
        }
        // One element of the left factor changes each time, so that no two products are alike.
        if let Some(element) = left.get_mut(iteration as usize % (size * size)) {
            *element = unit(sum);
        }
    }
    sum
}

#[inline(never)]
fn multiply(left: &[f64], right: &[f64], product: &mut [f64], size: usize) {
    let rows = left.chunks_exact(size).zip(product.chunks_exact_mut(size));
    for (left_row, product_row) in rows {
        for element in product_row.iter_mut() {
            *element = 0.0;
        }
        for (&factor, right_row) in left_row.iter().zip(right.chunks_exact(size)) {
            for (element, &other) in product_row.iter_mut().zip(right_row) {
                *element += factor * other;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplies_matrices() {
        let mut product = [0.0; 4];
        multiply(
            &[1.0, 2.0, 3.0, 4.0],
            &[5.0, 6.0, 7.0, 8.0],
            &mut product,
            2,
        );
        assert_eq!(product, [19.0, 22.0, 43.0, 50.0]);
    }
}
