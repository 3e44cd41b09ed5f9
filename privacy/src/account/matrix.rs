//! Matrix mechanisms for a trusted aggregator: the noise of a round is correlated with that of the rounds
//! before it, so that sums over rounds are far less noisy (DP-FTRL).
//!
//! The aggregator adds row t of `C^-1 Z` to the sum of round t, with `C` lower triangular and `Z` Gaussian
//! of `noise_multiplier` times the clipping norm. What one device gives away is then that of one Gaussian
//! release whose sensitivity is that of `C`, also when later rounds depend on earlier answers (Denisov,
//! McMahan, Rush, Smith and Thakurta 2022, theorem 2.1). Here are the sensitivities of three families of `C`.
//! None of them composes with secure aggregation: somebody must subtract earlier noise.

mod blt;
mod toeplitz;
mod tree;

pub use blt::{BufferedToeplitz, NoiseBuffers};
pub use toeplitz::{Toeplitz, banded_sensitivity};
pub use tree::{TREE_PARTICIPATIONS_MAX, TREE_STEPS_MAX, tree_sensitivity, tree_single_epoch_sensitivity};

use super::convert::{AccountError, Delta, outward, zcdp_epsilon};

/// How often, and how closely, one device takes part in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Participation {
    steps: u32,
    min_sep: u32,
    max_participations: u32,
}

impl Participation {
    /// `steps` rounds in the run, any two rounds of one device at least `min_sep` apart (rounds x and y have
    /// `y - x >= min_sep`), and at most `max_participations` rounds of one device.
    ///
    /// The separation is counted as in `jax_privacy`. TensorFlow Privacy and the published notebooks count the
    /// rounds between: see [`Self::with_gap`].
    ///
    /// # Errors
    /// [`AccountError::Parameter`] where one of them is 0.
    pub fn new(steps: u32, min_sep: u32, max_participations: u32) -> Result<Self, AccountError> {
        let parameters = [("steps", steps), ("min_sep", min_sep), ("max_participations", max_participations)];
        for (parameter, value) in parameters {
            AccountError::check(value > 0, parameter, f64::from(value), "positive")?;
        }
        Ok(Self { steps, min_sep, max_participations })
    }

    /// The same with a separation counted as the rounds between two of one device: `y - x - 1 >= gap`.
    ///
    /// # Errors
    /// [`AccountError::Parameter`] where `steps` or `max_participations` is 0, or the gap is 2^32 - 1.
    pub fn with_gap(steps: u32, gap: u32, max_participations: u32) -> Result<Self, AccountError> {
        Self::new(steps, gap.wrapping_add(1), max_participations)
    }

    /// Rounds in the run.
    #[must_use]
    pub fn steps(self) -> u32 {
        self.steps
    }

    /// The least distance of two rounds of one device.
    #[must_use]
    pub fn min_sep(self) -> u32 {
        self.min_sep
    }

    /// The most rounds of one device that both limits allow within the run.
    #[must_use]
    pub fn participations(self) -> u32 {
        self.max_participations.min(self.steps.div_ceil(self.min_sep))
    }
}

/// The sensitivity of a matrix mechanism, in units of the clipping norm.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct MatrixSensitivity {
    squared: f64,
}

impl MatrixSensitivity {
    fn from_squared(squared: f64) -> Self {
        Self { squared }
    }

    /// Its square, in units of the clipping norm squared.
    #[must_use]
    pub fn squared(self) -> f64 {
        self.squared
    }

    /// The zCDP parameter of the whole run under Gaussian noise of `noise_multiplier` clipping norms:
    /// `sens^2 / (2 z^2)` (Bun and Steinke 2016, proposition 1.6).
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless the noise multiplier is finite and positive.
    pub fn rho(self, noise_multiplier: f64) -> Result<f64, AccountError> {
        let holds = noise_multiplier.is_finite() && noise_multiplier > 0.0;
        AccountError::check(holds, "noise_multiplier", noise_multiplier, "finite and positive")?;
        Ok(self.squared / (2.0 * noise_multiplier * noise_multiplier))
    }

    /// Epsilon of the whole run at `delta`, by [`zcdp_epsilon`].
    ///
    /// # Errors
    /// [`AccountError::Parameter`] unless the noise multiplier is finite and positive.
    pub fn epsilon(self, noise_multiplier: f64, delta: Delta) -> Result<f64, AccountError> {
        zcdp_epsilon(outward(self.rho(noise_multiplier)?), delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};

    #[test]
    fn production_runs_have_their_published_cost() {
        let facts = rows("production_facts");
        let of = |row: usize, field| number(&facts[row], field);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
        let participation = |row: usize| {
            let whole = |field| of(row, field) as u32;
            Participation::with_gap(whole("steps"), whole("min_separation_gap"), whole("max_participation"))
        };
        let cost = |row: usize, sensitivity: MatrixSensitivity| {
            let (z, delta) = (of(row, "noise_multiplier"), Delta::new(of(row, "delta")).unwrap());
            (sensitivity.rho(z).unwrap(), sensitivity.epsilon(z, delta).unwrap())
        };
        // Published with two digits.
        let (rho, epsilon) = cost(0, tree_sensitivity(participation(0).unwrap()).unwrap());
        close(rho, of(0, "rho"), 0.006, &facts[0]);
        close(epsilon, of(0, "eps"), 0.001, &facts[0]);
        // This matrix was normalized to sensitivity 1 for the 5 rounds that 400 bands leave in 2000 steps; the
        // others to columns of norm 1.
        for (row, bands, column) in [(1, 400, 0.2), (2, 1000, 1.0), (3, 1000, 1.0)] {
            let sensitivity = banded_sensitivity(column, bands, participation(row).unwrap()).unwrap();
            let (rho, epsilon) = cost(row, sensitivity);
            close(rho, of(row, "rho"), 1e-12, &facts[row]);
            // Published: the exact epsilon of one Gaussian release, which zCDP comes within 5 % of from above.
            close(gaussian_delta((2.0 * rho).sqrt(), of(row, "eps")), of(row, "delta"), 1e-5, &facts[row]);
            assert!(
                epsilon > of(row, "eps") && epsilon < of(row, "eps") * 1.05,
                "{epsilon} for {}",
                facts[row]
            );
        }
    }

    /// Delta of a Gaussian release of sensitivity `mu` and noise 1 (Balle and Wang 2018, theorem 8).
    fn gaussian_delta(mu: f64, epsilon: f64) -> f64 {
        let below = |x: f64| 0.5 * libm::erfc(-x / 2f64.sqrt());
        below(0.5 * mu - epsilon / mu) - epsilon.exp() * below(-0.5 * mu - epsilon / mu)
    }

    #[test]
    fn both_conventions_of_the_separation_meet() {
        assert_eq!(Participation::with_gap(16, 3, 3), Participation::new(16, 4, 3));
        assert_eq!(Participation::new(16, 4, 9).unwrap().participations(), 4);
        assert_eq!(Participation::new(17, 4, 9).unwrap().participations(), 5);
        assert!(Participation::new(0, 1, 1).is_err() && Participation::new(1, 0, 1).is_err());
        assert!(Participation::new(1, 1, 0).is_err() && Participation::with_gap(1, u32::MAX, 1).is_err());
    }

    #[test]
    fn refuses_what_is_no_noise() {
        let sensitivity = MatrixSensitivity::from_squared(1.0);
        assert!(sensitivity.rho(0.0).is_err() && sensitivity.rho(f64::NAN).is_err());
        assert!(sensitivity.epsilon(-1.0, Delta::new(1e-6).unwrap()).is_err());
    }
}

/// Sensitivities by trying every pattern.
#[cfg(test)]
mod brute {
    use super::Participation;

    /// Every set of rounds that one device may take part in, as bits.
    pub(super) fn patterns(participation: Participation) -> Vec<u32> {
        let apart = |set: u32| (1..participation.min_sep()).all(|shift| set & (set << shift) == 0);
        let sets = 1..1u32 << participation.steps();
        sets.filter(|set| set.count_ones() <= participation.max_participations && apart(*set)).collect()
    }

    /// Every small participation.
    pub(super) fn participations() -> impl Iterator<Item = Participation> {
        let steps = [1, 2, 3, 5, 7, 8, 11, 12];
        let all = steps.into_iter().flat_map(|n| (1..=n).flat_map(move |b| (1..=n).map(move |k| (n, b, k))));
        all.map(|(n, b, k)| Participation::new(n, b, k).unwrap())
    }
}
