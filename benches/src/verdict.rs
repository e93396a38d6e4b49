//! From what went wrong to the row that says so.
//!
//! The only place that turns faults and answers into statuses; it measures nothing. Invariant: a
//! [`Refusal`] is never `ok` and its reason is never empty.

use reports_data::Status;

use crate::console::Done;
use crate::stats::Count;
use crate::vm::{Answer, Fault};

/// Exit status of `trapline run` when its mode can't run here.
const TRAPLINE_UNAVAILABLE: i32 = 3;

/// Why there is no figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Any status but `ok`.
    pub status: Status,
    /// One line.
    pub reason: String,
}

/// What of a contender decides how its faults are read.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Traits {
    /// A KVM backend that is no processor's virtualization (`pvm`): it can't run everything, and
    /// what it can't run says something about this host and nothing about the engine.
    pub software_kvm: Option<String>,
    /// What to do if the program is not installed.
    pub install: Option<String>,
    /// Runs outside any guest.
    pub native: bool,
}

impl Refusal {
    /// A refusal with a reason, however little was said.
    pub fn new(status: Status, reason: impl Into<String>) -> Refusal {
        let reason = reason.into();
        let reason = if reason.trim().is_empty() {
            "no reason given".to_owned()
        } else {
            reason
        };
        Refusal { status, reason }
    }
}

impl Traits {
    /// Reads an answer: the figure, or why there is none.
    ///
    /// # Errors
    /// The run gave no result.
    pub fn answer(&self, answer: Answer) -> Result<(Done, Option<Vec<Count>>), Refusal> {
        match answer {
            Answer::Done(done, counts) => Ok((done, counts)),
            // A baseline without words of its own.
            Answer::Unsupported(reason) if self.native && reason.is_empty() => Err(Refusal::new(
                Status::Unsupported,
                "ring-0 operation has no native figure",
            )),
            Answer::Unsupported(reason) => Err(Refusal::new(Status::Unsupported, reason)),
            Answer::Failed(reason) => Err(self.went_wrong(reason)),
            Answer::Unknown(name) => Err(Refusal::new(
                Status::Failed,
                format!("the guest has no workload {name:?}"),
            )),
        }
    }

    /// Reads a fault of a virtual machine that was up.
    pub fn fault(&self, fault: &Fault) -> Refusal {
        match fault {
            Fault::Interrupted => Refusal::new(Status::Skipped, "interrupted"),
            Fault::Spawn { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                match &self.install {
                    Some(install) => Refusal::new(Status::Unavailable, install.clone()),
                    None => Refusal::new(Status::Failed, fault.to_string()),
                }
            }
            Fault::Died {
                code: Some(TRAPLINE_UNAVAILABLE),
                words: Some(words),
                ..
            } => Refusal::new(
                Status::Unavailable,
                words.strip_prefix("trapline: ").unwrap_or(words),
            ),
            Fault::Spawn { .. } | Fault::Pipe(_) | Fault::Counters(_) => {
                Refusal::new(Status::Failed, fault.to_string())
            }
            Fault::Died { .. } | Fault::Limit { .. } | Fault::Protocol(_) => {
                self.went_wrong(fault.to_string())
            }
        }
    }

    /// Reads a checksum that is not the oracle's. Wrong results are wrong on any backend.
    pub fn wrong_checksum(&self, found: u64, expected: u64) -> Refusal {
        let backend = self.software_kvm.as_ref();
        let backend = backend.map_or(String::new(), |backend| format!("KVM ({backend}): "));
        Refusal::new(
            Status::Failed,
            format!("{backend}checksum {found:016x}, expected {expected:016x}"),
        )
    }

    fn went_wrong(&self, reason: String) -> Refusal {
        match &self.software_kvm {
            Some(backend) => {
                Refusal::new(Status::Unavailable, format!("KVM ({backend}): {reason}"))
            }
            None => Refusal::new(Status::Failed, reason),
        }
    }
}

/// The KVM backend if it is none of the processor's own.
pub fn software_backend(backend: Option<&str>) -> Option<String> {
    backend
        .filter(|backend| !["intel", "amd"].contains(backend))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn died(code: i32, words: &str) -> Fault {
        Fault::Died {
            how: format!("exit status {code}"),
            code: Some(code),
            words: Some(words.to_owned()),
        }
    }

    #[test]
    fn a_software_backend_makes_failures_unavailable_and_is_named() {
        let pvm = Traits {
            software_kvm: software_backend(Some("pvm")),
            ..Traits::default()
        };
        let intel = Traits {
            software_kvm: software_backend(Some("intel")),
            ..Traits::default()
        };
        let answer = || Answer::Failed("iretq stalls".to_owned());
        assert_eq!(
            pvm.answer(answer()),
            Err(Refusal::new(Status::Unavailable, "KVM (pvm): iretq stalls"))
        );
        assert_eq!(
            intel.answer(answer()),
            Err(Refusal::new(Status::Failed, "iretq stalls"))
        );
        let fault = died(4, "trapline: guest crashed");
        assert_eq!(pvm.fault(&fault).status, Status::Unavailable);
        assert_eq!(
            intel.fault(&fault),
            Refusal::new(Status::Failed, "exit status 4: trapline: guest crashed")
        );
        assert_eq!(pvm.wrong_checksum(1, 2).status, Status::Failed);
    }

    #[test]
    fn exit_status_3_is_unavailable_with_the_vmm_s_words() {
        assert_eq!(
            Traits::default().fault(&died(3, "trapline: open /dev/kvm: denied")),
            Refusal::new(Status::Unavailable, "open /dev/kvm: denied")
        );
    }

    #[test]
    fn what_is_not_installed_names_the_package() {
        let traits = Traits {
            install: Some("not installed: apt-get install qemu-system-x86".to_owned()),
            ..Traits::default()
        };
        let fault = Fault::Spawn {
            program: "qemu-system-x86_64".to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        };
        assert_eq!(traits.fault(&fault).status, Status::Unavailable);
        assert_eq!(Traits::default().fault(&fault).status, Status::Failed);
    }

    #[test]
    fn native_says_why_a_ring_0_operation_has_no_figure() {
        let native = Traits {
            native: true,
            ..Traits::default()
        };
        let refusal = native.answer(Answer::Unsupported(String::new()));
        assert_eq!(
            refusal,
            Err(Refusal::new(
                Status::Unsupported,
                "ring-0 operation has no native figure"
            ))
        );
        let own = "a process takes no interrupts";
        assert_eq!(
            native.answer(Answer::Unsupported(own.to_owned())),
            Err(Refusal::new(Status::Unsupported, own))
        );
    }
}
