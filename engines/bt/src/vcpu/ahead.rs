//! Translation without execution, so that a profiler that can't follow translated code (valgrind) counts
//! what the translator itself does.

use engine_core::Error;

use super::{BtVcpu, Missing};
use crate::system::Trap;

impl BtVcpu {
    /// Translates from RIP on, each block where the one before ends, until `end`. Returns how many blocks
    /// it were. Links are not made: that takes a guest that goes from one to the other.
    ///
    /// # Errors
    /// [`Error::Engine`] where there is no code, or code that can't be translated.
    #[doc(hidden)]
    pub fn translate_ahead(&mut self, end: u64) -> Result<usize, Error> {
        let start = self.core.rip;
        let mut blocks = 0;
        while self.core.rip < end {
            let mode = self.core.mode_here();
            let virt = self.core.linear_ip();
            let number = self.block(mode, virt).map_err(|missing| {
                let why = match missing {
                    Missing::Trap(Trap::Fault(fault)) => format!("{fault:?}"),
                    Missing::Trap(Trap::Shutdown) => "shutdown".to_owned(),
                    Missing::Trap(Trap::Unsupported(message)) => message,
                    Missing::Kicked => "a kick".to_owned(),
                };
                Error::Engine(format!("translating {virt:#x}: {why}"))
            })?;
            self.core.rip += u64::from(self.cache.block(number).guest_len);
            blocks += 1;
        }
        self.core.rip = start;
        Ok(blocks)
    }
}
