//! The page's sections, one file each, in the order in which they stand on the page.

mod boot;
mod download;
mod environment;
mod exits;
mod io;
mod limits;
mod nano;
mod para;
mod paths;
mod ring0;
mod rows;
mod slowdown;
mod tally;
mod translator;
mod verdict;
mod warmup;

use maud::{Markup, html};

use crate::Result;
use crate::view::View;

/// One section: anchor, heading, content.
pub(crate) struct Section {
    /// Anchor; stays the same from version to version.
    pub(crate) id: &'static str,
    /// Heading.
    pub(crate) title: &'static str,
    /// Short form for the page's own contents.
    pub(crate) short: &'static str,
    /// What stands below the heading.
    pub(crate) content: Markup,
}

/// Every section of the page. `files` are the csv files as they are.
pub(crate) fn all(view: &View<'_>, files: &[(&str, Vec<u8>)]) -> Result<Vec<Section>> {
    let section = |id, title, short, content| Section {
        id,
        title,
        short,
        content,
    };
    Ok(vec![
        section("verdict", "Verdict", "Verdict", verdict::content(view)),
        section(
            "environment",
            "Environment",
            "Environment",
            environment::content(view),
        ),
        section(
            "slowdown",
            "Slowdown against native",
            "Slowdown",
            slowdown::content(view),
        ),
        section(
            "ring0",
            "Workloads that have no native figure",
            "Ring 0",
            ring0::content(view),
        ),
        section(
            "nano",
            "Time of one operation",
            "Operations",
            nano::content(view)?,
        ),
        section(
            "io",
            "I/O: emulated against paravirtual devices",
            "I/O",
            io::content(view)?,
        ),
        section(
            "exits",
            "Exits per operation",
            "Exits",
            exits::content(view)?,
        ),
        section(
            "para",
            "The paravirtual guest: floors, hypercalls, upcalls",
            "Hypercalls",
            para::content(view),
        ),
        section(
            "translator",
            "The translator",
            "Translator",
            translator::content(view)?,
        ),
        section(
            "warmup",
            "Cold, warm and break-even",
            "Cold and warm",
            warmup::content(view),
        ),
        section("boot", "Boot", "Boot", boot::content(view)?),
        section(
            "rows",
            "Every row, its status and its reason",
            "All rows",
            rows::content(view),
        ),
        section(
            "limits",
            "Limits of the method",
            "Limits",
            limits::content(view),
        ),
        section("data", "Data", "Data", download::content(view, files)),
    ])
}

/// A sentence where a section has nothing to show.
fn nothing(text: &str) -> Markup {
    html! { p.nothing { (text) } }
}
