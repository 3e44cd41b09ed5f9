//! Fixed-point integers for exact, order-independent sums, and the way back to a mean.

use crate::clip::{ClippedDelta, ClippingNorm};
use thiserror::Error;

/// Why an encoding cannot be set up or applied.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum EncodeError {
    /// The ring is too narrow for the cohort: less than 8 bits would be left for a value.
    #[error("a ring of {bits} bits leaves under 8 bits a value for {summands_max} summands")]
    Resolution {
        /// Width of the ring.
        bits: u32,
        /// Most contributions in one sum.
        summands_max: u32,
    },
    /// The update was clipped to another bound than the encoding was made for.
    #[error("update clipped to {actual}; the encoding is for {expected}")]
    ClippingNorm {
        /// The encoding's bound.
        expected: f32,
        /// The update's bound.
        actual: f32,
    },
    /// A mean of nothing was asked for.
    #[error("a mean needs at least one contribution and at most {summands_max}; got {contributions}")]
    Contributions {
        /// Contributions claimed.
        contributions: u32,
        /// Most contributions in one sum.
        summands_max: u32,
    },
}

/// A grid on [-C, C] so fine that `summands_max` values never wrap mod 2^b:
/// `scale = floor((2^(b-1) - 1) / summands_max) / C`.
///
/// Rounding is to nearest. It moves a mean by at most `0.5 / scale` a coordinate (C = 10, 64
/// summands, 32 bits: 1.5e-7). Conditional stochastic rounding, which privacy needs, comes with
/// the noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FixedPoint {
    clipping_norm: ClippingNorm,
    summands_max: u32,
    limit: i32,
}

/// A clipped update on the grid: every value's magnitude is at most `floor((2^(b-1)-1)/n)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedDelta(Vec<i32>);

impl EncodedDelta {
    /// The integers.
    pub fn values(&self) -> &[i32] {
        &self.0
    }
}

impl FixedPoint {
    /// A grid for sums of at most `summands_max` updates clipped to `clipping_norm`, mod 2^`bits`.
    pub fn new(clipping_norm: ClippingNorm, bits: u32, summands_max: u32) -> Result<Self, EncodeError> {
        assert!((8..=32).contains(&bits), "the ring has 8 to 32 bits");
        let half = (1i64 << (bits - 1)) - 1;
        let limit = half / i64::from(summands_max.max(1));
        match i32::try_from(limit) {
            Ok(limit) if limit >= 127 && summands_max > 0 => Ok(Self { clipping_norm, summands_max, limit }),
            _ => Err(EncodeError::Resolution { bits, summands_max }),
        }
    }

    /// Rounds a clipped update to the grid.
    pub fn encode(&self, delta: &ClippedDelta) -> Result<EncodedDelta, EncodeError> {
        if delta.clipping_norm() != self.clipping_norm {
            let (expected, actual) = (self.clipping_norm.value(), delta.clipping_norm().value());
            return Err(EncodeError::ClippingNorm { expected, actual });
        }
        let (scale, limit) = (self.scale(), f64::from(self.limit));
        let round = |v: &f32| to_grid((f64::from(*v) * scale).round_ties_even().clamp(-limit, limit));
        Ok(EncodedDelta(delta.values().iter().map(round).collect()))
    }

    /// The mean of `contributions` updates from their centred integer sum.
    pub fn decode_mean(&self, sum: &[i32], contributions: u32) -> Result<Vec<f32>, EncodeError> {
        if contributions == 0 || contributions > self.summands_max {
            return Err(EncodeError::Contributions { contributions, summands_max: self.summands_max });
        }
        let divisor = self.scale() * f64::from(contributions);
        Ok(sum.iter().map(|v| from_grid(f64::from(*v) / divisor)).collect())
    }

    fn scale(&self) -> f64 {
        f64::from(self.limit) / f64::from(self.clipping_norm.value())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "integral and clamped to the i32 limit")]
fn to_grid(value: f64) -> i32 {
    value as i32
}

#[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is meant")]
fn from_grid(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip::clip;
    use proptest::prelude::*;

    fn grid(bits: u32, summands_max: u32) -> FixedPoint {
        FixedPoint::new(ClippingNorm::new(10.0).unwrap(), bits, summands_max).unwrap()
    }

    #[test]
    fn refuses_what_cannot_be_represented() {
        let norm = ClippingNorm::new(1.0).unwrap();
        assert!(FixedPoint::new(norm, 16, 259).is_err());
        assert!(FixedPoint::new(norm, 16, 258).is_ok());
        assert!(FixedPoint::new(norm, 32, 0).is_err());
        assert!(grid(32, 4).decode_mean(&[0], 0).is_err());
        assert!(grid(32, 4).decode_mean(&[0], 5).is_err());
        let other = clip(vec![1.0], norm).unwrap();
        assert!(matches!(grid(32, 4).encode(&other), Err(EncodeError::ClippingNorm { .. })));
    }

    #[test]
    fn a_cohort_of_extremes_does_not_wrap() {
        let grid = grid(32, 64);
        let norm = ClippingNorm::new(10.0).unwrap();
        let one = grid.encode(&clip(vec![1e30, 0.0], norm).unwrap()).unwrap();
        let sum = i64::from(one.values()[0]) * 64;
        let sum = i32::try_from(sum).expect("fits the ring");
        assert_eq!(grid.decode_mean(&[sum, 0], 64).unwrap(), [10.0, 0.0]);
    }

    proptest! {
        #[test]
        fn means_equal_the_f64_reference_to_half_a_step(
            rows in prop::collection::vec(prop::collection::vec(-1f32..1f32, 4), 1..20),
        ) {
            let grid = grid(32, 20);
            let norm = ClippingNorm::new(10.0).unwrap();
            let mut sum = vec![0i32; 4];
            for row in &rows {
                let encoded = grid.encode(&clip(row.clone(), norm).unwrap()).unwrap();
                sum.iter_mut().zip(encoded.values()).for_each(|(s, v)| *s += v);
            }
            let count = u32::try_from(rows.len()).unwrap();
            let mean = grid.decode_mean(&sum, count).unwrap();
            for i in 0..4 {
                let exact = rows.iter().map(|r| f64::from(r[i])).sum::<f64>() / f64::from(count);
                prop_assert!((f64::from(mean[i]) - exact).abs() <= 0.51 / grid.scale() + exact.abs() * 1e-7);
            }
        }
    }
}
