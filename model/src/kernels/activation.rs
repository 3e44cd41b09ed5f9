//! SwiGLU, `silu(gate) * up` (Shazeer 2020), its gradient, and sums of vectors.

use super::simd::{exp, simd_fn};

simd_fn! {
    /// `out = silu(gate) * up`.
    pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

simd_fn! {
    /// Turns the gradient of the activation in `da` into that of the gate, in place, and writes that of `up`.
    pub(crate) fn swiglu_backward(da: &mut [f32], gate: &[f32], up: &[f32], dup: &mut [f32]) {
        for (((d, g), u), du) in da.iter_mut().zip(gate).zip(up).zip(dup) {
            let s = 1.0 / (1.0 + exp(-g));
            let silu = g * s;
            *du = *d * silu;
            *d *= u * (s + silu * (1.0 - s));
        }
    }
}

simd_fn! {
    /// `a += b`.
    pub(crate) fn add(a: &mut [f32], b: &[f32]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }
}
