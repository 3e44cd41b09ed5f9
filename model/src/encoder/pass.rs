//! The whole encoder, forward and backward, over sequences that stand one behind another; and how their rows
//! become one vector each.

use std::ops::Range;

use super::config::{EncoderProjection, Pooling};
use super::layer::{Dense, Kept, Layer, add_bias};
use super::layer_norm::LayerNorm;
use super::model::{EncoderParts, LayerNormWeights};
use crate::kernels::activation::add;
use crate::kernels::bf16::Precision;
use crate::kernels::linear::{Linear, LinearGradients, LowRank, Weight};
use crate::kernels::matrix::Into;
use crate::kernels::scratch::{Buffer, buffer};

/// LoRA's factors of a projection of a layer, if it is adapted.
pub(super) type LoraSource<'a> = &'a dyn Fn(usize, EncoderProjection) -> Option<LowRank<'a>>;

/// What is run.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) model: &'a EncoderParts,
    pub(super) lora: LoraSource<'a>,
    pub(super) precision: Precision,
}

/// What a forward pass leaves.
pub(super) struct Forward {
    /// The last layer's rows.
    pub(super) hidden: Buffer,
    /// The rows of each sequence.
    pub(super) sequences: Vec<Range<usize>>,
    /// One for each layer, if they were to be kept.
    kept: Vec<Kept>,
}

impl<'a> Pass<'a> {
    /// Runs all layers; `keep` what a backward pass needs.
    pub(super) fn forward(&self, ids: &[&[u32]], keep: bool) -> Forward {
        let sequences = rows_of(ids);
        let mut hidden = embed(self.model, ids);
        let mut kept = Vec::new();
        for index in 0..self.model.layers.len() {
            let (out, layer) = self.layer(index).forward(hidden, &sequences);
            hidden = out;
            kept.extend(keep.then_some(layer));
        }
        Forward { hidden, sequences, kept }
    }

    /// Runs the layers backward from the gradient of the last rows; `gradients` says where those of a layer go.
    ///
    /// # Panics
    /// When nothing was kept.
    pub(super) fn backward(
        &self,
        mut forward: Forward,
        dhidden: Buffer,
        mut gradients: impl FnMut(usize) -> [Option<LayerFactors>; 6],
        out: &mut [f32],
    ) {
        assert!(forward.kept.len() == self.model.layers.len(), "the forward pass kept every layer");
        let mut dhidden = Some(dhidden);
        while let (Some(kept), Some(dy)) = (forward.kept.pop(), dhidden.take()) {
            let index = forward.kept.len();
            let places = gradients(index);
            let mut rest = Rest { values: &mut *out, taken: 0 };
            let linear = places.map(|factors| {
                let factors = factors.unwrap_or_default();
                LinearGradients { weight: None, a: rest.take(factors.a), b: rest.take(factors.b) }
            });
            dhidden = self.layer(index).backward(&kept, &forward.sequences, dy, linear, index > 0);
        }
    }

    fn layer(&self, index: usize) -> Layer<'a> {
        let (config, layer) = (&self.model.config, &self.model.layers[index]);
        let norm = |norm: &'a LayerNormWeights| layer_norm(norm, config.norm_eps);
        Layer {
            heads: config.heads,
            head_dim: config.head_dim(),
            activation: config.activation,
            projections: EncoderProjection::ALL.map(|projection| {
                let linear = &layer.projections[projection as usize];
                let weight = Weight::Stored(&linear.weight);
                let lora = (self.lora)(index, projection);
                Dense { linear: Linear { weight, lora, precision: self.precision }, bias: &linear.bias }
            }),
            attention_norm: norm(&layer.attention_norm),
            output_norm: norm(&layer.output_norm),
        }
    }
}

/// Where the gradients of a projection's factors lie in the flat vector; a frozen one has none.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerFactors {
    pub(super) a: Option<Range<usize>>,
    pub(super) b: Option<Range<usize>>,
}

/// Hands out ranges of a vector that rise and do not overlap.
struct Rest<'a> {
    values: &'a mut [f32],
    taken: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, range: Option<Range<usize>>) -> Option<&'a mut [f32]> {
        let range = range?;
        let rest = std::mem::take(&mut self.values);
        let (head, tail) = rest.split_at_mut(range.end - self.taken);
        let (_, out) = head.split_at_mut(range.start - self.taken);
        (self.values, self.taken) = (tail, range.end);
        Some(out)
    }
}

fn rows_of(ids: &[&[u32]]) -> Vec<Range<usize>> {
    let mut end = 0;
    let mut rows = |ids: &&[u32]| {
        end += ids.len();
        end - ids.len()..end
    };
    ids.iter().map(&mut rows).collect()
}

/// Token, position and first type, summed and normalized.
fn embed(model: &EncoderParts, ids: &[&[u32]]) -> Buffer {
    let width = model.config.hidden;
    let rows: usize = ids.iter().map(|ids| ids.len()).sum();
    let (mut x, mut row) = (buffer(rows * width), buffer(width));
    let mut first_type = buffer(width);
    model.token_types.dequantize_rows(0, 1, &mut first_type);
    let tokens = ids.iter().flat_map(|ids| ids.iter().enumerate());
    for (x, (position, id)) in x.chunks_exact_mut(width).zip(tokens) {
        model.token_embedding.dequantize_rows(*id as usize, 1, x);
        model.position_embedding.dequantize_rows(position, 1, &mut row);
        add(x, &row);
        add(x, &first_type);
    }
    layer_norm(&model.embedding_norm, model.config.norm_eps).forward(&mut x);
    x
}

fn layer_norm(norm: &LayerNormWeights, eps: f32) -> LayerNorm<'_> {
    LayerNorm { gain: &norm.gain, bias: &norm.bias, eps }
}

/// One vector a sequence, `[sequences, hidden]`.
pub(super) fn pooled(
    model: &EncoderParts,
    pooling: Pooling,
    hidden: &[f32],
    sequences: &[Range<usize>],
) -> Buffer {
    let width = model.config.hidden;
    let mut out = buffer(sequences.len() * width);
    for (out, rows) in out.chunks_exact_mut(width).zip(sequences) {
        let hidden = &hidden[rows.start * width..rows.end * width];
        out.copy_from_slice(&hidden[..width]);
        if pooling == Pooling::Mean {
            hidden.chunks_exact(width).skip(1).for_each(|row| add(out, row));
            let share = 1.0 / rows.len() as f32;
            out.iter_mut().for_each(|x| *x *= share);
        }
    }
    match (pooling, &model.pooler) {
        (Pooling::Pooler, Some(pooler)) => {
            let mut dense = buffer(out.len());
            Weight::Stored(&pooler.weight).forward(&out, &mut dense, Precision::F32);
            add_bias(&mut dense, &pooler.bias);
            dense.iter_mut().for_each(|x| *x = x.tanh());
            dense
        }
        (Pooling::Pooler, None) => unreachable!("pooling is checked before a pass"),
        (Pooling::Mean | Pooling::Cls, _) => out,
    }
}

/// The gradient of the last rows, given that of the pooled vectors, which is overwritten.
pub(super) fn pooled_backward(
    model: &EncoderParts,
    pooling: Pooling,
    sequences: &[Range<usize>],
    pooled: &[f32],
    dpooled: &mut Buffer,
) -> Buffer {
    let width = model.config.hidden;
    if let (Pooling::Pooler, Some(pooler)) = (pooling, &model.pooler) {
        dpooled.iter_mut().zip(pooled).for_each(|(d, y)| *d *= 1.0 - y * y);
        let mut first = buffer(dpooled.len());
        Weight::Stored(&pooler.weight).backward_input(dpooled, &mut first, Into::Overwrite, Precision::F32);
        *dpooled = first;
    }
    let rows = sequences.last().map_or(0, |rows| rows.end);
    let mut dhidden = buffer(rows * width);
    for (d, rows) in dpooled.chunks_exact(width).zip(sequences) {
        let out = &mut dhidden[rows.start * width..rows.end * width];
        if pooling == Pooling::Mean {
            let share = 1.0 / rows.len() as f32;
            out.chunks_exact_mut(width)
                .for_each(|row| row.iter_mut().zip(d).for_each(|(o, d)| *o = d * share));
        } else {
            let (first, others) = out.split_at_mut(width);
            first.copy_from_slice(d);
            others.fill(0.0);
        }
    }
    dhidden
}
