//! `trapline insn`: ring-3 snippets from JSON lines, answered in JSON lines.
//!
//! Each line is a case of its own: one that makes no sense, or that the engine can't run, is
//! answered with its name and an error, and the next one is taken. Answers are flushed one by one,
//! so a caller may feed cases through a pipe in step.
//!
//! Invariant: no line takes more than [`LONGEST`] bytes of memory before it is parsed.

use std::io::{BufRead, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use bt::UserStop;
use bt::insn::{Bench, Case, End, Outcome};
use serde_json::{Map, Value, json};

use crate::{cli, status};

/// How long a case may run.
const LIMIT: Duration = Duration::from_secs(2);

/// Longest line that is parsed.
const LONGEST: usize = 16 << 20;

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

pub(crate) const HELP: &str = r#"One JSON object a line on stdin, one a line on stdout:
  {"name": "add", "code": "4801d8f4", "load": "0x10000",
   "map": [["0x20000", "0x1000"]], "mem": [["0x20000", "0102"]]}
  {"name": "add", "stop": "hlt", "gpr": {"rax": "0x0", ..., "rip": "0x10003"}, "rflags": "0x246",
   "x87": {"fcw": "0x37f", "fsw": "0x0", "ftw": "0xffff", "st": ["0x00000000000000000000", ...]},
   "mm": ["0x0", ...], "xmm": [["0x0", "0x0"], ...], "ymm": [["0x0", "0x0", "0x0", "0x0"], ...],
   "mxcsr": "0x1f80"}

A case is 64-bit code that runs in ring 3 from "load" on, with general registers 0, RFLAGS 0x202,
x87 as after finit, SSE and AVX as after reset, until `hlt` or an exception. "map" and "mem" may be
left out; of a range of 16 MiB or more, pages have memory from when they are touched. Memory is zeroed for each case, and readable, writable and executable in whole pages:
those around the code, around each range of "map" (address, length) and around each piece of "mem"
(address, contents). Integers are hex strings, "0x" or not; JSON numbers are taken too.

  stop   "hlt"; "limit" after 2 s; or {"vector": "0xe", "error": "0x6", "address": "0x1000"}, error
         and address (CR2) being null where the exception has none
  rip    of hlt, or of the faulting instruction; behind the instruction for a trap
  ftw    the full tag word, as fstenv stores it
  st     ST0 to ST7, 80 bits each; mm: MM0 to MM7, the physical registers
  xmm    low and high half; ymm: four words, lowest first

There is no kernel to leave to. The instructions that would, stop as on a processor whose kernel
offers nothing but breakpoints, whatever prefixes they have:
  int3, int 3, int1   the traps 0x3, 0x3 and 0x1; int 4 is the trap 0x4
  int n               any other n: #GP with the missing gate's error code, n * 8 + 2
  syscall, sysret     #UD, with EFER.SCE clear; sysenter #GP(0), with IA32_SYSENTER_CS 0
  in, out, cli, sti   #GP(0), with IOPL 0; so is all that ring 3 may not do, but for hlt
  sgdt, sidt, smsw    what Linux answers in place of the #GP that CR4.UMIP raises: limit 0 and bases
                      0xfffffffffffe0000 and 0xffffffffffff0000, 0x80050033; so do sldt and str: 0, 0x40

A line that can't be answered yields {"name": ..., "error": "why"}, and so does one of more than
16 MiB, its name being null; the next line is taken.

Example:
  echo '{"name": "inc", "code": "ffc0f4", "load": "0x10000"}' | trapline insn --batch"#;

/// Answers cases until the end of stdin.
pub(crate) fn run(arguments: &cli::Insn) -> anyhow::Result<ExitCode> {
    debug_assert!(arguments.batch, "clap requires it");
    let mut bench = Bench::new(LIMIT).context("no room for a virtual machine")?;
    let mut input = std::io::stdin().lock();
    let mut output = std::io::BufWriter::new(std::io::stdout().lock());
    let mut line = Vec::new();
    loop {
        line.clear();
        let answer = match next_line(&mut input, &mut line, LONGEST).context("stdin")? {
            Line::End => return Ok(ExitCode::from(status::SUCCESS)),
            Line::Whole if line.trim_ascii().is_empty() => continue,
            Line::Whole => answer(&mut bench, &line),
            Line::TooLong => {
                let error = format!("a line of more than {} MiB", LONGEST >> 20);
                json!({"name": null, "error": error})
            }
        };
        serde_json::to_writer(&mut output, &answer).map_err(std::io::Error::from)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
}

/// What came of reading a line.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// Nothing is left.
    End,
    /// It is there.
    Whole,
    /// It was passed over.
    TooLong,
}

/// Reads a line of up to `longest` bytes, its end aside, and passes over the rest of a longer one.
fn next_line(
    input: &mut impl BufRead,
    line: &mut Vec<u8>,
    longest: usize,
) -> std::io::Result<Line> {
    let most = longest as u64 + 1;
    if input.by_ref().take(most).read_until(b'\n', line)? == 0 {
        return Ok(Line::End);
    }
    if line.len() <= longest || line.ends_with(b"\n") {
        return Ok(Line::Whole);
    }
    // Its memory isn't needed any more, and neither is that of what follows.
    *line = Vec::new();
    input.skip_until(b'\n')?;
    Ok(Line::TooLong)
}

fn answer(bench: &mut Bench, line: &[u8]) -> Value {
    let parsed: Result<Value, _> = serde_json::from_slice(line);
    let name = parsed
        .as_ref()
        .ok()
        .and_then(|value| value.get("name").cloned())
        .unwrap_or(Value::Null);
    let outcome = parsed
        .context("not JSON")
        .and_then(|value| case(&value))
        .and_then(|case| Ok(bench.run(&case)?));
    match outcome {
        Ok(outcome) => report(name, &outcome),
        Err(error) => json!({"name": name, "error": format!("{error:#}")}),
    }
}

fn case(value: &Value) -> anyhow::Result<Case> {
    let object = value.as_object().context("not an object")?;
    let field = |name: &'static str| object.get(name).with_context(|| format!("no \"{name}\""));
    Ok(Case {
        code: bytes(field("code")?).context("\"code\"")?,
        load: integer(field("load")?).context("\"load\"")?,
        map: pairs(object, "map", integer)?,
        mem: pairs(object, "mem", bytes)?,
    })
}

/// A list of (address, something); nothing if it isn't there.
fn pairs<T>(
    object: &Map<String, Value>,
    name: &'static str,
    second: impl Fn(&Value) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<(u64, T)>> {
    let Some(list) = object.get(name).filter(|list| !list.is_null()) else {
        return Ok(Vec::new());
    };
    let list = list
        .as_array()
        .with_context(|| format!("\"{name}\" is no list"))?;
    list.iter()
        .map(|pair| match pair.as_array().map(Vec::as_slice) {
            Some([address, other]) => Ok((integer(address)?, second(other)?)),
            Some(_) | None => Err(anyhow!("not a pair: {pair}")),
        })
        .collect::<anyhow::Result<_>>()
        .with_context(|| format!("\"{name}\""))
}

fn digits(text: &str) -> &str {
    let text = text.trim();
    text.strip_prefix("0x")
        .or_else(|| text.strip_prefix("0X"))
        .unwrap_or(text)
}

fn integer(value: &Value) -> anyhow::Result<u64> {
    match value {
        Value::String(text) => u64::from_str_radix(digits(text), 16)
            .map_err(|error| anyhow!("{text:?} is no hexadecimal integer: {error}")),
        Value::Number(number) => number
            .as_u64()
            .with_context(|| format!("{number} is no 64-bit integer")),
        other => bail!("{other} is no integer"),
    }
}

fn bytes(value: &Value) -> anyhow::Result<Vec<u8>> {
    let text = value
        .as_str()
        .with_context(|| format!("{value} is no string"))?;
    let digits: Vec<u32> = digits(text)
        .chars()
        .filter(|character| !character.is_whitespace())
        .map(|character| {
            character
                .to_digit(16)
                .with_context(|| format!("{character:?} is no hexadecimal digit"))
        })
        .collect::<anyhow::Result<_>>()?;
    ensure!(digits.len().is_multiple_of(2), "an odd number of digits");
    Ok(digits
        .chunks_exact(2)
        .map(|pair| (pair[0] << 4 | pair[1]) as u8)
        .collect())
}

fn hex(value: u64) -> Value {
    Value::String(format!("{value:#x}"))
}

fn report(name: Value, outcome: &Outcome) -> Value {
    let stop = match outcome.end {
        End::Limit | End::Stop(UserStop::Interrupted) => json!("limit"),
        End::Stop(UserStop::Halt) => json!("hlt"),
        End::Stop(UserStop::Exception {
            vector,
            error,
            address,
        }) => json!({
            "vector": hex(vector.into()),
            "error": error.map(|error| hex(error.into())),
            "address": address.map(hex),
        }),
    };
    let mut gpr: Map<String, Value> = GPR
        .iter()
        .zip(outcome.gpr)
        .map(|(&register, value)| (register.to_owned(), hex(value)))
        .collect();
    gpr.insert("rip".to_owned(), hex(outcome.rip));
    let extended = &outcome.extended;
    let words = |words: &[u64]| -> Value { words.iter().copied().map(hex).collect() };
    let st: Vec<String> = extended
        .st
        .iter()
        .map(|st| {
            let digits: String = st.iter().rev().map(|byte| format!("{byte:02x}")).collect();
            format!("0x{digits}")
        })
        .collect();
    json!({
        "name": name,
        "stop": stop,
        "gpr": gpr,
        "rflags": hex(outcome.rflags),
        "x87": {
            "fcw": hex(extended.fcw.into()),
            "fsw": hex(extended.fsw.into()),
            "ftw": hex(extended.ftw.into()),
            "st": st,
        },
        "mm": words(&extended.mm()),
        "xmm": extended.ymm.iter().map(|ymm| words(&ymm[..2])).collect::<Vec<_>>(),
        "ymm": extended.ymm.iter().map(|ymm| words(ymm)).collect::<Vec<_>>(),
        "mxcsr": hex(extended.mxcsr.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_passed_over() {
        let mut input: &[u8] = b"1234\n12345\n\n1234567890\n123\n12345678";
        let mut line = Vec::new();
        let mut seen = Vec::new();
        loop {
            line.clear();
            match next_line(&mut input, &mut line, 4).expect("a slice") {
                Line::End => break,
                Line::Whole => seen.push(String::from_utf8_lossy(&line).into_owned()),
                Line::TooLong => seen.push("-".to_owned()),
            }
        }
        assert_eq!(seen, ["1234\n", "-", "\n", "-", "123\n", "-"]);
    }
}
