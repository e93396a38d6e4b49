//! A run's directory: which files there are, and all of them read together.

use std::path::Path;

use crate::table::{TableWriter, read_table};
use crate::{Error, ExitRow, LatencyRow, Manifest, Sample, Summary, summarise};

/// Name of the manifest in a run's directory.
pub const MANIFEST: &str = "manifest.json";
/// Name of the samples' table.
pub const SAMPLES: &str = "samples.csv";
/// Name of the exits' table.
pub const EXITS: &str = "exits.csv";
/// Name of the latencies' table.
pub const LATENCY: &str = "latency.csv";
/// Name of the summary.
pub const SUMMARY: &str = "summary.json";
/// Name of the rendered page.
pub const REPORT: &str = "report.html";

/// Appends to `samples.csv`.
pub type SampleWriter = TableWriter<Sample>;
/// Appends to `exits.csv`.
pub type ExitWriter = TableWriter<ExitRow>;
/// Appends to `latency.csv`.
pub type LatencyWriter = TableWriter<LatencyRow>;

/// All that a run left behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Circumstances.
    pub manifest: Manifest,
    /// Every sample.
    pub samples: Vec<Sample>,
    /// Every count.
    pub exits: Vec<ExitRow>,
    /// Every range of every histogram.
    pub latencies: Vec<LatencyRow>,
    /// The samples brought together.
    pub summary: Summary,
}

impl Run {
    /// Reads a run's directory. A run that was cut off may lack `exits.csv` (no counts then),
    /// `latency.csv` (no histograms then) and `summary.json` (made from the samples then, with the
    /// manifest's seed).
    ///
    /// # Errors
    /// Whatever is wrong with the first file at fault; `manifest.json` and `samples.csv` must be there.
    pub fn read(dir: &Path) -> Result<Run, Error> {
        let manifest = Manifest::read(&dir.join(MANIFEST))?;
        let samples = read_table(&dir.join(SAMPLES))?;
        let exits = unless_absent(read_table(&dir.join(EXITS)))?.unwrap_or_default();
        let latencies = unless_absent(read_table(&dir.join(LATENCY)))?.unwrap_or_default();
        let summary = match unless_absent(Summary::read(&dir.join(SUMMARY)))? {
            Some(summary) => summary,
            None => summarise(&samples, manifest.seed),
        };
        Ok(Run {
            manifest,
            samples,
            exits,
            latencies,
            summary,
        })
    }
}

fn unless_absent<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
