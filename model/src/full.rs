//! Full training of a small model with a tied output: every weight is a value of one flat vector, laid out in
//! `full/layout.rs`.
//!
//! The batch is split over threads by whole sequences; their gradients are summed in a fixed order, so that
//! the result is the same at each run with the same number of threads.

mod layout;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::base::BaseModel;
use crate::batch::{Batch, InputError};
use crate::config::{ModelConfig, Projection};
use crate::decoder::{Rest, heads, rope_tables, weight_gradient};
use crate::error::ModelError;
use crate::kernels::activation::add;
use crate::kernels::bf16::Precision;
use crate::kernels::extras::Extras;
use crate::kernels::head::{Head, HeadGradients};
use crate::kernels::layer::Layer;
use crate::kernels::layer_backward::LayerGradients;
use crate::kernels::linear::{Linear, Weight};
use crate::kernels::norm::Norm;
use crate::kernels::rope::RopeTable;
use crate::kernels::scratch::{self, Pool};
use crate::ops::{self, HeadSource, LayerSource, LossTargets};
use crate::tokenizer::Tokenizer;
use crate::train::{TrainError, Trainer, check_len, copy_gradient, leaf};
use crate::weights::WeightFormat;

pub use layout::{FULL_VALUES_MAX, FullLayout};

/// Standard deviation of the first weights, as in GPT-2.
const INITIAL_DEVIATION: f64 = 0.02;

/// A layer and a head of which everything is trained.
#[derive(Debug)]
struct TrainedSource {
    layout: Arc<FullLayout>,
    rope: Arc<RopeTable>,
    precision: Precision,
}

impl LayerSource for TrainedSource {
    fn layer<'a>(&'a self, theta: &'a [f32]) -> Layer<'a> {
        let (config, parts) = (self.layout.config(), self.layout.parts());
        let norm = |range: &Range<usize>| Norm { gain: &theta[range.clone()], eps: config.rms_eps };
        Layer {
            heads: heads(config, 0),
            rope: &self.rope,
            attn_norm: norm(&parts.attn_norm),
            ffn_norm: norm(&parts.ffn_norm),
            extras: Extras::default(),
            projections: Projection::ALL.map(|p| {
                let (rows, cols) = p.shape(config);
                let values = &theta[parts.projections[p as usize].clone()];
                Linear {
                    weight: Weight::Trained { values, rows, cols },
                    lora: None,
                    precision: self.precision,
                }
            }),
        }
    }

    fn gradients<'a>(&self, dtheta: &'a mut [f32]) -> LayerGradients<'a> {
        let parts = self.layout.parts();
        let mut rest = Rest { values: dtheta, taken: 0 };
        LayerGradients {
            attn_norm: Some(rest.take(&parts.attn_norm)),
            ffn_norm: Some(rest.take(&parts.ffn_norm)),
            projections: parts.projections.map(|range| weight_gradient(rest.take(&range))),
        }
    }

    fn recompute(&self) -> bool {
        false
    }
}

impl HeadSource for TrainedSource {
    fn head<'a>(&'a self, theta: &'a [f32]) -> Head<'a> {
        let config = self.layout.config();
        let values = &theta[self.layout.embedding()];
        Head {
            norm: Norm { gain: &theta[self.layout.output_norm()], eps: config.rms_eps },
            output: Weight::Trained { values, rows: config.vocab_size, cols: config.hidden },
            precision: self.precision,
        }
    }

    fn gradients<'a>(&self, dtheta: &'a mut [f32]) -> HeadGradients<'a> {
        let mut rest = Rest { values: dtheta, taken: 0 };
        let output = Some(rest.take(&self.layout.embedding()));
        HeadGradients { dx: None, output, gain: Some(rest.take(&self.layout.output_norm())) }
    }
}

/// One thread's gradient and the memory it works in.
#[derive(Debug, Default)]
struct Shard {
    gradient: Vec<f32>,
    pool: Pool,
    loss: f32,
}

/// Computes losses and gradients of all weights of a small model.
#[derive(Debug)]
pub struct FullTrainer {
    source: Arc<TrainedSource>,
    /// Of the longest batch so far.
    positions: usize,
    shards: Vec<Shard>,
    device: Device,
}

impl FullTrainer {
    /// A trainer that splits batches over `threads` threads and multiplies in f32.
    ///
    /// # Errors
    /// [`ModelError::Config`] if the sizes contradict each other, [`ModelError::Unsupported`] for a family but Llama.
    pub fn new(config: ModelConfig, threads: usize) -> Result<Self, ModelError> {
        Self::with_precision(config, threads, Precision::F32)
    }

    /// The same with another number format of the factors of products; values, gradients and sums stay f32.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_precision(
        config: ModelConfig,
        threads: usize,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        Ok(Self::of_layout(Arc::new(FullLayout::new(config)?), threads, precision))
    }

    /// A trainer of the values of that layout.
    #[must_use]
    pub fn of_layout(layout: Arc<FullLayout>, threads: usize, precision: Precision) -> Self {
        let rope = Arc::clone(&rope_tables(layout.config(), 0, 0)[0]);
        let shards = (0..threads.max(1)).map(|_| Shard::default()).collect();
        let device = Device::flex().autodiff();
        Self { source: Arc::new(TrainedSource { layout, rope, precision }), positions: 0, shards, device }
    }

    /// The model's sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.source.layout.config()
    }

    /// Values in the flat vector.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.source.layout.len()
    }

    /// First values: gains 1, weights normal with deviation 0.02, those that end a residual branch divided by
    /// `sqrt(2 * layers)` (GPT-2).
    #[must_use]
    pub fn initial_parameters(&self, seed: u64) -> Vec<f32> {
        let (layout, parts) = (&self.source.layout, self.source.layout.parts());
        let mut normal = Normal { rng: ChaCha8Rng::seed_from_u64(seed), spare: None };
        let mut values = vec![1f32; layout.len()];
        normal.fill(&mut values[layout.embedding()], INITIAL_DEVIATION);
        for index in 0..layout.config().layers {
            let layer = &mut values[layout.layer(index)];
            for p in Projection::ALL {
                let ends_branch = matches!(p, Projection::O | Projection::Down);
                let divisor = if ends_branch { (2.0 * layout.config().layers as f64).sqrt() } else { 1.0 };
                normal.fill(&mut layer[parts.projections[p as usize].clone()], INITIAL_DEVIATION / divisor);
            }
        }
        values
    }

    /// Mean negative log-likelihood (nats) of the batch's targets; overwrites `gradient` with its gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or a slice does not fit the model.
    pub fn loss_and_gradient(
        &mut self,
        parameters: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        self.check(parameters, batch)?;
        check_len("gradient", parameters.len(), gradient.len())?;
        let denominator = batch.predicted() as f32;
        let (source, device) = (&self.source, &self.device);
        let parts = split(batch.sequences, self.shards.len());
        let (own, others) = self.shards.split_at_mut(1);
        std::thread::scope(|scope| {
            for (shard, range) in others.iter_mut().zip(parts[1..].iter().cloned()) {
                scope.spawn(move || shard.run(source, parameters, &batch.slice(range), denominator, device));
            }
            own[0].loss = shard_gradient(
                source,
                parameters,
                &batch.slice(parts[0].clone()),
                denominator,
                device,
                gradient,
            );
        });
        for shard in &others[..parts.len() - 1] {
            add(gradient, &shard.gradient);
        }
        Ok(self.shards[..parts.len()].iter().map(|s| s.loss).sum())
    }

    /// Mean negative log-likelihood (nats) of the batch's targets, on the same threads.
    ///
    /// # Errors
    /// [`TrainError::Input`] if the batch or the parameters do not fit the model.
    pub fn loss(&mut self, parameters: &[f32], batch: &Batch) -> Result<f32, TrainError> {
        self.check(parameters, batch)?;
        let denominator = batch.predicted() as f32;
        let source = &self.source;
        let parts = split(batch.sequences, self.shards.len());
        std::thread::scope(|scope| {
            for (shard, range) in self.shards.iter_mut().zip(parts.iter().cloned()) {
                scope.spawn(move || {
                    shard.loss = shard_loss(source, parameters, &batch.slice(range), denominator)
                });
            }
        });
        Ok(self.shards[..parts.len()].iter().map(|s| s.loss).sum())
    }

    /// The trained model with its matrices in `format`; norms stay f32.
    ///
    /// # Errors
    /// [`ModelError`] if a value is not finite, the format does not fit a width, or the tokenizer's vocabulary
    /// is not the model's.
    pub fn to_base(
        &self,
        parameters: &[f32],
        tokenizer: Tokenizer,
        format: WeightFormat,
    ) -> Result<BaseModel, ModelError> {
        self.source.layout.to_base(parameters, tokenizer, None, format)
    }

    fn check(&mut self, parameters: &[f32], batch: &Batch) -> Result<(), InputError> {
        check_len("parameters", self.parameter_count(), parameters.len())?;
        batch.check(self.config().vocab_size, self.config().context_length)?;
        if batch.length > self.positions {
            let layout = Arc::clone(&self.source.layout);
            let rope = Arc::clone(&rope_tables(layout.config(), 0, batch.length)[0]);
            self.source = Arc::new(TrainedSource { layout, rope, precision: self.source.precision });
            self.positions = batch.length;
        }
        Ok(())
    }
}

impl Trainer for FullTrainer {
    fn loss_and_gradient(
        &mut self,
        values: &[f32],
        batch: &Batch,
        gradient: &mut [f32],
    ) -> Result<f32, TrainError> {
        Self::loss_and_gradient(self, values, batch, gradient)
    }
}

impl Drop for FullTrainer {
    /// A phone wants its memory back when training ends.
    fn drop(&mut self) {
        scratch::release_pool();
    }
}

impl Shard {
    /// On a thread of its own, which inherits the memory of the step before.
    fn run(
        &mut self,
        source: &Arc<TrainedSource>,
        parameters: &[f32],
        batch: &Batch,
        denominator: f32,
        device: &Device,
    ) {
        self.gradient.resize(parameters.len(), 0.0);
        scratch::exchange_pool(std::mem::take(&mut self.pool));
        self.loss = shard_gradient(source, parameters, batch, denominator, device, &mut self.gradient);
        self.pool = scratch::exchange_pool(Pool::default());
    }
}

/// Contiguous ranges of sequences, none empty, at most `shards` of them.
fn split(sequences: usize, shards: usize) -> Vec<Range<usize>> {
    let shards = shards.min(sequences);
    (0..shards).map(|i| i * sequences / shards..(i + 1) * sequences / shards).collect()
}

fn shard_gradient(
    source: &Arc<TrainedSource>,
    parameters: &[f32],
    batch: &Batch,
    denominator: f32,
    device: &Device,
    gradient: &mut [f32],
) -> f32 {
    let layout = &source.layout;
    let outer = leaf(&parameters[layout.outer()], device).require_grad();
    let shape = [batch.sequences, batch.length, layout.config().hidden];
    let mut x = ops::embedding(outer.clone(), batch.inputs.clone(), shape);
    let mut thetas: Vec<Tensor<1>> = Vec::with_capacity(layout.config().layers);
    let layer: Arc<dyn LayerSource> = Arc::<TrainedSource>::clone(source);
    for index in 0..layout.config().layers {
        let theta = leaf(&parameters[layout.layer(index)], device).require_grad();
        x = ops::decoder_layer(x, theta.clone(), &layer);
        thetas.push(theta);
    }
    let head: Arc<dyn HeadSource> = Arc::<TrainedSource>::clone(source);
    let targets = LossTargets { ids: batch.targets.clone(), denominator };
    let loss = ops::head_loss(x, outer.clone(), &head, targets);
    let mut gradients = loss.backward();
    copy_gradient(outer.grad_remove(&mut gradients), &mut gradient[layout.outer()]);
    for (index, theta) in thetas.iter().enumerate() {
        copy_gradient(theta.grad_remove(&mut gradients), &mut gradient[layout.layer(index)]);
    }
    loss.into_scalar::<f32>()
}

fn shard_loss(source: &TrainedSource, parameters: &[f32], batch: &Batch, denominator: f32) -> f32 {
    let layout = &source.layout;
    let hidden = layout.config().hidden;
    let table = &parameters[layout.embedding()];
    let rows = batch.inputs.iter().flat_map(|id| &table[*id as usize * hidden..][..hidden]);
    let mut x: Vec<f32> = rows.copied().collect();
    let mut y = vec![0f32; x.len()];
    for index in 0..layout.config().layers {
        LayerSource::layer(source, &parameters[layout.layer(index)]).forward(&x, batch.length, Some(&mut y));
        std::mem::swap(&mut x, &mut y);
    }
    let targets = crate::kernels::head::Targets { ids: &batch.targets, denominator };
    source.head(&parameters[layout.outer()]).loss(&x, targets)
}

/// Normally distributed numbers by the Box-Muller transform.
struct Normal {
    rng: ChaCha8Rng,
    spare: Option<f64>,
}

impl Normal {
    fn fill(&mut self, out: &mut [f32], deviation: f64) {
        out.iter_mut().for_each(|x| *x = (self.draw() * deviation) as f32);
    }

    fn draw(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u, v) = (self.uniform(), self.uniform());
        let radius = (-2.0 * u.ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// In (0, 1], from 53 bits.
    fn uniform(&mut self) -> f64 {
        ((self.rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}
