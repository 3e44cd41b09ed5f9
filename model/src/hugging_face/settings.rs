//! `config.json` of a Hugging Face folder: the fields that decide what is computed, and the refusal of those that ask for
//! something else. Defaults are those of transformers' configuration classes.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{TokenizerSettings, malformed};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::family::{Family, Gemma3};
use crate::tokenizer::TokenRoles;

/// Llama's own base of the rotary frequencies, where a file names none.
const ROPE_BASE: f32 = 10_000.0;
/// Gemma 3's, in its global and its local layers, and what else it has where a file names none.
const GEMMA3_ROPE_BASE: f32 = 1_000_000.0;
const GEMMA3_LOCAL_ROPE_BASE: f32 = 10_000.0;
const GEMMA3_PERIOD: usize = 6;
const GEMMA3_HEAD_DIM: usize = 256;
const GEMMA3_QUERY_SCALAR: f32 = 256.0;
const QWEN3_HEAD_DIM: usize = 128;
/// Layer types.
const GLOBAL: &str = "full_attention";
const LOCAL: &str = "sliding_attention";

/// The fields of config.json that decide what is computed.
#[derive(Deserialize)]
pub(super) struct Settings {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rope_theta: Option<f32>,
    /// Where transformers 5 writes what were `rope_theta` and `rope_scaling` before; by layer type for Gemma 3.
    rope_parameters: Option<Value>,
    rope_local_base_freq: Option<f32>,
    rms_norm_eps: f32,
    tie_word_embeddings: Option<bool>,
    rope_scaling: Option<Value>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
    query_pre_attn_scalar: Option<f32>,
    sliding_window: Option<usize>,
    #[serde(alias = "_sliding_window_pattern")]
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    /// Fields that must be null, false or absent.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// Each asks for a computation that is not done here.
const OFF: [&str; 7] = [
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_experts",
    "num_local_experts",
    "use_bidirectional_attention",
    "use_mrope",
    "use_sliding_window",
];

/// One kind of layer's rotary positions.
#[derive(Deserialize)]
struct RopeParameters {
    rope_theta: Option<f32>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
    factor: Option<f32>,
    /// What another way of rotating would need.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// Some models have several tokens that end an answer; the first is the one a file can name.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl Settings {
    pub(super) fn model_config(&self, folder: &Path) -> Result<ModelConfig, ModelError> {
        if !["llama", "qwen2", "qwen3", "gemma3_text"].contains(&self.model_type.as_str()) {
            return Err(ModelError::UnknownArchitecture { found: self.model_type.clone() });
        }
        self.refuse_other_computations(self.model_type == "gemma3_text")?;
        let split = || self.hidden_size.checked_div(self.num_attention_heads).unwrap_or_default();
        let (family, head_dim, rope_base) = match self.model_type.as_str() {
            "llama" => (Family::Llama, split(), self.rope_base()?),
            "qwen2" => (Family::Qwen2, split(), self.rope_base()?),
            "qwen3" => (Family::Qwen3, QWEN3_HEAD_DIM, self.rope_base()?),
            "gemma3_text" => {
                let (own, base) = self.gemma3()?;
                (Family::Gemma3(own), GEMMA3_HEAD_DIM, base)
            }
            other => return Err(ModelError::UnknownArchitecture { found: other.to_owned() }),
        };
        let config = ModelConfig {
            name: folder
                .file_name()
                .map_or_else(|| "unnamed".to_owned(), |name| name.to_string_lossy().into_owned()),
            family,
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            feed_forward: self.intermediate_size,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim.unwrap_or(head_dim),
            context_length: self.max_position_embeddings,
            rope_base,
            rms_eps: self.rms_norm_eps,
        };
        config.validated()
    }

    /// Whether the output shares the token embedding.
    pub(super) fn tied(&self) -> bool {
        self.tie_word_embeddings.unwrap_or(self.model_type == "gemma3_text")
    }

    pub(super) fn roles(&self, beside: &TokenizerSettings) -> TokenRoles {
        let eos = self.eos_token_id.as_ref().and_then(|ids| match ids {
            TokenIds::One(id) => Some(*id),
            TokenIds::Many(ids) => ids.first().copied(),
        });
        TokenRoles {
            bos: self.bos_token_id,
            eos,
            padding: self.pad_token_id,
            add_bos: beside.add_bos_token,
            add_eos: beside.add_eos_token,
        }
    }

    /// Both places may name it, but then the same.
    fn rope_base(&self) -> Result<f32, ModelError> {
        if let Some(scaling) = &self.rope_scaling {
            return Err(unsupported("rope_scaling", scaling, "only null is supported"));
        }
        let Some(value) = &self.rope_parameters else { return Ok(self.rope_theta.unwrap_or(ROPE_BASE)) };
        let parameters = RopeParameters::read("rope_parameters", value)?;
        parameters.linear_factor("rope_parameters", false)?;
        let nested = parameters.rope_theta;
        match (nested, self.rope_theta) {
            (Some(nested), Some(plain)) if nested != plain => {
                Err(malformed("rope_theta", format!("it is {plain}, but {nested} in rope_parameters")))
            }
            (nested, plain) => Ok(nested.or(plain).unwrap_or(ROPE_BASE)),
        }
    }

    /// Its constants, and the base of the rotary frequencies in global layers.
    fn gemma3(&self) -> Result<(Gemma3, f32), ModelError> {
        let (mut base, mut factor) = (self.rope_theta.unwrap_or(GEMMA3_ROPE_BASE), 1.0);
        let mut local_base = self.rope_local_base_freq.unwrap_or(GEMMA3_LOCAL_ROPE_BASE);
        if let Some(scaling) = &self.rope_scaling {
            factor = RopeParameters::read("rope_scaling", scaling)?.linear_factor("rope_scaling", true)?;
        }
        if let Some(value) = &self.rope_parameters {
            let all: BTreeMap<String, Value> = serde_json::from_value(value.clone())
                .map_err(|error| malformed("rope_parameters", error.to_string()))?;
            for (kind, value) in &all {
                let key = format!("rope_parameters.{kind}");
                let parameters = RopeParameters::read(&key, value)?;
                match kind.as_str() {
                    GLOBAL => {
                        base = parameters.rope_theta.unwrap_or(base);
                        factor = parameters.linear_factor(&key, true)?;
                    }
                    LOCAL => {
                        local_base = parameters.rope_theta.unwrap_or(local_base);
                        parameters.linear_factor(&key, false)?;
                    }
                    _ => return Err(unsupported(&key, value, "no such kind of layer is known")),
                }
            }
        }
        let scalar = self.query_pre_attn_scalar.unwrap_or(GEMMA3_QUERY_SCALAR);
        let missing = || ModelError::MissingKey { key: "sliding_window".to_owned() };
        let own = Gemma3 {
            attention_scale: 1.0 / scalar.sqrt(),
            window: self.sliding_window.ok_or_else(missing)?,
            period: self.period()?,
            local_rope_base: local_base,
            rope_factor: factor,
        };
        Ok((own, base))
    }

    /// The list of layer types must be that of a period.
    fn period(&self) -> Result<usize, ModelError> {
        let Some(types) = &self.layer_types else {
            return Ok(self.sliding_window_pattern.unwrap_or(GEMMA3_PERIOD));
        };
        let period = types.iter().position(|kind| kind == GLOBAL).unwrap_or(types.len()) + 1;
        let kind = |layer: usize| if (layer + 1).is_multiple_of(period) { GLOBAL } else { LOCAL };
        if types.len() == self.num_hidden_layers && (0..types.len()).all(|layer| types[layer] == kind(layer))
        {
            return Ok(period);
        }
        Err(unsupported("layer_types", &json!(types), "only one global layer in every so many is supported"))
    }

    fn refuse_other_computations(&self, is_gemma: bool) -> Result<(), ModelError> {
        let off =
            |key: &&str| !matches!(self.others.get(*key), None | Some(Value::Null | Value::Bool(false)));
        if let Some(key) = OFF.into_iter().find(off) {
            return Err(unsupported(key, &self.others[key], "only null or false is supported"));
        }
        let (key, act) = match &self.hidden_activation {
            Some(act) => ("hidden_activation", Some(act)),
            None => ("hidden_act", self.hidden_act.as_ref()),
        };
        let expected = if is_gemma { "gelu_pytorch_tanh" } else { "silu" };
        if let Some(act) = act.filter(|act| *act != expected) {
            return Err(unsupported(key, &json!(act), &format!("only {expected} is supported")));
        }
        if self.attention_bias || self.mlp_bias {
            return Err(unsupported("attention_bias or mlp_bias", &json!(true), "only false is supported"));
        }
        let all_global = self.layer_types.iter().flatten().all(|kind| kind == GLOBAL);
        if !is_gemma && !all_global {
            return Err(unsupported(
                "layer_types",
                &json!(self.layer_types),
                "only full_attention is supported",
            ));
        }
        Ok(())
    }
}

impl RopeParameters {
    fn read(key: &str, value: &Value) -> Result<Self, ModelError> {
        serde_json::from_value(value.clone()).map_err(|error| malformed(key, error.to_string()))
    }

    /// What positions are divided by: 1, or a factor where that is supported.
    fn linear_factor(&self, key: &str, may_scale: bool) -> Result<f32, ModelError> {
        if let Some((name, value)) = self.others.iter().find(|(_, value)| !value.is_null()) {
            return Err(unsupported(&format!("{key}.{name}"), value, "must not be there"));
        }
        let refuse = |rule: &str| Err(unsupported(&format!("{key}.rope_type"), &json!(self.rope_type), rule));
        match (self.rope_type.as_deref(), self.factor) {
            (None | Some("default"), None) => Ok(1.0),
            (Some("linear"), Some(factor)) if may_scale => Ok(factor),
            (_, _) if may_scale => refuse("only default, or linear with a factor, is supported"),
            (None | Some("default"), Some(factor)) => {
                Err(unsupported(&format!("{key}.factor"), &json!(factor), "must not be there"))
            }
            (Some(_), _) => refuse("only default is supported"),
        }
    }
}

fn unsupported(key: &str, found: &Value, reason: &str) -> ModelError {
    let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
    ModelError::Unsupported { key: key.to_owned(), found, reason: reason.to_owned() }
}
