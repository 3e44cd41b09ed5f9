//! A whole pretraining run on a few lines of text.

use serde_json::Value;
use tempfile::TempDir;

use super::*;

const LINES: &str = "The wind is in the north and the ships are in the bay.\nWhat news from the ships, and what news from the bay?";

fn arguments(folder: &TempDir) -> PretrainArgs {
    let text = |name: &str, count: usize| {
        let path = folder.path().join(name);
        fs::write(&path, vec![LINES; count].join("\n\n")).expect("written");
        path
    };
    PretrainArgs {
        corpus: vec![text("train.txt", 40)],
        validation: text("validation.txt", 4),
        probe: None,
        vocab: 280,
        hidden: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        feed_forward: 64,
        steps: 30,
        batch: 4,
        block: 16,
        learning_rate: 1e-2,
        warmup: 5,
        weight_decay: 0.1,
        seed: 3,
        threads: 2,
        eval_every: 15,
        name: "tiny".to_owned(),
        licence: "CC0-1.0".to_owned(),
        file_bytes_max: 100_000,
        out: folder.path().join("tiny.gguf"),
    }
}

#[test]
fn a_model_and_its_record_come_out_and_repeat() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut args = arguments(&folder);
    let line = r#"{"user": "ann", "text": ["The bay", "news of the bay", "what ships"]}"#;
    let users = folder.path().join("users.jsonl");
    fs::write(&users, format!("{line}\n{}\n", line.replace("\"ann\"", "\"bob\", \"group\": \"heldout\"")))
        .expect("written");
    args.probe = Some(users);
    run(&args).expect("a run");

    let model = BaseModel::open(&args.out).expect("a model file");
    assert_eq!((model.config.name.as_str(), model.config.context_length), ("tiny", 16));
    let record: Value =
        serde_json::from_slice(&fs::read(record_path(&args.out)).expect("a record")).expect("JSON");
    assert_eq!(record["file_sha256"], hex::encode(model.sha256));
    assert_eq!(record["recipe"]["corpus"][0][0], "train.txt");
    let nll = |point: &Value| point["validation_nll"].as_f64().expect("a number");
    let curve = record["curve"].as_array().expect("a curve");
    assert!(curve.len() == 2 && nll(&curve[1]) < nll(&curve[0]) && nll(&curve[0]) < 5.6, "{curve:?}");
    assert!(record["probe"]["heldout"]["tokens"].as_u64() > record["probe"]["seen"]["tokens"].as_u64());

    let again = PretrainArgs { out: folder.path().join("again.gguf"), ..args.clone() };
    run(&again).expect("a run");
    assert_eq!(fs::read(&again.out).expect("a file"), fs::read(&args.out).expect("a file"));
}

#[test]
fn what_cannot_end_well_does_not_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    type Spoil = fn(&mut PretrainArgs);
    let cases: [(&str, Spoil); 5] = [
        ("file_bytes_max = 5000", |args| args.file_bytes_max = 5000),
        ("hidden must be a multiple of heads", |args| args.heads = 3),
        ("of 4000 tokens", |args| args.vocab = 4000),
        ("too few for blocks", |args| args.block = 100_000),
        ("cannot read corpus", |args| args.validation = "none.txt".into()),
    ];
    for (reason, spoil) in cases {
        let mut args = arguments(&folder);
        spoil(&mut args);
        let message = format!("{:#}", run(&args).expect_err(reason));
        assert!(message.contains(reason), "{message}");
        assert!(!args.out.exists(), "{reason}");
    }
}
