//! Modules as the command line names them: `--initrd "FILE [TEXT],..."`, as QEMU's `-initrd` for Multiboot
//! images has it. What the kernel is told of a module is all of its item: the file's name and the text.
//!
//! Names that exist come first: a file whose name has commas or spaces in it needs no other spelling.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use engine_core::loader::Module;

use crate::run::file;

/// A module's file.
pub(crate) struct File {
    text: String,
    content: Vec<u8>,
}

impl File {
    pub(crate) fn module(&self) -> Module<'_> {
        Module {
            text: &self.text,
            content: &self.content,
        }
    }
}

/// Reads what the arguments name, in their order.
pub(crate) fn read(arguments: &[OsString]) -> anyhow::Result<Vec<File>> {
    let exists = |name: &OsStr| Path::new(name).exists();
    let items = arguments
        .iter()
        .flat_map(|argument| items(argument, exists));
    items
        .map(|item| {
            Ok(File {
                text: item.to_string_lossy().into_owned(),
                content: file("initrd", Path::new(name(&item, exists)))?,
            })
        })
        .collect()
}

/// The items of one argument.
fn items(argument: &OsStr, exists: impl Fn(&OsStr) -> bool) -> Vec<OsString> {
    if exists(argument) {
        return vec![argument.to_owned()];
    }
    let mut items = vec![Vec::new()];
    let mut bytes = argument.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' if bytes.next_if_eq(&b',').is_none() => items.push(Vec::new()),
            // Spaces in front belong to no name.
            b' ' if items.last().is_some_and(Vec::is_empty) => {}
            byte => items.last_mut().expect("never empty").push(byte),
        }
    }
    items.into_iter().map(OsString::from_vec).collect()
}

/// The name in an item: all of it, or what comes before the first space.
fn name(item: &OsStr, exists: impl Fn(&OsStr) -> bool) -> &OsStr {
    let bytes = item.as_bytes();
    match bytes.iter().position(|&byte| byte == b' ') {
        Some(space) if !exists(item) => OsStr::from_bytes(&bytes[..space]),
        Some(_) | None => item,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_spaces_divide_what_is_not_there() {
        for (argument, expected) in [
            ("vmlinuz", vec!["vmlinuz"]),
            ("vmlinuz a=1 b, initrd", vec!["vmlinuz a=1 b", "initrd"]),
            ("a,,b x,c", vec!["a,b x", "c"]),
            ("a,,,b", vec!["a,", "b"]),
            ("there, is", vec!["there, is"]),
            ("a,", vec!["a", ""]),
        ] {
            let found = items(argument.as_ref(), |name| name == "there, is");
            assert_eq!(found, expected, "{argument}");
        }
        for (item, expected) in [
            ("vmlinuz a=1 b", "vmlinuz"),
            ("initrd", "initrd"),
            ("two words", "two words"),
        ] {
            let found = name(item.as_ref(), |name| name == "two words");
            assert_eq!(found, expected);
        }
    }
}
