//! Equal gradients: the burn operations of `ops.rs`, the generic trainer, and one autodiff graph of stock operations.

use std::sync::Arc;

use super::*;
use crate::adapter::{Adapter, AdapterLayout, Factor};
use crate::batch::Batch;
use crate::fixtures::{adapter, base_of, blocks, config, layout, noise, parameters};
use crate::full::FullTrainer;
use crate::generic::{self, GenericOptions, GenericTrainer};
use crate::train::{LoraTrainer, Recompute, Trainer, TrainerOptions};
use crate::weights::WeightFormat;

/// Largest relative error (Euclidean) between our gradients and the oracle's.
const TOLERANCE: f64 = 1e-5;

pub(crate) fn batch(config: &ModelConfig, sequences: usize, length: usize) -> Batch {
    let blocks = blocks(config, sequences, length);
    let mut batch = Batch::from_blocks(&blocks.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    if length > 1 {
        batch.targets[length / 2] = -1;
    }
    batch
}

pub(crate) fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let norm: f64 = expected.iter().map(|x| square(f64::from(*x))).sum();
    let error: f64 = found.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    assert!(norm > 0.0, "the oracle's gradient is not zero");
    (error / norm).sqrt()
}

fn gradient_of<const D: usize>(leaf: &Tensor<D>, gradients: &burn::tensor::Gradients) -> Vec<f32> {
    leaf.grad(gradients).unwrap().into_data().try_to_vec().unwrap()
}

/// The whole loss in one graph.
fn loss(model: &StockModel, lora: &[LayerFactors], embedded: Tensor<2>, batch: &Batch) -> Tensor<1> {
    let positions = Positions::new(&model.config, batch.length, &Device::flex());
    let layers = lora.iter().enumerate();
    let x = layers.fold(embedded, |x, (index, factors)| model.layer(index, factors, x, &positions));
    model.cross_entropy(x, &batch.targets, batch.predicted() as f32)
}

fn embedded(table: Tensor<2>, batch: &Batch) -> Tensor<2> {
    let ids: Vec<i32> = batch.inputs.iter().map(|id| *id as i32).collect();
    let ids = Tensor::<1, Int>::from_ints(ids.as_slice(), &Device::flex());
    table.select(0, ids)
}

/// The oracle's loss and gradient in the order of the flat vector.
fn stock_lora(base: &BaseModel, adapter: &Adapter, batch: &Batch) -> (f32, Vec<f32>) {
    let device = Device::flex();
    let config = adapter.layout.config();
    let mut leaves = Vec::new();
    let mut factors = |layer: usize, p: Projection| {
        let (out, inputs) = p.shape(&base.config);
        let b = adapter.layout.find(layer, p, Factor::B)?;
        let a = tensor(adapter.factor_a(layer, p).to_vec(), [config.rank, inputs], &device);
        let a = if config.freeze_a { a } else { a.autodiff().require_grad() };
        if !config.freeze_a {
            leaves.push(a.clone());
        }
        let b = tensor(adapter.values[b].to_vec(), [out, config.rank], &device).autodiff().require_grad();
        leaves.push(b.clone());
        Some(LowRank { a, b, scale: config.scale() })
    };
    let lora: Vec<LayerFactors> =
        (0..base.config.layers).map(|layer| Projection::ALL.map(|p| factors(layer, p))).collect();
    let table = &base.token_embedding;
    let x = embedded(tensor(table.to_f32(), [table.rows(), table.cols()], &device), batch);
    let loss = loss(&StockModel::new(base, &device), &lora, x, batch);
    let gradients = loss.backward();
    let gradient = leaves.iter().flat_map(|leaf| gradient_of(leaf, &gradients)).collect();
    (loss.into_scalar::<f32>(), gradient)
}

struct LoraCase {
    targets: &'static [Projection],
    freeze_a: bool,
    heads: (usize, usize, usize),
    shape: (usize, usize),
    format: WeightFormat,
    recompute: bool,
}

fn check_lora(case: &LoraCase) {
    let config = config(case.heads.0, case.heads.1, case.heads.2);
    let base = base_of(&config, case.format);
    let layout = layout(&config, case.targets, case.freeze_a);
    let adapter = adapter(&layout);
    let batch = batch(&config, case.shape.0, case.shape.1);
    let (expected_loss, expected) = stock_lora(&base, &adapter, &batch);
    let mut native = native(&base, &layout, case.recompute);
    let mut generic = generic(&base, &layout, case.recompute);
    let losses =
        [native.loss(&adapter.values, &batch).unwrap(), generic.loss(&adapter.values, &batch).unwrap()];
    let trainers: [&mut dyn Trainer; 2] = [&mut native, &mut generic];
    for (trainer, alone) in trainers.into_iter().zip(losses) {
        let mut gradient = vec![f32::NAN; expected.len()];
        let loss = trainer.loss_and_gradient(&adapter.values, &batch, &mut gradient).unwrap();
        assert!((loss / expected_loss - 1.0).abs() < 1e-5, "{loss} {expected_loss}");
        let error = relative_error(&gradient, &expected);
        assert!(error < TOLERANCE, "{:?} {:?}: {error:e}", case.targets, case.shape);
        assert!((alone / loss - 1.0).abs() < 1e-6, "{alone} {loss}");
    }
}

fn native(base: &Arc<BaseModel>, layout: &Arc<AdapterLayout>, recompute: bool) -> LoraTrainer {
    let recompute = if recompute { Recompute::Always } else { Recompute::Never };
    let options = TrainerOptions { recompute, ..TrainerOptions::default() };
    LoraTrainer::new(Arc::clone(base), Arc::clone(layout), options).unwrap()
}

fn generic(base: &Arc<BaseModel>, layout: &Arc<AdapterLayout>, recompute: bool) -> GenericTrainer {
    let options = GenericOptions { recompute };
    GenericTrainer::new(Arc::clone(base), Arc::clone(layout), &generic::flex(), options).unwrap()
}

#[test]
fn lora_gradients_are_those_of_one_autodiff_graph() {
    use Projection::{Down, Gate, K, O, Q, Up, V};
    let attention: &[Projection] = &[Q, K, V, O];
    let gqa = (4, 2, 16);
    let cases = [
        (attention, false, gqa, (2, 9), WeightFormat::F32, false),
        (&Projection::ALL, false, (4, 4, 16), (1, 1), WeightFormat::F32, false),
        (&Projection::ALL, true, (6, 1, 8), (3, 17), WeightFormat::F32, true),
        (&[Q, V], true, gqa, (2, 33), WeightFormat::Q8_0, false),
        (&[K], false, gqa, (1, 140), WeightFormat::Q4_1, true),
        (&[Gate, Down], false, gqa, (2, 20), WeightFormat::Q4_0, false),
        (&[O, Up], true, gqa, (1, 270), WeightFormat::BF16, false),
        (&[Down], false, gqa, (5, 6), WeightFormat::F16, false),
    ];
    for (targets, freeze_a, heads, shape, format, recompute) in cases {
        check_lora(&LoraCase { targets, freeze_a, heads, shape, format, recompute });
    }
}

fn stock_full(trainer: &FullTrainer, parameters: &[f32], batch: &Batch) -> (f32, Vec<f32>) {
    let device = Device::flex().autodiff();
    let c = trainer.config();
    let mut rest = parameters;
    let mut take = |n: usize| {
        let (part, after) = rest.split_at(n);
        rest = after;
        part.to_vec()
    };
    let embedding = tensor(take(c.vocab_size * c.hidden), [c.vocab_size, c.hidden], &device).require_grad();
    let norm = |values: Vec<f32>| tensor(values, [c.hidden], &device).require_grad();
    let output_norm = norm(take(c.hidden));
    let mut layers = Vec::new();
    for _ in 0..c.layers {
        let (attn_norm, ffn_norm) = (norm(take(c.hidden)), norm(take(c.hidden)));
        let projections = Projection::ALL.map(|p| {
            let (rows, cols) = p.shape(c);
            tensor(take(rows * cols), [rows, cols], &device).require_grad()
        });
        layers.push(StockLayer { attn_norm, ffn_norm, projections });
    }
    let output = vec![embedding.clone()];
    let stock = StockModel { config: c.clone(), layers, output_norm, output };
    let no_lora: Vec<LayerFactors> = (0..c.layers).map(|_| LayerFactors::default()).collect();
    let loss = loss(&stock, &no_lora, embedded(embedding.clone(), batch), batch);
    let g = loss.backward();
    let mut gradient = gradient_of(&embedding, &g);
    gradient.extend(gradient_of(&stock.output_norm, &g));
    for layer in &stock.layers {
        gradient.extend(gradient_of(&layer.attn_norm, &g));
        gradient.extend(gradient_of(&layer.ffn_norm, &g));
        layer.projections.iter().for_each(|w| gradient.extend(gradient_of(w, &g)));
    }
    (loss.into_scalar::<f32>(), gradient)
}

#[test]
fn full_gradients_are_those_of_stock_burn_on_any_number_of_threads() {
    for (heads, kv_heads, shape) in [(4, 2, (3, 21)), (4, 4, (1, 1)), (8, 1, (2, 150))] {
        let config = config(heads, kv_heads, 8);
        for threads in [1, 2, 4] {
            let mut trainer = FullTrainer::new(config.clone(), threads).unwrap();
            let parameters = parameters(&trainer);
            let batch = batch(&config, shape.0, shape.1);
            let (expected_loss, expected) = stock_full(&trainer, &parameters, &batch);
            for _ in 0..2 {
                let mut gradient = vec![f32::NAN; expected.len()];
                let loss = trainer.loss_and_gradient(&parameters, &batch, &mut gradient).unwrap();
                assert!((loss / expected_loss - 1.0).abs() < 1e-5, "{loss} {expected_loss}");
                let error = relative_error(&gradient, &expected);
                assert!(error < TOLERANCE, "{heads}/{kv_heads} {shape:?}: {error:e}");
            }
            assert!((trainer.loss(&parameters, &batch).unwrap() / expected_loss - 1.0).abs() < 1e-5);
        }
    }
}

/// Independent of any autodiff: the loss along a random direction.
#[test]
fn gradients_agree_with_finite_differences() {
    let config = config(4, 2, 16);
    let mut trainer = FullTrainer::new(config.clone(), 2).unwrap();
    let parameters = parameters(&trainer);
    let batch = batch(&config, 2, 12);
    let mut gradient = vec![0.0; parameters.len()];
    trainer.loss_and_gradient(&parameters, &batch, &mut gradient).unwrap();
    let direction = noise(parameters.len(), 1.0, 9);
    let step = 2e-4f32;
    let mut moved = |sign: f32| {
        let values: Vec<f32> = parameters.iter().zip(&direction).map(|(p, d)| p + sign * step * d).collect();
        f64::from(trainer.loss(&values, &batch).unwrap())
    };
    let measured = (moved(1.0) - moved(-1.0)) / (2.0 * f64::from(step));
    let predicted: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
    assert!((measured / predicted - 1.0).abs() < 0.01, "{measured} {predicted}");
}
