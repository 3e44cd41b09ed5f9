//! What some families add to a layer (`family.rs`): biases on q, k and v, norms of their heads, norms of what each half
//! adds to the residual stream. All of it is frozen, so the backward pass only goes through it.

use super::activation::add;
use super::norm::Norm;
use super::scratch::{Buffer, buffer};
use crate::family::Activation;

/// A layer's additions; nothing of it for Llama.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Extras<'a> {
    /// Of q, k and v.
    pub(crate) biases: Option<[&'a [f32]; 3]>,
    /// Of the heads of q and of k.
    pub(crate) head_norms: Option<[Norm<'a>; 2]>,
    /// Of what attention and what the feed-forward part add.
    pub(crate) post_norms: Option<[Norm<'a>; 2]>,
    pub(crate) activation: Activation,
}

/// The half of a layer that a post-norm stands behind.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Half {
    Attention,
    FeedForward,
}

/// Input of a norm and the reciprocal root mean squares of its rows.
#[derive(Debug)]
pub(crate) struct Normed {
    values: Buffer,
    inverse_rms: Buffer,
}

impl Extras<'_> {
    /// Adds the biases and normalizes the heads of q and k in place; returns what the way back needs.
    pub(crate) fn finish_heads(&self, q: &mut Buffer, k: &mut Buffer, v: &mut [f32]) -> Option<[Normed; 2]> {
        if let Some([q_bias, k_bias, v_bias]) = self.biases {
            for (x, bias) in [(&mut q[..], q_bias), (&mut k[..], k_bias), (v, v_bias)] {
                x.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
            }
        }
        let [q_norm, k_norm] = self.head_norms?;
        Some([normalize(q_norm, q), normalize(k_norm, k)])
    }

    /// From gradients of normalized heads to those of the projections, in place.
    pub(crate) fn heads_backward(&self, saved: Option<&[Normed; 2]>, dq: &mut Buffer, dk: &mut Buffer) {
        let (Some(norms), Some(saved)) = (self.head_norms, saved) else { return };
        for ((norm, saved), gradient) in norms.into_iter().zip(saved).zip([dq, dk]) {
            *gradient = backward(norm, saved, gradient);
        }
    }

    /// Normalizes in place what that half adds; returns what the way back needs.
    pub(crate) fn finish_half(&self, half: Half, output: &mut Buffer) -> Option<Normed> {
        Some(normalize(self.post_norms?[half as usize], output))
    }

    /// From the gradient of what the half adds to that of its last product, if there is a norm between them.
    pub(crate) fn half_backward(&self, half: Half, saved: Option<&Normed>, dy: &[f32]) -> Option<Buffer> {
        Some(backward(self.post_norms?[half as usize], saved?, dy))
    }
}

fn normalize(norm: Norm<'_>, x: &mut Buffer) -> Normed {
    let (normalized, inverse_rms) = norm.forward(x);
    Normed { values: std::mem::replace(x, normalized), inverse_rms }
}

fn backward(norm: Norm<'_>, saved: &Normed, dy: &[f32]) -> Buffer {
    let mut dx = buffer(dy.len());
    dx.fill(0.0);
    norm.backward_input(&saved.values, &saved.inverse_rms, dy, &mut dx);
    dx
}
