//! From what people ask for, an epsilon, to the numbers of a plan.

use crate::{
    account::{AccountError, Delta},
    adapt::{BIT_UNITS, ClipAdaptation},
    bound::IntegerBound,
    clip::ClippingNorm,
    mechanism::{Mechanism, PrivacyParameters, PrivacyPlan},
    noise::GridVariance,
    rotate::Rotation,
};

/// What a private task is to guarantee.
#[derive(Debug, Clone, PartialEq)]
pub struct PrivacyTarget {
    /// The noise.
    pub mechanism: Mechanism,
    /// Epsilon of a device over all its participations.
    pub epsilon: f64,
    /// At this delta.
    pub delta: Delta,
    /// Values of the adapter.
    pub dimension: usize,
    /// Fewest honest devices in any sum that opens.
    pub honest_survivors_min: u32,
    /// Survivors that may have added no noise.
    pub colluders_max: u32,
    /// Most contributions of one device.
    pub participations_max: u32,
    /// Least time between two, milliseconds.
    pub separation_ms: u64,
    /// Least rounds between two; 0 allows another attempt at the same round.
    pub separation_rounds: u32,
    /// Clipping norm in units of the grid; chosen if absent.
    pub clip_units: Option<u32>,
    /// Adaptive clipping.
    pub adaptation: Option<AdaptationTarget>,
}

/// What adaptive clipping is to aim at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptationTarget {
    /// Quantile of the updates' norms.
    pub quantile: f64,
    /// Size of a step.
    pub learning_rate: f64,
    /// Least and largest clipping norm.
    pub norms: (ClippingNorm, ClippingNorm),
}

/// The bit's noise multiplier over the updates': it takes a hundredth of the budget.
const BIT_NOISE_RATIO: f64 = 10.0;

/// Fewest units that a clipping norm is worth trying with.
const UNITS_MIN: u32 = 16;

impl PrivacyTarget {
    /// The plan with the least noise that keeps the guarantee.
    ///
    /// # Errors
    /// [`AccountError`] says which parameter cannot be, or that no noise within the tables is enough.
    pub fn plan(&self) -> Result<PrivacyPlan, AccountError> {
        let fits = self.epsilon.is_finite() && self.epsilon > 0.0;
        AccountError::check(fits, "epsilon", self.epsilon, "finite and positive")?;
        if let Some(units) = self.clip_units {
            return self.with_units(units);
        }
        let mut units = clip_units(self.dimension);
        loop {
            match self.with_units(units) {
                Err(AccountError::Unreachable(_)) if units / 2 >= UNITS_MIN => units /= 2,
                plan => return plan,
            }
        }
    }

    fn with_units(&self, units: u32) -> Result<PrivacyPlan, AccountError> {
        let least = match self.mechanism {
            Mechanism::Skellam => 1,
            Mechanism::DiscreteGaussian => GridVariance::at_least(6.25)?.steps(),
        };
        let (mut low, mut high) = (least, GridVariance::MAX.steps());
        let enough = |steps: u64| -> Result<bool, AccountError> {
            let plan = self.with_variance(units, GridVariance::from_steps(steps)?)?;
            Ok(plan.task_curve().epsilon(self.delta).0 <= self.epsilon)
        };
        if !enough(high)? {
            return Err(AccountError::Unreachable(format!(
                "epsilon {} with {} honest survivors and {} participations needs more noise than 4096 units a \
                 device at {units} units of clipping norm",
                self.epsilon, self.honest_survivors_min, self.participations_max
            )));
        }
        if !enough(low)? {
            while low + 1 < high {
                let middle = low + (high - low) / 2;
                if enough(middle)? { high = middle } else { low = middle }
            }
            low = high;
        }
        self.with_variance(units, GridVariance::from_steps(low)?)
    }

    /// The plan with that clipping norm and noise.
    ///
    /// # Errors
    /// [`AccountError`].
    pub fn with_variance(&self, units: u32, variance: GridVariance) -> Result<PrivacyPlan, AccountError> {
        let bound = IntegerBound::new(units, Rotation::rotated_len(self.dimension))?;
        let adaptation = self.adaptation.map(|target| {
            let ratio = BIT_NOISE_RATIO * f64::from(BIT_UNITS) / bound.l2();
            let least = match self.mechanism {
                Mechanism::Skellam => 0.0,
                Mechanism::DiscreteGaussian => 6.25,
            };
            let wide = (variance.value() * ratio * ratio).max(least).min(GridVariance::MAX.value());
            let wide = GridVariance::at_least(wide);
            ClipAdaptation::new(target.quantile, target.learning_rate, target.norms, wide?)
        });
        let parameters = PrivacyParameters {
            mechanism: self.mechanism,
            clip_units: units,
            variance,
            honest_survivors_min: self.honest_survivors_min,
            colluders_max: self.colluders_max,
            participations_max: self.participations_max,
            separation_ms: self.separation_ms,
            separation_rounds: self.separation_rounds,
            delta: self.delta,
            adaptation: adaptation.transpose()?,
            noise_cohort: None,
        };
        PrivacyPlan::new(parameters, self.dimension)
    }
}

/// A clipping norm in units of the grid with which rounding costs under a hundredth of the sensitivity: four
/// times the root of the dimension.
#[must_use]
pub fn clip_units(dimension: usize) -> u32 {
    #[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^53")]
    let root = (Rotation::rotated_len(dimension) as f64).sqrt();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 2^18")]
    let units = (4.0 * root).ceil().min(262_144.0) as u32;
    units.max(64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> PrivacyTarget {
        PrivacyTarget {
            mechanism: Mechanism::Skellam,
            epsilon: 4.0,
            delta: Delta::new(1e-6).unwrap(),
            dimension: 184_320,
            honest_survivors_min: 60,
            colluders_max: 12,
            participations_max: 4,
            separation_ms: 0,
            separation_rounds: 0,
            clip_units: None,
            adaptation: None,
        }
    }

    #[test]
    fn the_least_noise_that_keeps_the_guarantee_is_found() {
        for mechanism in [Mechanism::Skellam, Mechanism::DiscreteGaussian] {
            let target = PrivacyTarget { mechanism, ..target() };
            let plan = target.plan().unwrap();
            let p = plan.parameters();
            let epsilon = plan.task_curve().epsilon(p.delta).0;
            assert!(epsilon <= 4.0 && epsilon > 3.999, "{epsilon}");
            let less = GridVariance::from_steps(p.variance.steps() - 1).unwrap();
            let less = target.with_variance(p.clip_units, less).unwrap();
            assert!(less.task_curve().epsilon(p.delta).0 > 4.0);
            assert!(plan.bound().l2() < 1.02 * f64::from(p.clip_units), "rounding costs little");
        }
    }

    #[test]
    fn the_clipping_bit_takes_a_hundredth() {
        let norm = |value| ClippingNorm::new(value).unwrap();
        let adaptation =
            AdaptationTarget { quantile: 0.5, learning_rate: 0.2, norms: (norm(0.1), norm(10.0)) };
        let with_bit = PrivacyTarget { adaptation: Some(adaptation), ..target() }.plan().unwrap();
        let without = target().plan().unwrap();
        let gaussian = PrivacyTarget { mechanism: Mechanism::DiscreteGaussian, ..target() };
        let gaussian = PrivacyTarget { adaptation: Some(adaptation), ..gaussian }.plan().unwrap();
        assert!(gaussian.task_curve().epsilon(gaussian.parameters().delta).0 <= 4.0);
        let ratio = with_bit.parameters().variance.value() / without.parameters().variance.value();
        assert!(ratio > 1.0 && ratio < 1.02, "{ratio}");
    }

    #[test]
    fn few_devices_get_a_coarser_grid_and_the_impossible_is_named() {
        let few = PrivacyTarget { epsilon: 4.0, honest_survivors_min: 2, dimension: 921_600, ..target() };
        let plan = few.plan().unwrap();
        assert!(plan.parameters().clip_units < clip_units(921_600));
        assert!(plan.task_curve().epsilon(few.delta).0 <= 4.0);
        let fixed = PrivacyTarget { clip_units: Some(clip_units(921_600)), ..few.clone() };
        let error = fixed.plan().err().expect("refused").to_string();
        assert!(error.contains("needs more noise") && error.contains("2 honest survivors"), "{error}");
        assert!(PrivacyTarget { epsilon: f64::NAN, ..few }.plan().is_err());
    }
}
