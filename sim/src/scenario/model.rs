//! What a scenario trains: an adapter over the base, or all weights of a small model, which may start fresh.

use anyhow::{Context, Result};
use fleetune_model::{
    adapter::LoraConfig,
    base::BaseModel,
    config::ModelConfig,
    family::Family,
    full::{FullLayout, FullTrainer},
    trained::TrainedConfig,
    weights::WeightFormat,
};
use fleetune_proto::Digest;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Base of the rotary frequencies of a fresh model: for contexts as short as its.
const FRESH_ROPE_BASE: f32 = 10_000.0;
const FRESH_RMS_EPS: f32 = 1e-5;

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// "adapter", or "model": all weights.
    pub trains: String,
    /// How a fully trained model is released: "f32", "f16" or "q8_0".
    pub release_format: String,
    /// True: of the base only the tokenizer is taken; the model has the sizes below and random weights.
    pub fresh: bool,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of the SwiGLU layer.
    pub feed_forward: usize,
    /// Tokens of its context.
    pub context: usize,
}

impl Model {
    /// What a task of this scenario trains.
    pub fn trained(&self, lora: LoraConfig) -> Result<TrainedConfig> {
        match self.trains.as_str() {
            "adapter" => Ok(TrainedConfig::Lora(lora)),
            "model" => Ok(TrainedConfig::Full),
            other => anyhow::bail!("model.trains: {other:?}; adapter or model"),
        }
    }

    /// How a fully trained model is released.
    pub fn release_format(&self) -> Result<WeightFormat> {
        match self.release_format.as_str() {
            "f32" => Ok(WeightFormat::F32),
            "f16" => Ok(WeightFormat::F16),
            "q8_0" => Ok(WeightFormat::Q8_0),
            other => anyhow::bail!("model.release_format: {other:?}; f32, f16 or q8_0"),
        }
    }

    /// A model with random weights and the tokenizer of `like`, as the file that devices would fetch.
    pub fn fresh(&self, like: &BaseModel, seed: u64) -> Result<(Arc<BaseModel>, Digest)> {
        let config = ModelConfig {
            family: Family::Llama,
            name: "fresh".into(),
            vocab_size: like.tokenizer.vocab_size(),
            hidden: self.hidden,
            layers: self.layers,
            feed_forward: self.feed_forward,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads.max(1),
            context_length: self.context,
            rope_base: FRESH_ROPE_BASE,
            rms_eps: FRESH_RMS_EPS,
        };
        let layout = FullLayout::new(config.clone()).context("model")?;
        let values = FullTrainer::new(config, 1).context("model")?.initial_parameters(seed);
        let model = layout.to_base(&values, like.tokenizer.clone(), None, WeightFormat::F32)?;
        let bytes = model.to_gguf_bytes(&fleetune_model::gguf::Metadata::default());
        let digest = Digest::of(&bytes);
        Ok((Arc::new(BaseModel::from_gguf_bytes(bytes).context("the fresh model")?), digest))
    }
}

#[cfg(test)]
mod tests {
    use crate::{experiment::EMBEDDED_BASE, scenario::Scenario};
    use fleetune_model::{
        base::BaseModel,
        trained::{TrainedConfig, TrainedLayout},
    };

    #[test]
    fn the_next_word_model_has_the_size_of_a_keyboards() {
        let scenario =
            Scenario::from_toml("next_word", include_str!("../../scenarios/next_word.toml")).unwrap();
        let embedded = BaseModel::from_gguf_bytes(EMBEDDED_BASE).unwrap();
        let (base, digest) = scenario.model.fresh(&embedded, 1).unwrap();
        assert_eq!(base.sha256, digest.sha256);
        assert_eq!(scenario.model.fresh(&embedded, 1).unwrap().1, digest, "a seed gives one model");
        assert_ne!(scenario.model.fresh(&embedded, 2).unwrap().1, digest);
        let trained = scenario.trained(1).unwrap();
        assert_eq!(trained, TrainedConfig::Full);
        let layout = TrainedLayout::new(&base, &trained).unwrap();
        assert!((1_350_000..1_450_000).contains(&layout.len()), "{} values", layout.len());
    }
}
