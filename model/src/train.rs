//! LoRA training on one device: gradients through the burn operations. The local training loop is in
//! `train/local.rs`; it works within the budgets of `train/budget.rs` and `train/pace.rs`.
//!
//! A batch is computed in micro-batches (`train/micro.rs`), each on one thread (`train/threads.rs`), a layer at
//! a time (`train/pass.rs`). How it is cut decides the last bits of the gradient; the number of threads does
//! not. The batches, and so the result, follow from the seed alone.

pub mod budget;
pub(crate) mod local;
mod micro;
mod pace;
mod pass;
mod threads;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::AdapterLayout;
use crate::base::BaseModel;
use crate::batch::{Batch, InputError};
use crate::decoder::{AdaptedLayer, FrozenHead, LoraPlan, rope_tables};
use crate::kernels::scratch;
use crate::ops::LayerSource;
use budget::{Fit, SessionShape};
use pass::Pass;
use threads::Shard;

pub use crate::kernels::bf16::Precision;
pub use local::{LocalTraining, OptimizerConfig, Schedule, TrainSummary, fine_tune};
pub use watch::{Clocked, Watch};

/// Training that could not start or go on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TrainError {
    /// Ids or vectors the model cannot take.
    #[error(transparent)]
    Input(#[from] InputError),
    /// There are no blocks to train on.
    #[error("no training data")]
    NoData,
    /// A number of the plan is out of its range.
    #[error("training plan: {field} must be {rule}, found {found}")]
    Plan {
        /// The plan's field.
        field: &'static str,
        /// What it must be.
        rule: &'static str,
        /// What it is.
        found: f64,
    },
    /// Training needs more memory than it may take, however it is cut; nothing was computed.
    #[error("training needs {} MB of memory at the least, the budget is {} MB", megabytes(*.needed_bytes), megabytes(*.budget_bytes))]
    OverMemory {
        /// The least it was predicted to need.
        needed_bytes: u64,
        /// What it may take.
        budget_bytes: u64,
    },
    /// Training takes longer than it may.
    #[error("{steps} training steps need {:.1} s, the budget is {:.1} s", needed.as_secs_f64(), budget.as_secs_f64())]
    OverTime {
        /// The steps that had to fit.
        steps: u32,
        /// The time they were predicted to take.
        needed: Duration,
        /// What they may take.
        budget: Duration,
    },
    /// There is a time budget, and the caller's [`Watch`] has no clock.
    #[error("a time budget needs a clock")]
    NoClock,
    /// The loss or the gradient is no finite number; the values are those before the step.
    #[error("loss or gradient is not finite at step {step}")]
    NonFinite {
        /// The step, from 0.
        step: u32,
    },
    /// The caller asked to stop; the values are those of the last whole step.
    #[error("cancelled after {step} steps")]
    Cancelled {
        /// Whole steps done.
        step: u32,
    },
    /// The device that computes failed; the values are those before the step.
    #[error("device: {reason}")]
    Device {
        /// What its driver says.
        reason: String,
    },
}

/// How a trainer computes, and within which bounds: the device's choice, not the plan's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainerOptions {
    /// Whether layers run again in the backward pass.
    pub recompute: Recompute,
    /// Number format of the factors of the products with the frozen weights and of attention; LoRA's own products
    /// are f32. [`Precision::Bf16`] takes about half the time where AVX512-BF16 is, and is the same bits as
    /// [`Precision::F32`] elsewhere: runs that must repeat bit for bit on any machine stay with F32.
    pub precision: Precision,
    /// Most micro-batches that are computed at once, each on a thread of its own; 0 counts as 1. The gradients
    /// are the same bits for any number.
    pub threads: usize,
    /// Bytes that a session may take, the model's weights included, by the prediction of
    /// [`budget::memory_need`].
    pub memory_bytes: Option<u64>,
    /// Time that a session may take.
    pub time: Option<TimeBudget>,
}

impl Default for TrainerOptions {
    /// f32 on one thread without budgets.
    fn default() -> Self {
        Self {
            recompute: Recompute::Auto,
            precision: Precision::F32,
            threads: 1,
            memory_bytes: None,
            time: None,
        }
    }
}

/// Whether each layer runs again in the backward pass instead of keeping its activations: less than half their
/// memory for a third more time. The gradients are the same bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Where the memory budget asks for it.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

/// Time that a session may take by the caller's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeBudget {
    /// From the first step's start to the last one's end.
    pub limit: Duration,
    /// What happens when the plan's steps do not fit.
    pub when_short: WhenShort,
}

/// What happens when the plan's steps do not fit into the time budget.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenShort {
    /// As many steps are done as fit, at least one; the summary says how many. Their learning rates are those of
    /// the plan's first steps.
    #[default]
    FewerSteps,
    /// Training is refused as soon as that is foreseen.
    Refuse,
}

/// What the local training loop needs of a model: the gradient of a batch's loss by one flat vector of values.
pub trait Trainer: std::fmt::Debug {
    /// Mean negative log-likelihood (nats) of the batch's targets; overwrites `gradient` with its gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or a slice does not fit the model or its layout.
    fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError>;

    /// The same, given up when `watch` asks for it.
    ///
    /// # Errors
    /// As [`Trainer::loss_and_gradient`]; [`TrainError::Cancelled`] with step 0 when asked to stop.
    fn watched_loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
        watch: &mut dyn Watch,
    ) -> Result<f32, TrainError> {
        let loss = self.loss_and_gradient(values, batch, gradient)?;
        watch.progressed(1.0);
        Ok(loss)
    }

    /// Chooses how sessions of that plan are computed from now on.
    ///
    /// # Errors
    /// [`TrainError::OverMemory`] when nothing fits the memory budget.
    fn prepare(&mut self, plan: &LocalTraining) -> Result<Fit, TrainError> {
        Ok(Fit::whole(plan))
    }

    /// The time that a session may take.
    fn time_budget(&self) -> Option<TimeBudget> {
        None
    }

    /// Seconds that one step of that plan will take, from a short trial by the watch's clock and the count of
    /// its operations; `None` without a clock or a trial.
    fn probe(&mut self, plan: &LocalTraining, watch: &mut dyn Watch) -> Option<f64> {
        let _ = (plan, watch);
        None
    }
}

/// Computes losses and gradients of an adapter over a frozen base.
#[derive(Debug)]
pub struct LoraTrainer {
    base: Arc<BaseModel>,
    layout: Arc<AdapterLayout>,
    options: TrainerOptions,
    fit: Fit,
    pass: Pass,
    shards: Vec<Shard>,
    /// Positions that the layers' rope table covers.
    positions: usize,
}

impl LoraTrainer {
    /// A trainer for adapters of that layout.
    ///
    /// # Errors
    /// [`InputError::AdapterShape`] if the layout is for a model of another shape.
    pub fn new(
        base: Arc<BaseModel>,
        layout: Arc<AdapterLayout>,
        options: TrainerOptions,
    ) -> Result<Self, TrainError> {
        let plan = Arc::new(LoraPlan::new(&layout, &base.config)?);
        let head = Arc::new(FrozenHead { base: Arc::clone(&base), precision: options.precision });
        let device = Device::flex().autodiff();
        let pass = Pass { base: Arc::clone(&base), plan, layers: Vec::new(), head, device };
        let fit = Fit::unbounded(&base.config, &options);
        Ok(Self { base, layout, options, fit, pass, shards: Vec::new(), positions: 0 })
    }

    /// The layout of the values this trainer takes.
    #[must_use]
    pub fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// The frozen base.
    #[must_use]
    pub fn base(&self) -> &Arc<BaseModel> {
        &self.base
    }

    /// Mean negative log-likelihood (nats) of the batch's targets; overwrites `gradient` with its gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or a slice does not fit the model or the layout.
    pub fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        self.watched_loss_and_gradient(values, batch, gradient, &mut || false)
    }

    /// Mean negative log-likelihood (nats) of the batch's targets.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or the values do not fit the model or the layout.
    pub fn loss(&mut self, values: &[f32], batch: &Batch) -> Result<f32, TrainError> {
        self.check(values, batch)?;
        let denominator = batch.predicted() as f32;
        let parts = micro::micro_batches(batch, self.fit.micro_tokens);
        let sum: f64 = parts.iter().map(|part| self.pass.loss(values, part, denominator)).sum();
        Ok(sum as f32)
    }

    fn check(&mut self, values: &[f32], batch: &Batch) -> Result<(), TrainError> {
        check_len("adapter values", self.layout.len(), values.len())?;
        batch.check(self.base.config.vocab_size, self.base.config.context_length)?;
        self.cover(batch.length);
        Ok(())
    }

    /// Makes the layers ready for sequences of that length.
    fn cover(&mut self, positions: usize) {
        if positions > self.positions {
            self.positions = positions;
            self.make_layers();
        }
    }

    fn make_layers(&mut self) {
        let ropes = rope_tables(&self.base.config, 0, self.positions);
        let layer = |index: usize| -> Arc<dyn LayerSource> {
            Arc::new(AdaptedLayer {
                base: Arc::clone(&self.base),
                plan: Arc::clone(&self.pass.plan),
                rope: Arc::clone(&ropes[index]),
                index,
                recompute: self.fit.recompute,
                precision: self.options.precision,
            })
        };
        self.pass.layers = (0..self.base.config.layers).map(layer).collect();
    }

    fn take_on(&mut self, fit: Fit) {
        let remake = fit.recompute != self.fit.recompute;
        self.fit = fit;
        if remake {
            self.make_layers();
        }
    }

    /// Who else holds a layer: graphs that were not consumed would.
    #[cfg(test)]
    pub(crate) fn layer_references(&self) -> usize {
        self.pass.layers.iter().map(Arc::strong_count).max().unwrap_or(0)
    }

    fn shape<'a>(&'a self, plan: &'a LocalTraining) -> SessionShape<'a> {
        SessionShape {
            model: &self.base.config,
            weights: budget::weight_memory(&self.base),
            layout: &self.layout,
            optimizer: plan.optimizer,
            precision: self.options.precision,
        }
    }
}

impl Trainer for LoraTrainer {
    fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        Self::loss_and_gradient(self, values, batch, gradient)
    }

    fn watched_loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
        watch: &mut dyn Watch,
    ) -> Result<f32, TrainError> {
        self.check(values, batch)?;
        check_len("gradient", self.layout.len(), gradient.len())?;
        let parts = micro::micro_batches(batch, self.fit.micro_tokens);
        let step = threads::Step { values, parts: &parts, denominator: batch.predicted() as f32 };
        let loss =
            threads::gradient(&self.pass, &step, (self.fit.threads, &mut self.shards), gradient, watch);
        match loss {
            Some(loss) => Ok(loss as f32),
            None => {
                pass::forget_graphs(&self.pass.device);
                Err(TrainError::Cancelled { step: 0 })
            }
        }
    }

    fn prepare(&mut self, plan: &LocalTraining) -> Result<Fit, TrainError> {
        let fit = Fit::new(&self.shape(plan), plan, &self.options)?;
        self.take_on(fit);
        Ok(fit)
    }

    fn time_budget(&self) -> Option<TimeBudget> {
        self.options.time
    }

    /// One sequence through the first layer, forward and backward, the second time that it is done.
    fn probe(&mut self, plan: &LocalTraining, watch: &mut dyn Watch) -> Option<f64> {
        let length = self.fit.block_tokens.min(self.fit.micro_tokens).min(self.base.config.context_length);
        self.cover(length);
        let mut seconds = 0.0;
        for _ in 0..2 {
            let before = watch.now()?;
            self.pass.try_layer(length);
            seconds = (watch.now()?.saturating_sub(before)).as_secs_f64();
        }
        let config = &self.base.config;
        let sequence = budget::sequence_operations(config, self.fit.block_tokens, self.fit.recompute);
        let tried = budget::layer_operations(config, length, self.fit.recompute);
        let sequences = (plan.batch_size * plan.block_tokens).div_ceil(self.fit.block_tokens) as f64;
        let at_once = (self.fit.threads as f64).min(sequences);
        Some(seconds / tried * sequence * sequences / at_once)
    }
}

impl Drop for LoraTrainer {
    /// A phone wants its memory back when training ends.
    fn drop(&mut self) {
        scratch::release_pool();
    }
}

/// A one-dimensional tensor of those values.
pub(crate) fn leaf(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

/// Bytes in millions, rounded up.
fn megabytes(bytes: u64) -> u64 {
    bytes.div_ceil(1_000_000)
}

/// Copies a leaf's gradient; every leaf of our graphs has one.
pub(crate) fn copy_gradient(gradient: Option<Tensor<1>>, out: &mut [f32]) {
    let Some(gradient) = gradient else { return out.fill(0.0) };
    let data = gradient.into_data();
    match data.as_slice::<f32>() {
        Ok(values) => out.copy_from_slice(values),
        Err(error) => unreachable!("flex gradients are f32: {error:?}"),
    }
}

/// Refuses a vector of another length.
pub(crate) fn check_len(what: &'static str, expected: usize, found: usize) -> Result<(), InputError> {
    if expected == found { Ok(()) } else { Err(InputError::WrongLength { what, expected, found }) }
}
