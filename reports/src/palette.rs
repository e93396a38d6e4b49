//! Colours, in one place: every one has a light and a dark value and a CSS variable.
//!
//! Series colours follow Okabe and Ito, "Color Universal Design" (2008), darkened or lightened
//! until they stand out from the page; each also has a marker of its own, so that colour is never
//! the only difference. Heat colours carry their own text colour. Tests hold the contrasts
//! (WCAG 2.2, 1.4.3 and 1.4.11).

use std::fmt::Write as _;

/// A colour for light pages, and for dark ones.
#[derive(Clone, Copy)]
pub(crate) struct Pair(pub(crate) u32, pub(crate) u32);

/// Page background and ink: first two, then everything named.
pub(crate) const NAMED: &[(&str, Pair)] = &[
    ("page", Pair(0xfbfaf7, 0x14161a)),
    ("ink", Pair(0x1d2126, 0xe6e3dd)),
    ("muted", Pair(0x59626c, 0xa3abb3)),
    ("rule", Pair(0xdcd8cf, 0x343a42)),
    ("raised", Pair(0xf3f1eb, 0x1c2026)),
    ("link", Pair(0x0b5c8a, 0x7fc4ee)),
    ("good", Pair(0x1b6e46, 0x74cf9f)),
    ("bad", Pair(0xa8321c, 0xff9d86)),
    ("warn", Pair(0x7a5200, 0xe9bd62)),
];

/// One per column of the comparison. The first is the baseline's.
pub(crate) const SERIES: &[Pair] = &[
    Pair(0x5f6670, 0xb4bac2),
    Pair(0x0072b2, 0x5db4ea),
    Pair(0xc75300, 0xf28e4b),
    Pair(0x007d5a, 0x3cc79d),
    Pair(0xa8477f, 0xe292c0),
    Pair(0x806300, 0xe0bd3e),
    Pair(0x5a3fb0, 0xb09cf5),
    Pair(0x9b1c31, 0xf47b86),
    Pair(0x1f7a8c, 0x6fd0de),
];

/// One per kind of exit, in the order of [`KINDS`].
const KIND_COLOURS: &[Pair] = &[
    Pair(0x0069a6, 0x5db4ea),
    Pair(0x1c7180, 0x6fd0de),
    Pair(0xb84c00, 0xf28e4b),
    Pair(0x5a3fb0, 0xb09cf5),
    Pair(0xa0417a, 0xe292c0),
    Pair(0x59626c, 0xa3abb3),
    Pair(0x7a5e00, 0xe0bd3e),
    Pair(0x9b1c31, 0xf47b86),
    Pair(0x007554, 0x3cc79d),
    Pair(0x3f4f9e, 0x8fa2f7),
    Pair(0x3a6420, 0xa6d98a),
    Pair(0x00456e, 0xa4d3ff),
    Pair(0x6b2a10, 0xd9a58c),
    Pair(0x9c5531, 0xecb896),
    Pair(0x6c737b, 0xc9ced4),
];

/// Kinds of exits, in the taxonomy's order; the last stands for any that is not in the list.
pub(crate) const KINDS: &[&str] = &[
    "pio",
    "mmio",
    "cpuid",
    "msr",
    "cr",
    "hlt",
    "irq",
    "guest-fault",
    "shadow-fault",
    "hypercall",
    "translate",
    "indirect-miss",
    "smc-flush",
    "helper",
    "other",
];

/// Place of a kind in [`KINDS`].
pub(crate) fn kind_index(kind: &str) -> usize {
    let last = KINDS.len() - 1;
    KINDS.iter().position(|k| *k == kind).unwrap_or(last)
}

/// One step of the heat map: slowdowns up to `limit`.
pub(crate) struct Heat {
    /// The step holds slowdowns below this.
    pub(crate) limit: f64,
    /// What the legend says.
    pub(crate) label: &'static str,
    background: Pair,
    text: Pair,
}

const DARK_TEXT: Pair = Pair(0x1d2126, 0x14161a);
const LIGHT_TEXT: Pair = Pair(0xffffff, 0xffffff);
const STEPS_TEXT: Pair = Pair(0x1d2126, 0xffffff);

/// Steps of the heat map, from faster than native to far slower: one hue that darkens, so that
/// the order is seen without telling colours apart.
pub(crate) const HEAT: &[Heat] = &[
    Heat {
        limit: 0.95,
        label: "< 0.95×",
        background: Pair(0xb9dde0, 0x9fd3d8),
        text: DARK_TEXT,
    },
    Heat {
        limit: 1.1,
        label: "0.95–1.1×",
        background: Pair(0xf6efdf, 0x2d2a26),
        text: STEPS_TEXT,
    },
    Heat {
        limit: 1.5,
        label: "1.1–1.5×",
        background: Pair(0xf7e3bf, 0x43351f),
        text: STEPS_TEXT,
    },
    Heat {
        limit: 2.5,
        label: "1.5–2.5×",
        background: Pair(0xf5cd92, 0x5d4018),
        text: STEPS_TEXT,
    },
    Heat {
        limit: 5.0,
        label: "2.5–5×",
        background: Pair(0xefab68, 0x7b4713),
        text: STEPS_TEXT,
    },
    Heat {
        limit: 10.0,
        label: "5–10×",
        background: Pair(0xe28a4b, 0x98491a),
        text: STEPS_TEXT,
    },
    Heat {
        limit: 25.0,
        label: "10–25×",
        background: Pair(0xb4501f, 0xad4524),
        text: LIGHT_TEXT,
    },
    Heat {
        limit: f64::INFINITY,
        label: "≥ 25×",
        background: Pair(0x7d2412, 0xb83434),
        text: LIGHT_TEXT,
    },
];

/// Index into [`HEAT`] of a slowdown.
pub(crate) fn heat_step(slowdown: f64) -> usize {
    let last = HEAT.len() - 1;
    HEAT.iter()
        .position(|heat| slowdown < heat.limit)
        .unwrap_or(last)
}

/// The variables, for light pages, dark pages and paper.
pub(crate) fn css() -> String {
    let block = |pick: fn(Pair) -> u32| {
        let mut css = String::new();
        let mut set = |name: String, pair: Pair| {
            // Writing to a string can't fail.
            let _ = write!(css, "--{name}:#{:06x};", pick(pair));
        };
        for (name, pair) in NAMED {
            set((*name).to_owned(), *pair);
        }
        for (index, pair) in SERIES.iter().enumerate() {
            set(format!("s{index}"), *pair);
        }
        for (index, pair) in KIND_COLOURS.iter().enumerate() {
            set(format!("k{index}"), *pair);
        }
        for (index, heat) in HEAT.iter().enumerate() {
            set(format!("h{index}"), heat.background);
            set(format!("h{index}t"), heat.text);
        }
        css
    };
    let mut css = format!(
        ":root{{{}}}\n@media (prefers-color-scheme:dark){{:root{{{}}}}}\n",
        block(|pair| pair.0),
        block(|pair| pair.1)
    );
    let _ = writeln!(
        css,
        "@media print{{:root{{{}--page:#ffffff;}}}}",
        block(|pair| pair.0)
    );
    for index in 0..HEAT.len() {
        let _ = write!(
            css,
            ".h{index}{{background:var(--h{index});color:var(--h{index}t)}}"
        );
    }
    css
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance, WCAG 2.2.
    fn luminance(colour: u32) -> f64 {
        let channel = |shift: u32| {
            let value = f64::from(colour >> shift & 0xff) / 255.0;
            match value <= 0.04045 {
                true => value / 12.92,
                false => ((value + 0.055) / 1.055).powf(2.4),
            }
        };
        0.2126 * channel(16) + 0.7152 * channel(8) + 0.0722 * channel(0)
    }

    fn contrast(a: u32, b: u32) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    fn check(name: &str, on: Pair, colour: Pair, at_least: f64) {
        for (page, on, colour) in [("light", on.0, colour.0), ("dark", on.1, colour.1)] {
            let contrast = contrast(on, colour);
            assert!(
                contrast >= at_least,
                "{name} on a {page} page: {contrast:.2}"
            );
        }
    }

    #[test]
    fn contrast_of_black_on_white_is_21() {
        assert!((contrast(0, 0xff_ffff) - 21.0).abs() < 1e-9);
    }

    #[test]
    fn text_is_readable_on_the_page() {
        let page = NAMED[0].1;
        let raised = NAMED.iter().find(|(name, _)| *name == "raised").unwrap().1;
        for (name, pair) in NAMED {
            if !["page", "rule", "raised"].contains(name) {
                check(name, page, *pair, 4.5);
                check(name, raised, *pair, 4.5);
            }
        }
    }

    #[test]
    fn series_and_kinds_stand_out_from_the_page() {
        for pair in SERIES {
            check("series", NAMED[0].1, *pair, 3.0);
        }
        // The name of a kind is written on its bar, in the page's colour.
        for (kind, pair) in KINDS.iter().zip(KIND_COLOURS) {
            check(kind, NAMED[0].1, *pair, 4.5);
        }
        assert_eq!(KINDS.len(), KIND_COLOURS.len());
    }

    #[test]
    fn heat_cells_stay_readable() {
        for heat in HEAT {
            check(heat.label, heat.background, heat.text, 4.5);
        }
    }

    #[test]
    fn heat_steps_cover_every_slowdown() {
        assert_eq!(heat_step(0.5), 0);
        assert_eq!(heat_step(1.0), 1);
        assert_eq!(heat_step(2.5), 4);
        assert_eq!(heat_step(1e9), HEAT.len() - 1);
    }
}
