//! Renders a run's files into one self-contained HTML page.
//!
//! The page opens from disk, reads without JavaScript and loads nothing: style, script, charts
//! and the csv files themselves are inside it. Invariant: the page is a pure function of the
//! run's directory; no clock, no environment and no random numbers are read here, and a figure is
//! shown only if its row's status is `ok`.

mod chart;
mod format;
mod page;
mod palette;
mod sections;
mod table;
mod view;
mod workloads;

use std::path::{Path, PathBuf};

use reports_data::{EXITS, LATENCY, REPORT, Run, SAMPLES};

/// A page could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the run can't be read or understood.
    #[error(transparent)]
    Data(#[from] reports_data::Error),
    /// A chart could not be drawn.
    #[error("draw chart `{chart}`: {message}")]
    Chart {
        /// Title of the chart.
        chart: String,
        /// What the drawing library said.
        message: String,
    },
    /// The operating system refused.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Renders the run in `run_dir` into one HTML page.
///
/// # Errors
/// [`Error::Data`] if the run's files can't be read, [`Error::Chart`].
pub fn render(run_dir: &Path) -> Result<String> {
    let run = Run::read(run_dir)?;
    let files = [SAMPLES, EXITS, LATENCY]
        .into_iter()
        .filter_map(|name| match std::fs::read(run_dir.join(name)) {
            Ok(bytes) => Some(Ok((name, bytes))),
            // A run that was cut off may lack one; its absence is no fault of the page.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => Some(Err(Error::Io {
                operation: "read",
                path: run_dir.join(name),
                source,
            })),
        })
        .collect::<Result<Vec<_>>>()?;
    page::page(&run, &files)
}

/// Renders the run in `run_dir` and writes the page into it, as `report.html`. Returns its path.
///
/// # Errors
/// As [`render`], and [`Error::Io`] if the page can't be written.
pub fn write_report(run_dir: &Path) -> Result<PathBuf> {
    let page = render(run_dir)?;
    let path = run_dir.join(REPORT);
    match std::fs::write(&path, page) {
        Ok(()) => Ok(path),
        Err(source) => Err(Error::Io {
            operation: "write",
            path,
            source,
        }),
    }
}
