//! The same decoder out of stock burn operations: the oracle for the gradients of `ops.rs`.
//!
//! Nothing is shared with the kernels but the meaning of the weights; slow, for tests only.

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::batch::Batch;
use crate::config::{ModelConfig, Projection};

/// A linear map `[out, in]` with LoRA's factors and scale.
pub(crate) struct StockLinear {
    pub(crate) weight: Tensor<2>,
    pub(crate) lora: Option<(Tensor<2>, Tensor<2>, f32)>,
}

/// One decoder layer.
pub(crate) struct StockLayer {
    pub(crate) attn_norm: Tensor<1>,
    pub(crate) ffn_norm: Tensor<1>,
    pub(crate) projections: [StockLinear; 7],
}

/// A whole model with a tied output.
pub(crate) struct StockModel {
    pub(crate) config: ModelConfig,
    pub(crate) embedding: Tensor<2>,
    pub(crate) layers: Vec<StockLayer>,
    pub(crate) output_norm: Tensor<1>,
}

impl StockLinear {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = x.clone().matmul(self.weight.clone().transpose().unsqueeze());
        match &self.lora {
            None => y,
            Some((a, b, scale)) => {
                let low = x.matmul(a.clone().transpose().unsqueeze());
                y + low.matmul(b.clone().transpose().unsqueeze()).mul_scalar(*scale)
            }
        }
    }
}

impl StockModel {
    /// Mean cross entropy of the targets that are not ignored.
    pub(crate) fn loss(&self, batch: &Batch, device: &Device) -> Tensor<1> {
        let (b, s, h) = (batch.sequences, batch.length, self.config.hidden);
        let ids: Vec<i32> = batch.inputs.iter().map(|id| *id as i32).collect();
        let mut x = self.embedding.clone().select(0, ints(&ids, device)).reshape([b, s, h]);
        for layer in &self.layers {
            x = self.layer(layer, x, device);
        }
        let x = self.norm(x, &self.output_norm).reshape([b * s, h]);
        let log_probabilities = log_softmax(x.matmul(self.embedding.clone().transpose()), 1);
        let kept: Vec<i32> = batch.targets.iter().map(|t| (*t).max(0)).collect();
        let weights: Vec<f32> = batch.targets.iter().map(|t| if *t < 0 { 0.0 } else { 1.0 }).collect();
        let count = weights.iter().sum::<f32>();
        let picked = log_probabilities.gather(1, ints(&kept, device).reshape([b * s, 1])).reshape([b * s]);
        (picked * Tensor::<1>::from_floats(weights.as_slice(), device)).sum().mul_scalar(-1.0 / count)
    }

    fn layer(&self, layer: &StockLayer, x: Tensor<3>, device: &Device) -> Tensor<3> {
        let p = |p: Projection, x: Tensor<3>| layer.projections[p as usize].forward(x);
        let normalized = self.norm(x.clone(), &layer.attn_norm);
        let context = self.attention(
            p(Projection::Q, normalized.clone()),
            p(Projection::K, normalized.clone()),
            p(Projection::V, normalized),
            device,
        );
        let x = x + p(Projection::O, context);
        let normalized = self.norm(x.clone(), &layer.ffn_norm);
        let activated = silu(p(Projection::Gate, normalized.clone())) * p(Projection::Up, normalized);
        x + p(Projection::Down, activated)
    }

    fn norm(&self, x: Tensor<3>, gain: &Tensor<1>) -> Tensor<3> {
        let mean_square = x.clone().powi_scalar(2).mean_dim(2);
        x / mean_square.add_scalar(self.config.rms_eps).sqrt() * gain.clone().unsqueeze()
    }

    fn attention(&self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, device: &Device) -> Tensor<3> {
        let [b, s, _] = q.dims();
        let (heads, kv, d) = (self.config.heads, self.config.kv_heads, self.config.head_dim);
        let split = |x: Tensor<3>, n: usize| x.reshape([b, s, n, d]).swap_dims(1, 2);
        let repeat = |x: Tensor<4>| {
            let shared = x.reshape([b, kv, 1, s, d]).expand([b, kv, heads / kv, s, d]);
            shared.reshape([b, heads, s, d])
        };
        let q = self.rotate(split(q, heads), device);
        let (k, v) = (repeat(self.rotate(split(k, kv), device)), repeat(split(v, kv)));
        let scores = q.matmul(k.transpose()).mul_scalar(1.0 / (d as f32).sqrt());
        let masked = scores + causal_mask(s, device).unsqueeze();
        softmax(masked, 3).matmul(v).swap_dims(1, 2).reshape([b, s, heads * d])
    }

    /// Pairs (2j, 2j + 1) as the last dimension of five.
    fn rotate(&self, x: Tensor<4>, device: &Device) -> Tensor<4> {
        let [b, heads, s, d] = x.dims();
        let angle = |i: usize| {
            (i / (d / 2)) as f32 * self.config.rope_base.powf(-2.0 * (i % (d / 2)) as f32 / d as f32)
        };
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = (0..s * d / 2).map(|i| f(angle(i))).collect();
            Tensor::<1>::from_floats(values.as_slice(), device).reshape([1, 1, s, d / 2, 1])
        };
        let (cos, sin) = (table(f32::cos), table(f32::sin));
        let pairs = x.reshape([b, heads, s, d / 2, 2]);
        let (even, odd) = (pairs.clone().narrow(4, 0, 1), pairs.narrow(4, 1, 1));
        let first = even.clone() * cos.clone() - odd.clone() * sin.clone();
        Tensor::cat(vec![first, odd * cos + even * sin], 4).reshape([b, heads, s, d])
    }
}

fn causal_mask(s: usize, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = (0..s * s).map(|i| if i % s > i / s { -1e9 } else { 0.0 }).collect();
    Tensor::from_data(TensorData::new(values, [s, s]), device)
}

fn ints(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_ints(values, device)
}

mod tests {
    use super::*;
    use crate::adapter::{Adapter, Factor};
    use crate::base::BaseModel;
    use crate::fixtures::{adapter, base_of, blocks, config, layout, noise, parameters};
    use crate::full::FullTrainer;
    use crate::train::{LoraTrainer, Recompute, TrainerOptions};
    use crate::weights::WeightFormat;

    /// Largest relative error (Euclidean) between our gradients and the oracle's.
    const TOLERANCE: f64 = 1e-5;

    fn batch(config: &ModelConfig, sequences: usize, length: usize) -> Batch {
        let blocks = blocks(config, sequences, length);
        let mut batch = Batch::from_blocks(&blocks.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        if length > 1 {
            batch.targets[length / 2] = -1;
        }
        batch
    }

    fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
    }

    fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
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

    fn frozen_layers(base: &BaseModel, device: &Device) -> Vec<StockLayer> {
        let linear = |layer: usize, p: Projection| {
            let w = &base.layers[layer].projections[p as usize];
            StockLinear { weight: tensor(&w.to_f32(), [w.rows(), w.cols()], device), lora: None }
        };
        let layer = |i: usize| StockLayer {
            attn_norm: tensor(&base.layers[i].attn_norm, [base.config.hidden], device),
            ffn_norm: tensor(&base.layers[i].ffn_norm, [base.config.hidden], device),
            projections: Projection::ALL.map(|p| linear(i, p)),
        };
        (0..base.config.layers).map(layer).collect()
    }

    fn stock_of(base: &BaseModel, device: &Device) -> StockModel {
        let c = &base.config;
        StockModel {
            config: c.clone(),
            embedding: tensor(&base.token_embedding.to_f32(), [c.vocab_size, c.hidden], device),
            layers: frozen_layers(base, device),
            output_norm: tensor(&base.output_norm, [c.hidden], device),
        }
    }

    /// The oracle's loss and gradient in the order of the flat vector.
    fn stock_lora(base: &BaseModel, adapter: &Adapter, batch: &Batch) -> (f32, Vec<f32>) {
        let device = Device::flex().autodiff();
        let mut stock = stock_of(base, &device);
        let config = adapter.layout.config();
        let mut leaves = Vec::new();
        for (index, layer) in stock.layers.iter_mut().enumerate() {
            for p in &config.targets {
                let (out, inputs) = p.shape(&base.config);
                let a = tensor(&adapter.factor_a(index, *p), [config.rank, inputs], &device);
                let a = if config.freeze_a { a } else { a.require_grad() };
                let b = tensor(adapter.factor_b(index, *p), [out, config.rank], &device).require_grad();
                if adapter.layout.find(index, *p, Factor::A).is_some() {
                    leaves.push(a.clone());
                }
                leaves.push(b.clone());
                layer.projections[*p as usize].lora = Some((a, b, config.scale()));
            }
        }
        let loss = stock.loss(batch, &device);
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
        let mut trainer = LoraTrainer::new(
            base,
            layout,
            TrainerOptions {
                recompute: if case.recompute { Recompute::Always } else { Recompute::Never },
                ..TrainerOptions::default()
            },
        )
        .unwrap();
        let mut gradient = vec![f32::NAN; expected.len()];
        let loss = trainer.loss_and_gradient(&adapter.values, &batch, &mut gradient).unwrap();
        assert!((loss / expected_loss - 1.0).abs() < 1e-5, "{loss} {expected_loss}");
        let error = relative_error(&gradient, &expected);
        assert!(error < TOLERANCE, "{:?} {:?}: {error:e}", case.targets, case.shape);
        assert!((trainer.loss(&adapter.values, &batch).unwrap() / loss - 1.0).abs() < 1e-6);
    }

    #[test]
    fn lora_gradients_are_those_of_stock_burn() {
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
            part
        };
        let embedding =
            tensor(take(c.vocab_size * c.hidden), [c.vocab_size, c.hidden], &device).require_grad();
        let norm = |values: &[f32]| tensor(values, [c.hidden], &device).require_grad();
        let output_norm = norm(take(c.hidden));
        let mut layers = Vec::new();
        for _ in 0..c.layers {
            let (attn_norm, ffn_norm) = (norm(take(c.hidden)), norm(take(c.hidden)));
            let projections = Projection::ALL.map(|p| {
                let (rows, cols) = p.shape(c);
                StockLinear {
                    weight: tensor(take(rows * cols), [rows, cols], &device).require_grad(),
                    lora: None,
                }
            });
            layers.push(StockLayer { attn_norm, ffn_norm, projections });
        }
        let stock = StockModel { config: c.clone(), embedding, layers, output_norm };
        let loss = stock.loss(batch, &device);
        let g = loss.backward();
        let mut gradient = gradient_of(&stock.embedding, &g);
        gradient.extend(gradient_of(&stock.output_norm, &g));
        for layer in &stock.layers {
            gradient.extend(gradient_of(&layer.attn_norm, &g));
            gradient.extend(gradient_of(&layer.ffn_norm, &g));
            layer.projections.iter().for_each(|p| gradient.extend(gradient_of(&p.weight, &g)));
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
            let values: Vec<f32> =
                parameters.iter().zip(&direction).map(|(p, d)| p + sign * step * d).collect();
            f64::from(trainer.loss(&values, &batch).unwrap())
        };
        let measured = (moved(1.0) - moved(-1.0)) / (2.0 * f64::from(step));
        let predicted: f64 =
            gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        assert!((measured / predicted - 1.0).abs() < 0.01, "{measured} {predicted}");
    }
}
