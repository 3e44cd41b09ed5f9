//! What a task trains, as one flat vector: a LoRA adapter over a frozen base (`adapter.rs`), or every weight of a small
//! model (`full/layout.rs`). Who clips, sums or keeps the vector need not know which.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::adapter::{Adapter, AdapterLayout, LoraConfig};
use crate::base::BaseModel;
use crate::error::AdapterError;
use crate::full::{FullLayout, FullTrainer};
use crate::safetensors::{self, TensorBytes};
use crate::train::{LoraTrainer, TrainError, Trainer, TrainerOptions};
use crate::weights::WeightFormat;

const CHECKPOINT_FORMAT: &str = "fleetune-full-v1";

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum TrainedConfig {
    /// An adapter; the base stays as it is.
    Lora(LoraConfig),
    /// All weights; the base says where they start.
    Full,
}

/// The meaning of every value of the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub enum TrainedLayout {
    /// Of an adapter.
    Lora(Arc<AdapterLayout>),
    /// Of all weights.
    Full(Arc<FullLayout>),
}

/// A model ready to run.
#[derive(Debug, Clone)]
pub struct TrainedModel {
    /// The frozen base of an adapter, or the trained model itself.
    pub base: Arc<BaseModel>,
    /// The adapter beside it.
    pub adapter: Option<Adapter>,
}

impl TrainedLayout {
    /// Lays out what is trained of that base.
    ///
    /// # Errors
    /// [`AdapterError::Config`] for an adapter out of range, [`AdapterError::Gguf`] for a base that is not trained
    /// fully.
    pub fn new(base: &BaseModel, config: &TrainedConfig) -> Result<Self, AdapterError> {
        match config {
            TrainedConfig::Lora(lora) => Ok(Self::Lora(Arc::new(AdapterLayout::new(&base.config, lora)?))),
            TrainedConfig::Full => Ok(Self::Full(Arc::new(FullLayout::of_base(base)?))),
        }
    }

    /// Values in the flat vector.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "neither layout can be empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::Lora(layout) => layout.len(),
            Self::Full(layout) => layout.len(),
        }
    }

    /// Hash of all that gives the values their meaning.
    #[must_use]
    pub fn sha256(&self) -> [u8; 32] {
        match self {
            Self::Lora(layout) => layout.sha256(),
            Self::Full(layout) => layout.sha256(),
        }
    }

    /// The values that training starts from: an adapter that changes nothing, or the base's own weights.
    #[must_use]
    pub fn initial_values(&self, base: &BaseModel) -> Vec<f32> {
        match self {
            Self::Lora(layout) => Adapter::init(Arc::clone(layout)).values,
            Self::Full(layout) => layout.values_of(base),
        }
    }

    /// Refuses a vector of another length, or with a value that is no number.
    ///
    /// # Errors
    /// [`AdapterError::WrongLength`] or [`AdapterError::NonFinite`].
    pub fn check(&self, values: &[f32]) -> Result<(), AdapterError> {
        if values.len() != self.len() {
            return Err(AdapterError::WrongLength { expected: self.len(), found: values.len() });
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(AdapterError::NonFinite { index }),
            None => Ok(()),
        }
    }

    /// The checkpoint: a safetensors file with one F32 tensor and the layout's hash; equal values give equal bytes.
    #[must_use]
    pub fn to_checkpoint_bytes(&self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::Lora(layout) => {
                Adapter { layout: Arc::clone(layout), values: values.to_vec() }.to_checkpoint_bytes()
            }
            Self::Full(layout) => {
                let hash = hex::encode(layout.sha256());
                let metadata = [("format", CHECKPOINT_FORMAT), ("layout_sha256", &hash)];
                let tensor = TensorBytes::f32("model", &[values.len()], values);
                safetensors::encode(&metadata, &[tensor])
            }
        }
    }

    /// Hash of the checkpoint's bytes: the values' name.
    #[must_use]
    pub fn checkpoint_sha256(&self, values: &[f32]) -> [u8; 32] {
        Sha256::digest(self.to_checkpoint_bytes(values)).into()
    }

    /// Reads a checkpoint of this layout.
    ///
    /// # Errors
    /// When the bytes are not such a file, belong to another layout or kind, or hold values that are not finite.
    pub fn values_from_checkpoint(&self, bytes: &[u8]) -> Result<Vec<f32>, AdapterError> {
        let layout = match self {
            Self::Lora(layout) => {
                return Ok(Adapter::from_checkpoint_bytes(Arc::clone(layout), bytes)?.values);
            }
            Self::Full(layout) => layout,
        };
        let malformed =
            |what: &str, reason: String| AdapterError::Malformed { what: what.to_owned(), reason };
        let file = safetensors::decode(bytes).map_err(|reason| malformed("checkpoint", reason))?;
        if file.metadata("format") != Some(CHECKPOINT_FORMAT) {
            return Err(malformed("format", format!("expected {CHECKPOINT_FORMAT}")));
        }
        let expected = hex::encode(layout.sha256());
        let found = file.metadata("layout_sha256").unwrap_or("none");
        if found != expected {
            return Err(AdapterError::LayoutMismatch { expected, found: found.to_owned() });
        }
        let (_, values) = file.f32("model").map_err(|reason| malformed("model", reason))?;
        self.check(&values)?;
        Ok(values)
    }

    /// A trainer of these values over `base`. Of the options, those for memory and time are not heeded when all weights
    /// are trained.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the layout is for a model of another shape.
    pub fn trainer(
        &self,
        base: &Arc<BaseModel>,
        options: TrainerOptions,
    ) -> Result<Box<dyn Trainer>, TrainError> {
        match self {
            Self::Lora(layout) => {
                Ok(Box::new(LoraTrainer::new(Arc::clone(base), Arc::clone(layout), options)?))
            }
            Self::Full(layout) => {
                Ok(Box::new(FullTrainer::of_layout(Arc::clone(layout), options.threads, options.precision)))
            }
        }
    }

    /// The model of those values, to evaluate or to talk with: the base with an adapter, or a model in F32.
    ///
    /// # Errors
    /// As [`TrainedLayout::check`]; [`AdapterError::Gguf`] if the base is of another shape.
    pub fn model(&self, base: &Arc<BaseModel>, values: Vec<f32>) -> Result<TrainedModel, AdapterError> {
        self.check(&values)?;
        match self {
            Self::Lora(layout) => {
                let adapter = Adapter { layout: Arc::clone(layout), values };
                Ok(TrainedModel { base: Arc::clone(base), adapter: Some(adapter) })
            }
            Self::Full(layout) => {
                let model = stored(layout, base, &values, WeightFormat::F32)?;
                Ok(TrainedModel { base: Arc::new(model), adapter: None })
            }
        }
    }
}

/// The fully trained model, its matrices in `format`, with the base's tokenizer and chat template.
///
/// # Errors
/// [`AdapterError::WrongLength`], [`AdapterError::NonFinite`], or [`AdapterError::Gguf`] for a format that does not fit
/// the model's widths.
pub fn stored(
    layout: &FullLayout,
    base: &BaseModel,
    values: &[f32],
    format: WeightFormat,
) -> Result<BaseModel, AdapterError> {
    if values.len() != layout.len() {
        return Err(AdapterError::WrongLength { expected: layout.len(), found: values.len() });
    }
    Ok(layout.to_base(values, base.tokenizer.clone(), base.chat_template.clone(), format)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;
    use crate::config::Projection;
    use crate::eval::evaluate;
    use crate::fixtures::{base_of, blocks, config, layout};
    use crate::gguf::Metadata;

    fn full(base: &BaseModel) -> TrainedLayout {
        TrainedLayout::new(base, &TrainedConfig::Full).unwrap()
    }

    #[test]
    fn all_weights_start_as_the_base_and_say_what_it_says() {
        let base = base_of(&config(4, 2, 16), WeightFormat::Q8_0);
        let layout = full(&base);
        let values = layout.initial_values(&base);
        let blocks = blocks(&base.config, 4, 20);
        let model = layout.model(&base, values.clone()).unwrap();
        assert!(model.adapter.is_none());
        let (ours, theirs) =
            (evaluate(&model.base, None, &blocks).unwrap(), evaluate(&base, None, &blocks).unwrap());
        assert!((ours.nll - theirs.nll).abs() < 1e-5, "{ours:?} {theirs:?}");
        let mut trainer = layout.trainer(&base, TrainerOptions::default()).unwrap();
        let refs: Vec<&[u32]> = blocks.iter().map(Vec::as_slice).collect();
        let mut gradient = vec![0.0; layout.len()];
        let loss =
            trainer.loss_and_gradient(&values, &Batch::from_blocks(&refs).unwrap(), &mut gradient).unwrap();
        assert!((f64::from(loss) - theirs.nll).abs() < 1e-4);
        assert!(gradient.iter().any(|g| *g != 0.0));
    }

    #[test]
    fn a_release_holds_the_model_to_its_format() {
        let base = base_of(&config(4, 2, 16), WeightFormat::F32);
        let TrainedLayout::Full(layout) = full(&base) else { panic!("a full layout") };
        let values = layout.values_of(&base);
        let blocks = blocks(&base.config, 4, 20);
        let nll = |model: &BaseModel| evaluate(model, None, &blocks).unwrap().nll;
        for (format, tolerance) in
            [(WeightFormat::F32, 1e-9), (WeightFormat::F16, 1e-3), (WeightFormat::Q8_0, 2e-2)]
        {
            let file = stored(&layout, &base, &values, format).unwrap().to_gguf_bytes(&Metadata::default());
            let opened = BaseModel::from_gguf_bytes(file).unwrap();
            assert!((nll(&opened) - nll(&base)).abs() < tolerance, "{format:?}: {}", nll(&opened));
        }
        assert!(stored(&layout, &base, &values[1..], WeightFormat::F32).is_err());
    }

    #[test]
    fn checkpoints_are_bound_to_kind_and_layout() {
        let base = base_of(&config(4, 2, 16), WeightFormat::Q8_0);
        let layout_full = full(&base);
        let values = layout_full.initial_values(&base);
        let bytes = layout_full.to_checkpoint_bytes(&values);
        assert_eq!(layout_full.values_from_checkpoint(&bytes).unwrap(), values);
        let other = full(&base_of(&config(2, 1, 32), WeightFormat::Q8_0));
        assert!(matches!(
            other.values_from_checkpoint(&bytes).unwrap_err(),
            AdapterError::LayoutMismatch { .. }
        ));
        let adapter = TrainedLayout::Lora(layout(&base.config, &[Projection::Q], false));
        let of_adapter = adapter.to_checkpoint_bytes(&adapter.initial_values(&base));
        assert!(adapter.values_from_checkpoint(&bytes).is_err());
        assert!(layout_full.values_from_checkpoint(&of_adapter).is_err());
        let mut broken = values;
        broken[3] = f32::NAN;
        assert!(matches!(layout_full.check(&broken), Err(AdapterError::NonFinite { index: 3 })));
        let smuggled = layout_full.to_checkpoint_bytes(&broken);
        assert!(layout_full.values_from_checkpoint(&smuggled).is_err());
        for cut in [0, 7, 100, bytes.len() - 1] {
            assert!(layout_full.values_from_checkpoint(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn an_adapters_checkpoint_is_the_adapters_own() {
        let base = base_of(&config(4, 2, 16), WeightFormat::Q8_0);
        let adapter = Adapter::init(layout(&base.config, &Projection::ALL, false));
        let trained = TrainedLayout::Lora(Arc::clone(&adapter.layout));
        assert_eq!(trained.to_checkpoint_bytes(&adapter.values), adapter.to_checkpoint_bytes());
        assert_eq!((trained.sha256(), trained.len()), (adapter.layout.sha256(), adapter.layout.len()));
        assert_eq!(trained.checkpoint_sha256(&adapter.values), adapter.sha256());
    }
}
