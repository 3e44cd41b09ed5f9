//! An encoder from a Hugging Face folder: `config.json`, `tokenizer.json` or `vocab.txt`, and safetensors files,
//! which are mapped. `1_Pooling/config.json`, where sentence-transformers wrote one, says how to pool.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::config::{Activation, EncoderConfig, EncoderProjection, Pooling};
use super::model::{EncoderLayer, EncoderParts, LayerNormWeights, LinearWeights};
use super::tokenizer::{WordPieceSettings, WordPieceTokenizer};
use crate::error::ModelError;
use crate::hugging_face::{Weights, read_json, read_small};

/// Models with a task's head have this before the names of their encoder.
const PREFIX: &str = "bert.";
/// Heads of pre-training, which no classifier uses.
const PRETRAINING: &str = "cls.";
/// The numbers 0, 1, 2.., which older files hold.
const POSITION_IDS: &str = "embeddings.position_ids";
const TOKEN_EMBEDDING: &str = "embeddings.word_embeddings.weight";
const POSITION_EMBEDDING: &str = "embeddings.position_embeddings.weight";
const TOKEN_TYPES: &str = "embeddings.token_type_embeddings.weight";
const EMBEDDING_NORM: &str = "embeddings.LayerNorm";
const POOLER: &str = "pooler.dense";

/// Opens the folder.
pub(super) fn open(folder: &Path) -> Result<EncoderParts, ModelError> {
    let settings: Settings = read_json(&folder.join("config.json"))?;
    let config = settings.config(folder)?.validated()?;
    let tokenizer = tokenizer(folder)?;
    let tensors = Tensors::open(folder)?;
    tensors.check_names(config.layers)?;
    let hidden = config.hidden;
    let pooler = tensors.has(&format!("{POOLER}.weight"));
    Ok(EncoderParts {
        tokenizer,
        token_embedding: tensors.matrix(TOKEN_EMBEDDING, (config.vocab_size, hidden))?,
        position_embedding: tensors.matrix(POSITION_EMBEDDING, (config.positions, hidden))?,
        token_types: tensors.matrix(TOKEN_TYPES, (config.token_types, hidden))?,
        embedding_norm: tensors.norm(EMBEDDING_NORM, hidden)?,
        layers: (0..config.layers).map(|layer| tensors.layer(&config, layer)).collect::<Result<_, _>>()?,
        pooler: pooler.then(|| tensors.linear(POOLER, (hidden, hidden))).transpose()?,
        config,
    })
}

/// The fields of config.json that decide what is computed.
#[derive(Deserialize)]
struct Settings {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f32,
    hidden_act: String,
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
}

/// Fields that would change the computation, and the only value that leaves it as it is here.
const UNSUPPORTED: [(&str, &str); 5] = [
    ("position_embedding_type", "\"absolute\""),
    ("is_decoder", "false"),
    ("add_cross_attention", "false"),
    ("pruned_heads", "{}"),
    ("quantization_config", "null"),
];

impl Settings {
    fn config(&self, folder: &Path) -> Result<EncoderConfig, ModelError> {
        if self.model_type != "bert" {
            return Err(unsupported("model_type", &self.model_type, "an encoder must be bert"));
        }
        for (key, only) in UNSUPPORTED {
            let found = self.others.get(key).filter(|value| !value.is_null()).map(Value::to_string);
            if let Some(found) = found.filter(|found| found != only) {
                return Err(unsupported(key, &found, &format!("only {only} is supported")));
            }
        }
        let activation = match self.hidden_act.as_str() {
            "gelu" | "gelu_python" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            other => {
                return Err(unsupported("hidden_act", other, "only gelu and its tanh form are supported"));
            }
        };
        let name = folder.file_name().map_or_else(|| "unnamed".into(), |name| name.to_string_lossy());
        Ok(EncoderConfig {
            name: name.into_owned(),
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            feed_forward: self.intermediate_size,
            heads: self.num_attention_heads,
            positions: self.max_position_embeddings,
            token_types: self.type_vocab_size,
            norm_eps: self.layer_norm_eps,
            activation,
            pooling: pooling(folder)?,
        })
    }
}

/// What sentence-transformers wrote; the mean where it wrote nothing.
fn pooling(folder: &Path) -> Result<Pooling, ModelError> {
    let path = folder.join("1_Pooling").join("config.json");
    if !path.exists() {
        return Ok(Pooling::Mean);
    }
    let modes: serde_json::Map<String, Value> = read_json(&path)?;
    let on: Vec<&str> = modes
        .iter()
        .filter(|(key, value)| key.starts_with("pooling_mode_") && value.as_bool() == Some(true))
        .map(|(key, _)| key.as_str())
        .collect();
    match on.as_slice() {
        ["pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token"] => Ok(Pooling::Cls),
        other => {
            Err(unsupported("pooling", &other.join(" and "), "only mean or cls is supported").in_file(&path))
        }
    }
}

fn tokenizer(folder: &Path) -> Result<WordPieceTokenizer, ModelError> {
    let path = folder.join("tokenizer.json");
    if path.exists() {
        return WordPieceTokenizer::from_json(&read_small(&path)?).map_err(|error| error.in_file(&path));
    }
    #[derive(Default, Deserialize)]
    struct Beside {
        do_lower_case: Option<bool>,
        strip_accents: Option<bool>,
        tokenize_chinese_chars: Option<bool>,
    }
    let beside = folder.join("tokenizer_config.json");
    let beside: Beside = if beside.exists() { read_json(&beside)? } else { Beside::default() };
    let lowercase = beside.do_lower_case.unwrap_or(true);
    let settings = WordPieceSettings {
        lowercase,
        strip_accents: beside.strip_accents.unwrap_or(lowercase),
        split_chinese: beside.tokenize_chinese_chars.unwrap_or(true),
    };
    let path = folder.join("vocab.txt");
    WordPieceTokenizer::from_vocabulary_text(&read_small(&path)?, settings)
        .map_err(|error| error.in_file(&path))
}

/// The tensors of the folder by the names that an encoder alone has.
struct Tensors {
    weights: Weights,
    prefix: &'static str,
}

impl Tensors {
    fn open(folder: &Path) -> Result<Self, ModelError> {
        let weights = Weights::open(folder)?;
        let prefixed = weights.names().any(|name| name.strip_prefix(PREFIX) == Some(TOKEN_EMBEDDING));
        Ok(Self { weights, prefix: if prefixed { PREFIX } else { "" } })
    }

    fn has(&self, name: &str) -> bool {
        let full = format!("{}{name}", self.prefix);
        self.weights.names().any(|name| name == full)
    }

    /// What is not read here must not be there.
    fn check_names(&self, layers: usize) -> Result<(), ModelError> {
        let mut known: BTreeSet<String> =
            [TOKEN_EMBEDDING, POSITION_EMBEDDING, TOKEN_TYPES, POSITION_IDS].map(str::to_owned).into();
        let mut both = |name: &str| known.extend(["weight", "bias"].map(|part| format!("{name}.{part}")));
        both(EMBEDDING_NORM);
        both(POOLER);
        for layer in 0..layers {
            EncoderProjection::ALL
                .into_iter()
                .map(EncoderProjection::hugging_face_name)
                .chain([ATTENTION_NORM, OUTPUT_NORM])
                .for_each(|name| both(&layer_name(layer, name)));
        }
        let unknown = |name: &&str| {
            let own = name.strip_prefix(self.prefix);
            !(name.starts_with(PRETRAINING) || own.is_some_and(|own| known.contains(own)))
        };
        match self.weights.names().find(unknown) {
            Some(name) => Err(ModelError::UnexpectedTensor { tensor: name.to_owned() }),
            None => Ok(()),
        }
    }

    fn matrix(
        &self,
        name: &str,
        (rows, cols): (usize, usize),
    ) -> Result<crate::weights::WeightMatrix, ModelError> {
        self.weights.matrix(&format!("{}{name}", self.prefix), rows, cols)
    }

    fn linear(&self, name: &str, shape: (usize, usize)) -> Result<LinearWeights, ModelError> {
        Ok(LinearWeights {
            weight: self.matrix(&format!("{name}.weight"), shape)?,
            bias: self.weights.vector(&format!("{}{name}.bias", self.prefix), shape.0)?,
        })
    }

    fn norm(&self, name: &str, len: usize) -> Result<LayerNormWeights, ModelError> {
        let vector = |part: &str| self.weights.vector(&format!("{}{name}.{part}", self.prefix), len);
        Ok(LayerNormWeights { gain: vector("weight")?, bias: vector("bias")? })
    }

    fn layer(&self, config: &EncoderConfig, layer: usize) -> Result<EncoderLayer, ModelError> {
        let linear = |projection: EncoderProjection| {
            self.linear(&layer_name(layer, projection.hugging_face_name()), projection.shape(config))
        };
        let [q, k, v, o, up, down] = EncoderProjection::ALL.map(linear);
        Ok(EncoderLayer {
            projections: [q?, k?, v?, o?, up?, down?],
            attention_norm: self.norm(&layer_name(layer, ATTENTION_NORM), config.hidden)?,
            output_norm: self.norm(&layer_name(layer, OUTPUT_NORM), config.hidden)?,
        })
    }
}

const ATTENTION_NORM: &str = "attention.output.LayerNorm";
const OUTPUT_NORM: &str = "output.LayerNorm";

fn layer_name(layer: usize, name: &str) -> String {
    format!("encoder.layer.{layer}.{name}")
}

fn unsupported(key: &str, found: &str, reason: &str) -> ModelError {
    ModelError::Unsupported { key: key.to_owned(), found: found.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::encoder::EncoderModel;
    use crate::encoder::fixtures::{tiny_folder, tiny_model};
    use crate::safetensors::{TensorBytes, decode, encode};

    /// A copy of the tiny model's folder, with its settings changed and its tensors taken through `change`.
    fn refused(
        spoil: impl Fn(&mut Value),
        change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>),
    ) -> String {
        let (_home, path) = changed(spoil, change);
        EncoderModel::open(&path).unwrap_err().to_string()
    }

    fn changed(
        spoil: impl Fn(&mut Value),
        change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>),
    ) -> (tempfile::TempDir, std::path::PathBuf) {
        let (home, path) = tiny_folder();
        let mut settings: Value =
            serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
        spoil(&mut settings);
        fs::write(path.join("config.json"), settings.to_string()).unwrap();
        let bytes = fs::read(path.join("model.safetensors")).unwrap();
        let file = decode(&bytes).unwrap();
        let mut tensors: Vec<_> = file
            .names()
            .into_iter()
            .map(|name| {
                let (shape, values) = file.f32(name).unwrap();
                (name.to_owned(), shape, values)
            })
            .collect();
        change(&mut tensors);
        let tensors: Vec<_> =
            tensors.iter().map(|(name, shape, values)| TensorBytes::f32(name, shape, values)).collect();
        fs::write(path.join("model.safetensors"), encode(&[], &tensors)).unwrap();
        (home, path)
    }

    #[test]
    fn refuses_other_computations() {
        let check = |key: &str, value: Value, expected: &str| {
            let error = refused(|settings| settings[key] = value.clone(), |_| ());
            assert!(error.contains(expected), "{error}");
        };
        check("model_type", json!("roberta"), "an encoder must be bert");
        check("hidden_act", json!("relu"), "hidden_act = relu");
        check("position_embedding_type", json!("relative_key"), "position_embedding_type");
        check("is_decoder", json!(true), "is_decoder");
        check("quantization_config", json!({"bits": 4}), "quantization_config");
        check("num_attention_heads", json!(5), "do not divide");
        check("hidden_size", json!("wide"), "malformed: JSON");
        check("vocab_size", json!(161), "wrong shape");
    }

    #[test]
    fn refuses_tensors_that_do_not_fit() {
        assert!(refused(|_| (), |t| t.retain(|(name, ..)| name != TOKEN_TYPES)).contains("missing tensor"));
        let extra = ("encoder.layer.0.adapter.weight".to_owned(), vec![1], vec![0.0]);
        assert!(refused(|_| (), |t| t.push(extra.clone())).contains("unexpected tensor"));
        let third = |name: &str| name.replace("layer.1.", "layer.2.");
        assert!(
            refused(|_| (), |t| t.iter_mut().for_each(|(name, ..)| *name = third(name))).contains("layer.2.")
        );
        let not_finite = |t: &mut Vec<(String, Vec<usize>, Vec<f32>)>| {
            let bias = t.iter_mut().find(|(name, ..)| name == "encoder.layer.1.output.dense.bias");
            bias.unwrap().2[3] = f32::INFINITY;
        };
        assert!(refused(|_| (), not_finite).contains("blk.1.ffn_down: value 3 is not finite"));
    }

    /// A model with a head for pre-training names its encoder's tensors with a prefix.
    #[test]
    fn names_may_have_a_prefix() {
        let prefix = |t: &mut Vec<(String, Vec<usize>, Vec<f32>)>| {
            t.iter_mut().for_each(|(name, ..)| *name = format!("bert.{name}"));
            t.push(("cls.predictions.bias".to_owned(), vec![1], vec![0.0]));
        };
        let (_home, path) = changed(|_| (), prefix);
        let model = EncoderModel::open(&path).unwrap();
        let expected = tiny_model();
        assert_eq!(model.config(), expected.config());
        let ids: &[u32] = &[2, 30, 31, 3];
        assert_eq!(model.hidden_states(&[ids]), expected.hidden_states(&[ids]));
    }

    #[test]
    fn pooling_is_what_the_folder_says() {
        let (_home, path) = tiny_folder();
        fs::create_dir(path.join("1_Pooling")).unwrap();
        let write = |modes: Value| fs::write(path.join("1_Pooling/config.json"), modes.to_string()).unwrap();
        write(json!({"word_embedding_dimension": 32, "pooling_mode_cls_token": true}));
        assert_eq!(EncoderModel::open(&path).unwrap().config().pooling, Pooling::Cls);
        write(json!({"pooling_mode_max_tokens": true}));
        assert!(EncoderModel::open(&path).unwrap_err().to_string().contains("pooling_mode_max_tokens"));
    }
}
