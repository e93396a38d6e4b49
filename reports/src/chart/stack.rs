//! Stacked bars: one panel per workload, one bar per column; on the left how many per iteration
//! (each panel with a linear scale of its own), on the right the same bar stretched to 100 %.

use std::borrow::Cow;

use maud::Markup;
use plotters::style::text_anchor::HPos;

use super::{Area, Drawn, Ink, bar, chart, legend, legend_height, line, text, text_width};
use crate::palette::KINDS;
use crate::{Error, format};

/// One workload.
pub(crate) struct Panel<'a> {
    /// Its label.
    pub(crate) label: &'a str,
    /// Its bars; never added up.
    pub(crate) bars: Vec<Bar<'a>>,
}

/// One column's counts of one workload.
pub(crate) struct Bar<'a> {
    /// The column's label.
    pub(crate) label: Cow<'a, str>,
    /// Index of a kind in [`KINDS`] and how often per iteration, in the order of kinds.
    pub(crate) parts: Vec<(usize, f64)>,
}

impl Bar<'_> {
    fn total(&self) -> f64 {
        self.parts.iter().map(|(_, count)| count).sum()
    }
}

const WIDTH: i32 = 860;
const BAR: i32 = 20;

/// Draws the panels. `None` if no bar has a part.
pub(crate) fn stacked_bars(
    id: &str,
    title: &str,
    panels: &[Panel<'_>],
) -> Result<Option<Markup>, Error> {
    let bars = || panels.iter().flat_map(|panel| &panel.bars);
    if bars().all(|bar| bar.parts.is_empty()) {
        return Ok(None);
    }
    let used: Vec<usize> = (0..KINDS.len())
        .filter(|kind| bars().any(|bar| bar.parts.iter().any(|part| part.0 == *kind)))
        .collect();
    let names: Vec<&str> = used.iter().map(|kind| KINDS[*kind]).collect();
    let widest = bars().map(|bar| text_width(&bar.label, 12)).max();
    let left = widest.unwrap_or(0).clamp(60, 280) + 12;
    let figures = bars()
        .map(|bar| text_width(&format::count(bar.total()), 12))
        .max()
        .unwrap_or(0);
    let space = WIDTH - left - figures - 28;
    let (absolute, share) = (left + 4, left + 4 + space / 2 + figures + 20);
    let length = space / 2;
    let top = legend_height(WIDTH - 8, &names) + 30;
    let height = |panel: &Panel<'_>| 24 + panel.bars.len() as i32 * BAR + 10;
    let total = top + panels.iter().map(height).sum::<i32>();
    let description = format!(
        "{}, {}. In each panel the left bar is the count per iteration on a linear scale from 0 to \
         that panel's largest bar, the right bar the same parts as shares of 100 %. Kinds: {}. The \
         same figures stand in the table that follows.",
        format::plural(panels.len(), "panel"),
        format::plural(bars().count(), "bar"),
        names.join(", "),
    );
    let drawing = chart(
        id,
        title,
        &description,
        (WIDTH as u32, total as u32),
        |area| {
            legend(area, (4, 0), WIDTH - 8, &names, |(x, y), index| {
                bar(area, (x - 5, y - 5), (x + 5, y + 5), Ink::Kind(used[index]))
            })?;
            let heads = top - 12;
            text(
                area,
                (absolute, heads),
                HPos::Left,
                Ink::Muted,
                12,
                "per iteration",
            )?;
            text(
                area,
                (share, heads),
                HPos::Left,
                Ink::Muted,
                12,
                "share, 0 to 100 %",
            )?;
            let mut y = top;
            for panel in panels {
                line(area, (4, y), (WIDTH - 4, y), Ink::Rule, 1)?;
                text(area, (4, y + 14), HPos::Left, Ink::Text, 13, panel.label)?;
                let largest = panel.bars.iter().map(Bar::total).fold(0.0, f64::max);
                for (index, column) in panel.bars.iter().enumerate() {
                    let row = y + 24 + index as i32 * BAR;
                    let middle = row + BAR / 2;
                    text(
                        area,
                        (left - 4, middle),
                        HPos::Right,
                        Ink::Muted,
                        12,
                        &column.label,
                    )?;
                    let total = column.total();
                    if total <= 0.0 {
                        text(area, (absolute, middle), HPos::Left, Ink::Muted, 12, "none")?;
                        continue;
                    }
                    let end = parts(area, column, (absolute, row), length, largest)?;
                    let figure = format::count(total);
                    text(area, (end + 5, middle), HPos::Left, Ink::Text, 12, &figure)?;
                    parts(area, column, (share, row), length, total)?;
                }
                y += height(panel);
            }
            Ok(())
        },
    )?;
    Ok(Some(drawing))
}

/// Draws the parts of a bar side by side; returns where it ends.
fn parts(
    area: &Area<'_>,
    column: &Bar<'_>,
    (x, y): (i32, i32),
    length: i32,
    full: f64,
) -> Result<i32, plotters::drawing::DrawingAreaErrorKind<std::io::Error>> {
    let mut sum = 0.0;
    let place = |sum: f64| x + (sum / full * f64::from(length)).round() as i32;
    for &(kind, count) in &column.parts {
        let (from, to) = (place(sum), place(sum + count));
        sum += count;
        part(area, (from, y + 3), (to, y + BAR - 3), kind)?;
    }
    Ok(place(sum))
}

fn part(area: &Area<'_>, from: (i32, i32), to: (i32, i32), kind: usize) -> Drawn {
    // A part too small for a pixel is still there: a hairline says that it is not zero.
    let to = (to.0.max(from.0 + 1), to.1);
    bar(area, from, to, Ink::Kind(kind))?;
    // A seam and the name tell neighbours apart where colours do not.
    let name = KINDS[kind];
    if to.0 - from.0 > 3 {
        line(area, (to.0 - 1, from.1), (to.0 - 1, to.1), Ink::Page, 1)?;
    }
    if to.0 - from.0 > text_width(name, 11) + 8 {
        let middle = (from.1 + to.1) / 2;
        text(area, (from.0 + 4, middle), HPos::Left, Ink::Page, 11, name)?;
    }
    Ok(())
}
