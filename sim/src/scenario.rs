//! A scenario: everything that a simulated fleet is made of, as one TOML file. What a file leaves
//! out has the value of `scenarios/default.toml`, which shows every setting.

mod engine;
mod model;

pub use engine::Engine;
pub use model::Model;

use anyhow::{Context, Result, ensure};
use fleetune_coordinator::{NoiseSpec, PrivacySpec, ServerOptimizer};
use fleetune_model::adapter::LoraConfig;
use fleetune_model::{config::Projection, trained::TrainedConfig};
use fleetune_privacy::{
    AdaptationTarget, ClippingNorm, Delta, Mechanism, NoiseCohort, SubsampledGaussian, noise_multiplier,
};
use fleetune_proto::{
    AggregationPlan, AggregationProtocol, Optimizer, SecurePlan, TrainingPlan, round::RoundPolicy,
};
use fleetune_secagg::{Assumptions, MaskSuite, RingBits};
use serde::{Deserialize, Serialize};
use std::path::Path;

const DEFAULT: &str = include_str!("../scenarios/default.toml");
const SMOLLM2: &str = include_str!("../scenarios/smollm2.toml");
const PRIVATE: &str = include_str!("../scenarios/private.toml");

/// A scenario with every value filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Rounds of the task.
    pub rounds: u32,
    /// How rounds select and wait.
    pub fleet: Fleet,
    /// What devices are like.
    pub devices: Devices,
    /// What is trained.
    pub model: Model,
    /// The adapter.
    pub adapter: AdapterShape,
    /// Local training.
    pub training: Training,
    /// How devices compute.
    pub engine: Engine,
    /// From updates to a sum.
    pub aggregation: Aggregation,
    /// From a sum to the next adapter.
    pub server: Server,
    /// Differential privacy.
    pub privacy: Privacy,
    /// What is measured.
    pub evaluation: Evaluation,
    /// Central training to compare with.
    pub central: Central,
    /// Devices that train alone, to compare with.
    pub local_only: LocalOnly,
}

/// How rounds select and wait.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Contributions at which a round finishes.
    pub cohort: u32,
    /// Devices selected per contribution wanted.
    pub over_selection: f64,
    /// Contributions with which a round may finish at its deadline.
    pub reports_min: u32,
    /// A user with fewer training blocks stays away.
    pub blocks_min: usize,
    /// Virtual seconds that devices may join.
    pub selection_s: u64,
    /// Virtual seconds from the first join to the last contribution.
    pub report_s: u64,
    /// Virtual seconds that each of the four later steps of secure aggregation may take.
    pub step_s: u64,
    /// A device without work comes back after this many virtual seconds.
    pub check_in_s: [u64; 2],
}

/// What devices are like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// Chance that a selected device vanishes before it contributes.
    pub dropout: f64,
    /// Chance that a device vanishes in each of the four later steps of secure aggregation.
    pub step_dropout: f64,
    /// Virtual seconds until it is back.
    pub offline_s: u64,
    /// Virtual seconds of one optimizer step on a median device.
    pub step_s: f64,
    /// Standard deviation of the logarithm of the devices' speed.
    pub speed_sigma: f64,
    /// Kibibytes a second, both ways.
    pub bandwidth_kib_s: u64,
    /// Milliseconds a call.
    pub latency_ms: u64,
}

/// The adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterShape {
    /// Rank of both factors.
    pub rank: usize,
    /// Scale numerator.
    pub alpha: f32,
    /// Adapted projections.
    pub targets: Vec<String>,
    /// FFA-LoRA.
    pub freeze_a: bool,
}

/// Local training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Optimizer steps a round.
    pub steps: u32,
    /// Blocks a step.
    pub batch_size: u32,
    /// Predicted tokens a block.
    pub block_tokens: u32,
    /// "adamw" or "sgd".
    pub optimizer: String,
    /// Learning rate of the first round.
    pub learning_rate: f32,
    /// The last round's rate over the first's, a cosine between; 1 keeps it constant.
    pub learning_rate_final_fraction: f32,
    /// Of "adamw".
    pub weight_decay: f32,
    /// Of "sgd".
    pub momentum: f32,
    /// Bound on the gradient's norm; 0 for none.
    pub gradient_clip: f32,
}

/// From updates to a sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Aggregation {
    /// "secagg_plus" or "insecure_plaintext".
    pub protocol: String,
    /// L2 bound of an update.
    pub clipping_norm: f32,
    /// Width of the ring, 8 to 32.
    pub ring_bits: u32,
    /// "aes128_ctr" or "chacha20".
    pub mask_suite: String,
    /// Most devices of a cohort; larger rounds are split.
    pub cohort_max: u32,
    /// Devices that may collude with the coordinator, thousandths.
    pub corrupted_permille: u32,
    /// Devices that may vanish in the middle, thousandths.
    pub dropout_permille: u32,
    /// Privacy fails below 2^-sigma.
    pub sigma: u32,
    /// A session fails for want of shares below 2^-eta.
    pub eta: u32,
}

/// From a sum to the next adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// "fedavg", "fedavgm" or "fedadam".
    pub optimizer: String,
    /// Server learning rate.
    pub learning_rate: f64,
    /// Of "fedavgm".
    pub momentum: f64,
    /// Of "fedadam".
    pub beta1: f64,
    /// Of "fedadam".
    pub beta2: f64,
    /// Of "fedadam".
    pub tau: f64,
}

/// Differential privacy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Privacy {
    /// On or off.
    pub enabled: bool,
    /// "skellam" or "discrete_gaussian".
    pub mechanism: String,
    /// Epsilon of a device: over its participations, or with a noise cohort over the rounds.
    pub epsilon: f64,
    /// At this delta.
    pub delta: f64,
    /// Most contributions of a device; not with a noise cohort.
    pub participations_max: u32,
    /// Least rounds between two.
    pub separation_rounds: u32,
    /// Devices a round of the deployment whose noise is imagined; 0 for the noise of this fleet.
    pub noise_cohort: u32,
    /// Devices of that deployment.
    pub noise_population: u64,
    /// How its epsilon is found: "rdp" (Renyi divergence) or "pld" (privacy loss distribution, which allows less
    /// noise).
    pub noise_accountant: String,
    /// Least share of its cohort that is honest and survives: each device's noise is that much larger.
    pub noise_honest_share: f64,
    /// Clipping norm in units of the integer grid; 0 for a chosen one.
    pub clip_units: u32,
    /// The clipping norm follows a quantile of the updates' norms.
    pub adaptive_clipping: bool,
    /// That quantile.
    pub clip_quantile: f64,
    /// Size of its steps.
    pub clip_learning_rate: f64,
    /// Least clipping norm.
    pub clipping_norm_min: f32,
    /// Largest clipping norm.
    pub clipping_norm_max: f32,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Blocks a group.
    pub blocks: usize,
    /// Rounds between evaluations.
    pub every: u32,
    /// True: also how often the right token or word was among the first three guesses.
    pub recall: bool,
}

/// Central training to compare with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Central {
    /// Blocks a step.
    pub batch_size: usize,
    /// Highest learning rate; warm-up, then a cosine to a tenth.
    pub learning_rate: f32,
    /// Steps of warm-up.
    pub warmup_steps: u32,
}

/// Devices that train alone, to compare with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalOnly {
    /// Devices.
    pub devices: usize,
    /// Optimizer steps of each.
    pub steps: u32,
}

/// A deployment that a private run imagines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Imagined {
    /// Its cohort and population.
    pub cohort: NoiseCohort,
    /// Chance of a device to be in a round, each drawn for itself.
    pub sampling_probability: f64,
    /// Noise of a sum over the sensitivity, with the fewest honest survivors.
    pub noise_multiplier: f64,
    /// Delta of the guarantee.
    pub delta: Delta,
    /// How epsilon is found.
    pub accountant: Accountant,
}

/// Accountants of the Poisson-subsampled Gaussian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accountant {
    /// By Renyi divergence.
    Renyi,
    /// By the privacy loss distribution, from above.
    LossDistribution,
}

impl Accountant {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Renyi => "Renyi divergence of the Poisson-subsampled Gaussian",
            Self::LossDistribution => {
                "privacy loss distribution of the Poisson-subsampled Gaussian, from above"
            }
        }
    }
}

impl Imagined {
    /// Epsilon of the deployment after that many rounds.
    pub fn epsilon_after(&self, rounds: u32) -> Result<f64> {
        let gaussian = SubsampledGaussian::new(self.noise_multiplier, self.sampling_probability)?;
        match self.accountant {
            Accountant::Renyi => Ok(gaussian.epsilon_rdp(rounds, self.delta).0),
            Accountant::LossDistribution => Ok(gaussian.epsilon_pld(rounds, self.delta)),
        }
    }

    /// The least noise, to a thousandth, with which the loss distribution keeps epsilon.
    fn lower_noise(&mut self, epsilon: f64, rounds: u32) -> Result<()> {
        let (mut low, mut high) = (0.25, self.noise_multiplier);
        while high - low > 1e-3 * high {
            let middle = Self { noise_multiplier: f64::midpoint(low, high), ..*self };
            if middle.epsilon_after(rounds)? <= epsilon {
                high = middle.noise_multiplier;
            } else {
                low = middle.noise_multiplier;
            }
        }
        self.noise_multiplier = high;
        Ok(())
    }
}

impl Scenario {
    /// The default fleet on the embedded base.
    pub fn default_fleet() -> Result<Self> {
        Self::from_toml("scenarios/default.toml", "")
    }

    /// The reference settings for SmolLM2.
    pub fn smollm2() -> Result<Self> {
        Self::from_toml("scenarios/smollm2.toml", SMOLLM2)
    }

    /// The same with differential privacy: the reference's private setting laid over it.
    pub fn made_private(&self) -> Result<Self> {
        let mut table = toml::Table::try_from(self).context("the scenario as TOML")?;
        merge(&mut table, toml::from_str(PRIVATE).context("scenarios/private.toml")?);
        let scenario: Self = table.try_into().context("scenarios/private.toml")?;
        scenario.check().context("scenarios/private.toml")?;
        Ok(scenario)
    }

    /// Reads a scenario file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("scenario {}", path.display()))?;
        Self::from_toml(&path.display().to_string(), &text)
    }

    /// Parses a scenario; `name` stands in errors.
    pub fn from_toml(name: &str, text: &str) -> Result<Self> {
        let mut table: toml::Table = toml::from_str(DEFAULT).expect("the default scenario parses");
        let own: toml::Table = toml::from_str(text).with_context(|| format!("scenario {name}"))?;
        merge(&mut table, own);
        let scenario: Self = table.try_into().with_context(|| format!("scenario {name}"))?;
        scenario.check().with_context(|| format!("scenario {name}"))?;
        Ok(scenario)
    }

    /// Refuses values that make no sense together.
    pub fn check(&self) -> Result<()> {
        let fleet = &self.fleet;
        ensure!(fleet.cohort >= 1, "fleet.cohort: at least 1");
        ensure!((1.0..=10.0).contains(&fleet.over_selection), "fleet.over_selection: 1 to 10");
        ensure!((1..=fleet.cohort).contains(&fleet.reports_min), "fleet.reports_min: 1 to fleet.cohort");
        ensure!(
            fleet.check_in_s[0] <= fleet.check_in_s[1],
            "fleet.check_in_s: the first is at most the second"
        );
        ensure!((0.0..1.0).contains(&self.devices.dropout), "devices.dropout: 0 up to, without, 1");
        let step_dropout = self.devices.step_dropout;
        ensure!((0.0..1.0).contains(&step_dropout), "devices.step_dropout: 0 up to, without, 1");
        ensure!(fleet.step_s >= 1, "fleet.step_s: at least 1");
        ensure!(
            self.devices.step_s >= 0.0 && self.devices.step_s.is_finite(),
            "devices.step_s: not negative"
        );
        ensure!(self.devices.bandwidth_kib_s >= 1, "devices.bandwidth_kib_s: at least 1");
        ensure!((0.0..=3.0).contains(&self.devices.speed_sigma), "devices.speed_sigma: 0 to 3");
        ensure!(self.evaluation.every >= 1 && self.evaluation.blocks >= 1, "evaluation: at least 1");
        ensure!(self.central.batch_size >= 1, "central.batch_size: at least 1");
        self.trained(0)?;
        self.model.release_format()?;
        self.engine.options()?;
        self.training_plan()?;
        self.aggregation_plan()?;
        self.privacy_spec()?;
        self.server_optimizer().map(|_| ())
    }

    /// What is trained.
    pub fn trained(&self, init_seed: u64) -> Result<TrainedConfig> {
        self.model.trained(self.lora(init_seed)?)
    }

    /// The adapter's shape.
    fn lora(&self, init_seed: u64) -> Result<LoraConfig> {
        let parse =
            |name: &String| Projection::from_name(name).with_context(|| format!("adapter.targets: {name:?}"));
        let mut targets = self.adapter.targets.iter().map(parse).collect::<Result<Vec<_>>>()?;
        targets.sort_unstable();
        let AdapterShape { rank, alpha, freeze_a, .. } = self.adapter;
        Ok(LoraConfig { rank, alpha, targets, freeze_a, init_seed })
    }

    /// Local training as the plan says it.
    pub fn training_plan(&self) -> Result<TrainingPlan> {
        let t = &self.training;
        let optimizer = match t.optimizer.as_str() {
            "adamw" => {
                Optimizer::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: t.weight_decay }
            }
            "sgd" => Optimizer::Sgd { momentum: t.momentum },
            other => anyhow::bail!("training.optimizer: {other:?}; adamw or sgd"),
        };
        Ok(TrainingPlan {
            steps: t.steps,
            batch_size: t.batch_size,
            block_tokens: t.block_tokens,
            learning_rate: t.learning_rate,
            learning_rate_final_fraction: t.learning_rate_final_fraction,
            gradient_clip: (t.gradient_clip > 0.0).then_some(t.gradient_clip),
            optimizer,
            examples_min: 1,
        })
    }

    /// From updates to a sum as the plan says it.
    pub fn aggregation_plan(&self) -> Result<AggregationPlan> {
        let a = &self.aggregation;
        let protocol = match a.protocol.as_str() {
            "secagg_plus" => AggregationProtocol::SecaggPlus,
            "insecure_plaintext" => AggregationProtocol::InsecurePlaintext,
            other => anyhow::bail!("aggregation.protocol: {other:?}; secagg_plus or insecure_plaintext"),
        };
        let secure = self.secure_plan()?;
        Ok(AggregationPlan {
            protocol,
            secure: (protocol == AggregationProtocol::SecaggPlus).then_some(secure),
            clipping_norm: ClippingNorm::new(a.clipping_norm).context("aggregation.clipping_norm")?,
            ring_bits: RingBits::new(a.ring_bits).context("aggregation.ring_bits")?,
            summands_max: self.fleet.cohort,
            summands_min: self.fleet.reports_min,
            privacy: None,
        })
    }

    /// Differential privacy as the coordinator takes it; none when it is off.
    pub fn privacy_spec(&self) -> Result<Option<PrivacySpec>> {
        let p = &self.privacy;
        if !p.enabled {
            return Ok(None);
        }
        let mechanism = match p.mechanism.as_str() {
            "skellam" => Mechanism::Skellam,
            "discrete_gaussian" => Mechanism::DiscreteGaussian,
            other => anyhow::bail!("privacy.mechanism: {other:?}; skellam or discrete_gaussian"),
        };
        let norm = |name, value| ClippingNorm::new(value).context(name);
        let least = norm("privacy.clipping_norm_min", p.clipping_norm_min)?;
        let norms = (least, norm("privacy.clipping_norm_max", p.clipping_norm_max)?);
        let adaptation = p.adaptive_clipping.then_some(AdaptationTarget {
            quantile: p.clip_quantile,
            learning_rate: p.clip_learning_rate,
            norms,
        });
        let noise = match self.imagined()? {
            Some(imagined) => NoiseSpec::InsecureNoiseCohort {
                imagined: imagined.cohort,
                noise_multiplier: imagined.noise_multiplier / p.noise_honest_share.sqrt(),
                summands: self.fleet.cohort,
            },
            None => NoiseSpec::Epsilon(p.epsilon),
        };
        Ok(Some(PrivacySpec {
            mechanism,
            noise,
            delta: Delta::new(p.delta).context("privacy.delta")?,
            // With a noise cohort nobody is protected, so nobody counts.
            participations_max: if p.noise_cohort > 0 { self.rounds } else { p.participations_max },
            separation_ms: 0,
            separation_rounds: p.separation_rounds,
            clip_units: (p.clip_units > 0).then_some(p.clip_units),
            adaptation,
            narrowest_ring: true,
        }))
    }

    /// The deployment whose noise a private run imagines; none if it adds the noise of its own fleet.
    pub fn imagined(&self) -> Result<Option<Imagined>> {
        let p = &self.privacy;
        if !p.enabled || p.noise_cohort == 0 {
            return Ok(None);
        }
        let fits = u64::from(p.noise_cohort) <= p.noise_population && p.noise_population < 1 << 40;
        ensure!(fits, "privacy.noise_population: at least privacy.noise_cohort");
        let share = p.noise_honest_share;
        ensure!(share > 0.0 && share <= 1.0, "privacy.noise_honest_share: above 0, at most 1");
        let cohort = NoiseCohort { cohort: p.noise_cohort, population: p.noise_population };
        let sampling_probability = f64::from(p.noise_cohort) / p.noise_population as f64;
        let delta = Delta::new(p.delta).context("privacy.delta")?;
        let accountant = match p.noise_accountant.as_str() {
            "rdp" => Accountant::Renyi,
            "pld" => Accountant::LossDistribution,
            other => anyhow::bail!("privacy.noise_accountant: {other:?}; rdp or pld"),
        };
        let by_renyi = noise_multiplier(p.epsilon, delta, self.rounds, sampling_probability)
            .context("privacy.epsilon")?;
        let mut imagined =
            Imagined { cohort, sampling_probability, noise_multiplier: by_renyi, delta, accountant };
        if accountant == Accountant::LossDistribution {
            imagined.lower_noise(p.epsilon, self.rounds)?;
        }
        Ok(Some(imagined))
    }

    fn secure_plan(&self) -> Result<SecurePlan> {
        let a = &self.aggregation;
        let mask_suite = match a.mask_suite.as_str() {
            "aes128_ctr" => MaskSuite::Aes128Ctr,
            "chacha20" => MaskSuite::ChaCha20,
            other => anyhow::bail!("aggregation.mask_suite: {other:?}; aes128_ctr or chacha20"),
        };
        let assumptions = Assumptions::new(a.corrupted_permille, a.dropout_permille, a.sigma, a.eta)
            .context("aggregation")?;
        // No cohort is larger than the round; under privacy the colluders assumed are a share of this.
        let cohort_max = a.cohort_max.min(self.round_policy().selected_max.max(2));
        Ok(SecurePlan { mask_suite, cohort_max, assumptions })
    }

    /// How rounds select and wait.
    pub fn round_policy(&self) -> RoundPolicy {
        let selected = (f64::from(self.fleet.cohort) * self.fleet.over_selection).ceil();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked: 1 to 10 times a u32"
        )]
        let selected_max = (selected as u32).max(self.fleet.cohort);
        RoundPolicy {
            report_goal: self.fleet.cohort,
            selected_max,
            reports_min: self.fleet.reports_min,
            selection_ms: self.fleet.selection_s * 1000,
            report_ms: self.fleet.report_s * 1000,
            step_ms: self.fleet.step_s * 1000,
        }
    }

    /// From a sum to the next adapter.
    pub fn server_optimizer(&self) -> Result<ServerOptimizer> {
        let Server { learning_rate, momentum, beta1, beta2, tau, .. } = self.server;
        match self.server.optimizer.as_str() {
            "fedavg" => Ok(ServerOptimizer::FedAvg { learning_rate }),
            "fedavgm" => Ok(ServerOptimizer::FedAvgM { learning_rate, momentum }),
            "fedadam" => Ok(ServerOptimizer::FedAdam { learning_rate, beta1, beta2, tau }),
            other => anyhow::bail!("server.optimizer: {other:?}; fedavg, fedavgm or fedadam"),
        }
    }
}

/// Lays `own` over `table`, key by key.
fn merge(table: &mut toml::Table, own: toml::Table) {
    for (key, value) in own {
        match (table.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(own)) => merge(base, own),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests;
