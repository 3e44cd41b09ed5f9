//! The decoder out of stock burn operations, for any device and with or without autodiff: the way of other
//! backends (the trainer is in `generic.rs`), and the oracle for the gradients of `ops.rs`.
//!
//! Nothing is shared with the kernels but the meaning of the weights.

use std::ops::Range;

use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::base::{BaseModel, LayerWeights};
use crate::config::{ModelConfig, Projection};
use crate::weights::WeightMatrix;

/// Values of the output matrix in one tensor: 128 MiB in f32, the least a WebGPU device binds at once.
const OUTPUT_BLOCK: usize = 1 << 25;

/// LoRA's factors of one projection: `scale * x At Bt` is added to `x Wt`.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// `[rank, in]`.
    pub(crate) a: Tensor<2>,
    /// `[out, rank]`.
    pub(crate) b: Tensor<2>,
    pub(crate) scale: f32,
}

/// The factors of one layer by `Projection as usize`.
pub(crate) type LayerFactors = [Option<LowRank>; 7];

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct StockLayer {
    pub(crate) attn_norm: Tensor<1>,
    pub(crate) ffn_norm: Tensor<1>,
    /// `[out, in]`, by `Projection as usize`; Q and K with GGUF's order of rows.
    pub(crate) projections: [Tensor<2>; 7],
}

/// All of a model but its token embedding.
#[derive(Debug)]
pub(crate) struct StockModel {
    pub(crate) config: ModelConfig,
    pub(crate) layers: Vec<StockLayer>,
    pub(crate) output_norm: Tensor<1>,
    /// `[vocab, hidden]` in blocks of rows.
    pub(crate) output: Vec<Tensor<2>>,
}

/// What attention needs to know of positions, for sequences of one length.
#[derive(Debug)]
pub(crate) struct Positions {
    pub(crate) length: usize,
    /// Of the rotary angles, `[1, length, 1, head_dim / 2]`.
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// `[1, 1, length, length]`: 0 for what a token sees, a large negative number for what comes after it.
    mask: Tensor<4>,
}

impl Positions {
    pub(crate) fn new(config: &ModelConfig, length: usize, device: &Device) -> Self {
        let half = config.head_dim / 2;
        let angle = |i: usize| {
            let exponent = -2.0 * (i % half) as f32 / config.head_dim as f32;
            (i / half) as f32 * config.rope_base.powf(exponent)
        };
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = (0..length * half).map(|i| f(angle(i))).collect();
            tensor(values, [1, length, 1, half], device)
        };
        let hidden = |i: usize| if i % length > i / length { -1e9 } else { 0.0 };
        let mask = (0..length * length).map(hidden).collect();
        Self {
            length,
            cos: table(f32::cos),
            sin: table(f32::sin),
            mask: tensor(mask, [1, 1, length, length], device),
        }
    }
}

impl StockModel {
    /// Copies the weights to the device, in f32.
    pub(crate) fn new(base: &BaseModel, device: &Device) -> Self {
        let block = (OUTPUT_BLOCK / base.config.hidden).max(1);
        Self::with_output_block(base, device, block)
    }

    /// The same with that many rows of the output in a tensor.
    pub(crate) fn with_output_block(base: &BaseModel, device: &Device, block: usize) -> Self {
        let head = base.head();
        let starts = (0..head.rows()).step_by(block);
        let output = starts.map(|start| rows(head, start..head.rows().min(start + block), device));
        Self {
            config: base.config.clone(),
            layers: base.layers.iter().map(|layer| StockLayer::new(layer, device)).collect(),
            output_norm: vector(&base.output_norm, device),
            output: output.collect(),
        }
    }

    /// One layer over whole sequences, x `[sequences * length, hidden]`.
    pub(crate) fn layer(&self, index: usize, lora: &LayerFactors, x: Tensor<2>, p: &Positions) -> Tensor<2> {
        let layer = &self.layers[index];
        let linear = |p: Projection, x: &Tensor<2>| {
            let y = x.clone().matmul(layer.projections[p as usize].clone().transpose());
            match &lora[p as usize] {
                None => y,
                Some(LowRank { a, b, scale }) => {
                    let low = x.clone().matmul(a.clone().transpose()).mul_scalar(*scale);
                    y + low.matmul(b.clone().transpose())
                }
            }
        };
        let normalized = self.norm(x.clone(), &layer.attn_norm);
        let [q, k, v] = [Projection::Q, Projection::K, Projection::V].map(|p| linear(p, &normalized));
        let x = x + linear(Projection::O, &self.attention(q, k, v, p));
        let normalized = self.norm(x.clone(), &layer.ffn_norm);
        let activated = silu(linear(Projection::Gate, &normalized)) * linear(Projection::Up, &normalized);
        x + linear(Projection::Down, &activated)
    }

    /// Final norm, output and cross entropy of the targets, summed and divided; negative targets are ignored.
    /// x `[targets, hidden]`.
    pub(crate) fn cross_entropy(&self, x: Tensor<2>, targets: &[i32], denominator: f32) -> Tensor<1> {
        let (n, device) = (targets.len(), x.device());
        let x = self.norm(x, &self.output_norm);
        let logits = self.output.iter().map(|block| x.clone().matmul(block.clone().transpose()));
        let log_probabilities = log_softmax(Tensor::cat(logits.collect(), 1), 1);
        let known: Vec<i32> = targets.iter().map(|t| (*t).max(0)).collect();
        let known = Tensor::<1, Int>::from_ints(known.as_slice(), &device).reshape([n, 1]);
        let weight = |t: &i32| if *t < 0 { 0.0 } else { -1.0 / denominator };
        let weights = tensor(targets.iter().map(weight).collect(), [n], &device);
        (log_probabilities.gather(1, known).reshape([n]) * weights).sum()
    }

    fn norm(&self, x: Tensor<2>, gain: &Tensor<1>) -> Tensor<2> {
        let mean_square = x.clone().powi_scalar(2).mean_dim(1);
        x / mean_square.add_scalar(self.config.rms_eps).sqrt() * gain.clone().unsqueeze()
    }

    /// q, k, v `[sequences * length, width]`. The query heads that share a key head are stacked in one product.
    fn attention(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, p: &Positions) -> Tensor<2> {
        let (heads, kv, d, s) = (self.config.heads, self.config.kv_heads, self.config.head_dim, p.length);
        let b = q.dims()[0] / s;
        let q = rotate(q.reshape([b, s, heads, d]), p).swap_dims(1, 2).reshape([b, kv, heads / kv * s, d]);
        let k = rotate(k.reshape([b, s, kv, d]), p).swap_dims(1, 2);
        let v = v.reshape([b, s, kv, d]).swap_dims(1, 2);
        let scores = q.matmul(k.transpose()).mul_scalar(1.0 / (d as f32).sqrt());
        let seen = softmax(scores.reshape([b, heads, s, s]) + p.mask.clone(), 3);
        let context = seen.reshape([b, kv, heads / kv * s, s]).matmul(v).reshape([b, heads, s, d]);
        context.swap_dims(1, 2).reshape([b * s, heads * d])
    }
}

impl StockLayer {
    fn new(weights: &LayerWeights, device: &Device) -> Self {
        // Every field by name: a new one does not compile until `layer` computes it or `generic.rs` refuses it.
        let LayerWeights { attn_norm, ffn_norm, projections, extras: _ } = weights;
        Self {
            attn_norm: vector(attn_norm, device),
            ffn_norm: vector(ffn_norm, device),
            projections: projections.each_ref().map(|w| rows(w, 0..w.rows(), device)),
        }
    }
}

/// Turns the pairs (2j, 2j + 1) of x `[sequences, length, heads, head_dim]`, and puts all first halves before all
/// second ones: the scores stay the same, for q and k are both put so.
fn rotate(x: Tensor<4>, p: &Positions) -> Tensor<4> {
    let [b, s, heads, d] = x.dims();
    let pairs = x.reshape([b, s, heads, d / 2, 2]);
    let half = |i: usize| pairs.clone().narrow(4, i, 1).reshape([b, s, heads, d / 2]);
    let (even, odd) = (half(0), half(1));
    let first = even.clone() * p.cos.clone() - odd.clone() * p.sin.clone();
    Tensor::cat(vec![first, odd * p.cos.clone() + even * p.sin.clone()], 3)
}

fn rows(weight: &WeightMatrix, range: Range<usize>, device: &Device) -> Tensor<2> {
    let mut values = vec![0f32; range.len() * weight.cols()];
    weight.dequantize_rows(range.start, range.len(), &mut values);
    tensor(values, [range.len(), weight.cols()], device)
}

fn vector(values: &[f32], device: &Device) -> Tensor<1> {
    tensor(values.to_vec(), [values.len()], device)
}

/// A tensor of those values.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
pub(crate) mod tests;
