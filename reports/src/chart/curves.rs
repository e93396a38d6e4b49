//! Percentile curves: one panel per workload, one stepped line per column, a logarithmic axis of time
//! to the right and an axis of nines upwards, so that the tail is as wide as the middle.

use maud::Markup;
use plotters::element::PathElement;
use plotters::prelude::Color;
use plotters::style::text_anchor::HPos;
use reports_data::Histogram;

use super::{Area, Drawn, Ink, chart, legend, legend_height, line, marker, text, text_width};
use crate::{Error, format};

/// One workload.
pub(crate) struct CurvePanel<'a> {
    /// Its label.
    pub(crate) label: &'a str,
    /// Series of the column, and its values in ns.
    pub(crate) curves: Vec<(usize, Histogram)>,
}

const WIDTH: i32 = 860;
/// Height of a panel's plot.
const HEIGHT: i32 = 150;
/// Height that a panel's label takes.
const LABEL: i32 = 34;
/// Room below a panel for its axis.
const AXIS: i32 = 30;
/// Width of the labels of shares.
const LEFT: i32 = 64;

/// Shares with a line of their own.
const SHARES: &[(f64, &str)] = &[
    (0.0, "0 %"),
    (0.5, "50 %"),
    (0.9, "90 %"),
    (0.99, "99 %"),
    (0.999, "99.9 %"),
];
/// Nines at the upper edge, where the greatest value stands.
const TOP: f64 = 3.5;
/// Least time on the axis in ns: nothing below is worth a decade.
const LEAST: f64 = 10.0;

/// Draws the panels; `columns` are label and series of every column. `None` without values.
pub(crate) fn curves(
    id: &str,
    title: &str,
    columns: &[(&str, usize)],
    panels: &[CurvePanel<'_>],
) -> Result<Option<Markup>, Error> {
    let histograms = || panels.iter().flat_map(|panel| panel.curves.iter());
    let ends = histograms().filter_map(|(_, all)| {
        let ranges = all.ranges();
        let low = ranges.iter().map(|range| range.low).min()?;
        Some((low as f64, ranges.last()?.high as f64))
    });
    let (low, high) = ends.fold((f64::INFINITY, 0.0_f64), |(low, high), (from, to)| {
        (low.min(from), high.max(to))
    });
    if high <= 0.0 {
        return Ok(None);
    }
    let first = low.max(LEAST).log10().floor();
    let last = high.log10().ceil().max(first + 1.0);
    let (from, to) = (LEFT + 8, WIDTH - 28);
    let across = |ns: f64| {
        let share = ((ns.max(LEAST).log10() - first) / (last - first)).clamp(0.0, 1.0);
        from + (share * f64::from(to - from)).round() as i32
    };
    let labels: Vec<&str> = columns.iter().map(|(label, _)| *label).collect();
    let above = legend_height(WIDTH - 8, &labels) + 8;
    let step = LABEL + HEIGHT + AXIS;
    let size = (
        WIDTH as u32,
        (above + step * panels.len() as i32 + 4) as u32,
    );
    let description = format!(
        "Logarithmic axis from {} to {}; {} in {}. A line shows which share of all values a time is \
         not exceeded by; markers stand at the median, at 99 % and at the greatest value. The same \
         figures stand in the table that follows.",
        format::time(10_f64.powf(first)),
        format::time(10_f64.powf(last)),
        format::plural(histograms().count(), "line"),
        format::plural(panels.len(), "panel"),
    );
    let drawing = chart(id, title, &description, size, |area| {
        legend(area, (4, 0), WIDTH - 8, &labels, |at, index| {
            marker(area, at, columns[index].1)
        })?;
        for (index, panel) in panels.iter().enumerate() {
            let top = above + step * index as i32 + LABEL;
            let up = |share: f64| {
                let nines = (-(1.0 - share).log10()).clamp(0.0, TOP);
                top + HEIGHT - (nines / TOP * f64::from(HEIGHT)).round() as i32
            };
            text(area, (4, top - 20), HPos::Left, Ink::Text, 13, panel.label)?;
            for &(share, label) in SHARES {
                let y = up(share);
                line(area, (from, y), (to, y), Ink::Rule, 1)?;
                text(area, (LEFT, y), HPos::Right, Ink::Muted, 11, label)?;
            }
            text(area, (LEFT, top), HPos::Right, Ink::Muted, 11, "all")?;
            axis(area, (first, last), top, across)?;
            for (series, all) in &panel.curves {
                curve(area, *series, all, across, up)?;
            }
        }
        Ok(())
    })?;
    Ok(Some(drawing))
}

/// The axis of time below a panel.
fn axis(
    area: &Area<'_>,
    (first, last): (f64, f64),
    top: i32,
    across: impl Fn(f64) -> i32,
) -> Drawn {
    let bottom = top + HEIGHT;
    let mut free = 0;
    for decade in 0..=(last - first) as i32 {
        let value = 10_f64.powf(first + f64::from(decade));
        let x = across(value);
        line(area, (x, top), (x, bottom), Ink::Rule, 1)?;
        let label = format::time(value).replace(".00", "").replace(".0", "");
        let half = text_width(&label, 11) / 2;
        if x - half > free {
            text(area, (x, bottom + 13), HPos::Center, Ink::Muted, 11, &label)?;
            free = x + half;
        }
    }
    Ok(())
}

/// One column's line: up at each value by the share of those that are no greater.
fn curve(
    area: &Area<'_>,
    series: usize,
    all: &Histogram,
    across: impl Fn(f64) -> i32,
    up: impl Fn(f64) -> i32,
) -> Drawn {
    let total = all.total() as f64;
    let mut points: Vec<(i32, i32)> = Vec::new();
    let mut seen = 0;
    for range in all.ranges() {
        let x = across(range.high as f64);
        points.push((x, up(seen as f64 / total)));
        seen += range.count;
        points.push((x, up(seen as f64 / total)));
    }
    points.dedup();
    let style = Ink::Series(series).stand_in().stroke_width(2);
    area.draw(&PathElement::new(points, style))?;
    for share in [0.5, 0.99, 1.0] {
        if let Some(value) = all.percentile(share) {
            marker(area, (across(value as f64), up(share)), series)?;
        }
    }
    Ok(())
}
