//! The readers of model and adapter files: GGUF, safetensors in PEFT's and Hugging Face's folders, checkpoints,
//! tokenizer.json. What is read must come back the same once it is written.

use std::fs;
use std::sync::{Arc, LazyLock};

use fleetune_model::adapter::{Adapter, AdapterLayout, LoraConfig};
use fleetune_model::adapter_formats::{PeftFiles, from_gguf_lora, from_peft, to_gguf_lora, to_peft};
use fleetune_model::base::{BaseModel, LayerExtras, LayerWeights, ModelParts};
use fleetune_model::config::{ModelConfig, Projection};
use fleetune_model::family::Family;
use fleetune_model::gguf::{Metadata, MetadataArray, MetadataValue};
use fleetune_model::tokenizer::{SpecialTokens, TokenRoles, Tokenizer, train_bpe};
use fleetune_model::weights::{WeightFormat, WeightMatrix};
use serde_json::json;

use super::Target;

pub(super) const TARGETS: [Target; 6] = [
    ("gguf_model", gguf_model),
    ("gguf_lora", gguf_lora),
    ("peft", peft),
    ("checkpoint", checkpoint),
    ("hugging_face", hugging_face),
    ("tokenizer_json", tokenizer_json),
];

pub(super) static BASE: LazyLock<BaseModel> = LazyLock::new(base);
static ADAPTER: LazyLock<Adapter> = LazyLock::new(adapter);

/// One real value a target.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let peft = to_peft(&ADAPTER, &BASE.config, "tiny");
    vec![
        ("gguf_model", BASE.to_gguf_bytes(&Metadata::default())),
        ("gguf_lora", to_gguf_lora(&ADAPTER, &BASE, WeightFormat::F16, &every_kind()).expect("an adapter")),
        ("peft", framed(&peft.config, &peft.weights)),
        ("checkpoint", ADAPTER.to_checkpoint_bytes()),
        ("hugging_face", framed(settings().to_string().as_bytes(), &folder_weights())),
        ("tokenizer_json", tokenizer_settings().into_bytes()),
    ]
}

/// Else the mutants would never come past the first check.
#[test]
fn every_seed_is_read() {
    for (name, seed) in seeds() {
        let read = match name {
            "gguf_model" => read_model(&seed).is_some(),
            "gguf_lora" => read_lora(&seed).is_some(),
            "peft" => read_peft(&seed).is_some(),
            "checkpoint" => read_checkpoint(&seed).is_some(),
            "hugging_face" => read_folder(&seed).is_some(),
            "tokenizer_json" => read_tokenizer(&seed).is_some(),
            other => panic!("no reader for {other}"),
        };
        assert!(read, "{name}");
    }
}

fn gguf_model(input: &[u8]) {
    let Some(model) = read_model(input) else { return };
    let bytes = model.to_gguf_bytes(&Metadata::default());
    let again = read_model(&bytes).expect("what was read can be written");
    assert_eq!(again.to_gguf_bytes(&Metadata::default()), bytes);
}

fn gguf_lora(input: &[u8]) {
    let Some(adapter) = read_lora(input) else { return };
    let bytes =
        to_gguf_lora(&adapter, &BASE, WeightFormat::F32, &Metadata::default()).expect("F32 holds all");
    assert_same(&adapter, &read_lora(&bytes).expect("what was read can be written"));
}

fn peft(input: &[u8]) {
    let Some(adapter) = read_peft(input) else { return };
    let files = to_peft(&adapter, &BASE.config, "tiny");
    let again = read_peft(&framed(&files.config, &files.weights));
    assert_same(&adapter, &again.expect("what was read can be written"));
}

fn checkpoint(input: &[u8]) {
    let Some(adapter) = read_checkpoint(input) else { return };
    let again = read_checkpoint(&adapter.to_checkpoint_bytes());
    assert_same(&adapter, &again.expect("what was read can be written"));
}

fn hugging_face(input: &[u8]) {
    let Some(model) = read_folder(input) else { return };
    let again = read_model(&model.to_gguf_bytes(&Metadata::default()));
    assert_eq!(again.expect("what was read can be written").sha256, model.sha256);
}

fn tokenizer_json(input: &[u8]) {
    let Some(tokenizer) = read_tokenizer(input) else { return };
    let mut metadata = Metadata::default();
    tokenizer.write_gguf(&mut metadata);
    if let Ok(again) = Tokenizer::from_gguf(&metadata) {
        assert_eq!(again.vocabulary(), tokenizer.vocabulary());
    }
    let _ = tokenizer.decode(&tokenizer.encode("the boat <|im_start|> 12 é", true));
}

pub(super) fn read_model(input: &[u8]) -> Option<BaseModel> {
    BaseModel::from_gguf_bytes(input.to_vec()).ok()
}

fn read_lora(input: &[u8]) -> Option<Adapter> {
    from_gguf_lora(input, &BASE).ok()
}

fn read_peft(input: &[u8]) -> Option<Adapter> {
    let (config, weights) = unframed(input)?;
    let files = PeftFiles { config: config.to_vec(), weights: weights.to_vec() };
    from_peft(&files, &BASE.config).ok()
}

fn read_checkpoint(input: &[u8]) -> Option<Adapter> {
    Adapter::from_checkpoint_bytes(Arc::clone(&ADAPTER.layout), input).ok()
}

fn read_folder(input: &[u8]) -> Option<BaseModel> {
    let (config, weights) = unframed(input)?;
    let home = tempfile::tempdir().expect("a folder");
    let put = |name: &str, bytes: &[u8]| fs::write(home.path().join(name), bytes).expect("a file");
    put("config.json", config);
    put("tokenizer.json", tokenizer_settings().as_bytes());
    put("model.safetensors", weights);
    BaseModel::open(home.path()).ok()
}

fn read_tokenizer(input: &[u8]) -> Option<Tokenizer> {
    Tokenizer::from_json(input, &TokenRoles::default()).ok()
}

fn assert_same(adapter: &Adapter, again: &Adapter) {
    assert_eq!(again.values, adapter.values);
    assert_eq!(again.layout.sha256(), adapter.layout.sha256());
}

/// Two files in one input: the length of the first in two bytes, then both.
fn framed(first: &[u8], second: &[u8]) -> Vec<u8> {
    let length = u16::try_from(first.len()).expect("a small file").to_le_bytes();
    [&length, first, second].concat()
}

fn unframed(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = input.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

/// Exact fractions, so that the corpus is the same on every machine.
pub(super) fn values(count: usize, salt: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + salt * 11) % 61) as f32 / 64.0 - 0.5).collect()
}

fn tokenizer() -> Tokenizer {
    let texts = (0..8).map(|_| "the theatre of the weather, then there".to_owned());
    train_bpe(texts, 264, &SpecialTokens::default()).expect("a tokenizer")
}

/// So small that most of the file is what can go wrong.
fn base() -> BaseModel {
    let tokenizer = tokenizer();
    let config = ModelConfig {
        name: "tiny".into(),
        family: Family::Llama,
        vocab_size: tokenizer.vocab_size(),
        hidden: 4,
        layers: 1,
        feed_forward: 6,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        context_length: 64,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    };
    let matrix = |(rows, cols): (usize, usize), salt| {
        WeightMatrix::from_f32(&values(rows * cols, salt), rows, cols, WeightFormat::F16).expect("a matrix")
    };
    let layer = LayerWeights {
        attn_norm: values(config.hidden, 1),
        ffn_norm: values(config.hidden, 2),
        extras: LayerExtras::default(),
        projections: Projection::ALL.map(|projection| matrix(projection.shape(&config), projection as usize)),
    };
    BaseModel::from_parts(ModelParts {
        token_embedding: matrix((config.vocab_size, config.hidden), 9),
        layers: vec![layer],
        output_norm: values(config.hidden, 3),
        output: None,
        chat_template: Some("{{ messages }}".into()),
        tokenizer,
        config,
    })
    .expect("a sound model")
}

fn adapter() -> Adapter {
    let targets = vec![Projection::Q, Projection::V, Projection::Down];
    let config = LoraConfig { rank: 2, alpha: 4.0, targets, freeze_a: false, init_seed: 1 };
    let layout = Arc::new(AdapterLayout::new(&BASE.config, &config).expect("a sound layout"));
    let values = values(layout.len(), 5);
    Adapter::new(layout, values).expect("as long as its layout")
}

/// Metadata of every type.
fn every_kind() -> Metadata {
    let arrays = [
        MetadataArray::U8(vec![1, 255]),
        MetadataArray::I8(vec![-1]),
        MetadataArray::U16(vec![65_535]),
        MetadataArray::I16(vec![-2]),
        MetadataArray::U32(vec![]),
        MetadataArray::I32(vec![-3, 4]),
        MetadataArray::F32(vec![0.5]),
        MetadataArray::Bool(vec![true, false]),
        MetadataArray::String(vec!["ä".into(), String::new()]),
        MetadataArray::U64(vec![u64::MAX]),
        MetadataArray::I64(vec![i64::MIN]),
        MetadataArray::F64(vec![1e300]),
    ];
    let mut values: Vec<MetadataValue> = arrays.into_iter().map(MetadataValue::Array).collect();
    values.extend([
        MetadataValue::U8(1),
        MetadataValue::I8(-1),
        MetadataValue::U16(2),
        MetadataValue::I16(-2),
        MetadataValue::I32(-3),
        MetadataValue::I64(-4),
        MetadataValue::F64(-0.125),
    ]);
    let mut metadata = Metadata::default();
    values.into_iter().enumerate().for_each(|(index, value)| metadata.set(&format!("key.{index}"), value));
    metadata
}

fn settings() -> serde_json::Value {
    let config = &BASE.config;
    json!({
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.feed_forward,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
        "hidden_act": "silu",
        "eos_token_id": [2, 0],
    })
}

fn tokenizer_settings() -> String {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let vocabulary = BASE.tokenizer.vocabulary();
        let vocab: serde_json::Map<_, _> =
            vocabulary.tokens.iter().zip(0..).map(|(token, id)| (token.clone(), json!(id))).collect();
        let added = |id: usize| json!({"id": id, "content": vocabulary.tokens[id], "special": true});
        let file = json!({
            "added_tokens": [added(0), added(1), added(2)],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}
            ]},
            "model": {"type": "BPE", "vocab": vocab, "merges": vocabulary.merges},
        });
        file.to_string()
    });
    TEXT.clone()
}

/// `model.safetensors` as transformers would write it, in F32. Rows of Q and K are taken as they are: which
/// of them rotate together does not matter here.
fn folder_weights() -> Vec<u8> {
    let layer = &BASE.layers[0];
    let hidden = BASE.config.hidden;
    let mut tensors = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![BASE.config.vocab_size, hidden],
            BASE.token_embedding.to_f32(),
        ),
        ("model.norm.weight".to_owned(), vec![hidden], BASE.output_norm.clone()),
        ("model.layers.0.input_layernorm.weight".to_owned(), vec![hidden], layer.attn_norm.clone()),
        ("model.layers.0.post_attention_layernorm.weight".to_owned(), vec![hidden], layer.ffn_norm.clone()),
    ];
    tensors.extend(Projection::ALL.map(|projection| {
        let matrix = layer.projection(projection);
        let name = format!("model.layers.0.{}.weight", projection.hugging_face_name());
        (name, vec![matrix.rows(), matrix.cols()], matrix.to_f32())
    }));
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = serde_json::Value::from(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}
