//! Samples, exits, manifest and summary: the data that a run leaves behind.
//!
//! Types here are the program's own; csv and JSON happen at the file boundary, through private
//! wire structs. Nothing here measures or renders.

pub mod status;

pub use status::Status;
