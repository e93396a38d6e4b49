//! JSON files: read with position in the error, written so that a reader sees the old file or the
//! new one and never half of either.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, SCHEMA_VERSION};

pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = fs::read_to_string(path).map_err(|source| Error::Io {
        operation: "read",
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|error| Error::Json {
        path: path.to_owned(),
        line: error.line(),
        column: error.column(),
        // serde_json repeats the position, which the error shows already.
        message: match error.to_string().rsplit_once(" at line ") {
            Some((message, _)) => message.to_owned(),
            None => error.to_string(),
        },
    })
}

pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let io = |operation| {
        move |source| Error::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    let mut text = serde_json::to_string_pretty(value)
        .map_err(std::io::Error::other)
        .map_err(io("serialise"))?;
    text.push('\n');
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let fresh = Path::new(&name);
    let written = fs::File::create(fresh)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(fresh, path));
    written.map_err(|error| {
        // Best effort: the write's own error is what matters.
        let _ = fs::remove_file(fresh);
        io("write")(error)
    })
}

pub(crate) fn check_version(path: &Path, version: u32) -> Result<(), Error> {
    if version == SCHEMA_VERSION {
        return Ok(());
    }
    Err(Error::Json {
        path: path.to_owned(),
        line: 0,
        column: 0,
        message: format!("schema_version {version}, this program reads {SCHEMA_VERSION}"),
    })
}
