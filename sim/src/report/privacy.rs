//! Privacy in numbers and words: the release's statement, and for a simulated noise cohort the guarantee of the
//! deployment that it imagines, always labelled.

use crate::{fleet::FleetOutcome, scenario::Scenario};
use anyhow::{Context, Result};
use fleetune_privacy::{NoiseCohort, PrivacyPlan, PrivacyStatement};
use serde::{Deserialize, Serialize};

/// What a private run may claim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrivacyReport {
    /// The statement that was signed with the release.
    pub statement: PrivacyStatement,
    /// The deployment imagined; null if the noise is this fleet's own.
    pub simulated_noise_cohort: Option<SimulatedGuarantee>,
    /// Most contributions in any device's own ledger; 0 with a noise cohort, which is not charged.
    pub participations_most: u32,
    /// The coordinator's ledger: sums opened.
    pub sums_opened: u32,
    /// Fewest contributions in any of them.
    pub survivors_least: u32,
    /// Epsilon after each round: of the imagined deployment, or of a device that took part in every round that
    /// it could.
    pub epsilon_by_round: Vec<f64>,
}

/// The guarantee of the deployment that a simulation imagines. It protects nobody who was simulated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SimulatedGuarantee {
    /// The deployment.
    pub deployment: NoiseCohort,
    /// Noise of its sums over the sensitivity, with the fewest honest survivors.
    pub noise_multiplier: f64,
    /// Chance of a device to be in a round.
    pub sampling_probability: f64,
    /// Its epsilon.
    pub epsilon: f64,
    /// At this delta.
    pub delta: f64,
    /// How epsilon was found.
    pub accountant: String,
}

impl PrivacyReport {
    /// None without differential privacy.
    pub(crate) fn of(scenario: &Scenario, outcome: &FleetOutcome, dimension: usize) -> Result<Option<Self>> {
        if !scenario.privacy.enabled {
            return Ok(None);
        }
        let json = &outcome.manifest.privacy_statement_json;
        let statement = PrivacyStatement::from_json(json).context("the release's privacy statement")?;
        let imagined = scenario.imagined()?;
        let simulated = imagined.map(|imagined| -> Result<SimulatedGuarantee> {
            Ok(SimulatedGuarantee {
                deployment: imagined.cohort,
                noise_multiplier: imagined.noise_multiplier,
                sampling_probability: imagined.sampling_probability,
                epsilon: imagined.epsilon_after(scenario.rounds)?,
                delta: imagined.delta.value(),
                accountant: imagined.accountant.name().into(),
            })
        });
        let survivors = outcome.charges.iter().map(|charge| charge.survivors);
        Ok(Some(Self {
            statement,
            simulated_noise_cohort: simulated.transpose()?,
            participations_most: outcome.participations_most,
            sums_opened: u32::try_from(outcome.charges.len()).unwrap_or(u32::MAX),
            survivors_least: survivors.min().unwrap_or(0),
            epsilon_by_round: epsilon_by_round(scenario, dimension)?,
        }))
    }

    /// For people.
    pub(crate) fn in_words(&self) -> String {
        let Some(guarantee) = &self.simulated_noise_cohort else {
            return format!(
                "{} In this simulation the noise follows from the seed, so that runs repeat: whoever knows the seed can \
                 take it away again. The statement is about devices, which draw theirs from the operating system.",
                self.statement.words()
            );
        };
        let SimulatedGuarantee { deployment, epsilon, delta, noise_multiplier, .. } = guarantee;
        format!(
            "SIMULATED NOISE COHORT: nobody in this run was protected. Its means carry the noise that they would \
             carry in a deployment with {} of {} devices a round (noise multiplier {noise_multiplier:.4}), whose \
             devices would have epsilon {epsilon:.2} at delta {delta:e}, each sampled by chance in each round. \
             Accountant: {}.",
            deployment.cohort, deployment.population, guarantee.accountant
        )
    }
}

fn epsilon_by_round(scenario: &Scenario, dimension: usize) -> Result<Vec<f64>> {
    if let Some(imagined) = scenario.imagined()? {
        return (1..=scenario.rounds).map(|rounds| imagined.epsilon_after(rounds)).collect();
    }
    let mut aggregation = scenario.aggregation_plan()?;
    let spec = scenario.privacy_spec()?.context("the run is private")?;
    spec.apply(&mut aggregation, dimension).map_err(anyhow::Error::msg)?;
    let parameters = aggregation.privacy.context("set just above")?;
    let plan = PrivacyPlan::new(parameters, dimension)?;
    let (one, most) = (plan.participation_curve(), parameters.participations_max);
    Ok((1..=scenario.rounds).map(|round| one.times(round.min(most)).epsilon(parameters.delta).0).collect())
}
