//! Metadata keys by architecture: which family a file is of, its constants, and the keys that ask for a computation
//! which is not done here.

use super::{Metadata, MetadataValue};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::family::{Family, Gemma3};

/// Gemma 3's own constants, where a file names none.
const PERIOD: u32 = 6;
const LOCAL_ROPE_BASE: f32 = 10_000.0;

/// Keys that would change the computation, and the only values that leave it as it is here.
const UNSUPPORTED: [(&str, &[&str]); 12] = [
    (SCALING_TYPE, &["none"]),
    (SCALING_FACTOR, &["0", "1"]),
    ("rope.scale_linear", &["0", "1"]),
    ("expert_count", &["0"]),
    (WINDOW, &["0"]),
    ("attention.clamp_kqv", &["0"]),
    (SCALE, &["0"]),
    ("logit_scale", &["0", "1"]),
    ("embedding_scale", &["0", "1"]),
    ("attn_logit_softcapping", &["0"]),
    ("final_logit_softcapping", &["0"]),
    ("attention.causal", &["true"]),
];
const SCALING_TYPE: &str = "rope.scaling.type";
const SCALING_FACTOR: &str = "rope.scaling.factor";
const WINDOW: &str = "attention.sliding_window";
const WINDOW_PATTERN: &str = "attention.sliding_window_pattern";
const LOCAL_BASE: &str = "rope.freq_base_swa";
const SCALE: &str = "attention.scale";

/// The keys above that are read for Gemma 3, and those that only it has.
const OF_GEMMA3: [&str; 6] = [SCALING_TYPE, SCALING_FACTOR, WINDOW, WINDOW_PATTERN, LOCAL_BASE, SCALE];

/// Keys that are read for every family, or say nothing about the computation.
const KNOWN: [&str; 14] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "vocab_size",
];

/// Before any of its keys is read.
pub(super) fn check_architecture(architecture: &str) -> Result<(), ModelError> {
    if ["llama", "qwen2", "qwen3", "gemma3"].contains(&architecture) {
        return Ok(());
    }
    Err(ModelError::UnknownArchitecture { found: architecture.to_owned() })
}

/// The family of an architecture, with its constants; `shape` is (hidden, heads, head_dim).
pub(super) fn read_family(
    metadata: &Metadata,
    architecture: &str,
    layers: usize,
    shape: (usize, usize, usize),
) -> Result<Family, ModelError> {
    match architecture {
        "llama" => Ok(Family::Llama),
        "qwen2" => Ok(Family::Qwen2),
        "qwen3" => Ok(Family::Qwen3),
        "gemma3" => read_gemma3(metadata, layers, shape).map(Family::Gemma3),
        _ => Err(ModelError::UnknownArchitecture { found: architecture.to_owned() }),
    }
}

fn read_gemma3(
    metadata: &Metadata,
    layers: usize,
    (hidden, heads, head_dim): (usize, usize, usize),
) -> Result<Gemma3, ModelError> {
    let key = |name: &str| format!("gemma3.{name}");
    let usual = Gemma3::usual_attention_scale(layers, hidden, heads, head_dim);
    let scale = metadata.optional_f32(&key(SCALE))?.filter(|scale| *scale != 0.0);
    Ok(Gemma3 {
        attention_scale: scale.unwrap_or(usual),
        window: metadata.u32(&key(WINDOW))? as usize,
        period: metadata.optional_u32(&key(WINDOW_PATTERN))?.unwrap_or(PERIOD) as usize,
        local_rope_base: metadata.optional_f32(&key(LOCAL_BASE))?.unwrap_or(LOCAL_ROPE_BASE),
        rope_factor: linear_factor(metadata, &key(SCALING_TYPE), &key(SCALING_FACTOR))?,
    })
}

/// As llama.cpp: a factor without a type is linear, and 0 is none.
fn linear_factor(metadata: &Metadata, kind_key: &str, factor_key: &str) -> Result<f32, ModelError> {
    let factor = metadata.optional_f32(factor_key)?.filter(|factor| *factor != 0.0);
    match metadata.optional_string(kind_key)? {
        None => Ok(factor.unwrap_or(1.0)),
        Some("linear") => factor.ok_or_else(|| ModelError::MissingKey { key: factor_key.to_owned() }),
        Some("none") => match factor.filter(|factor| *factor != 1.0) {
            Some(factor) => Err(unsupported(factor_key, factor, format!("but {kind_key} is none"))),
            None => Ok(1.0),
        },
        Some(other) => Err(unsupported(kind_key, other, "only linear or none is supported".to_owned())),
    }
}

/// Adds the keys that only the model's family has.
pub(super) fn write_family(config: &ModelConfig, metadata: &mut Metadata) {
    let Family::Gemma3(own) = config.family else { return };
    let mut set = |name: &str, value: MetadataValue| metadata.set(&format!("gemma3.{name}"), value);
    set(WINDOW, (own.window as u32).into());
    set(WINDOW_PATTERN, (own.period as u32).into());
    set(LOCAL_BASE, own.local_rope_base.into());
    if own.rope_factor != 1.0 {
        set(SCALING_TYPE, "linear".into());
        set(SCALING_FACTOR, own.rope_factor.into());
    }
    let usual = Gemma3::usual_attention_scale(config.layers, config.hidden, config.heads, config.head_dim);
    if own.attention_scale != usual {
        set(SCALE, own.attention_scale.into());
    }
}

/// Refuses, by name, keys whose value asks for another computation. For architectures but `llama`, whose files have long
/// been read, any key of the architecture that is not known is refused too.
pub(super) fn refuse_other_computations(metadata: &Metadata, architecture: &str) -> Result<(), ModelError> {
    let own: &[&str] = if architecture == "gemma3" { &OF_GEMMA3 } else { &[] };
    for (name, neutral) in UNSUPPORTED.into_iter().filter(|(name, _)| !own.contains(name)) {
        let key = format!("{architecture}.{name}");
        let Some(value) = metadata.value(&key) else { continue };
        let found = plain_text(value);
        if !neutral.contains(&found.as_str()) {
            return Err(unsupported(&key, found, format!("only {} is supported", neutral.join(" or "))));
        }
    }
    if architecture == "llama" {
        return Ok(());
    }
    let named = |name: &str| {
        KNOWN.contains(&name) || own.contains(&name) || UNSUPPORTED.iter().any(|(known, _)| *known == name)
    };
    let prefix = format!("{architecture}.");
    let unknown = metadata.iter().find(|(key, _)| key.strip_prefix(&prefix).is_some_and(|name| !named(name)));
    match unknown {
        Some((key, value)) => Err(unsupported(key, plain_text(value), "the key is not known".to_owned())),
        None => Ok(()),
    }
}

fn plain_text(value: &MetadataValue) -> String {
    if let MetadataValue::String(text) = value {
        return text.clone();
    }
    if let MetadataValue::Bool(flag) = value {
        return flag.to_string();
    }
    let number = value.integer().map(|number| number.to_string());
    let number = number.or_else(|| value.float().map(|number| number.to_string()));
    number.unwrap_or_else(|| value.type_name().to_owned())
}

pub(super) fn unsupported(key: &str, found: impl ToString, reason: String) -> ModelError {
    ModelError::Unsupported { key: key.to_owned(), found: found.to_string(), reason }
}
