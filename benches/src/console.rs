//! The console protocol's receiving side: bytes and their arrival times in, messages out.
//!
//! A pure state machine: it reads no clock and no file. Grammar and words stand in [`abi`].
//! Invariant: a [`Done`] is made only from `begin`, `end`, `done` in this order with nothing but
//! [`abi::DATA`] lines between `begin` and `end`; a guest that says anything else gets no figure, and
//! neither does one whose histogram doesn't add up.

use std::time::{Duration, Instant};

use abi::word;
use reports_data::Histogram;

use crate::latencies::Latencies;

/// Longest line that a guest may send. The longest of the protocol has under 100 bytes.
const MAX_LINE: usize = 4096;

/// A run that ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// From the arrival of `begin`'s newline to the arrival of `end`'s first byte.
    pub window: Duration,
    /// What the guest computed.
    pub checksum: u64,
    /// Guest TSC ticks of the window.
    pub cycles: u64,
    /// How long single requests took, if the guest says so. The ends are exact.
    pub latencies: Option<Histogram>,
}

/// What a guest has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The greeting: protocol version and flavour.
    Ready {
        /// Protocol version.
        version: u32,
        /// Flavour of the guest.
        flavour: String,
    },
    /// A run ended well.
    Done(Done),
    /// A run was tried and went wrong.
    Failed(String),
    /// A run has no meaning in this flavour.
    Unsupported(String),
    /// No workload has that name.
    Unknown(String),
}

/// The guest broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A line has no place where it stands.
    #[error("guest sent {line:?} while the harness waited for {waiting_for}")]
    OutOfPlace {
        /// The line, cut to a readable length.
        line: String,
        /// What should have come.
        waiting_for: &'static str,
    },
    /// Far more output than the protocol has words for.
    #[error("guest flooded the console: {bytes} bytes without an answer")]
    Flood {
        /// How much came.
        bytes: usize,
    },
}

/// Where the conversation stands.
#[derive(Clone, Debug)]
enum State {
    Greeting,
    Idle,
    Begin,
    End {
        opened: Instant,
    },
    Done {
        window: Duration,
        latencies: Option<Latencies>,
    },
}

impl State {
    /// The word that comes next.
    fn waiting_for(&self) -> &'static str {
        match self {
            State::Greeting => word::READY,
            State::Idle => "nothing",
            State::Begin => word::BEGIN,
            State::End { .. } => word::END,
            State::Done { .. } => word::DONE,
        }
    }
}

/// The receiving side of one guest's console.
#[derive(Debug)]
pub struct Console {
    state: State,
    line: Vec<u8>,
    line_started: Option<Instant>,
    unanswered_bytes: usize,
    flood_limit: usize,
    noise: Option<String>,
}

impl Console {
    /// A console that waits for the greeting and gives up on a guest that sends more than
    /// `flood_limit` bytes without an answer.
    pub fn new(flood_limit: usize) -> Console {
        Console {
            state: State::Greeting,
            line: Vec::with_capacity(256),
            line_started: None,
            unanswered_bytes: 0,
            flood_limit,
            noise: None,
        }
    }

    /// A `run` command goes out now.
    pub fn command_sent(&mut self) {
        self.state = State::Begin;
        self.unanswered_bytes = 0;
        self.noise = None;
    }

    /// What the harness waits for, for messages about time limits.
    pub fn waiting_for(&self) -> &'static str {
        self.state.waiting_for()
    }

    /// The last line that was no message: a guest kernel's last words, or a firmware's banner.
    pub fn noise(&self) -> Option<&str> {
        self.noise.as_deref()
    }

    /// Takes bytes that arrived at `at`. Returns the first message that they complete; a guest
    /// that follows the protocol never sends a second one unasked.
    ///
    /// # Errors
    /// The guest broke the protocol.
    pub fn push(&mut self, bytes: &[u8], at: Instant) -> Result<Option<Message>, Violation> {
        let mut message = None;
        self.unanswered_bytes += bytes.len();
        if self.unanswered_bytes > self.flood_limit {
            return Err(Violation::Flood {
                bytes: self.unanswered_bytes,
            });
        }
        for &byte in bytes {
            if byte == b'\n' {
                let first = self.line_started.take().unwrap_or(at);
                let line = std::mem::take(&mut self.line);
                let text = String::from_utf8_lossy(&line);
                let complete = self.line_arrived(text.trim_end_matches('\r'), first, at)?;
                self.line = line;
                self.line.clear();
                if message.is_none() {
                    message = complete;
                }
            } else {
                self.line_started.get_or_insert(at);
                if self.line.len() < MAX_LINE {
                    self.line.push(byte);
                }
            }
        }
        Ok(message)
    }

    fn line_arrived(
        &mut self,
        line: &str,
        first: Instant,
        newline: Instant,
    ) -> Result<Option<Message>, Violation> {
        let (head, rest) = line.split_once(' ').unwrap_or((line, ""));
        let refusal = match head {
            word::FAILED => Some(Message::Failed(rest.to_owned())),
            word::UNSUPPORTED => Some(Message::Unsupported(rest.to_owned())),
            word::UNKNOWN => Some(Message::Unknown(rest.to_owned())),
            _ => None,
        };
        let state = std::mem::replace(&mut self.state, State::Idle);
        // For a violation's words, should the line be out of place.
        let waiting_for = state.waiting_for();
        let out_of_place = |line: &str| Violation::OutOfPlace {
            line: shorten(line),
            waiting_for,
        };
        let next = match (state, refusal) {
            (State::Begin | State::End { .. } | State::Done { .. }, Some(refusal)) => {
                return Ok(Some(refusal));
            }
            (State::Greeting, _) if head == word::READY => {
                let ready = greeting(rest).ok_or_else(|| out_of_place(line))?;
                self.unanswered_bytes = 0;
                return Ok(Some(ready));
            }
            (State::Begin, None) if line == word::BEGIN => State::End { opened: newline },
            (State::End { opened }, None) if line == word::END => State::Done {
                window: first.saturating_duration_since(opened),
                latencies: None,
            },
            (
                State::Done {
                    window,
                    latencies: None,
                },
                None,
            ) if head == word::LATENCY => State::Done {
                window,
                latencies: Some(Latencies::open(rest).ok_or_else(|| out_of_place(line))?),
            },
            (
                State::Done {
                    window,
                    latencies: Some(mut latencies),
                },
                None,
            ) if head == word::BUCKET => {
                latencies.take(rest).ok_or_else(|| out_of_place(line))?;
                State::Done {
                    window,
                    latencies: Some(latencies),
                }
            }
            (State::Done { window, latencies }, None) if head == word::DONE => {
                let done = answer(rest, window, latencies).ok_or_else(|| out_of_place(line))?;
                return Ok(Some(Message::Done(done)));
            }
            // Its bytes are the work of this window, however many they are.
            (state @ State::End { .. }, None) if line.as_bytes().first() == Some(&abi::DATA) => {
                self.unanswered_bytes = 0;
                state
            }
            // Other bytes inside the window mean that the window is not what it says.
            (State::End { .. }, _) => return Err(out_of_place(line)),
            (_, _) if is_word(head) => return Err(out_of_place(line)),
            // A firmware's banner or a guest kernel's report: kept for the reason, no answer.
            (state, _) => {
                if !line.trim().is_empty() {
                    self.noise = Some(shorten(line));
                }
                state
            }
        };
        self.state = next;
        Ok(None)
    }
}

fn is_word(head: &str) -> bool {
    [
        word::READY,
        word::BEGIN,
        word::END,
        word::DONE,
        word::FAILED,
        word::UNSUPPORTED,
        word::UNKNOWN,
        word::LATENCY,
        word::BUCKET,
    ]
    .contains(&head)
}

fn greeting(rest: &str) -> Option<Message> {
    let (version, flavour) = rest.split_once(' ')?;
    Some(Message::Ready {
        version: version.parse().ok()?,
        flavour: flavour.to_owned(),
    })
}

fn answer(rest: &str, window: Duration, latencies: Option<Latencies>) -> Option<Done> {
    let (checksum, cycles) = rest.split_once(' ')?;
    if checksum.len() != 16 {
        return None;
    }
    Some(Done {
        window,
        checksum: u64::from_str_radix(checksum, 16).ok()?,
        cycles: cycles.parse().ok()?,
        latencies: match latencies {
            Some(latencies) => Some(latencies.close()?),
            None => None,
        },
    })
}

/// A line as it may stand in a csv cell: one line, printable, not endless.
pub fn shorten(line: &str) -> String {
    const LONGEST: usize = 160;
    let mut short: String = line
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LONGEST)
        .collect();
    if line.chars().count() > LONGEST {
        short.push_str("...");
    }
    short.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds chunks, each a millisecond after the one before; returns what the last one yields.
    fn check(chunks: &[&str]) -> Result<Option<Message>, Violation> {
        let start = Instant::now();
        let mut console = Console::new(1 << 16);
        console.push(b"ready 1 unaware\n", start)?;
        console.command_sent();
        let mut last = None;
        for (index, chunk) in chunks.iter().enumerate() {
            last = console.push(
                chunk.as_bytes(),
                start + Duration::from_millis(index as u64),
            )?;
        }
        Ok(last)
    }

    #[test]
    fn window_runs_from_begin_newline_to_first_byte_of_end() {
        let reply = check(&[
            "beg",
            "in",
            "\n",
            "e",
            "nd\nd",
            "one 00000000000000ff 1234\n",
        ]);
        assert_eq!(
            reply,
            Ok(Some(Message::Done(Done {
                window: Duration::from_millis(1),
                checksum: 0xff,
                cycles: 1234,
                latencies: None,
            })))
        );
    }

    /// A run that says these lines between `end` and `done`.
    fn check_latencies(lines: &str) -> Result<Option<Histogram>, Violation> {
        let text = format!("{lines}done 00000000000000ff 1\n");
        match check(&["begin\n", "end\n", &text])? {
            Some(Message::Done(done)) => Ok(done.latencies),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_histogram_has_exact_ends() {
        let lines = "latency 5 105 399\nbucket 100 120 4\nbucket 390 400 1\n";
        let latencies = check_latencies(lines).unwrap().unwrap();
        let ranges: Vec<(u64, u64, u64)> = latencies
            .ranges()
            .iter()
            .map(|range| (range.low, range.high, range.count))
            .collect();
        assert_eq!(ranges, [(105, 120, 4), (390, 399, 1)]);
        assert_eq!(check_latencies(""), Ok(None));
    }

    #[test]
    fn histograms_that_do_not_add_up_are_violations() {
        for lines in [
            "latency 5 105 399\n",
            "latency 0 0 0\n",
            "latency 2 9 8\nbucket 8 9 2\n",
            "latency 5 105 399\nbucket 100 120 4\n",
            "latency 4 105 399\nbucket 100 120 4\n",
            "latency 5 105 399\nbucket 390 400 1\nbucket 100 120 4\n",
            "latency 5 105 399\nbucket 100 120 4\nbucket 120 400 1\n",
            "latency 4 99 120\nbucket 100 120 4\n",
            "latency 4 100 121\nbucket 100 120 4\n",
            "latency 4 100 120 7\nbucket 100 120 4\n",
            "latency 4 100 120\nlatency 4 100 120\nbucket 100 120 4\n",
            "latency 4 100 120\nbucket 100 120 0\nbucket 121 125 4\n",
            "bucket 100 120 4\n",
            "latency 18446744073709551615 1 9\nbucket 1 8 18446744073709551615\nbucket 9 9 1\n",
        ] {
            assert!(
                matches!(check_latencies(lines), Err(Violation::OutOfPlace { .. })),
                "{lines}"
            );
        }
    }

    #[test]
    fn refusals_keep_their_reason() {
        let reason = "no port I/O here".to_owned();
        assert_eq!(
            check(&["unsupported no port I/O here\r\n"]),
            Ok(Some(Message::Unsupported(reason.clone())))
        );
        assert_eq!(
            check(&["begin\n", "failed no port I/O here\n"]),
            Ok(Some(Message::Failed(reason)))
        );
        assert_eq!(
            check(&["unknown nosuch\n"]),
            Ok(Some(Message::Unknown("nosuch".to_owned())))
        );
    }

    #[test]
    fn answers_out_of_order_are_violations() {
        for chunks in [
            &["end\n"][..],
            &["done 0000000000000000 1\n"],
            &["begin\nbegin\n"],
            &["begin\nnoise\n"],
            &["begin\nend\ndone 12 1\n"],
            &["begin\nend\ndone 00000000000000zz 1\n"],
            &["begin\nend\nend\n"],
        ] {
            assert!(
                matches!(check(chunks), Err(Violation::OutOfPlace { .. })),
                "{chunks:?}"
            );
        }
    }

    #[test]
    fn noise_outside_the_window_is_kept_and_ignored() {
        let mut console = Console::new(1 << 16);
        let now = Instant::now();
        assert_eq!(console.push(b"SeaBIOS (version 1.16)\n\n", now), Ok(None));
        assert_eq!(console.noise(), Some("SeaBIOS (version 1.16)"));
        assert!(matches!(
            console.push(b"ready 1 unaware\n", now),
            Ok(Some(Message::Ready { version: 1, .. }))
        ));
    }

    #[test]
    fn flood_is_a_violation_with_or_without_newlines() {
        let line = "x".repeat(99) + "\n";
        let endless = "x".repeat(100);
        for chunk in [line, endless] {
            let mut console = Console::new(1 << 10);
            let now = Instant::now();
            let flood = (0..11).find_map(|_| console.push(chunk.as_bytes(), now).err());
            assert_eq!(flood, Some(Violation::Flood { bytes: 1100 }));
        }
    }
}
