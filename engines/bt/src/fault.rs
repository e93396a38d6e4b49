//! Exceptions of the guest, as values.

/// An exception with what its delivery pushes (SDM 3A chapter 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub vector: u8,
    pub error: Option<u32>,
    /// New CR2, for page faults.
    pub address: Option<u64>,
}

pub(crate) const DE: u8 = 0;
pub(crate) const DB: u8 = 1;
pub(crate) const BP: u8 = 3;
pub(crate) const OF: u8 = 4;
pub(crate) const BR: u8 = 5;
pub(crate) const UD: u8 = 6;
pub(crate) const NM: u8 = 7;
pub(crate) const DF: u8 = 8;
pub(crate) const TS: u8 = 10;
pub(crate) const NP: u8 = 11;
pub(crate) const SS: u8 = 12;
pub(crate) const GP: u8 = 13;
pub(crate) const PF: u8 = 14;
pub(crate) const MF: u8 = 16;
pub(crate) const AC: u8 = 17;
pub(crate) const XM: u8 = 19;

impl Fault {
    /// An exception without error code.
    pub(crate) const fn plain(vector: u8) -> Fault {
        Fault {
            vector,
            error: None,
            address: None,
        }
    }

    /// An exception that names a selector (or 0).
    pub(crate) const fn selector(vector: u8, selector: u16) -> Fault {
        Fault {
            vector,
            error: Some(selector as u32 & 0xfffc),
            address: None,
        }
    }

    /// General protection with error code 0.
    pub(crate) const fn gp() -> Fault {
        Fault::selector(GP, 0)
    }

    /// Invalid opcode.
    pub(crate) const fn ud() -> Fault {
        Fault::plain(UD)
    }

    /// Stands for an instruction that waits for a device; never delivered.
    pub(crate) const fn waiting() -> Fault {
        Fault::plain(0xff)
    }

    /// Page fault.
    pub(crate) const fn page(address: u64, error: u32) -> Fault {
        Fault {
            vector: PF,
            error: Some(error),
            address: Some(address),
        }
    }

    /// As it is met while an exception or an event from outside the program is being delivered: its
    /// error code says so (EXT, SDM 3A 6.13).
    pub(crate) fn external(self) -> Fault {
        match self.vector {
            TS | NP | SS | GP => Fault {
                error: self.error.map(|error| error | 1),
                ..self
            },
            _ => self,
        }
    }

    /// What becomes of a `second` exception met while this one was being delivered: the second
    /// itself, a double fault, or nothing but shutdown (SDM 3A table 6-5).
    pub(crate) fn then(self, second: Fault) -> Option<Fault> {
        let contributory = |vector: u8| matches!(vector, DE | TS | NP | SS | GP);
        if self.vector == DF {
            return None;
        }
        let double = if self.vector == PF {
            second.vector == PF || contributory(second.vector)
        } else {
            contributory(self.vector) && contributory(second.vector)
        };
        Some(if double {
            Fault {
                vector: DF,
                error: Some(0),
                address: None,
            }
        } else {
            second
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_combine_as_table_6_5_says() {
        let df = Fault {
            vector: DF,
            error: Some(0),
            address: None,
        };
        assert_eq!(Fault::gp().then(Fault::selector(NP, 8)), Some(df));
        assert_eq!(Fault::page(1, 0).then(Fault::gp()), Some(df));
        assert_eq!(Fault::gp().then(Fault::page(1, 0)), Some(Fault::page(1, 0)));
        assert_eq!(Fault::ud().then(Fault::gp()), Some(Fault::gp()));
        assert_eq!(df.then(Fault::gp()), None);
    }
}
