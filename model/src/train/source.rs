//! What a training loop takes its gradients from.

use super::{LoraTrainer, TrainError};
use crate::batch::Batch;

/// A trainer as the local training loop sees it.
pub trait GradientSource {
    /// Mean negative log-likelihood (nats) of the batch's targets; overwrites `gradient` with its gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or a slice does not fit the model or the layout, [`TrainError::Device`] if
    /// the device it runs on fails.
    fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError>;
}

impl GradientSource for LoraTrainer {
    fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        Self::loss_and_gradient(self, values, batch, gradient)
    }
}
