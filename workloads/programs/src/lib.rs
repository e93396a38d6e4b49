//! Workload logic over a [`Platform`], and the [`CATALOGUE`].
//!
//! Pure `no_std` logic: the same functions run in a guest, in a native process and as the oracle
//! in tests. A workload never knows which mode it runs in.
//!
//! - `compute/`: kernels that need nothing but an arena. They are plain functions, compiled once
//!   into this crate's object, so guest and native process contain the same machine code.
//! - `nano/`: one privileged operation per iteration, generic over [`Platform`], so each machine
//!   gets a loop in which its own way to do the operation is inlined.
//! - `micro/`: acts of a kernel that take several such operations, with an application's part that
//!   is a kernel as compute's are.
//! - `io/`: requests to devices, one an iteration, verified by content.
//! - [`session`]: the guest's side of the console protocol, shared by guest and native process.
//!
//! A workload is one file and one line of [`CATALOGUE`]. Its checksum depends on what every single
//! iteration returned or changed: an operation that does not do what the architecture says gives
//! another checksum than [`oracle`].
#![no_std]
// A fill loop must stay a loop: turned into a call of memset it would run the C library's code
// natively and the guest's own in a guest, and the two would no longer be the same program.
#![no_builtins]

#[cfg(any(feature = "oracle", test))]
extern crate alloc;

mod compute;
mod empty;
pub mod io;
pub mod micro;
#[cfg(any(feature = "oracle", test))]
mod model;
pub mod nano;
mod platform;
mod refusal;
pub mod session;
mod workload;

#[cfg(any(feature = "oracle", test))]
pub use model::{Model, oracle};
pub use platform::{Kernel, Platform};
pub use refusal::{Fault, Piece, Refusal};
pub use workload::{Group, Prepared, Ring, Workload};

/// Every workload.
pub const CATALOGUE: &[Workload] = &[
    empty::WORKLOAD,
    compute::alu::WORKLOAD,
    compute::sieve::WORKLOAD,
    compute::sort::WORKLOAD,
    compute::chase::WORKLOAD,
    compute::fib::WORKLOAD,
    compute::indirect::WORKLOAD,
    compute::sse_matmul::WORKLOAD,
    nano::syscall::WORKLOAD,
    nano::hypercall::WORKLOAD,
    nano::port_in::WORKLOAD,
    nano::port_out::WORKLOAD,
    nano::cpuid::WORKLOAD,
    nano::cr3_reload::WORKLOAD,
    nano::invlpg::WORKLOAD,
    nano::pgfault::WORKLOAD,
    nano::divzero::WORKLOAD,
    nano::callret::WORKLOAD,
    nano::cr8wr::WORKLOAD,
    nano::ptemod::WORKLOAD,
    nano::cli_sti::WORKLOAD,
    nano::int3::WORKLOAD,
    nano::cr3_touch::WORKLOAD,
    nano::pushf_popf::WORKLOAD,
    nano::rep_movsb::WORKLOAD,
    nano::rep_stosq::WORKLOAD,
    micro::ctxsw::TWO,
    micro::ctxsw::EIGHT,
    micro::pfstorm::WORKLOAD,
    micro::aspace::WORKLOAD,
    io::console::WORKLOAD,
    io::block::SEQREAD,
    io::block::SEQWRITE,
    io::block::RANDREAD,
    io::block::RANDWRITE,
    io::block::SEQREAD32,
    io::block::SEQWRITE32,
    io::block::RANDREAD32,
    io::block::RANDWRITE32,
    io::net::ECHO,
    io::net::STREAM,
    io::timer::PIT,
    io::timer::LAPIC,
    io::timer::DEADLINE,
    io::timer::PARAVIRTUAL,
    io::timer::HALT_WAKE,
    io::timer::SELF_INTERRUPT,
];

/// The workload of that name.
#[inline]
pub fn find(name: &str) -> Option<&'static Workload> {
    CATALOGUE.iter().find(|workload| workload.name == name)
}

/// Prepares and runs a workload; returns its checksum. Size 0 and iterations 0 stand for the
/// catalogue's defaults.
///
/// # Errors
/// A [`Refusal`] says why there is no checksum.
pub fn run<P: Platform>(
    platform: &mut P,
    workload: &Workload,
    size: u64,
    iterations: u64,
) -> Result<u64, Refusal> {
    let prepared = Prepared::new(platform, workload, size, iterations)?;
    let sum = prepared.execute(platform)?;
    prepared.conclude(platform, sum)
}

/// Folds one value into a running checksum with two instructions, cheap enough to stand inside the
/// loop of a nano operation. Multiplying by an odd number loses nothing: a wrong value anywhere
/// changes the end, unless a second wrong value happens to undo it.
#[inline(always)]
pub(crate) fn fold(sum: u64, value: u64) -> u64 {
    sum.wrapping_mul(3).wrapping_add(value)
}

/// Folds one value into a running checksum with full diffusion, for compute kernels.
#[inline(always)]
pub(crate) fn mix(sum: u64, value: u64) -> u64 {
    (sum.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small size (0 where the workload takes none), iterations, checksum.
    ///
    /// The values were computed once by this code and are kept so that a change of a workload's
    /// logic is seen: figures of two versions with different checksums can't be compared.
    const KNOWN: &[(&str, u64, u64, u64)] = &[
        ("empty", 0, 1, 0x656d_7074_7900_0000),
        ("alu", 100, 3, 0xbf16_c7fd_3ca2_09d9),
        ("sieve", 1000, 3, 0x2d9e_3e75_b807_a581),
        ("sort", 500, 3, 0xcbef_66be_c516_374e),
        ("chase", 1000, 3, 0x8d86_c4a5_fb0e_4500),
        ("fib", 12, 3, 0xe69d_ca30_abcf_a26b),
        ("indirect", 1000, 3, 0x79e3_1a72_e74a_a546),
        ("sse_matmul", 8, 3, 0x717c_9844_1fae_603c),
        ("syscall", 0, 5, 0xbfae_7ada_1ec3_d6f1),
        ("hypercall", 0, 5, 0x0000_0000_0000_016b),
        ("in", 0, 5, 0x0000_0000_0000_7f9e),
        ("out", 0, 5, 0x0000_0000_0000_0013),
        ("cpuid", 0, 5, 0x0000_0009_edb7_8b3b),
        ("cr3_reload", 0, 5, 0xbbbb_0000_6666_0011),
        ("invlpg", 0, 5, 0xbbbb_0000_6666_0011),
        ("pgfault", 0, 5, 0xff0e_0078_ff87_0389),
        ("divzero", 0, 5, 0x0000_0000_0000_021e),
        ("callret", 0, 5, 0x0000_0000_0000_016b),
        ("cr8wr", 0, 5, 0x0000_0000_0000_0013),
        ("ptemod", 0, 5, 0xaaaa_0000_5555_0010),
        ("cli_sti", 0, 5, 0x0000_0000_0000_0010),
        ("int3", 0, 5, 0x0000_0000_0000_021e),
        ("cr3_touch", 0, 5, 0xede4_0091_9908_02d8),
        ("pushf_popf", 0, 5, 0x0000_0000_0000_01c5),
        ("rep_movsb", 0, 5, 0x294c_3d1c_55f3_f23a),
        ("rep_stosq", 0, 5, 0x3e79_67c7_6bd8_5c47),
        ("ctxsw2", 0, 5, 0x98fa_8398_59cd_3e6d),
        ("ctxsw8", 0, 9, 0xc406_334a_1335_aca2),
        ("pfstorm", 7, 3, 0x6d9c_e423_bd20_42ea),
        ("aspace", 3, 3, 0x7ee4_817e_d010_5967),
        ("console", 5, 3, 0x0000_0000_8c69_bdd6),
        ("blk_seqread", 7, 9, 0x2090_422a_dcbd_c650),
        ("blk_seqwrite", 7, 9, 0x638a_2501_403d_ae84),
        ("blk_randread", 7, 9, 0x79cb_45f2_a968_a82f),
        ("blk_randwrite", 7, 9, 0xb998_7b41_fc76_622b),
        ("blk_seqread32", 40, 70, 0x5052_fef2_706f_a547),
        ("blk_seqwrite32", 40, 70, 0x605e_ea30_e7ba_01c9),
        ("blk_randread32", 40, 70, 0x9829_c14c_33e4_5a4f),
        ("blk_randwrite32", 40, 70, 0x6f64_3b44_7bc0_5239),
        ("net_rr", 5, 9, 0x07a8_9f34_dffd_e05c),
        ("net_stream", 186, 70, 0x629b_8344_20ee_8957),
        ("timer_pit", 10, 5, 0x0000_0000_0000_0650),
        ("timer_lapic", 10, 5, 0x0000_0000_0000_0650),
        ("timer_tscdl", 10, 5, 0x0000_0000_0000_0650),
        ("timer_pv", 10, 5, 0x0000_0000_0000_0650),
        ("hlt_wake", 10, 5, 0x0000_0000_0000_0650),
        ("self_ipi", 0, 5, 0x0000_0000_0000_0650),
    ];

    #[test]
    fn checksums_are_the_known_ones() {
        let mut wrong = alloc::vec::Vec::new();
        for &(name, size, iterations, expected) in KNOWN {
            let workload = find(name).unwrap();
            let sum = oracle(workload, size, iterations).unwrap();
            if sum != expected {
                wrong.push(alloc::format!("{name} {size} {iterations}: {sum:#018x}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        for workload in CATALOGUE {
            assert!(
                KNOWN.iter().any(|known| known.0 == workload.name),
                "{} has no known checksum",
                workload.name
            );
        }
    }

    #[test]
    fn names_are_unique_and_one_word() {
        for (index, workload) in CATALOGUE.iter().enumerate() {
            assert!(!workload.name.contains(char::is_whitespace));
            assert!(
                CATALOGUE[..index]
                    .iter()
                    .all(|other| other.name != workload.name)
            );
        }
        assert!(find("no such workload").is_none());
    }

    #[test]
    fn every_iteration_changes_the_checksum() {
        for workload in CATALOGUE.iter().filter(|w| w.group != Group::Empty) {
            let sums: alloc::vec::Vec<u64> = (1..=4)
                .map(|iterations| oracle(workload, 0, iterations).unwrap())
                .collect();
            for (index, sum) in sums.iter().enumerate() {
                assert!(
                    !sums[..index].contains(sum),
                    "{}: {} iterations give an earlier checksum",
                    workload.name,
                    index + 1
                );
            }
        }
    }

    #[test]
    fn runs_are_repeatable() {
        for workload in CATALOGUE {
            assert_eq!(oracle(workload, 0, 3), oracle(workload, 0, 3));
        }
    }

    #[test]
    fn sizes_beyond_the_arena_are_refused() {
        for workload in CATALOGUE.iter().filter(|w| w.words(1) != w.words(1000)) {
            let mut arena = alloc::vec![0; 64];
            let mut model = Model::new(&mut arena);
            for size in [1 << 20, u64::MAX / 2, u64::MAX] {
                assert!(
                    matches!(
                        run(&mut model, workload, size, 1),
                        Err(Refusal::TooLarge { .. })
                    ),
                    "{} {size}",
                    workload.name
                );
            }
        }
    }

    #[test]
    fn the_smallest_sizes_never_panic() {
        for workload in CATALOGUE {
            for size in 1..=20 {
                let mut arena = alloc::vec![0; 1 << 17];
                let mut model = Model::new(&mut arena);
                match run(&mut model, workload, size, 2) {
                    Ok(_) => assert!(
                        matches!(workload.group, Group::Compute | Group::Micro | Group::Io)
                            || size == 1
                    ),
                    Err(Refusal::Beyond { .. }) => assert_ne!(workload.group, Group::Compute),
                    Err(other) => panic!("{} {size}: {other}", workload.name),
                }
            }
        }
    }

    #[test]
    fn zero_stands_for_the_defaults() {
        for workload in CATALOGUE
            .iter()
            .filter(|w| matches!(w.group, Group::Nano | Group::Micro | Group::Io))
        {
            assert_eq!(
                oracle(workload, 0, 0),
                oracle(workload, workload.size, workload.iterations)
            );
        }
    }
}
