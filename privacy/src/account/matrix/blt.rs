//! Buffered linear Toeplitz strategies: correlated noise from a few buffers instead of the whole history
//! (Dvijotham, McMahan, Pillutla, Steinke and Thakurta 2024, "Efficient and Near-Optimal Noise Generation for
//! Streaming Differential Privacy"; several participations: McMahan, Xu and Zhang 2024, "A Hassle-free
//! Algorithm for Private Learning in Practice").

use super::{MatrixSensitivity, Participation, Toeplitz};
use crate::account::convert::AccountError;

/// The Toeplitz matrix with coefficients `c_0 = 1` and `c_i = sum_j omega_j theta_j^(i-1)`.
#[derive(Debug, Clone, PartialEq)]
pub struct BufferedToeplitz {
    decay: Vec<f64>,
    scale: Vec<f64>,
}

impl BufferedToeplitz {
    /// `decay` are the theta, `scale` the omega, one of each for a buffer.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless there is one scale for each decay, decays are between 0 and 1,
    /// included, and strictly decrease, and scales are positive.
    pub fn new(decay: Vec<f64>, scale: Vec<f64>) -> Result<Self, AccountError> {
        #[expect(clippy::cast_precision_loss, reason = "a handful of buffers")]
        let (decays, scales) = (decay.len() as f64, scale.len() as f64);
        AccountError::check(decays == scales, "buffers", scales, "one scale for each decay")?;
        let mut above = f64::INFINITY;
        for theta in &decay {
            let falls = (0.0..=1.0).contains(theta) && *theta < above;
            AccountError::check(falls, "decay", *theta, "between 0 and 1 and below the one before")?;
            above = *theta;
        }
        for omega in &scale {
            AccountError::check(omega.is_finite() && *omega > 0.0, "scale", *omega, "finite and positive")?;
        }
        Ok(Self { decay, scale })
    }

    /// The decays, one for each buffer.
    #[must_use]
    pub fn decay(&self) -> &[f64] {
        &self.decay
    }

    /// The scales, one for each buffer.
    #[must_use]
    pub fn scale(&self) -> &[f64] {
        &self.scale
    }

    /// The matrix of `steps` rounds, at least one.
    #[must_use]
    pub fn toeplitz(&self, steps: u32) -> Toeplitz {
        // By construction its coefficients are finite and the first is 1.
        Toeplitz::new(series(&self.decay, &self.scale, steps)).unwrap_or_else(|_| Toeplitz::identity())
    }

    /// Decays and scales of the inverse, which has the same form: `d_i = sum_j scale_j decay_j^(i-1)`.
    ///
    /// McMahan and Pillutla 2025, "An Inversion Theorem for Buffered Linear Toeplitz (BLT) Matrices", for the
    /// form. The generating function of `c` is `f(1/x)` with `f(y) = 1 + sum_j omega_j / (y - theta_j)`. The decays of
    /// the inverse are the zeros of `f`, one below each theta and above the next; its scales the residues
    /// `1 / f'` there. Scales are negative; the last decay may be.
    #[must_use]
    pub fn inverse_parameters(&self) -> (Vec<f64>, Vec<f64>) {
        let zeros: Vec<f64> = (0..self.decay.len()).map(|j| self.zero_below(j)).collect();
        let slope =
            |y: &f64| -> f64 { self.terms(*y).map(|(omega, distance)| -omega / (distance * distance)).sum() };
        let scales = zeros.iter().map(|y| 1.0 / slope(y)).collect();
        (zeros, scales)
    }

    /// The zero of `f` between the theta of place `j` and the next, by bisection: there `f` falls from plus to
    /// minus infinity. Below the last, `f` is not negative at a distance of the sum of all omega.
    fn zero_below(&self, j: usize) -> f64 {
        let last = self.decay[j] - self.scale.iter().sum::<f64>();
        let (mut low, mut high) = (self.decay.get(j + 1).copied().unwrap_or(last), self.decay[j]);
        for _ in 0..200 {
            let middle = 0.5 * (low + high);
            let value = 1.0 + self.terms(middle).map(|(omega, distance)| omega / distance).sum::<f64>();
            if value >= 0.0 { low = middle } else { high = middle }
        }
        0.5 * (low + high)
    }

    fn terms(&self, y: f64) -> impl Iterator<Item = (f64, f64)> {
        self.scale.iter().zip(&self.decay).map(move |(omega, theta)| (*omega, y - theta))
    }

    /// Sensitivity under a participation pattern, by [`Toeplitz::sensitivity`]; exact where the scales sum to at
    /// most 1.
    #[must_use]
    pub fn sensitivity(&self, participation: Participation) -> MatrixSensitivity {
        self.toeplitz(participation.steps()).sensitivity(participation)
    }

    /// The greatest error variance of the sums, as [`Toeplitz::max_error`]: one pass, since `A C^-1 = C^-1 A`.
    #[must_use]
    pub fn max_error(&self, steps: u32) -> f64 {
        let mut buffers = self.buffers(1);
        let mut error = 0.0;
        for _ in 0..steps {
            let mut value = [1.0];
            buffers.inv_multiply_next(&mut value);
            error += value[0] * value[0];
        }
        error
    }

    /// What to compare strategies by at equal privacy: the root of sensitivity squared times [`Self::max_error`].
    #[must_use]
    pub fn rms_loss(&self, participation: Participation) -> f64 {
        (self.sensitivity(participation).squared() * self.max_error(participation.steps())).sqrt()
    }

    /// Empty buffers for vectors of `dimension` coordinates.
    #[must_use]
    pub fn buffers(&self, dimension: usize) -> NoiseBuffers {
        NoiseBuffers { strategy: self.clone(), buffers: vec![vec![0.0; dimension]; self.decay.len()] }
    }
}

/// Multiplies a stream of vectors by `C^-1`, row after row, with one vector of memory for each buffer.
///
/// Of Gaussian rows it makes the correlated noise. It works in floating point: for simulation and planning; it
/// is no sampler whose output's law is proven.
#[derive(Debug, Clone)]
pub struct NoiseBuffers {
    strategy: BufferedToeplitz,
    buffers: Vec<Vec<f64>>,
}

impl NoiseBuffers {
    /// Replaces the next row `y` of `Y` by that of `C^-1 Y`: `x = y - sum_j omega_j S_j`, then
    /// `S_j = theta_j S_j + x` (Dvijotham et al. 2024).
    ///
    /// # Panics
    /// Where the row is not of the buffers' dimension.
    pub fn inv_multiply_next(&mut self, row: &mut [f64]) {
        let Self { strategy, buffers } = self;
        for (buffer, omega) in buffers.iter().zip(&strategy.scale) {
            assert_eq!(buffer.len(), row.len(), "a row must have the buffers' dimension");
            row.iter_mut().zip(buffer).for_each(|(x, s)| *x -= omega * s);
        }
        for (buffer, theta) in buffers.iter_mut().zip(&strategy.decay) {
            buffer.iter_mut().zip(&*row).for_each(|(s, x)| *s = theta * *s + x);
        }
    }
}

/// `1` and `sum_j scale_j decay_j^(i-1)` for i from 1 below `steps`.
fn series(decay: &[f64], scale: &[f64], steps: u32) -> Vec<f64> {
    let mut powers = scale.to_vec();
    let mut column = vec![1.0];
    for _ in 1..steps {
        column.push(powers.iter().sum());
        powers.iter_mut().zip(decay).for_each(|(power, theta)| *power *= theta);
    }
    column
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{super::brute, *};
    use crate::account::known::{close, number, rows};

    fn numbers(row: &Value, field: &str) -> Vec<f64> {
        row[field].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    fn strategy(row: &Value) -> BufferedToeplitz {
        BufferedToeplitz::new(numbers(row, "buf_decay"), numbers(row, "output_scale")).unwrap()
    }

    #[test]
    fn equals_jax_privacy() {
        for row in rows("blt_optimized_jax_privacy_2_0_0") {
            let strategy = strategy(&row);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
            let whole = |field| number(&row, field) as u32;
            let participation =
                Participation::new(whole("n"), whole("min_sep"), whole("max_participations")).unwrap();
            let squared = strategy.sensitivity(participation).squared();
            close(squared, number(&row, "sensitivity_squared"), 1e-10, &row);
            close(strategy.max_error(whole("n")), number(&row, "max_error_variance"), 1e-10, &row);
            close(strategy.rms_loss(participation).powi(2), number(&row, "max_loss"), 1e-10, &row);
            let first = strategy.toeplitz(8);
            for (c, expected) in first.coefficients().iter().zip(numbers(&row, "toeplitz_first8")) {
                close(*c, expected, 1e-12, &row);
            }
            let (decay, scale) = strategy.inverse_parameters();
            for (d, expected) in decay.iter().zip(numbers(&row, "inv_buf_decay")) {
                close(*d, expected, 1e-10, &row);
            }
            for (s, expected) in scale.iter().zip(numbers(&row, "inv_output_scale")) {
                close(*s, expected, 1e-10, &row);
            }
        }
    }

    #[test]
    fn three_ways_to_the_inverse_meet() {
        let some = BufferedToeplitz::new(vec![1.0, 0.9, 0.0], vec![0.01, 0.2, 0.5]).unwrap();
        for strategy in rows("blt_optimized_jax_privacy_2_0_0").iter().map(strategy).chain([some]) {
            let steps = 300;
            let exact = strategy.toeplitz(steps).inverse(steps);
            let (decay, scale) = strategy.inverse_parameters();
            let closed = series(&decay, &scale, steps);
            let mut buffers = strategy.buffers(2);
            for (t, (exact, closed)) in exact.coefficients().iter().zip(closed).enumerate() {
                let mut row = if t == 0 { [1.0, -3.0] } else { [0.0; 2] };
                buffers.inv_multiply_next(&mut row);
                assert!((exact - closed).abs() < 1e-13, "{exact} {closed} at {t}");
                assert!(
                    (exact - row[0]).abs() < 1e-13 && (row[1] + 3.0 * row[0]).abs() < 1e-12,
                    "{exact} {row:?}"
                );
            }
            let error = strategy.toeplitz(steps).max_error(steps);
            assert!((strategy.max_error(steps) / error - 1.0).abs() < 1e-11);
        }
    }

    #[test]
    fn the_stream_undoes_the_matrix() {
        let row = &rows("blt_optimized_jax_privacy_2_0_0")[0];
        let strategy = strategy(row);
        let matrix = strategy.toeplitz(100);
        let input: Vec<f64> = (0..100).map(|t| f64::from((t * 37 + 11) % 23) - 11.0).collect();
        let mut buffers = strategy.buffers(1);
        for t in 0..100 {
            let product: f64 = (0..=t).map(|s| matrix.coefficients()[t - s] * input[s]).sum();
            let mut row = [product];
            buffers.inv_multiply_next(&mut row);
            assert!((row[0] - input[t]).abs() < 1e-11, "{} for {} at {t}", row[0], input[t]);
        }
    }

    #[test]
    fn sensitivity_equals_every_pattern_tried() {
        let row = &rows("blt_optimized_jax_privacy_2_0_0")[1];
        let strategy = strategy(row);
        for participation in brute::participations() {
            let column = strategy.toeplitz(participation.steps());
            let norm = |set: u32| -> f64 {
                let mut sum = vec![0.0; participation.steps() as usize];
                for at in (0..sum.len()).filter(|at| set >> at & 1 == 1) {
                    sum[at..].iter_mut().zip(column.coefficients()).for_each(|(sum, c)| *sum += c);
                }
                sum.iter().map(|x| x * x).sum()
            };
            let most = brute::patterns(participation).into_iter().map(norm).fold(0.0, f64::max);
            let squared = strategy.sensitivity(participation).squared();
            assert!(squared >= most && squared <= most * (1.0 + 1e-12), "{squared} {most} {participation:?}");
        }
    }

    #[test]
    fn refuses_what_is_no_strategy() {
        let new = |decay: &[f64], scale: &[f64]| BufferedToeplitz::new(decay.to_vec(), scale.to_vec());
        assert!(new(&[0.9, 0.5], &[0.1]).is_err() && new(&[0.5, 0.9], &[0.1, 0.1]).is_err());
        assert!(
            new(&[1.1], &[0.1]).is_err()
                && new(&[0.9], &[-0.1]).is_err()
                && new(&[f64::NAN], &[0.1]).is_err()
        );
        assert_eq!(new(&[], &[]).unwrap().toeplitz(3).coefficients(), [1.0, 0.0, 0.0]);
    }
}
