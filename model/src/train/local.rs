//! The local training loop: which blocks make a batch, which rule makes a step, and when to stop.
//! Gradients come from a trainer (`train.rs`, `generic.rs`).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::budget::Fit;
use super::pace::Pace;
use super::{TrainError, Trainer, Watch};
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
    /// Steps done: the plan's, or fewer where a time budget allows it.
    pub steps: u32,
    /// How batches were computed; blocks were cut shorter than the plan's where this says so.
    pub fit: Fit,
}

/// Trains `values` in place on the blocks, within the trainer's budgets; `watch` is asked whether to stop before
/// every step, and within it by trainers that can.
///
/// # Errors
/// Those of [`TrainError`]; whichever it is, `values` are as after the last whole step.
pub fn fine_tune(
    trainer: &mut dyn Trainer,
    values: &mut [f32],
    blocks: &[Vec<u32>],
    plan: &LocalTraining,
    seed: u64,
    watch: &mut dyn Watch,
) -> Result<TrainSummary, TrainError> {
    plan.check(blocks)?;
    let fit = trainer.prepare(plan)?;
    let mut pace = Pace::new(watch, trainer.time_budget(), plan.steps)?;
    if trainer.time_budget().is_some() {
        let step_seconds = trainer.probe(plan, &mut pace);
        pace.foresee(step_seconds)?;
    }
    let mut order = BatchOrder::new(blocks.len(), seed);
    let mut optimizer = Optimizer::new(plan.optimizer, values.len());
    let mut gradient = vec![0f32; values.len()];
    let mut losses = Losses::default();
    for step in 0..plan.steps {
        if !pace.may_step()? {
            break;
        }
        let chosen = order.take(plan.batch_size).map(|i| blocks[i].as_slice());
        let pieces: Vec<&[u32]> = chosen.flat_map(|block| cut(block, fit.block_tokens)).collect();
        let batch = Batch::from_blocks(&pieces)?;
        let loss = match trainer.watched_loss_and_gradient(values, &batch, &mut gradient, &mut pace) {
            Err(TrainError::Cancelled { .. }) => {
                pace.given_up()?;
                break;
            }
            found => found?,
        };
        let norm = clip_gradient_norm(&mut gradient, plan.gradient_clip.unwrap_or(f32::INFINITY));
        if !(loss.is_finite() && norm.is_finite()) {
            return Err(TrainError::NonFinite { step });
        }
        optimizer.step(values, &gradient, plan.learning_rate * plan.schedule.factor(step, plan.steps));
        losses.push(loss, batch.predicted());
        pace.stepped();
    }
    Ok(losses.summary(fit))
}

/// The block in pieces of at most `tokens` predictions; each id but the first is predicted once.
fn cut(block: &[u32], tokens: usize) -> impl Iterator<Item = &[u32]> {
    let predictions = block.len().saturating_sub(1);
    let last = move |first: usize| first.saturating_add(tokens).saturating_add(1).min(block.len());
    (0..predictions.max(1)).step_by(tokens).map(move |first| &block[first..last(first)])
}

impl LocalTraining {
    fn check(&self, blocks: &[Vec<u32>]) -> Result<(), TrainError> {
        self.check_numbers()?;
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

    /// Refuses numbers out of range.
    pub(crate) fn check_numbers(&self) -> Result<(), TrainError> {
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
        match positive.into_iter().find(|(_, x)| !(x.is_finite() && *x > 0.0)) {
            Some((field, found)) => {
                Err(TrainError::Plan { field, rule: "finite and above 0", found: f64::from(found) })
            }
            None => Ok(()),
        }
    }
}

pub(crate) enum Optimizer {
    AdamW(AdamW),
    Sgd(Sgd),
}

impl Optimizer {
    pub(crate) fn new(config: OptimizerConfig, len: usize) -> Self {
        match config {
            OptimizerConfig::AdamW(config) => Self::AdamW(AdamW::new(config, len)),
            OptimizerConfig::Sgd { momentum } => Self::Sgd(Sgd::new(momentum, len)),
        }
    }

    pub(crate) fn step(&mut self, values: &mut [f32], gradient: &[f32], learning_rate: f32) {
        match self {
            Self::AdamW(optimizer) => optimizer.step(values, gradient, learning_rate),
            Self::Sgd(optimizer) => optimizer.step(values, gradient, learning_rate),
        }
    }
}

/// Block indices in a seeded order, shuffled again whenever all were taken.
pub(crate) struct BatchOrder {
    rng: ChaCha8Rng,
    indices: Vec<usize>,
    next: usize,
}

impl BatchOrder {
    pub(crate) fn new(blocks: usize, seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), indices: (0..blocks).collect(), next: blocks }
    }

    pub(crate) fn take(&mut self, count: usize) -> impl Iterator<Item = usize> {
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
pub(crate) struct Losses {
    all: Vec<f32>,
    tokens: u64,
}

impl Losses {
    pub(crate) fn push(&mut self, loss: f32, tokens: usize) {
        self.all.push(loss);
        self.tokens += tokens as u64;
    }

    pub(crate) fn summary(&self, fit: Fit) -> TrainSummary {
        let sum: f64 = self.all.iter().map(|x| f64::from(*x)).sum();
        TrainSummary {
            first_loss: self.all.first().copied().unwrap_or(f32::NAN),
            mean_loss: (sum / self.all.len() as f64) as f32,
            last_loss: self.all.last().copied().unwrap_or(f32::NAN),
            tokens: self.tokens,
            steps: self.all.len() as u32,
            fit,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::adapter::Adapter;
    use crate::config::Projection;
    use crate::fixtures::{base, blocks, layout};
    use crate::train::{LoraTrainer, Precision, Recompute, TimeBudget, TrainerOptions, WhenShort};

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
            LoraTrainer::new(
                base,
                layout,
                TrainerOptions {
                    recompute: if recompute { Recompute::Always } else { Recompute::Never },
                    ..TrainerOptions::default()
                },
            )
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

    /// A base of 2 layers asks 2 times forward, once for the head, 2 times backward, and once before each step.
    #[test]
    fn a_training_stopped_anywhere_keeps_whole_steps_and_the_trainer_goes_on() {
        let (mut trainer, start) = trainer(false);
        let blocks = blocks(&trainer.base().config, 2, 24);
        let mut run = |steps: u32, asks: u32| {
            let (mut values, mut asked) = (start.clone(), 0);
            let mut stop = || {
                asked += 1;
                asked > asks
            };
            let plan = LocalTraining { steps, schedule: Schedule::Constant, ..plan() };
            let found = fine_tune(&mut trainer, &mut values, &blocks, &plan, 1, &mut stop);
            assert!(asked <= asks + 1, "nothing is asked after a yes");
            (found, values)
        };
        for (asks, whole) in [(0, 0), (1, 0), (3, 0), (5, 0), (6, 1), (7, 1), (11, 1), (12, 2), (14, 2)] {
            let (found, values) = run(9, asks);
            assert_eq!(found.unwrap_err(), TrainError::Cancelled { step: whole }, "after {asks}");
            let expected = if whole == 0 { start.clone() } else { run(whole, u32::MAX - 1).1 };
            assert_eq!(values, expected, "after {asks}");
        }
    }

    /// What a step that was given up held is given back.
    #[test]
    fn nothing_is_left_of_a_step_that_was_given_up() {
        let (mut trainer, mut values) = trainer(false);
        let blocks = blocks(&trainer.base().config, 2, 24);
        let before = Arc::strong_count(trainer.base());
        for asks in 1..6 {
            let mut asked = 0;
            let mut stop = || {
                asked += 1;
                asked > asks
            };
            fine_tune(&mut trainer, &mut values, &blocks, &plan(), 1, &mut stop).unwrap_err();
            assert_eq!(trainer.layer_references(), 1, "no graph holds a layer");
        }
        assert!(Arc::strong_count(trainer.base()) <= before + trainer.base().config.layers);
    }

    /// A clock that goes on by a fixed time at each look.
    fn timed(limit_ms: u64, when_short: WhenShort) -> (Result<TrainSummary, TrainError>, Vec<f32>) {
        let (fresh, mut values) = trainer(false);
        let time = Some(TimeBudget { limit: Duration::from_millis(limit_ms), when_short });
        let options = TrainerOptions { time, ..TrainerOptions::default() };
        let mut trainer =
            LoraTrainer::new(Arc::clone(fresh.base()), Arc::clone(fresh.layout()), options).unwrap();
        let blocks = blocks(&trainer.base().config, 5, 24);
        let mut looks = 0;
        let now = || {
            looks += 1;
            Duration::from_millis(looks)
        };
        let mut watch = crate::train::Clocked { should_stop: || false, now };
        (fine_tune(&mut trainer, &mut values, &blocks, &plan(), 1, &mut watch), values)
    }

    #[test]
    fn a_time_budget_gives_fewer_steps_or_a_refusal() {
        let (whole, all) = timed(1_000_000, WhenShort::FewerSteps);
        assert_eq!((whole.unwrap().steps, &all), (12, &trained(1, false).0));
        let (fewer, _) = timed(60, WhenShort::FewerSteps);
        let steps = fewer.unwrap().steps;
        assert!((1..12).contains(&steps), "{steps}");
        for (limit, when_short) in [(60, WhenShort::Refuse), (3, WhenShort::FewerSteps)] {
            let (refused, values) = timed(limit, when_short);
            let error = refused.unwrap_err();
            assert!(matches!(error, TrainError::OverTime { .. }), "{error}");
            assert!(values.iter().all(|x| x.is_finite()));
        }
        assert_eq!(timed(1_000_000, WhenShort::Refuse).0.unwrap().steps, 12);
    }

    #[test]
    fn a_time_budget_needs_a_clock() {
        let (fresh, mut values) = trainer(false);
        let time = Some(TimeBudget { limit: Duration::from_secs(9), when_short: WhenShort::Refuse });
        let options = TrainerOptions { time, ..TrainerOptions::default() };
        let mut trainer =
            LoraTrainer::new(Arc::clone(fresh.base()), Arc::clone(fresh.layout()), options).unwrap();
        let blocks = blocks(&trainer.base().config, 2, 24);
        let found = fine_tune(&mut trainer, &mut values, &blocks, &plan(), 1, &mut || false);
        assert_eq!(found, Err(TrainError::NoClock));
    }

    #[test]
    fn shorter_blocks_predict_the_same_ids() {
        let block: Vec<u32> = (0..12).collect();
        let predicted: Vec<u32> = cut(&block, 4).flat_map(|piece| piece[1..].to_vec()).collect();
        assert_eq!(predicted, block[1..]);
        assert!(cut(&block, 4).all(|piece| piece.len() <= 5));
        assert_eq!(cut(&block, 11).count(), 1);
        assert_eq!(cut(&block, usize::MAX).collect::<Vec<_>>(), [&block[..]]);
        assert_eq!(cut(&block[..1], 4).count(), 1, "too short a block is left for the batch to refuse");
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
