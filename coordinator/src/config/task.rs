//! One `[[task]]` table, checked once into the values that the core takes.

use super::{ConfigError, parse_name, setting};
use crate::{ServerOptimizer, TaskSpec};
use fleetune_model::{adapter::LoraConfig, config::Projection};
use fleetune_privacy::ClippingNorm;
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
    rounds: u32,
    expires_days: u32,
    release_valid_days: u32,
    adapter: Adapter,
    training: Training,
    aggregation: Aggregation,
    round: Round,
    server_optimizer: Server,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Adapter {
    rank: usize,
    alpha: f32,
    targets: Vec<String>,
    freeze_a: bool,
    init_seed: u64,
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
            lora: self.adapter.check().map_err(wrong)?,
            training: self.training.check().map_err(wrong)?,
            aggregation: self.aggregation.check().map_err(wrong)?,
            rounds: self.rounds,
            round_policy,
            server_optimizer: self.server_optimizer.check().map_err(wrong)?,
            expires: UnixMillis(0),
            release_valid_ms: u64::from(self.release_valid_days) * DAY_MS,
        };
        Ok(TaskConfig {
            base_model: folder.join(self.base_model),
            expires_days: self.expires_days,
            without_expiry,
        })
    }
}

type Wrong = (&'static str, String);

impl Adapter {
    fn check(self) -> Result<LoraConfig, Wrong> {
        let parse = |name: &String| {
            Projection::from_name(name)
                .ok_or_else(|| ("adapter.targets", format!("{name:?} is no projection")))
        };
        let targets = self.targets.iter().map(parse).collect::<Result<_, _>>()?;
        let Self { rank, alpha, freeze_a, init_seed, .. } = self;
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
