//! csv files: a writer that leaves every appended row on disk, and a reader that names the cell
//! at fault.
//!
//! csv and serde stay behind this module: a [`Row`] has a private wire struct whose fields are
//! the columns, all text. A reader finds columns by name, so their order is free and columns that
//! it does not know are passed over.

use std::fs::File;
use std::io::{BufReader, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Serialize, de::DeserializeOwned};

use crate::error::{Error, Fault};

/// A row of one of the run's csv files. Implemented by [`crate::Sample`] and [`crate::ExitRow`].
pub trait Row: Sized {
    /// The columns as text.
    #[doc(hidden)]
    type Wire: Serialize + DeserializeOwned;
    /// Names of the columns, in the order in which they are written.
    const COLUMNS: &'static [&'static str];
    /// Checks the rules of the format.
    ///
    /// # Errors
    /// The first rule that the row breaks.
    fn check(&self) -> Result<(), Fault>;
    #[doc(hidden)]
    fn to_wire(&self) -> Self::Wire;
    #[doc(hidden)]
    fn from_wire(wire: Self::Wire) -> Result<Self, Fault>;
}

pub(crate) fn parse<T: FromStr>(column: &'static str, text: &str) -> Result<T, Fault>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| {
        let message = error.to_string();
        // Our own words quote the text themselves.
        if message.starts_with('`') {
            Fault::new(column, message)
        } else {
            Fault::new(column, format!("`{}`: {message}", text.escape_debug()))
        }
    })
}

pub(crate) fn parse_optional<T: FromStr>(
    column: &'static str,
    text: &str,
) -> Result<Option<T>, Fault>
where
    T::Err: std::fmt::Display,
{
    match text {
        "" => Ok(None),
        text => parse(column, text).map(Some),
    }
}

/// Appends rows to a csv file. Every row reaches the kernel before [`append`](Self::append)
/// returns, in one write: what was measured before a crash is kept.
#[derive(Debug)]
pub struct TableWriter<R> {
    path: PathBuf,
    file: File,
    rows: PhantomData<fn(&R)>,
}

impl<R: Row> TableWriter<R> {
    /// Creates the file, or empties it, and writes the header.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let io = |operation| {
            let path = path.clone();
            move |source| Error::Io {
                operation,
                path,
                source,
            }
        };
        let mut file = File::create(&path).map_err(io("create"))?;
        let mut header = R::COLUMNS.join(",");
        header.push('\n');
        file.write_all(header.as_bytes())
            .map_err(io("write the header of"))?;
        Ok(TableWriter {
            path,
            file,
            rows: PhantomData,
        })
    }

    /// Appends one row.
    ///
    /// # Errors
    /// [`Error::Refused`] if the row breaks a rule (nothing is written then), [`Error::Io`].
    pub fn append(&mut self, row: &R) -> Result<(), Error> {
        row.check()
            .map_err(|Fault { column, message }| Error::Refused {
                path: self.path.clone(),
                column,
                message,
            })?;
        let mut line = csv::WriterBuilder::new()
            .has_headers(false)
            .from_writer(Vec::with_capacity(256));
        let bytes = line
            .serialize(row.to_wire())
            .map_err(std::io::Error::other)
            .and_then(|()| line.into_inner().map_err(|error| error.into_error()));
        bytes
            .and_then(|bytes| self.file.write_all(&bytes))
            .map_err(|source| Error::Io {
                operation: "append to",
                path: self.path.clone(),
                source,
            })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads a whole csv file.
///
/// # Errors
/// [`Error::Io`], [`Error::Table`] for malformed csv or missing columns, [`Error::Cell`] for a
/// cell that can't be understood or breaks a rule of the format.
pub fn read_table<R: Row>(path: &Path) -> Result<Vec<R>, Error> {
    let file = File::open(path).map_err(|source| Error::Io {
        operation: "open",
        path: path.to_owned(),
        source,
    })?;
    let table_error = |line: u64, message: String| Error::Table {
        path: path.to_owned(),
        line,
        message,
    };
    let mut reader = csv::ReaderBuilder::new().from_reader(BufReader::new(file));
    let header = reader
        .headers()
        .map_err(|error| csv_error(path, &error))?
        .clone();
    for column in R::COLUMNS {
        match header.iter().filter(|name| name == column).count() {
            1 => {}
            0 => return Err(table_error(1, format!("no column `{column}`"))),
            _ => return Err(table_error(1, format!("column `{column}` stands twice"))),
        }
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| csv_error(path, &error))?;
        let line = record.position().map_or(0, csv::Position::line);
        let wire: R::Wire = record
            .deserialize(Some(&header))
            .map_err(|error| table_error(line, error.to_string()))?;
        let row = R::from_wire(wire).and_then(|row: R| row.check().map(|()| row));
        rows.push(row.map_err(|Fault { column, message }| Error::Cell {
            path: path.to_owned(),
            line,
            column,
            message,
        })?);
    }
    Ok(rows)
}

fn csv_error(path: &Path, error: &csv::Error) -> Error {
    let message = match error.kind() {
        csv::ErrorKind::Io(source) => {
            return Error::Io {
                operation: "read",
                path: path.to_owned(),
                source: std::io::Error::new(source.kind(), source.to_string()),
            };
        }
        csv::ErrorKind::Utf8 { err, .. } => {
            format!("field {} is not UTF-8", err.field() + 1)
        }
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!("{len} fields where the header has {expected_len}"),
        _ => error.to_string(),
    };
    Error::Table {
        path: path.to_owned(),
        line: error.position().map_or(1, csv::Position::line),
        message,
    }
}
