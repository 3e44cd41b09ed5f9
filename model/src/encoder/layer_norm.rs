//! Layer normalization by row, `(x - mean) / sqrt(variance + eps) * gain + bias` (Ba et al. 2016), and the gradient
//! of its input.

use crate::kernels::scratch::{Buffer, buffer};
use crate::kernels::simd::{dot, dot3, simd_fn, sum};

/// A normalization's frozen values.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerNorm<'a> {
    pub(super) gain: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f32,
}

/// What the backward pass needs of a normalization.
#[derive(Debug)]
pub(super) struct Normalized {
    /// Rows of mean 0 and variance 1.
    values: Buffer,
    /// The reciprocal deviation of each row.
    inverse: Buffer,
}

impl LayerNorm<'_> {
    /// Replaces rows by normalized ones.
    pub(super) fn forward(&self, x: &mut [f32]) -> Normalized {
        let mut kept = Normalized { values: buffer(x.len()), inverse: buffer(x.len() / self.gain.len()) };
        center_rows(x, self.gain.len(), self.eps, &mut kept.values, &mut kept.inverse);
        scale_rows(&kept.values, self.gain, self.bias, x);
        kept
    }

    /// The output of `forward` again.
    pub(super) fn output(&self, kept: &Normalized) -> Buffer {
        let mut y = buffer(kept.values.len());
        scale_rows(&kept.values, self.gain, self.bias, &mut y);
        y
    }

    /// Replaces the gradient of the output by that of the input.
    pub(super) fn backward(&self, kept: &Normalized, dy: &mut [f32]) {
        rows_backward(&kept.values, self.gain, &kept.inverse, dy);
    }
}

simd_fn! {
    fn center_rows(x: &[f32], width: usize, eps: f32, normalized: &mut [f32], inverse: &mut [f32]) {
        let rows = x.chunks_exact(width).zip(normalized.chunks_exact_mut(width)).zip(inverse);
        for ((x, normalized), inverse) in rows {
            let mean = sum(x) / width as f32;
            for (n, x) in normalized.iter_mut().zip(x) {
                *n = x - mean;
            }
            let r = 1.0 / (dot(normalized, normalized) / width as f32 + eps).sqrt();
            *inverse = r;
            for n in normalized.iter_mut() {
                *n *= r;
            }
        }
    }
}

simd_fn! {
    fn scale_rows(normalized: &[f32], gain: &[f32], bias: &[f32], y: &mut [f32]) {
        let width = gain.len();
        for (y, n) in y.chunks_exact_mut(width).zip(normalized.chunks_exact(width)) {
            for (((y, n), g), b) in y.iter_mut().zip(n).zip(gain).zip(bias) {
                *y = n * g + b;
            }
        }
    }
}

simd_fn! {
    fn rows_backward(normalized: &[f32], gain: &[f32], inverse: &[f32], dy: &mut [f32]) {
        let width = gain.len();
        let rows = normalized.chunks_exact(width).zip(dy.chunks_exact_mut(width)).zip(inverse);
        for ((n, dy), r) in rows {
            let mean = dot(dy, gain) / width as f32;
            let along = dot3(dy, gain, n) / width as f32;
            for ((d, n), g) in dy.iter_mut().zip(n).zip(gain) {
                *d = r * (*d * g - mean - n * along);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::noise;

    const WIDTH: usize = 40;

    /// The sum of the outputs weighted by `dy`, in f64.
    fn weighted(x: &[f32], gain: &[f32], bias: &[f32], dy: &[f32]) -> f64 {
        let wide = |x: &f32| f64::from(*x);
        let mean = x.iter().map(wide).sum::<f64>() / WIDTH as f64;
        let variance = x.iter().map(|x| (wide(x) - mean).powi(2)).sum::<f64>() / WIDTH as f64;
        let y = |i: usize| (wide(&x[i]) - mean) / (variance + 1e-5).sqrt() * wide(&gain[i]) + wide(&bias[i]);
        (0..WIDTH).map(|i| y(i) * wide(&dy[i])).sum()
    }

    #[test]
    fn the_gradient_is_the_slope() {
        let (gain, bias) = (noise(WIDTH, 2.0, 1), noise(WIDTH, 1.0, 2));
        let (x, dy) = (noise(3 * WIDTH, 1.0, 3), noise(3 * WIDTH, 1.0, 4));
        let norm = LayerNorm { gain: &gain, bias: &bias, eps: 1e-5 };
        let mut y = x.clone();
        let kept = norm.forward(&mut y);
        assert_eq!(y, norm.output(&kept)[..]);
        let mut dx = dy.clone();
        norm.backward(&kept, &mut dx);
        for row in 0..3 {
            let at = row * WIDTH..(row + 1) * WIDTH;
            let sum: f64 = y[at.clone()].iter().zip(&dy[at.clone()]).map(|(y, d)| f64::from(y * d)).sum();
            assert!((sum - weighted(&x[at.clone()], &gain, &bias, &dy[at.clone()])).abs() < 1e-4);
            for i in [0, 17, WIDTH - 1] {
                let moved = |by: f32| {
                    let mut x = x[at.clone()].to_vec();
                    x[i] += by;
                    weighted(&x, &gain, &bias, &dy[at.clone()])
                };
                let slope = (moved(0.01) - moved(-0.01)) / 0.02;
                assert!((slope - f64::from(dx[at.start + i])).abs() < 2e-3, "row {row}, {i}: {slope}");
            }
        }
    }
}
