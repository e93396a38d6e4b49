//! The pair as the run loop sees it: the subject, with its exits kept for the reference.

use vm_memory::{Bytes, GuestAddress};

use super::{Asked, Lockstep, Progress};
use crate::kick::KickHandle;
use crate::tally::HostStat;
use crate::{CpuState, Error, Exit, ExitCounts, ExitKind, ExitReason, GuestPhys, Vcpu};

impl Vcpu for Lockstep {
    fn run(&mut self) -> Result<Exit<'_>, Error> {
        self.answered()?;
        loop {
            let exit = self.subject.run()?;
            self.level = false;
            match exit {
                Exit::Stepped => {}
                Exit::PioIn { port, size, data } => {
                    self.buffer = data.to_vec();
                    self.asked = Asked::Items {
                        at: port.into(),
                        memory: false,
                        size: size.into(),
                    };
                    return Ok(Exit::PioIn {
                        port,
                        size,
                        data: &mut self.buffer,
                    });
                }
                Exit::MmioRead {
                    addr,
                    data,
                    priority,
                } => {
                    self.buffer = data.to_vec();
                    let size = self.buffer.len();
                    self.asked = Asked::Items {
                        at: addr.0,
                        memory: true,
                        size,
                    };
                    return Ok(Exit::MmioRead {
                        addr,
                        data: &mut self.buffer,
                        priority,
                    });
                }
                Exit::PioOut { port, size, data } => {
                    self.buffer = data.to_vec();
                    self.keep(port.into(), false, true, size.into());
                    // Between two instructions: whatever ends the run here, all has been compared.
                    if let Some(message) = self.compare()? {
                        return Ok(Exit::Internal { message });
                    }
                    return Ok(Exit::PioOut {
                        port,
                        size,
                        data: &self.buffer,
                    });
                }
                Exit::MmioWrite { addr, data } => {
                    self.buffer = data.to_vec();
                    self.keep(addr.0, true, true, self.buffer.len());
                    return Ok(Exit::MmioWrite {
                        addr,
                        data: &self.buffer,
                    });
                }
                Exit::MsrRead {
                    index, priority, ..
                } => {
                    self.msr = None;
                    self.asked = Asked::Msr { index };
                    return Ok(Exit::MsrRead {
                        index,
                        answer: &mut self.msr,
                        priority,
                    });
                }
                Exit::MsrWrite {
                    index, value, tsc, ..
                } => {
                    self.accepted = false;
                    self.asked = Asked::Accepted { index };
                    return Ok(Exit::MsrWrite {
                        index,
                        value,
                        tsc,
                        accepted: &mut self.accepted,
                    });
                }
                Exit::Hlt => return Ok(Exit::Hlt),
                Exit::InterruptWindow => return Ok(Exit::InterruptWindow),
                Exit::Shutdown => return Ok(Exit::Shutdown),
                Exit::Interrupted => return Ok(Exit::Interrupted),
                Exit::Internal { message } => return Ok(Exit::Internal { message }),
            }
            if let Some(message) = self.compare()? {
                return Ok(Exit::Internal { message });
            }
        }
    }

    fn state(&self) -> Result<CpuState, Error> {
        self.subject.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.subject.set_state(state)?;
        self.reference.set_state(state)
    }

    fn counts(&self) -> ExitCounts {
        self.subject.counts()
    }

    fn interruptible(&mut self) -> bool {
        self.subject.interruptible()
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Error> {
        self.answered()?;
        self.subject.request_interrupt_window(false);
        if let Some(message) = self.compare()? {
            return Err(Error::Engine(message));
        }
        self.reference.interrupt(vector)?;
        self.level = false;
        self.subject.interrupt(vector)
    }

    fn nmi(&mut self) -> Result<(), Error> {
        Err(Error::Engine("no NMIs in lockstep".into()))
    }

    fn nmi_blocked(&mut self) -> bool {
        self.subject.nmi_blocked()
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.subject.request_interrupt_window(wanted);
    }

    fn kick_handle(&self) -> KickHandle {
        self.subject.kick_handle()
    }

    fn task_priority(&mut self) -> u8 {
        self.subject.task_priority()
    }

    fn set_task_priority(&mut self, priority: u8) -> Result<(), Error> {
        self.subject.set_task_priority(priority)
    }

    fn keeps_code(&self) -> bool {
        true
    }

    fn memory_written(&mut self, pages: &[u64]) {
        let mut page = [0; 4096];
        for &number in pages {
            let at = GuestAddress(GuestPhys(number << 12).0);
            // A page beyond memory is none of the copy's either.
            if self.memory.read_slice(&mut page, at).is_ok() {
                let _ = self.copy.write_slice(&page, at);
            }
        }
        self.subject.memory_written(pages);
    }

    fn exit_name(&self, reason: ExitReason) -> &'static str {
        self.subject.exit_name(reason)
    }

    fn host_stats(&mut self) -> Vec<HostStat> {
        let Progress {
            steps,
            instructions,
            taken_over,
        } = self.progress;
        let mut stats = self.subject.host_stats();
        stats.extend(
            [
                ("steps", steps),
                ("instructions", instructions),
                ("taken over", taken_over),
            ]
            .map(|(name, value)| HostStat {
                source: "lockstep",
                kind: ExitKind::Other,
                name: name.to_owned(),
                value,
            }),
        );
        stats
    }
}
