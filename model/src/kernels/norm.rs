//! RMSNorm: `out = x * gain / sqrt(mean(x^2) + eps)` by row (Zhang and Sennrich 2019), and its gradients.

use super::scratch::{Buffer, buffer};
use super::simd::{dot, dot3, simd_fn};

/// A normalization's gain and epsilon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) gain: &'a [f32],
    pub(crate) eps: f32,
}

impl Norm<'_> {
    /// Normalized rows, and the reciprocal root mean square of each row.
    pub(crate) fn forward(&self, x: &[f32]) -> (Buffer, Buffer) {
        let mut out = buffer(x.len());
        let mut inverse_rms = buffer(x.len() / self.gain.len());
        normalize_rows(x, self.gain, self.eps, &mut out, &mut inverse_rms);
        (out, inverse_rms)
    }

    /// Adds the gradient with respect to `x` to `dx`.
    pub(crate) fn backward_input(&self, x: &[f32], inverse_rms: &[f32], dy: &[f32], dx: &mut [f32]) {
        normalize_rows_backward(x, self.gain, inverse_rms, dy, dx);
    }

    /// Overwrites `dgain` with the gradient with respect to the gain.
    pub(crate) fn backward_gain(&self, x: &[f32], inverse_rms: &[f32], dy: &[f32], dgain: &mut [f32]) {
        gain_backward(x, inverse_rms, dy, dgain);
    }
}

simd_fn! {
    fn normalize_rows(x: &[f32], gain: &[f32], eps: f32, out: &mut [f32], inverse_rms: &mut [f32]) {
        let width = gain.len();
        for ((x, out), inverse) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(inverse_rms) {
            let r = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
            *inverse = r;
            for ((o, x), g) in out.iter_mut().zip(x).zip(gain) {
                *o = x * r * g;
            }
        }
    }
}

simd_fn! {
    fn normalize_rows_backward(x: &[f32], gain: &[f32], inverse_rms: &[f32], dy: &[f32], dx: &mut [f32]) {
        let width = gain.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for (((x, dy), dx), r) in rows.zip(inverse_rms) {
            let c = dot3(x, dy, gain) * r * r * r / width as f32;
            for (((d, x), dy), g) in dx.iter_mut().zip(x).zip(dy).zip(gain) {
                *d += dy * g * r - x * c;
            }
        }
    }
}

simd_fn! {
    fn gain_backward(x: &[f32], inverse_rms: &[f32], dy: &[f32], dgain: &mut [f32]) {
        let width = dgain.len();
        dgain.fill(0.0);
        for ((x, dy), r) in x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(inverse_rms) {
            for ((d, x), dy) in dgain.iter_mut().zip(x).zip(dy) {
                *d += x * dy * r;
            }
        }
    }
}
