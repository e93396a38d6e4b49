//! `trapline insn --batch` as its callers see it: one JSON line in, one out.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// The tool, fed and read in step.
struct Tool {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Tool {
    fn new() -> Tool {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trapline"))
            .args(["insn", "--batch"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("trapline starts");
        Tool {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().expect("piped")),
            child,
        }
    }

    fn ask(&mut self, line: &str) -> Value {
        let input = self.input.as_mut().expect("open");
        writeln!(input, "{line}").expect("the tool reads");
        let mut answer = String::new();
        self.output
            .read_line(&mut answer)
            .expect("the tool answers");
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
    }

    fn case(&mut self, code: &str, more: Value) -> Value {
        let mut case = json!({"name": "case", "code": code, "load": "0x10000"});
        for (key, value) in more.as_object().expect("an object") {
            case[key] = value.clone();
        }
        self.ask(&case.to_string())
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        drop(self.input.take());
        let status = self.child.wait().expect("our own child");
        if !std::thread::panicking() {
            assert!(status.success(), "{status}");
        }
    }
}

#[test]
fn a_case_is_answered_before_the_next_one_is_asked() {
    let mut tool = Tool::new();
    // add [0x20000], ecx; mov eax, [0x20000]; fld1; hlt
    let code = "010c25000002008b042500000200d9e8f4";
    let answer = tool.case(
        code,
        json!({"map": [["0x20000", "0x1000"]], "mem": [["20000", "efbeadde"]]}),
    );
    assert_eq!(answer["name"], "case");
    assert_eq!(answer["stop"], "hlt");
    assert_eq!(answer["gpr"]["rax"], "0xdeadbeef");
    assert_eq!(answer["gpr"]["rip"], "0x10010");
    assert_eq!(answer["rflags"], "0x282");
    assert_eq!(answer["x87"]["fsw"], "0x3800");
    assert_eq!(answer["x87"]["ftw"], "0x3fff");
    assert_eq!(answer["x87"]["st"][0], "0x3fff8000000000000000");
    assert_eq!(answer["mm"][7], "0x8000000000000000");
    assert_eq!(answer["mxcsr"], "0x1f80");
    for (registers, words) in [("xmm", 2), ("ymm", 4)] {
        let registers = answer[registers].as_array().expect("a list");
        assert_eq!(registers.len(), 16);
        assert!(
            registers
                .iter()
                .all(|register| *register == json!(vec!["0x0"; words]))
        );
    }
    // Nothing of it is left.
    let answer = tool.case("8b042500000200f4", json!({}));
    let fault = json!({"vector": "0xe", "error": "0x4", "address": "0x20000"});
    assert_eq!(answer["stop"], fault);
    assert_eq!(answer["gpr"]["rax"], "0x0");
}

#[test]
fn exceptions_stop_with_what_they_push() {
    let mut tool = Tool::new();
    let plain = |vector: &str| json!({"vector": vector, "error": null, "address": null});
    let coded =
        |vector: &str, error: &str| json!({"vector": vector, "error": error, "address": null});
    let cases = [
        // div ecx; int3; int1; ud2
        ("f7f1", plain("0x0"), "0x10000"),
        ("cc", plain("0x3"), "0x10001"),
        ("f1", plain("0x1"), "0x10001"),
        ("0f0b", plain("0x6"), "0x10000"),
        // int 0x80; cli; in al, dx; rdmsr
        ("cd80", coded("0xd", "0x402"), "0x10000"),
        ("fa", coded("0xd", "0x0"), "0x10000"),
        ("ec", coded("0xd", "0x0"), "0x10000"),
        ("0f32", coded("0xd", "0x0"), "0x10000"),
        // syscall; lock nop; 16 bytes
        ("0f05", plain("0x6"), "0x10000"),
        ("f090", plain("0x6"), "0x10000"),
        (
            "66666666666666666666666666666690",
            coded("0xd", "0x0"),
            "0x10000",
        ),
        // bts rax, 63; mov [rax], al; and with rsp as base
        ("480fbae83f8800", coded("0xd", "0x0"), "0x10005"),
        ("480fbaec3f880424", coded("0xc", "0x0"), "0x10005"),
    ];
    for (code, stop, rip) in cases {
        let answer = tool.case(code, json!({}));
        assert_eq!(answer["stop"], stop, "{code}");
        assert_eq!(answer["gpr"]["rip"], rip, "{code}");
    }
}

#[test]
fn what_umip_hides_is_answered_as_linux_does() {
    let mut tool = Tool::new();
    // mov rax, -1; smsw rax; mov rbx, -1; smsw ebx; mov rcx, -1; smsw cx; str edx; sldt esi;
    // sgdt [0x20000]; sidt [0x20010]; mov rdi, [0x20002]; mov rbp, [0x20012]; hlt
    let code = "48c7c0ffffffff480f01e048c7c3ffffffff0f01e348c7c1ffffffff660f01e1\
                0f00ca0f00c60f010425000002000f010c2510000200488b3c2502000200\
                488b2c2512000200f4";
    let answer = tool.case(code, json!({"mem": [["0x20000", "ffff"]]}));
    assert_eq!(answer["stop"], "hlt");
    for (register, value) in [
        ("rax", "0x80050033"),
        ("rbx", "0xffffffff80050033"),
        ("rcx", "0xffffffffffff0033"),
        ("rdx", "0x40"),
        ("rsi", "0x0"),
        ("rdi", "0xfffffffffffe0000"),
        ("rbp", "0xffffffffffff0000"),
    ] {
        assert_eq!(answer["gpr"][register], value, "{register}");
    }
}

#[test]
fn a_line_that_makes_no_sense_is_answered_and_the_run_goes_on() {
    let mut tool = Tool::new();
    for (line, name, error) in [
        ("{", Value::Null, "not JSON"),
        ("[]", Value::Null, "not an object"),
        (r#"{"name": "a"}"#, json!("a"), "no \"code\""),
        (r#"{"name": "b", "code": "90"}"#, json!("b"), "no \"load\""),
        (
            r#"{"name": "c", "code": "9", "load": "0"}"#,
            json!("c"),
            "odd number",
        ),
        (
            r#"{"name": "d", "code": "", "load": "0"}"#,
            json!("d"),
            "no code",
        ),
        (
            r#"{"name": "e", "code": "f4", "load": "0x800000000000"}"#,
            json!("e"),
            "canonical",
        ),
        (
            r#"{"name": "f", "code": "f4", "load": "0", "map": [[1]]}"#,
            json!("f"),
            "not a pair",
        ),
    ] {
        let answer = tool.ask(line);
        assert_eq!(answer["name"], name, "{line}");
        let text = answer["error"].as_str().expect("an error");
        assert!(text.contains(error), "{line}: {text}");
    }
    assert_eq!(tool.case("f4", json!({}))["stop"], "hlt");
}

#[test]
fn a_case_without_an_end_stops_at_the_limit() {
    let mut tool = Tool::new();
    assert_eq!(tool.case("ebfe", json!({}))["stop"], "limit");
    assert_eq!(tool.case("f4", json!({}))["stop"], "hlt");
}

#[test]
fn a_line_without_bounds_is_answered_and_the_run_goes_on() {
    let mut tool = Tool::new();
    let long = format!(
        r#"{{"name": "long", "load": "0", "code": "{}"}}"#,
        "90".repeat(9 << 20)
    );
    for _ in 0..2 {
        let answer = tool.ask(&long);
        assert_eq!(answer["name"], Value::Null);
        assert_eq!(answer["error"], "a line of more than 16 MiB");
        assert_eq!(tool.case("f4", json!({}))["stop"], "hlt");
    }
    // What is long and not too long is run: 1 MiB of nops.
    let answer = tool.case(&format!("{}f4", "90".repeat(1 << 20)), json!({}));
    assert_eq!(answer["gpr"]["rip"], "0x110000");
}

#[test]
fn what_leaves_to_a_kernel_stops_as_the_help_says() {
    let mut tool = Tool::new();
    let plain = |vector: &str| json!({"vector": vector, "error": null, "address": null});
    let gp = |error: &str| json!({"vector": "0xd", "error": error, "address": null});
    let (bp, db, of, ud) = (plain("0x3"), plain("0x1"), plain("0x4"), plain("0x6"));
    // Code, how it stops, and whether RIP is behind it.
    let instructions = [
        ("cc", bp.clone(), true),
        ("cd03", bp, true),
        ("f1", db, true),
        ("cd04", of, true),
        ("cd00", gp("0x2"), false),
        ("cd01", gp("0xa"), false),
        ("cd80", gp("0x402"), false),
        ("cdff", gp("0x7fa"), false),
        ("0f05", ud.clone(), false),
        ("0f34", gp("0x0"), false),
        ("480f07", ud.clone(), false),
        // sysexit, in, out, ins, outs, cli, sti, clts
        ("480f35", gp("0x0"), false),
        ("ec", gp("0x0"), false),
        ("e480", gp("0x0"), false),
        ("ef", gp("0x0"), false),
        ("6c", gp("0x0"), false),
        ("6f", gp("0x0"), false),
        ("fa", gp("0x0"), false),
        ("fb", gp("0x0"), false),
        ("0f06", gp("0x0"), false),
        ("f4", json!("hlt"), false),
    ];
    for (code, stop, past) in instructions {
        for prefixes in ["", "66", "f3", "f2", "2e", "6466", "3e67"] {
            // Prefixes that mean nothing to it leave the instruction what it is.
            let code = format!("{prefixes}{code}");
            let rip = 0x1_0000 + if past { code.len() / 2 } else { 0 };
            let answer = tool.case(&code, json!({}));
            assert_eq!(answer["stop"], stop, "{code}");
            assert_eq!(answer["gpr"]["rip"], format!("{rip:#x}"), "{code}");
            assert_eq!(answer["rflags"], "0x202", "{code}");
        }
        // None may be locked.
        assert_eq!(
            tool.case(&format!("f0{code}"), json!({}))["stop"],
            ud,
            "{code}"
        );
    }
}
