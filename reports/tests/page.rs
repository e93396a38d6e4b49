//! Properties of the rendered page: it is whole, it is safe, and it hides nothing.

mod fixture;
mod markup;

use std::path::Path;

use markup::{check, section};
use reports_data::{Metric, Phase, SUMMARY, Sample, Status};

fn page_of(manifest_of: &[&str], samples: &[Sample]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fixture::write_with(dir.path(), &fixture::manifest(manifest_of), samples, &[]);
    let page = reports::render(dir.path()).unwrap();
    check(&page);
    page
}

fn page_with(columns: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path(), columns);
    let page = reports::render(dir.path()).unwrap();
    check(&page);
    page
}

fn ok(workload: &str, mode: &str, value: f64, round: u32) -> Sample {
    Sample {
        value: Some(value),
        round,
        ..fixture::sample(workload, mode, Phase::Warm, Metric::TIME)
    }
}

fn failed(workload: &str, mode: &str, reason: &str) -> Sample {
    Sample {
        status: Status::Failed,
        reason: reason.into(),
        ..fixture::sample(workload, mode, Phase::Warm, Metric::TIME)
    }
}

#[test]
fn pages_of_four_and_eight_columns_are_whole() {
    for columns in [fixture::FOUR, fixture::EIGHT] {
        let page = page_with(columns);
        assert_eq!(
            page.matches("<svg").count(),
            5,
            "plot, exits, callouts, boot, lateness"
        );
        let head = page.split_once("<table id=\"rows-table\"").unwrap().1;
        let rows = head
            .split("</table>")
            .next()
            .unwrap()
            .matches("<tr>")
            .count();
        assert!(rows > columns.len() * 20, "{rows} rows");
    }
}

#[test]
fn rendering_is_a_pure_function_of_the_files() {
    assert_eq!(page_with(fixture::FOUR), page_with(fixture::FOUR));
}

#[test]
fn a_missing_summary_is_made_from_the_samples() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path(), fixture::FOUR);
    let with = reports::render(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join(SUMMARY)).unwrap();
    assert_eq!(reports::render(dir.path()).unwrap(), with);
}

#[test]
fn hostile_names_stay_text() {
    let script = "<script>alert(1)</script>";
    let quotes = "\"><img src=x onerror='alert(2)'>";
    let samples: Vec<Sample> = (0..3)
        .flat_map(|round| {
            [
                ok(script, "native", 10.0, round),
                ok(script, quotes, 20.0 + f64::from(round), round),
                ok("in", "<svg onload=alert(3)>", 30.0, round),
                failed("\"#01005A\" ]]> --><b>", quotes, "</title></style><script>"),
            ]
        })
        .collect();
    let mut manifest = fixture::manifest(fixture::FOUR);
    manifest.run = "</title><script>alert(4)</script>".into();
    manifest.modes[1].name = quotes.into();
    manifest.modes[1].label = "</text></svg><script>alert(5)".into();
    manifest.command = vec!["javascript:alert(6)".into(), "<iframe>".into()];
    let dir = tempfile::tempdir().unwrap();
    fixture::write_with(
        dir.path(),
        &manifest,
        &samples,
        &fixture::exits(fixture::FOUR),
    );
    let page = reports::render(dir.path()).unwrap();
    check(&page);
    assert_eq!(page.matches("<script").count(), 1, "the page's own alone");
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(!page.contains("<img") && !page.contains("<b>,"));
}

#[test]
fn an_empty_run_says_so_in_every_section() {
    let page = page_of(&[], &[]);
    assert!(section(&page, "verdict").contains("No verdict"));
    assert!(section(&page, "rows").contains("This run has no row."));
    assert!(!page.contains("<svg"));
}

#[test]
fn a_run_of_failures_gives_reasons_and_no_figure() {
    let samples: Vec<Sample> = ["alu", "in"]
        .iter()
        .flat_map(|workload| {
            ["native", "full", "hardware"].map(|mode| failed(workload, mode, "the guest tripped"))
        })
        .collect();
    let page = page_of(&["native", "full", "hardware"], &samples);
    assert!(section(&page, "verdict").contains("No verdict"));
    assert!(section(&page, "rows").matches("the guest tripped").count() >= 6);
    assert!(
        !page.contains("class=\"num heat"),
        "a coloured cell without a figure"
    );
    assert!(!page.contains("<svg"));
}

#[test]
fn a_native_process_that_failed_is_no_missing_operation() {
    let mut samples: Vec<Sample> = (0..3)
        .map(|round| ok("alu", "full", 100.0 + f64::from(round), round))
        .collect();
    samples.push(failed("alu", "native", "it did not start"));
    samples.push(ok("in", "full", 5.0, 0));
    let page = page_of(&["native", "full"], &samples);
    assert!(section(&page, "verdict").contains("Without any warm figure: native"));
    assert!(section(&page, "verdict").contains("nothing to say"));
    assert!(section(&page, "verdict").contains("0 of 1"));
    assert!(section(&page, "slowdown").contains("it did not start"));
    assert!(section(&page, "ring0").contains("Workloads that do run natively stand here too"));
}

#[test]
fn the_kernels_counts_stand_beside_the_exits() {
    let exits = section(&page_with(fixture::FOUR), "exits");
    assert!(exits.contains("kvm-stats counts per iteration"));
    assert!(exits.contains("another layer, beside the exits and not part of them"));
    // Two sources with a count each are never one figure: 1 exit, 2.02 emulated, no 3.02.
    assert!(exits.contains(" 2.02 ") && !exits.contains("3.02"));
}

#[test]
fn one_mode_alone_is_shown_without_a_comparison() {
    let samples: Vec<Sample> = (0..5)
        .map(|round| ok("in", "full", 100.0 + f64::from(round), round))
        .collect();
    let page = page_of(&["full"], &samples);
    let verdict = section(&page, "verdict");
    assert!(verdict.contains("nothing to compare"), "{verdict}");
    assert!(section(&page, "ring0").contains("102"));
    assert!(section(&page, "slowdown").contains("no native figure"));
}

#[test]
fn a_mode_that_left_no_row_is_named() {
    let samples = [ok("alu", "native", 1.0, 0)];
    let page = page_of(&["native", "full"], &samples);
    assert!(section(&page, "rows").contains("without any row in this run: full"));
}

#[test]
fn a_failed_sample_takes_its_row_out_of_every_mean() {
    let page = page_with(fixture::FOUR);
    // The fixture's qemu-tcg fails once in `indirect`: seven compute workloads, six in the mean.
    let verdict = section(&page, "verdict");
    assert!(verdict.contains("QEMU TCG takes"), "{verdict}");
    assert!(verdict.contains("geomean of 6 of 7"), "{verdict}");
    assert!(section(&page, "rows").contains("oracle says 1122334455667788"));
}

#[test]
fn the_hybrid_claim_is_judged_only_where_it_was_measured() {
    let claim = "Is the hybrid mode often the fastest?";
    let verdict = section(&page_with(fixture::FOUR), "verdict");
    assert!(verdict.contains(claim) && verdict.contains("Not measured in this run"));
    let page = page_with(fixture::EIGHT);
    let verdict = section(&page, "verdict");
    assert!(verdict.contains(claim) && !verdict.contains("Not measured"));
    // The fixture's times: six-fold, level, a third; no figure in hardware.
    for words in [
        "hybrid-bt is the fastest of all modes in 1 of 3 device workloads (blk_randread)",
        "hybrid-bt against full: faster in 2 of 4 I/O workloads: blk_randread 8",
        "slower in 1: net_rr 0.3",
        "not decided in 1: blk_seqread",
        "hybrid KVM (pvm) against KVM (pvm): faster in",
        "hybrid KVM (pvm) against full: ",
    ] {
        assert!(verdict.contains(words), "{words} in {verdict}");
    }
    let io = section(&page, "io");
    for words in [
        "IOPS",
        "MB/s",
        "exits",
        "not decided",
        "p99",
        "timer_lapic",
        "no disk",
        "hybrid-bt: exits of a request of blk_randread 1 1.00–1.00 at most 1.1 met",
        "hybrid-bt: exits of a request of blk_seqread 2 2.00–2.00 at most 1.1 missed",
        "hybrid-bt: rate of blk_randread over full's 8",
        "at least 5.00× met",
        "hybrid-bt: time of blk_seqread over native's 12",
        "at most 1.50× missed",
        "full: rate of blk_randread over QEMU TCG's 1.",
    ] {
        assert!(io.contains(words), "{words} in {io}");
    }
}

#[test]
fn a_kvm_column_carries_its_backend() {
    let page = page_with(fixture::FOUR);
    for id in ["slowdown", "ring0", "nano", "exits", "boot"] {
        assert!(section(&page, id).contains("KVM (pvm)"), "{id}");
    }
    assert!(section(&page, "environment").contains("software: no VMX or SVM"));
}

#[test]
fn callouts_are_not_among_the_exits() {
    let page = page_with(fixture::FOUR);
    let exits = section(&page, "exits");
    assert!(exits.contains("A translator's callout is not a VM exit"));
    assert!(exits.contains("never added up"));
    assert!(exits.contains("KVM_EXIT_IO out 0x2f8") && !exits.contains("tlb-miss"));
    let translator = section(&page, "translator");
    assert!(translator.contains("tlb-miss") && !translator.contains("KVM_EXIT_IO"));
}

/// A run of native and para with floors, of which `lacking` left no sample.
fn page_with_floors(lacking: &str) -> String {
    const COLUMNS: &[&str] = &["native", "para"];
    let dir = tempfile::tempdir().unwrap();
    let (info, mut floors) = fixture::floors();
    floors.retain(|sample| sample.workload != lacking);
    let mut manifest = fixture::manifest(COLUMNS);
    manifest.modes.push(info);
    let samples = [fixture::samples(COLUMNS), floors].concat();
    fixture::write_with(dir.path(), &manifest, &samples, &fixture::exits(COLUMNS));
    let page = reports::render(dir.path()).unwrap();
    check(&page);
    page
}

#[test]
fn floors_are_lines_and_ratios_and_no_column() {
    let page = page_with_floors("");
    let nano = section(&page, "nano");
    for label in ["system call", "user notification round trip"] {
        assert!(nano.contains(label), "{label}: {nano}");
    }
    assert!(page.contains("Reference lines: system call at 110"));
    let para = section(&page, "para");
    // 304 ns over 250 ns, 1.89 µs over 250 ns, and bounds without a floor.
    for text in [
        "1.21×",
        "met",
        "7.5",
        "missed",
        "at most 5.00",
        "host_syscall",
    ] {
        assert!(para.contains(text), "{text}: {para}");
    }
    for id in ["verdict", "slowdown", "ring0", "boot", "warmup", "exits"] {
        let text = section(&page, id);
        assert!(!text.contains("notification"), "{id}: {text}");
        assert!(!text.contains("floor"), "{id}: {text}");
    }
    assert!(!section(&page, "rows").contains("without any row"));
}

#[test]
fn a_ratio_needs_its_floor() {
    let para = section(&page_with_floors("notification"), "para");
    assert!(para.contains("not run"), "{para}");
    assert!(!para.contains("1.21×"), "{para}");
    assert!(!page_with(fixture::EIGHT).contains("Reference lines"));
    let para = section(&page_with(fixture::EIGHT), "para");
    assert!(para.contains("This run measured no floor"), "{para}");
    let none = section(&page_with(fixture::FOUR), "para");
    assert!(
        none.contains("No guest of this run knew its host"),
        "{none}"
    );
}

#[test]
fn hypercalls_stand_by_tier_and_by_name() {
    let para = section(&page_with_floors(""), "para");
    for text in [
        "exits of one iteration, warm, hypercalls by tier",
        "hypercall counts per iteration, warm",
        "update_va_mapping T2",
        "upcall and fault counts per iteration, warm",
        "doorbell",
    ] {
        assert!(para.contains(text), "{text}: {para}");
    }
    // Of ptemod: four calls of tier T2, no upcall, three shootdowns.
    assert!(para.contains(" 0 0 4 0 0 3 "), "{para}");
}

#[test]
fn the_csv_files_are_inside_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path(), fixture::FOUR);
    let page = reports::render(dir.path()).unwrap();
    for name in ["samples.csv", "exits.csv"] {
        let link = page.split(&format!("download=\"{name}\"")).nth(1).unwrap();
        let data = link
            .split("base64,")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        assert_eq!(decode(data), std::fs::read(dir.path().join(name)).unwrap());
    }
}

/// Base 64 by the letter, for the test alone.
fn decode(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut bytes = Vec::new();
    for chunk in text.as_bytes().chunks(4) {
        let digits: Vec<u8> = chunk
            .iter()
            .filter(|c| **c != b'=')
            .map(|c| value(*c))
            .collect();
        let bits = digits
            .iter()
            .fold(0_u32, |bits, d| bits << 6 | u32::from(*d));
        let bits = bits << (6 * (4 - digits.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..digits.len()]);
    }
    bytes
}

#[test]
fn workloads_stand_in_catalogue_order_with_unknown_ones_last() {
    let samples: Vec<Sample> = ["zeta", "in", "sieve", "alu", "syscall"]
        .iter()
        .flat_map(|workload| {
            (0..3).flat_map(|round| {
                [
                    ok(workload, "native", 1.0, round),
                    ok(workload, "full", 2.0, round),
                ]
            })
        })
        .collect();
    let text = section(&page_of(&["native", "full"], &samples), "slowdown");
    let at = |name: &str| text.find(&format!(" {name} ")).unwrap();
    assert!(at("alu") < at("sieve"));
    assert!(at("sieve") < at("syscall"));
    assert!(at("syscall") < at("in"));
    assert!(at("in") < at("zeta"));
}

#[test]
fn the_report_is_written_beside_its_files() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path(), fixture::FOUR);
    let path = reports::write_report(dir.path()).unwrap();
    assert_eq!(path, dir.path().join("report.html"));
    let page = std::fs::read_to_string(path).unwrap();
    assert_eq!(page, reports::render(dir.path()).unwrap());
}

#[test]
fn a_directory_without_a_run_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = reports::render(dir.path()).unwrap_err().to_string();
    assert!(error.contains("manifest.json"), "{error}");
}

/// Leaves the fixtures' pages in the directory that TRAPLINE_FIXTURE_PAGES names, to be looked at.
#[test]
fn pages_can_be_looked_at() {
    let Some(dir) = std::env::var_os("TRAPLINE_FIXTURE_PAGES") else {
        return;
    };
    for columns in [fixture::FOUR, fixture::EIGHT] {
        let page = Path::new(&dir).join(format!("fixture-{}.html", columns.len()));
        std::fs::write(page, page_with(columns)).unwrap();
    }
}
