//! What became of one row.

use serde::{Deserialize, Serialize};

/// The state of a row. Anything but `Ok` carries a reason and never a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Measured and verified.
    Ok,
    /// Has no meaning in this mode, by design.
    Unsupported,
    /// This host can't: the reason names the probe that failed.
    Unavailable,
    /// Left out on request or for lack of time.
    Skipped,
    /// Tried, and it went wrong.
    Failed,
    /// Measured, but the figure can't be trusted.
    Invalid,
}
