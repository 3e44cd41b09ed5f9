//! What can be wrong with a data file, and how it is told: never with the text itself, which is private.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

/// Why a data set was not loaded. Nothing of it was kept.
#[derive(Debug, Error)]
pub enum DataError {
    /// The path cannot be opened, read or decompressed.
    #[error("cannot read data {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file's extension names no known format.
    #[error("data file {} must end in one of {expected}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The extensions that are read here.
        expected: String,
    },
    /// A bound of [`DataLimits`](super::DataLimits) is passed.
    #[error("{file}: passes {limit} = {max}")]
    Limit {
        /// The file, or the folder for a bound on the whole.
        file: String,
        /// The bound's name.
        limit: &'static str,
        /// The bound.
        max: usize,
    },
    /// The data holds no user.
    #[error("{file}: no user in it")]
    Empty {
        /// The file or folder.
        file: String,
    },
    /// At least one line is broken.
    #[error("{}", BadLines(lines, *complete))]
    Lines {
        /// The broken lines in order, at most `bad_lines_max` of them.
        lines: Vec<BadLine>,
        /// False when the loader stopped looking after `bad_lines_max` lines.
        complete: bool,
    },
}

/// One broken line, or one broken file of a folder (then line 1).
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{file}:{line}: {reason}")]
pub struct BadLine {
    /// The file.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: LineError,
}

/// What is wrong with one line.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LineError {
    /// The bytes are no text.
    #[error("not UTF-8 at byte {at}")]
    Utf8 {
        /// Offset in the line.
        at: usize,
    },
    /// The line is no JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// JSON, but not of the kind that the line must hold.
    #[error("expected {0}")]
    Expected(&'static str),
    /// A key holds a value of the wrong kind.
    #[error("key \"{key}\" must be {expected}")]
    Type {
        /// The key.
        key: &'static str,
        /// What it must hold.
        expected: &'static str,
    },
    /// A key that must be there is not.
    #[error("key \"{0}\" is missing")]
    Missing(&'static str),
    /// Both the split and the simple form are given.
    #[error("\"text\" stands beside \"train\", \"val\" or \"test\": give one form")]
    TwoForms,
    /// The group is neither `train` nor `heldout`.
    #[error("key \"group\" must be \"train\" or \"heldout\"")]
    Group,
    /// The user's name is blank or holds control characters.
    #[error("user name is blank or holds control characters")]
    UserName,
    /// The name is taken.
    #[error("user \"{user}\" was already given at {first}")]
    Duplicate {
        /// The name.
        user: String,
        /// File and line of its first appearance.
        first: String,
    },
    /// A user of the training group has no training text that is not blank, or a held-out user no text.
    #[error("user \"{0}\" has no text to use")]
    NoText(String),
    /// A bound of [`DataLimits`](super::DataLimits) is passed.
    #[error("passes {limit} = {max}")]
    Limit {
        /// The bound's name.
        limit: &'static str,
        /// The bound.
        max: usize,
    },
}

struct BadLines<'a>(&'a [BadLine], bool);

impl fmt::Display for BadLines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(lines, complete) = self;
        let count = lines.len();
        write!(
            f,
            "{count} bad line{}{}",
            if count == 1 { "" } else { "s" },
            if *complete { "" } else { ", and perhaps more" }
        )?;
        lines.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}
