//! The commands one after another on the tiny BERT, and MiniLM on Shakespeare where it is there.

use super::*;
use flate2::read::GzDecoder;
use std::{env, io::Read};
use tempfile::TempDir;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/data/reference/tiny_bert");
const SPEECHES: &[u8] = include_bytes!("../../data/shakespeare_roles_cap400.jsonl.gz");

fn train_args(model: &Path, folder: &TempDir) -> TrainArgs {
    TrainArgs {
        model: model.to_owned(),
        data: folder.path().join("train.jsonl"),
        eval: Some(folder.path().join("test.jsonl")),
        out: folder.path().join("classifier.safetensors"),
        targets: vec!["query".to_owned(), "value".to_owned()],
        rank: 4,
        alpha: 8.0,
        freeze_a: false,
        pooling: None,
        length_max: 32,
        epochs: 2,
        batch: 16,
        learning_rate: 5e-3,
        seed: 3,
        precision: "f32".to_owned(),
        json: false,
    }
}

/// Speeches of the two plays with the play as label: so many of each to train on and to test on, spread over
/// the roles.
fn write_plays(folder: &TempDir, trained: usize, tested: usize) {
    let mut text = String::new();
    GzDecoder::new(SPEECHES).read_to_string(&mut text).expect("the speeches");
    let users: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a user")).collect();
    for (file, split, count) in [("train.jsonl", "train", trained), ("test.jsonl", "test", tested)] {
        let mut lines = Vec::new();
        for play in PLAYS {
            let of_play =
                |user: &&serde_json::Value| user["user"].as_str().is_some_and(|u| u.starts_with(play));
            let speeches = users.iter().filter(of_play).filter_map(|user| user[split].as_array()).flatten();
            let speeches = speeches.filter_map(serde_json::Value::as_str);
            let long: Vec<&str> = speeches.filter(|text| text.split_whitespace().count() >= 8).collect();
            let spread = long.iter().step_by(long.len() / count).take(count);
            lines.extend(
                spread.map(|text| serde_json::json!({"text": text, "label": play}).to_string() + "\n"),
            );
        }
        assert_eq!(lines.len(), 2 * count);
        fs::write(folder.path().join(file), lines.concat()).expect("a file of lines");
    }
}

const PLAYS: [&str; 2] = ["othello", "the-merry-wives-of-windsor"];

fn named(folder: &TempDir, classifier: &str) -> ClassifierArgs {
    ClassifierArgs { model: TINY.into(), classifier: folder.path().join(classifier) }
}

#[test]
fn commands_follow_one_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let lines: String = (0..40)
        .map(|i| {
            format!("{{\"text\": \"my lord {} is here\", \"label\": {}}}\n", ["king", "father"][i % 2], i % 2)
        })
        .collect();
    fs::write(folder.path().join("train.jsonl"), &lines).expect("lines");
    fs::write(folder.path().join("test.jsonl"), &lines).expect("lines");
    let args = train_args(Path::new(TINY), &folder);
    let args = TrainArgs { epochs: 30, ..args };
    train(&args).expect("a training");
    let refused = format!("{:#}", train(&args).expect_err("a refusal"));
    assert!(refused.contains("is there already"), "{refused}");
    let export_args =
        ExportArgs { with: named(&folder, "classifier.safetensors"), out: folder.path().join("peft") };
    export(&export_args).expect("an export");
    let of = |classifier: &str| {
        let (model, classifier) = open(&named(&folder, classifier)).expect("a classifier");
        let data = folder.path().join("test.jsonl");
        let labels = &classifier.layout.config().labels;
        let examples =
            examples(&model, &read_lines(&data).expect("lines"), &data, labels, 32).expect("examples");
        let trainer =
            ClassifierTrainer::new(model, Arc::clone(&classifier.layout), Precision::F32).expect("a trainer");
        score(&trainer, &classifier.values, &examples).expect("a score")
    };
    let score = of("classifier.safetensors");
    assert_eq!(score, of("peft"));
    assert_eq!((score.lines, score.majority), (40, 0.5));
    assert!(score.accuracy > 0.9, "{score:?}");
    predict(&PredictArgs { with: named(&folder, "peft"), data: Some(args.data) }).expect("predictions");
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("a file");
    file("train.jsonl", "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\", \"label\": \"y\"}\n");
    file("test.jsonl", "{\"text\": \"a\", \"label\": \"z\"}\n");
    let check = |change: &dyn Fn(&mut TrainArgs), expected: &str| {
        let mut args = train_args(Path::new(TINY), &folder);
        change(&mut args);
        let error = format!("{:#}", train(&args).expect_err("a refusal"));
        assert!(error.contains(expected), "{error}");
    };
    check(&|_| (), "test.jsonl:1: label \"z\"");
    file("test.jsonl", "{\"text\": \"a\"}\n");
    check(&|_| (), "test.jsonl:1: no label");
    file("test.jsonl", "{\"text\": \"a\", \"label\": \"y\"}\n");
    check(&|args| args.targets = vec!["q".to_owned()], "--targets");
    check(&|args| args.length_max = 65, "--length-max");
    check(&|args| args.pooling = Some("max".to_owned()), "--pooling");
    check(&|args| args.precision = "f8".to_owned(), "--precision");
    check(&|args| args.batch = 0, "--batch");
    check(&|args| args.epochs = 0, "steps");
    check(&|args| args.model = folder.path().join("none"), "none");
    file("train.jsonl", "{\"text\": \"a\", \"label\": \"x\"}\nx\n");
    check(&|_| (), "train.jsonl:2");
}

/// MiniLM's folder, if it is there; the same places as in the model's own tests.
fn minilm() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cache"));
    let cache = || env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let named = env::var_os("FLEETUNE_MINILM").map(PathBuf::from);
    let path = named.or_else(|| Some(cache()?.join("fleetune").join("all-MiniLM-L6-v2")))?;
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is not there (set FLEETUNE_MINILM)", path.display());
    None
}

#[test]
fn minilm_tells_two_plays_apart() {
    let Some(path) = minilm() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    write_plays(&folder, 120, 60);
    let args = train_args(&path, &folder);
    train(&args).expect("a training");
    let with = ClassifierArgs { model: path, classifier: args.out };
    let (model, classifier) = open(&with).expect("a classifier");
    let data = folder.path().join("test.jsonl");
    let labels = &classifier.layout.config().labels;
    let examples = examples(&model, &read_lines(&data).expect("lines"), &data, labels, 32).expect("examples");
    let trainer =
        ClassifierTrainer::new(model, Arc::clone(&classifier.layout), Precision::F32).expect("a trainer");
    let score = score(&trainer, &classifier.values, &examples).expect("a score");
    assert!(score.accuracy > score.majority + 0.1, "{score:?}");
}
