//! Charts: plotters draws them as SVG, this module makes them part of the page.
//!
//! plotters writes fixed colours, sizes and a namespace; on the way out colours become CSS
//! variables (one drawing serves light, dark and print), the size becomes the view box alone, and
//! the drawing gets a role, a title and a description. Invariant: text from the run's files
//! reaches the SVG through plotters' own escaping or maud's.

mod curves;
mod dots;
mod stack;

pub(crate) use curves::{CurvePanel, curves};
pub(crate) use dots::{Dot, DotRow, Reference, dot_plot};
pub(crate) use stack::{Bar, Panel, stacked_bars};

use std::fmt::Write as _;

use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Error;

/// A drawing surface in pixels of the view box.
type Area<'b> = DrawingArea<SVGBackend<'b>, Shift>;
/// What drawing returns.
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// What a chart draws with; becomes a CSS variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ink {
    /// Text and axes.
    Text,
    /// Secondary text.
    Muted,
    /// Grid lines.
    Rule,
    /// The page itself, for open markers and text on bars.
    Page,
    /// A column of the comparison.
    Series(usize),
    /// A kind of exit.
    Kind(usize),
}

impl Ink {
    /// A colour that stands for the ink until the drawing is done. Red 1 and blue 90 mark it.
    fn stand_in(self) -> RGBColor {
        let code = match self {
            Ink::Text => 0,
            Ink::Muted => 1,
            Ink::Rule => 2,
            Ink::Page => 3,
            Ink::Series(index) => 16 + (index % 64) as u8,
            Ink::Kind(index) => 96 + (index % 64) as u8,
        };
        RGBColor(1, code, 90)
    }

    fn variable(self) -> String {
        match self {
            Ink::Text => "var(--ink)".into(),
            Ink::Muted => "var(--muted)".into(),
            Ink::Rule => "var(--rule)".into(),
            Ink::Page => "var(--page)".into(),
            Ink::Series(index) => format!("var(--s{index})"),
            Ink::Kind(index) => format!("var(--k{index})"),
        }
    }

    fn all() -> impl Iterator<Item = Ink> {
        [Ink::Text, Ink::Muted, Ink::Rule, Ink::Page]
            .into_iter()
            .chain((0..crate::palette::SERIES.len()).map(Ink::Series))
            .chain((0..crate::palette::KINDS.len()).map(Ink::Kind))
    }
}

/// Draws a chart and wraps it for the page.
pub(crate) fn chart(
    id: &str,
    title: &str,
    description: &str,
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> Result<Markup, Error> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area)
            .and_then(|()| area.present())
            .map_err(|error| Error::Chart {
                chart: title.to_owned(),
                message: error.to_string(),
            })?;
    }
    let body = svg
        .split_once(">\n")
        .and_then(|(_, rest)| rest.rsplit_once("</svg>"))
        .map(|(body, _)| body)
        .unwrap_or_default();
    let mut body = body.to_owned();
    for ink in Ink::all() {
        let RGBColor(r, g, b) = ink.stand_in();
        // In an attribute alone: a quote in text is escaped, so text is never touched.
        let mut attribute = String::new();
        let _ = write!(attribute, "=\"#{r:02X}{g:02X}{b:02X}\"");
        body = body.replace(&attribute, &format!("=\"{}\"", ink.variable()));
    }
    Ok(html! {
        div.scroll.chart tabindex="0" role="region" aria-label=(title) {
            svg role="img" viewBox={ "0 0 " (size.0) " " (size.1) }
                aria-labelledby={ (id) "-title " (id) "-desc" } {
                title #{ (id) "-title" } { (title) }
                desc #{ (id) "-desc" } { (description) }
                (PreEscaped(body))
            }
        }
    })
}

fn line(area: &Area<'_>, from: (i32, i32), to: (i32, i32), ink: Ink, width: u32) -> Drawn {
    let style = ink.stand_in().stroke_width(width);
    area.draw(&PathElement::new(vec![from, to], style))
}

/// A vertical line of dashes.
fn dashes(area: &Area<'_>, from: (i32, i32), to: (i32, i32)) -> Drawn {
    for y in (from.1..to.1).step_by(7) {
        line(area, (from.0, y), (to.0, (y + 4).min(to.1)), Ink::Muted, 1)?;
    }
    Ok(())
}

fn bar(area: &Area<'_>, from: (i32, i32), to: (i32, i32), ink: Ink) -> Drawn {
    area.draw(&Rectangle::new([from, to], ink.stand_in().filled()))
}

fn text(
    area: &Area<'_>,
    at: (i32, i32),
    anchor: HPos,
    ink: Ink,
    size: u32,
    content: &str,
) -> Drawn {
    // The SVG backend divides sizes by 1.24 to bring them in line with its bitmap siblings.
    let colour = ink.stand_in();
    let style = TextStyle::from(("sans-serif", f64::from(size) * 1.24).into_font())
        .color(&colour)
        .pos(Pos::new(anchor, VPos::Center));
    area.draw(&Text::new(content.to_owned(), at, style))
}

/// Width that a text will take, near enough for layout: fonts differ between readers.
fn text_width(content: &str, size: u32) -> i32 {
    (content.chars().count() as u32 * size * 64 / 100) as i32
}

/// The marker of a column: a shape of its own, so that colour is not the only difference.
fn marker(area: &Area<'_>, at: (i32, i32), series: usize) -> Drawn {
    let (x, y) = at;
    let ink = Ink::Series(series).stand_in();
    let polygon = |points: &[(i32, i32)]| {
        let points = points.iter().map(|(dx, dy)| (x + dx, y + dy));
        area.draw(&Polygon::new(points.collect::<Vec<_>>(), ink.filled()))
    };
    match series % 9 {
        // Open circle: the baseline.
        0 => {
            area.draw(&Circle::new(at, 5, ink.filled()))?;
            area.draw(&Circle::new(at, 3, Ink::Page.stand_in().filled()))
        }
        1 => area.draw(&Circle::new(at, 5, ink.filled())),
        2 => bar(area, (x - 4, y - 4), (x + 5, y + 5), Ink::Series(series)),
        3 => polygon(&[(0, -6), (6, 5), (-6, 5)]),
        4 => polygon(&[(0, -6), (6, 0), (0, 6), (-6, 0)]),
        5 => polygon(&[(0, 6), (6, -5), (-6, -5)]),
        6 => {
            line(area, (x - 5, y), (x + 5, y), Ink::Series(series), 3)?;
            line(area, (x, y - 5), (x, y + 5), Ink::Series(series), 3)
        }
        7 => {
            line(area, (x - 4, y - 4), (x + 4, y + 4), Ink::Series(series), 3)?;
            line(area, (x - 4, y + 4), (x + 4, y - 4), Ink::Series(series), 3)
        }
        _ => {
            bar(area, (x - 5, y - 5), (x + 5, y + 5), Ink::Series(series))?;
            bar(area, (x - 3, y - 3), (x + 3, y + 3), Ink::Page)
        }
    }
}

/// Lays out a legend in rows; returns its height. `draw` paints the key at a place.
fn legend(
    area: &Area<'_>,
    origin: (i32, i32),
    width: i32,
    entries: &[&str],
    key: impl Fn((i32, i32), usize) -> Drawn,
) -> Result<i32, DrawingAreaErrorKind<std::io::Error>> {
    let (mut x, mut y) = (0, 0);
    for (index, entry) in entries.iter().enumerate() {
        let step = 18 + text_width(entry, 13) + 18;
        if x > 0 && x + step > width {
            x = 0;
            y += 20;
        }
        let at = (origin.0 + x + 6, origin.1 + y + 8);
        key(at, index)?;
        text(area, (at.0 + 12, at.1), HPos::Left, Ink::Text, 13, entry)?;
        x += step;
    }
    Ok(if entries.is_empty() { 0 } else { y + 20 })
}

/// Height that [`legend`] will take.
fn legend_height(width: i32, entries: &[&str]) -> i32 {
    let (mut x, mut rows) = (0, 1);
    for entry in entries {
        let step = 18 + text_width(entry, 13) + 18;
        if x > 0 && x + step > width {
            x = 0;
            rows += 1;
        }
        x += step;
    }
    if entries.is_empty() { 0 } else { rows * 20 }
}
