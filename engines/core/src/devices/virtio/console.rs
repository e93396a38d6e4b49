//! The console (5.3): one port, bytes out and in.
//!
//! While a driver has it, the machine's console input is its own: the UART gets none.

use std::sync::Arc;

use super::chain::length;
use super::{Broken, Ring, VirtioDevice};
use crate::buffer::{gather, scatter};
use crate::devices::Action;
use crate::host::console::Output;
use crate::host::input::Input;

/// Device type.
pub const ID: u32 = 3;
/// Queue of buffers for bytes that come in.
pub const RECEIVE: usize = 0;
/// Queue of bytes that go out.
pub const TRANSMIT: usize = 1;

/// Bytes moved at once.
const CHUNK: usize = 4096;
/// Bytes of a request that still go out when the run ends.
const LAST_WORDS: usize = 64 * 1024;

/// A console.
pub struct Console {
    output: Output,
    input: Arc<Input>,
    /// Tells the pump that the input queue has room again.
    resume: Box<dyn Fn() + Send>,
}

impl Console {
    /// A console between `input` and `output`; `resume` is called when a full input queue has room
    /// again.
    pub fn new(output: Output, input: Arc<Input>, resume: Box<dyn Fn() + Send>) -> Self {
        Console {
            output,
            input,
            resume,
        }
    }

    /// Gives the driver the input that there is, as far as it has room.
    fn deliver(&mut self, ring: &mut Ring) -> Result<(), Broken> {
        let mut bytes = [0; CHUNK];
        while !self.input.is_empty() {
            let Some(chain) = ring.next()? else {
                if ring.ask_for_notification()? {
                    continue;
                }
                break;
            };
            let room = length(chain.writable()).min(CHUNK);
            let (count, starved) = self.input.take(&mut bytes[..room]);
            scatter(chain.writable(), 0, &bytes[..count]);
            ring.complete(count)?;
            if starved {
                (self.resume)();
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64]
    }

    /// Without SIZE and MULTIPORT every field is unused.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _features: u64) {
        self.input.claim(true);
    }

    fn reset(&mut self) {
        self.input.claim(false);
    }

    fn notified(&mut self, index: usize, rings: &mut [Ring]) -> Result<(), Broken> {
        if index == RECEIVE {
            return self.deliver(&mut rings[RECEIVE]);
        }
        let output = &mut self.output;
        rings[TRANSMIT].serve_all(|chain| {
            let total = length(chain.readable());
            let mut bytes = [0; CHUNK];
            let mut done = 0;
            while done < total {
                let count = gather(chain.readable(), done, &mut bytes);
                // A request may name the same memory over and over, and so be of any length.
                if done >= LAST_WORDS && output.ending() {
                    break;
                }
                // A reader that is gone ends the run by `action`; one that does not read any more
                // when the run ends gets no more.
                if !output.put_all(&bytes[..count]) {
                    break;
                }
                done += count;
            }
            Ok(0)
        })
    }

    fn host_ready(&mut self, rings: Option<&mut [Ring]>) -> Result<(), Broken> {
        rings.map_or(Ok(()), |rings| self.deliver(&mut rings[RECEIVE]))
    }

    fn action(&self) -> Action {
        if self.output.closed() {
            Action::ConsoleClosed
        } else {
            Action::None
        }
    }
}
