//! Local training as a device does it: from a verified order, a checkpoint and blocks to one raw update.
//!
//! Knows no file, clock or network. The simulator trains with this type too, so its updates are the
//! devices', byte for byte. Clipping and encoding come after it, in the protocol's device machine.

use std::sync::Arc;

use fleetune_model::adapter::LoraConfig;
use fleetune_model::base::BaseModel;
use fleetune_model::config::Projection;
use fleetune_model::optim::AdamWConfig;
use fleetune_model::train::{
    LocalTraining, OptimizerConfig, Schedule, TrainError, TrainSummary, Trainer, TrainerOptions, Watch,
    fine_tune,
};
use fleetune_model::trained::{TrainedConfig, TrainedLayout};
use fleetune_proto::device::{TrainOrder, TrainingFailure};
use fleetune_proto::{AdapterPlan, LoraShape, Optimizer, TaskPlan, TrainedShape, TrainingPlan};
use sha2::{Digest, Sha256};

/// What one local training gives: the update that leaves the device only clipped and encoded, and
/// figures that stay.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalUpdate {
    /// Final minus initial values, in the order of the plan's layout.
    pub delta: Vec<f32>,
    /// How training went. Derived from private data.
    pub summary: TrainSummary,
}

/// Trains what one plan says, an adapter or all weights, from one base. Without budgets the result follows from the
/// inputs and the precision alone; a memory budget may change its last bits, a time budget the number of steps.
#[derive(Debug)]
pub struct LocalTrainer {
    layout: TrainedLayout,
    training: LocalTraining,
    examples_min: usize,
    trainer: Box<dyn Trainer>,
}

impl LocalTrainer {
    /// A trainer for what the plan trains of `base`.
    ///
    /// # Errors
    /// [`TrainingFailure::PlanRejected`] when the base is not the plan's, or the layout, its dimension
    /// or the block length is not what the plan says it is.
    pub fn new(base: Arc<BaseModel>, plan: &TaskPlan) -> Result<Self, TrainingFailure> {
        Self::with_options(base, plan, TrainerOptions::default())
    }

    /// [`LocalTrainer::new`] with the device's choices: precision, threads, recomputation, budgets.
    ///
    /// # Errors
    /// As [`LocalTrainer::new`].
    pub fn with_options(
        base: Arc<BaseModel>,
        plan: &TaskPlan,
        options: TrainerOptions,
    ) -> Result<Self, TrainingFailure> {
        check_base(&base, plan)?;
        let layout = planned_layout(&base, &plan.adapter)?;
        let trainer = layout.trainer(&base, options).map_err(|e| rejected(&e))?;
        let examples_min = plan.training.examples_min.max(1) as usize;
        Ok(Self { layout, training: local_training(&plan.training), examples_min, trainer })
    }

    /// Trains from `checkpoint` (its bytes) on `blocks` of token ids. `watch` is asked whether to stop before every
    /// optimizer step and within it.
    ///
    /// # Errors
    /// [`TrainingFailure::PlanRejected`] for a checkpoint of another layout, `InsufficientData` for fewer
    /// blocks than the plan wants, `Interrupted` when asked to stop, `OverBudget` when memory or time do not
    /// suffice, `Failed` when training diverges.
    pub fn run(
        &mut self,
        order: &TrainOrder,
        checkpoint: &[u8],
        blocks: &[Vec<u32>],
        device_seed: &[u8; 32],
        watch: &mut dyn Watch,
    ) -> Result<LocalUpdate, TrainingFailure> {
        if blocks.len() < self.examples_min {
            return Err(TrainingFailure::InsufficientData { held: blocks.len(), needed: self.examples_min });
        }
        let start = self.layout.values_from_checkpoint(checkpoint).map_err(|e| rejected(&e))?;
        let mut values = start.clone();
        let seed = batch_seed(device_seed, order);
        let learning_rate = order.plan.training.learning_rate_at(order.round, order.plan.rounds);
        let training = LocalTraining { learning_rate, ..self.training.clone() };
        let summary = fine_tune(self.trainer.as_mut(), &mut values, blocks, &training, seed, watch)
            .map_err(|error| self.failure(&error))?;
        values.iter_mut().zip(&start).for_each(|(value, start)| *value -= start);
        Ok(LocalUpdate { delta: values, summary })
    }

    /// The layout of what is trained.
    #[must_use]
    pub fn layout(&self) -> &TrainedLayout {
        &self.layout
    }

    fn failure(&self, error: &TrainError) -> TrainingFailure {
        match error {
            TrainError::Cancelled { .. } => TrainingFailure::Interrupted(error.to_string()),
            TrainError::NoData => TrainingFailure::InsufficientData { held: 0, needed: self.examples_min },
            TrainError::Plan { .. } => rejected(error),
            TrainError::OverMemory { .. } | TrainError::OverTime { .. } => {
                TrainingFailure::OverBudget(error.to_string())
            }
            TrainError::Input(_)
            | TrainError::NonFinite { .. }
            | TrainError::Device { .. }
            | TrainError::NoClock => TrainingFailure::Failed(error.to_string()),
        }
    }
}

/// What the plan trains.
///
/// # Errors
/// [`TrainingFailure::PlanRejected`] for a projection this build does not know.
pub fn trained_config(plan: &AdapterPlan) -> Result<TrainedConfig, TrainingFailure> {
    match &plan.shape {
        TrainedShape::Lora(shape) => lora_config(shape).map(TrainedConfig::Lora),
        TrainedShape::Full => Ok(TrainedConfig::Full),
    }
}

fn lora_config(plan: &LoraShape) -> Result<LoraConfig, TrainingFailure> {
    let target = |name: &String| {
        let unknown = || TrainingFailure::PlanRejected(format!("unknown projection {name:?}"));
        Projection::from_name(name).ok_or_else(unknown)
    };
    Ok(LoraConfig {
        rank: plan.rank as usize,
        alpha: plan.alpha,
        targets: plan.targets.iter().map(target).collect::<Result<_, _>>()?,
        freeze_a: plan.freeze_a,
        init_seed: plan.init_seed,
    })
}

/// The plan's local training, with the first round's learning rate; it is constant within a round and
/// falls over the rounds ([`TrainingPlan::learning_rate_at`]).
#[must_use]
pub fn local_training(plan: &TrainingPlan) -> LocalTraining {
    let optimizer = match plan.optimizer {
        Optimizer::AdamW { beta1, beta2, epsilon, weight_decay } => {
            OptimizerConfig::AdamW(AdamWConfig { beta1, beta2, eps: epsilon, weight_decay })
        }
        Optimizer::Sgd { momentum } => OptimizerConfig::Sgd { momentum },
    };
    LocalTraining {
        steps: plan.steps,
        batch_size: plan.batch_size as usize,
        block_tokens: plan.block_tokens as usize,
        optimizer,
        learning_rate: plan.learning_rate,
        gradient_clip: plan.gradient_clip,
        schedule: Schedule::Constant,
    }
}

/// Seed of the batch order: one device draws other batches each round, and the same ones when it must
/// repeat an attempt.
fn batch_seed(device_seed: &[u8; 32], order: &TrainOrder) -> u64 {
    let mut hash = Sha256::new();
    hash.update(b"fleetune local training\0");
    hash.update(device_seed);
    hash.update(order.plan.task.as_str());
    hash.update(order.round.to_le_bytes());
    let digest: [u8; 32] = hash.finalize().into();
    u64::from_le_bytes(std::array::from_fn(|i| digest[i]))
}

fn check_base(base: &BaseModel, plan: &TaskPlan) -> Result<(), TrainingFailure> {
    if base.sha256 != plan.base_model.sha256 {
        let found = hex::encode(base.sha256);
        return Err(TrainingFailure::PlanRejected(format!(
            "for base {}, this one is {found}",
            plan.base_model
        )));
    }
    let (planned, context) = (plan.training.block_tokens as usize, base.config.context_length);
    if planned > context {
        return Err(TrainingFailure::PlanRejected(format!(
            "blocks of {planned} tokens, a context of {context}"
        )));
    }
    Ok(())
}

fn planned_layout(base: &BaseModel, plan: &AdapterPlan) -> Result<TrainedLayout, TrainingFailure> {
    let layout = TrainedLayout::new(base, &trained_config(plan)?).map_err(|e| rejected(&e))?;
    if layout.len() != plan.dimension {
        let problem = format!("a vector of {} values, its layout has {}", plan.dimension, layout.len());
        return Err(TrainingFailure::PlanRejected(problem));
    }
    if layout.sha256() != plan.layout_sha256 {
        return Err(TrainingFailure::PlanRejected("the layout has another hash here".to_owned()));
    }
    Ok(layout)
}

fn rejected(error: &dyn std::error::Error) -> TrainingFailure {
    TrainingFailure::PlanRejected(error.to_string())
}

#[cfg(test)]
mod tests;
