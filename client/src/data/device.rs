//! The data of one device: its user's texts in a single file.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::error::{BadLine, DataError};
use super::jsonl::{self, BadLines};
use super::limits::DataLimits;
use super::{Dataset, UserData, folder, source};

/// Loads a device's own file: `.txt` (paragraphs between blank lines), `.jsonl` with one text a line, or
/// `.jsonl` with one user record on its only line (each `.jsonl` may be gzip).
///
/// # Errors
/// [`DataError`] as for a whole data set; more than one user record passes the bound `users_max`.
pub fn load_device(path: &Path) -> Result<UserData, DataError> {
    let limits = DataLimits { users_max: 1, ..DataLimits::default() };
    source::require_extension(path, &["txt", "jsonl", "jsonl.gz"])?;
    let bytes = source::read(path, &limits)?;
    let name = path.display().to_string();
    if !folder::has_extension(path, "txt") && is_user_record(&bytes, &limits) {
        return first_user(&name, jsonl::load(&name, &bytes, &limits)?);
    }
    let mut bad = BadLines::new(&limits);
    let texts = folder::texts(path, &bytes, &limits, &mut BTreeSet::new(), &mut bad)?;
    bad.finish()?;
    folder::user_from_texts(folder::user_name(path), texts, &limits).map_err(|reason| DataError::Lines {
        lines: vec![BadLine { file: name, line: 1, reason }],
        complete: true,
    })
}

/// Texts come as strings or as objects with `text` alone; a user record names its user.
fn is_user_record(bytes: &[u8], limits: &DataLimits) -> bool {
    matches!(jsonl::peek(bytes, limits), Some(Value::Object(map)) if map.contains_key("user"))
}

fn first_user(name: &str, data: Dataset) -> Result<UserData, DataError> {
    data.users.into_iter().next().ok_or_else(|| DataError::Empty { file: name.to_owned() })
}
