//! What a checksum must be: the same logic, run in this process over a model machine. A floor's is
//! the number of its operations.
//!
//! Not a measurement: it runs while every virtual machine is paused, so that it takes no time from
//! a window. Each answer is computed once.

use std::collections::HashMap;

use crate::task::Task;

/// Remembers what it has computed.
#[derive(Debug, Default)]
pub struct Oracle {
    known: HashMap<(&'static str, u64, u64), Result<u64, String>>,
}

impl Oracle {
    /// The checksum of a run.
    ///
    /// # Errors
    /// The workload can't be run with this size.
    pub fn checksum(&mut self, task: Task, size: u64, iterations: u64) -> Result<u64, String> {
        let workload = match task {
            Task::Workload(workload) => workload,
            Task::Floor(_) => return Ok(iterations),
        };
        self.known
            .entry((workload.name, size, iterations))
            .or_insert_with(|| {
                // In a thread: the measuring one may have real-time priority, and this is work.
                std::thread::scope(|scope| {
                    scope
                        .spawn(|| programs::oracle(workload, size, iterations))
                        .join()
                })
                .map_err(|_| "oracle: panicked".to_owned())?
                .map_err(|refusal| format!("oracle: {refusal}"))
            })
            .clone()
    }
}
