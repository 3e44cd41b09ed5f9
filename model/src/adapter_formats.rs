//! Adapters in the formats of other programs: PEFT's folder (transformers) and GGUF LoRA (llama.cpp).
//! Values are copied, never requantized but where a storage format is asked for by name.

mod gguf_lora;
pub(crate) mod peft;

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::{Adapter, AdapterLayout, Factor, LoraConfig};
use crate::config::{ModelConfig, Projection};
use crate::error::AdapterError;
pub use gguf_lora::{BASE_SHA256_KEY, from_gguf_lora, to_gguf_lora};
pub use peft::{PeftFiles, from_peft, read_peft_dir, to_peft, write_peft_dir};

/// A and B of one adapted projection as a file stores them: shape, then values, rows in GGUF order.
struct StoredPair {
    layer: usize,
    projection: Projection,
    a: (Vec<usize>, Vec<f32>),
    b: (Vec<usize>, Vec<f32>),
}

/// One adapter of pairs that must cover the same projections in every layer, with one rank.
fn adapter_of_pairs(
    model: &ModelConfig,
    alpha: f32,
    pairs: Vec<StoredPair>,
) -> Result<Adapter, AdapterError> {
    let first = pairs.first().ok_or_else(|| malformed("tensors", "there are none"))?;
    let rank = first.a.0.first().copied().unwrap_or_default();
    let mut targets: Vec<_> = pairs.iter().map(|pair| pair.projection).collect();
    targets.sort_unstable();
    targets.dedup();
    let config = LoraConfig { rank, alpha, targets, freeze_a: false, init_seed: 0 };
    let layout = AdapterLayout::new(model, &config)?;
    let mut places = Vec::with_capacity(2 * pairs.len());
    for pair in &pairs {
        for (factor, (shape, stored)) in [(Factor::A, &pair.a), (Factor::B, &pair.b)] {
            places.push((place(&layout, (pair.layer, pair.projection, factor), shape)?, stored));
        }
    }
    // Only now is it sure that the values at hand fill the layout.
    if places.iter().map(|(range, _)| range.len()).sum::<usize>() != layout.len() {
        return Err(malformed("tensors", "some layers lack projections that others have"));
    }
    let mut values = vec![0.0; layout.len()];
    for (range, stored) in places {
        values[range].copy_from_slice(stored);
    }
    Adapter::new(Arc::new(layout), values)
}

/// Where a factor of that shape belongs in the flat vector.
fn place(
    layout: &AdapterLayout,
    (layer, projection, factor): (usize, Projection, Factor),
    shape: &[usize],
) -> Result<Range<usize>, AdapterError> {
    let what = || format!("{factor:?} of {} in layer {layer}", projection.name());
    let Some(range) = layout.find(layer, projection, factor) else {
        return Err(malformed(&what(), "the model has no such layer"));
    };
    let entry = layout.entries().iter().find(|entry| entry.offset == range.start);
    let expected = entry.map(|entry| [entry.rows, entry.cols]).unwrap_or_default();
    if shape != expected {
        return Err(malformed(&what(), format!("expected shape {expected:?}, found {shape:?}")));
    }
    Ok(range)
}

fn malformed(what: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Malformed { what: what.to_owned(), reason: reason.into() }
}
