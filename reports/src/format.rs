//! Numbers as text: three significant digits, thousands set apart, the unit always there.

/// Between the thousands: a narrow no-break space.
const GAP: char = '\u{202f}';

/// Three significant digits; integers from 1000 on, thousands set apart.
pub(crate) fn figure(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    // The exponent of the rounded value: 0.9997 is shown as 1.00, not as 1.000.
    let scientific = format!("{value:.2e}");
    let exponent = scientific.rsplit_once('e').map(|(_, e)| e.parse::<i32>());
    let Some(Ok(exponent @ -5..=14)) = exponent else {
        return scientific;
    };
    let decimals = usize::try_from(2 - exponent).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    match text.split_once('.') {
        Some(_) => text,
        None => grouped(&text),
    }
}

/// As [`figure`], without zeros at the end: for counts.
pub(crate) fn count(value: f64) -> String {
    let text = figure(value);
    match text.contains('.') && !text.contains('e') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn grouped(digits: &str) -> String {
    let (sign, digits) = match digits.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", digits),
    };
    let mut text = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(GAP);
        }
        text.push(digit);
    }
    text
}

/// A time given in ns, in the unit that suits it.
pub(crate) fn time(ns: f64) -> String {
    let (scale, unit) = time_unit(ns);
    format!("{}\u{a0}{unit}", figure(ns / scale))
}

fn time_unit(ns: f64) -> (f64, &'static str) {
    match ns.abs() {
        // The bounds stand where three digits would round up to the next unit.
        ns if ns >= 999.5e6 => (1e9, "s"),
        ns if ns >= 999.5e3 => (1e6, "ms"),
        ns if ns >= 999.5 => (1e3, "µs"),
        _ => (1.0, "ns"),
    }
}

/// Both ends of an interval of times, in the unit that suits the upper one.
pub(crate) fn time_range(low: f64, high: f64) -> String {
    let (scale, unit) = time_unit(high);
    format!(
        "{}–{}\u{a0}{unit}",
        figure(low / scale),
        figure(high / scale)
    )
}

/// Both ends of an interval.
pub(crate) fn range(low: f64, high: f64) -> String {
    format!("{}–{}", figure(low), figure(high))
}

/// A ratio: `1.24×`.
pub(crate) fn ratio(value: f64) -> String {
    format!("{}×", figure(value))
}

/// `1 row`, `2 rows`.
pub(crate) fn plural(n: usize, noun: &str) -> String {
    match n {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

/// `a`, `a and b`, `a, b and c`.
pub(crate) fn list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1.00"),
            (0.012_345, "0.0123"),
            (37.64, "37.6"),
            (999.4, "999"),
            (15_826.2, "15\u{202f}826"),
            (1_234_567.0, "1\u{202f}234\u{202f}567"),
            (-1_234.0, "-1\u{202f}234"),
            (1e-9, "1.00e-9"),
        ] {
            assert_eq!(figure(value), text, "{value}");
        }
    }

    #[test]
    fn counts_drop_zeros_after_the_point_alone() {
        assert_eq!(count(4.0), "4");
        assert_eq!(count(100.0), "100");
        assert_eq!(count(0.5), "0.5");
        assert_eq!(count(1000.0), "1\u{202f}000");
    }

    #[test]
    fn times_choose_their_unit() {
        assert_eq!(time(3.21), "3.21\u{a0}ns");
        assert_eq!(time(999.7), "1.00\u{a0}µs");
        assert_eq!(time(1_350.0), "1.35\u{a0}µs");
        assert_eq!(time(2.5e9), "2.50\u{a0}s");
        assert_eq!(time_range(900.0, 1_100.0), "0.900–1.10\u{a0}µs");
    }

    #[test]
    fn lists_read_as_a_sentence() {
        let words = |n: usize| -> Vec<String> {
            ["a", "b", "c"][..n].iter().map(|s| s.to_string()).collect()
        };
        assert_eq!(list(&words(1)), "a");
        assert_eq!(list(&words(2)), "a and b");
        assert_eq!(list(&words(3)), "a, b and c");
    }
}
