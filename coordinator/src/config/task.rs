//! One `[[task]]` table, checked once into the values that the core takes.

use super::{ConfigError, parse_name, setting};
use crate::{NoiseSpec, PrivacySpec, ServerOptimizer, TaskSpec};
use fleetune_model::{
    adapter::LoraConfig, config::Projection, trained::TrainedConfig, weights::WeightFormat,
};
use fleetune_privacy::{AdaptationTarget, ClippingNorm, Delta, Mechanism};
use fleetune_proto::{
    AggregationPlan, AggregationProtocol, Name, Optimizer, SecurePlan, TrainingPlan, UnixMillis,
    round::RoundPolicy,
};
use fleetune_secagg::{Assumptions, MaskSuite, RingBits};
use serde::Deserialize;
use std::path::{Path, PathBuf};

const DAY_MS: u64 = 24 * 3600 * 1000;

/// A task as configured: all of its spec but the time it expires, which counts from its first day.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskConfig {
    /// The base model's GGUF file.
    pub base_model: PathBuf,
    /// Life of the plan, days.
    pub expires_days: u32,
    without_expiry: TaskSpec,
}

impl TaskConfig {
    /// The task's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.without_expiry.name
    }

    /// True if it aggregates securely.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.without_expiry.aggregation.secure.is_some()
    }

    /// The spec of a task that was first served at `created`.
    #[must_use]
    pub fn spec(&self, created: UnixMillis) -> TaskSpec {
        let expires = created.plus(u64::from(self.expires_days) * DAY_MS);
        TaskSpec { expires, ..self.without_expiry.clone() }
    }
}

/// The table as it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    name: String,
    base_model: PathBuf,
    trains: String,
    release_format: String,
    rounds: u32,
    expires_days: u32,
    release_valid_days: u32,
    adapter: Adapter,
    training: Training,
    aggregation: Aggregation,
    round: Round,
    server_optimizer: Server,
    privacy: Privacy,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Adapter {
    rank: usize,
    alpha: f32,
    targets: Vec<String>,
    freeze_a: FreezeA,
    init_seed: u64,
}

/// `true`, `false`, or the word `auto`.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum FreezeA {
    Given(bool),
    Auto(Auto),
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Auto {
    Auto,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Privacy {
    enabled: bool,
    mechanism: String,
    epsilon: f64,
    delta: f64,
    participations_max: u32,
    separation_hours: f64,
    separation_rounds: u32,
    clip_units: u32,
    narrowest_ring: bool,
    adaptive_clipping: bool,
    clip_quantile: f64,
    clip_learning_rate: f64,
    clipping_norm_min: f32,
    clipping_norm_max: f32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    steps: u32,
    batch_size: u32,
    block_tokens: u32,
    optimizer: String,
    learning_rate: f32,
    learning_rate_final_fraction: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    momentum: f32,
    gradient_clip: f32,
    examples_min: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Aggregation {
    protocol: String,
    clipping_norm: f32,
    ring_bits: u32,
    summands_max: u32,
    summands_min: u32,
    mask_suite: String,
    cohort_max: u32,
    corrupted_permille: u32,
    dropout_permille: u32,
    sigma: u32,
    eta: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Round {
    report_goal: u32,
    selected_max: u32,
    reports_min: u32,
    selection_ms: u64,
    report_ms: u64,
    step_ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Server {
    kind: String,
    learning_rate: f64,
    momentum: f64,
    beta1: f64,
    beta2: f64,
    tau: f64,
}

impl Table {
    pub(super) fn check(self, path: &Path, folder: &Path) -> Result<TaskConfig, ConfigError> {
        let name = parse_name(path, "task.name", &self.name)?;
        let wrong = |(key, problem): (&str, String)| setting(path, &format!("task {name}: {key}"), &problem);
        let Round { report_goal, selected_max, reports_min, selection_ms, report_ms, step_ms } = self.round;
        let round_policy =
            RoundPolicy { report_goal, selected_max, reports_min, selection_ms, report_ms, step_ms };
        let without_expiry = TaskSpec {
            name: name.clone(),
            trained: trained(&self.trains, self.adapter, self.privacy.enabled).map_err(wrong)?,
            release_format: release_format(&self.release_format).map_err(wrong)?,
            training: self.training.check().map_err(wrong)?,
            aggregation: self.aggregation.check().map_err(wrong)?,
            rounds: self.rounds,
            round_policy,
            server_optimizer: self.server_optimizer.check().map_err(wrong)?,
            expires: UnixMillis(0),
            release_valid_ms: u64::from(self.release_valid_days) * DAY_MS,
            privacy: self.privacy.check().map_err(wrong)?,
        };
        Ok(TaskConfig {
            base_model: folder.join(self.base_model),
            expires_days: self.expires_days,
            without_expiry,
        })
    }
}

type Wrong = (&'static str, String);

/// `[task.adapter]` says nothing where all weights are trained.
fn trained(kind: &str, adapter: Adapter, private: bool) -> Result<TrainedConfig, Wrong> {
    match kind {
        "adapter" => adapter.check(private).map(TrainedConfig::Lora),
        "model" => Ok(TrainedConfig::Full),
        other => Err(("trains", format!("{other:?} is neither \"adapter\" nor \"model\""))),
    }
}

fn release_format(name: &str) -> Result<WeightFormat, Wrong> {
    match name {
        "f32" => Ok(WeightFormat::F32),
        "f16" => Ok(WeightFormat::F16),
        "q8_0" => Ok(WeightFormat::Q8_0),
        other => Err(("release_format", format!("{other:?} is none of \"f32\", \"f16\", \"q8_0\""))),
    }
}

impl Adapter {
    fn check(self, private: bool) -> Result<LoraConfig, Wrong> {
        let parse = |name: &String| {
            Projection::from_name(name)
                .ok_or_else(|| ("adapter.targets", format!("{name:?} is no projection")))
        };
        let targets = self.targets.iter().map(parse).collect::<Result<_, _>>()?;
        let Self { rank, alpha, init_seed, .. } = self;
        // Under privacy FFA-LoRA: the noise on A times the noise on B is no noise that averages out.
        let freeze_a = match self.freeze_a {
            FreezeA::Given(given) => given,
            FreezeA::Auto(Auto::Auto) => private,
        };
        Ok(LoraConfig { rank, alpha, targets, freeze_a, init_seed })
    }
}

impl Training {
    fn check(self) -> Result<TrainingPlan, Wrong> {
        let Self { beta1, beta2, epsilon, weight_decay, momentum, .. } = self;
        let optimizer = match self.optimizer.as_str() {
            "adamw" => Optimizer::AdamW { beta1, beta2, epsilon, weight_decay },
            "sgd" => Optimizer::Sgd { momentum },
            other => {
                return Err(("training.optimizer", format!("{other:?} is neither \"adamw\" nor \"sgd\"")));
            }
        };
        Ok(TrainingPlan {
            steps: self.steps,
            batch_size: self.batch_size,
            block_tokens: self.block_tokens,
            learning_rate: self.learning_rate,
            learning_rate_final_fraction: self.learning_rate_final_fraction,
            gradient_clip: (self.gradient_clip != 0.0).then_some(self.gradient_clip),
            optimizer,
            examples_min: self.examples_min,
        })
    }
}

impl Aggregation {
    fn check(self) -> Result<AggregationPlan, Wrong> {
        let protocol = match self.protocol.as_str() {
            "secagg_plus" => AggregationProtocol::SecaggPlus,
            "insecure_plaintext" => AggregationProtocol::InsecurePlaintext,
            other => {
                let problem = format!("{other:?} is neither \"secagg_plus\" nor \"insecure_plaintext\"");
                return Err(("aggregation.protocol", problem));
            }
        };
        let secure = self.secure()?;
        let clipping_norm = ClippingNorm::new(self.clipping_norm);
        let ring_bits = RingBits::new(self.ring_bits);
        Ok(AggregationPlan {
            protocol,
            clipping_norm: clipping_norm.map_err(|error| ("aggregation.clipping_norm", error.to_string()))?,
            ring_bits: ring_bits.map_err(|error| ("aggregation.ring_bits", error.to_string()))?,
            summands_max: self.summands_max,
            summands_min: self.summands_min,
            secure: (protocol == AggregationProtocol::SecaggPlus).then_some(secure),
            privacy: None,
        })
    }

    fn secure(&self) -> Result<SecurePlan, Wrong> {
        let mask_suite = match self.mask_suite.as_str() {
            "aes128_ctr" => MaskSuite::Aes128Ctr,
            "chacha20" => MaskSuite::ChaCha20,
            other => {
                let problem = format!("{other:?} is neither \"aes128_ctr\" nor \"chacha20\"");
                return Err(("aggregation.mask_suite", problem));
            }
        };
        let assumptions =
            Assumptions::new(self.corrupted_permille, self.dropout_permille, self.sigma, self.eta)
                .map_err(|error| ("aggregation", error.to_string()))?;
        Ok(SecurePlan { mask_suite, cohort_max: self.cohort_max, assumptions })
    }
}

impl Privacy {
    fn check(self) -> Result<Option<PrivacySpec>, Wrong> {
        if !self.enabled {
            return Ok(None);
        }
        let mechanism = match self.mechanism.as_str() {
            "skellam" => Mechanism::Skellam,
            "discrete_gaussian" => Mechanism::DiscreteGaussian,
            other => {
                let problem = format!("{other:?} is neither \"skellam\" nor \"discrete_gaussian\"");
                return Err(("privacy.mechanism", problem));
            }
        };
        let hours = self.separation_hours;
        if !(0.0..=100_000.0).contains(&hours) {
            return Err(("privacy.separation_hours", format!("{hours}: from 0 to 100000")));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
        let separation_ms = (hours * 3_600_000.0) as u64;
        Ok(Some(PrivacySpec {
            mechanism,
            noise: NoiseSpec::Epsilon(self.epsilon),
            delta: Delta::new(self.delta).map_err(|error| ("privacy.delta", error.to_string()))?,
            participations_max: self.participations_max,
            separation_ms,
            separation_rounds: self.separation_rounds,
            clip_units: (self.clip_units > 0).then_some(self.clip_units),
            adaptation: self.adaptation()?,
            narrowest_ring: self.narrowest_ring,
        }))
    }

    fn adaptation(&self) -> Result<Option<AdaptationTarget>, Wrong> {
        if !self.adaptive_clipping {
            return Ok(None);
        }
        let norm = |name, value| ClippingNorm::new(value).map_err(|error| (name, error.to_string()));
        let least = norm("privacy.clipping_norm_min", self.clipping_norm_min)?;
        let largest = norm("privacy.clipping_norm_max", self.clipping_norm_max)?;
        let (quantile, learning_rate) = (self.clip_quantile, self.clip_learning_rate);
        Ok(Some(AdaptationTarget { quantile, learning_rate, norms: (least, largest) }))
    }
}

impl Server {
    fn check(self) -> Result<ServerOptimizer, Wrong> {
        let Self { learning_rate, momentum, beta1, beta2, tau, .. } = self;
        let optimizer = match self.kind.as_str() {
            "fedavg" => ServerOptimizer::FedAvg { learning_rate },
            "fedavgm" => ServerOptimizer::FedAvgM { learning_rate, momentum },
            "fedadam" => ServerOptimizer::FedAdam { learning_rate, beta1, beta2, tau },
            other => {
                let problem = format!("{other:?} is none of \"fedavg\", \"fedavgm\", \"fedadam\"");
                return Err(("server_optimizer.kind", problem));
            }
        };
        optimizer.check().map_err(|error| ("server_optimizer", error.to_string()))?;
        Ok(optimizer)
    }
}
