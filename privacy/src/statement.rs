//! What can truthfully be said of a model's privacy, for machines and in words. Generated from the plan that the
//! devices enforced, signed with the release, shown on the device.

use crate::mechanism::{Mechanism, NoiseCohort, PrivacyPlan};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// Version of the statement's form.
pub const STATEMENT_VERSION: u32 = 1;

/// The statement of one release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrivacyStatement {
    /// Form of the statement.
    pub statement_version: u32,
    /// The population trained on.
    pub population: String,
    /// The task that trained the model.
    pub task: String,
    /// Rounds that it ran.
    pub rounds: u32,
    /// How contributions were added up.
    pub aggregation: String,
    /// What is guaranteed.
    pub guarantee: Guarantee,
}

/// What a statement comes down to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Guarantee {
    /// No differential privacy.
    None,
    /// A simulation with the noise of an imagined cohort; nobody is protected by it.
    Simulated(NoiseCohort),
    /// Differential privacy of each device.
    DifferentialPrivacy(Box<DeviceGuarantee>),
}

/// The numbers of differential privacy, and what they follow from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceGuarantee {
    /// The noise.
    pub mechanism: Mechanism,
    /// What is protected.
    pub unit: String,
    /// What it is compared with.
    pub adjacency: String,
    /// Who is trusted, and for what.
    pub trust: String,
    /// What the bound is about.
    pub released: String,
    /// Most participations of a device, as it enforces itself.
    pub participations_max: u32,
    /// Least time between two, milliseconds.
    pub separation_ms: u64,
    /// Least rounds between two.
    pub separation_rounds: u32,
    /// Values in a contribution.
    pub dimension: u64,
    /// Clipping norm, in units of the grid.
    pub clip_units: u32,
    /// Exact bound on a contribution's squared norm, units squared.
    pub norm_squared_max: u64,
    /// One device's noise, units squared.
    pub noise_variance: f64,
    /// Fewest survivors with which a sum opens.
    pub survivors_min: u32,
    /// Colluding devices whose noise does not count.
    pub colluders_max: u32,
    /// `RDP(alpha) <= rho alpha` at the accountant's integer orders, over all participations.
    pub rho: f64,
    /// Epsilon over all participations.
    pub epsilon: f64,
    /// At this delta, without the sampler's.
    pub delta: f64,
    /// Rényi order at which epsilon was found.
    pub order: u32,
    /// What the tables of the sampler add to delta.
    pub delta_sampler: f64,
    /// Epsilon of one device if secure aggregation were broken altogether, at the same delta; absent where
    /// nothing could be said.
    pub epsilon_without_aggregation: Option<f64>,
    /// Amplification by sampling that is claimed.
    pub amplification: String,
    /// How the numbers were found.
    pub accountant: String,
    /// What the statement does not cover.
    pub not_covered: Vec<String>,
}

/// What a statement needs beside the plan's privacy.
#[derive(Debug, Clone, PartialEq)]
pub struct StatementParts<'a> {
    /// The population.
    pub population: &'a str,
    /// The task.
    pub task: &'a str,
    /// Rounds run.
    pub rounds: u32,
    /// `secagg+` or `insecure_plaintext`.
    pub aggregation: &'a str,
    /// Fewest survivors with which a sum opens.
    pub survivors_min: u32,
    /// Most contributions in a sum.
    pub summands_max: u32,
}

impl PrivacyStatement {
    /// The statement of a task that ran under `plan`.
    #[must_use]
    pub fn new(parts: &StatementParts<'_>, plan: Option<&PrivacyPlan>) -> Self {
        let guarantee = match plan {
            None => Guarantee::None,
            Some(plan) => match plan.parameters().noise_cohort {
                Some(imagined) => Guarantee::Simulated(imagined),
                None => Guarantee::DifferentialPrivacy(Box::new(DeviceGuarantee::new(parts, plan))),
            },
        };
        Self {
            statement_version: STATEMENT_VERSION,
            population: parts.population.to_owned(),
            task: parts.task.to_owned(),
            rounds: parts.rounds,
            aggregation: parts.aggregation.to_owned(),
            guarantee,
        }
    }

    /// The form for machines: JSON with a fixed order of fields.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a statement is plain data")
    }

    /// Reads the form for machines.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The form for people.
    #[must_use]
    pub fn words(&self) -> String {
        let Self { task, population, rounds, aggregation, .. } = self;
        let head = format!("Task {task} of population {population}, {rounds} rounds. ");
        let secure = aggregation == "secagg+";
        let sums = if secure {
            " Secure aggregation (secagg+) kept single updates from the coordinator, which learned their sums."
        } else {
            " Its updates reached the coordinator in the clear (insecure_plaintext)."
        };
        match &self.guarantee {
            Guarantee::None => {
                format!("{head}No differential privacy: the model may remember what it saw.{sums}")
            }
            Guarantee::Simulated(imagined) => format!(
                "{head}SIMULATION: its noise is scaled as for a cohort of {} of {} devices that do not exist. It \
                 protects nobody who took part.",
                imagined.cohort, imagined.population
            ),
            Guarantee::DifferentialPrivacy(guarantee) => format!("{head}{}", guarantee.words()),
        }
    }
}

impl DeviceGuarantee {
    fn new(parts: &StatementParts<'_>, plan: &PrivacyPlan) -> Self {
        let p = plan.parameters();
        let curve = plan.task_curve();
        let (epsilon, order) = curve.epsilon(p.delta);
        let local = plan.local_curve().times(p.participations_max).epsilon(p.delta).0;
        let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        Self {
            mechanism: p.mechanism,
            unit: "one device's whole local dataset".into(),
            adjacency: "zero-out: a device's contributions replaced by the zero vector, its noise kept".into(),
            trust: "the coordinator may read all it receives and may lie, as far as secure aggregation \
                    withstands it (docs/threat-model.md); at most colluders_max devices of a cohort side with it; \
                    the device runs this software"
                .into(),
            released: "all sums of all rounds, and with them every checkpoint and clipping norm".into(),
            participations_max: p.participations_max,
            separation_ms: p.separation_ms,
            separation_rounds: p.separation_rounds,
            dimension: plan.vector_len() as u64,
            clip_units: p.clip_units,
            norm_squared_max: plan.bound().squared(),
            noise_variance: p.variance.value(),
            survivors_min: parts.survivors_min,
            colluders_max: p.colluders_max,
            rho: plan.participation_rho() * f64::from(p.participations_max),
            epsilon,
            delta: p.delta.value(),
            order,
            delta_sampler: plan.sampler_delta(epsilon, parts.summands_max),
            epsilon_without_aggregation: local.is_finite().then_some(local),
            amplification: "none".into(),
            accountant: concat!("fleetune-privacy ", env!("CARGO_PKG_VERSION"), ", RDP at integer orders").into(),
            not_covered: texts(&[
                "which devices took part, and when",
                "the base model's own training data",
                "settings chosen by looking at other runs on the same devices",
                "what stays on the device: its data and any personal adapter",
                "a population of devices that the coordinator has made up, if its registrars let it",
            ]),
        }
    }

    fn words(&self) -> String {
        let noise = match self.mechanism {
            Mechanism::Skellam => "Skellam noise",
            Mechanism::DiscreteGaussian => "discrete Gaussian noise",
        };
        let delta = self.delta + self.delta_sampler;
        let mut words = format!(
            "Differential privacy of each device: whatever one device holds, and whether it contributed zeros \
             instead, changes the probability of anything that can be learned from this model and from all the \
             sums it was made of by at most a factor of e^{:.3}, but for a probability of {delta:.2e} (epsilon \
             {:.3}, delta {delta:.2e}; rho {:.4}). Each device adds {noise} of its own before its update is \
             masked; sums open only with {} survivors, of whom at most {} may side with the coordinator. A device \
             takes part at most {} times",
            self.epsilon,
            self.epsilon,
            self.rho,
            self.survivors_min,
            self.colluders_max,
            self.participations_max,
        );
        if self.separation_ms > 0 {
            let _ = write!(words, ", with {} s between", self.separation_ms / 1000);
        }
        words.push_str(" and keeps count itself. ");
        match self.epsilon_without_aggregation {
            Some(local) if local < 1000.0 => {
                let _ = write!(words, "If secure aggregation were broken, epsilon would be {local:.1}. ");
            }
            _ => words.push_str("If secure aggregation were broken, a single update would be all but bare. "),
        }
        let _ = write!(words, "Not covered: {}.", self.not_covered.join("; "));
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{account::Delta, mechanism::PrivacyParameters, noise::GridVariance};

    fn plan(noise_cohort: Option<NoiseCohort>) -> PrivacyPlan {
        let parameters = PrivacyParameters {
            mechanism: Mechanism::Skellam,
            clip_units: 2048,
            variance: GridVariance::at_least(90_000.0).unwrap(),
            honest_survivors_min: 70,
            colluders_max: 10,
            participations_max: 4,
            separation_ms: 86_400_000,
            separation_rounds: 1,
            delta: Delta::new(1e-8).unwrap(),
            adaptation: None,
            noise_cohort,
        };
        PrivacyPlan::new(parameters, 184_320).unwrap()
    }

    fn parts() -> StatementParts<'static> {
        StatementParts {
            population: "roles",
            task: "lora",
            rounds: 12,
            aggregation: "secagg+",
            survivors_min: 80,
            summands_max: 128,
        }
    }

    #[test]
    fn a_statement_says_what_the_accountant_found_and_survives_its_form() {
        let plan = plan(None);
        let statement = PrivacyStatement::new(&parts(), Some(&plan));
        let Guarantee::DifferentialPrivacy(guarantee) = &statement.guarantee else { panic!("{statement:?}") };
        assert_eq!(guarantee.epsilon, plan.task_curve().epsilon(plan.parameters().delta).0);
        assert_eq!((guarantee.colluders_max, guarantee.norm_squared_max), (10, plan.bound().squared()));
        assert!(guarantee.delta_sampler > 0.0 && guarantee.delta_sampler < 1e-15);
        assert!(guarantee.epsilon_without_aggregation.unwrap() > guarantee.epsilon);
        let read = PrivacyStatement::from_json(&statement.to_json()).unwrap();
        let Guarantee::DifferentialPrivacy(read_guarantee) = &read.guarantee else { panic!("{read:?}") };
        assert!((read_guarantee.epsilon / guarantee.epsilon - 1.0).abs() < 1e-12);
        assert_eq!((&read.task, read.rounds), (&statement.task, statement.rounds));
        let words = statement.words();
        for part in ["epsilon", "at most 4 times", "86400 s", "80 survivors", "Not covered"] {
            assert!(words.contains(part), "{part:?} is not in {words}");
        }
    }

    #[test]
    fn what_protects_nobody_says_so() {
        let none = PrivacyStatement::new(&parts(), None).words();
        assert!(none.contains("No differential privacy"), "{none}");
        let imagined = NoiseCohort { cohort: 1000, population: 1_000_000 };
        let simulated = PrivacyStatement::new(&parts(), Some(&plan(Some(imagined))));
        assert!(simulated.words().contains("SIMULATION") && simulated.words().contains("protects nobody"));
        assert!(!simulated.to_json().contains("epsilon"));
    }
}
