//! The loader on good files, on every kind of broken line and at every bound.

use std::fs;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

const TWO_USERS: &str = r#"{"user": "ann", "train": ["one", "two"], "val": ["three"], "test": ["four"], "n_words": 4}
{"user": "bob", "group": "heldout", "train": ["five"], "test": ["six", "  "]}
"#;

fn load(text: &str) -> Result<Dataset, DataError> {
    Dataset::from_jsonl_bytes("fleet.jsonl", text.as_bytes())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory takes bytes");
    encoder.finish().expect("memory takes bytes")
}

/// The message of the only broken line, without file and line number, which must be those given.
fn only_reason(error: DataError, file: &str, line: usize) -> String {
    let DataError::Lines { lines, complete: true } = error else { panic!("not bad lines: {error}") };
    let [bad] = lines.as_slice() else { panic!("not one bad line: {lines:?}") };
    assert_eq!((bad.file.as_str(), bad.line), (file, line));
    bad.reason.to_string()
}

#[test]
fn split_records_keep_order_and_groups() {
    let data = load(TWO_USERS).expect("valid");
    let [ann, bob] = data.users.as_slice() else { panic!("two users") };
    assert_eq!((ann.user.as_str(), ann.group), ("ann", Group::Train));
    assert_eq!(
        (&*ann.train, &*ann.val, &*ann.test),
        (&["one".into(), "two".into()][..], &["three".into()][..], &["four".into()][..])
    );
    assert_eq!(bob.group, Group::HeldOut);
    assert_eq!(bob.test, ["six"], "blank texts are dropped");
    assert_eq!(ann.evaluation_texts(), ["four"]);
    assert_eq!(bob.evaluation_texts(), ["five", "six"]);
    assert_eq!(data.ignored, ["key \"n_words\""]);
    assert_eq!(data.group(Group::HeldOut).count(), 1);
}

#[test]
fn a_held_out_user_needs_no_training_text() {
    let data = load(r#"{"user": "bob", "group": "heldout", "test": ["six"]}"#).expect("valid");
    assert!(data.users[0].train.is_empty());
}

#[test]
fn gzip_byte_order_mark_blank_lines_and_line_ends_change_nothing() {
    let plain = load(TWO_USERS).expect("valid");
    let windows = format!("\u{feff}\r\n{}", TWO_USERS.replace('\n', "\r\n"));
    assert_eq!(load(&windows).expect("valid"), plain);
    let packed = Dataset::from_jsonl_bytes("fleet.jsonl.gz", &gzip(TWO_USERS.as_bytes())).expect("valid");
    assert_eq!(packed, plain);
}

#[test]
fn the_hash_names_the_content() {
    let one = load(TWO_USERS).expect("valid").sha256;
    assert_eq!(load(&TWO_USERS.replace("n_words", "words")).expect("valid").sha256, one);
    for (from, to) in [("ann", "eve"), ("one", "One"), ("heldout", "train"), ("\"val\"", "\"vale\"")] {
        assert_ne!(load(&TWO_USERS.replace(from, to)).expect("valid").sha256, one, "{from} -> {to}");
    }
}

#[test]
fn simple_texts_are_split_in_order() {
    let sizes = |count: usize| {
        let texts: Vec<String> = (0..count).map(|number| number.to_string()).collect();
        let line = serde_json::json!({"user": "u", "text": texts}).to_string();
        let user = load(&line).expect("valid").users.remove(0);
        assert!(user.texts().eq(texts.iter().map(String::as_str)));
        (user.train.len(), user.val.len(), user.test.len())
    };
    let expected = [
        (1, (1, 0, 0)),
        (2, (1, 0, 1)),
        (5, (4, 0, 1)),
        (10, (8, 1, 1)),
        (19, (15, 2, 2)),
        (100, (80, 10, 10)),
    ];
    for (count, split) in expected {
        assert_eq!(sizes(count), split, "{count} texts");
    }
}

#[test]
fn a_simple_string_is_split_at_blank_lines() {
    let data = load(r#"{"user": "u", "text": "a\nb\n\n \n\nc\n"}"#).expect("valid");
    assert!(data.users[0].texts().eq(["a\nb", "c"]));
}

#[test]
fn every_bad_line_names_file_line_and_reason() {
    let cases: &[(&[u8], &str)] = &[
        (b"{\"user\": \"a\xff\"}", "not UTF-8 at byte 11"),
        (
            b"{\"user\": \"a\", \"train\": [\"secret\"",
            "not JSON: EOF while parsing a list at line 1 column 32",
        ),
        (b"[1]", "expected an object with \"user\" and \"train\" or \"text\""),
        (b"{\"train\": [\"x\"]}", "key \"user\" is missing"),
        (b"{\"user\": 7, \"train\": [\"x\"]}", "key \"user\" must be a string"),
        (b"{\"user\": \" \", \"train\": [\"x\"]}", "user name is blank or holds control characters"),
        (b"{\"user\": \"a\\nb\", \"train\": [\"x\"]}", "user name is blank or holds control characters"),
        (b"{\"user\": \"a\"}", "key \"train\" is missing"),
        (b"{\"user\": \"a\", \"train\": \"x\"}", "key \"train\" must be a list of strings"),
        (b"{\"user\": \"a\", \"train\": [\"x\", 1]}", "key \"train\" must be a list of strings"),
        (b"{\"user\": \"a\", \"train\": [\"x\"], \"val\": {}}", "key \"val\" must be a list of strings"),
        (b"{\"user\": \"a\", \"train\": [\"x\"], \"test\": null}", "key \"test\" must be a list of strings"),
        (b"{\"user\": \"a\", \"text\": 3}", "key \"text\" must be a string or a list of strings"),
        (b"{\"user\": \"a\", \"text\": [\"x\", null]}", "key \"text\" must be a string or a list of strings"),
        (
            b"{\"user\": \"a\", \"text\": \"x\", \"test\": []}",
            "\"text\" stands beside \"train\", \"val\" or \"test\": give one form",
        ),
        (
            b"{\"user\": \"a\", \"train\": [\"x\"], \"group\": \"both\"}",
            "key \"group\" must be \"train\" or \"heldout\"",
        ),
        (
            b"{\"user\": \"a\", \"train\": [\"x\"], \"group\": 1}",
            "key \"group\" must be \"train\" or \"heldout\"",
        ),
        (b"{\"user\": \"a\", \"train\": []}", "user \"a\" has no text to use"),
        (b"{\"user\": \"a\", \"train\": [\" \"], \"test\": [\"x\"]}", "user \"a\" has no text to use"),
        (b"{\"user\": \"a\", \"text\": \"\\n\\n\"}", "user \"a\" has no text to use"),
        (b"{\"user\": \"a\", \"group\": \"heldout\"}", "user \"a\" has no text to use"),
        (b"{\"user\": \"bob\", \"train\": [\"x\"]}", "user \"bob\" was already given at fleet.jsonl:2"),
    ];
    for (line, reason) in cases {
        let bytes = [TWO_USERS.as_bytes(), line, b"\n"].concat();
        let error = Dataset::from_jsonl_bytes("fleet.jsonl", &bytes).expect_err(reason);
        assert_eq!(only_reason(error, "fleet.jsonl", 3), *reason);
    }
}

#[test]
fn all_bad_lines_are_told_up_to_the_bound() {
    let three = load(&format!("7\n{TWO_USERS}\n\nnull\n{{\n")).expect_err("bad lines").to_string();
    assert_eq!(three.lines().next(), Some("3 bad lines"));
    let numbers: Vec<&str> = three.lines().skip(1).filter_map(|line| line.trim().split(':').nth(1)).collect();
    assert_eq!(numbers, ["1", "6", "7"]);
    let many = load(&"7\n".repeat(100)).expect_err("bad lines");
    assert!(matches!(&many, DataError::Lines { lines, complete: false } if lines.len() == 20), "{many}");
    assert!(many.to_string().starts_with("20 bad lines, and perhaps more\n  fleet.jsonl:1: expected"));
}

#[test]
fn errors_never_quote_the_text() {
    let lines = [
        r#"{"user": "a", "train": ["secret", {"secret": 1}]}"#,
        r#"{"user": "a", "text": {"secret": "secret"}}"#,
        r#"secret"#,
    ];
    for line in lines {
        assert!(!load(line).expect_err("bad").to_string().contains("secret"), "{line}");
    }
}

#[test]
fn bounds_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("fleet.jsonl");
    fs::write(&path, TWO_USERS).expect("written");
    let limits = DataLimits::default();
    let cases = [
        ("file_bytes_max = 50", DataLimits { file_bytes_max: 50, ..limits }),
        ("line_bytes_max = 80", DataLimits { line_bytes_max: 80, ..limits }),
        ("users_max = 1", DataLimits { users_max: 1, ..limits }),
        ("texts_max = 3", DataLimits { texts_max: 3, ..limits }),
        ("user_name_bytes_max = 2", DataLimits { user_name_bytes_max: 2, ..limits }),
    ];
    for (name, limits) in cases {
        let message = Dataset::load_within(&path, &limits).expect_err(name).to_string();
        assert!(message.contains(name), "{message}");
    }
    fs::write(&path, gzip(&[b' '; 5000])).expect("written");
    let bomb = Dataset::load_within(&path, &DataLimits { file_bytes_max: 1000, ..limits }).expect_err("bomb");
    assert!(matches!(bomb, DataError::Limit { limit: "file_bytes_max", max: 1000, .. }), "{bomb}");
}

#[test]
fn ignored_names_are_bounded() {
    let keys: Vec<String> = (0..100).map(|number| format!("\"k{number}\": 1")).collect();
    let data = load(&format!("{{\"user\": \"a\", \"train\": [\"x\"], {}}}", keys.join(","))).expect("valid");
    assert_eq!(data.ignored.len(), 32);
}

#[test]
fn files_that_are_no_data_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    assert!(matches!(Dataset::load(&path("none.jsonl")), Err(DataError::Read { .. })));
    fs::write(path("fleet.csv"), "a,b").expect("written");
    let message = Dataset::load(&path("fleet.csv")).expect_err("csv").to_string();
    assert!(message.ends_with("fleet.csv must end in one of .jsonl, .jsonl.gz"), "{message}");
    fs::write(path("empty.jsonl"), "\n\n").expect("written");
    assert!(matches!(Dataset::load(&path("empty.jsonl")), Err(DataError::Empty { .. })));
    let mut cut = gzip(TWO_USERS.as_bytes());
    cut.truncate(cut.len() / 2);
    fs::write(path("cut.jsonl.gz"), cut).expect("written");
    assert!(matches!(Dataset::load(&path("cut.jsonl.gz")), Err(DataError::Read { .. })));
}

#[test]
fn a_folder_holds_one_file_a_user() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
    write("zoe.txt", "\u{feff}first\r\nline\r\n\r\nsecond\n\n\nthird\n");
    write("ann.jsonl", "\"one\"\n{\"text\": \"two\", \"at\": 5}\n");
    write("notes.md", "not a user");
    write(".hidden", "nor this");
    let data = Dataset::load(folder.path()).expect("valid");
    let [ann, zoe] = data.users.as_slice() else { panic!("two users") };
    assert!(ann.user == "ann" && ann.texts().eq(["one", "two"]));
    assert!(zoe.user == "zoe" && zoe.texts().eq(["first\nline", "second", "third"]));
    assert_eq!(data.ignored, ["file \"notes.md\"", "key \"at\""]);
}

#[test]
fn a_folder_reports_bad_files_together() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).expect("written");
    write("ann.jsonl", b"\"one\"\n7\n");
    write("ann.txt", b"the same name");
    write("bob.txt", b"good line\nbad \xff line\n");
    write("cid.txt", b" \n\n");
    let DataError::Lines { lines, complete: true } = Dataset::load(folder.path()).expect_err("bad files")
    else {
        panic!("not bad lines")
    };
    let told: Vec<String> = lines.iter().map(|bad| format!("{}: {}", bad.line, bad.reason)).collect();
    assert_eq!(told[0], "2: expected a string or an object with \"text\"");
    assert!(told[1].starts_with("1: user \"ann\" was already given at "), "{}", told[1]);
    assert_eq!(told[2..], ["2: not UTF-8 at byte 4", "1: user \"cid\" has no text to use"]);
    let empty = tempfile::tempdir().expect("a temporary folder");
    assert!(matches!(Dataset::load(empty.path()), Err(DataError::Empty { .. })));
}

#[test]
fn a_device_reads_texts_or_its_own_record() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let load = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("written");
        load_device(&path)
    };
    let record = TWO_USERS.lines().next().expect("a line");
    assert_eq!(load("a.jsonl", record.as_bytes()).expect("valid").user, "ann");
    assert_eq!(load("a.jsonl.gz", &gzip(record.as_bytes())).expect("valid").val, ["three"]);
    assert!(load("me.txt", b"one\n\ntwo").expect("valid").texts().eq(["one", "two"]));
    assert!(load("me.jsonl", b"\"one\"\n\"two\"").expect("valid").texts().eq(["one", "two"]));
    let two = load("b.jsonl", TWO_USERS.as_bytes()).expect_err("two users").to_string();
    assert!(two.contains("users_max = 1"), "{two}");
    let blank = load("blank.txt", b"\n").expect_err("no text");
    assert_eq!(
        only_reason(blank, &folder.path().join("blank.txt").display().to_string(), 1),
        "user \"blank\" has no text to use"
    );
    assert!(matches!(load("me.csv", b"x"), Err(DataError::Format { .. })));
}

#[test]
fn the_shipped_roles_load() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sim/data/shakespeare_roles_cap400.jsonl.gz");
    let data = Dataset::load(&path).expect("the shipped data is valid");
    assert_eq!((data.users.len(), data.group(Group::HeldOut).count()), (557, 50));
    let texts = |pick: fn(&UserData) -> usize| data.users.iter().map(pick).sum::<usize>();
    assert_eq!(
        (texts(|user| user.train.len()), texts(|user| user.val.len()), texts(|user| user.test.len())),
        (22_040, 2_755, 3_023)
    );
    assert_eq!(data.ignored, ["key \"n_words\""]);
}
