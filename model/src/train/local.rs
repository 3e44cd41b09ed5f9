//! The local training loop: which blocks make a batch, which rule makes a step, and when to stop.
//! Gradients come from the trainer in `train.rs`.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::{TrainError, Trainer};
use crate::batch::{Batch, InputError};
use crate::optim::{AdamW, AdamWConfig, Sgd, clip_gradient_norm};

/// What one device does with its data in one round.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalTraining {
    /// Optimizer steps.
    pub steps: u32,
    /// Blocks in a step; fewer if there are not that many.
    pub batch_size: usize,
    /// Predictions in a block; a block has one id more.
    pub block_tokens: usize,
    /// The update rule.
    pub optimizer: OptimizerConfig,
    /// Its (highest) learning rate.
    pub learning_rate: f32,
    /// Longest gradient, if it is to be bounded.
    pub gradient_clip: Option<f32>,
    /// The learning rate's course over the steps.
    pub schedule: Schedule,
}

/// The update rule of local training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay.
    AdamW(AdamWConfig),
    /// Gradient descent.
    Sgd {
        /// Share of the velocity kept at each step; 0 is plain descent.
        momentum: f32,
    },
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::AdamW(AdamWConfig::default())
    }
}

/// The course of a learning rate.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Schedule {
    /// The same at every step.
    #[default]
    Constant,
    /// Linear from 0 over the warm-up, then half a cosine down to a fraction of the highest.
    WarmupCosine {
        /// Steps until the highest rate.
        warmup_steps: u32,
        /// The last rate over the highest.
        final_fraction: f32,
    },
}

impl Schedule {
    /// What the highest rate is multiplied by at `step` (from 0) of `steps`.
    #[must_use]
    pub fn factor(&self, step: u32, steps: u32) -> f32 {
        match *self {
            Self::Constant => 1.0,
            Self::WarmupCosine { warmup_steps, .. } if step < warmup_steps => {
                (step + 1) as f32 / warmup_steps as f32
            }
            Self::WarmupCosine { warmup_steps, final_fraction } => {
                let done = (step - warmup_steps) as f32 / steps.saturating_sub(warmup_steps).max(1) as f32;
                final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + (std::f32::consts::PI * done).cos())
            }
        }
    }
}

/// What local training did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainSummary {
    /// Loss of the first batch, before any update, in nats per token.
    pub first_loss: f32,
    /// Mean over the steps.
    pub mean_loss: f32,
    /// Loss of the last batch, before the last update.
    pub last_loss: f32,
    /// Predictions trained on.
    pub tokens: u64,
    /// Steps done.
    pub steps: u32,
}

/// Trains `values` in place on the blocks; `should_stop` is asked before every step.
///
/// # Errors
/// Those of [`TrainError`]; after one that names a step, `values` are as after the last whole step.
pub fn fine_tune(
    trainer: &mut dyn Trainer,
    values: &mut [f32],
    blocks: &[Vec<u32>],
    plan: &LocalTraining,
    seed: u64,
    should_stop: &mut dyn FnMut() -> bool,
) -> Result<TrainSummary, TrainError> {
    plan.check(blocks)?;
    let mut order = BatchOrder::new(blocks.len(), seed);
    let mut optimizer = Optimizer::new(plan.optimizer, values.len());
    let mut gradient = vec![0f32; values.len()];
    let mut losses = Losses::default();
    for step in 0..plan.steps {
        if should_stop() {
            return Err(TrainError::Cancelled { step });
        }
        let chosen: Vec<&[u32]> = order.take(plan.batch_size).map(|i| blocks[i].as_slice()).collect();
        let batch = Batch::from_blocks(&chosen)?;
        let loss = trainer.loss_and_gradient(values, &batch, &mut gradient)?;
        let norm = clip_gradient_norm(&mut gradient, plan.gradient_clip.unwrap_or(f32::INFINITY));
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(TrainError::NonFinite { step });
        }
        optimizer.step(values, &gradient, plan.learning_rate * plan.schedule.factor(step, plan.steps));
        losses.push(loss, batch.predicted());
    }
    Ok(losses.summary())
}

impl LocalTraining {
    fn check(&self, blocks: &[Vec<u32>]) -> Result<(), TrainError> {
        let at_least_1 = [
            ("steps", u64::from(self.steps)),
            ("batch_size", self.batch_size as u64),
            ("block_tokens", self.block_tokens as u64),
        ];
        if let Some((field, found)) = at_least_1.into_iter().find(|(_, n)| *n == 0) {
            return Err(TrainError::Plan { field, rule: "at least 1", found: found as f64 });
        }
        let positive =
            [("learning_rate", self.learning_rate), ("gradient_clip", self.gradient_clip.unwrap_or(1.0))];
        if let Some((field, found)) = positive.into_iter().find(|(_, x)| !(x.is_finite() && *x > 0.0)) {
            return Err(TrainError::Plan { field, rule: "finite and above 0", found: f64::from(found) });
        }
        if blocks.is_empty() {
            return Err(TrainError::NoData);
        }
        match blocks.iter().map(Vec::len).max() {
            Some(longest) if longest > self.block_tokens + 1 => {
                Err(InputError::TooLong { found: longest - 1, limit: self.block_tokens }.into())
            }
            _ => Ok(()),
        }
    }
}

enum Optimizer {
    AdamW(AdamW),
    Sgd(Sgd),
}

impl Optimizer {
    fn new(config: OptimizerConfig, len: usize) -> Self {
        match config {
            OptimizerConfig::AdamW(config) => Self::AdamW(AdamW::new(config, len)),
            OptimizerConfig::Sgd { momentum } => Self::Sgd(Sgd::new(momentum, len)),
        }
    }

    fn step(&mut self, values: &mut [f32], gradient: &[f32], learning_rate: f32) {
        match self {
            Self::AdamW(optimizer) => optimizer.step(values, gradient, learning_rate),
            Self::Sgd(optimizer) => optimizer.step(values, gradient, learning_rate),
        }
    }
}

/// Block indices in a seeded order, shuffled again whenever all were taken.
struct BatchOrder {
    rng: ChaCha8Rng,
    indices: Vec<usize>,
    next: usize,
}

impl BatchOrder {
    fn new(blocks: usize, seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), indices: (0..blocks).collect(), next: blocks }
    }

    fn take(&mut self, count: usize) -> impl Iterator<Item = usize> {
        let count = count.min(self.indices.len());
        (0..count).map(|_| self.pick())
    }

    fn pick(&mut self) -> usize {
        if self.next == self.indices.len() {
            self.shuffle();
            self.next = 0;
        }
        self.next += 1;
        self.indices[self.next - 1]
    }

    /// Fisher-Yates; the modulo's bias is below 2^-40 for any number of blocks a device holds.
    fn shuffle(&mut self) {
        for i in (1..self.indices.len()).rev() {
            let j = (self.rng.next_u64() % (i as u64 + 1)) as usize;
            self.indices.swap(i, j);
        }
    }
}

#[derive(Default)]
struct Losses {
    all: Vec<f32>,
    tokens: u64,
}

impl Losses {
    fn push(&mut self, loss: f32, tokens: usize) {
        self.all.push(loss);
        self.tokens += tokens as u64;
    }

    fn summary(&self) -> TrainSummary {
        let sum: f64 = self.all.iter().map(|x| f64::from(*x)).sum();
        TrainSummary {
            first_loss: self.all.first().copied().unwrap_or(f32::NAN),
            mean_loss: (sum / self.all.len() as f64) as f32,
            last_loss: self.all.last().copied().unwrap_or(f32::NAN),
            tokens: self.tokens,
            steps: self.all.len() as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::adapter::Adapter;
    use crate::config::Projection;
    use crate::fixtures::{base, blocks, layout};
    use crate::train::{LoraTrainer, Precision, TrainerOptions};

    fn plan() -> LocalTraining {
        LocalTraining {
            steps: 12,
            batch_size: 2,
            block_tokens: 24,
            optimizer: OptimizerConfig::default(),
            learning_rate: 0.02,
            gradient_clip: Some(1.0),
            schedule: Schedule::WarmupCosine { warmup_steps: 2, final_fraction: 0.1 },
        }
    }

    fn trainer(recompute: bool) -> (LoraTrainer, Vec<f32>) {
        let base = base();
        let layout = layout(&base.config, &[Projection::Q, Projection::V, Projection::Down], false);
        let values = Adapter::init(Arc::clone(&layout)).values;
        (
            LoraTrainer::new(base, layout, TrainerOptions { recompute, ..TrainerOptions::default() })
                .unwrap(),
            values,
        )
    }

    fn trained(seed: u64, recompute: bool) -> (Vec<f32>, TrainSummary) {
        let (mut trainer, mut values) = trainer(recompute);
        let blocks = blocks(&trainer.base().config, 5, 24);
        let summary = fine_tune(&mut trainer, &mut values, &blocks, &plan(), seed, &mut || false).unwrap();
        (values, summary)
    }

    #[test]
    fn training_learns_and_counts() {
        let (values, summary) = trained(1, false);
        assert!(summary.last_loss < summary.first_loss - 0.5, "{summary:?}");
        assert_eq!((summary.steps, summary.tokens), (12, 12 * 2 * 24));
        assert!(values.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn the_seed_alone_decides_the_bytes() {
        let (expected, _) = trained(1, false);
        let others: Vec<Vec<f32>> = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..4).map(|i| scope.spawn(move || trained(1, i % 2 == 1).0)).collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        assert!(others.iter().all(|values| *values == expected));
        assert_ne!(trained(2, false).0, expected);
    }

    /// Losses of 48 AdamW steps.
    fn curve(precision: Precision) -> Vec<f32> {
        let base = base();
        let layout = layout(&base.config, &Projection::ALL, false);
        let mut values = Adapter::init(Arc::clone(&layout)).values;
        let blocks = blocks(&base.config, 8, 24);
        let batches = blocks.chunks(4).map(|four| four.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let batches: Vec<Batch> = batches.map(|four| Batch::from_blocks(&four).unwrap()).collect();
        let options = TrainerOptions { precision, ..TrainerOptions::default() };
        let mut trainer = LoraTrainer::new(base, layout, options).unwrap();
        let mut optimizer = AdamW::new(AdamWConfig::default(), values.len());
        let mut gradient = vec![0f32; values.len()];
        let mut step = |step: usize| {
            let loss = trainer.loss_and_gradient(&values, &batches[step % 2], &mut gradient).unwrap();
            optimizer.step(&mut values, &gradient, 0.002);
            loss
        };
        (0..48).map(&mut step).collect()
    }

    #[test]
    fn bf16_products_learn_as_f32_ones_do() {
        let (expected, found) = (curve(Precision::F32), curve(Precision::Bf16));
        assert!(expected[47] < expected[1] - 0.2, "{expected:?}");
        let gaps: Vec<f32> = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).collect();
        assert!(gaps.iter().all(|gap| *gap < 0.01), "{gaps:?}");
        assert_eq!(expected != found, Precision::Bf16.kernel().is_some());
    }

    #[test]
    fn a_stopped_training_keeps_whole_steps() {
        let (mut trainer, mut values) = trainer(false);
        let blocks = blocks(&trainer.base().config, 2, 24);
        let mut asked = 0;
        let mut stop = || {
            asked += 1;
            asked > 3
        };
        let error = fine_tune(&mut trainer, &mut values, &blocks, &plan(), 1, &mut stop).unwrap_err();
        assert_eq!(error, TrainError::Cancelled { step: 3 });
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let (mut trainer, values) = trainer(false);
        let blocks = blocks(&trainer.base().config, 2, 24);
        let mut check = |change: fn(&mut LocalTraining), blocks: &[Vec<u32>], value: f32| {
            let mut plan = plan();
            change(&mut plan);
            let mut values = vec![value; values.len()];
            fine_tune(&mut trainer, &mut values, blocks, &plan, 1, &mut || false).unwrap_err()
        };
        assert_eq!(check(|_| (), &[], 0.1), TrainError::NoData);
        assert!(matches!(check(|p| p.steps = 0, &blocks, 0.1), TrainError::Plan { field: "steps", .. }));
        assert!(matches!(
            check(|p| p.learning_rate = f32::NAN, &blocks, 0.1),
            TrainError::Plan { field: "learning_rate", .. }
        ));
        assert_eq!(
            check(|p| p.block_tokens = 8, &blocks, 0.1),
            InputError::TooLong { found: 24, limit: 8 }.into()
        );
        assert!(matches!(
            check(|_| (), &[vec![1, 100_000]], 0.1),
            TrainError::Input(InputError::UnknownToken { .. })
        ));
        assert_eq!(check(|_| (), &blocks, f32::NAN), TrainError::NonFinite { step: 0 });
    }

    #[test]
    fn an_adapter_of_another_model_is_refused() {
        let base = base();
        let mut other = base.config.clone();
        other.feed_forward += 32;
        let layout = layout(&other, &[Projection::Q, Projection::Up], true);
        let error = LoraTrainer::new(base, layout, TrainerOptions::default()).unwrap_err();
        assert!(
            matches!(error, TrainError::Input(InputError::AdapterShape { layer: 0, projection: "up", .. })),
            "{error}"
        );
    }

    #[test]
    fn schedules_rise_and_fall() {
        let schedule = Schedule::WarmupCosine { warmup_steps: 4, final_fraction: 0.1 };
        assert_eq!(schedule.factor(0, 104), 0.25);
        assert_eq!(schedule.factor(3, 104), 1.0);
        assert!((schedule.factor(54, 104) - 0.55).abs() < 1e-6);
        assert!((schedule.factor(104, 104) - 0.1).abs() < 1e-6);
        assert_eq!(Schedule::Constant.factor(7, 8), 1.0);
    }

    #[test]
    fn every_block_comes_once_an_epoch() {
        let mut order = BatchOrder::new(7, 3);
        for _ in 0..3 {
            let mut epoch: Vec<usize> = (0..7).map(|_| order.pick()).collect();
            epoch.sort_unstable();
            assert_eq!(epoch, [0, 1, 2, 3, 4, 5, 6]);
        }
    }
}
