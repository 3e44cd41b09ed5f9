//! One parsed line: a user record in the split or the simple form, or a bare text.
//!
//! JSON is taken apart by hand, not by derive: serde's messages would quote the user's text.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::error::LineError;
use super::limits::DataLimits;
use super::{Group, UserData};

/// Keys of a user record, in the split and the simple form.
const KEYS: [&str; 6] = ["user", "group", "train", "val", "test", "text"];

/// One JSON value from one line's bytes.
pub(super) fn parse_json(line: &[u8], limits: &DataLimits) -> Result<Value, LineError> {
    let max = limits.line_bytes_max;
    if line.len() > max {
        return Err(LineError::Limit { limit: "line_bytes_max", max });
    }
    let text = str::from_utf8(line).map_err(|error| LineError::Utf8 { at: error.valid_up_to() })?;
    serde_json::from_str(text).map_err(|error| LineError::Json(error.to_string()))
}

/// A user record. Names of keys it does not know go to `ignored`.
pub(super) fn parse_user(
    value: Value,
    limits: &DataLimits,
    ignored: &mut BTreeSet<String>,
) -> Result<UserData, LineError> {
    let Value::Object(mut map) = value else {
        return Err(LineError::Expected("an object with \"user\" and \"train\" or \"text\""));
    };
    let user = take_user_name(&mut map, limits)?;
    let group = take_group(&mut map)?;
    let simple = map.contains_key("text");
    if simple && ["train", "val", "test"].iter().any(|key| map.contains_key(*key)) {
        return Err(LineError::TwoForms);
    }
    if !simple && !map.contains_key("train") && group == Group::Train {
        return Err(LineError::Missing("train"));
    }
    let user = if simple {
        split(user, group, drop_blank(take_simple_text(&mut map)?))
    } else {
        let train = take_texts(&mut map, "train")?;
        let val = take_texts(&mut map, "val")?;
        let test = take_texts(&mut map, "test")?;
        UserData { user, group, train, val, test }
    };
    ignored.extend(map.keys().filter(|key| !KEYS.contains(&key.as_str())).map(|key| format!("key {key:?}")));
    check_texts(user, limits)
}

/// A bare text: a JSON string or `{"text": string}`.
pub(super) fn parse_text(value: Value, ignored: &mut BTreeSet<String>) -> Result<String, LineError> {
    match value {
        Value::String(text) => Ok(text),
        Value::Object(mut map) => {
            let text = map.remove("text").ok_or(LineError::Missing("text"))?;
            ignored.extend(map.keys().map(|key| format!("key {key:?}")));
            as_text(text, "text", "a string")
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {
            Err(LineError::Expected("a string or an object with \"text\""))
        }
    }
}

/// Splits texts in order: the first 80 % train (at least one text), up to 90 % validate, the rest test.
pub(super) fn split(user: String, group: Group, mut texts: Vec<String>) -> UserData {
    let count = texts.len();
    let train_end = (count * 8 / 10).max(1).min(count);
    let val_end = (count * 9 / 10).max(train_end);
    let test = texts.split_off(val_end);
    let val = texts.split_off(train_end);
    UserData { user, group, train: texts, val, test }
}

/// The paragraphs of a plain text: what stands between blank lines, line breaks inside kept.
pub(super) fn paragraphs(text: &str) -> Vec<String> {
    let text = text.replace("\r\n", "\n");
    let mut paragraphs = vec![Vec::new()];
    for line in text.split('\n') {
        if line.trim().is_empty() {
            paragraphs.push(Vec::new());
        } else if let Some(paragraph) = paragraphs.last_mut() {
            paragraph.push(line);
        }
    }
    paragraphs.into_iter().filter(|lines| !lines.is_empty()).map(|lines| lines.join("\n")).collect()
}

/// Drops blank texts, then holds the bounds and refuses a user without text for its group.
pub(super) fn check_texts(mut user: UserData, limits: &DataLimits) -> Result<UserData, LineError> {
    user.train = drop_blank(user.train);
    user.val = drop_blank(user.val);
    user.test = drop_blank(user.test);
    let max = limits.texts_max;
    let count = user.texts().count();
    let usable = match user.group {
        Group::Train => user.train.len(),
        Group::HeldOut => count,
    };
    if usable == 0 {
        return Err(LineError::NoText(user.user));
    }
    if count > max {
        return Err(LineError::Limit { limit: "texts_max", max });
    }
    Ok(user)
}

/// The texts that hold more than white space.
pub(super) fn drop_blank(mut texts: Vec<String>) -> Vec<String> {
    texts.retain(|text| !text.trim().is_empty());
    texts
}

/// A user's name: not blank, no control characters, bounded.
pub(super) fn check_user_name(name: &str, limits: &DataLimits) -> Result<(), LineError> {
    let max = limits.user_name_bytes_max;
    if name.len() > max {
        return Err(LineError::Limit { limit: "user_name_bytes_max", max });
    }
    if name.trim().is_empty() || name.chars().any(char::is_control) {
        return Err(LineError::UserName);
    }
    Ok(())
}

fn take_user_name(map: &mut Map<String, Value>, limits: &DataLimits) -> Result<String, LineError> {
    let name = as_text(map.remove("user").ok_or(LineError::Missing("user"))?, "user", "a string")?;
    check_user_name(&name, limits)?;
    Ok(name)
}

fn take_group(map: &mut Map<String, Value>) -> Result<Group, LineError> {
    match map.remove("group").as_ref().map(Value::as_str) {
        None => Ok(Group::default()),
        Some(Some("train")) => Ok(Group::Train),
        Some(Some("heldout")) => Ok(Group::HeldOut),
        Some(_) => Err(LineError::Group),
    }
}

fn take_simple_text(map: &mut Map<String, Value>) -> Result<Vec<String>, LineError> {
    match map.remove("text") {
        Some(Value::String(text)) => Ok(paragraphs(&text)),
        Some(other) => as_texts(other, "text", "a string or a list of strings"),
        None => Err(LineError::Missing("text")),
    }
}

/// The strings under `key`, none when it is absent.
fn take_texts(map: &mut Map<String, Value>, key: &'static str) -> Result<Vec<String>, LineError> {
    map.remove(key).map_or_else(|| Ok(Vec::new()), |value| as_texts(value, key, "a list of strings"))
}

fn as_texts(value: Value, key: &'static str, expected: &'static str) -> Result<Vec<String>, LineError> {
    let Value::Array(items) = value else {
        return Err(LineError::Type { key, expected });
    };
    items.into_iter().map(|item| as_text(item, key, expected)).collect()
}

fn as_text(value: Value, key: &'static str, expected: &'static str) -> Result<String, LineError> {
    let Value::String(text) = value else {
        return Err(LineError::Type { key, expected });
    };
    Ok(text)
}
