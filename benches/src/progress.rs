//! What the user sees while a run lasts: a bar on a terminal, plain lines elsewhere.
//!
//! Writes to standard error alone; standard output belongs to results.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::verdict::Refusal;

/// Shows how far a run has come.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    style: Style,
    started: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Bar,
    Lines,
    Silent,
}

impl Progress {
    /// A bar if standard error is a terminal, lines otherwise.
    pub fn new() -> Progress {
        let style = if std::io::stderr().is_terminal() {
            Style::Bar
        } else {
            Style::Lines
        };
        Progress::with(style)
    }

    /// Shows nothing: for tests.
    pub fn silent() -> Progress {
        Progress::with(Style::Silent)
    }

    fn with(style: Style) -> Progress {
        let bar = match style {
            Style::Bar => ProgressBar::new(0),
            Style::Lines | Style::Silent => {
                ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden())
            }
        };
        let template = "{elapsed_precise} {bar:32} {pos}/{len} {wide_msg}";
        // A template that does not parse would be a mistake here; the default one serves then.
        if let Ok(template) = ProgressStyle::with_template(template) {
            bar.set_style(template);
        }
        Progress {
            bar,
            style,
            started: Instant::now(),
        }
    }

    /// A round begins; `turns` are left in the whole run, this round's included.
    pub fn round(&self, round: u32, rounds: u32, turns: usize) {
        self.bar.set_length(self.bar.position() + turns as u64);
        self.line(&format!("round {} of {rounds}", round + 1));
    }

    /// A contender has its turn at a workload.
    pub fn turn(&self, contender: &str, workload: &str) {
        self.bar.set_message(format!("{workload} in {contender}"));
        self.bar.inc(1);
    }

    /// A contender has given no figure.
    pub fn refused(&self, contender: &str, workload: &str, refusal: &Refusal) {
        let Refusal { status, reason } = refusal;
        self.line(&format!("{workload} in {contender}: {status}: {reason}"));
    }

    /// Something worth a line.
    pub fn line(&self, text: &str) {
        match self.style {
            Style::Bar => self.bar.println(text),
            Style::Lines => eprintln!("{:6.1} s  {text}", self.elapsed().as_secs_f64()),
            Style::Silent => {}
        }
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}
