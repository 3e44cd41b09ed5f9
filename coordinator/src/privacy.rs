//! Differential privacy as an operator asks for it, and the numbers of the plan that follow.

use fleetune_privacy::{
    AdaptationTarget, Delta, GridVariance, Mechanism, NoiseCohort, PrivacyParameters, PrivacyPlan,
    PrivacyTarget, clip_units,
};
use fleetune_proto::AggregationPlan;
use fleetune_secagg::RingBits;

/// The differential privacy of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct PrivacySpec {
    /// The noise.
    pub mechanism: Mechanism,
    /// How much of it.
    pub noise: NoiseSpec,
    /// Delta of the guarantee.
    pub delta: Delta,
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
    /// Takes the narrowest ring in which sums do not wrap around, instead of the plan's.
    pub narrowest_ring: bool,
}

/// How much noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseSpec {
    /// As much as this epsilon needs, over all participations of a device.
    Epsilon(f64),
    /// Simulations only: the noise that a mean would carry in a deployment with more devices. Devices refuse
    /// it outside the simulator.
    InsecureNoiseCohort {
        /// The deployment.
        imagined: NoiseCohort,
        /// Noise of its sums over the sensitivity.
        noise_multiplier: f64,
        /// Contributions of the simulated sums.
        summands: u32,
    },
}

impl PrivacySpec {
    /// Sets the privacy of a plan for adapters of `dimension` values, and its ring if asked to.
    ///
    /// # Errors
    /// What stands against it, in words.
    pub fn apply(&self, aggregation: &mut AggregationPlan, dimension: usize) -> Result<(), String> {
        let secure = aggregation.secure.as_ref();
        let secure = secure.ok_or("differential privacy needs protocol = \"secagg_plus\"")?;
        let (survivors, colluders) = (aggregation.summands_min, secure.colluders_max());
        let honest = survivors.checked_sub(colluders).filter(|honest| *honest > 0).ok_or_else(|| {
            format!(
                "summands_min {survivors} leaves no honest survivor: of a cohort of {} up to {colluders} may collude \
                 (corrupted_permille); raise summands_min or lower cohort_max",
                secure.cohort_max
            )
        })?;
        let target = PrivacyTarget {
            mechanism: self.mechanism,
            epsilon: 1.0,
            delta: self.delta,
            dimension,
            honest_survivors_min: honest,
            colluders_max: colluders,
            participations_max: self.participations_max,
            separation_ms: self.separation_ms,
            separation_rounds: self.separation_rounds,
            clip_units: self.clip_units,
            adaptation: self.adaptation,
        };
        let plan = match self.noise {
            NoiseSpec::Epsilon(epsilon) => PrivacyTarget { epsilon, ..target }.plan(),
            NoiseSpec::InsecureNoiseCohort { imagined, noise_multiplier, summands } => {
                imagine(&target, imagined, noise_multiplier, summands)
            }
        };
        let plan = plan.map_err(|error| error.to_string())?;
        if self.narrowest_ring {
            let bits = plan.ring_bits_min(aggregation.summands_max).map_err(|error| error.to_string())?;
            aggregation.ring_bits = RingBits::new(bits).map_err(|error| error.to_string())?;
        }
        aggregation.privacy = Some(*plan.parameters());
        Ok(())
    }
}

/// A mean of `summands` gets the noise that a mean of the imagined cohort would carry: variance
/// `(z B / N)^2` a coordinate, so `summands (z B / N)^2` a device.
fn imagine(
    target: &PrivacyTarget,
    imagined: NoiseCohort,
    noise_multiplier: f64,
    summands: u32,
) -> Result<PrivacyPlan, fleetune_privacy::AccountError> {
    let units = target.clip_units.unwrap_or_else(|| clip_units(target.dimension));
    let bare = target.with_variance(units, GridVariance::at_least(1.0)?)?;
    let deviation = noise_multiplier * bare.bound().l2() / f64::from(imagined.cohort);
    let variance = GridVariance::at_least(f64::from(summands) * deviation * deviation)?;
    let plan = target.with_variance(units, variance)?;
    let parameters = PrivacyParameters { noise_cohort: Some(imagined), ..*plan.parameters() };
    PrivacyPlan::new(parameters, target.dimension)
}
