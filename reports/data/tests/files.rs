//! Behaviour of a run's files: what is written is read back, and what is wrong is named.

use std::path::Path;

use proptest::prelude::*;
use reports_data::{
    Class, Direction, Error, ExitRow, ExitWriter, Metric, Phase, Row, Sample, SampleWriter, Status,
    Summary, TableWriter, Unit, read_table, summarise,
};

fn sample(workload: &str, mode: &str, value: f64) -> Sample {
    Sample {
        run: "r".into(),
        workload: workload.into(),
        mode: mode.into(),
        engine: "bt".into(),
        flavour: "unaware".into(),
        phase: Phase::Warm,
        metric: Metric::TIME,
        round: 0,
        order: 0,
        value: Some(value),
        checksum: Some(0xfeed),
        status: Status::Ok,
        reason: String::new(),
    }
}

fn without(workload: &str, mode: &str, status: Status, reason: &str) -> Sample {
    Sample {
        value: None,
        checksum: None,
        status,
        reason: reason.into(),
        ..sample(workload, mode, 0.0)
    }
}

fn finite() -> impl Strategy<Value = f64> {
    prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL | prop::num::f64::ZERO
}

/// Text that csv must quote, and text that is no ASCII.
fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 ,;\"'\r\n<>&\\\\äß–💡=\\-]{1,24}".prop_filter("not blank", |s| !s.trim().is_empty())
}

fn word<T: Copy + std::fmt::Debug>(all: &'static [T]) -> impl Strategy<Value = T> {
    prop::sample::select(all)
}

prop_compose! {
    fn any_sample()(
        names in (text(), text(), text(), text(), text(), text()),
        words in (word(Phase::ALL), word(Unit::ALL), word(Direction::ALL), word(Class::ALL)),
        numbers in (any::<u32>(), any::<u32>(), any::<Option<u64>>()),
        value in finite(),
        status in word(Status::ALL),
        reason in text(),
    ) -> Sample {
        let (run, workload, mode, engine, flavour, metric) = names;
        let (phase, unit, direction, class) = words;
        Sample {
            run, workload, mode, engine, flavour, phase,
            metric: Metric { name: metric.into(), unit, direction, class },
            round: numbers.0,
            order: numbers.1,
            value: status.is_ok().then_some(value),
            checksum: numbers.2,
            status,
            reason: if status.is_ok() { String::new() } else { reason },
        }
    }
}

prop_compose! {
    fn any_exit()(
        names in (text(), text(), text(), text(), text(), text()),
        phase in word(Phase::ALL),
        round in any::<u32>(),
        count in any::<u64>(),
        per_iteration in finite().prop_map(f64::abs),
    ) -> ExitRow {
        let (run, workload, mode, source, kind, reason) = names;
        ExitRow { run, workload, mode, phase, round, source, kind, reason, count, per_iteration }
    }
}

fn round_trip<R: Row + PartialEq + std::fmt::Debug>(rows: &[R]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table.csv");
    let mut writer = TableWriter::create(&path).unwrap();
    for row in rows {
        writer.append(row).unwrap();
    }
    assert_eq!(read_table::<R>(&path).unwrap(), rows);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn samples_survive_the_round_trip(rows in prop::collection::vec(any_sample(), 0..8)) {
        round_trip(&rows);
    }

    #[test]
    fn exits_survive_the_round_trip(rows in prop::collection::vec(any_exit(), 0..8)) {
        round_trip(&rows);
    }

    #[test]
    fn garbage_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("garbage");
        std::fs::write(&path, &bytes).unwrap();
        prop_assert!(read_table::<Sample>(&path).is_err());
        prop_assert!(read_table::<ExitRow>(&path).is_err());
        prop_assert!(Summary::read(&path).is_err());
        prop_assert!(reports_data::Manifest::read(&path).is_err());
    }

    #[test]
    fn a_damaged_byte_is_never_a_panic(at in 0..400_usize, byte in any::<u8>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.csv");
        let mut writer = SampleWriter::create(&path).unwrap();
        writer.append(&sample("alu", "full", 1.5)).unwrap();
        writer.append(&without("in", "full", Status::Failed, "because, \"so\"")).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        std::fs::write(&path, &bytes).unwrap();
        // What can still be read must still keep the format's rules.
        for row in read_table::<Sample>(&path).unwrap_or_default() {
            prop_assert!(row.check().is_ok());
        }
    }

    #[test]
    fn the_interval_holds_the_median(
        values in prop::collection::vec(0.001..1e9_f64, 2..24), seed in any::<u64>(),
    ) {
        let samples: Vec<Sample> = values.iter().map(|v| sample("alu", "full", *v)).collect();
        let row = summarise(&samples, seed).rows.remove(0);
        let (low, high) = (row.ci_low.unwrap(), row.ci_high.unwrap());
        let value = row.value.unwrap();
        prop_assert!(low <= value && value <= high, "{low} {value} {high}");
        let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = values.iter().copied().fold(0.0, f64::max);
        prop_assert!(smallest <= low && high <= largest);
        prop_assert_eq!(row.n, values.len());
    }

    #[test]
    fn summaries_survive_the_round_trip(samples in prop::collection::vec(any_sample(), 0..8), seed in any::<u64>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        let summary = summarise(&samples, seed);
        summary.write(&path).unwrap();
        prop_assert_eq!(Summary::read(&path).unwrap(), summary);
    }
}

#[test]
fn no_number_that_is_none_gets_into_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.csv");
    let mut writer = SampleWriter::create(&path).unwrap();
    let exits = dir.path().join("exits.csv");
    let mut exit_writer = ExitWriter::create(&exits).unwrap();
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let refused = writer.append(&sample("alu", "full", value)).unwrap_err();
        assert!(
            matches!(
                refused,
                Error::Refused {
                    column: "value",
                    ..
                }
            ),
            "{refused}"
        );
        let mut summary = summarise(&[sample("alu", "full", 1.0)], 1);
        summary.rows[0].value = Some(value);
        assert!(summary.write(&dir.path().join("summary.json")).is_err());
        let refused = exit_writer.append(&exit(value)).unwrap_err();
        assert!(
            matches!(
                refused,
                Error::Refused {
                    column: "per_iteration",
                    ..
                }
            ),
            "{refused}"
        );
    }
    assert_eq!(read_table::<Sample>(&path).unwrap(), []);
    assert_eq!(read_table::<ExitRow>(&exits).unwrap(), []);
    assert!(!dir.path().join("summary.json").exists());
}

fn exit(per_iteration: f64) -> ExitRow {
    ExitRow {
        run: "r".into(),
        workload: "out".into(),
        mode: "full".into(),
        phase: Phase::Warm,
        round: 0,
        source: "vmm".into(),
        kind: "pio".into(),
        reason: "out".into(),
        count: 1,
        per_iteration,
    }
}

#[test]
fn value_status_and_reason_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = SampleWriter::create(dir.path().join("samples.csv")).unwrap();
    let valued_failure = Sample {
        status: Status::Failed,
        reason: "why".into(),
        ..sample("alu", "full", 1.0)
    };
    let nameless = Sample {
        mode: " ".into(),
        ..sample("alu", "full", 1.0)
    };
    for (row, column) in [
        (without("alu", "full", Status::Ok, ""), "value"),
        (without("alu", "full", Status::Skipped, "  "), "reason"),
        (valued_failure, "value"),
        (nameless, "mode"),
    ] {
        match writer.append(&row).unwrap_err() {
            Error::Refused { column: at, .. } => assert_eq!(at, column),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn every_row_is_on_disk_when_append_returns() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.csv");
    let mut writer = SampleWriter::create(&path).unwrap();
    for count in 1..4 {
        writer.append(&sample("alu", "full", 1.0)).unwrap();
        // The writer is still open.
        assert_eq!(read_table::<Sample>(&path).unwrap().len(), count);
    }
}

/// Writes a table of one good row with one cell replaced, and gives the error of reading it.
fn broken(from: &str, to: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.csv");
    let mut writer = SampleWriter::create(&path).unwrap();
    writer.append(&sample("alu", "full", 1.5)).unwrap();
    writer.append(&sample("sort", "full", 2.5)).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let at = text.find(from).expect("the cell is in the file");
    let text = format!("{}{to}{}", &text[..at], &text[at + from.len()..]);
    std::fs::write(&path, text).unwrap();
    let error = read_table::<Sample>(&path).unwrap_err().to_string();
    let dir = format!("{}/", dir.path().display());
    error.replace(&dir, "")
}

#[test]
fn errors_name_file_line_and_column() {
    for (from, to, expected) in [
        (
            "2.5",
            "fast",
            "samples.csv:3: column `value`: `fast`: invalid float literal",
        ),
        (
            "1.5",
            "NaN",
            "samples.csv:2: column `value`: NaN is not a finite number",
        ),
        (
            "1.5",
            "",
            "samples.csv:2: column `value`: a row with status ok needs a value",
        ),
        (
            "000000000000feed",
            "xyz",
            "samples.csv:2: column `checksum`: `xyz`: invalid digit found in string",
        ),
        (
            "warm",
            "tepid",
            "samples.csv:2: column `phase`: `tepid` is not a phase (boot, cold, warm)",
        ),
        ("order,", "", "samples.csv:1: no column `order`"),
        (
            "order,",
            "round,",
            "samples.csv:1: column `round` stands twice",
        ),
        (
            "r,alu,full",
            "r,full",
            "samples.csv:2: 15 fields where the header has 16",
        ),
    ] {
        assert_eq!(broken(from, to), expected);
    }
}

#[test]
fn json_errors_name_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("summary.json");
    let check = |text: &str, expected: &str| {
        std::fs::write(&path, text).unwrap();
        let error = Summary::read(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("{\n  \"rows\": 3\n}", "summary.json:2:");
    check(
        "{\"schema_version\": 99, \"rows\": []}",
        "schema_version 99",
    );
    check(
        r#"{"schema_version": 1, "rows": [{"workload": "a", "mode": "b", "phase": "warm",
            "metric": "time", "unit": "ns", "value": null, "ci_low": null, "ci_high": null, "n": 0,
            "status": "ok", "reason": ""}]}"#,
        "row 0: column `value`: a row with status ok needs a value",
    );
}

#[test]
fn the_summary_has_the_agreed_shape() {
    let summary = summarise(
        &[
            sample("alu", "native", 10.0),
            sample("alu", "native", 12.0),
            sample("alu", "full", 22.0),
            sample("alu", "full", 22.0),
            without("in", "native", Status::Unsupported, "ring 0"),
        ],
        1,
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("summary.json");
    summary.write(&path).unwrap();
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(json["schema_version"], 1);
    let rows = json["rows"].as_array().unwrap();
    let keys: Vec<&str> = rows[0]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut agreed = [
        "workload", "mode", "phase", "metric", "unit", "value", "ci_low", "ci_high", "n", "status",
        "reason",
    ];
    agreed.sort_unstable();
    assert_eq!(keys, agreed);
    assert_eq!(rows[0]["metric"], "time");
    assert_eq!(rows[0]["unit"], "ns");
    assert_eq!(rows[0]["value"], 11.0);
    let slowdown = rows.last().unwrap();
    assert_eq!(slowdown["metric"], "slowdown");
    assert_eq!(slowdown["value"], 2.0);
    assert_eq!(rows[2]["status"], "unsupported");
    assert!(rows[2]["value"].is_null());
}

fn state(samples: &[Sample]) -> (Status, String, usize) {
    let row = summarise(samples, 1).rows.remove(0);
    assert_eq!(row.value.is_some(), row.status.is_ok());
    (row.status, row.reason, row.n)
}

#[test]
fn one_bad_sample_decides_the_row() {
    let good = || sample("alu", "full", 1.0);
    let bad = |status, reason: &str| without("alu", "full", status, reason);
    for (samples, expected) in [
        (vec![good(), good()], (Status::Ok, "", 2)),
        (
            vec![good(), bad(Status::Failed, "f"), good()],
            (Status::Failed, "f", 0),
        ),
        (
            vec![bad(Status::Invalid, "i"), good()],
            (Status::Invalid, "i", 0),
        ),
        (
            vec![bad(Status::Invalid, "i"), bad(Status::Failed, "f")],
            (Status::Failed, "f", 0),
        ),
        (
            vec![good(), bad(Status::Unavailable, "u")],
            (Status::Unavailable, "u", 0),
        ),
        (
            vec![good(), bad(Status::Skipped, "s"), good()],
            (Status::Ok, "", 2),
        ),
        (vec![bad(Status::Skipped, "s")], (Status::Skipped, "s", 0)),
    ] {
        let expected = (expected.0, expected.1.to_owned(), expected.2);
        assert_eq!(state(&samples), expected);
    }
}

#[test]
fn slowdown_stands_only_where_native_has_a_figure() {
    let slowdowns = |samples: &[Sample]| -> Vec<(String, Status)> {
        let rows = summarise(samples, 1).rows.into_iter();
        rows.filter(|row| row.metric == "slowdown")
            .map(|row| (row.workload, row.status))
            .collect()
    };
    let found = slowdowns(&[
        sample("alu", "native", 10.0),
        sample("alu", "full", 20.0),
        sample("sort", "native", 10.0),
        without("sort", "full", Status::Failed, "tripped"),
        without("in", "native", Status::Unsupported, "ring 0"),
        sample("in", "full", 20.0),
        sample("empty", "native", 1.0),
        sample("empty", "full", 2.0),
        sample("zero", "native", 0.0),
        sample("zero", "full", 2.0),
    ]);
    assert_eq!(
        found,
        [
            ("alu".to_owned(), Status::Ok),
            ("sort".to_owned(), Status::Failed)
        ]
    );
}

#[test]
fn a_rows_interval_does_not_depend_on_its_neighbours() {
    let alu: Vec<Sample> = (0..9)
        .map(|v| sample("alu", "full", f64::from(v * v)))
        .collect();
    let alone = summarise(&alu, 5).rows.remove(0);
    let mut all = vec![sample("in", "full", 3.0), sample("in", "full", 4.0)];
    all.extend(alu);
    assert_eq!(summarise(&all, 5).rows[1], alone);
}

#[test]
fn a_manifest_of_this_host_survives_the_round_trip() {
    let mut manifest = reports_data::Manifest::collect(reports_data::Circumstances {
        run: "r",
        started_unix_s: 951_782_400,
        command: vec!["trapline".into(), "a \"quoted\" one".into()],
        seed: u64::MAX,
        profile: "release",
        source_tree: Path::new(env!("CARGO_MANIFEST_DIR")),
    });
    assert_eq!(manifest.started, "2000-02-29T00:00:00Z");
    assert!(manifest.host.kernel.is_some() && manifest.host.cpu_model.is_some());
    assert!(manifest.host.steal_ticks_after.is_none());
    manifest.finish(1.25);
    assert_eq!(
        manifest.host.steal_ticks_after.is_some(),
        manifest.host.steal_ticks_before.is_some()
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    manifest.write(&path).unwrap();
    manifest.write(&path).unwrap();
    assert_eq!(reports_data::Manifest::read(&path).unwrap(), manifest);
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(files.len(), 1, "nothing else is left behind");
}
