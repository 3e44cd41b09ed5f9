//! LoRA training out of stock burn operations: slower than `train.rs` and hungrier, but on any device that burn has.
//! The decoder is in `stock.rs`.
//!
//! It takes the same flat vector as [`crate::train::LoraTrainer`], gives the same gradients but for rounding, and
//! goes through the same [`crate::train::fine_tune`].
//!
//! **Memory.** The frozen projections and the output matrix are dequantized once and lie on the device in f32: four
//! bytes a weight, whatever the file holds ([`GenericTrainer::weight_bytes`]). The token embedding is looked up on
//! the host, so a separate one costs the device nothing. Beside them lie the activations of all layers, or with
//! [`GenericOptions::recompute`] of one layer, and the logits of a few rows at a time. A matrix must fit into one
//! buffer of the device (the output is cut into blocks of at most 128 MiB).

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Gradients, Tensor};

use crate::adapter::{AdapterLayout, Factor};
use crate::base::BaseModel;
use crate::batch::{Batch, InputError};
use crate::config::{ModelConfig, Projection};
use crate::decoder::{check_shapes, embed};
use crate::family::Family;
use crate::stock::{LayerFactors, LowRank, Positions, StockModel, tensor};
use crate::train::{TrainError, Trainer, check_len};

pub use burn::tensor::Device;

/// Logits that exist at once, of however many rows of the batch that makes; their gradient and what autodiff keeps
/// of them come to about four times as much.
const LOGITS_MAX: usize = 1 << 23;

/// Values of a matrix that the 32-bit indices of a shader reach.
const MATRIX_VALUES_MAX: usize = 1 << 31;

/// A trainer that could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GenericError {
    /// The adapter is for a model of another shape.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The model asks for what the stock operations do not compute.
    #[error("model {model}: {feature} is not supported by the generic engine")]
    Unsupported {
        /// The model's name.
        model: String,
        /// What it asks for.
        feature: &'static str,
    },
}

/// How a generic trainer computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GenericOptions {
    /// Run each layer again in the backward pass instead of keeping its activations.
    pub recompute: bool,
}

/// The processor, by burn's own CPU backend.
#[must_use]
pub fn flex() -> Device {
    Device::flex()
}

/// Computes losses and gradients of an adapter over a frozen base, on a device of burn's.
#[derive(Debug)]
pub struct GenericTrainer {
    base: Arc<BaseModel>,
    layout: Arc<AdapterLayout>,
    options: GenericOptions,
    /// Without autodiff: only what depends on a trained value is tracked.
    device: Device,
    model: StockModel,
    /// A of every adapted projection, if it is not trained.
    frozen_a: Vec<[Option<Tensor<2>>; 7]>,
    /// For batches of the last one's length.
    positions: Option<Positions>,
    logits_max: usize,
}

impl GenericTrainer {
    /// A trainer for adapters of that layout; copies the weights to the device.
    ///
    /// # Errors
    /// [`GenericError::Input`] if the layout is for a model of another shape, [`GenericError::Unsupported`] for a
    /// model that the stock operations cannot compute.
    pub fn new(
        base: Arc<BaseModel>,
        layout: Arc<AdapterLayout>,
        device: &Device,
        options: GenericOptions,
    ) -> Result<Self, GenericError> {
        check_supported(&base.config)?;
        check_shapes(&layout, &base.config)?;
        let device = device.clone().without_autodiff();
        let model = StockModel::new(&base, &device);
        let frozen_a = (0..base.config.layers).map(|layer| frozen_a(&layout, layer, &device)).collect();
        Ok(Self { base, layout, options, device, model, frozen_a, positions: None, logits_max: LOGITS_MAX })
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

    /// Bytes that the frozen weights take on the device.
    #[must_use]
    pub fn weight_bytes(config: &ModelConfig) -> u64 {
        4 * config.parameter_count()
    }

    /// Mean negative log-likelihood (nats) of the batch's targets; overwrites `gradient` with its gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or a slice does not fit the model or the layout, [`TrainError::Device`] if
    /// the device fails.
    pub fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        check_len("gradient", self.layout.len(), gradient.len())?;
        let positions = self.prepared(values, batch)?;
        let embedded = self.embedded(batch);
        let (loss, parts) = if self.options.recompute {
            self.layer_by_layer(values, embedded, batch, &positions)
        } else {
            self.in_one_graph(values, embedded, batch, &positions)
        };
        self.positions = Some(positions);
        gradient.copy_from_slice(&read(Tensor::cat(parts, 0))?);
        Ok(read(loss)?[0])
    }

    /// Mean negative log-likelihood (nats) of the batch's targets.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or the values do not fit the model or the layout, [`TrainError::Device`] if
    /// the device fails.
    pub fn loss(&mut self, values: &[f32], batch: &Batch) -> Result<f32, TrainError> {
        let positions = self.prepared(values, batch)?;
        let mut x = self.embedded(batch);
        for layer in 0..self.base.config.layers {
            x = self.model.layer(layer, &self.factors(layer, values), x, &positions);
        }
        self.positions = Some(positions);
        let parts = self.head_rows(batch).map(|(rows, targets)| {
            let x = x.clone().slice([rows]);
            self.model.cross_entropy(x, targets, batch.predicted() as f32)
        });
        Ok(read(Tensor::cat(parts.collect(), 0).sum())?[0])
    }

    /// Checks what came in; the positions for that batch.
    fn prepared(&mut self, values: &[f32], batch: &Batch) -> Result<Positions, TrainError> {
        check_len("adapter values", self.layout.len(), values.len())?;
        batch.check(self.base.config.vocab_size, self.base.config.context_length)?;
        Ok(match self.positions.take() {
            Some(positions) if positions.length == batch.length => positions,
            _ => Positions::new(&self.base.config, batch.length, &self.device),
        })
    }

    fn embedded(&self, batch: &Batch) -> Tensor<2> {
        let shape = [batch.inputs.len(), self.base.config.hidden];
        let mut values = vec![0f32; shape[0] * shape[1]];
        embed(&self.base, &batch.inputs, &mut values);
        tensor(values, shape, &self.device)
    }

    /// One graph over all layers. The loss and the gradients in the order of the flat vector.
    fn in_one_graph(
        &self,
        values: &[f32],
        mut x: Tensor<2>,
        batch: &Batch,
        positions: &Positions,
    ) -> (Tensor<1>, Vec<Tensor<1>>) {
        let mut leaves = Vec::new();
        for layer in 0..self.base.config.layers {
            let factors = self.tracked(&self.factors(layer, values));
            x = self.model.layer(layer, &factors, x, positions);
            leaves.push(factors);
        }
        let (loss, dx) = self.head(&x.clone().without_autodiff(), batch);
        let mut gradients = (x * dx).sum().backward();
        (loss, leaves.iter().flat_map(|factors| self.gradients_of(factors, &mut gradients)).collect())
    }

    /// A graph a layer, made in the backward pass and dropped before the next. The loss and the gradients in the order
    /// of the flat vector.
    fn layer_by_layer(
        &self,
        values: &[f32],
        x: Tensor<2>,
        batch: &Batch,
        positions: &Positions,
    ) -> (Tensor<1>, Vec<Tensor<1>>) {
        let layers: Vec<LayerFactors> =
            (0..self.base.config.layers).map(|layer| self.factors(layer, values)).collect();
        let mut inputs = Vec::new();
        let mut y = x;
        for (index, factors) in layers.iter().enumerate() {
            inputs.push(y.clone());
            y = self.model.layer(index, factors, y, positions);
        }
        let (loss, mut dy) = self.head(&y, batch);
        let mut parts = Vec::new();
        for (index, (factors, x)) in layers.iter().zip(inputs).enumerate().rev() {
            let (factors, x) = (self.tracked(factors), x.autodiff().require_grad());
            let y = self.model.layer(index, &factors, x.clone(), positions);
            let mut gradients = (y * dy).sum().backward();
            parts.push(self.gradients_of(&factors, &mut gradients));
            dy = gradient_of(&x, &mut gradients);
        }
        (loss, parts.into_iter().rev().flatten().collect())
    }

    /// The loss and its gradient by x, the head's input, a few rows at a time: each part has a graph of its own, so
    /// that the logits of all rows never exist together.
    fn head(&self, x: &Tensor<2>, batch: &Batch) -> (Tensor<1>, Tensor<2>) {
        let parts = self.head_rows(batch).map(|(rows, targets)| {
            let leaf = x.clone().slice([rows]).autodiff().require_grad();
            let loss = self.model.cross_entropy(leaf.clone(), targets, batch.predicted() as f32);
            let mut gradients = loss.backward();
            (loss.without_autodiff(), gradient_of(&leaf, &mut gradients))
        });
        let (losses, gradients): (Vec<Tensor<1>>, Vec<Tensor<2>>) = parts.unzip();
        (Tensor::cat(losses, 0).sum(), Tensor::cat(gradients, 0))
    }

    /// The batch's rows in parts of nearly one size with no more logits than allowed, each with its targets.
    fn head_rows<'a>(&self, batch: &'a Batch) -> impl Iterator<Item = (Range<usize>, &'a [i32])> + use<'a> {
        let tokens = batch.targets.len();
        let most = (self.logits_max / self.base.config.vocab_size).max(1);
        let size = tokens.div_ceil(tokens.div_ceil(most));
        let parts = batch.targets.chunks(size).enumerate();
        parts.map(move |(i, targets)| (i * size..i * size + targets.len(), targets))
    }

    /// One layer's factors on the device, untracked.
    fn factors(&self, layer: usize, values: &[f32]) -> LayerFactors {
        let config = self.layout.config();
        Projection::ALL.map(|projection| {
            let (out, inputs) = projection.shape(&self.base.config);
            let copied = |factor, shape| {
                let range = self.layout.find(layer, projection, factor)?;
                Some(tensor(values[range].to_vec(), shape, &self.device))
            };
            let b = copied(Factor::B, [out, config.rank])?;
            let frozen = || self.frozen_a[layer][projection as usize].clone();
            let a = copied(Factor::A, [config.rank, inputs]).or_else(frozen)?;
            Some(LowRank { a, b, scale: config.scale() })
        })
    }

    /// The same factors as leaves of a graph.
    fn tracked(&self, factors: &LayerFactors) -> LayerFactors {
        let leaf = |t: &Tensor<2>| t.clone().autodiff().require_grad();
        factors.each_ref().map(|factors| {
            let LowRank { a, b, scale } = factors.as_ref()?;
            let a = if self.layout.config().freeze_a { a.clone() } else { leaf(a) };
            Some(LowRank { a, b: leaf(b), scale: *scale })
        })
    }

    /// The gradients of one layer's trained factors in the order of the flat vector.
    fn gradients_of(&self, factors: &LayerFactors, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        let freeze_a = self.layout.config().freeze_a;
        let pairs =
            factors.iter().flatten().flat_map(|LowRank { a, b, .. }| [(!freeze_a).then_some(a), Some(b)]);
        pairs.flatten().map(|leaf| gradient_of(leaf, gradients).flatten(0, 1)).collect()
    }
}

impl Trainer for GenericTrainer {
    fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        Self::loss_and_gradient(self, values, batch, gradient)
    }
}

/// Refuses what `stock.rs` does not compute.
fn check_supported(config: &ModelConfig) -> Result<(), GenericError> {
    // Every field by name: a new one does not compile until `stock.rs` computes it or it is refused here.
    let ModelConfig {
        name,
        family,
        vocab_size,
        hidden,
        layers: _,
        feed_forward: _,
        heads: _,
        kv_heads: _,
        head_dim: _,
        context_length: _,
        rope_base: _,
        rms_eps: _,
    } = config;
    let shapes = Projection::ALL.map(|projection| projection.shape(config));
    let largest = shapes.into_iter().chain([(*vocab_size, *hidden)]).map(|(out, inputs)| out * inputs).max();
    let refused = [
        ("layers of another family than Llama's", *family != Family::Llama),
        ("a matrix of more than 2^31 values", largest > Some(MATRIX_VALUES_MAX)),
    ];
    match refused.into_iter().find(|(_, asked)| *asked) {
        Some((feature, _)) => Err(GenericError::Unsupported { model: name.clone(), feature }),
        None => Ok(()),
    }
}

fn frozen_a(layout: &AdapterLayout, layer: usize, device: &Device) -> [Option<Tensor<2>>; 7] {
    Projection::ALL.map(|projection| {
        layout.find(layer, projection, Factor::B)?;
        if layout.find(layer, projection, Factor::A).is_some() {
            return None;
        }
        let (values, rank) = (layout.frozen_a(layer, projection), layout.config().rank);
        let inputs = values.len() / rank;
        Some(tensor(values, [rank, inputs], device))
    })
}

/// A leaf's gradient; one that the loss does not depend on has none, which is zero.
fn gradient_of(leaf: &Tensor<2>, gradients: &mut Gradients) -> Tensor<2> {
    leaf.grad_remove(gradients).unwrap_or_else(|| leaf.clone().without_autodiff().zeros_like())
}

fn read(tensor: Tensor<1>) -> Result<Vec<f32>, TrainError> {
    let data = tensor.try_into_data_as::<f32>().map_err(failed)?;
    data.try_to_vec().map_err(failed)
}

fn failed(error: impl std::fmt::Debug) -> TrainError {
    TrainError::Device { reason: format!("{error:?}") }
}

#[cfg(test)]
mod tests;
