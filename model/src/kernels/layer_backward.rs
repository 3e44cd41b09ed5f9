//! Gradients of a decoder layer, written by hand. Norm outputs and the SwiGLU product are computed again
//! rather than saved: they cost a pass over memory, the products around them hundreds.

use super::attention::{Attention, AttentionGradients};
use super::extras::Half;
use super::layer::{Layer, Saved};
use super::linear::LinearGradients;
use super::matrix::Into;
use super::norm::Norm;
use super::rope::Turn;
use super::scratch::{Buffer, buffer};
use crate::config::Projection;

/// Where a layer's gradients go; `None` is not computed.
#[derive(Debug, Default)]
pub(crate) struct LayerGradients<'a> {
    pub(crate) attn_norm: Option<&'a mut [f32]>,
    pub(crate) ffn_norm: Option<&'a mut [f32]>,
    /// By `Projection as usize`.
    pub(crate) projections: [LinearGradients<'a>; 7],
}

/// One call's inputs: the layer's input, its saved activations and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerPass<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) length: usize,
    pub(crate) saved: &'a Saved,
    pub(crate) dy: &'a [f32],
}

struct HeadsGradient {
    dq: Buffer,
    dk: Buffer,
    dv: Buffer,
}

impl Layer<'_> {
    /// Fills `gradients`; returns the gradient of x if `needs_dx`.
    pub(crate) fn backward(
        &self,
        pass: LayerPass<'_>,
        gradients: &mut LayerGradients<'_>,
        needs_dx: bool,
    ) -> Option<Vec<f32>> {
        let mut dx = pass.dy.to_vec();
        self.feed_forward_backward(pass, gradients, &mut dx);
        let heads = self.attention_backward(pass, gradients, &dx);
        self.inputs_backward(pass, heads, gradients, needs_dx.then_some(&mut dx));
        needs_dx.then_some(dx)
    }

    /// Adds the feed-forward half's gradient to `dx`, which starts as that of the residual branch.
    fn feed_forward_backward(&self, pass: LayerPass<'_>, gradients: &mut LayerGradients<'_>, dx: &mut [f32]) {
        let saved = &pass.saved.feed_forward;
        let (gate, up) = (saved.gate.values(), saved.up.values());
        let mut dgate = self.down_backward(pass, (&gate, &up), gradients);
        let mut dup = buffer(dgate.len());
        self.extras.activation.gated_backward(&mut dgate, &gate, &up, &mut dup);
        drop((gate, up));
        let normalized = self.input_if_needed(
            &self.ffn_norm,
            &saved.input,
            gradients,
            &[Projection::Gate, Projection::Up],
        );
        let mut dnormalized = buffer(dx.len());
        let low = &pass.saved.low;
        for (p, dy, into) in [(Projection::Gate, &dgate, Into::Overwrite), (Projection::Up, &dup, Into::Add)]
        {
            let i = p as usize;
            let out = Some((&mut dnormalized[..], into));
            self.projections[i].backward(
                &normalized,
                low[i].as_ref(),
                dy,
                &mut gradients.projections[i],
                out,
            );
        }
        self.ffn_norm.backward_input(&saved.input, &saved.inverse_rms, &dnormalized, dx);
        if let Some(gain) = gradients.ffn_norm.as_deref_mut() {
            self.ffn_norm.backward_gain(&saved.input, &saved.inverse_rms, &dnormalized, gain);
        }
    }

    fn down_backward(
        &self,
        pass: LayerPass<'_>,
        (gate, up): (&[f32], &[f32]),
        gradients: &mut LayerGradients<'_>,
    ) -> Buffer {
        let i = Projection::Down as usize;
        let gradients = &mut gradients.projections[i];
        let mut activated = buffer(if gradients.need_input() { gate.len() } else { 0 });
        self.extras.activation.gated(gate, up, &mut activated);
        let mut dactivated = buffer(gate.len());
        let out = Some((&mut dactivated[..], Into::Overwrite));
        let before_norm =
            self.extras.half_backward(Half::FeedForward, pass.saved.feed_forward.output.as_ref(), pass.dy);
        let dy = before_norm.as_deref().unwrap_or(pass.dy);
        self.projections[i].backward(&activated, pass.saved.low[i].as_ref(), dy, gradients, out);
        dactivated
    }

    /// Through the output projection, the attention and the rotation, given the gradient of their sum.
    fn attention_backward(
        &self,
        pass: LayerPass<'_>,
        gradients: &mut LayerGradients<'_>,
        dy: &[f32],
    ) -> HeadsGradient {
        let (saved, shape, i) = (&pass.saved.attention, self.heads, Projection::O as usize);
        let before_norm = self.extras.half_backward(Half::Attention, saved.output.as_ref(), dy);
        let dy = before_norm.as_deref().unwrap_or(dy);
        let mut dcontext = buffer(saved.context.len());
        let out = Some((&mut dcontext[..], Into::Overwrite));
        self.projections[i].backward(
            &saved.context,
            pass.saved.low[i].as_ref(),
            dy,
            &mut gradients.projections[i],
            out,
        );
        let (mut dq, mut dk, mut dv) = (buffer(saved.q.len()), buffer(saved.k.len()), buffer(saved.v.len()));
        let (q_len, kv_len) = (pass.length * shape.q_width(), pass.length * shape.kv_width());
        for sequence in 0..saved.q.len() / q_len {
            let (q, kv) =
                (sequence * q_len..(sequence + 1) * q_len, sequence * kv_len..(sequence + 1) * kv_len);
            let log_sum = &saved.log_sum[sequence * pass.length * shape.heads..][..pass.length * shape.heads];
            let attention = Attention {
                shape,
                q: &saved.q[q.clone()],
                k: &saved.k[kv.clone()],
                v: &saved.v[kv.clone()],
                past: 0,
                precision: self.precision(),
            };
            let mut out =
                AttentionGradients { dq: &mut dq[q.clone()], dk: &mut dk[kv.clone()], dv: &mut dv[kv] };
            attention.backward(log_sum, &dcontext[q], &mut out);
        }
        self.rope.rotate(&mut dq, shape.heads, 0, pass.length, Turn::Backward);
        self.rope.rotate(&mut dk, shape.kv_heads, 0, pass.length, Turn::Backward);
        self.extras.heads_backward(saved.heads.as_ref(), &mut dq, &mut dk);
        HeadsGradient { dq, dk, dv }
    }

    /// Through q, k, v and the first norm; adds to `dx` where it is wanted.
    fn inputs_backward(
        &self,
        pass: LayerPass<'_>,
        heads: HeadsGradient,
        gradients: &mut LayerGradients<'_>,
        dx: Option<&mut Vec<f32>>,
    ) {
        let through_norm = dx.is_some() || gradients.attn_norm.is_some();
        let inputs = [Projection::Q, Projection::K, Projection::V];
        let normalized = self.input_if_needed(&self.attn_norm, pass.x, gradients, &inputs);
        let mut dnormalized = buffer(if through_norm { pass.x.len() } else { 0 });
        for (p, dy) in inputs.into_iter().zip([&heads.dq, &heads.dk, &heads.dv]) {
            let i = p as usize;
            let into = if p == Projection::Q { Into::Overwrite } else { Into::Add };
            let out = through_norm.then_some((&mut dnormalized[..], into));
            self.projections[i].backward(
                &normalized,
                pass.saved.low[i].as_ref(),
                dy,
                &mut gradients.projections[i],
                out,
            );
        }
        let inverse_rms = &pass.saved.attention.inverse_rms;
        if let Some(dx) = dx {
            self.attn_norm.backward_input(pass.x, inverse_rms, &dnormalized, dx);
        }
        if let Some(gain) = gradients.attn_norm.as_deref_mut() {
            self.attn_norm.backward_gain(pass.x, inverse_rms, &dnormalized, gain);
        }
    }

    /// The norm's output if a gradient of one of the projections behind it needs it, else nothing.
    fn input_if_needed(
        &self,
        norm: &Norm<'_>,
        x: &[f32],
        gradients: &LayerGradients<'_>,
        behind: &[Projection],
    ) -> Buffer {
        let needed = behind.iter().any(|p| gradients.projections[*p as usize].need_input());
        if needed { norm.forward(x).0 } else { buffer(0) }
    }
}
