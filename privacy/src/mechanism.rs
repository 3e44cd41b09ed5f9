//! What a signed plan says about privacy, and everything that follows from it: the encoder of a device, the
//! decoder of the coordinator, the curves of the accountant. All three read the same numbers.

use crate::{
    account::{AccountError, Delta, DistributedGaussian, RdpCurve, Skellam},
    adapt::{BIT_UNITS, ClipAdaptation},
    bound::{BoundedVector, IntegerBound},
    clip::{ClippedDelta, ClippingNorm},
    noise::{GridVariance, Law, NoiseError, NoiseOrigin, NoiseSource, NoiseTable},
    rotate::Rotation,
};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};

/// Which noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    /// Distributed Skellam (Agarwal et al. 2021): sums of any survivors have an exact law.
    Skellam,
    /// Distributed discrete Gaussian (Kairouz et al. 2021); only where a device's share is wide enough.
    DiscreteGaussian,
}

/// The privacy of a task, as its signed plan states it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrivacyParameters {
    /// The noise.
    pub mechanism: Mechanism,
    /// The clipping norm in units of the grid; the clipping norm itself may vary, this does not.
    pub clip_units: u32,
    /// One device's noise a coordinate.
    pub variance: GridVariance,
    /// Fewest honest devices in any sum that opens: the protocol's least survivors less the colluders
    /// assumed. Their noise is what the guarantee counts on.
    pub honest_survivors_min: u32,
    /// Survivors that may side with the coordinator, having added no noise.
    pub colluders_max: u32,
    /// Most contributions of one device.
    pub participations_max: u32,
    /// Least time between two contributions of one device, milliseconds.
    pub separation_ms: u64,
    /// Least rounds between two contributions of one device; 0 allows another attempt at the same round.
    pub separation_rounds: u32,
    /// Delta of the guarantee.
    pub delta: Delta,
    /// Adaptive clipping.
    pub adaptation: Option<ClipAdaptation>,
    /// The noise is that of a larger, imagined cohort: simulations only.
    pub noise_cohort: Option<NoiseCohort>,
}

/// "We simulate a small cohort and scale the noise as for a large one": how experiments are run and never
/// how people are protected. The coordinator and the devices refuse it outside the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NoiseCohort {
    /// Devices a round of the deployment that is imagined.
    pub cohort: u32,
    /// Devices of its population.
    pub population: u64,
}

/// A plan's privacy for vectors of one dimension, with all that follows.
#[derive(Clone)]
pub struct PrivacyPlan {
    parameters: PrivacyParameters,
    dimension: usize,
    bound: IntegerBound,
}

/// A rotated update in units of the grid.
struct GridDelta(Vec<f32>);

/// Bounded integers with this device's noise on them: what is masked, and nothing else is.
#[derive(Clone, PartialEq, Eq)]
pub struct NoisedVector(Vec<i32>);

impl NoisedVector {
    /// The integers, to be reduced into the ring.
    #[must_use]
    pub fn values(&self) -> &[i32] {
        &self.0
    }
}

/// What a sum says.
#[derive(Debug, Clone, PartialEq)]
pub struct PrivateMean {
    /// The mean update.
    pub mean: Vec<f32>,
    /// The noised share of updates that were not clipped, from 0 to 1; only with adaptive clipping.
    pub unclipped: Option<f64>,
}

impl PrivacyPlan {
    /// The plan for adapters of `dimension` values.
    ///
    /// # Errors
    /// [`AccountError`] names the parameter that cannot be.
    pub fn new(parameters: PrivacyParameters, dimension: usize) -> Result<Self, AccountError> {
        let p = &parameters;
        let honest = f64::from(p.honest_survivors_min);
        AccountError::check(honest >= 1.0, "honest survivors", honest, "at least 1: the noise is theirs")?;
        let times = f64::from(p.participations_max);
        AccountError::check(times >= 1.0, "participations", times, "at least 1")?;
        let bound = IntegerBound::new(p.clip_units, Rotation::rotated_len(dimension))?;
        let plan = Self { parameters, dimension, bound };
        plan.sum_curve(p.honest_survivors_min)?;
        Ok(plan)
    }

    /// What the plan says.
    #[must_use]
    pub fn parameters(&self) -> &PrivacyParameters {
        &self.parameters
    }

    /// The bound on a contribution's integers.
    #[must_use]
    pub fn bound(&self) -> IntegerBound {
        self.bound
    }

    /// Values of a contribution: whole rotated blocks, and a place for the clipping bit.
    #[must_use]
    pub fn vector_len(&self) -> usize {
        self.bound.dimension() + usize::from(self.parameters.adaptation.is_some())
    }

    /// From a raw update to what may be masked. An update that holds NaN or infinity takes part as zero: a
    /// device that stayed away because of its values would say something about them.
    ///
    /// # Errors
    /// [`NoiseError`] if the operating system has no randomness.
    ///
    /// # Panics
    /// If the update is not of the plan's dimension.
    pub fn encode(
        &self,
        delta: Vec<f32>,
        clipping_norm: ClippingNorm,
        round_context: &[u8],
        origin: &NoiseOrigin,
        noise_context: &[u8],
    ) -> Result<NoisedVector, NoiseError> {
        assert_eq!(delta.len(), self.dimension, "the update is of the plan's dimension");
        let mut source = origin.source(noise_context)?;
        let clipped = ClippedDelta::clip_or_zero(delta, clipping_norm);
        let unclipped = clipped.norm_before() <= f64::from(clipping_norm.value());
        let on_grid = self.rotate(&clipped, round_context);
        let bounded = self.bound.round(on_grid.0, &mut source);
        Ok(self.add_noise(bounded, unclipped, &mut source))
    }

    /// The mean of `contributions` from their centred integer sum.
    ///
    /// # Panics
    /// If the sum is not of the plan's length or of nothing.
    #[must_use]
    pub fn decode_mean(
        &self,
        sum: &[i32],
        contributions: u32,
        clipping_norm: ClippingNorm,
        round_context: &[u8],
    ) -> PrivateMean {
        assert_eq!(sum.len(), self.vector_len(), "the sum is of the plan's length");
        assert!(contributions > 0, "a mean needs a contribution");
        let (vector, bit) = sum.split_at(self.bound.dimension());
        #[expect(clippy::cast_precision_loss, reason = "rounding to f32 is meant")]
        let values = vector.iter().map(|v| *v as f32).collect();
        let count = f64::from(contributions);
        let factor = 1.0 / (self.scale(clipping_norm) * count);
        let mean = Rotation::new(self.dimension, round_context).undo(values, factor);
        let share = |bit: &i32| 0.5 * (f64::from(*bit) / (f64::from(BIT_UNITS) * count) + 1.0);
        PrivateMean { mean, unclipped: bit.first().map(share).map(|b| b.clamp(0.0, 1.0)) }
    }

    /// What a sum with the noise of `summands` honest devices gives away about one of them, in one round.
    ///
    /// # Errors
    /// [`AccountError`] if the mechanism cannot be with so little noise.
    pub fn sum_curve(&self, summands: u32) -> Result<RdpCurve, AccountError> {
        let p = &self.parameters;
        let vector = curve(p.mechanism, self.bound.l2(), self.bound.dimension(), p.variance, summands)?;
        let Some(adaptation) = &p.adaptation else { return Ok(vector) };
        // The bit is one more release of the same device in the same round.
        let bit = curve(p.mechanism, f64::from(BIT_UNITS), 1, adaptation.bit_variance, summands)?;
        Ok(vector.plus(&bit))
    }

    /// One participation at its worst: the sum opens with the fewest honest devices.
    #[must_use]
    pub fn participation_curve(&self) -> RdpCurve {
        self.sum_curve(self.parameters.honest_survivors_min).expect("checked when the plan was made")
    }

    /// The task for one device: all the participations that it allows, each free to depend on those before.
    #[must_use]
    pub fn task_curve(&self) -> RdpCurve {
        self.participation_curve().times(self.parameters.participations_max)
    }

    /// What one update gives away if secure aggregation is broken altogether and only its own noise is left;
    /// infinite for a discrete Gaussian that is too narrow on its own.
    #[must_use]
    pub fn local_curve(&self) -> RdpCurve {
        self.sum_curve(1).unwrap_or_else(|_| RdpCurve::from_fn(|_| f64::INFINITY))
    }

    /// The `rho` of one participation at its worst; see [`RdpCurve::rho`].
    #[must_use]
    pub fn participation_rho(&self) -> f64 {
        self.participation_curve().rho()
    }

    /// Devices whose noise is counted on in a sum of `survivors`; the protocol opens none with fewer than
    /// the plan's least.
    #[must_use]
    pub fn honest_among(&self, survivors: u32) -> u32 {
        survivors.saturating_sub(self.parameters.colluders_max).max(self.parameters.honest_survivors_min)
    }

    /// Standard deviation of the noise on a coordinate of the mean of `contributions`, in the update's units.
    #[must_use]
    pub fn mean_noise(&self, clipping_norm: ClippingNorm, contributions: u32) -> f64 {
        let sum = self.parameters.variance.value() * f64::from(contributions);
        sum.sqrt() / (self.scale(clipping_norm) * f64::from(contributions))
    }

    /// What the sampler's tables add to delta over a device's participations: `(1 + e^epsilon) d n k TV`, by a
    /// hybrid argument over the coordinates of all `summands` (docs/privacy.md).
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^53")]
    pub fn sampler_delta(&self, epsilon: f64, summands: u32) -> f64 {
        let p = &self.parameters;
        let draws = self.vector_len() as f64 * f64::from(summands) * f64::from(p.participations_max);
        // Of the longest table that is allowed, so that no table has to be built to account.
        let ln_tv = 65_538f64.ln() - 127.0 * std::f64::consts::LN_2;
        ((1.0 + epsilon.exp()) * draws * ln_tv.exp()).min(1.0)
    }

    /// The narrowest ring in which a sum of `summands_max` contributions wraps around nowhere but with a
    /// probability below 2^-20 a round (see [`PrivacyPlan::ln_wraparound`]).
    ///
    /// # Errors
    /// [`AccountError::Unreachable`] if 32 bits are too few.
    pub fn ring_bits_min(&self, summands_max: u32) -> Result<u32, AccountError> {
        let fits = |bits: &u32| self.ln_wraparound(*bits, summands_max) <= -20.0 * std::f64::consts::LN_2;
        (8..=32).find(fits).ok_or_else(|| {
            AccountError::Unreachable(format!(
                "a sum of {summands_max} contributions of {} units with this noise does not fit 32 bits",
                self.parameters.clip_units
            ))
        })
    }

    /// Natural logarithm of a bound on the probability that any coordinate of a sum wraps around in a ring of
    /// `bits`; minus infinity where it cannot. It concerns usefulness alone: what wraps is as private.
    ///
    /// A coordinate of the sum is at most `n` of rounding, plus the rotated updates, sub-Gaussian over the random
    /// signs with proxy `(n c)^2 / m` for blocks of `m` (Hoeffding), plus Skellam noise of variance `n v`, whose
    /// moment generating function `exp(n v (cosh x - 1))` is below that of a Gaussian of variance `1.09 n v`
    /// for `x <= 1`. Chernoff, then a union bound over the coordinates. For the discrete Gaussian the
    /// same holds with `n v` (Canonne et al. 2020, fact 21).
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "dimensions are far below 2^53")]
    pub fn ln_wraparound(&self, bits: u32, summands_max: u32) -> f64 {
        let p = &self.parameters;
        let (n, v) = (f64::from(summands_max), p.variance.value());
        let room = 2f64.powi(i32::try_from(bits).unwrap_or(32) - 1) - 1.0;
        let bit = p.adaptation.map_or(f64::NEG_INFINITY, |adaptation| {
            let variance = 1.09 * n * adaptation.bit_variance.value();
            tail(room - n * f64::from(BIT_UNITS), variance)
        });
        let widest = 14.0 * v.sqrt() + 60.0;
        let vector = if n * (self.bound.l2() + widest) <= room && v <= 1e7 {
            // No draw is longer than its table, which ends before 14 standard deviations and 60 units.
            f64::NEG_INFINITY
        } else {
            let block = self.bound.dimension().min(Rotation::rotated_len(4096)) as f64;
            let proxy = (n * f64::from(p.clip_units)).powi(2) / block + 1.09 * n * v;
            (self.bound.dimension() as f64).ln() + tail(room - n, proxy)
        };
        vector.max(bit) + if vector.is_finite() && bit.is_finite() { std::f64::consts::LN_2 } else { 0.0 }
    }

    fn rotate(&self, clipped: &ClippedDelta, round_context: &[u8]) -> GridDelta {
        let scale = self.scale(clipped.clipping_norm());
        GridDelta(Rotation::new(self.dimension, round_context).apply(clipped.values(), scale))
    }

    fn add_noise(&self, bounded: BoundedVector, unclipped: bool, source: &mut NoiseSource) -> NoisedVector {
        let p = &self.parameters;
        let mut values = bounded.into_values();
        table(law(p.mechanism, p.variance)).add_to(&mut values, source);
        if let Some(adaptation) = &p.adaptation {
            let units = i32::try_from(BIT_UNITS).expect("a small constant");
            let mut bit = [if unclipped { units } else { -units }];
            table(law(p.mechanism, adaptation.bit_variance)).add_to(&mut bit, source);
            values.push(bit[0]);
        }
        NoisedVector(values)
    }

    /// Units of the grid in one unit of the update.
    fn scale(&self, clipping_norm: ClippingNorm) -> f64 {
        f64::from(self.parameters.clip_units) / f64::from(clipping_norm.value())
    }
}

fn law(mechanism: Mechanism, variance: GridVariance) -> Law {
    match mechanism {
        Mechanism::Skellam => Law::Skellam(variance),
        Mechanism::DiscreteGaussian => Law::DiscreteGaussian(variance),
    }
}

fn curve(
    mechanism: Mechanism,
    l2: f64,
    dimension: usize,
    variance: GridVariance,
    summands: u32,
) -> Result<RdpCurve, AccountError> {
    let (dimension, variance) = (dimension as u64, variance.value());
    match mechanism {
        Mechanism::Skellam => Ok(Skellam::new(l2, dimension, variance * f64::from(summands))?.curve()),
        Mechanism::DiscreteGaussian => {
            Ok(DistributedGaussian::new(l2, dimension, summands, variance.sqrt())?.curve())
        }
    }
}

/// `ln(2 exp(-t^2 / (2 s)))`, where `t / s <= 1`; else nothing is promised.
fn tail(room: f64, proxy: f64) -> f64 {
    if room <= 0.0 {
        return 0.0;
    }
    // A larger proxy is a valid one: it brings the exponent into the range of the bound.
    let proxy = proxy.max(room);
    (std::f64::consts::LN_2 - room * room / (2.0 * proxy)).min(0.0)
}

/// Tables are a pure function of their law, and a process needs few.
fn table(law: Law) -> Arc<NoiseTable> {
    const KEPT_MAX: usize = 8;
    static TABLES: Mutex<Vec<Arc<NoiseTable>>> = Mutex::new(Vec::new());
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(table) = tables.iter().find(|table| table.law() == law) {
        return Arc::clone(table);
    }
    let table = Arc::new(NoiseTable::new(law).expect("the law was checked when the plan was made"));
    if tables.len() == KEPT_MAX {
        tables.remove(0);
    }
    tables.push(Arc::clone(&table));
    table
}

#[cfg(test)]
mod tests;

#[cfg(test)]
#[cfg(feature = "planning")]
mod audits;
