//! GELU (Hendrycks and Gimpel 2016), exact and by hyperbolic tangent, and its slope.

use super::config::Activation;
use crate::kernels::simd::{exp, simd_fn};

/// Writes the activation of `u`.
pub(super) fn forward(activation: Activation, u: &[f32], out: &mut [f32]) {
    match activation {
        Activation::Gelu => exact(u, out),
        Activation::GeluTanh => tanh_form(u, out),
    }
}

/// Turns the gradient of the activation into that of `u`.
pub(super) fn backward(activation: Activation, u: &[f32], d: &mut [f32]) {
    match activation {
        Activation::Gelu => exact_backward(u, d),
        Activation::GeluTanh => tanh_form_backward(u, d),
    }
}

/// The normal distribution function and its density, both with an absolute error below 2e-7 (Abramowitz and
/// Stegun 1964, formula 7.1.26).
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const INVERSE_ROOT_2: f32 = std::f32::consts::FRAC_1_SQRT_2;
    const INVERSE_ROOT_2_PI: f32 = 0.398_942_3;
    let e = exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * INVERSE_ROOT_2 * x.abs());
    let mut p = 1.061_405_4_f32;
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p * t + c;
    }
    let tail = 0.5 * p * t * e;
    let below = if x < 0.0 { tail } else { 1.0 - tail };
    (below, INVERSE_ROOT_2_PI * e)
}

/// Of the form with tanh: its value over x, and the slope of its inner part times the slope of tanh over 2.
#[inline(always)]
fn tanh_parts(x: f32) -> (f32, f32) {
    const ROOT_2_OVER_PI: f32 = 0.797_884_6;
    const CUBIC: f32 = 0.044_715;
    let inner = ROOT_2_OVER_PI * x * (1.0 + CUBIC * x * x);
    // (1 + tanh z) / 2 is the logistic function of 2 z.
    let share = 1.0 / (1.0 + exp(-2.0 * inner));
    let slope = 2.0 * share * (1.0 - share) * ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    (share, slope)
}

simd_fn! {
    fn exact(u: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(u) {
            *o = x * normal(*x).0;
        }
    }
}

simd_fn! {
    fn exact_backward(u: &[f32], d: &mut [f32]) {
        for (d, x) in d.iter_mut().zip(u) {
            let (below, density) = normal(*x);
            *d *= below + x * density;
        }
    }
}

simd_fn! {
    fn tanh_form(u: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(u) {
            *o = x * tanh_parts(*x).0;
        }
    }
}

simd_fn! {
    fn tanh_form_backward(u: &[f32], d: &mut [f32]) {
        for (d, x) in d.iter_mut().zip(u) {
            let (share, slope) = tanh_parts(*x);
            *d *= share + x * slope;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf by its series, in f64.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    fn expected(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }

    #[test]
    fn values_and_slopes_are_those_of_the_formulas() {
        let x: Vec<f32> = (-500..=500).map(|i| i as f32 / 100.0).collect();
        for activation in [Activation::Gelu, Activation::GeluTanh] {
            let (mut y, mut slope) = (vec![0.0; x.len()], vec![1.0; x.len()]);
            forward(activation, &x, &mut y);
            backward(activation, &x, &mut slope);
            for ((x, y), slope) in x.iter().zip(&y).zip(&slope) {
                let wide = f64::from(*x);
                assert!((f64::from(*y) - expected(activation, wide)).abs() < 1.5e-6, "{activation:?} {x}");
                let steps = expected(activation, wide + 1e-4) - expected(activation, wide - 1e-4);
                assert!((f64::from(*slope) - steps / 2e-4).abs() < 2e-6, "{activation:?} {x}: {slope}");
            }
        }
    }

    #[test]
    fn large_values_stay_finite() {
        for activation in [Activation::Gelu, Activation::GeluTanh] {
            let (mut y, mut slope) = ([0.0; 2], [1.0; 2]);
            forward(activation, &[-1e4, 1e4], &mut y);
            backward(activation, &[-1e4, 1e4], &mut slope);
            assert!(y[0].abs() < 1e-6 && y[1] == 1e4, "{y:?}");
            assert!(slope[0].abs() < 1e-6 && (slope[1] - 1.0).abs() < 1e-6, "{slope:?}");
        }
    }
}
