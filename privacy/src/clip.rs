//! L2 clipping of one device's update, and the refusal of updates that are not numbers.

use thiserror::Error;

/// Why an update cannot be clipped.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ClipError {
    /// The bound is not a positive finite number.
    #[error("clipping norm {0} is not a positive finite number")]
    Norm(f32),
    /// A value is NaN or infinite.
    #[error("update value {index} of {dimension} is {value}")]
    NotFinite {
        /// Position of the first such value.
        index: usize,
        /// Length of the update.
        dimension: usize,
        /// What stands there.
        value: f32,
    },
}

/// The bound C on an update's L2 norm: positive and finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClippingNorm(f32);

impl ClippingNorm {
    /// Accepts positive finite numbers.
    pub fn new(norm: f32) -> Result<Self, ClipError> {
        if norm.is_finite() && norm > 0.0 { Ok(Self(norm)) } else { Err(ClipError::Norm(norm)) }
    }

    /// The bound.
    pub fn value(self) -> f32 {
        self.0
    }
}

/// An update whose every value is finite and whose L2 norm is at most the clipping norm, up to
/// float rounding (a relative 1e-6).
#[derive(Debug, Clone, PartialEq)]
pub struct ClippedDelta {
    values: Vec<f32>,
    norm_before: f64,
    clipping_norm: ClippingNorm,
}

impl ClippedDelta {
    /// Clips; an update that holds NaN or infinity becomes zero, so that a device takes part whatever its values.
    pub fn clip_or_zero(delta: Vec<f32>, clipping_norm: ClippingNorm) -> Self {
        let len = delta.len();
        let zero = |_| Self { values: vec![0.0; len], norm_before: 0.0, clipping_norm };
        clip(delta, clipping_norm).unwrap_or_else(zero)
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The L2 norm before clipping. Derived from private data: it must not leave the device.
    pub fn norm_before(&self) -> f64 {
        self.norm_before
    }

    /// The bound that was applied.
    pub fn clipping_norm(&self) -> ClippingNorm {
        self.clipping_norm
    }
}

/// Scales `delta` by min(1, C / ||delta||_2) (McMahan et al. 2018, "Learning Differentially
/// Private Recurrent Language Models", algorithm 1). The norm is taken in f64.
pub fn clip(mut delta: Vec<f32>, clipping_norm: ClippingNorm) -> Result<ClippedDelta, ClipError> {
    if let Some(index) = delta.iter().position(|v| !v.is_finite()) {
        return Err(ClipError::NotFinite { index, dimension: delta.len(), value: delta[index] });
    }
    let norm_before = delta.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let bound = f64::from(clipping_norm.value());
    if norm_before > bound {
        let factor = bound / norm_before;
        for value in &mut delta {
            *value = narrow(f64::from(*value) * factor);
        }
    }
    Ok(ClippedDelta { values: delta, norm_before, clipping_norm })
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_updates_pass_unchanged_and_long_ones_are_scaled() {
        let norm = ClippingNorm::new(5.0).unwrap();
        assert_eq!(clip(vec![3.0, 4.0], norm).unwrap().values(), [3.0, 4.0]);
        let long = clip(vec![30.0, 40.0], norm).unwrap();
        assert_eq!((long.values(), long.norm_before()), ([3.0, 4.0].as_slice(), 50.0));
    }

    #[test]
    fn names_the_first_value_that_is_no_number() {
        let norm = ClippingNorm::new(1.0).unwrap();
        let error = clip(vec![0.0, f32::INFINITY, f32::NAN], norm).unwrap_err();
        assert_eq!(error.to_string(), "update value 1 of 3 is inf");
        assert!(ClippingNorm::new(f32::NAN).is_err() && ClippingNorm::new(0.0).is_err());
    }

    proptest! {
        #[test]
        fn the_norm_holds_for_any_finite_update(
            values in prop::collection::vec(any::<f32>().prop_filter("finite", |v| v.is_finite()), 1..50),
            bound in 1e-3f32..1e3,
        ) {
            let clipped = clip(values, ClippingNorm::new(bound).unwrap()).unwrap();
            let norm = clipped.values().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            prop_assert!(norm <= f64::from(bound) * (1.0 + 1e-6), "{norm} > {bound}");
        }
    }
}
