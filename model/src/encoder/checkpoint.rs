//! A trained classifier and its checkpoint: one safetensors file that says what it is for, so that the encoder and
//! the file are all that a prediction needs. Peft's folder is in `peft.rs`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::config::{EncoderProjection, Pooling};
use super::layout::{ClassifierConfig, ClassifierLayout, EncoderLora};
use super::model::EncoderModel;
use crate::error::AdapterError;
use crate::safetensors::{self, TensorBytes};

const FORMAT: &str = "fleetune-classifier-v1";
const VALUES: &str = "classifier";

/// A classifier's values, what they mean, and the encoder they are for.
#[derive(Debug, Clone)]
pub struct Classifier {
    /// What the values mean.
    pub layout: Arc<ClassifierLayout>,
    /// As long as the layout says.
    pub values: Vec<f32>,
    /// Texts were cut to so many ids.
    pub length_max: usize,
    /// [`EncoderModel::sha256`] of the encoder.
    pub base_sha256: [u8; 32],
}

/// The settings as the checkpoint holds them, as JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    labels: Vec<String>,
    pooling: String,
    length_max: usize,
    init_seed: u64,
    lora: Option<LoraSettings>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoraSettings {
    rank: usize,
    alpha: f32,
    targets: Vec<String>,
    freeze_a: bool,
}

impl Classifier {
    /// Takes values in the layout's order, for that encoder.
    ///
    /// # Errors
    /// [`AdapterError::WrongLength`], [`AdapterError::NonFinite`], or [`AdapterError::Config`] for a `length_max`
    /// that the encoder has no positions for.
    pub fn new(
        model: &EncoderModel,
        layout: Arc<ClassifierLayout>,
        values: Vec<f32>,
        length_max: usize,
    ) -> Result<Self, AdapterError> {
        if values.len() != layout.len() {
            return Err(AdapterError::WrongLength { expected: layout.len(), found: values.len() });
        }
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(AdapterError::NonFinite { index });
        }
        let most = model.config().positions;
        if !(2..=most).contains(&length_max) {
            let reason = format!("{length_max} is not in 2..={most}");
            return Err(AdapterError::Config { field: "length_max", reason });
        }
        Ok(Self { layout, values, length_max, base_sha256: model.sha256() })
    }

    /// The checkpoint; equal classifiers give equal bytes.
    #[must_use]
    pub fn to_checkpoint_bytes(&self) -> Vec<u8> {
        let layout = hex::encode(self.layout.sha256());
        let base = hex::encode(self.base_sha256);
        let settings = Settings::of(self.layout.config(), self.length_max);
        let settings = serde_json::to_string(&settings).expect("texts and finite numbers are JSON");
        let metadata =
            [("format", FORMAT), ("base_sha256", &base), ("layout_sha256", &layout), ("settings", &settings)];
        safetensors::encode(&metadata, &[TensorBytes::f32(VALUES, &[self.values.len()], &self.values)])
    }

    /// Reads a checkpoint that is for that encoder.
    ///
    /// # Errors
    /// [`AdapterError::BaseMismatch`] for another encoder's, [`AdapterError::LayoutMismatch`] where settings and
    /// hash disagree, and others when the bytes are not such a file or hold values that are not finite.
    pub fn from_checkpoint_bytes(model: &EncoderModel, bytes: &[u8]) -> Result<Self, AdapterError> {
        let file = safetensors::decode(bytes).map_err(|reason| malformed("checkpoint", reason))?;
        if file.metadata("format") != Some(FORMAT) {
            return Err(malformed("format", format!("expected {FORMAT}")));
        }
        let expected = hex::encode(model.sha256());
        let found = file.metadata("base_sha256").unwrap_or("none");
        if found != expected {
            return Err(AdapterError::BaseMismatch { expected, found: found.to_owned() });
        }
        let settings: Settings = serde_json::from_str(file.metadata("settings").unwrap_or_default())
            .map_err(|error| malformed("settings", error.to_string()))?;
        let length_max = settings.length_max;
        let layout = ClassifierLayout::new(model.config(), &settings.into_config()?)?;
        let (expected, found) =
            (hex::encode(layout.sha256()), file.metadata("layout_sha256").unwrap_or("none"));
        if found != expected {
            return Err(AdapterError::LayoutMismatch { expected, found: found.to_owned() });
        }
        let (_, values) = file.f32(VALUES).map_err(|reason| malformed(VALUES, reason))?;
        Self::new(model, Arc::new(layout), values, length_max)
    }

    /// Hash of the checkpoint's bytes: the classifier's name.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.to_checkpoint_bytes()).into()
    }
}

impl Settings {
    fn of(config: &ClassifierConfig, length_max: usize) -> Self {
        let lora = config.lora.as_ref().map(|lora| LoraSettings {
            rank: lora.rank,
            alpha: lora.alpha,
            targets: lora.targets.iter().map(|target| target.name().to_owned()).collect(),
            freeze_a: lora.freeze_a,
        });
        Self {
            labels: config.labels.clone(),
            pooling: config.pooling.name().to_owned(),
            length_max,
            init_seed: config.init_seed,
            lora,
        }
    }

    fn into_config(self) -> Result<ClassifierConfig, AdapterError> {
        let pooling = Pooling::from_name(&self.pooling)
            .ok_or_else(|| malformed("pooling", format!("{:?} is unknown", self.pooling)))?;
        let target = |name: &String| {
            EncoderProjection::from_name(name)
                .ok_or_else(|| malformed("targets", format!("{name:?} is unknown")))
        };
        let lora = |lora: LoraSettings| -> Result<EncoderLora, AdapterError> {
            let targets = lora.targets.iter().map(target).collect::<Result<_, _>>()?;
            Ok(EncoderLora { rank: lora.rank, alpha: lora.alpha, targets, freeze_a: lora.freeze_a })
        };
        Ok(ClassifierConfig {
            labels: self.labels,
            pooling,
            lora: self.lora.map(lora).transpose()?,
            init_seed: self.init_seed,
        })
    }
}

fn malformed(what: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Malformed { what: what.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::fixtures::{classifier_config, counted, tiny_model};
    use crate::weights::WeightFormat;

    #[test]
    fn comes_back_from_its_checkpoint() {
        let model = tiny_model();
        for freeze_a in [false, true] {
            let config = classifier_config(&[EncoderProjection::Value, EncoderProjection::Output], freeze_a);
            let classifier = counted(&model, &config);
            let bytes = classifier.to_checkpoint_bytes();
            let back = Classifier::from_checkpoint_bytes(&model, &bytes).unwrap();
            assert_eq!(back.layout, classifier.layout);
            assert_eq!((back.values, back.length_max), (classifier.values, classifier.length_max));
        }
        let head_only =
            ClassifierConfig { lora: None, ..classifier_config(&[EncoderProjection::Key], false) };
        let bytes = counted(&model, &head_only).to_checkpoint_bytes();
        assert_eq!(Classifier::from_checkpoint_bytes(&model, &bytes).unwrap().layout.config(), &head_only);
    }

    #[test]
    fn refuses_what_is_not_for_the_encoder() {
        let model = tiny_model();
        let classifier = counted(&model, &classifier_config(&[EncoderProjection::Query], false));
        let bytes = classifier.to_checkpoint_bytes();
        let other = model.in_format(WeightFormat::Q8_0).unwrap();
        let error = Classifier::from_checkpoint_bytes(&other, &bytes).unwrap_err();
        assert!(matches!(error, AdapterError::BaseMismatch { .. }), "{error}");
        for cut in [0, 7, 100, bytes.len() - 1] {
            assert!(Classifier::from_checkpoint_bytes(&model, &bytes[..cut]).is_err());
        }
        let replaced = |from: &[u8], to: &[u8]| {
            assert_eq!(from.len(), to.len());
            let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
            let mut bytes = bytes.clone();
            bytes[at..at + to.len()].copy_from_slice(to);
            Classifier::from_checkpoint_bytes(&model, &bytes).unwrap_err().to_string()
        };
        assert!(replaced(b"hamlet", b"macduf").contains("layout"));
        assert!(replaced(b"classifier-v1", b"classifier-v2").contains("format"));
        assert!(replaced(b"mean", b"mode").contains("pooling"));
        assert!(replaced(b"length_max", b"length_min").contains("settings"));
    }

    #[test]
    fn refuses_values_that_do_not_fit() {
        let model = tiny_model();
        let Classifier { layout, mut values, .. } =
            counted(&model, &classifier_config(&[EncoderProjection::Query], false));
        let make = |values: &[f32], length_max| {
            Classifier::new(&model, Arc::clone(&layout), values.to_vec(), length_max).unwrap_err()
        };
        assert!(matches!(make(&values[1..], 64), AdapterError::WrongLength { .. }));
        assert!(matches!(make(&values, 65), AdapterError::Config { field: "length_max", .. }));
        values[5] = f32::NAN;
        assert!(matches!(make(&values, 64), AdapterError::NonFinite { index: 5 }));
    }
}
