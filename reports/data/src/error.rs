//! What can be wrong with a run's files, said so that a reader finds the spot.

use std::path::PathBuf;

/// A file could not be read or written, or says something that it may not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was tried ("open", "append to").
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// One cell of a csv table can't be understood.
    #[error("{}:{line}: column `{column}`: {message}", path.display())]
    Cell {
        /// The file.
        path: PathBuf,
        /// Line on which the row starts, 1-based, header included.
        line: u64,
        /// Name of the column.
        column: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A csv table is malformed: quoting, number of fields, missing columns, not UTF-8.
    #[error("{}:{line}: {message}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// Line, 1-based; 1 when the header is at fault.
        line: u64,
        /// What is wrong.
        message: String,
    },
    /// A JSON file is malformed or lacks something.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, 1-based; 0 when the fault has no position.
        line: usize,
        /// Column, 1-based; 0 when the fault has no position.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// A row breaks a rule of the format and was not written.
    #[error("refused to write a row to {}: column `{column}`: {message}", path.display())]
    Refused {
        /// The file it was meant for.
        path: PathBuf,
        /// Name of the column.
        column: &'static str,
        /// The rule that it breaks.
        message: String,
    },
}

/// A rule that a row breaks: column and message, before file and line are known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("column `{column}`: {message}")]
pub struct Fault {
    /// Name of the column.
    pub column: &'static str,
    /// What is wrong with it.
    pub message: String,
}

impl Fault {
    pub(crate) fn new(column: &'static str, message: impl Into<String>) -> Self {
        Fault {
            column,
            message: message.into(),
        }
    }
}
