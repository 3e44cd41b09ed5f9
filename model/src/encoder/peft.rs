//! Peft's folder of a classifier (`task_type` SEQ_CLS): `adapter_config.json`, `adapter_model.safetensors` with
//! LoRA's factors and the head, and a file of our own for what peft has no place for.
//!
//! `BertForSequenceClassification` pools with the model's pooler, so only a classifier that does too gives the same
//! logits there. A classifier that pools by mean or cls is written all the same; `fleetune_classifier.json` says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::checkpoint::Classifier;
use super::config::{EncoderProjection, Pooling};
use super::layout::{ClassifierConfig, ClassifierLayout, EncoderLora};
use super::model::EncoderModel;
use crate::adapter::Factor;
use crate::adapter_formats::peft::PeftConfig;
use crate::error::AdapterError;
use crate::safetensors::{self, TensorBytes, TensorFile};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const OWN_FILE: &str = "fleetune_classifier.json";
const LAYERS: &str = "base_model.model.bert.encoder.layer.";
const HEAD_WEIGHT: &str = "base_model.model.classifier.weight";
const HEAD_BIAS: &str = "base_model.model.classifier.bias";

/// The files of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassifierPeft {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`.
    pub weights: Vec<u8>,
    /// `fleetune_classifier.json`, which peft does not write.
    pub own: Option<Vec<u8>>,
}

/// What peft has no place for.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    labels: Vec<String>,
    pooling: String,
    length_max: usize,
}

/// Writes a classifier as peft does; `base_name` is where peft will look for the model. A frozen A is written like a
/// trained one.
///
/// # Errors
/// [`AdapterError::Config`] for a head without LoRA, which peft cannot load.
pub fn to_peft(classifier: &Classifier, base_name: &str) -> Result<ClassifierPeft, AdapterError> {
    let (layout, values) = (&classifier.layout, &classifier.values);
    let config = layout.config();
    let Some(lora) = &config.lora else {
        let reason = "peft loads no head without LoRA".to_owned();
        return Err(AdapterError::Config { field: "targets", reason });
    };
    let mut tensors = Vec::new();
    for entry in layout.entries() {
        let super::Part::Low { layer, projection, factor: Factor::B } = entry.part else { continue };
        let a = match layout.find(layer, projection, Factor::A) {
            Some(range) => values[range].to_vec(),
            None => layout.initial_a(layer, projection),
        };
        let shape = [lora.rank, a.len() / lora.rank];
        tensors.push(TensorBytes::f32(&low_name(layer, projection, "A"), &shape, &a));
        let shape = [entry.rows, entry.cols];
        tensors.push(TensorBytes::f32(&low_name(layer, projection, "B"), &shape, &values[entry.range()]));
    }
    let (weight, bias) = (layout.head_weight(), layout.head_bias());
    let shape = [layout.classes(), weight.len() / layout.classes()];
    tensors.push(TensorBytes::f32(HEAD_WEIGHT, &shape, &values[weight]));
    tensors.push(TensorBytes::f32(HEAD_BIAS, &[bias.len()], &values[bias]));
    let own = Own {
        labels: config.labels.clone(),
        pooling: config.pooling.name().to_owned(),
        length_max: classifier.length_max,
    };
    let own = serde_json::to_vec_pretty(&own).expect("texts and numbers are JSON");
    Ok(ClassifierPeft {
        config: format!("{:#}\n", config_json(lora, base_name)).into_bytes(),
        weights: safetensors::encode(&[("format", "pt")], &tensors),
        own: Some(own),
    })
}

/// Reads a classifier as peft writes it, for that encoder; A becomes trainable. Without the file of our own, pooling
/// is that of `BertForSequenceClassification`, labels are `LABEL_0`.., and texts may be as long as the encoder allows.
///
/// # Errors
/// [`AdapterError::Malformed`] for broken files, features other than plain LoRA or rsLoRA with a trained head, and
/// tensors that do not fit.
pub fn from_peft(files: &ClassifierPeft, model: &EncoderModel) -> Result<Classifier, AdapterError> {
    let mut config: PeftConfig =
        serde_json::from_slice(&files.config).map_err(|error| malformed(CONFIG_FILE, error.to_string()))?;
    check_task(&mut config)?;
    config.refuse_other_methods()?;
    let file = safetensors::decode(&files.weights).map_err(|reason| malformed(WEIGHTS_FILE, reason))?;
    let places = Places::of(&file)?;
    let (head_shape, head) = read(&file, HEAD_WEIGHT)?;
    let classes = head_shape.first().copied().unwrap_or_default();
    let own = own_settings(files.own.as_deref(), model, classes)?;
    let lora = EncoderLora {
        rank: config.r,
        alpha: config.effective_alpha(),
        targets: places.targets.clone(),
        freeze_a: false,
    };
    let pooling = Pooling::from_name(&own.pooling)
        .ok_or_else(|| malformed(OWN_FILE, format!("pooling {:?} is unknown", own.pooling)))?;
    let settings = ClassifierConfig { labels: own.labels, pooling, lora: Some(lora), init_seed: 0 };
    let layout = ClassifierLayout::new(model.config(), &settings)?;
    let mut values = vec![0.0; layout.len()];
    let mut filled = 0;
    for (name, (layer, projection, factor)) in &places.names {
        let range = layout.find(*layer, *projection, *factor);
        let range = range.ok_or_else(|| malformed(name, "the model has no such layer"))?;
        let entry = layout.entries().iter().find(|entry| entry.offset == range.start);
        let expected = entry.map_or([0; 2], |entry| [entry.rows, entry.cols]);
        values[range].copy_from_slice(&shaped(read(&file, name)?, &expected, name)?);
        filled += 1;
    }
    if filled + 2 != layout.entries().len() {
        return Err(malformed("tensors", "some layers lack projections that others have"));
    }
    let expected = [layout.classes(), model.config().hidden];
    values[layout.head_weight()].copy_from_slice(&shaped((head_shape, head), &expected, HEAD_WEIGHT)?);
    values[layout.head_bias()].copy_from_slice(&shaped(read(&file, HEAD_BIAS)?, &expected[..1], HEAD_BIAS)?);
    Classifier::new(model, Arc::new(layout), values, own.length_max)
}

/// Writes the files into a folder, which is made if it is not there.
///
/// # Errors
/// [`AdapterError::Io`].
pub fn write_peft_dir(files: &ClassifierPeft, folder: &Path) -> Result<(), AdapterError> {
    let at = |path: &Path, source| AdapterError::Io { path: path.to_owned(), source };
    fs::create_dir_all(folder).map_err(|source| at(folder, source))?;
    let own = files.own.as_ref().map(|own| (OWN_FILE, own));
    for (name, bytes) in [(CONFIG_FILE, &files.config), (WEIGHTS_FILE, &files.weights)].into_iter().chain(own)
    {
        let path = folder.join(name);
        fs::write(&path, bytes).map_err(|source| at(&path, source))?;
    }
    Ok(())
}

/// Reads the files of a folder.
///
/// # Errors
/// [`AdapterError::Io`].
pub fn read_peft_dir(folder: &Path) -> Result<ClassifierPeft, AdapterError> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|source| AdapterError::Io { path, source })
    };
    let own = folder.join(OWN_FILE).exists().then(|| read(OWN_FILE)).transpose()?;
    Ok(ClassifierPeft { config: read(CONFIG_FILE)?, weights: read(WEIGHTS_FILE)?, own })
}

fn low_name(layer: usize, projection: EncoderProjection, factor: &str) -> String {
    format!("{LAYERS}{layer}.{}.lora_{factor}.weight", projection.hugging_face_name())
}

fn config_json(lora: &EncoderLora, base_name: &str) -> Value {
    // A pattern for whole names: by their last parts, `output.dense` would be two projections.
    let names: Vec<String> =
        lora.targets.iter().map(|target| target.hugging_face_name().replace('.', r"\.")).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": ["classifier"],
        "target_modules": format!(r"bert\.encoder\.layer\.\d+\.({})", names.join("|")),
    })
}

/// The head is the only module that may be saved whole.
fn check_task(config: &mut PeftConfig) -> Result<(), AdapterError> {
    let saved = config.others.remove("modules_to_save").unwrap_or_default();
    let names: Vec<&str> = saved.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    // Peft lists both names that transformers gives to heads.
    if !names.contains(&"classifier") || names.iter().any(|name| !["classifier", "score"].contains(name)) {
        return Err(malformed("modules_to_save", format!("must be the classifier alone, found {saved}")));
    }
    match config.others.get("task_type").and_then(Value::as_str) {
        Some("SEQ_CLS") => Ok(()),
        found => Err(malformed("task_type", format!("must be SEQ_CLS, found {}", found.unwrap_or("none")))),
    }
}

fn own_settings(own: Option<&[u8]>, model: &EncoderModel, classes: usize) -> Result<Own, AdapterError> {
    let Some(own) = own else {
        return Ok(Own {
            labels: (0..classes).map(|class| format!("LABEL_{class}")).collect(),
            pooling: Pooling::Pooler.name().to_owned(),
            length_max: model.config().positions,
        });
    };
    serde_json::from_slice(own).map_err(|error| malformed(OWN_FILE, error.to_string()))
}

/// Which tensor is which factor.
struct Places<'a> {
    names: BTreeMap<&'a str, (usize, EncoderProjection, Factor)>,
    targets: Vec<EncoderProjection>,
}

impl<'a> Places<'a> {
    fn of(file: &'a TensorFile<'_>) -> Result<Self, AdapterError> {
        let mut places = Self { names: BTreeMap::new(), targets: Vec::new() };
        for name in file.names() {
            if [HEAD_WEIGHT, HEAD_BIAS].contains(&name) {
                continue;
            }
            let place = parse_name(name).ok_or_else(|| malformed(name, "unknown tensor"))?;
            places.targets.push(place.1);
            places.names.insert(name, place);
        }
        places.targets.sort_unstable();
        places.targets.dedup();
        Ok(places)
    }
}

fn parse_name(name: &str) -> Option<(usize, EncoderProjection, Factor)> {
    let (layer, rest) = name.strip_prefix(LAYERS)?.split_once('.')?;
    let (module, factor) = rest.strip_suffix(".weight")?.rsplit_once(".lora_")?;
    let projection =
        EncoderProjection::ALL.into_iter().find(|projection| projection.hugging_face_name() == module)?;
    let layer: usize = layer.parse().ok()?;
    match factor {
        "A" => Some((layer, projection, Factor::A)),
        "B" => Some((layer, projection, Factor::B)),
        _ => None,
    }
}

fn read(file: &TensorFile<'_>, name: &str) -> Result<(Vec<usize>, Vec<f32>), AdapterError> {
    file.f32(name).map_err(|reason| malformed(name, reason))
}

fn shaped(
    (shape, values): (Vec<usize>, Vec<f32>),
    expected: &[usize],
    name: &str,
) -> Result<Vec<f32>, AdapterError> {
    if shape == expected {
        return Ok(values);
    }
    Err(malformed(name, format!("expected shape {expected:?}, found {shape:?}")))
}

fn malformed(what: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Malformed { what: what.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::fixtures::{classifier_config, counted, tiny_model};

    fn spoilt(spoil: impl Fn(&mut Value)) -> String {
        let model = tiny_model();
        let mut files =
            to_peft(&counted(&model, &classifier_config(&[EncoderProjection::Query], false)), "x").unwrap();
        let mut config: Value = serde_json::from_slice(&files.config).unwrap();
        spoil(&mut config);
        files.config = config.to_string().into_bytes();
        from_peft(&files, &model).unwrap_err().to_string()
    }

    #[test]
    fn round_trips_on_all_projections() {
        let model = tiny_model();
        let classifier = counted(&model, &classifier_config(&EncoderProjection::ALL, false));
        let files = to_peft(&classifier, "tiny").unwrap();
        let back = from_peft(&files, &model).unwrap();
        assert_eq!(back.values, classifier.values);
        assert_eq!(back.layout.sha256(), classifier.layout.sha256());
        assert_eq!(back.length_max, classifier.length_max);
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("new");
        write_peft_dir(&files, &folder).unwrap();
        assert_eq!(read_peft_dir(&folder).unwrap(), files);
        assert!(read_peft_dir(home.path()).unwrap_err().to_string().contains("adapter_config.json"));
    }

    #[test]
    fn a_frozen_a_is_written_out() {
        let model = tiny_model();
        let frozen = counted(&model, &classifier_config(&[EncoderProjection::Value], true));
        let back = from_peft(&to_peft(&frozen, "tiny").unwrap(), &model).unwrap();
        let a = back.layout.find(1, EncoderProjection::Value, Factor::A).unwrap();
        assert_eq!(back.values[a], frozen.layout.initial_a(1, EncoderProjection::Value));
    }

    #[test]
    fn refuses_other_methods_and_broken_files() {
        for (field, value) in [
            ("task_type", json!("CAUSAL_LM")),
            ("modules_to_save", Value::Null),
            ("modules_to_save", json!(["classifier", "pooler"])),
            ("use_dora", json!(true)),
            ("peft_type", json!("IA3")),
        ] {
            let error = spoilt(|config| config[field] = value.clone());
            assert!(error.contains(field), "{error}");
        }
        assert!(spoilt(|config| config["r"] = json!(5)).contains("shape"));
        let model = tiny_model();
        let head_only =
            ClassifierConfig { lora: None, ..classifier_config(&[EncoderProjection::Key], false) };
        assert!(
            to_peft(&counted(&model, &head_only), "x").unwrap_err().to_string().contains("no head without")
        );
        let files =
            to_peft(&counted(&model, &classifier_config(&[EncoderProjection::Key], false)), "x").unwrap();
        let cut = ClassifierPeft { weights: files.weights[..100].to_vec(), ..files.clone() };
        assert!(from_peft(&cut, &model).unwrap_err().to_string().contains(WEIGHTS_FILE));
        let own = ClassifierPeft { own: Some(b"{}".to_vec()), ..files };
        assert!(from_peft(&own, &model).unwrap_err().to_string().contains(OWN_FILE));
    }
}
