//! Calls with bad arguments, each with the error it must give.

use crate::kernel::*;

pub(crate) const ALL: &[(&str, fn())] = &[];
