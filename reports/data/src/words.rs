//! The fixed words of the format, each an enum that is written as one word in csv and JSON.
//!
//! Invariant: a word is written exactly as [`as_str`](Status::as_str) says, and nothing else is read.

macro_rules! words {
    ($(#[$doc:meta])* $name:ident ($what:literal) { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant),* }

        impl $name {
            /// Every variant, in order.
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// The word in csv and JSON.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;
            /// Reads the word; the error names the words there are.
            fn from_str(word: &str) -> Result<Self, String> {
                match word {
                    $($word => Ok($name::$variant),)*
                    other => Err(format!(
                        "`{}` is not a {} ({})", other.escape_debug(), $what, [$($word),*].join(", ")
                    )),
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let word = <String as serde::Deserialize>::deserialize(deserializer)?;
                word.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

pub(crate) use words;

words! {
    /// The state of a row. Anything but `Ok` carries a reason and never a number.
    Status ("status") {
        /// Measured and verified.
        Ok = "ok",
        /// Has no meaning in this mode, by design.
        Unsupported = "unsupported",
        /// This host can't: the reason names the probe that failed.
        Unavailable = "unavailable",
        /// Left out on request or for lack of time.
        Skipped = "skipped",
        /// Tried, and it went wrong.
        Failed = "failed",
        /// Measured, but the figure can't be trusted.
        Invalid = "invalid",
    }
}

words! {
    /// When in a guest's life a sample was taken.
    Phase ("phase") {
        /// Process start to the guest's greeting.
        Boot = "boot",
        /// The first run of a workload in a fresh guest: translation and first touch included.
        Cold = "cold",
        /// Steady state: the same workload ran before in the same guest.
        Warm = "warm",
    }
}

words! {
    /// How much two runs may differ before it means something.
    Class ("class") {
        /// Any change is a change: counts of synchronous events.
        Exact = "exact",
        /// Changes within a declared tolerance mean nothing: timer and boot exits.
        Bounded = "bounded",
        /// Varies from sample to sample: times.
        Noisy = "noisy",
    }
}

words! {
    /// Which way is better.
    Direction ("direction") {
        /// Less is better.
        Lower = "lower",
        /// More is better.
        Higher = "higher",
        /// Neither: a figure for the record.
        Neither = "neither",
    }
}

words! {
    /// Unit of a value.
    Unit ("unit") {
        /// Nanoseconds.
        Ns = "ns",
        /// Ticks of the guest's time stamp counter.
        Cycles = "cycles",
        /// A ratio.
        Ratio = "x",
        /// Exits per iteration.
        Exits = "exits",
        /// A plain number.
        Count = "count",
        /// Mebibytes.
        Mib = "MiB",
    }
}

impl Status {
    /// True for a measured and verified row.
    pub fn is_ok(self) -> bool {
        self == Status::Ok
    }
}
