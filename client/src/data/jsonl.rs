//! JSONL: numbered lines, bad ones collected. Files with one user a line become a data set here; files
//! with one text a line are read for `folder` and `device`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Dataset;
use super::error::{BadLine, DataError, LineError};
use super::limits::DataLimits;
use super::record::{parse_json, parse_text, parse_user};

const UTF8_BOM: &[u8] = &[0xef, 0xbb, 0xbf];

/// A data set from the (decompressed) bytes of a file with one user a line.
pub(super) fn load(name: &str, bytes: &[u8], limits: &DataLimits) -> Result<Dataset, DataError> {
    let mut users = Vec::new();
    let mut ignored = BTreeSet::new();
    let mut first_seen = BTreeMap::new();
    let mut bad = BadLines::new(limits);
    for (number, line) in lines(bytes) {
        if users.len() == limits.users_max {
            return Err(DataError::Limit {
                file: name.to_owned(),
                limit: "users_max",
                max: limits.users_max,
            });
        }
        let parsed = parse_json(line, limits)
            .and_then(|value| parse_user(value, limits, &mut ignored))
            .and_then(|user| claim(&mut first_seen, &user.user, format!("{name}:{number}")).map(|()| user));
        match parsed {
            Ok(user) => users.push(user),
            Err(reason) => bad.push(name, number, reason)?,
        }
        bound(&mut ignored, limits);
    }
    bad.finish()?;
    if users.is_empty() {
        return Err(DataError::Empty { file: name.to_owned() });
    }
    Ok(Dataset::new(users, ignored))
}

/// The texts of a file with one text a line; bad lines go to `bad`.
pub(super) fn texts(
    name: &str,
    bytes: &[u8],
    limits: &DataLimits,
    ignored: &mut BTreeSet<String>,
    bad: &mut BadLines,
) -> Result<Vec<String>, DataError> {
    let mut texts = Vec::new();
    for (number, line) in lines(bytes) {
        match parse_json(line, limits).and_then(|value| parse_text(value, ignored)) {
            Ok(text) => texts.push(text),
            Err(reason) => bad.push(name, number, reason)?,
        }
        bound(ignored, limits);
    }
    Ok(texts)
}

/// The first line's JSON value, if it is one: what kind of JSONL file this is.
pub(super) fn peek(bytes: &[u8], limits: &DataLimits) -> Option<Value> {
    lines(bytes).next().and_then(|(_, line)| parse_json(line, limits).ok())
}

/// Lines with their numbers from 1; a byte order mark, line ends and blank lines are left out.
pub(super) fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let bytes = bytes.strip_prefix(UTF8_BOM).unwrap_or(bytes);
    (1..)
        .zip(bytes.split(|byte| *byte == b'\n'))
        .map(|(number, line)| (number, line.trim_ascii()))
        .filter(|(_, line)| !line.is_empty())
}

/// Notes where a user stands, or tells where it stood before.
pub(super) fn claim(
    first_seen: &mut BTreeMap<String, String>,
    user: &str,
    place: String,
) -> Result<(), LineError> {
    if let Some(first) = first_seen.get(user) {
        return Err(LineError::Duplicate { user: user.to_owned(), first: first.clone() });
    }
    first_seen.insert(user.to_owned(), place);
    Ok(())
}

/// Broken lines so far, over one or more files.
pub(super) struct BadLines {
    lines: Vec<BadLine>,
    max: usize,
}

impl BadLines {
    pub(super) fn new(limits: &DataLimits) -> Self {
        Self { lines: Vec::new(), max: limits.bad_lines_max }
    }

    /// Fails with everything found so far once the bound is reached.
    pub(super) fn push(&mut self, file: &str, line: usize, reason: LineError) -> Result<(), DataError> {
        self.lines.push(BadLine { file: file.to_owned(), line, reason });
        if self.lines.len() < self.max {
            return Ok(());
        }
        Err(DataError::Lines { lines: std::mem::take(&mut self.lines), complete: false })
    }

    /// Whether a line of `file` was broken.
    pub(super) fn mentions(&self, file: &str) -> bool {
        self.lines.iter().any(|line| line.file == file)
    }

    /// Fails if any line was broken.
    pub(super) fn finish(self) -> Result<(), DataError> {
        if self.lines.is_empty() {
            return Ok(());
        }
        Err(DataError::Lines { lines: self.lines, complete: true })
    }
}

/// Keeps the report of ignored names small however many a hostile file makes up.
fn bound(ignored: &mut BTreeSet<String>, limits: &DataLimits) {
    while ignored.len() > limits.ignored_max {
        ignored.pop_last();
    }
}
