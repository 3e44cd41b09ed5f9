//! A base model from a Hugging Face folder: `config.json` (read in `hugging_face/settings.rs`), `tokenizer.json` and one
//! or more safetensors files, which are mapped. Rows of Q and K and the weights of norms are brought into the form that
//! GGUF files of the family have; nothing is quantized.

mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

use crate::base::{BaseModel, LayerExtras, LayerWeights, ModelParts, check_shape};
use crate::bytes::SharedBytes;
use crate::config::{ModelConfig, Projection};
use crate::error::ModelError;
use crate::family::{Extra, Family};
use crate::rotary;
use crate::tokenizer::Tokenizer;
use crate::weights::{WeightFormat, WeightMatrix};
use settings::Settings;

/// Small files are read whole; beyond this they are no configuration or vocabulary.
const JSON_BYTES_MAX: u64 = 64 << 20;

const TOKEN_EMBEDDING: &str = "model.embed_tokens.weight";
const OUTPUT_NORM: &str = "model.norm.weight";
const OUTPUT: &str = "lm_head.weight";

/// Opens the folder.
pub(crate) fn open(folder: &Path) -> Result<BaseModel, ModelError> {
    let config_path = folder.join("config.json");
    let settings: Settings = read_json(&config_path)?;
    let config = settings.model_config(folder).map_err(|error| error.in_file(&config_path))?;
    let beside: TokenizerSettings = read_json_if_there(&folder.join("tokenizer_config.json"))?;
    let tokenizer_path = folder.join("tokenizer.json");
    let roles = settings.roles(&beside);
    let tokenizer = Tokenizer::from_json(&read_small(&tokenizer_path)?, &roles)
        .and_then(|tokenizer| tokenizer.padded(config.vocab_size))
        .map_err(|error| error.in_file(&tokenizer_path))?;
    let weights = Weights::open(folder)?;
    let template = chat_template(folder, &beside)?;
    let parts = assemble(&weights, config, settings.tied(), tokenizer, template);
    parts.and_then(BaseModel::from_parts).map_err(|error| error.in_file(folder))
}

/// The fields of tokenizer_config.json that matter here.
#[derive(Default, Deserialize)]
pub(crate) struct TokenizerSettings {
    #[serde(default)]
    pub(crate) add_bos_token: bool,
    #[serde(default)]
    pub(crate) add_eos_token: bool,
    chat_template: Option<Value>,
}

/// A template that is one text, in the settings or in a file of its own; a list of named ones is left out.
fn chat_template(folder: &Path, beside: &TokenizerSettings) -> Result<Option<String>, ModelError> {
    let path = folder.join("chat_template.jinja");
    if let Some(template) = &beside.chat_template {
        return Ok(template.as_str().map(str::to_owned));
    }
    if !path.exists() {
        return Ok(None);
    }
    let not_text = |_| malformed("the file", "it is not UTF-8".to_owned()).in_file(&path);
    String::from_utf8(read_small(&path)?).map(Some).map_err(not_text)
}

/// Every tensor of the folder: in which file, and what it is.
pub(crate) struct Weights {
    files: Vec<SharedBytes>,
    tensors: BTreeMap<String, TensorPlace>,
}

struct TensorPlace {
    file: usize,
    range: std::ops::Range<usize>,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl Weights {
    /// Those of every safetensors file of the folder.
    pub(crate) fn open(folder: &Path) -> Result<Self, ModelError> {
        let mut weights = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for path in weight_files(folder)? {
            let bytes = SharedBytes::map(&path)?;
            weights.index(bytes).map_err(|error| error.in_file(&path))?;
        }
        Ok(weights)
    }

    fn index(&mut self, bytes: SharedBytes) -> Result<(), ModelError> {
        let broken = |error: safetensors::SafeTensorError| malformed("the header", error.to_string());
        let all = SafeTensors::deserialize(bytes.as_ref()).map_err(broken)?;
        let (header, _) = SafeTensors::read_metadata(bytes.as_ref()).map_err(broken)?;
        let data = 8 + header;
        for (name, tensor) in all.tensors() {
            let begin = tensor.data().as_ptr() as usize - bytes.as_ref().as_ptr() as usize;
            assert!(begin >= data, "tensors lie behind the header");
            let range = begin..begin + tensor.data().len();
            let place = TensorPlace {
                file: self.files.len(),
                range,
                shape: tensor.shape().to_vec(),
                dtype: tensor.dtype(),
            };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(malformed(&name, "the tensor is in two files".to_owned()));
            }
        }
        self.files.push(bytes);
        Ok(())
    }

    /// Every tensor's name.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix, ModelError> {
        let place = self.find(name, &[rows, cols])?;
        let format = format_of(name, place.dtype)?;
        WeightMatrix::from_shared(&self.files[place.file], place.range.clone(), (rows, cols), format)
            .map_err(|source| ModelError::Weights { tensor: name.to_owned(), source })
    }

    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let place = self.find(name, &[len])?;
        let format = format_of(name, place.dtype)?;
        let vector =
            WeightMatrix::from_shared(&self.files[place.file], place.range.clone(), (1, len), format)
                .map_err(|source| ModelError::Weights { tensor: name.to_owned(), source })?;
        Ok(vector.to_f32())
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<&TensorPlace, ModelError> {
        let missing = || ModelError::MissingTensor { tensor: name.to_owned() };
        let place = self.tensors.get(name).ok_or_else(missing)?;
        check_shape(name, shape, &place.shape)?;
        Ok(place)
    }
}

/// `model.safetensors`, or the files that its index names.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let index: Index = read_json(&index_path)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    let plain = |name: &String| Path::new(name).file_name().is_some_and(|last| last == name.as_str());
    match names.iter().find(|name| !plain(name)) {
        Some(name) => {
            Err(malformed("weight_map", format!("{name:?} is no plain file name")).in_file(&index_path))
        }
        None => Ok(names.iter().map(|name| folder.join(name)).collect()),
    }
}

fn assemble(
    weights: &Weights,
    config: ModelConfig,
    tied: bool,
    tokenizer: Tokenizer,
    chat_template: Option<String>,
) -> Result<ModelParts, ModelError> {
    check_tensor_names(weights, &config, tied)?;
    let (vocab, hidden) = (config.vocab_size, config.hidden);
    Ok(ModelParts {
        tokenizer,
        token_embedding: weights.matrix(TOKEN_EMBEDDING, vocab, hidden)?,
        layers: (0..config.layers)
            .map(|layer| read_layer(weights, &config, layer))
            .collect::<Result<_, _>>()?,
        output_norm: norm(weights, &config, OUTPUT_NORM, hidden)?,
        output: (!tied).then(|| weights.matrix(OUTPUT, vocab, hidden)).transpose()?,
        chat_template,
        config,
    })
}

/// A tied model may repeat its embedding as output; a table of frequencies is computed anyway.
fn check_tensor_names(weights: &Weights, config: &ModelConfig, tied: bool) -> Result<(), ModelError> {
    let mut known: BTreeSet<String> = [TOKEN_EMBEDDING, OUTPUT_NORM, OUTPUT].map(str::to_owned).into();
    for layer in 0..config.layers {
        known.extend([ATTN_NORM, ffn_norm(config)].map(|name| layer_tensor(layer, name)));
        let extras = Extra::ALL.into_iter().filter(|extra| extra.len(config).is_some());
        known.extend(extras.map(|extra| extra_tensor(layer, extra)));
        known.extend(Projection::ALL.map(|projection| layer_tensor(layer, projection.hugging_face_name())));
        known.insert(format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"));
    }
    if let Some(name) = weights.tensors.keys().find(|name| !known.contains(*name)) {
        return Err(ModelError::UnexpectedTensor { tensor: name.clone() });
    }
    let bytes =
        |name: &str| weights.tensors.get(name).map(|at| &weights.files[at.file].as_ref()[at.range.clone()]);
    if tied && bytes(OUTPUT).is_some_and(|output| bytes(TOKEN_EMBEDDING) != Some(output)) {
        return Err(malformed(OUTPUT, "differs from the embedding it is said to be tied to".to_owned()));
    }
    Ok(())
}

const ATTN_NORM: &str = "input_layernorm";

/// Gemma's layers have a norm behind attention too, which takes the name.
fn ffn_norm(config: &ModelConfig) -> &'static str {
    match config.family {
        Family::Llama | Family::Qwen2 | Family::Qwen3 => "post_attention_layernorm",
        Family::Gemma3(_) => "pre_feedforward_layernorm",
    }
}

fn extra_tensor(layer: usize, extra: Extra) -> String {
    format!("model.layers.{layer}.{}", extra.hugging_face_name())
}

/// A norm's weights as GGUF files hold them.
fn norm(weights: &Weights, config: &ModelConfig, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
    let offset = config.family.norm_offset();
    let mut values = weights.vector(name, len)?;
    values.iter_mut().for_each(|value| *value += offset);
    Ok(values)
}

fn layer_tensor(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

fn read_layer(weights: &Weights, config: &ModelConfig, layer: usize) -> Result<LayerWeights, ModelError> {
    let matrix = |projection: Projection| {
        let (rows, cols) = projection.shape(config);
        let name = layer_tensor(layer, projection.hugging_face_name());
        let stored = weights.matrix(&name, rows, cols)?;
        let Some(heads) = projection.reordered_heads(config) else { return Ok(stored) };
        let bytes = rotary::to_gguf(stored.as_bytes(), rows, heads);
        WeightMatrix::from_bytes(bytes, rows, cols, stored.format())
            .map_err(|source| ModelError::Weights { tensor: name, source })
    };
    let [q, k, v, o, gate, up, down] = Projection::ALL.map(matrix);
    Ok(LayerWeights {
        attn_norm: norm(weights, config, &layer_tensor(layer, ATTN_NORM), config.hidden)?,
        ffn_norm: norm(weights, config, &layer_tensor(layer, ffn_norm(config)), config.hidden)?,
        projections: [q?, k?, v?, o?, gate?, up?, down?],
        extras: LayerExtras::read(config, |extra, len| {
            let name = extra_tensor(layer, extra);
            if extra.is_norm() { norm(weights, config, &name, len) } else { weights.vector(&name, len) }
        })?,
    })
}

fn format_of(name: &str, dtype: Dtype) -> Result<WeightFormat, ModelError> {
    let formats =
        [(Dtype::F32, WeightFormat::F32), (Dtype::F16, WeightFormat::F16), (Dtype::BF16, WeightFormat::BF16)];
    let found = || ModelError::UnsupportedTensorType { tensor: name.to_owned(), found: format!("{dtype:?}") };
    formats.into_iter().find(|(known, _)| *known == dtype).map(|(_, format)| format).ok_or_else(found)
}

pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, ModelError> {
    let failed = |source| ModelError::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > JSON_BYTES_MAX {
        return Err(
            malformed("the file", format!("{size} bytes are more than {JSON_BYTES_MAX}")).in_file(path)
        );
    }
    fs::read(path).map_err(failed)
}

pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, ModelError> {
    let parsed = serde_json::from_slice(&read_small(path)?);
    parsed.map_err(|error| malformed("JSON", error.to_string()).in_file(path))
}

fn read_json_if_there<T: for<'a> Deserialize<'a> + Default>(path: &Path) -> Result<T, ModelError> {
    if path.exists() { read_json(path) } else { Ok(T::default()) }
}

fn malformed(what: &str, reason: String) -> ModelError {
    ModelError::Malformed { what: what.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::base::tests::{noise, tiny_parts};
    use crate::safetensors::{TensorBytes, encode};
    use crate::tokenizer::tests::tiny_json;

    fn settings(config: &ModelConfig) -> Value {
        json!({
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden,
            "num_hidden_layers": config.layers,
            "intermediate_size": config.feed_forward,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": config.context_length,
            "rope_theta": config.rope_base,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true,
            "rope_scaling": null,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": [2, 0],
        })
    }

    /// The tests' model as transformers would store it.
    fn stored(parts: &ModelParts) -> Vec<TensorBytes> {
        let hidden = parts.config.hidden;
        let matrix = |name: &str, matrix: &WeightMatrix, heads: Option<usize>| {
            let values = matrix.to_f32();
            let values = heads.map_or_else(
                || values.clone(),
                |heads| rotary::to_hugging_face(&values, matrix.rows(), heads),
            );
            TensorBytes::f32(name, &[matrix.rows(), matrix.cols()], &values)
        };
        let mut tensors = vec![
            matrix(TOKEN_EMBEDDING, &parts.token_embedding, None),
            TensorBytes::f32(OUTPUT_NORM, &[hidden], &parts.output_norm),
        ];
        for (index, layer) in parts.layers.iter().enumerate() {
            tensors.push(TensorBytes::f32(&layer_tensor(index, ATTN_NORM), &[hidden], &layer.attn_norm));
            tensors.push(TensorBytes::f32(
                &layer_tensor(index, ffn_norm(&parts.config)),
                &[hidden],
                &layer.ffn_norm,
            ));
            tensors.extend(Projection::ALL.map(|projection| {
                let name = layer_tensor(index, projection.hugging_face_name());
                matrix(&name, layer.projection(projection), projection.reordered_heads(&parts.config))
            }));
        }
        tensors
    }

    fn parts() -> ModelParts {
        let mut parts = tiny_parts(WeightFormat::F32);
        parts.config.name = "model".to_owned();
        parts.chat_template = Some("{{ messages }}".to_owned());
        parts
    }

    /// A folder named `model`, its files changed by `spoil`.
    fn folder(tensors: &[TensorBytes], spoil: impl Fn(&mut Value)) -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("model");
        fs::create_dir(&path).unwrap();
        let mut settings = settings(&parts().config);
        spoil(&mut settings);
        fs::write(path.join("config.json"), settings.to_string()).unwrap();
        fs::write(path.join("tokenizer.json"), tiny_json().to_string()).unwrap();
        fs::write(path.join("tokenizer_config.json"), r#"{"chat_template": "{{ messages }}"}"#).unwrap();
        fs::write(path.join("model.safetensors"), encode(&[("format", "pt")], tensors)).unwrap();
        (home, path)
    }

    fn refused(tensors: &[TensorBytes], spoil: impl Fn(&mut Value)) -> String {
        let (_home, path) = folder(tensors, spoil);
        let error = BaseModel::open(&path).unwrap_err();
        assert!(matches!(error, ModelError::File { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn gives_the_model_that_the_gguf_file_holds() {
        let expected = BaseModel::from_parts(parts()).unwrap();
        let (_home, path) = folder(&stored(&parts()), |_| ());
        let model = BaseModel::open(&path).unwrap();
        assert_eq!(model.config, expected.config);
        assert_eq!(model.sha256, expected.sha256, "the same weights in the same order");
    }

    /// transformers 5 writes the rotary base and the template elsewhere than 4.
    #[test]
    fn reads_what_transformers_5_writes() {
        let (_home, path) = folder(&stored(&parts()), |settings| {
            settings.as_object_mut().unwrap().remove("rope_theta");
            settings["rope_parameters"] = json!({"rope_theta": 50_000.0, "rope_type": "default"});
        });
        fs::write(path.join("tokenizer_config.json"), "{}").unwrap();
        fs::write(path.join("chat_template.jinja"), "{{ other }}").unwrap();
        let model = BaseModel::open(&path).unwrap();
        assert_eq!(model.config.rope_base, 50_000.0);
        assert_eq!(model.chat_template.as_deref(), Some("{{ other }}"));
    }

    #[test]
    fn reads_a_model_in_several_files() {
        let (_home, path) = folder(&[], |_| ());
        fs::remove_file(path.join("model.safetensors")).unwrap();
        let mut first = stored(&parts());
        let second = first.split_off(5);
        fs::write(path.join("a.safetensors"), encode(&[], &first)).unwrap();
        fs::write(path.join("b.safetensors"), encode(&[], &second)).unwrap();
        let index = path.join("model.safetensors.index.json");
        fs::write(
            &index,
            r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}"#,
        )
        .unwrap();
        assert_eq!(BaseModel::open(&path).unwrap().sha256, BaseModel::from_parts(parts()).unwrap().sha256);
        fs::write(&index, r#"{"weight_map": {"x": "../a.safetensors"}}"#).unwrap();
        assert!(BaseModel::open(&path).unwrap_err().to_string().contains("no plain file name"));
    }

    #[test]
    fn refuses_other_computations() {
        let check = |key: &str, value: Value, expected: &str| {
            let error = refused(&stored(&parts()), |settings| settings[key] = value.clone());
            assert!(error.contains(expected) && error.contains("config.json"), "{error}");
        };
        check("model_type", json!("mamba"), "unknown architecture \"mamba\"");
        check("rope_scaling", json!({"type": "linear"}), "rope_scaling");
        check("rope_parameters", json!({"rope_type": "yarn", "factor": 2.0}), "rope_type = yarn");
        check("rope_parameters", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor");
        check("rope_parameters", json!({"rope_theta": 5.0}), "5 in rope_parameters");
        check("hidden_act", json!("gelu"), "gelu");
        check("attention_bias", json!(true), "bias");
        check("num_key_value_heads", json!(3), "kv_heads");
        check("hidden_size", json!("wide"), "malformed: JSON");
    }

    #[test]
    fn refuses_tensors_that_do_not_fit() {
        let embedding = |rows: usize| TensorBytes::f32(TOKEN_EMBEDDING, &[rows, 64], &noise(rows * 64, 1));
        let mut tensors = stored(&parts());
        tensors[0] = embedding(3);
        assert!(refused(&tensors, |_| ()).contains("model.embed_tokens.weight: wrong shape"));
        tensors.remove(0);
        assert!(refused(&tensors, |_| ()).contains("missing tensor model.embed_tokens.weight"));
        let mut tensors = stored(&parts());
        tensors.push(TensorBytes::f32("model.layers.0.self_attn.q_proj.bias", &[64], &[0.0; 64]));
        assert!(refused(&tensors, |_| ()).contains("unexpected tensor"));
        let mut tensors = stored(&parts());
        let rows = parts().config.vocab_size;
        tensors.push(TensorBytes::f32(OUTPUT, &[rows, 64], &noise(rows * 64, 9)));
        assert!(refused(&tensors, |_| ()).contains("tied"));
        let (_home, path) = folder(&tensors, |settings| settings["tie_word_embeddings"] = json!(false));
        assert!(BaseModel::open(&path).unwrap().output.is_some());
    }

    #[test]
    fn a_truncated_file_is_named() {
        let (_home, path) = folder(&stored(&parts()), |_| ());
        let file = path.join("model.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        let error = BaseModel::open(&path).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: malformed"), "{error}");
    }
}
