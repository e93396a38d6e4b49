//! The run's csv files inside the page, as links that save them.

use maud::{Markup, html};
use reports_data::{EXITS, LATENCY};

use crate::format;
use crate::view::View;

pub(super) fn content(view: &View<'_>, files: &[(&str, Vec<u8>)]) -> Markup {
    html! {
        p { "The files that this page was made from are inside it, byte for byte." }
        ul.files {
            @for (name, bytes) in files {
                li {
                    a download=(name) href={ "data:text/csv;base64," (base64(bytes)) } { (name) }
                    @let rows = match *name {
                        EXITS => view.run.exits.len(),
                        LATENCY => view.run.latencies.len(),
                        _ => view.run.samples.len(),
                    };
                    ", " (format::plural(rows, "row")) ", " (format::count(bytes.len() as f64)) " bytes"
                }
            }
        }
        p { "Times are ns; an empty value goes with a status other than ok and a reason." }
    }
}

/// Base 64 with padding, RFC 4648 section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = (0..3).fold(0_u32, |group, index| {
            group << 8 | u32::from(chunk.get(index).copied().unwrap_or(0))
        });
        for index in 0..4 {
            if index <= chunk.len() {
                let digit = group >> (18 - 6 * index) & 63;
                text.push(char::from(ALPHABET[digit as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_matches_the_rfcs_vectors() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
