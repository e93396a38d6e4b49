//! A run's files while the run lasts: every row is on disk before the next window opens.
//!
//! Decides nothing: statuses come from [`crate::verdict`]. Invariant: `order` counts the rows
//! of a run without gaps, in the order in which they were measured.

use std::path::Path;

use reports_data::{
    EXITS, Error, ExitRow, ExitWriter, Histogram, LATENCY, LatencyRow, LatencyWriter, Metric,
    Phase, SAMPLES, Sample, SampleWriter, Status,
};

use crate::contender::Contender;
use crate::stats::Count;
use crate::verdict::Refusal;

/// Where a row stands in a run.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Who was measured.
    pub contender: &'a Contender,
    /// Name of the workload, or [`reports_data::BOOT`].
    pub workload: &'a str,
    /// When in the guest's life.
    pub phase: Phase,
    /// Round.
    pub round: u32,
}

/// Writes samples, exits and latencies.
#[derive(Debug)]
pub struct Recorder {
    run: String,
    samples_file: SampleWriter,
    exits_file: ExitWriter,
    latency_file: LatencyWriter,
    samples: Vec<Sample>,
}

impl Recorder {
    /// Creates the csv files of run `run` in `dir`.
    ///
    /// # Errors
    /// The files can't be created.
    pub fn create(dir: &Path, run: &str) -> Result<Recorder, Error> {
        Ok(Recorder {
            run: run.to_owned(),
            samples_file: SampleWriter::create(dir.join(SAMPLES))?,
            exits_file: ExitWriter::create(dir.join(EXITS))?,
            latency_file: LatencyWriter::create(dir.join(LATENCY))?,
            samples: Vec::new(),
        })
    }

    /// Writes one measured value.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn value(
        &mut self,
        place: Place<'_>,
        metric: &Metric,
        value: f64,
        checksum: Option<u64>,
    ) -> Result<(), Error> {
        let sample = Sample {
            value: Some(value),
            checksum,
            ..self.row(place, metric, Status::Ok, String::new())
        };
        self.append(sample)
    }

    /// Writes why there is no value.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn refusal(&mut self, place: Place<'_>, refusal: &Refusal) -> Result<(), Error> {
        let sample = self.row(place, &Metric::TIME, refusal.status, refusal.reason.clone());
        self.append(sample)
    }

    /// Writes the counters of one window.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn counts(
        &mut self,
        place: Place<'_>,
        counts: &[Count],
        iterations: u64,
    ) -> Result<(), Error> {
        for count in counts {
            self.exits_file.append(&ExitRow {
                run: self.run.clone(),
                workload: place.workload.to_owned(),
                mode: place.contender.name.clone(),
                phase: place.phase,
                round: place.round,
                source: count.source.clone(),
                kind: count.kind.clone(),
                reason: count.reason.clone(),
                count: count.count,
                per_iteration: count.count as f64 / iterations as f64,
            })?;
        }
        Ok(())
    }

    /// Writes how long requests took, and the percentiles. No values write nothing.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn latencies(&mut self, place: Place<'_>, latencies: &Histogram) -> Result<(), Error> {
        for range in latencies.ranges() {
            self.latency_file.append(&LatencyRow {
                run: self.run.clone(),
                workload: place.workload.to_owned(),
                mode: place.contender.name.clone(),
                phase: place.phase,
                round: place.round,
                range: *range,
            })?;
        }
        for (metric, share) in [
            (&Metric::LATENCY_P50, 0.5),
            (&Metric::LATENCY_P99, 0.99),
            (&Metric::LATENCY_MAX, 1.0),
        ] {
            if let Some(ns) = latencies.percentile(share) {
                self.value(place, metric, ns as f64, None)?;
            }
        }
        Ok(())
    }

    /// Everything written so far.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    fn row(&self, place: Place<'_>, metric: &Metric, status: Status, reason: String) -> Sample {
        Sample {
            run: self.run.clone(),
            workload: place.workload.to_owned(),
            mode: place.contender.name.clone(),
            engine: place.contender.engine.clone(),
            flavour: place.contender.flavour.clone(),
            phase: place.phase,
            metric: metric.clone(),
            round: place.round,
            order: u32::try_from(self.samples.len()).unwrap_or(u32::MAX),
            value: None,
            checksum: None,
            status,
            reason,
        }
    }

    fn append(&mut self, sample: Sample) -> Result<(), Error> {
        self.samples_file.append(&sample)?;
        self.samples.push(sample);
        Ok(())
    }
}
