//! The page around the sections: head, title, contents, style and script.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use reports_data::Run;

use crate::view::View;
use crate::{Result, palette, sections};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// The whole page. `files` are the csv files, byte for byte.
pub(crate) fn page(run: &Run, files: &[(&str, Vec<u8>)]) -> Result<String> {
    let view = View::new(run);
    let sections = sections::all(&view, files)?;
    let manifest = &run.manifest;
    let compared: Vec<String> = view.columns.iter().map(|c| c.label.to_owned()).collect();
    let head: Markup = html! {
        head {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width, initial-scale=1";
            meta name="color-scheme" content="light dark";
            // Nothing may be loaded: a policy that holds even if a file of the run tried.
            meta http-equiv="Content-Security-Policy"
                content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:";
            title { "Trapline: run " (manifest.run) }
            style { (PreEscaped(palette::css())) (PreEscaped(STYLE)) }
        }
    };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            (head)
            body {
                a.skip href="#verdict" { "Skip to the verdict" }
                header {
                    p.brand { "Trapline" }
                    h1 { "What each trap costs" }
                    p.sub {
                        "Run " b { (manifest.run) } ", " (manifest.started)
                        @if !compared.is_empty() { " · " (compared.join(" · ")) }
                    }
                }
                nav aria-label="Sections" {
                    ol { @for section in &sections { li { a href={ "#" (section.id) } { (section.short) } } } }
                }
                main {
                    @for section in &sections {
                        section #(section.id) aria-labelledby={ (section.id) "-heading" } {
                            h2 #{ (section.id) "-heading" } {
                                (section.title) " "
                                a.anchor href={ "#" (section.id) } aria-label={ "Link to " (section.title) } { "#" }
                            }
                            (section.content)
                        }
                    }
                }
                footer { p { "Made from the files of one run, without looking anything up." } }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    Ok(page.into_string())
}
