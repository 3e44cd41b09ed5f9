//! One micro-batch forward and backward on the calling thread, a layer at a time.
//!
//! Each layer and each slice of the head is a burn graph of its own: between two of them training can be given
//! up. A layer's graph holds what its backward pass needs; it is consumed from the last layer to the first.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use super::{copy_gradient, leaf};
use crate::base::BaseModel;
use crate::batch::Batch;
use crate::decoder::{LoraPlan, embed};
use crate::kernels::head::chunk_rows;
use crate::ops::{self, HeadSource, LayerSource, LossTargets};

/// A model whose adapter is trained, as burn operations.
#[derive(Debug)]
pub(super) struct Pass {
    pub(super) base: Arc<BaseModel>,
    pub(super) plan: Arc<LoraPlan>,
    pub(super) layers: Vec<Arc<dyn LayerSource>>,
    pub(super) head: Arc<dyn HeadSource>,
    pub(super) device: Device,
}

/// A layer that ran forward: two leaves and what was made of them.
struct Ran {
    x: Tensor<3>,
    theta: Tensor<1>,
    y: Tensor<3>,
}

/// Rows of the residual stream that have a target, `[rows, hidden]`, and their targets.
struct Rows<'a> {
    values: &'a [f32],
    targets: Vec<(usize, i32)>,
}

impl Pass {
    /// Summed negative log-likelihood over `denominator`; overwrites `gradient` with its gradient. `None` if
    /// `stop` said so, which is asked before each layer and each slice of the head.
    pub(super) fn gradient(
        &self,
        values: &[f32],
        batch: &Batch,
        denominator: f32,
        gradient: &mut [f32],
        stop: &mut dyn FnMut() -> bool,
    ) -> Option<f64> {
        let mut x = self.embeddings(batch);
        let mut ran = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            if stop() {
                return None;
            }
            let theta = leaf(&values[self.plan.values(index)], &self.device).require_grad();
            let y = ops::decoder_layer(x.clone(), theta.clone(), layer);
            let next = y.clone().detach().require_grad();
            ran.push(Ran { x, theta, y });
            x = next;
        }
        let (loss, mut dy) = self.head_gradient(x, batch, denominator, stop)?;
        while let Some(Ran { x, theta, y }) = ran.pop() {
            if stop() {
                return None;
            }
            let mut gradients = ops::upstream(y, dy).backward();
            copy_gradient(theta.grad_remove(&mut gradients), &mut gradient[self.plan.values(ran.len())]);
            dy = x.grad_remove(&mut gradients).map(values_of).unwrap_or_default();
        }
        Some(loss)
    }

    /// Summed negative log-likelihood over `denominator`.
    pub(super) fn loss(&self, values: &[f32], batch: &Batch, denominator: f32) -> f64 {
        let mut x = self.embeddings(batch);
        for (index, layer) in self.layers.iter().enumerate() {
            x = ops::decoder_layer(x, leaf(&values[self.plan.values(index)], &self.device), layer);
        }
        let targets = LossTargets { ids: batch.targets.clone(), denominator };
        let loss = ops::head_loss(x, leaf(&[0.0], &self.device), &self.head, targets);
        f64::from(loss.into_scalar::<f32>())
    }

    /// Does one layer's work on a made-up sequence, to see how long it takes.
    pub(super) fn try_layer(&self, length: usize) {
        let range = self.plan.values(0);
        let shape = [1, length, self.base.config.hidden];
        let made_up = vec![0.5f32; shape.iter().product()];
        let x = Tensor::<3>::from_data(TensorData::new(made_up.clone(), shape), &self.device).require_grad();
        let theta = leaf(&vec![0.01; range.len()], &self.device).require_grad();
        let y = ops::decoder_layer(x, theta, &self.layers[0]);
        drop(ops::upstream(y, made_up).backward());
    }

    fn embeddings(&self, batch: &Batch) -> Tensor<3> {
        let shape = [batch.sequences, batch.length, self.base.config.hidden];
        let mut values = vec![0f32; shape.iter().product()];
        embed(&self.base, &batch.inputs, &mut values);
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// Loss and the gradient of x. Rows without a target cost nothing.
    fn head_gradient(
        &self,
        x: Tensor<3>,
        batch: &Batch,
        denominator: f32,
        stop: &mut dyn FnMut() -> bool,
    ) -> Option<(f64, Vec<f32>)> {
        let values = values_of(x);
        let targets: Vec<(usize, i32)> =
            batch.targets.iter().copied().enumerate().filter(|(_, target)| *target >= 0).collect();
        let rows = Rows { values: &values, targets };
        let (mut loss, mut dx) = (0f64, vec![0f32; values.len()]);
        let step = chunk_rows(self.base.config.vocab_size);
        for first in (0..rows.targets.len()).step_by(step) {
            if stop() {
                return None;
            }
            let slice = first..(first + step).min(rows.targets.len());
            loss += self.head_slice(&rows, slice, denominator, &mut dx);
        }
        Some((loss, dx))
    }

    fn head_slice(&self, rows: &Rows<'_>, slice: Range<usize>, denominator: f32, dx: &mut [f32]) -> f64 {
        let (hidden, chosen) = (self.base.config.hidden, &rows.targets[slice]);
        let mut given: Vec<f32> = Vec::with_capacity(chosen.len() * hidden);
        chosen.iter().for_each(|(row, _)| given.extend(&rows.values[row * hidden..][..hidden]));
        let given = TensorData::new(given, [1, chosen.len(), hidden]);
        let x = Tensor::<3>::from_data(given, &self.device).require_grad();
        let targets = LossTargets { ids: chosen.iter().map(|(_, id)| *id).collect(), denominator };
        let loss = ops::head_loss(x.clone(), leaf(&[0.0], &self.device), &self.head, targets);
        let mut gradients = loss.backward();
        let found = x.grad_remove(&mut gradients).map(values_of).unwrap_or_default();
        for ((row, _), values) in chosen.iter().zip(found.chunks_exact(hidden)) {
            dx[row * hidden..][..hidden].copy_from_slice(values);
        }
        f64::from(loss.into_scalar::<f32>())
    }
}

/// Drops what graphs that were never consumed still hold: burn looks for them at the end of any other.
pub(super) fn forget_graphs(device: &Device) {
    drop(leaf(&[0.0], device).require_grad().sum().backward());
}

fn values_of(tensor: Tensor<3>) -> Vec<f32> {
    match tensor.into_data().try_into_vec::<f32>() {
        Ok(values) => values,
        Err(error) => unreachable!("flex tensors are f32: {error:?}"),
    }
}
