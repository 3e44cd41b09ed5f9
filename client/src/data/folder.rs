//! A folder with one file a user: `NAME.txt` (paragraphs between blank lines) or `NAME.jsonl` (one text a
//! line). The file's name without its extension is the user; every user trains.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::error::{DataError, LineError};
use super::jsonl::{self, BadLines};
use super::limits::DataLimits;
use super::record::{check_texts, check_user_name, drop_blank, paragraphs, split};
use super::{Dataset, Group, UserData, source};

/// A data set from a folder, users in the order of their sorted file names.
pub(super) fn load(folder: &Path, limits: &DataLimits) -> Result<Dataset, DataError> {
    let (files, mut ignored) = list(folder, limits)?;
    let limit = |limit, max| DataError::Limit { file: folder.display().to_string(), limit, max };
    let mut users = Vec::new();
    let mut first_seen = BTreeMap::new();
    let mut bad = BadLines::new(limits);
    let mut bytes_total = 0;
    for path in files {
        let name = path.display().to_string();
        let bytes = source::read(&path, limits)?;
        bytes_total += bytes.len();
        if bytes_total > limits.file_bytes_max {
            return Err(limit("file_bytes_max", limits.file_bytes_max));
        }
        if users.len() == limits.users_max {
            return Err(limit("users_max", limits.users_max));
        }
        let texts = texts(&path, &bytes, limits, &mut ignored, &mut bad)?;
        let user = user_name(&path);
        match user_from_texts(user, texts, limits)
            .and_then(|user| jsonl::claim(&mut first_seen, &user.user, name.clone()).map(|()| user))
        {
            Ok(user) => users.push(user),
            Err(LineError::NoText(_)) if bad.mentions(&name) => {}
            Err(reason) => bad.push(&name, 1, reason)?,
        }
    }
    bad.finish()?;
    if users.is_empty() {
        return Err(DataError::Empty { file: folder.display().to_string() });
    }
    Ok(Dataset::new(users, ignored))
}

/// The texts of one user's file, `.txt` or (any other name) JSONL.
pub(super) fn texts(
    path: &Path,
    bytes: &[u8],
    limits: &DataLimits,
    ignored: &mut BTreeSet<String>,
    bad: &mut BadLines,
) -> Result<Vec<String>, DataError> {
    let name = path.display().to_string();
    if !has_extension(path, "txt") {
        return jsonl::texts(&name, bytes, limits, ignored, bad);
    }
    match str::from_utf8(bytes) {
        Ok(text) => Ok(paragraphs(text.strip_prefix('\u{feff}').unwrap_or(text))),
        Err(error) => {
            let (line, at) = position(bytes, error.valid_up_to());
            bad.push(&name, line, LineError::Utf8 { at })?;
            Ok(Vec::new())
        }
    }
}

/// A training user from its texts, split 80/10/10.
pub(super) fn user_from_texts(
    user: String,
    texts: Vec<String>,
    limits: &DataLimits,
) -> Result<UserData, LineError> {
    check_user_name(&user, limits)?;
    check_texts(split(user, Group::Train, drop_blank(texts)), limits)
}

/// The file's name without folder and extension.
pub(super) fn user_name(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// User files sorted by name, and what else lies there (hidden files are not worth a word).
fn list(folder: &Path, limits: &DataLimits) -> Result<(Vec<PathBuf>, BTreeSet<String>), DataError> {
    let read_error = |source| DataError::Read { path: folder.to_owned(), source };
    let mut files = Vec::new();
    let mut ignored = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if path.is_file()
            && (has_extension(&path, "txt") || has_extension(&path, "jsonl"))
            && !name.starts_with('.')
        {
            files.push(path);
        } else if !name.starts_with('.') && ignored.len() < limits.ignored_max {
            ignored.insert(format!("file {name:?}"));
        }
    }
    files.sort();
    Ok((files, ignored))
}

pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// Line from 1, and byte offset inside it, of a byte offset in the whole file.
fn position(bytes: &[u8], at: usize) -> (usize, usize) {
    let before = &bytes[..at];
    let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    (before.iter().filter(|byte| **byte == b'\n').count() + 1, at - line_start)
}
