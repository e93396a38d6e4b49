//! Workload logic over a [`Platform`], and the [`CATALOGUE`].
//!
//! Pure `no_std` logic: the same functions run in a guest, in a native process and as the oracle
//! in tests. A workload never knows which mode it runs in.
#![no_std]
