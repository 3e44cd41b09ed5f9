//! Lines of JSON with a text and perhaps a label. A bad line is named by its file and number.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

/// A text longer than this is no line but a file.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// More lines than one device has, or one machine should hold.
const LINES_MAX: usize = 1 << 22;

/// One line; other keys are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) text: String,
    label: Option<String>,
}

#[derive(Deserialize)]
struct Raw {
    text: String,
    label: Option<Label>,
}

/// Data sets number their classes or name them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Name(String),
    Number(i64),
}

impl Line {
    pub(super) fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }
}

/// The lines of a file.
pub(super) fn read_lines(path: &Path) -> Result<Vec<Line>> {
    let file = File::open(path).with_context(|| format!("data {}", path.display()))?;
    let lines = parse(&mut BufReader::new(file), &path.display().to_string())?;
    ensure!(!lines.is_empty(), "{}: no lines", path.display());
    Ok(lines)
}

/// The lines of an input of that name.
pub(super) fn parse(input: &mut dyn BufRead, name: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        let context = || format!("{name}:{number}");
        let read = input.take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut bytes).with_context(context)?;
        if read == 0 {
            break;
        }
        ensure!(read as u64 <= LINE_BYTES_MAX, "{name}:{number}: longer than {LINE_BYTES_MAX} bytes");
        ensure!(number <= LINES_MAX, "{name}:{number}: more than {LINES_MAX} lines");
        let raw: Raw = serde_json::from_slice(&bytes).with_context(context)?;
        let label = raw.label.map(|label| match label {
            Label::Name(name) => name,
            Label::Number(number) => number.to_string(),
        });
        lines.push(Line { number, text: raw.text, label });
    }
    Ok(lines)
}

/// The place of the line's label among the labels.
pub(super) fn labelled(line: &Line, path: &Path, labels: &[String]) -> Result<usize> {
    let at = format!("{}:{}", path.display(), line.number);
    let Some(label) = line.label() else { bail!("{at}: no label") };
    let place = labels.iter().position(|known| known == label);
    place.with_context(|| format!("{at}: label {label:?} is none of the classifier's"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Line>> {
        parse(&mut text.as_bytes(), "data.jsonl")
    }

    #[test]
    fn labels_are_names_or_numbers() {
        let lines = parsed("{\"text\": \"a\", \"label\": \"x\", \"id\": 7}\n{\"label\": 3, \"text\": \"b\"}\n{\"text\": \"\"}").unwrap();
        let labels: Vec<_> = lines.iter().map(Line::label).collect();
        assert_eq!(labels, [Some("x"), Some("3"), None]);
        assert_eq!(lines[1].text, "b");
    }

    #[test]
    fn bad_lines_are_named() {
        let check = |text: &str, expected: &str| {
            let error = format!("{:#}", parsed(text).unwrap_err());
            assert!(error.contains(expected), "{error}");
        };
        check("{\"text\": \"a\"}\n\n", "data.jsonl:2");
        check("{\"text\": \"a\"}\n{\"text\": 5}\n", "data.jsonl:2");
        check("{\"label\": \"a\"}\n", "missing field `text`");
        check(&format!("{{\"text\": \"{}\"}}", "a".repeat(1 << 20)), "data.jsonl:1: longer");
        let lines = parsed("{\"text\": \"a\"}\n{\"text\": \"a\", \"label\": \"y\"}\n").unwrap();
        let place = |line| labelled(line, Path::new("d"), &["x".to_owned()]).unwrap_err().to_string();
        assert_eq!(place(&lines[0]), "d:1: no label");
        assert_eq!(place(&lines[1]), "d:2: label \"y\" is none of the classifier's");
    }
}
