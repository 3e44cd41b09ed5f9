//! PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`, with B of Q and K in Hugging Face
//! row order.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{StoredPair, adapter_of_pairs, malformed};
use crate::adapter::Adapter;
use crate::config::{ModelConfig, Projection};
use crate::error::AdapterError;
use crate::rotary;
use crate::safetensors::{self, TensorBytes, TensorFile};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.model.layers.";

/// The two files of a PEFT folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeftFiles {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`.
    pub weights: Vec<u8>,
}

/// Writes an adapter as PEFT does; `base_name` is where PEFT will look for the model. A frozen A is written
/// like a trained one.
#[must_use]
pub fn to_peft(adapter: &Adapter, model: &ModelConfig, base_name: &str) -> PeftFiles {
    let mut tensors = Vec::new();
    for layer in 0..model.layers {
        for &projection in &adapter.layout.config().targets {
            tensors.extend(pair_tensors(adapter, model, layer, projection));
        }
    }
    let config = format!("{:#}\n", config_json(adapter, base_name));
    PeftFiles { config: config.into_bytes(), weights: safetensors::encode(&[("format", "pt")], &tensors) }
}

/// Reads an adapter as PEFT writes it, for that model. The result's A is trainable.
///
/// # Errors
/// [`AdapterError::Malformed`] for broken files, features other than plain LoRA or rsLoRA, and tensors that
/// do not fit the model.
pub fn from_peft(files: &PeftFiles, model: &ModelConfig) -> Result<Adapter, AdapterError> {
    let config: PeftConfig =
        serde_json::from_slice(&files.config).map_err(|error| malformed(CONFIG_FILE, error.to_string()))?;
    config.refuse_other_methods()?;
    let file = safetensors::decode(&files.weights).map_err(|reason| malformed(WEIGHTS_FILE, reason))?;
    let adapter = adapter_of_pairs(model, config.effective_alpha(), read_pairs(&file, model)?)?;
    let rank = adapter.layout.config().rank;
    if rank != config.r {
        return Err(malformed("r", format!("{} announced, the tensors have {rank}", config.r)));
    }
    Ok(adapter)
}

/// Writes the two files into a folder, which is made if it is not there.
///
/// # Errors
/// [`AdapterError::Io`].
pub fn write_peft_dir(files: &PeftFiles, folder: &Path) -> Result<(), AdapterError> {
    let at = |path: &Path, source| AdapterError::Io { path: path.to_owned(), source };
    fs::create_dir_all(folder).map_err(|source| at(folder, source))?;
    for (name, bytes) in [(CONFIG_FILE, &files.config), (WEIGHTS_FILE, &files.weights)] {
        let path = folder.join(name);
        fs::write(&path, bytes).map_err(|source| at(&path, source))?;
    }
    Ok(())
}

/// Reads the two files of a folder.
///
/// # Errors
/// [`AdapterError::Io`].
pub fn read_peft_dir(folder: &Path) -> Result<PeftFiles, AdapterError> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|source| AdapterError::Io { path, source })
    };
    Ok(PeftFiles { config: read(CONFIG_FILE)?, weights: read(WEIGHTS_FILE)? })
}

fn pair_tensors(
    adapter: &Adapter,
    model: &ModelConfig,
    layer: usize,
    projection: Projection,
) -> [TensorBytes; 2] {
    let rank = adapter.layout.config().rank;
    let (out, cols_in) = projection.shape(model);
    let b = adapter.factor_b(layer, projection);
    let b = match projection.reordered_heads(model) {
        Some(heads) => rotary::to_hugging_face(b, out, heads),
        None => b.to_vec(),
    };
    [
        TensorBytes::f32(
            &tensor_name(layer, projection, "A"),
            &[rank, cols_in],
            &adapter.factor_a(layer, projection),
        ),
        TensorBytes::f32(&tensor_name(layer, projection, "B"), &[out, rank], &b),
    ]
}

fn tensor_name(layer: usize, projection: Projection, factor: &str) -> String {
    format!("{PREFIX}{layer}.{}.lora_{factor}.weight", projection.hugging_face_name())
}

fn config_json(adapter: &Adapter, base_name: &str) -> Value {
    let config = adapter.layout.config();
    let modules: Vec<_> = config.targets.iter().map(|&target| module_name(target)).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": null,
        "target_modules": modules,
    })
}

/// The last part of the Hugging Face name, as in `q_proj`.
fn module_name(projection: Projection) -> &'static str {
    let name = projection.hugging_face_name();
    name.split_once('.').map_or(name, |(_, module)| module)
}

/// The fields that decide what the adapter computes; `target_modules` is left to the tensors that are there.
#[derive(Deserialize)]
pub(crate) struct PeftConfig {
    peft_type: String,
    pub(crate) r: usize,
    lora_alpha: f32,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    use_rslora: bool,
    /// Every other field.
    #[serde(flatten)]
    pub(crate) others: BTreeMap<String, Value>,
}

/// Fields of other methods, which must be null, false or empty.
const OFF: [&str; 15] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];
/// First values that leave the base as it is; others (PiSSA, OLoRA, LoftQ..) are adapters to a changed base.
const INITS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

impl PeftConfig {
    pub(crate) fn refuse_other_methods(&self) -> Result<(), AdapterError> {
        let off = |field: &&str| match self.others.get(*field) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Bool(true) | Value::Number(_) | Value::String(_)) => false,
        };
        if let Some(field) = OFF.into_iter().find(|field| !off(field)) {
            return Err(malformed(field, "only null, false or an empty value is supported"));
        }
        let init = self.others.get("init_lora_weights").and_then(Value::as_str);
        let rules = [
            ("peft_type", self.peft_type == "LORA", "only LORA is supported"),
            ("bias", self.bias.as_deref().is_none_or(|bias| bias == "none"), "only none is supported"),
            (
                "init_lora_weights",
                init.is_none_or(|init| INITS.contains(&init)),
                "it names a way that changes the base model",
            ),
        ];
        match rules.iter().find(|(_, holds, _)| !holds) {
            Some((field, _, rule)) => Err(malformed(field, *rule)),
            None => Ok(()),
        }
    }

    /// rsLoRA scales by alpha over the root of the rank; as alpha over the rank that is alpha times the root.
    pub(crate) fn effective_alpha(&self) -> f32 {
        if self.use_rslora { self.lora_alpha * (self.r as f32).sqrt() } else { self.lora_alpha }
    }
}

fn read_pairs(file: &TensorFile<'_>, model: &ModelConfig) -> Result<Vec<StoredPair>, AdapterError> {
    let mut halves: BTreeMap<(usize, Projection), Vec<(&str, &str)>> = BTreeMap::new();
    for name in file.names() {
        let (layer, projection, factor) =
            parse_name(name).ok_or_else(|| malformed(name, "unknown tensor"))?;
        halves.entry((layer, projection)).or_default().push((factor, name));
    }
    let pair = |((layer, projection), names): ((usize, Projection), Vec<(&str, &str)>)| {
        let [("A", a), ("B", b)] = *names.as_slice() else {
            return Err(malformed(names[0].1, "its other factor is missing"));
        };
        let read = |name: &str| file.f32(name).map_err(|reason| malformed(name, reason));
        let b = to_gguf_order(read(b)?, model, projection).map_err(|reason| malformed(b, reason))?;
        Ok(StoredPair { layer, projection, a: read(a)?, b })
    };
    halves.into_iter().map(pair).collect()
}

fn to_gguf_order(
    (shape, values): (Vec<usize>, Vec<f32>),
    model: &ModelConfig,
    projection: Projection,
) -> Result<(Vec<usize>, Vec<f32>), String> {
    let Some(heads) = projection.reordered_heads(model) else { return Ok((shape, values)) };
    let rows = projection.shape(model).0;
    if shape.first() != Some(&rows) {
        return Err(format!("expected {rows} rows, found shape {shape:?}"));
    }
    Ok((shape, rotary::to_gguf(&values, rows, heads)))
}

fn parse_name(name: &str) -> Option<(usize, Projection, &str)> {
    let (layer, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    let (module, factor) = rest.strip_suffix(".weight")?.rsplit_once(".lora_")?;
    let projection =
        Projection::ALL.into_iter().find(|projection| projection.hugging_face_name() == module)?;
    Some((layer.parse().ok()?, projection, factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::tests::counted;
    use crate::config::tests::tiny;

    fn spoilt(spoil: impl Fn(&mut Value)) -> String {
        let mut files = to_peft(&counted(&[Projection::Q], false), &tiny(), "tiny");
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        spoil(&mut config);
        files.config = config.to_string().into_bytes();
        from_peft(&files, &tiny()).unwrap_err().to_string()
    }

    #[test]
    fn round_trips_on_all_projections() {
        let adapter = counted(&Projection::ALL, false);
        let files = to_peft(&adapter, &tiny(), "tiny");
        assert_eq!(files, to_peft(&adapter, &tiny(), "tiny"));
        let back = from_peft(&files, &tiny()).unwrap();
        assert_eq!(back.values, adapter.values);
        assert_eq!(back.layout.sha256(), adapter.layout.sha256());
    }

    #[test]
    fn rows_of_q_are_in_hugging_face_order() {
        let adapter = counted(&[Projection::Q, Projection::V], false);
        let files = to_peft(&adapter, &tiny(), "tiny");
        let file = safetensors::decode(&files.weights).unwrap();
        let (shape, q) = file.f32("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight").unwrap();
        assert_eq!(shape, [64, 4]);
        let gguf = adapter.factor_b(1, Projection::Q);
        assert_eq!(q[4..8], gguf[8..12], "row 1 is row 2 of the head");
        assert_eq!(q[8 * 4..9 * 4], gguf[4..8], "row 8 is row 1");
        let (_, v) = file.f32("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight").unwrap();
        assert_eq!(v, adapter.factor_b(1, Projection::V));
        assert_eq!(file.metadata("format"), Some("pt"));
    }

    #[test]
    fn a_frozen_a_is_written_out() {
        let frozen = counted(&[Projection::V], true);
        let back = from_peft(&to_peft(&frozen, &tiny(), "tiny"), &tiny()).unwrap();
        assert_eq!(back.factor_a(1, Projection::V), frozen.factor_a(1, Projection::V));
        assert_eq!(back.factor_b(1, Projection::V), frozen.factor_b(1, Projection::V));
    }

    #[test]
    fn rslora_becomes_an_equal_scale() {
        let mut files = to_peft(&counted(&[Projection::V], false), &tiny(), "tiny");
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        config["use_rslora"] = json!(true);
        files.config = config.to_string().into_bytes();
        assert_eq!(from_peft(&files, &tiny()).unwrap().layout.config().scale(), 8.0 / 2.0);
    }

    #[test]
    fn refuses_what_it_cannot_compute() {
        assert!(spoilt(|config| config["use_dora"] = json!(true)).contains("use_dora"));
        assert!(spoilt(|config| config["peft_type"] = json!("IA3")).contains("peft_type"));
        assert!(spoilt(|config| config["bias"] = json!("all")).contains("bias"));
        assert!(spoilt(|config| config["modules_to_save"] = json!(["lm_head"])).contains("modules_to_save"));
        assert!(spoilt(|config| config["rank_pattern"] = json!({"q_proj": 2})).contains("rank_pattern"));
        assert!(spoilt(|config| config["init_lora_weights"] = json!("pissa_niter_4")).contains("init_lora"));
        assert!(spoilt(|config| config["alora_invocation_tokens"] = json!([1])).contains("alora"));
        assert!(spoilt(|config| config["use_qalora"] = json!(true)).contains("use_qalora"));
        assert!(spoilt(|config| config["r"] = json!(8)).contains("tensors have 4"));
        assert!(spoilt(|config| config["lora_alpha"] = json!("x")).contains(CONFIG_FILE));
    }

    #[test]
    fn refuses_tensors_that_do_not_fit() {
        let check = |name: &str, shape: &[usize], expected: &str| {
            let mut files = to_peft(&counted(&[Projection::Q], false), &tiny(), "tiny");
            let values = vec![0.0; shape.iter().product()];
            let tensors = [TensorBytes::f32(name, shape, &values)];
            files.weights = safetensors::encode(&[], &tensors);
            let error = from_peft(&files, &tiny()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("base_model.model.lm_head.lora_A.weight", &[4, 64], "unknown tensor");
        check("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[4, 64], "other factor");
        let pair = |shape: &[usize]| {
            let name = |factor| format!("{PREFIX}0.self_attn.q_proj.lora_{factor}.weight");
            let a = TensorBytes::f32(&name("A"), &[4, 64], &[0.0; 256]);
            let b = TensorBytes::f32(&name("B"), shape, &vec![0.0; shape.iter().product()]);
            let files = PeftFiles {
                config: to_peft(&counted(&[Projection::Q], false), &tiny(), "tiny").config,
                weights: safetensors::encode(&[], &[a, b]),
            };
            from_peft(&files, &tiny()).unwrap_err().to_string()
        };
        let empty = TensorBytes::f32(&format!("{PREFIX}0.self_attn.v_proj.lora_A.weight"), &[512, 0], &[]);
        let also = TensorBytes::f32(&format!("{PREFIX}0.self_attn.v_proj.lora_B.weight"), &[0, 512], &[]);
        let files = PeftFiles {
            config: to_peft(&counted(&[Projection::Q], false), &tiny(), "tiny").config,
            weights: safetensors::encode(&[], &[empty, also]),
        };
        let error = from_peft(&files, &tiny()).unwrap_err().to_string();
        assert!(error.contains("expected shape [512, 64], found [512, 0]"), "{error}");
        assert!(pair(&[32, 4]).contains("expected 64 rows"));
        assert!(pair(&[64, 3]).contains("expected shape [64, 4]"));
        assert!(pair(&[64, 4]).contains("some layers lack"));
    }

    #[test]
    fn folders_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let files = to_peft(&counted(&[Projection::Q], false), &tiny(), "tiny");
        let path = folder.path().join("adapter");
        write_peft_dir(&files, &path).unwrap();
        assert_eq!(read_peft_dir(&path).unwrap(), files);
        assert!(matches!(read_peft_dir(folder.path()), Err(AdapterError::Io { .. })));
    }
}
