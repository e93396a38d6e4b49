//! How a run ended: on stderr, to the stats descriptor, and as the exit status.

use std::io::Write;
use std::process::ExitCode;

use engine_core::tally::Count;
use engine_core::{CpuState, Limit, Outcome};

use crate::wire::{Counter, Event, Stats};
use crate::{cli, say, status};

/// The vCPU that ended the run.
pub(crate) struct Last {
    pub(crate) cpu: usize,
    pub(crate) state: Option<CpuState>,
}

/// Says how the run ended, on stderr, to the stats descriptor and as the exit status.
pub(crate) fn conclude(
    outcome: &Outcome,
    last: Option<&Last>,
    arguments: &cli::Run,
    stats: &mut Stats,
    counts: &[Count],
) -> ExitCode {
    // Which of several vCPUs a message is about.
    let which = match last {
        Some(last) if arguments.smp > 1 => format!(" on vCPU {}", last.cpu),
        Some(_) | None => String::new(),
    };
    let at = |state: Option<&CpuState>| {
        let rip = state.map_or(String::new(), |state| format!(" at rip {:#x}", state.rip));
        rip + &which
    };
    let raw = arguments.exit_port == cli::ExitPort::Raw;
    let (name, message, code) = match outcome {
        Outcome::Success if raw => ("success", String::new(), status::raw(0)),
        Outcome::Failure(code) if raw => ("failure", String::new(), status::raw(*code)),
        Outcome::Success => ("success", String::new(), status::SUCCESS),
        Outcome::Failure(code) => (
            "failure",
            format!("the guest failed with code {code}"),
            status::FAILURE,
        ),
        Outcome::Off => ("off", String::new(), status::SUCCESS),
        Outcome::Reset => (
            "reset",
            "the guest reset the machine".to_owned(),
            // As a raw status 1 is a good end.
            if raw {
                status::CRASHED
            } else {
                status::FAILURE
            },
        ),
        Outcome::Crashed { state, message } => {
            show(state.as_deref(), &which);
            let at = if message.contains(" rip 0x") {
                which.clone()
            } else {
                at(state.as_deref())
            };
            (
                "crashed",
                format!("the guest crashed: {message}{at}"),
                status::CRASHED,
            )
        }
        Outcome::Limit(limit) => {
            let bound = match (limit, arguments.timeout, arguments.max_exits) {
                (Limit::Timeout, Some(timeout), _) => format!(" ({} s)", timeout.as_secs_f64()),
                (Limit::Exits, _, Some(most)) => format!(" ({most})"),
                (Limit::Timeout | Limit::Exits | Limit::Input, _, _) => String::new(),
            };
            let at = at(last.and_then(|last| last.state.as_ref()));
            (
                "limit",
                format!("{}{bound}{at}", limit.message()),
                status::LIMIT,
            )
        }
        Outcome::Interrupted { signal } => {
            let message = format!("ended by signal {signal}");
            let code = status::signalled(*signal);
            return report_end(stats, "interrupted", &message, counts, code);
        }
        Outcome::EngineError { state, error } => {
            show(state.as_deref(), &which);
            let message = format!("the engine failed: {error}{}", at(state.as_deref()));
            ("crashed", message, status::CRASHED)
        }
    };
    report_end(stats, name, &message, counts, ExitCode::from(code))
}

fn show(state: Option<&CpuState>, which: &str) {
    if let Some(state) = state {
        let head = match which {
            "" => String::new(),
            _ => format!("state{which}\n"),
        };
        let _ = writeln!(std::io::stderr(), "{head}{state}");
    }
}

/// The end event and the last line.
pub(crate) fn report_end(
    stats: &mut Stats,
    outcome: &str,
    message: &str,
    counts: &[Count],
    code: ExitCode,
) -> ExitCode {
    let counts = counts.iter().map(Counter::from).collect();
    stats.write(&Event::End {
        outcome,
        message,
        counts,
    });
    if !message.is_empty() {
        say(message);
    }
    code
}
