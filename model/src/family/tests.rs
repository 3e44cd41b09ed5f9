//! Each family against what transformers, peft and llama.cpp computed for a tiny model of it (`data/reference/families/`,
//! made by `tests/peers/families.py`): likelihoods, gradients and inference. Files are in
//! `file_tests.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::*;
use crate::adapter::{Adapter, Factor};
use crate::adapter_formats::{PeftFiles, from_peft};
use crate::base::{BaseModel, ModelParts};
use crate::batch::Batch;
use crate::config::Projection;
use crate::eval::{last_logits, token_nlls};
use crate::full::FullTrainer;
use crate::infer::{Engine, Sequence, Span};
use crate::train::{LoraTrainer, Precision, Recompute, TrainerOptions};
use crate::weights::{WeightFormat, WeightMatrix};

pub(super) const FAMILIES: [&str; 4] = ["llama", "qwen2", "qwen3", "gemma3"];

/// What transformers computed in f32.
#[derive(Deserialize)]
pub(super) struct Expected {
    pub(super) ids: Vec<u32>,
    pub(super) nll: Vec<f32>,
    last_logits: Vec<f32>,
    adapted_nll: Vec<f32>,
    /// Names and shapes of the tensors.
    pub(super) tensors: BTreeMap<String, Vec<usize>>,
}

pub(super) fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/reference/families").join(family)
}

pub(super) fn base(family: &str) -> BaseModel {
    BaseModel::open(&folder(family).join("model.gguf")).unwrap()
}

pub(super) fn expected(family: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(folder(family).join("expected.json")).unwrap()).unwrap()
}

/// The adapter that peft wrote, or gradients by its values in the same form.
fn peft(family: &str, weights: &str) -> Adapter {
    let read = |name: &str| std::fs::read(folder(family).join(name)).unwrap();
    let files = PeftFiles { config: read("adapter_config.json"), weights: read(weights) };
    from_peft(&files, &base(family).config).unwrap()
}

pub(super) fn adapter(family: &str) -> Adapter {
    peft(family, "adapter_model.safetensors")
}

/// The model with its matrices in another format.
fn stored_as(family: &str, format: WeightFormat) -> BaseModel {
    let base = base(family);
    let matrix = |m: &WeightMatrix| WeightMatrix::from_f32(&m.to_f32(), m.rows(), m.cols(), format).unwrap();
    let mut layers = base.layers.clone();
    for layer in &mut layers {
        layer.projections.iter_mut().for_each(|projection| *projection = matrix(projection));
    }
    BaseModel::from_parts(ModelParts {
        token_embedding: matrix(&base.token_embedding),
        output: base.output.as_ref().map(matrix),
        layers,
        output_norm: base.output_norm,
        chat_template: base.chat_template,
        tokenizer: base.tokenizer,
        config: base.config,
    })
    .unwrap()
}

pub(super) fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() < tolerance, "{what} {i}: {found}, expected {expected}");
    }
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let norm: f64 = expected.iter().map(|x| square(f64::from(*x))).sum();
    let error: f64 = found.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    assert!(norm > 0.0, "the reference is not zero");
    (error / norm).sqrt()
}

fn gradient(
    base: &Arc<BaseModel>,
    adapter: &Adapter,
    ids: &[u32],
    options: TrainerOptions,
) -> (f32, Vec<f32>) {
    let mut trainer = LoraTrainer::new(Arc::clone(base), Arc::clone(&adapter.layout), options).unwrap();
    let mut gradient = vec![0.0; adapter.values.len()];
    let batch = Batch::from_blocks(&[ids]).unwrap();
    let loss = trainer.loss_and_gradient(&adapter.values, &batch, &mut gradient).unwrap();
    (loss, gradient)
}

#[test]
fn every_token_has_the_likelihood_that_transformers_gives() {
    for family in FAMILIES {
        let (base, expected) = (base(family), expected(family));
        assert_eq!(base.config.family.architecture(), family);
        let plain = token_nlls(&base, None, &expected.ids).unwrap();
        assert_close(family, &plain, &expected.nll, 1e-4);
        let adapted = token_nlls(&base, Some(&adapter(family)), &expected.ids).unwrap();
        assert_close(family, &adapted, &expected.adapted_nll, 1e-4);
        let logits = last_logits(&base, None, &expected.ids).unwrap();
        assert_close(family, &logits, &expected.last_logits, 1e-4);
    }
}

/// All seven projections in every layer, each factor for itself: a wrong one hides among the others.
#[test]
fn gradients_are_those_of_torch() {
    for family in FAMILIES {
        let (base, expected, adapter) = (Arc::new(base(family)), expected(family), adapter(family));
        let (loss, found) = gradient(&base, &adapter, &expected.ids, TrainerOptions::default());
        let mean = expected.adapted_nll.iter().sum::<f32>() / expected.adapted_nll.len() as f32;
        assert!((loss - mean).abs() < 1e-4, "{family}: {loss}, expected {mean}");
        let reference = peft(family, "gradients.safetensors");
        let mut worst = 0f64;
        for layer in 0..base.config.layers {
            for (p, factor) in Projection::ALL.into_iter().flat_map(|p| [(p, Factor::A), (p, Factor::B)]) {
                let range = adapter.layout.find(layer, p, factor).unwrap();
                let error = relative_error(&found[range.clone()], &reference.values[range]);
                assert!(error < 1e-4, "{family}, {factor:?} of {p:?} in layer {layer}: {error}");
                worst = worst.max(error);
            }
        }
        eprintln!("{family}: worst relative error of a factor's gradient {worst:.1e}");
        let recompute = TrainerOptions { recompute: Recompute::Always, ..TrainerOptions::default() };
        assert_eq!(gradient(&base, &adapter, &expected.ids, recompute), (loss, found.clone()), "{family}");
        let rounded = TrainerOptions { precision: Precision::Bf16, ..TrainerOptions::default() };
        let error = relative_error(&gradient(&base, &adapter, &expected.ids, rounded).1, &found);
        eprintln!("{family}: with bf16 products {error:.2}");
        assert!(error < 0.3, "{family} with bf16 products: {error}");
    }
}

/// A batch of two sequences is not one long one.
#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for family in FAMILIES {
        let (base, adapter, ids) = (Arc::new(base(family)), adapter(family), expected(family).ids);
        let (first, second) = (&ids[..21], &ids[20..41]);
        let mut trainer =
            LoraTrainer::new(Arc::clone(&base), Arc::clone(&adapter.layout), TrainerOptions::default())
                .unwrap();
        let mut both = vec![0.0; adapter.values.len()];
        let batch = Batch::from_blocks(&[first, second]).unwrap();
        let loss = trainer.loss_and_gradient(&adapter.values, &batch, &mut both).unwrap();
        let alone = [first, second].map(|ids| gradient(&base, &adapter, ids, TrainerOptions::default()));
        assert!((loss - 0.5 * (alone[0].0 + alone[1].0)).abs() < 1e-5, "{family}");
        let mean: Vec<f32> = alone[0].1.iter().zip(&alone[1].1).map(|(a, b)| 0.5 * (a + b)).collect();
        let error = relative_error(&both, &mean);
        assert!(error < 1e-5, "{family}: {error}");
    }
}

fn read(engine: &Engine, sequence: &mut Sequence, ids: &[u32]) -> Vec<f32> {
    engine.read(&mut [Span { sequence, ids }]).unwrap()
}

fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let probabilities = |logits: &[f32]| {
        let most = logits.iter().copied().fold(f32::MIN, f32::max);
        let weights: Vec<f64> = logits.iter().map(|x| f64::from(x - most).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / total).collect::<Vec<_>>()
    };
    probabilities(p).iter().zip(&probabilities(q)).map(|(p, q)| p * (p / q).ln()).sum()
}

#[test]
fn inference_gives_the_likelihoods_of_the_f32_path() {
    for family in FAMILIES {
        let ids = expected(family).ids;
        // Random weights this large amplify roundings far more than those of a trained model.
        for (format, bound) in [(WeightFormat::F16, 1e-4), (WeightFormat::Q8_0, 0.05)] {
            let mut worst = 0f64;
            let engine = Engine::new(Arc::new(stored_as(family, format)));
            let own = adapter(family);
            let loaded = engine.load_adapter(&own).unwrap();
            for (own, loaded) in [(None, None), (Some(&own), Some(loaded))] {
                for count in [1, 5, 9, ids.len()] {
                    let expected = last_logits(engine.base(), own, &ids[..count]).unwrap();
                    let found = read(&engine, &mut engine.sequence(loaded.clone()), &ids[..count]);
                    let kl = divergence(&expected, &found);
                    assert!(kl < bound, "{family} in {format:?}, {count} tokens: {kl}");
                    worst = worst.max(kl);
                }
            }
            eprintln!("{family} in {format:?}: divergence of inference up to {worst:.1e}");
        }
    }
}

/// Token by token, and in pieces that end inside, at and beyond the window.
#[test]
fn cached_reading_is_the_whole() {
    for family in FAMILIES {
        let ids = expected(family).ids;
        for (format, tolerance) in [(WeightFormat::F16, 5e-3), (WeightFormat::Q8_0, 0.1)] {
            let engine = Engine::new(Arc::new(stored_as(family, format)));
            let loaded = engine.load_adapter(&adapter(family)).unwrap();
            let whole = read(&engine, &mut engine.sequence(Some(Arc::clone(&loaded))), &ids);
            for pieces in [vec![1; ids.len()], vec![3, 4, 1, 20, 2, ids.len() - 30], vec![7, ids.len() - 7]] {
                let mut sequence = engine.sequence(Some(Arc::clone(&loaded)));
                let (mut rest, mut last) = (&ids[..], Vec::new());
                for piece in &pieces {
                    last = read(&engine, &mut sequence, &rest[..*piece]);
                    rest = &rest[*piece..];
                }
                assert!(rest.is_empty());
                assert_close(&format!("{family} in {format:?}, pieces {pieces:?}"), &last, &whole, tolerance);
            }
        }
    }
}

/// Sequences longer than a tile of attention, where tiles of a local layer skip keys.
#[test]
fn windows_reach_over_tiles() {
    let mut base = stored_as("gemma3", WeightFormat::F32);
    base.config.context_length = 400;
    let own = adapter("gemma3");
    let ids: Vec<u32> = (0..301).map(|i| (i * i * 31 + i * 7) % base.config.vocab_size as u32).collect();
    let base = Arc::new(base);
    let (loss, found) = gradient(&base, &own, &ids, TrainerOptions::default());
    // The derivative along the gradient, by differences.
    let norm = found.iter().map(|x| x * x).sum::<f32>().sqrt();
    let step = 2e-3;
    let moved = |sign: f32| {
        let values = own.values.iter().zip(&found).map(|(x, g)| x + sign * step * g / norm).collect();
        let own = Adapter::new(Arc::clone(&own.layout), values).unwrap();
        let nlls = token_nlls(&base, Some(&own), &ids).unwrap();
        nlls.iter().map(|x| f64::from(*x)).sum::<f64>() / nlls.len() as f64
    };
    let slope = (moved(1.0) - moved(-1.0)) / (2.0 * f64::from(step));
    assert!((slope / f64::from(norm) - 1.0).abs() < 0.01, "{slope}, expected {norm}");
    let engine = Engine::new(Arc::clone(&base));
    let loaded = engine.load_adapter(&own).unwrap();
    let nlls = engine.token_nlls(&mut engine.sequence(Some(loaded)), &ids).unwrap();
    assert_close("token", &nlls, &token_nlls(&base, Some(&own), &ids).unwrap(), 2e-2);
    let mean = nlls.iter().sum::<f32>() / nlls.len() as f32;
    assert!((mean - loss).abs() < 1e-3, "{mean}, {loss}");
}

#[test]
fn only_llama_is_trained_in_full() {
    for family in FAMILIES {
        let made = FullTrainer::new(base(family).config, 1);
        assert_eq!(made.is_ok(), family == "llama");
        if let Err(error) = made {
            assert!(error.to_string().contains("only llama is trained in full"), "{error}");
        }
    }
}

#[test]
fn parameters_are_counted_with_the_extras() {
    for family in FAMILIES {
        let counted: usize =
            expected(family).tensors.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(base(family).parameter_count(), counted as u64, "{family}");
    }
}

#[test]
fn gemma_of_62_layers_has_another_scale() {
    let scale = |layers| Gemma3::usual_attention_scale(layers, 5376, 32, 128);
    assert_eq!(scale(34), 1.0 / 128f32.sqrt());
    assert_eq!(scale(62), 1.0 / 168f32.sqrt());
}
