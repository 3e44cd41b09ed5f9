//! SwiGLU, `silu(gate) * up`, and GeGLU, `gelu(gate) * up` (Shazeer 2020), their gradients, and sums of vectors.

use super::simd::{exp, simd_fn};
use crate::family::Activation;

/// `sqrt(8 / pi)` and the cubic factor of GELU's approximation: `gelu(x) = x * sigmoid(SLOPE * (x + CUBE * x^3))`, the
/// same as half of `x * (1 + tanh(..))` (Hendrycks and Gimpel 2016).
const SLOPE: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

impl Activation {
    /// `out = activation(gate) * up`.
    pub(crate) fn gated(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match self {
            Self::Silu => swiglu(gate, up, out),
            Self::GeluTanh => geglu(gate, up, out),
        }
    }

    /// Turns the gradient of that in `da` into that of the gate, in place, and writes that of `up`.
    pub(crate) fn gated_backward(self, da: &mut [f32], gate: &[f32], up: &[f32], dup: &mut [f32]) {
        match self {
            Self::Silu => swiglu_backward(da, gate, up, dup),
            Self::GeluTanh => geglu_backward(da, gate, up, dup),
        }
    }
}

simd_fn! {
    /// `out = silu(gate) * up`.
    fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

simd_fn! {
    /// Turns the gradient of the activation in `da` into that of the gate, in place, and writes that of `up`.
    fn swiglu_backward(da: &mut [f32], gate: &[f32], up: &[f32], dup: &mut [f32]) {
        for (((d, g), u), du) in da.iter_mut().zip(gate).zip(up).zip(dup) {
            let s = 1.0 / (1.0 + exp(-g));
            let silu = g * s;
            *du = *d * silu;
            *d *= u * (s + silu * (1.0 - s));
        }
    }
}

simd_fn! {
    /// `out = gelu(gate) * up`.
    fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-SLOPE * (g + CUBE * g * g * g))) * u;
        }
    }
}

simd_fn! {
    /// Turns the gradient of the activation in `da` into that of the gate, in place, and writes that of `up`.
    fn geglu_backward(da: &mut [f32], gate: &[f32], up: &[f32], dup: &mut [f32]) {
        for (((d, g), u), du) in da.iter_mut().zip(gate).zip(up).zip(dup) {
            let s = 1.0 / (1.0 + exp(-SLOPE * (g + CUBE * g * g * g)));
            *du = *d * g * s;
            *d *= u * (s + g * s * (1.0 - s) * SLOPE * (1.0 + 3.0 * CUBE * g * g));
        }
    }
}

simd_fn! {
    /// `a *= factor`.
    pub(crate) fn scale(a: &mut [f32], factor: f32) {
        for a in a.iter_mut() {
            *a *= factor;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition with tanh, and its slope by differences, in f64.
    #[test]
    fn gelu_is_that_of_the_definition() {
        let gelu = |x: f64| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        };
        let gates: Vec<f32> = (-400..=400).map(|i| i as f32 / 25.0).chain([-1e4, 1e4]).collect();
        let ups: Vec<f32> = (0..gates.len()).map(|i| 1.5 - (i % 7) as f32).collect();
        let mut out = vec![0.0; gates.len()];
        Activation::GeluTanh.gated(&gates, &ups, &mut out);
        let (mut da, mut dup) = (vec![2.0; gates.len()], vec![0.0; gates.len()]);
        Activation::GeluTanh.gated_backward(&mut da, &gates, &ups, &mut dup);
        for (i, (gate, up)) in gates.iter().zip(&ups).enumerate() {
            let (x, up) = (f64::from(*gate), f64::from(*up));
            let close = |found: f32, expected: f64| {
                assert!(
                    (f64::from(found) - expected).abs() < 2e-6 * (1.0 + expected.abs()),
                    "{x}: {found}, {expected}"
                );
            };
            close(out[i], gelu(x) * up);
            close(dup[i], 2.0 * gelu(x));
            let slope = if x.abs() > 100.0 {
                f64::from(u8::from(x > 0.0))
            } else {
                (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5
            };
            close(da[i], 2.0 * up * slope);
        }
    }
}
