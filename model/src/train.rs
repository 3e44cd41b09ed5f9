//! LoRA training on one device: gradients through the burn operations. The local training loop is in
//! `train/local.rs`.
//!
//! One trainer uses one thread. The batches, and so the result, follow from the seed alone.

mod local;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use crate::adapter::AdapterLayout;
use crate::base::BaseModel;
use crate::batch::{Batch, InputError};
use crate::decoder::{AdaptedLayer, FrozenHead, LoraPlan, embed, rope_table};
use crate::kernels::rope::RopeTable;
use crate::kernels::scratch;
use crate::ops::{self, HeadSource, LayerSource, LossTargets};

pub use crate::kernels::bf16::Precision;
pub use local::{LocalTraining, OptimizerConfig, Schedule, TrainSummary, fine_tune};

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
}

/// How a trainer computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainerOptions {
    /// Run each layer again in the backward pass instead of keeping its activations: less than half the memory
    /// for a third more time. The gradients are the same bits.
    pub recompute: bool,
    /// Number format of the factors of the products with the frozen weights and of attention; LoRA's own products
    /// are f32. [`Precision::Bf16`] takes about half the time where AVX512-BF16 is, and is the same bits as
    /// [`Precision::F32`] elsewhere: runs that must repeat bit for bit on any machine stay with F32.
    pub precision: Precision,
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
}

/// Computes losses and gradients of an adapter over a frozen base.
#[derive(Debug)]
pub struct LoraTrainer {
    base: Arc<BaseModel>,
    layout: Arc<AdapterLayout>,
    plan: Arc<LoraPlan>,
    options: TrainerOptions,
    head: Arc<dyn HeadSource>,
    /// For the longest batch so far.
    layers: Vec<Arc<dyn LayerSource>>,
    positions: usize,
    device: Device,
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
        Ok(Self { base, layout, plan, options, head, layers: Vec::new(), positions: 0, device })
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
        self.check(values, batch)?;
        check_len("gradient", self.layout.len(), gradient.len())?;
        let thetas: Vec<Tensor<1>> = self.thetas(values).map(Tensor::require_grad).collect();
        let loss = self.graph(&thetas, batch);
        let mut gradients = loss.backward();
        for (index, theta) in thetas.iter().enumerate() {
            let out = &mut gradient[self.plan.values(index)];
            copy_gradient(theta.grad_remove(&mut gradients), out);
        }
        Ok(loss.into_scalar::<f32>())
    }

    /// Mean negative log-likelihood (nats) of the batch's targets.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or the values do not fit the model or the layout.
    pub fn loss(&mut self, values: &[f32], batch: &Batch) -> Result<f32, TrainError> {
        self.check(values, batch)?;
        let thetas: Vec<Tensor<1>> = self.thetas(values).collect();
        Ok(self.graph(&thetas, batch).into_scalar::<f32>())
    }

    fn check(&mut self, values: &[f32], batch: &Batch) -> Result<(), TrainError> {
        check_len("adapter values", self.layout.len(), values.len())?;
        batch.check(self.base.config.vocab_size, self.base.config.context_length)?;
        if batch.length > self.positions {
            self.grow(batch.length);
        }
        Ok(())
    }

    fn grow(&mut self, positions: usize) {
        let rope: Arc<RopeTable> = Arc::new(rope_table(&self.base.config, positions));
        let layer = |index| -> Arc<dyn LayerSource> {
            Arc::new(AdaptedLayer {
                base: Arc::clone(&self.base),
                plan: Arc::clone(&self.plan),
                rope: Arc::clone(&rope),
                index,
                recompute: self.options.recompute,
                precision: self.options.precision,
            })
        };
        self.layers = (0..self.base.config.layers).map(layer).collect();
        self.positions = positions;
    }

    /// Each layer's slice of the values as a tensor.
    fn thetas(&self, values: &[f32]) -> impl Iterator<Item = Tensor<1>> {
        (0..self.layers.len()).map(|index| leaf(&values[self.plan.values(index)], &self.device))
    }

    fn graph(&self, thetas: &[Tensor<1>], batch: &Batch) -> Tensor<1> {
        let shape = [batch.sequences, batch.length, self.base.config.hidden];
        let mut embeddings = vec![0f32; shape.iter().product()];
        embed(&self.base, &batch.inputs, &mut embeddings);
        let mut x = Tensor::<3>::from_data(TensorData::new(embeddings, shape), &self.device);
        for (layer, theta) in self.layers.iter().zip(thetas) {
            x = ops::decoder_layer(x, theta.clone(), layer);
        }
        let targets = LossTargets { ids: batch.targets.clone(), denominator: batch.predicted() as f32 };
        ops::head_loss(x, leaf(&[0.0], &self.device), &self.head, targets)
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
