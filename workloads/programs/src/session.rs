//! The guest's side of the console protocol: one line in, the answer out.
//!
//! Shared by the guest kernel and the native process, so both answer alike. The grammar stands in
//! [`abi`]. No formatting machinery is used, for the reason given in [`crate::Refusal`], and every
//! function is `#[inline]` or generic, so that the guest compiles it with its own flags (no SSE).

use crate::{CATALOGUE, Piece, Platform, Prepared, Refusal, find};
use abi::{mark, word};

/// Where answers go, and what brackets a window.
pub trait Console {
    /// Writes bytes to the host.
    fn write(&mut self, bytes: &[u8]);

    /// Sees that everything written has left, before a window opens.
    fn flush(&mut self);

    /// Writes one of [`abi::mark`] to [`abi::port::MARK`], or says it by hypercall, where the machine
    /// has either.
    fn mark(&mut self, value: u8);

    /// The time-stamp counter.
    fn cycles(&mut self) -> u64;
}

/// What follows a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Take the next line. `ran` says whether this one was a run that ended with `done`.
    Go {
        /// A run has ended well.
        ran: bool,
    },
    /// End with this exit code.
    Quit(u8),
}

/// Longest line that is taken.
pub const LINE: usize = 256;

/// Greets the host.
#[inline]
pub fn greet(console: &mut impl Console, flavour: &str) {
    text(console, word::READY);
    console.write(b" ");
    say(console, Piece::Decimal(abi::PROTOCOL_VERSION.into()));
    console.write(b" ");
    text(console, flavour);
    end(console);
}

/// Answers `failed` with a reason of one text.
#[inline]
pub fn fail(console: &mut impl Console, reason: &str) {
    text(console, word::FAILED);
    console.write(b" ");
    text(console, reason);
    end(console);
}

/// Answers one line from the host. An empty line has no answer.
#[inline]
pub fn answer<P: Platform>(console: &mut impl Console, platform: &mut P, line: &[u8]) -> Next {
    let mut words = line
        .split(|byte| byte.is_ascii_whitespace())
        .filter(|word| !word.is_empty());
    let Some(command) = words.next() else {
        return Next::Go { ran: false };
    };
    let arguments = [words.next(), words.next(), words.next()];
    let surplus = words.next().is_some();
    if command == word::RUN.as_bytes() {
        let ran = match arguments {
            [Some(name), Some(size), Some(iterations)] if !surplus => {
                run(console, platform, name, size, iterations)
            }
            _ => {
                fail(console, "usage: run WORKLOAD SIZE ITERATIONS");
                false
            }
        };
        return Next::Go { ran };
    }
    if command == word::LIST.as_bytes() {
        for workload in CATALOGUE {
            text(console, word::WORKLOAD);
            console.write(b" ");
            text(console, workload.name);
            end(console);
        }
        text(console, word::LISTED);
        end(console);
    } else if command == word::QUIT.as_bytes() {
        match arguments[0].and_then(number).map(u8::try_from) {
            Some(Ok(code)) => return Next::Quit(code),
            Some(Err(_)) | None => fail(console, "usage: quit CODE, 0 to 255"),
        }
    } else {
        fail(console, "no such command; there are run, list and quit");
    }
    Next::Go { ran: false }
}

/// Runs `run WORKLOAD SIZE ITERATIONS` from a command line that holds it, as from the console;
/// `None` if the command line holds none.
#[inline]
pub fn answer_command_line<P: Platform>(
    console: &mut impl Console,
    platform: &mut P,
    command_line: &[u8],
) -> Option<bool> {
    let mut words = command_line
        .split(|byte| byte.is_ascii_whitespace())
        .filter(|word| !word.is_empty())
        .skip_while(|word| *word != word::RUN.as_bytes());
    words.next()?;
    Some(match (words.next(), words.next(), words.next()) {
        (Some(name), Some(size), Some(iterations)) => {
            run(console, platform, name, size, iterations)
        }
        _ => {
            fail(
                console,
                "usage on the command line: run WORKLOAD SIZE ITERATIONS",
            );
            false
        }
    })
}

#[inline]
fn run<P: Platform>(
    console: &mut impl Console,
    platform: &mut P,
    name: &[u8],
    size: &[u8],
    iterations: &[u8],
) -> bool {
    let Some(workload) = core::str::from_utf8(name).ok().and_then(find) else {
        text(console, word::UNKNOWN);
        console.write(b" ");
        console.write(name);
        end(console);
        return false;
    };
    let (Some(size), Some(iterations)) = (number(size), number(iterations)) else {
        fail(
            console,
            "SIZE and ITERATIONS are decimal numbers below 2^64",
        );
        return false;
    };
    // What an earlier run left that went wrong in its window.
    if let Some(latencies) = platform.latencies() {
        latencies.clear();
    }
    let prepared = match Prepared::new(platform, workload, size, iterations) {
        Ok(prepared) => prepared,
        Err(refusal) => {
            refuse(console, refusal);
            return false;
        }
    };
    console.write(b"begin\n");
    console.flush();
    console.mark(mark::BEGIN);
    let start = console.cycles();
    let result = prepared.execute(platform);
    let cycles = console.cycles().wrapping_sub(start);
    console.mark(mark::END);
    console.write(b"end\n");
    match result.and_then(|sum| prepared.conclude(platform, sum)) {
        Ok(sum) => {
            latencies(console, platform);
            text(console, word::DONE);
            console.write(b" ");
            console.write(&checksum(sum));
            console.write(b" ");
            say(console, Piece::Decimal(cycles));
            end(console);
            true
        }
        Err(refusal) => {
            refuse(console, refusal);
            false
        }
    }
}

/// Says how long requests took, if they were timed and a tick means something.
#[inline]
fn latencies<P: Platform>(console: &mut impl Console, platform: &mut P) {
    let Some(scale) = platform.scale() else {
        return;
    };
    let Some(latencies) = platform.latencies() else {
        return;
    };
    let Some((least, most)) = latencies.extremes() else {
        return;
    };
    let mut line = |word: &str, numbers: [u64; 3]| {
        text(console, word);
        for number in numbers {
            console.write(b" ");
            say(console, Piece::Decimal(number));
        }
        end(console);
    };
    let extremes = [least, most].map(|ticks| scale.nanoseconds(ticks));
    line(word::LATENCY, [latencies.total(), extremes[0], extremes[1]]);
    latencies.ranges(scale, |low, high, count| {
        line(word::BUCKET, [low, high, count]);
    });
    latencies.clear();
}

#[inline]
fn text(console: &mut impl Console, text: &str) {
    console.write(text.as_bytes());
}

#[inline]
fn end(console: &mut impl Console) {
    console.write(b"\n");
}

#[inline]
fn refuse(console: &mut impl Console, refusal: Refusal) {
    text(console, refusal.word());
    console.write(b" ");
    refusal.say(|piece| say(console, piece));
    end(console);
}

/// Writes a piece of a sentence.
#[inline]
pub fn say(console: &mut impl Console, piece: Piece) {
    match piece {
        Piece::Text(words) => text(console, words),
        Piece::Decimal(value) => digits(console, value, 10),
        Piece::Hex(value) => {
            console.write(b"0x");
            digits(console, value, 16);
        }
    }
}

#[inline]
fn digits(console: &mut impl Console, mut value: u64, base: u64) {
    // 2^64 has 20 decimal digits.
    let mut buffer = [0; 20];
    let mut start = buffer.len();
    for (index, digit) in buffer.iter_mut().enumerate().rev() {
        *digit = hex((value % base) as u8);
        value /= base;
        start = index;
        if value == 0 {
            break;
        }
    }
    console.write(buffer.get(start..).unwrap_or_default());
}

/// 16 hex digits.
#[inline]
fn checksum(sum: u64) -> [u8; 16] {
    let mut text = [0; 16];
    for (index, digit) in text.iter_mut().enumerate() {
        *digit = hex((sum >> (60 - 4 * index)) as u8 & 15);
    }
    text
}

#[inline]
fn hex(digit: u8) -> u8 {
    if digit < 10 {
        b'0' + digit
    } else {
        b'a' + digit - 10
    }
}

/// A decimal number; `None` for anything else and on overflow.
#[inline]
fn number(word: &[u8]) -> Option<u64> {
    if word.is_empty() {
        return None;
    }
    word.iter().try_fold(0u64, |value, &byte| {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return None;
        }
        value.checked_mul(10)?.checked_add(digit.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Model, oracle};
    use alloc::{format, string::String, vec, vec::Vec};

    #[derive(Default)]
    struct Transcript {
        text: Vec<u8>,
        marks: Vec<u8>,
    }

    impl Console for Transcript {
        fn write(&mut self, bytes: &[u8]) {
            self.text.extend_from_slice(bytes);
        }
        fn flush(&mut self) {}
        fn mark(&mut self, value: u8) {
            self.marks.push(value);
        }
        fn cycles(&mut self) -> u64 {
            self.marks.len() as u64 * 100
        }
    }

    #[track_caller]
    fn check(line: &str, expected: &str) -> Next {
        let mut console = Transcript::default();
        let mut arena = vec![0; 4096];
        let mut model = Model::new(&mut arena);
        let next = answer(&mut console, &mut model, line.as_bytes());
        assert_eq!(String::from_utf8(console.text).unwrap(), expected);
        next
    }

    #[test]
    fn a_run_is_bracketed_and_reports_its_checksum() {
        let sum = oracle(find("alu").unwrap(), 10, 3).unwrap();
        assert_eq!(
            check("run alu 10 3", &format!("begin\nend\ndone {sum:016x} 0\n")),
            Next::Go { ran: true }
        );
    }

    #[test]
    fn the_marks_stand_around_the_window() {
        let mut console = Transcript::default();
        let mut model = Model::new(&mut []);
        answer(&mut console, &mut model, b"run empty 0 0");
        assert_eq!(console.marks, [mark::BEGIN, mark::END]);
    }

    #[test]
    fn bad_lines_are_answered_and_survived() {
        let go = Next::Go { ran: false };
        let usage = "failed usage: run WORKLOAD SIZE ITERATIONS\n";
        let numbers = "failed SIZE and ITERATIONS are decimal numbers below 2^64\n";
        for (line, expected) in [
            ("", ""),
            ("   \r", ""),
            ("run", usage),
            ("run alu 1", usage),
            ("run alu 1 1 1", usage),
            ("run alu x 1", numbers),
            ("run alu 1 -1", numbers),
            ("run alu 18446744073709551616 1", numbers),
            ("run nothing 0 0", "unknown nothing\n"),
            (
                "run cpuid 2 1",
                "failed size 2 of a workload that takes no size\n",
            ),
            (
                "run sort 4097 1",
                "failed size 4097 needs 4097 words of memory, there are 4096\n",
            ),
            ("run fib 65 1", "failed size 65 is beyond 64\n"),
            ("quit", "failed usage: quit CODE, 0 to 255\n"),
            ("quit 256", "failed usage: quit CODE, 0 to 255\n"),
            (
                "dance",
                "failed no such command; there are run, list and quit\n",
            ),
        ] {
            assert_eq!(check(line, expected), go, "{line}");
        }
    }

    #[test]
    fn quit_carries_its_code() {
        assert_eq!(check("quit 0", ""), Next::Quit(0));
        assert_eq!(check("quit 255\r", ""), Next::Quit(255));
    }

    #[test]
    fn list_names_every_workload() {
        let mut expected: String = CATALOGUE
            .iter()
            .map(|workload| format!("workload {}\n", workload.name))
            .collect();
        expected.push_str("listed\n");
        check("list", &expected);
    }

    #[test]
    fn a_command_line_may_hold_a_run() {
        let mut model = Model::new(&mut []);
        for (line, expected) in [
            ("", None),
            ("console=ttyS0 runs", None),
            ("quiet run empty 0 0", Some(true)),
            ("run empty 0 0 quiet", Some(true)),
            ("run empty", Some(false)),
            ("run nothing 0 0", Some(false)),
        ] {
            let mut console = Transcript::default();
            let answer = answer_command_line(&mut console, &mut model, line.as_bytes());
            assert_eq!(answer, expected, "{line}");
        }
    }

    #[test]
    fn numbers_are_written_as_core_writes_them() {
        for value in [0, 7, 10, 255, 1 << 32, u64::MAX] {
            let mut console = Transcript::default();
            say(&mut console, Piece::Decimal(value));
            say(&mut console, Piece::Hex(value));
            console.write(&checksum(value));
            assert_eq!(
                String::from_utf8(console.text).unwrap(),
                format!("{value}{value:#x}{value:016x}")
            );
        }
    }
}
