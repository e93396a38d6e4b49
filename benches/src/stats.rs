//! The counters' side channel of `trapline run --stats-fd`: JSON lines in, events out.
//!
//! Foreign virtual machine monitors have no such channel; their rows have no exits. Invariant:
//! counts are passed on as they came, never added up over sources.

use serde::Deserialize;

/// One line of the counters' pipe.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The virtual machine has been made.
    Start {
        /// Engine that runs the guest.
        engine: String,
        /// What stands behind /dev/kvm: `intel`, `amd`, `pvm`; nothing for other engines.
        #[serde(default)]
        backend: Option<String>,
    },
    /// A measured window has closed.
    Window {
        /// Number of the window, counted from the virtual machine's start.
        seq: u64,
        /// What was counted between the marks.
        counts: Vec<Count>,
    },
    /// The virtual machine has ended.
    End {
        /// `success`, `failure`, `crashed`, `limit` or `unavailable`.
        outcome: String,
        /// One line about it.
        #[serde(default)]
        message: String,
    },
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Count {
    /// `vmm`, `translator`, `kvm-stats` or `tracepoint`.
    pub source: String,
    /// Mode-neutral kind.
    pub kind: String,
    /// The reason in the field's own terms.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// Bytes of the counters' pipe that are no complete line yet.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    /// Takes bytes, returns the events that they complete.
    ///
    /// # Errors
    /// A line that is no event: the two programs don't fit together.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, serde_json::Error> {
        self.pending.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            events.push(serde_json::from_slice(&line)?);
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_at_newlines_wherever_reads_end() {
        let text = concat!(
            r#"{"event":"start","mode":"hardware","engine":"kvm","backend":"pvm","memory_mib":256}"#,
            "\n",
            r#"{"event":"window","seq":0,"counts":[{"source":"vmm","kind":"pio","reason":"KVM_EXIT_IO out 0x3ff","count":3}]}"#,
            "\n",
            r#"{"event":"end","outcome":"crashed","message":"triple fault","counts":[]}"#,
            "\n"
        );
        for cut in [1, 7, 100, text.len()] {
            let mut lines = Lines::default();
            let events: Vec<Event> = text
                .as_bytes()
                .chunks(cut)
                .flat_map(|chunk| lines.push(chunk).expect("well formed"))
                .collect();
            assert_eq!(events.len(), 3);
            assert_eq!(
                events[0],
                Event::Start {
                    engine: "kvm".to_owned(),
                    backend: Some("pvm".to_owned())
                }
            );
            let Event::Window { seq: 0, counts } = &events[1] else {
                panic!("{:?}", events[1]);
            };
            assert_eq!(counts[0].count, 3);
        }
    }

    #[test]
    fn what_is_no_event_is_an_error() {
        assert!(Lines::default().push(b"{\"event\":\"lunch\"}\n").is_err());
    }
}
