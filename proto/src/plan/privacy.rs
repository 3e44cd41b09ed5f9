//! The privacy of a plan: from the wire, and back.

use super::{SecurePlan, TaskPlan};
use crate::{
    error::WireError,
    wire::{self, NoiseMechanism},
};
use fleetune_privacy::{
    ClipAdaptation, ClippingNorm, Delta, GridVariance, Mechanism, NoiseCohort, PrivacyParameters, PrivacyPlan,
};
use std::fmt::Display;

/// Most that the sampler's error may add to a plan's delta, as a share of it.
const SAMPLER_SHARE_MAX: f64 = 0.01;

pub(super) fn parse(wire: &wire::PrivacyPlan, summands_min: u32) -> Result<PrivacyParameters, WireError> {
    let mechanism = match NoiseMechanism::try_from(wire.mechanism) {
        Ok(NoiseMechanism::Skellam) => Mechanism::Skellam,
        Ok(NoiseMechanism::DiscreteGaussian) => Mechanism::DiscreteGaussian,
        Ok(NoiseMechanism::Unspecified) | Err(_) => {
            let problem = format!("unknown mechanism {}", wire.mechanism);
            return Err(WireError::invalid("plan.aggregation.privacy.mechanism", problem));
        }
    };
    let honest_survivors_min = summands_min.checked_sub(wire.colluders_max).filter(|honest| *honest > 0);
    let nobody = || format!("{}; some of the {summands_min} survivors must be honest", wire.colluders_max);
    Ok(PrivacyParameters {
        mechanism,
        clip_units: wire.clip_units,
        variance: variance("plan.aggregation.privacy.variance_steps", wire.variance_steps)?,
        honest_survivors_min: honest_survivors_min
            .ok_or_else(|| WireError::invalid("plan.aggregation.privacy.colluders_max", nobody()))?,
        colluders_max: wire.colluders_max,
        participations_max: wire.participations_max,
        separation_ms: wire.separation_ms,
        separation_rounds: wire.separation_rounds,
        delta: Delta::new(wire.delta).map_err(|e| invalid("plan.aggregation.privacy.delta", &e))?,
        adaptation: wire.adaptation.as_ref().map(parse_adaptation).transpose()?,
        noise_cohort: wire
            .insecure_noise_cohort
            .map(|c| NoiseCohort { cohort: c.cohort, population: c.population }),
    })
}

pub(super) fn to_wire(privacy: &PrivacyParameters) -> wire::PrivacyPlan {
    let mechanism = match privacy.mechanism {
        Mechanism::Skellam => NoiseMechanism::Skellam,
        Mechanism::DiscreteGaussian => NoiseMechanism::DiscreteGaussian,
    };
    let adaptation = |a: ClipAdaptation| wire::ClipAdaptation {
        quantile: a.quantile(),
        learning_rate: a.learning_rate(),
        norm_min: a.norms().0.value(),
        norm_max: a.norms().1.value(),
        bit_variance_steps: a.bit_variance.steps(),
    };
    wire::PrivacyPlan {
        mechanism: mechanism.into(),
        clip_units: privacy.clip_units,
        variance_steps: privacy.variance.steps(),
        colluders_max: privacy.colluders_max,
        participations_max: privacy.participations_max,
        separation_ms: privacy.separation_ms,
        separation_rounds: privacy.separation_rounds,
        delta: privacy.delta.value(),
        adaptation: privacy.adaptation.map(adaptation),
        insecure_noise_cohort: privacy
            .noise_cohort
            .map(|c| wire::NoiseCohort { cohort: c.cohort, population: c.population }),
    }
}

/// Holds the parts of a plan against each other: privacy needs secure aggregation, counts on no noise that
/// colluders may have left out, and fits its ring.
pub(super) fn check(plan: &TaskPlan) -> Result<(), WireError> {
    let aggregation = &plan.aggregation;
    let Some(parameters) = aggregation.privacy else { return Ok(()) };
    let Some(secure) = &aggregation.secure else {
        return Err(WireError::invalid("plan.aggregation.privacy", "needs secure aggregation"));
    };
    let privacy = PrivacyPlan::new(parameters, plan.adapter.dimension)
        .map_err(|error| invalid("plan.aggregation.privacy", &error))?;
    if let Some(adaptation) = &parameters.adaptation {
        let (norm, (low, high)) = (aggregation.clipping_norm.value(), adaptation.norms());
        if !(low.value()..=high.value()).contains(&norm) {
            let problem =
                format!("{norm}; adaptive clipping keeps it from {} to {}", low.value(), high.value());
            return Err(WireError::invalid("plan.aggregation.clipping_norm", problem));
        }
    }
    check_sampler(&privacy, aggregation.summands_max)?;
    let least = colluders_min(secure);
    let colluders = parameters.colluders_max;
    if colluders < least {
        let share = secure.assumptions.corrupted_permille;
        let problem =
            format!("{colluders}; of a cohort of {} at {share} in 1000 it is {least}", secure.cohort_max);
        return Err(WireError::invalid("plan.aggregation.privacy.colluders_max", problem));
    }
    let bits = privacy.ring_bits_min(aggregation.summands_max);
    let bits = bits.map_err(|error| invalid("plan.aggregation.ring_bits", &error))?;
    if aggregation.ring_bits.bits() < bits {
        let problem =
            format!("{}; sums of this noise wrap around below {bits}", aggregation.ring_bits.bits());
        return Err(WireError::invalid("plan.aggregation.ring_bits", problem));
    }
    Ok(())
}

/// What the sampler adds to delta must be nothing to speak of: it grows with e^epsilon, and an operator who asks
/// for an epsilon of 60 would be told a delta that does not hold.
fn check_sampler(privacy: &PrivacyPlan, summands_max: u32) -> Result<(), WireError> {
    let parameters = privacy.parameters();
    if parameters.noise_cohort.is_some() {
        return Ok(());
    }
    let (epsilon, delta) = (privacy.task_curve().epsilon(parameters.delta).0, parameters.delta.value());
    let added = privacy.sampler_delta(epsilon, summands_max);
    if added <= SAMPLER_SHARE_MAX * delta {
        return Ok(());
    }
    let problem =
        format!("{delta:e}; at epsilon {epsilon:.1} the noise tables' error adds {added:.1e} to it");
    Err(WireError::invalid("plan.aggregation.privacy.delta", problem))
}

impl SecurePlan {
    /// Devices of a cohort that may side with the coordinator, by the plan's own assumption.
    #[must_use]
    pub fn colluders_max(&self) -> u32 {
        colluders_min(self)
    }
}

fn colluders_min(secure: &SecurePlan) -> u32 {
    let product = u64::from(secure.cohort_max) * u64::from(secure.assumptions.corrupted_permille);
    u32::try_from(product / 1000).unwrap_or(u32::MAX)
}

fn parse_adaptation(wire: &wire::ClipAdaptation) -> Result<ClipAdaptation, WireError> {
    let field = "plan.aggregation.privacy.adaptation";
    let norm = |value| ClippingNorm::new(value).map_err(|error| invalid(field, &error));
    let norms = (norm(wire.norm_min)?, norm(wire.norm_max)?);
    let bit = variance("plan.aggregation.privacy.adaptation.bit_variance_steps", wire.bit_variance_steps)?;
    ClipAdaptation::new(wire.quantile, wire.learning_rate, norms, bit).map_err(|error| invalid(field, &error))
}

fn variance(field: &'static str, steps: u64) -> Result<GridVariance, WireError> {
    GridVariance::from_steps(steps).map_err(|error| invalid(field, &error))
}

fn invalid(field: &'static str, error: &dyn Display) -> WireError {
    WireError::invalid(field, error.to_string())
}
