//! Functions and files stay small. What needs more room says why, in one line:
//! `// long function: REASON` directly above the function (above its attributes and documentation),
//! or `// long file: REASON` in the first lines of the file.

use super::support::{files, read};

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 600;
/// Lines at the top in which a long file explains itself.
const HEADER_LINES: usize = 20;

#[test]
fn functions_and_files_stay_small_or_say_why_not() {
    let sources = files(".", "rs");
    assert!(sources.len() > 50, "only {} sources found", sources.len());
    let long: Vec<String> = sources
        .iter()
        .flat_map(|path| {
            let path = path.display().to_string();
            findings(&path, &read(&path))
        })
        .collect();
    assert!(long.is_empty(), "split these, or say why not in one line:\n{}", long.join("\n"));
}

fn findings(path: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let explained = lines.iter().take(HEADER_LINES).any(|line| has_reason(line, "long file:"));
    let file = (lines.len() > FILE_LINES_MAX && !explained)
        .then(|| format!("{path}: {} lines, {FILE_LINES_MAX} are allowed", lines.len()));
    let functions = (0..lines.len()).filter_map(|start| {
        let length = function_length(&lines[start..])?;
        let long = length > FUNCTION_LINES_MAX && !function_explained(&lines[..start]);
        long.then(|| {
            let name = lines[start].trim();
            format!("{path}:{}: {length} lines, {FUNCTION_LINES_MAX} are allowed: {name}", start + 1)
        })
    });
    file.into_iter().chain(functions).collect()
}

/// Lines of the function that begins in the first line; none if none begins there or it has no body.
/// Relies on rustfmt: a body ends at the first brace as far to the left as its beginning.
fn function_length(lines: &[&str]) -> Option<usize> {
    let first = lines[0];
    let indent = first.len() - first.trim_start().len();
    if !is_function(first.trim_start()) {
        return None;
    }
    if first.ends_with(['}', ';']) {
        return first.ends_with('}').then_some(1);
    }
    let outer = |line: &str| !line.is_empty() && line.len() - line.trim_start().len() == indent;
    let end = lines.iter().skip(1).position(|line| outer(line) && line.trim_end().ends_with(['}', ';']))?;
    lines[end + 1].ends_with('}').then_some(end + 2)
}

/// True for a line that begins a function, whatever stands before `fn`.
fn is_function(line: &str) -> bool {
    let before = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""];
    let mut words =
        line.split_whitespace().skip_while(|word| before.contains(word) || word.starts_with("pub(in"));
    words.next() == Some("fn")
}

/// Looks for the reason above a function, past its documentation and attributes.
fn function_explained(above: &[&str]) -> bool {
    let near = above.iter().rev().map(|line| line.trim());
    let mut near = near.take_while(|line| line.starts_with("//") || line.starts_with("#["));
    near.any(|line| has_reason(line, "long function:"))
}

fn has_reason(line: &str, marker: &str) -> bool {
    line.split_once(marker).is_some_and(|(_, reason)| !reason.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(lines: usize, above: &str) -> String {
        format!("{above}pub(crate) fn long(\n    a: u8,\n) -> u8 {{\n{}}}\n", "    a;\n".repeat(lines - 4))
    }

    #[test]
    fn long_functions_are_found_and_may_explain_themselves() {
        assert_eq!(findings("a.rs", &function(70, "")), Vec::<String>::new());
        assert_eq!(
            findings("a.rs", &function(71, "")),
            ["a.rs:1: 71 lines, 70 are allowed: pub(crate) fn long("]
        );
        assert!(
            findings("a.rs", &function(71, "// long function: one table\n/// What it does.\n")).is_empty()
        );
        assert_eq!(findings("a.rs", &function(71, "// long function:\n")).len(), 1);
    }

    #[test]
    fn long_files_are_found_and_may_explain_themselves() {
        let text = "//! x\n".to_owned() + &"const A: u8 = 0;\n".repeat(600);
        assert_eq!(findings("a.rs", &text), ["a.rs: 601 lines, 600 are allowed"]);
        assert!(findings("a.rs", &text.replace("//! x", "// long file: one table")).is_empty());
    }

    #[test]
    fn declarations_and_short_functions_have_their_length() {
        let length = |text: &str| function_length(&text.lines().collect::<Vec<_>>());
        assert_eq!(length("fn a() {}"), Some(1));
        assert_eq!(length("fn a();\nfn b() {\n}"), None);
        assert_eq!(length("fn a(\n    b: u8,\n) -> u8;\nfn c() {\n}"), None);
        assert_eq!(length("fn a()\nwhere\n    T: B,\n{\n    c();\n}\nx"), Some(6));
        assert_eq!(length("struct A {\n}"), None);
    }
}
