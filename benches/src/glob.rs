//! Choosing workloads by name: comma-separated patterns with `*` and `?`.

/// Whether `name` matches one of the comma-separated `patterns`.
pub fn matches(patterns: &str, name: &str) -> bool {
    patterns
        .split(',')
        .any(|pattern| matches_one(pattern.trim().as_bytes(), name.as_bytes()))
}

fn matches_one(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|taken| matches_one(rest, &name[taken..])),
        (Some((b'?', rest)), Some((_, tail))) => matches_one(rest, tail),
        (Some((letter, rest)), Some((first, tail))) => letter == first && matches_one(rest, tail),
        (None, Some(_)) | (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_whole_names() {
        for (patterns, name, expected) in [
            ("*", "alu", true),
            ("alu", "alu", true),
            ("al", "alu", false),
            ("s*", "sieve", true),
            ("s*t", "sort", true),
            ("s*t", "sieve", false),
            ("?ort", "sort", true),
            ("in,out", "out", true),
            ("in, out", "out", true),
            ("in,out", "input", false),
            ("", "alu", false),
        ] {
            assert_eq!(matches(patterns, name), expected, "{patterns} {name}");
        }
    }
}
