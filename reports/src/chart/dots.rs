//! The dot plot: one row per operation, one marker per column, a logarithmic axis of time and a
//! whisker for the interval. Reference lines run through all rows.

use maud::Markup;
use plotters::style::text_anchor::HPos;

use super::{Ink, chart, dashes, legend, legend_height, line, marker, text, text_width};
use crate::view::Figure;
use crate::{Error, format};

/// One row of the plot.
pub(crate) struct DotRow<'a> {
    /// Its label.
    pub(crate) label: &'a str,
    /// Its markers.
    pub(crate) dots: Vec<Dot>,
}

/// One marker.
pub(crate) struct Dot {
    /// Place among the columns: row within the row.
    pub(crate) place: usize,
    /// The figure, in ns.
    pub(crate) figure: Figure,
}

/// A line through the plot at a time that is no operation's of the plot.
pub(crate) struct Reference<'a> {
    /// What stands at its upper end.
    pub(crate) label: &'a str,
    /// Where, in ns.
    pub(crate) value: f64,
}

const WIDTH: i32 = 860;
/// Height of a reference line's label.
const LABEL: i32 = 15;
const LANE: i32 = 12;

/// Draws the plot. `columns` are label and series of every column, `references` the lines from left
/// to right. `None` if there is nothing to
/// draw: a logarithmic axis has no place for values that are not positive.
pub(crate) fn dot_plot(
    id: &str,
    title: &str,
    columns: &[(&str, usize)],
    rows: &[DotRow<'_>],
    references: &[Reference<'_>],
) -> Result<Option<Markup>, Error> {
    let drawable = |figure: &Figure| figure.value > 0.0;
    let figures = || {
        rows.iter()
            .flat_map(|row| row.dots.iter().map(|dot| dot.figure))
    };
    let (mut low, mut high, mut drawn) = (f64::INFINITY, 0.0_f64, 0);
    for figure in figures().filter(drawable) {
        let (from, to) = figure.interval.unwrap_or((figure.value, figure.value));
        // An interval may reach below zero after the empty window is subtracted.
        low = low.min(if from > 0.0 { from } else { figure.value });
        high = high.max(to).max(figure.value);
        drawn += 1;
    }
    if drawn == 0 {
        return Ok(None);
    }
    for reference in references {
        low = low.min(reference.value);
        high = high.max(reference.value);
    }
    let first = low.log10().floor();
    let last = high.log10().ceil().max(first + 1.0);
    let left = rows
        .iter()
        .map(|row| text_width(row.label, 13))
        .max()
        .unwrap_or(0)
        .clamp(40, 220)
        + 16;
    let (from, to) = (left + 8, WIDTH - 28);
    let place = |value: f64| {
        let share = ((value.log10() - first) / (last - first)).clamp(0.0, 1.0);
        from + (share * f64::from(to - from)).round() as i32
    };
    let labels: Vec<&str> = columns.iter().map(|(label, _)| *label).collect();
    let row_height = (columns.len() as i32 * LANE + 10).max(28);
    let above = legend_height(WIDTH - 8, &labels) + 12;
    let top = above + references.len() as i32 * LABEL;
    let bottom = top + rows.len() as i32 * row_height;
    let lines: Vec<String> = references
        .iter()
        .map(|reference| format!("{} at {}", reference.label, format::time(reference.value)))
        .collect();
    let lines = match lines.is_empty() {
        true => String::new(),
        false => format!(" Reference lines: {}.", format::list(&lines)),
    };
    let description = format!(
        "Logarithmic axis from {} to {}; {} in {}, one marker per column, whiskers are 95 % \
         bootstrap intervals of the median.{lines} The same figures stand in the table that follows.",
        format::time(10_f64.powf(first)),
        format::time(10_f64.powf(last)),
        format::plural(drawn, "figure"),
        format::plural(rows.len(), "row"),
    );
    let size = (WIDTH as u32, (bottom + 34) as u32);
    let drawing = chart(id, title, &description, size, |area| {
        legend(area, (4, 0), WIDTH - 8, &labels, |at, index| {
            marker(area, at, columns[index].1)
        })?;
        let decades = (last - first) as i32;
        for decade in 0..=decades {
            let value = 10_f64.powf(first + f64::from(decade));
            let x = place(value);
            line(area, (x, top), (x, bottom), Ink::Rule, 1)?;
            let label = format::time(value).replace(".00", "").replace(".0", "");
            text(area, (x, bottom + 16), HPos::Center, Ink::Muted, 12, &label)?;
            // Minor lines at 2 and 5: without them a log axis is read as if it were linear.
            for minor in [2.0, 5.0] {
                if decade < decades && decades <= 8 {
                    let x = place(value * minor);
                    line(area, (x, bottom - 4), (x, bottom), Ink::Muted, 1)?;
                }
            }
        }
        line(area, (from, bottom), (to, bottom), Ink::Muted, 1)?;
        // From the right: a label stands left of its line, above where the next line begins.
        for (index, reference) in references.iter().rev().enumerate() {
            let x = place(reference.value);
            let y = above + index as i32 * LABEL;
            dashes(area, (x, y), (x, bottom))?;
            let (anchor, at) = match x - text_width(reference.label, 12) > 4 {
                true => (HPos::Right, x - 5),
                false => (HPos::Left, x + 5),
            };
            text(
                area,
                (at, y + LABEL / 2),
                anchor,
                Ink::Muted,
                12,
                reference.label,
            )?;
        }
        for (index, row) in rows.iter().enumerate() {
            let y = top + index as i32 * row_height;
            if index > 0 {
                line(area, (4, y), (to, y), Ink::Rule, 1)?;
            }
            let middle = y + row_height / 2;
            text(area, (left, middle), HPos::Right, Ink::Text, 13, row.label)?;
            let lanes = columns.len() as i32;
            for dot in row.dots.iter().filter(|dot| drawable(&dot.figure)) {
                let lane = middle + (2 * dot.place as i32 - (lanes - 1)) * LANE / 2;
                let series = columns[dot.place].1;
                if let Some((low, high)) = dot.figure.interval {
                    // No logarithm below zero: such a whisker runs to the axis' start.
                    let (low, high) = (place(low.max(f64::MIN_POSITIVE)), place(high));
                    let ink = Ink::Series(series);
                    line(area, (low, lane), (high, lane), ink, 2)?;
                    line(area, (low, lane - 4), (low, lane + 4), ink, 1)?;
                    line(area, (high, lane - 4), (high, lane + 4), ink, 1)?;
                }
                marker(area, (place(dot.figure.value), lane), series)?;
            }
        }
        Ok(())
    })?;
    Ok(Some(drawing))
}
