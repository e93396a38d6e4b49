//! What a workload is, and the three steps of running one.
//!
//! The steps are apart because only the middle one stands in the measured window: data is laid out
//! and operations are tried before it, results are verified after it.

use crate::{
    Platform, Refusal, compute,
    io::Io,
    micro::{Micro, aspace, pfstorm},
    nano::Operation,
    platform::Kernel,
};

/// What a workload measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Nothing: the cost of the window itself.
    Empty,
    /// An application's work: no privileged operation at all.
    Compute,
    /// One operation of a kernel per iteration. Has a native figure if it takes no privilege.
    Nano,
    /// What a kernel does with address spaces, as a whole. Has no native figure.
    Micro,
    /// What devices are for: requests, frames, expiries.
    Io,
}

/// The privilege that the measured code starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Ring 3, as applications.
    User,
    /// Ring 0, as kernels.
    Kernel,
}

/// One guest program.
#[derive(Debug)]
pub struct Workload {
    /// Its name on the console, in csv and in reports.
    pub name: &'static str,
    /// What it measures.
    pub group: Group,
    /// Where the measured code runs.
    pub ring: Ring,
    /// Default size; the unit is the workload's own and stands in `operation`. 1 where the
    /// workload takes no size.
    pub size: u64,
    /// Default number of iterations.
    pub iterations: u64,
    /// What one iteration is, in one line.
    pub operation: &'static str,
    pub(crate) program: Program,
}

/// The code of a workload.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    Empty,
    Compute {
        /// Words of arena that a size needs; `None` on overflow.
        words: fn(u64) -> Option<u64>,
        /// Largest size for a reason other than the arena.
        limit: u64,
        /// Lays out the data, before the window.
        prepare: Kernel,
        /// The measured code.
        run: Kernel,
    },
    Nano(Operation),
    Micro(Micro),
    Io(Io),
}

impl Workload {
    /// Words of arena (8 bytes each) that `size` needs; `None` if that is beyond 2^64.
    #[inline]
    pub fn words(&self, size: u64) -> Option<u64> {
        match self.program {
            Program::Empty | Program::Nano(_) | Program::Micro(_) => Some(0),
            Program::Io(io) => Some(io.words()),
            Program::Compute { words, .. } => words(size),
        }
    }

    /// Puts the catalogue's defaults where there is a 0.
    #[inline]
    pub fn resolve(&self, size: u64, iterations: u64) -> (u64, u64) {
        (
            if size == 0 { self.size } else { size },
            if iterations == 0 {
                self.iterations
            } else {
                iterations
            },
        )
    }
}

impl Workload {
    /// Whether it reads or writes a disk.
    #[inline]
    pub fn uses_disk(&self) -> bool {
        match self.program {
            Program::Io(Io::Block(_)) => true,
            Program::Io(
                Io::Console
                | Io::Echo
                | Io::Stream
                | Io::Timer(_)
                | Io::HaltWake
                | Io::SelfInterrupt,
            )
            | Program::Empty
            | Program::Compute { .. }
            | Program::Nano(_)
            | Program::Micro(_) => false,
        }
    }

    /// How many values the histogram of a run holds, where the machine has a clock for one; `None`
    /// for a workload whose requests are not timed one by one. Size 0 and iterations 0 stand for the
    /// catalogue's defaults.
    #[inline]
    pub fn timed(&self, size: u64, iterations: u64) -> Option<u64> {
        let (size, iterations) = self.resolve(size, iterations);
        match self.program {
            Program::Io(Io::Block(block)) => Some(block.batches(size, iterations)),
            Program::Io(
                Io::Console | Io::Echo | Io::Timer(_) | Io::HaltWake | Io::SelfInterrupt,
            ) => Some(iterations),
            Program::Io(Io::Stream)
            | Program::Empty
            | Program::Compute { .. }
            | Program::Nano(_)
            | Program::Micro(_) => None,
        }
    }
}

/// A workload that can run now: sizes checked, data laid out, operation tried.
#[derive(Debug)]
pub struct Prepared {
    program: Program,
    size: u64,
    iterations: u64,
}

impl Prepared {
    /// Checks the size, lays out the data, tries the operation.
    ///
    /// # Errors
    /// The size does not fit, the platform has no such operation, or the operation does not do
    /// what the architecture says.
    pub fn new<P: Platform>(
        platform: &mut P,
        workload: &Workload,
        size: u64,
        iterations: u64,
    ) -> Result<Self, Refusal> {
        let (size, iterations) = workload.resolve(size, iterations);
        let program = workload.program;
        match program {
            Program::Empty => limit(size, workload.size)?,
            Program::Compute {
                words,
                limit: most,
                prepare,
                run: _,
            } => {
                limit(size, most)?;
                let available = platform.arena_words();
                let needed = words(size).unwrap_or(u64::MAX);
                if needed > available {
                    return Err(Refusal::TooLarge {
                        size,
                        words: needed,
                        available,
                    });
                }
                platform.compute(compute::touch, needed, 1)?;
                platform.compute(prepare, size, iterations)?;
            }
            Program::Nano(operation) => {
                limit(size, workload.size)?;
                platform.arm(operation)?;
            }
            Program::Micro(micro) => {
                limit(
                    size,
                    match micro {
                        Micro::Switch { .. } => workload.size,
                        Micro::Storm => pfstorm::MOST,
                        Micro::Space => aspace::MOST,
                    },
                )?;
                platform.set_up(micro, size)?;
            }
            Program::Io(io) => {
                limit(size, io.most())?;
                let (needed, available) = (io.words(), platform.arena_words());
                if needed > available {
                    return Err(Refusal::TooLarge {
                        size,
                        words: needed,
                        available,
                    });
                }
                io.prepare(platform, size, iterations)?;
            }
        }
        Ok(Prepared {
            program,
            size,
            iterations,
        })
    }

    /// The measured part.
    ///
    /// # Errors
    /// A fault of the workload that the platform survived.
    #[inline]
    pub fn execute<P: Platform>(&self, platform: &mut P) -> Result<u64, Refusal> {
        match self.program {
            Program::Empty => Ok(crate::empty::CHECKSUM),
            Program::Compute { run, .. } => platform.compute(run, self.size, self.iterations),
            Program::Nano(operation) => operation.run(platform, self.iterations),
            Program::Micro(micro) => micro.run(platform, self.size, self.iterations),
            Program::Io(io) => io.run(platform, self.size, self.iterations),
        }
    }

    /// Folds what the operations left behind into the checksum.
    ///
    /// # Errors
    /// What the operations left behind can't be read.
    #[inline]
    pub fn conclude<P: Platform>(&self, platform: &mut P, sum: u64) -> Result<u64, Refusal> {
        Ok(match self.program {
            Program::Empty | Program::Compute { .. } => sum,
            Program::Nano(operation) => crate::fold(sum, platform.settle(operation)),
            Program::Micro(micro) => crate::fold(sum, platform.take_down(micro)),
            Program::Io(io) => io.conclude(platform, sum, self.size, self.iterations)?,
        })
    }
}

#[inline]
fn limit(size: u64, most: u64) -> Result<(), Refusal> {
    if size > most {
        return Err(Refusal::Beyond { size, most });
    }
    Ok(())
}
