//! One pre-norm decoder layer, forward, over whole sequences for training and scoring. `layer_backward.rs` holds the
//! gradients, `infer.rs` the layer over new tokens with cached keys and values.

use super::activation::add;
use super::attention::{Attention, Heads};
use super::bf16::Precision;
use super::extras::{Extras, Half, Normed};
use super::kept::Kept;
use super::linear::Linear;
use super::norm::Norm;
use super::rope::{RopeTable, Turn};
use super::scratch::{Buffer, buffer};
use crate::config::Projection;

/// A layer's weights, wherever they come from.
#[derive(Debug)]
pub(crate) struct Layer<'a> {
    pub(crate) heads: Heads,
    pub(crate) rope: &'a RopeTable,
    pub(crate) attn_norm: Norm<'a>,
    pub(crate) ffn_norm: Norm<'a>,
    pub(crate) extras: Extras<'a>,
    /// By `Projection as usize`.
    pub(crate) projections: [Linear<'a>; 7],
}

/// `x A^T` of each adapted projection.
pub(crate) type LowActivations = [Option<Buffer>; 7];

/// What the backward pass needs again.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) attention: SavedAttention,
    pub(crate) feed_forward: SavedFeedForward,
    pub(crate) low: LowActivations,
}

/// Activations of the attention half; q and k are rotated.
#[derive(Debug)]
pub(crate) struct SavedAttention {
    pub(crate) inverse_rms: Buffer,
    pub(crate) q: Buffer,
    pub(crate) k: Buffer,
    pub(crate) v: Buffer,
    pub(crate) log_sum: Buffer,
    pub(crate) context: Buffer,
    pub(crate) heads: Option<[Normed; 2]>,
    pub(crate) output: Option<Normed>,
}

/// Activations of the feed-forward half; `input` is the residual stream between the halves.
#[derive(Debug)]
pub(crate) struct SavedFeedForward {
    pub(crate) input: Buffer,
    pub(crate) inverse_rms: Buffer,
    pub(crate) gate: Kept,
    pub(crate) up: Kept,
    pub(crate) output: Option<Normed>,
}

struct Projected {
    inverse_rms: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    heads: Option<[Normed; 2]>,
}

impl Layer<'_> {
    /// x and y: `[sequences * length, hidden]`. Without a `y` only what the backward pass needs is computed.
    pub(crate) fn forward(&self, x: &[f32], length: usize, y: Option<&mut [f32]>) -> Saved {
        let mut low = LowActivations::default();
        let p = self.project(x, length, &mut low);
        let (context, log_sum) = self.attend_sequences(&p, length);
        let mut input = self.apply(Projection::O, &context, &mut low);
        let output = self.extras.finish_half(Half::Attention, &mut input);
        add(&mut input, x);
        let feed_forward = self.finish(input, y, &mut low);
        let Projected { inverse_rms, q, k, v, heads } = p;
        let attention = SavedAttention { inverse_rms, q, k, v, log_sum, context, heads, output };
        Saved { attention, feed_forward, low }
    }

    /// All of a layer's products have that of its projections.
    pub(crate) fn precision(&self) -> Precision {
        self.projections[0].precision
    }

    pub(crate) fn projection(&self, p: Projection) -> &Linear<'_> {
        &self.projections[p as usize]
    }

    fn project(&self, x: &[f32], length: usize, low: &mut LowActivations) -> Projected {
        let (normalized, inverse_rms) = self.attn_norm.forward(x);
        let mut q = self.apply(Projection::Q, &normalized, low);
        let mut k = self.apply(Projection::K, &normalized, low);
        let mut v = self.apply(Projection::V, &normalized, low);
        let heads = self.extras.finish_heads(&mut q, &mut k, &mut v);
        self.rope.rotate(&mut q, self.heads.heads, 0, length, Turn::Forward);
        self.rope.rotate(&mut k, self.heads.kv_heads, 0, length, Turn::Forward);
        Projected { inverse_rms, q, k, v, heads }
    }

    fn attend_sequences(&self, p: &Projected, length: usize) -> (Buffer, Buffer) {
        let shape = self.heads;
        let mut context = buffer(p.q.len());
        let mut log_sum = buffer(p.q.len() / shape.head_dim);
        let (q_len, kv_len) = (length * shape.q_width(), length * shape.kv_width());
        let outputs = context.chunks_exact_mut(q_len).zip(log_sum.chunks_exact_mut(length * shape.heads));
        for (i, (context, log_sum)) in outputs.enumerate() {
            let (q, kv) = (i * q_len..(i + 1) * q_len, i * kv_len..(i + 1) * kv_len);
            let (k, v) = (&p.k[kv.clone()], &p.v[kv]);
            let attention = Attention { shape, q: &p.q[q], k, v, past: 0, precision: self.precision() };
            attention.forward(context, log_sum);
        }
        (context, log_sum)
    }

    fn finish(&self, input: Buffer, y: Option<&mut [f32]>, low: &mut LowActivations) -> SavedFeedForward {
        let (normalized, inverse_rms) = self.ffn_norm.forward(&input);
        let gate = self.apply(Projection::Gate, &normalized, low);
        let up = self.apply(Projection::Up, &normalized, low);
        drop(normalized);
        let mut output = None;
        let is_adapted = self.projection(Projection::Down).lora.is_some();
        if y.is_some() || is_adapted || self.extras.post_norms.is_some() {
            let mut activated = buffer(gate.len());
            self.extras.activation.gated(&gate, &up, &mut activated);
            (low[Projection::Down as usize], output) = self.down(&activated, &input, y);
        }
        let (gate, up) = (Kept::new(gate, self.precision()), Kept::new(up, self.precision()));
        SavedFeedForward { input, inverse_rms, gate, up, output }
    }

    /// Through the last product, as far as the backward pass needs it, and with a `y` to the layer's output.
    fn down(
        &self,
        activated: &[f32],
        input: &[f32],
        y: Option<&mut [f32]>,
    ) -> (Option<Buffer>, Option<Normed>) {
        let down = self.projection(Projection::Down);
        if self.extras.post_norms.is_some() {
            let mut added = buffer(input.len());
            let low = down.forward(activated, &mut added);
            let output = self.extras.finish_half(Half::FeedForward, &mut added);
            if let Some(y) = y {
                y.copy_from_slice(&added);
                add(y, input);
            }
            return (low, output);
        }
        let Some(y) = y else { return (down.lora.map(|lora| lora.project(activated)), None) };
        let low = down.forward(activated, y);
        add(y, input);
        (low, None)
    }

    fn apply(&self, p: Projection, x: &[f32], low: &mut LowActivations) -> Buffer {
        let linear = self.projection(p);
        let mut y = buffer(x.len() / linear.weight.cols() * linear.weight.rows());
        low[p as usize] = linear.forward(x, &mut y);
        y
    }
}
