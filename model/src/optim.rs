//! Optimizers over flat slices, with the update rules and defaults of torch.optim, and gradient clipping.

use crate::kernels::simd::{dot, simd_fn};

/// AdamW (Loshchilov and Hutter 2019): Adam with weight decay beside the gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Share of `learning_rate * value` taken away at each step.
    pub weight_decay: f32,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// AdamW's moments for one vector of values.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    step: i32,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl AdamW {
    /// Zero moments for `len` values.
    #[must_use]
    pub fn new(config: AdamWConfig, len: usize) -> Self {
        Self { config, step: 0, first: vec![0.0; len], second: vec![0.0; len] }
    }

    /// One update of `values` along `gradient`.
    ///
    /// # Panics
    /// If a slice is not as long as the moments.
    pub fn step(&mut self, values: &mut [f32], gradient: &[f32], learning_rate: f32) {
        assert!(
            values.len() == self.first.len() && gradient.len() == self.first.len(),
            "one value for each moment"
        );
        self.step += 1;
        let c = self.config;
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(self.step);
        let constants = AdamWStep {
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
            keep: 1.0 - learning_rate * c.weight_decay,
            step_size: (f64::from(learning_rate) / correction(c.beta1)) as f32,
            second_scale: (1.0 / correction(c.beta2).sqrt()) as f32,
        };
        adamw_step(&constants, values, gradient, &mut self.first, &mut self.second);
    }
}

struct AdamWStep {
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    step_size: f32,
    second_scale: f32,
}

simd_fn! {
    fn adamw_step(c: &AdamWStep, values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
            *m += (1.0 - c.beta1) * (g - *m);
            *v = c.beta2 * *v + (1.0 - c.beta2) * g * g;
            *p = *p * c.keep - c.step_size * *m / (v.sqrt() * c.second_scale + c.eps);
        }
    }
}

/// Stochastic gradient descent with momentum: `buffer = momentum * buffer + gradient`.
#[derive(Debug, Clone)]
pub struct Sgd {
    momentum: f32,
    velocity: Vec<f32>,
}

impl Sgd {
    /// At rest, for `len` values.
    #[must_use]
    pub fn new(momentum: f32, len: usize) -> Self {
        Self { momentum, velocity: if momentum == 0.0 { Vec::new() } else { vec![0.0; len] } }
    }

    /// One update of `values` along `gradient`.
    ///
    /// # Panics
    /// If a slice is not as long as the velocity.
    pub fn step(&mut self, values: &mut [f32], gradient: &[f32], learning_rate: f32) {
        assert!(values.len() == gradient.len(), "one gradient for each value");
        if self.momentum == 0.0 {
            return subtract_scaled(values, gradient, learning_rate);
        }
        assert!(values.len() == self.velocity.len(), "one velocity for each value");
        for (v, g) in self.velocity.iter_mut().zip(gradient) {
            *v = self.momentum * *v + g;
        }
        subtract_scaled(values, &self.velocity, learning_rate);
    }
}

simd_fn! {
    fn subtract_scaled(values: &mut [f32], direction: &[f32], factor: f32) {
        for (p, d) in values.iter_mut().zip(direction) {
            *p -= factor * d;
        }
    }
}

/// Scales the gradient down to the norm `max` if it is longer; returns the norm it had.
///
/// As `torch.nn.utils.clip_grad_norm_`: the factor is `max / (norm + 1e-6)`, at most 1.
pub fn clip_gradient_norm(gradient: &mut [f32], max: f32) -> f32 {
    let norm = squared_norm(gradient).sqrt() as f32;
    let factor = max / (norm + 1e-6);
    if factor < 1.0 {
        gradient.iter_mut().for_each(|g| *g *= factor);
    }
    norm
}

simd_fn! {
    fn squared_norm(values: &[f32]) -> f64 {
        values.chunks(4096).map(|c| f64::from(dot(c, c))).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adamw_follows_its_formula() {
        let config = AdamWConfig { beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
        let mut optimizer = AdamW::new(config, 40);
        let mut values: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut expected: Vec<[f64; 3]> = values.iter().map(|x| [f64::from(*x), 0.0, 0.0]).collect();
        for step in 1..=5 {
            let gradient: Vec<f32> = (0..40).map(|i| (i as f32 + step as f32).cos()).collect();
            optimizer.step(&mut values, &gradient, 0.05);
            for ([p, m, v], g) in expected.iter_mut().zip(&gradient) {
                let g = f64::from(*g);
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.99 * *v + 0.01 * g * g;
                let (m_hat, v_hat) = (*m / (1.0 - 0.9f64.powi(step)), *v / (1.0 - 0.99f64.powi(step)));
                *p -= 0.05 * 0.1 * *p + 0.05 * m_hat / (v_hat.sqrt() + 1e-6);
            }
        }
        let close = |(a, [b, ..]): (&f32, &[f64; 3])| (f64::from(*a) - b).abs() < 2e-6;
        assert!(values.iter().zip(&expected).all(close));
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip_gradient_norm(&mut gradient, 10.0), 5.0);
        assert_eq!(gradient, [3.0, 4.0]);
        assert_eq!(clip_gradient_norm(&mut gradient, 1.0), 5.0);
        assert!((gradient[0] - 0.6).abs() < 1e-6 && (gradient[1] - 0.8).abs() < 1e-6);
    }

    #[test]
    fn sgd_gathers_momentum() {
        let mut optimizer = Sgd::new(0.5, 1);
        let mut value = [1.0f32];
        optimizer.step(&mut value, &[1.0], 0.1);
        assert!((value[0] - 0.9).abs() < 1e-7);
        optimizer.step(&mut value, &[1.0], 0.1);
        assert!((value[0] - 0.75).abs() < 1e-7);
        Sgd::new(0.0, 1).step(&mut value, &[0.5], 1.0);
        assert!((value[0] - 0.25).abs() < 1e-7);
    }
}
