//! From a clipped update to integers whose L2 norm is certain.
//!
//! Everything before the check in [`IntegerBound::round`] is floating point and may be wrong without harm to
//! privacy: the check is exact, and only what passes it becomes a [`BoundedVector`], the one thing that
//! noise is added to.

use crate::{account::AccountError, noise::NoiseSource};

/// A device rounds this often before it begins to shrink the update; each try passes with a probability of
/// at least 0.39 (Kairouz et al. 2021, conditional randomized rounding with beta = e^(-1/2)), in practice nearly always.
const TRIES: u32 = 20;
/// Tries with shrinking; then the update is the zero vector.
const SHRINKS: u32 = 200;
/// Largest clipping norm in units of the grid: squares of a whole block still fit 64 bits.
const UNITS_MAX: u32 = 1 << 22;

/// The bound on the integer vector's squared L2 norm: the sensitivity that accounting uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntegerBound {
    clip_units: u32,
    dimension: usize,
    squared: u64,
}

/// Integers whose squared L2 norm is at most the bound's, checked exactly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundedVector {
    values: Vec<i32>,
    bound: IntegerBound,
}

impl IntegerBound {
    /// The bound after conditional stochastic rounding of `dimension` values of L2 norm `clip_units` (Kairouz et
    /// al. 2021, "The Distributed Discrete Gaussian Mechanism", theorem 1 and its conditional randomized
    /// rounding, with beta = e^(-1/2)):
    /// `B^2 = min((c + sqrt d)^2, c^2 + d/4 + sqrt(2 ln(1/beta)) (c + sqrt(d)/2))`, rounded down. All operations
    /// are exactly rounded ones, so every machine gets the same number.
    ///
    /// # Errors
    /// [`AccountError::Parameter`].
    pub fn new(clip_units: u32, dimension: usize) -> Result<Self, AccountError> {
        let units = f64::from(clip_units);
        let range = "from 1 to 4194304 units of the grid";
        AccountError::check((1..=UNITS_MAX).contains(&clip_units), "clipping norm", units, range)?;
        #[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^53")]
        let d = dimension as f64;
        AccountError::check(dimension > 0 && d <= 2f64.powi(32), "dimension", d, "from 1 to 2^32")?;
        let loose = (units + d.sqrt()) * (units + d.sqrt());
        let tight = units * units + d / 4.0 + (units + d.sqrt() / 2.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rounded down, and below 2^50"
        )]
        let squared = loose.min(tight) as u64;
        Ok(Self { clip_units, dimension, squared })
    }

    /// The clipping norm in units of the grid.
    #[must_use]
    pub fn clip_units(&self) -> u32 {
        self.clip_units
    }

    /// Values in a vector.
    #[must_use]
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// The bound on the squared norm.
    #[must_use]
    pub fn squared(&self) -> u64 {
        self.squared
    }

    /// The bound on the norm, in units of the grid, rounded up.
    #[must_use]
    pub fn l2(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
        let root = (self.squared as f64).sqrt();
        root.next_up()
    }

    /// Rounds each value to one of its two neighbours, so that the mean is kept, until the norm is within the
    /// bound. `values` are in units of the grid; what is not finite, or cannot be brought within the bound,
    /// becomes the zero vector: a device that fell silent over its values would tell something about them.
    ///
    /// # Panics
    /// If the length is not the bound's dimension.
    #[must_use]
    pub fn round(&self, mut values: Vec<f32>, source: &mut NoiseSource) -> BoundedVector {
        assert_eq!(values.len(), self.dimension, "the bound is for vectors of its own dimension");
        let mut rounded = vec![0i32; values.len()];
        for attempt in 0..TRIES + SHRINKS {
            if attempt >= TRIES {
                values.iter_mut().for_each(|value| *value *= 1.0 - 1.0 / 1024.0);
            }
            if !round_once(&values, &mut rounded, source) {
                break;
            }
            if let Some(bounded) = self.check(rounded) {
                return bounded;
            }
            rounded = vec![0; values.len()];
        }
        BoundedVector { values: vec![0; values.len()], bound: *self }
    }

    /// The line that privacy rests on: an exact sum of squares against the bound. It stops updates of any
    /// norm that a fault in training, clipping, rotation or rounding let through.
    fn check(&self, values: Vec<i32>) -> Option<BoundedVector> {
        let squared = |block: &[i32]| -> u128 {
            // |v| < 2^31, so 2^62 a square, and u128 for the sum.
            block.iter().map(|v| u128::from(v.unsigned_abs()).pow(2)).sum()
        };
        let fits = if values.iter().all(|v| v.unsigned_abs() < 1 << 24) {
            let block = |block: &[i32]| block.iter().map(|v| i64::from(*v) * i64::from(*v)).sum::<i64>();
            let total: u128 = values.chunks(4096).map(|b| u128::from(block(b).unsigned_abs())).sum();
            total <= u128::from(self.squared)
        } else {
            values.chunks(4096).map(squared).sum::<u128>() <= u128::from(self.squared)
        };
        (fits && values.len() == self.dimension).then_some(BoundedVector { values, bound: *self })
    }
}

impl BoundedVector {
    /// The integers.
    #[must_use]
    pub fn values(&self) -> &[i32] {
        &self.values
    }

    /// The bound they were held to.
    #[must_use]
    pub fn bound(&self) -> IntegerBound {
        self.bound
    }

    pub(crate) fn into_values(self) -> Vec<i32> {
        self.values
    }
}

/// Stochastic rounding: `floor(x + u)` with u uniform in [0, 1) in steps of 2^-24. False if a value is not
/// finite or too large to be an integer here.
fn round_once(values: &[f32], rounded: &mut [i32], source: &mut NoiseSource) -> bool {
    let mut bytes = [0u8; 4 * 1024];
    let mut fine = true;
    for (values, rounded) in values.chunks(1024).zip(rounded.chunks_mut(1024)) {
        let bytes = &mut bytes[..4 * values.len()];
        source.bytes(bytes);
        for ((value, rounded), word) in values.iter().zip(rounded).zip(bytes.as_chunks::<4>().0) {
            #[expect(clippy::cast_precision_loss, reason = "24 bits are exact")]
            let uniform = (u32::from_le_bytes(*word) >> 8) as f32 * (1.0 / 16_777_216.0);
            // Also false for NaN.
            fine &= value.abs() < 4_194_304.0;
            // Adding and taking away 1.5 * 2^23 rounds to an integer; `floor` is a call on older processors.
            let nearest = (value + 12_582_912.0) - 12_582_912.0;
            let floor = if nearest > *value { nearest - 1.0 } else { nearest };
            #[expect(clippy::cast_possible_truncation, reason = "integral, and a bad value is not used")]
            let whole = floor as i32;
            *rounded = whole.wrapping_add(i32::from(value - floor > uniform));
        }
    }
    fine
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        account::known::{close, number, rows, value},
        noise::NoiseOrigin,
    };
    use proptest::prelude::*;

    fn source() -> NoiseSource {
        NoiseOrigin::operating_system().source(b"").unwrap()
    }

    #[test]
    fn the_bound_equals_the_reference() {
        let row = value("conditional_rounding");
        let bound = IntegerBound::new(500, 4096).unwrap();
        assert_eq!(bound.squared(), number(&row, "bound").powi(2) as u64);
        for row in rows("distributed_mechanisms") {
            let of = |field| number(&row, field);
            if of("beta") > 0.0 && of("clip_int").fract() == 0.0 {
                let bound = IntegerBound::new(of("clip_int") as u32, of("dim") as usize).unwrap();
                close(bound.l2(), of("l2_sens_int_rounded"), 1e-4, &row);
                assert!(bound.l2().powi(2) >= bound.squared() as f64);
            }
        }
    }

    /// The published acceptance rate, 0.98 at d = 4096 and c = 500.
    #[test]
    fn most_first_tries_pass() {
        let bound = IntegerBound::new(500, 4096).unwrap();
        let values = vec![500.0 / 64.0; 4096];
        let mut source = source();
        let pass = (0..500).filter(|_| {
            let mut rounded = vec![0; 4096];
            assert!(round_once(&values, &mut rounded, &mut source));
            bound.check(rounded).is_some()
        });
        assert!(pass.count() > 450);
    }

    #[test]
    fn rounding_keeps_the_mean() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) / 137.0).collect();
        let bound = IntegerBound::new(200, 1000).unwrap();
        let mut source = source();
        let mut sums = vec![0f64; 1000];
        for _ in 0..2000 {
            let rounded = bound.round(values.clone(), &mut source);
            sums.iter_mut().zip(rounded.values()).for_each(|(s, v)| *s += f64::from(*v));
        }
        for (sum, value) in sums.iter().zip(&values) {
            // Five standard deviations of a mean of 2000 coins.
            assert!((sum / 2000.0 - f64::from(*value)).abs() < 5.0 * 0.5 / 2000f64.sqrt());
        }
    }

    fn hostile() -> impl Strategy<Value = f32> {
        let spikes = prop::sample::select(vec![
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            8_388_607.5,
            -8_388_608.0,
            2e9,
            f32::MIN_POSITIVE,
            -0.0,
        ]);
        prop_oneof![8 => -30f32..30.0, 1 => any::<f32>(), 1 => spikes]
    }

    proptest! {
        /// A device whose training, clipping or rotation went wrong, or was made to: whatever comes, the norm
        /// holds, computed here in another way than there.
        #[test]
        fn the_integer_norm_holds_whatever_comes(
            values in prop::collection::vec(hostile(), 1..400), units in 1u32..100,
        ) {
            let bound = IntegerBound::new(units, values.len()).unwrap();
            let rounded = bound.round(values, &mut source());
            let squared: i128 = rounded.values().iter().map(|v| i128::from(*v) * i128::from(*v)).sum();
            prop_assert!(squared <= i128::from(bound.squared()));
        }
    }

    #[test]
    fn what_is_not_a_number_becomes_the_zero_vector() {
        let bound = IntegerBound::new(100, 4).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
            assert_eq!(bound.round(vec![1.0, bad, 0.0, 0.0], &mut source()).values(), [0; 4]);
        }
        // Too long by far, yet finite: shrinking does not reach it.
        assert_eq!(bound.round(vec![1e5; 4], &mut source()).values(), [0; 4]);
        // A little too long: shrunk.
        let near = bound.round(vec![55.0; 4], &mut source());
        assert!(near.values().iter().all(|v| *v > 40) && near.bound() == bound);
    }

    #[test]
    fn squares_that_would_overflow_are_seen() {
        let bound = IntegerBound::new(100, 4).unwrap();
        assert!(bound.check(vec![i32::MIN; 4]).is_none());
        assert!(bound.check(vec![1 << 16; 4]).is_none());
        assert!(bound.check(vec![1; 3]).is_none());
        assert!(bound.check(vec![50; 4]).is_some());
        assert!(IntegerBound::new(0, 4).is_err() && IntegerBound::new(1, 0).is_err());
    }
}
