//! A page as markup: what holds for every one, and its parts as text.
//!
//! No parser of HTML: it reads what the renderer writes.

use std::collections::BTreeSet;

/// What holds for every page, whatever the run.
pub(crate) fn check(page: &str) {
    check_nothing_is_loaded(page);
    check_nesting(page);
    check_anchors(page);
    check_charts(page);
    check_tables(page);
    for unformatted in ["NaN", "inf×", "inf ns", "None", "Some("] {
        assert!(
            !visible_text(page).contains(unformatted),
            "{unformatted} on the page"
        );
    }
}

fn check_nothing_is_loaded(page: &str) {
    let markup = tags(page);
    for tag in &markup {
        assert!(
            !tag.contains("http://") && !tag.contains("https://"),
            "{tag}"
        );
        for element in [
            "<link", "<img", "<iframe", "<object", "<embed", "<base", "<image", "<use",
        ] {
            assert!(!tag.starts_with(element), "{tag}");
        }
        assert!(
            !tag.starts_with("<script ") && !tag.contains(" src="),
            "{tag}"
        );
        if let Some(href) = attribute(tag, "href") {
            assert!(
                href.starts_with('#') || href.starts_with("data:text/csv;base64,"),
                "{tag}"
            );
        }
    }
    assert!(!page.contains("@import") && !page.contains("url("));
}

/// Every element that opens closes, in order.
fn check_nesting(page: &str) {
    const VOID: &[&str] = &["meta", "br", "hr", "input"];
    let mut open: Vec<String> = Vec::new();
    for tag in tags(page) {
        if tag.starts_with("<!") || tag.ends_with("/>") {
            continue;
        }
        let name: String = tag[1..]
            .trim_start_matches('/')
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric())
            .collect();
        if tag.starts_with("</") {
            assert_eq!(open.pop().as_deref(), Some(name.as_str()), "at {tag}");
        } else if !VOID.contains(&name.as_str()) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

fn check_anchors(page: &str) {
    let tags = tags(page);
    let ids: Vec<&str> = tags.iter().filter_map(|tag| attribute(tag, "id")).collect();
    let unique: BTreeSet<&str> = ids.iter().copied().collect();
    assert_eq!(ids.len(), unique.len(), "an id stands twice");
    for tag in &tags {
        if let Some(anchor) = attribute(tag, "href").and_then(|href| href.strip_prefix('#')) {
            assert!(unique.contains(anchor), "nothing at #{anchor}");
        }
        for reference in attribute(tag, "aria-labelledby")
            .into_iter()
            .flat_map(str::split_whitespace)
        {
            assert!(unique.contains(reference), "no label {reference}");
        }
    }
    for section in [
        "verdict",
        "environment",
        "slowdown",
        "ring0",
        "nano",
        "io",
        "exits",
        "translator",
        "warmup",
        "boot",
        "rows",
        "limits",
        "data",
    ] {
        assert!(unique.contains(section), "no section {section}");
    }
}

fn check_charts(page: &str) {
    for svg in page.split("<svg").skip(1) {
        let svg = svg.split("</svg>").next().unwrap();
        assert!(svg.starts_with(" role=\"img\""), "{}", &svg[..80]);
        assert!(svg.contains("<title") && svg.contains("<desc"));
        assert!(!svg.contains("=\"#"), "a colour that is no variable");
        assert!(svg.contains("var(--"));
    }
}

fn check_tables(page: &str) {
    for table in page.split("<table").skip(1) {
        let table = table.split("</table>").next().unwrap();
        assert!(table.contains("<caption"));
        for head in table
            .split("<th")
            .skip(1)
            .filter(|head| !head.starts_with("ead"))
        {
            assert!(
                head.split('>').next().unwrap().contains("scope="),
                "{}",
                &head[..40]
            );
        }
        let width = |row: &str| -> usize {
            row.split("<t")
                .skip(1)
                .filter(|cell| cell.starts_with('d') || cell.starts_with('h'))
                .map(|cell| {
                    let span = cell
                        .split('>')
                        .next()
                        .and_then(|tag| attribute(tag, "colspan"));
                    span.map_or(1, |n| n.parse().unwrap())
                })
                .sum()
        };
        let widths: BTreeSet<usize> = table.split("<tr").skip(1).map(width).collect();
        assert_eq!(
            widths.len(),
            1,
            "rows of {widths:?} cells in <table{}",
            &table[..60]
        );
    }
}

/// Every tag of the page, those inside script and style left out.
fn tags(page: &str) -> Vec<&str> {
    let mut tags = Vec::new();
    let mut rest = page;
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("a tag that never ends") + 1;
        let tag = &rest[start..end];
        tags.push(tag);
        rest = &rest[end..];
        for raw in ["script", "style"] {
            if tag == format!("<{raw}>") {
                rest = &rest[rest.find(&format!("</{raw}>")).unwrap()..];
            }
        }
    }
    tags
}

fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = tag.split_once(&format!(" {name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

/// The page's text without tags, style and script.
fn visible_text(page: &str) -> String {
    let body = page.split_once("<body>").unwrap().1;
    let body = body.split("<script>").next().unwrap();
    let mut text = String::new();
    for piece in body.split('<') {
        text.push_str(piece.split_once('>').map_or(piece, |(_, text)| text));
        text.push(' ');
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ")
}

/// The content of one section, as text.
pub(crate) fn section(page: &str, id: &str) -> String {
    let start = page.find(&format!("<section id=\"{id}\"")).unwrap();
    let section = &page[start..start + page[start..].find("</section>").unwrap()];
    visible_text(&format!("<body>{section}"))
}
