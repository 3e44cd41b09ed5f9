//! A small model with weights rough enough that every part of it matters, for tests.

use std::sync::Arc;

use crate::adapter::{Adapter, AdapterLayout, LoraConfig};
use crate::base::BaseModel;
use crate::config::tests::tiny;
use crate::config::{ModelConfig, Projection};
use crate::full::FullTrainer;
use crate::tokenizer::tests::tiny_tokenizer;
use crate::weights::WeightFormat;

/// The tiny model's sizes with other heads.
pub(crate) fn config(heads: usize, kv_heads: usize, head_dim: usize) -> ModelConfig {
    let vocab_size = tiny_tokenizer().vocab_size();
    ModelConfig { vocab_size, heads, kv_heads, head_dim, context_length: 300, ..tiny() }
}

/// Numbers evenly spread over `-scale..scale`, the same for the same salt.
pub(crate) fn noise(len: usize, scale: f32, salt: u32) -> Vec<f32> {
    let mut state = salt.wrapping_mul(747_796_405).wrapping_add(1);
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| scale * draw()).collect()
}

/// Weights large enough for attention to matter, gains that differ.
pub(crate) fn parameters(trainer: &FullTrainer) -> Vec<f32> {
    let spread = noise(trainer.parameter_count(), 0.2, 1);
    let rough = |(x, n): (f32, f32)| if x == 1.0 { 1.0 + n } else { x * 8.0 };
    trainer.initial_parameters(3).into_iter().zip(spread).map(rough).collect()
}

/// A model of those sizes stored in that format.
pub(crate) fn base_of(config: &ModelConfig, format: WeightFormat) -> Arc<BaseModel> {
    let trainer = FullTrainer::new(config.clone(), 1).unwrap();
    Arc::new(trainer.to_base(&parameters(&trainer), tiny_tokenizer(), format).unwrap())
}

/// The tiny model.
pub(crate) fn base() -> Arc<BaseModel> {
    base_of(&config(4, 2, 16), WeightFormat::Q8_0)
}

/// A layout of rank 3 for that model.
pub(crate) fn layout(config: &ModelConfig, targets: &[Projection], freeze_a: bool) -> Arc<AdapterLayout> {
    let lora = LoraConfig { rank: 3, alpha: 6.0, targets: targets.to_vec(), freeze_a, init_seed: 5 };
    Arc::new(AdapterLayout::new(config, &lora).unwrap())
}

/// An adapter whose factors are all at work.
pub(crate) fn adapter(layout: &Arc<AdapterLayout>) -> Adapter {
    Adapter::new(Arc::clone(layout), noise(layout.len(), 0.1, 2)).unwrap()
}

/// Blocks of `length + 1` ids with a pattern that can be learned.
pub(crate) fn blocks(config: &ModelConfig, count: usize, length: usize) -> Vec<Vec<u32>> {
    let id = |i: usize| ((i * 7919 + 13) % config.vocab_size) as u32;
    (0..count).map(|b| (0..=length).map(|i| id(b * 1000 + i * i)).collect()).collect()
}
