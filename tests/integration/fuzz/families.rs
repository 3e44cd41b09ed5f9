//! The readers of what came after Llama and adapters: models of other families, SentencePiece vocabularies, encoders,
//! and checkpoints of whole models.

use std::sync::LazyLock;

use fleetune_model::base::{BaseModel, LayerExtras, ModelParts};
use fleetune_model::encoder::{
    Activation, EncoderConfig, EncoderLayer, EncoderModel, EncoderParts, EncoderProjection, LayerNormWeights,
    LinearWeights, Pooling, WordPieceSettings, WordPieceTokenizer,
};
use fleetune_model::family::{Extra, Family, Gemma3};
use fleetune_model::gguf::{Metadata, MetadataArray, MetadataValue};
use fleetune_model::trained::{TrainedConfig, TrainedLayout};
use fleetune_model::weights::{WeightFormat, WeightMatrix};

use super::Target;
use super::models::{BASE, read_model, values};

pub(super) const TARGETS: [Target; 5] = [
    ("gguf_qwen2", gguf_again),
    ("gguf_gemma3", gguf_again),
    ("sentence_piece", sentence_piece),
    ("gguf_bert", gguf_bert),
    ("full_checkpoint", full_checkpoint),
];

static FULL: LazyLock<TrainedLayout> =
    LazyLock::new(|| TrainedLayout::new(&BASE, &TrainedConfig::Full).expect("a small tied model"));

/// One real value a target.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let gemma = of_family(Family::Gemma3(Gemma3 {
        attention_scale: 0.5,
        window: 4,
        period: 2,
        local_rope_base: 100.0,
        rope_factor: 2.0,
    }));
    vec![
        ("gguf_qwen2", of_family(Family::Qwen2).to_gguf_bytes(&Metadata::default())),
        ("gguf_gemma3", gemma.to_gguf_bytes(&Metadata::default())),
        ("sentence_piece", gemma.to_gguf_bytes(&pieces())),
        ("gguf_bert", encoder_bytes(&encoder())),
        ("full_checkpoint", FULL.to_checkpoint_bytes(&FULL.initial_values(&BASE))),
    ]
}

/// Else the mutants would never come past the first check.
#[test]
fn every_seed_of_a_family_is_read() {
    for (name, seed) in seeds() {
        let read = match name {
            "gguf_qwen2" | "gguf_gemma3" | "sentence_piece" => read_model(&seed).is_some(),
            "gguf_bert" => read_encoder(&seed).is_some(),
            "full_checkpoint" => FULL.values_from_checkpoint(&seed).is_ok(),
            other => panic!("no reader for {other}"),
        };
        assert!(read, "{name}");
    }
}

fn gguf_again(input: &[u8]) {
    let Some(model) = read_model(input) else { return };
    let bytes = model.to_gguf_bytes(&Metadata::default());
    let again = read_model(&bytes).expect("what was read can be written");
    assert_eq!(again.to_gguf_bytes(&Metadata::default()), bytes);
}

fn sentence_piece(input: &[u8]) {
    let Some(model) = read_model(input) else { return };
    let ids = model.tokenizer.encode("ab abba <s> é", true);
    assert!(ids.iter().all(|id| (*id as usize) < model.config.vocab_size));
    let _ = model.tokenizer.decode(&ids);
}

fn gguf_bert(input: &[u8]) {
    let Some(model) = read_encoder(input) else { return };
    let again = read_encoder(&encoder_bytes(&model)).expect("what was read can be written");
    assert_eq!(again.config(), model.config());
    let _ = model.tokenizer().encode("the boat", 4);
}

fn full_checkpoint(input: &[u8]) {
    let Ok(values) = FULL.values_from_checkpoint(input) else { return };
    let again = FULL.values_from_checkpoint(&FULL.to_checkpoint_bytes(&values));
    assert_eq!(again.expect("what was read can be written"), values);
}

fn read_encoder(input: &[u8]) -> Option<EncoderModel> {
    EncoderModel::from_gguf_bytes(input.to_vec()).ok()
}

fn encoder_bytes(model: &EncoderModel) -> Vec<u8> {
    let mut bytes = Vec::new();
    model.write_gguf(&Metadata::default(), &mut bytes).expect("memory takes all");
    bytes
}

/// The tiny model with that family's vectors.
fn of_family(family: Family) -> BaseModel {
    let BaseModel { config, tokenizer, token_embedding, layers, output_norm, output, chat_template, .. } =
        BASE.clone();
    let config = fleetune_model::config::ModelConfig { family, ..config };
    let extra = |extra: Extra| values(extra.len(&config).unwrap_or(0), 20 + extra as usize);
    let extras = LayerExtras(Extra::ALL.map(extra));
    let layers = layers.into_iter().map(|layer| {
        let mut layer = layer;
        layer.extras = extras.clone();
        layer
    });
    BaseModel::from_parts(ModelParts {
        layers: layers.collect(),
        config,
        tokenizer,
        token_embedding,
        output_norm,
        output,
        chat_template,
    })
    .expect("a sound model")
}

/// A SentencePiece vocabulary as long as the tiny model's.
fn pieces() -> Metadata {
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let named = |names: [&str; 3]| names.map(str::to_owned).into_iter();
    let words = ["\u{2581}", "a", "b", "ab", "\u{2581}ab"].map(str::to_owned);
    let tokens: Vec<String> = named(["<unk>", "<s>", "</s>"]).chain(bytes).chain(words).collect();
    assert_eq!(tokens.len(), BASE.config.vocab_size);
    let kind = |id: usize| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    };
    let kinds = (0..tokens.len()).map(kind).collect();
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let mut metadata = Metadata::default();
    metadata.set("tokenizer.ggml.model", MetadataValue::String("llama".into()));
    metadata.set("tokenizer.ggml.pre", MetadataValue::String("default".into()));
    metadata.set("tokenizer.ggml.tokens", MetadataValue::Array(MetadataArray::String(tokens)));
    metadata.set("tokenizer.ggml.scores", MetadataValue::Array(MetadataArray::F32(scores)));
    metadata.set("tokenizer.ggml.token_type", MetadataValue::Array(MetadataArray::I32(kinds)));
    metadata.set("tokenizer.ggml.merges", MetadataValue::Array(MetadataArray::String(Vec::new())));
    metadata
}

fn encoder() -> EncoderModel {
    let words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "boat", "##s"];
    let tokenizer = WordPieceTokenizer::new(words.map(str::to_owned).to_vec(), WordPieceSettings::default())
        .expect("words");
    let config = EncoderConfig {
        name: "tiny".into(),
        vocab_size: words.len(),
        hidden: 4,
        layers: 1,
        feed_forward: 6,
        heads: 2,
        positions: 8,
        token_types: 2,
        norm_eps: 1e-12,
        activation: Activation::Gelu,
        pooling: Pooling::Mean,
    };
    let matrix = |(rows, cols): (usize, usize), salt| {
        WeightMatrix::from_f32(&values(rows * cols, salt), rows, cols, WeightFormat::F16).expect("a matrix")
    };
    let norm =
        |salt| LayerNormWeights { gain: values(config.hidden, salt), bias: values(config.hidden, salt + 1) };
    let linear = |p: EncoderProjection| LinearWeights {
        weight: matrix(p.shape(&config), p as usize),
        bias: values(p.shape(&config).0, 30 + p as usize),
    };
    let layer = EncoderLayer {
        projections: EncoderProjection::ALL.map(linear),
        attention_norm: norm(40),
        output_norm: norm(42),
    };
    EncoderModel::from_parts(EncoderParts {
        token_embedding: matrix((config.vocab_size, config.hidden), 50),
        position_embedding: matrix((config.positions, config.hidden), 51),
        token_types: matrix((config.token_types, config.hidden), 52),
        embedding_norm: norm(44),
        layers: vec![layer],
        pooler: None,
        tokenizer,
        config,
    })
    .expect("a sound encoder")
}
