//! The tiny BERT of `data/reference/` and what tests make with it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use super::checkpoint::Classifier;
use super::config::{Activation, EncoderConfig, EncoderProjection, Pooling};
use super::layout::{ClassifierConfig, ClassifierLayout, EncoderLora};
use super::model::EncoderModel;
use super::tokenizer::{WordPieceSettings, WordPieceTokenizer};
use super::trainer::Example;

const FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../data/reference/tiny_bert/config.json")),
    ("model.safetensors", include_bytes!("../../data/reference/tiny_bert/model.safetensors")),
    ("tokenizer_config.json", include_bytes!("../../data/reference/tiny_bert/tokenizer_config.json")),
    ("vocab.txt", include_bytes!("../../data/reference/tiny_bert/vocab.txt")),
];

/// The tiny model's sizes.
pub(super) fn tiny_config() -> EncoderConfig {
    EncoderConfig {
        name: "tiny".to_owned(),
        vocab_size: 160,
        hidden: 32,
        layers: 2,
        feed_forward: 64,
        heads: 4,
        positions: 64,
        token_types: 2,
        norm_eps: 1e-12,
        activation: Activation::Gelu,
        pooling: Pooling::Mean,
    }
}

/// The tiny model's tokenizer.
pub(super) fn tiny_tokenizer() -> WordPieceTokenizer {
    WordPieceTokenizer::from_vocabulary_text(FILES[3].1, WordPieceSettings::default()).unwrap()
}

/// The tiny model's folder, to be spoilt.
pub(super) fn tiny_folder() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("tiny");
    fs::create_dir(&path).unwrap();
    FILES.iter().for_each(|(name, bytes)| fs::write(path.join(name), bytes).unwrap());
    (home, path)
}

/// The tiny model.
pub(super) fn tiny_model() -> EncoderModel {
    let (_home, path) = tiny_folder();
    EncoderModel::open(&path).unwrap()
}

/// Three classes, rank 3.
pub(super) fn classifier_config(targets: &[EncoderProjection], freeze_a: bool) -> ClassifierConfig {
    ClassifierConfig {
        labels: ["hamlet", "macbeth", "othello"].map(str::to_owned).to_vec(),
        pooling: Pooling::Mean,
        lora: Some(EncoderLora { rank: 3, alpha: 6.0, targets: targets.to_vec(), freeze_a }),
        init_seed: 7,
    }
}

/// A classifier in which every value differs.
pub(super) fn counted(model: &EncoderModel, config: &ClassifierConfig) -> Classifier {
    let layout = Arc::new(ClassifierLayout::new(model.config(), config).unwrap());
    let values = (0..layout.len()).map(|i| (i as f32 + 1.0) / 1024.0).collect();
    Classifier::new(model, layout, values, 48).unwrap()
}

/// Texts whose class shows in a word, for three classes.
pub(super) fn tiny_examples() -> Vec<Example> {
    const PLACES: [&str; 6] =
        ["upon the", "my lord,", "well, sir,", "now come to the", "let us know,", "it is"];
    const SIGNS: [&str; 3] = ["king", "thee love", "father?"];
    let tokenizer = tiny_tokenizer();
    let example = |i: usize| {
        let text = format!("{} {} {}", PLACES[i % 6], SIGNS[i % 3], PLACES[(i / 3 + 1) % 6]);
        Example { ids: tokenizer.encode(&text, 24), class: i % 3 }
    };
    (0..36).map(example).collect()
}
