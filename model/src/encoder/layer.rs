//! One encoder layer: attention, then the feed-forward part, each followed by a normalization of its sum with what
//! it was given (Vaswani et al. 2017, "post-norm"). Forward, and backward to LoRA's factors and the input.

use std::ops::Range;

use super::attention::{SelfAttention, SelfAttentionGradients};
use super::config::{Activation, EncoderProjection};
use super::gelu;
use super::layer_norm::{LayerNorm, Normalized};
use crate::kernels::activation::add;
use crate::kernels::linear::{Linear, LinearGradients};
use crate::kernels::matrix::Into;
use crate::kernels::scratch::{Buffer, buffer};
use crate::kernels::simd::simd_fn;

/// A projection and its bias.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense<'a> {
    pub(super) linear: Linear<'a>,
    pub(super) bias: &'a [f32],
}

/// What one layer computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer<'a> {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) activation: Activation,
    /// By `EncoderProjection as usize`.
    pub(super) projections: [Dense<'a>; 6],
    pub(super) attention_norm: LayerNorm<'a>,
    pub(super) output_norm: LayerNorm<'a>,
}

/// What the backward pass needs of the forward pass.
#[derive(Debug)]
pub(super) struct Kept {
    x: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// One sequence's `[heads, rows]` after another.
    log_sum: Buffer,
    context: Buffer,
    attention_norm: Normalized,
    /// Input of the activation.
    up: Buffer,
    output_norm: Normalized,
    /// `x A^T` of each adapted projection.
    low: [Option<Buffer>; 6],
}

impl Dense<'_> {
    /// `x W^T + b`, and what LoRA's branch keeps.
    pub(super) fn forward(&self, x: &[f32]) -> (Buffer, Option<Buffer>) {
        let weight = self.linear.weight;
        let mut y = buffer(x.len() / weight.cols() * weight.rows());
        let low = self.linear.forward(x, &mut y);
        add_bias(&mut y, self.bias);
        (y, low)
    }
}

impl Layer<'_> {
    fn dense(&self, projection: EncoderProjection) -> &Dense<'_> {
        &self.projections[projection as usize]
    }

    /// The rows after the layer; `sequences` are the rows of each sequence.
    pub(super) fn forward(&self, x: Buffer, sequences: &[Range<usize>]) -> (Buffer, Kept) {
        use EncoderProjection as P;
        let (q, low_q) = self.dense(P::Query).forward(&x);
        let (k, low_k) = self.dense(P::Key).forward(&x);
        let (v, low_v) = self.dense(P::Value).forward(&x);
        let (mut context, mut log_sum) = (buffer(q.len()), buffer(q.len() / self.head_dim));
        for rows in sequences {
            let wide = self.wide(rows);
            let sums = &mut log_sum[rows.start * self.heads..rows.end * self.heads];
            self.attention(&q, &k, &v, rows).forward(&mut context[wide], sums);
        }
        let (mut y, low_o) = self.dense(P::AttentionOutput).forward(&context);
        add(&mut y, &x);
        let attention_norm = self.attention_norm.forward(&mut y);
        let (up, low_up) = self.dense(P::Intermediate).forward(&y);
        let (mut out, low_down) = self.dense(P::Output).forward(&self.activated(&up));
        add(&mut out, &y);
        let output_norm = self.output_norm.forward(&mut out);
        let low = [low_q, low_k, low_v, low_o, low_up, low_down];
        (out, Kept { x, q, k, v, log_sum, context, attention_norm, up, output_norm, low })
    }

    /// Overwrites the gradients of the projections, given that of the output; returns that of the input if it is
    /// asked for.
    pub(super) fn backward(
        &self,
        kept: &Kept,
        sequences: &[Range<usize>],
        mut dy: Buffer,
        mut gradients: [LinearGradients<'_>; 6],
        need_dx: bool,
    ) -> Option<Buffer> {
        use EncoderProjection as P;
        let mut back = |projection: P, x: &[f32], dy: &[f32], dx: Option<(&mut [f32], Into)>| {
            let low = kept.low[projection as usize].as_ref();
            let gradients = &mut gradients[projection as usize];
            self.dense(projection).linear.backward(x, low, dy, gradients, dx);
        };
        self.output_norm.backward(&kept.output_norm, &mut dy);
        let mut dup = buffer(kept.up.len());
        back(P::Output, &self.activated(&kept.up), &dy, Some((&mut dup, Into::Overwrite)));
        gelu::backward(self.activation, &kept.up, &mut dup);
        let middle = self.attention_norm.output(&kept.attention_norm);
        back(P::Intermediate, &middle, &dup, Some((&mut dy, Into::Add)));
        drop((dup, middle));

        self.attention_norm.backward(&kept.attention_norm, &mut dy);
        let mut dcontext = buffer(kept.context.len());
        back(P::AttentionOutput, &kept.context, &dy, Some((&mut dcontext, Into::Overwrite)));
        let (mut dq, mut dk, mut dv) = (buffer(kept.q.len()), buffer(kept.k.len()), buffer(kept.v.len()));
        for rows in sequences {
            let wide = self.wide(rows);
            let mut out = SelfAttentionGradients {
                dq: &mut dq[wide.clone()],
                dk: &mut dk[wide.clone()],
                dv: &mut dv[wide.clone()],
            };
            let sums = &kept.log_sum[rows.start * self.heads..rows.end * self.heads];
            self.attention(&kept.q, &kept.k, &kept.v, rows).backward(sums, &dcontext[wide], &mut out);
        }
        for (projection, dy_of) in [(P::Query, &dq), (P::Key, &dk), (P::Value, &dv)] {
            let dx = need_dx.then_some((&mut dy[..], Into::Add));
            back(projection, &kept.x, dy_of, dx);
        }
        need_dx.then_some(dy)
    }

    fn activated(&self, up: &[f32]) -> Buffer {
        let mut activated = buffer(up.len());
        gelu::forward(self.activation, up, &mut activated);
        activated
    }

    fn wide(&self, rows: &Range<usize>) -> Range<usize> {
        let width = self.heads * self.head_dim;
        rows.start * width..rows.end * width
    }

    fn attention<'a>(
        &self,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
        rows: &Range<usize>,
    ) -> SelfAttention<'a> {
        let wide = self.wide(rows);
        SelfAttention {
            heads: self.heads,
            head_dim: self.head_dim,
            q: &q[wide.clone()],
            k: &k[wide.clone()],
            v: &v[wide],
        }
    }
}

simd_fn! {
    /// Adds the bias to every row.
    pub(super) fn add_bias(y: &mut [f32], bias: &[f32]) {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
}
