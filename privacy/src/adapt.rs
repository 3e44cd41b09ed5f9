//! Adaptive clipping (Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with
//! Adaptive Clipping"): the clipping norm follows a quantile of the updates' norms.
//!
//! The integer bound stays where it is and the grid moves: with the clipping norm C_t a unit is worth
//! `C_t / clip_units`. Tables, accounting and statement never change, and a wrong C_t can only cost
//! usefulness.

use crate::{account::AccountError, clip::ClippingNorm, noise::GridVariance};

/// The clipping bit on the grid: +64 for an update that was not clipped, -64 for one that was.
pub const BIT_UNITS: u32 = 64;

/// How the clipping norm moves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipAdaptation {
    quantile: f64,
    learning_rate: f64,
    norm_min: ClippingNorm,
    norm_max: ClippingNorm,
    /// One device's noise on its clipping bit.
    pub bit_variance: GridVariance,
}

impl ClipAdaptation {
    /// Aims at the `quantile` of norms, in steps of `learning_rate` (0.2 in the paper), within bounds.
    ///
    /// # Errors
    /// [`AccountError::Parameter`].
    pub fn new(
        quantile: f64,
        learning_rate: f64,
        (norm_min, norm_max): (ClippingNorm, ClippingNorm),
        bit_variance: GridVariance,
    ) -> Result<Self, AccountError> {
        AccountError::check((0.0..=1.0).contains(&quantile), "quantile", quantile, "from 0 to 1")?;
        let fits = learning_rate > 0.0 && learning_rate <= 2.0;
        AccountError::check(fits, "clip learning rate", learning_rate, "above 0 and at most 2")?;
        let (low, high) = (f64::from(norm_min.value()), f64::from(norm_max.value()));
        AccountError::check(low <= high, "least clipping norm", low, "at most the largest")?;
        Ok(Self { quantile, learning_rate, norm_min, norm_max, bit_variance })
    }

    /// The quantile aimed at.
    #[must_use]
    pub fn quantile(&self) -> f64 {
        self.quantile
    }

    /// Size of a step.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// The bounds of the clipping norm.
    #[must_use]
    pub fn norms(&self) -> (ClippingNorm, ClippingNorm) {
        (self.norm_min, self.norm_max)
    }

    /// The next clipping norm: `C exp(-rate (unclipped - quantile))`, within the bounds (Andrew et al. 2021,
    /// algorithm 1).
    #[must_use]
    pub fn next(&self, norm: ClippingNorm, unclipped: f64) -> ClippingNorm {
        let next = step(f64::from(norm.value()), unclipped, self.quantile, self.learning_rate);
        let (low, high) = (f64::from(self.norm_min.value()), f64::from(self.norm_max.value()));
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
        let next = next.clamp(low, high) as f32;
        ClippingNorm::new(next).expect("between two norms lies a norm")
    }
}

fn step(norm: f64, unclipped: f64, quantile: f64, learning_rate: f64) -> f64 {
    norm * (-learning_rate * (unclipped - quantile)).exp()
}

/// The noise multiplier left for the updates if the whole is to be `total` and the count of unclipped updates
/// carries noise of standard deviation `sigma_bit`: `(z^-2 - (2 sigma_b)^-2)^(-1/2)` (Andrew et al. 2021,
/// theorem 1).
///
/// # Errors
/// [`AccountError::Parameter`] if the bit alone spends more.
pub fn noise_multiplier_beside_bit(total: f64, sigma_bit: f64) -> Result<f64, AccountError> {
    let left = total.powi(-2) - (2.0 * sigma_bit).powi(-2);
    AccountError::check(
        left > 0.0,
        "noise on the clipping bit",
        sigma_bit,
        "above half the noise multiplier",
    )?;
    Ok(left.powf(-0.5))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::known::{close, number, rows};

    #[test]
    fn equals_the_reference() {
        for row in rows("adaptive_clip_noise_split") {
            let of = |field| number(&row, field);
            let z = noise_multiplier_beside_bit(of("z_total"), of("sigma_b")).unwrap();
            close(z, of("z_delta"), 1e-12, &row);
        }
        for row in rows("adaptive_clip_update") {
            let of = |field| number(&row, field);
            let next = step(of("c"), of("noisy_fraction_unclipped"), of("target_quantile"), of("eta"));
            close(next, of("c_next"), 1e-12, &row);
        }
        assert!(noise_multiplier_beside_bit(1.0, 0.4).is_err());
    }

    #[test]
    fn the_norm_finds_its_quantile_and_stays_within_bounds() {
        let norm = |value| ClippingNorm::new(value).unwrap();
        let variance = GridVariance::at_least(1.0).unwrap();
        let adaptation = ClipAdaptation::new(0.5, 0.2, (norm(0.1), norm(10.0)), variance).unwrap();
        // Norms spread evenly from 0 to 4: the median is 2.
        let mut clip = norm(0.1);
        for _ in 0..200 {
            clip = adaptation.next(clip, f64::from(clip.value() / 4.0).min(1.0));
        }
        assert!((clip.value() - 2.0).abs() < 0.05, "{}", clip.value());
        for _ in 0..100 {
            clip = adaptation.next(clip, 0.0);
        }
        assert_eq!(clip.value(), 10.0);
        assert!(ClipAdaptation::new(1.5, 0.2, (norm(0.1), norm(1.0)), variance).is_err());
        assert!(ClipAdaptation::new(0.5, 0.2, (norm(2.0), norm(1.0)), variance).is_err());
    }
}
