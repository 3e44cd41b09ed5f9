//! What federated training is held against: central training on all users' text for the same
//! number of tokens, and devices that train alone.

use crate::{
    experiment::Experiment,
    fleet::training_seed,
    pool::{Pending, Pool},
    report::{CentralPoint, LocalOnlyDevice},
    scenario::Scenario,
};
use anyhow::{Context, Result};
use fleetune_client::training::local_training;
use fleetune_model::{
    batch::Batch,
    eval::{Evaluation, evaluate},
    optim::{AdamW, AdamWConfig, clip_gradient_norm},
    train::{LocalTraining, Schedule, Trainer, TrainerOptions, fine_tune},
    trained::TrainedModel,
};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Points of central training's curve.
const CURVE_POINTS: u32 = 8;

/// Scores of a model on both groups.
#[derive(Debug, Clone, Copy)]
pub struct BothGroups {
    /// Seen users' test text.
    pub seen: Evaluation,
    /// Held-out users.
    pub heldout: Evaluation,
}

/// Central training, done.
pub struct CentralOutcome {
    /// At the end.
    pub scores: BothGroups,
    /// On the way.
    pub curve: Vec<CentralPoint>,
    /// Tokens trained on.
    pub tokens: u64,
    /// The trained values.
    pub values: Vec<f32>,
}

/// Evaluates trained values (the base without any) on both groups, as one job.
pub fn evaluate_both(pool: &Pool, experiment: &Experiment, values: Option<Vec<f32>>) -> Pending<BothGroups> {
    let (base, layout) = (Arc::clone(&experiment.base), experiment.layout.clone());
    let blocks = (Arc::clone(&experiment.eval_blocks), Arc::clone(&experiment.heldout_blocks));
    pool.submit(move |_| {
        let model = match values {
            Some(values) => layout.model(&base, values)?,
            None => TrainedModel { base, adapter: None },
        };
        both(&model, &blocks.0, &blocks.1)
    })
}

fn both(model: &TrainedModel, seen: &[Vec<u32>], heldout: &[Vec<u32>]) -> Result<BothGroups> {
    Ok(BothGroups { seen: score(model, seen)?, heldout: score(model, heldout)? })
}

fn score(model: &TrainedModel, blocks: &[Vec<u32>]) -> Result<Evaluation> {
    Ok(evaluate(&model.base, model.adapter.as_ref(), blocks)?)
}

/// Central training on the pooled blocks of all users, for `tokens` tokens, as one job.
pub fn central(
    pool: &Pool,
    experiment: &Experiment,
    scenario: &Scenario,
    tokens: u64,
    seed: u64,
) -> Pending<CentralOutcome> {
    let pooled: Vec<Vec<u32>> = experiment.users.iter().flat_map(|user| user.train.iter().cloned()).collect();
    let (base, layout) = (Arc::clone(&experiment.base), experiment.layout.clone());
    let (seen, heldout) = (Arc::clone(&experiment.eval_blocks), Arc::clone(&experiment.heldout_blocks));
    let scenario = scenario.clone();
    pool.submit(move |workspace| {
        workspace.trainer = None; // its buffers are not needed any more
        let mut trainer = layout.trainer(&base, scenario.engine.options()?)?;
        let mut run = CentralRun::new(&scenario, layout.initial_values(&base), pooled, tokens, seed);
        let mut curve = Vec::new();
        for step in 0..run.steps {
            run.step(trainer.as_mut(), step)?;
            let next = (step + 1) * CURVE_POINTS / run.steps;
            if next > step * CURVE_POINTS / run.steps || step + 1 == run.steps {
                let scores = both(&layout.model(&base, run.values.clone())?, &seen, &heldout)?;
                curve.push((run.tokens, scores));
            }
        }
        let scores = curve.last().context("central training needs at least one step")?.1;
        let point = |(tokens, scores): &(u64, BothGroups)| CentralPoint {
            tokens: *tokens,
            eval_nll: scores.seen.nll,
            heldout_nll: scores.heldout.nll,
        };
        let curve = curve.iter().map(point).collect();
        Ok(CentralOutcome { scores, curve, tokens: run.tokens, values: run.values })
    })
}

struct CentralRun {
    pooled: Vec<Vec<u32>>,
    order: Vec<usize>,
    rng: ChaCha8Rng,
    values: Vec<f32>,
    gradient: Vec<f32>,
    optimizer: AdamW,
    schedule: Schedule,
    steps: u32,
    batch_size: usize,
    learning_rate: f32,
    gradient_clip: f32,
    tokens: u64,
}

impl CentralRun {
    fn new(scenario: &Scenario, values: Vec<f32>, pooled: Vec<Vec<u32>>, tokens: u64, seed: u64) -> Self {
        let central = &scenario.central;
        let per_step = (central.batch_size * scenario.training.block_tokens as usize) as u64;
        let clip = scenario.training.gradient_clip;
        Self {
            pooled,
            order: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed ^ 0x6365_6e74),
            gradient: vec![0.0; values.len()],
            optimizer: AdamW::new(
                AdamWConfig { weight_decay: scenario.training.weight_decay, ..AdamWConfig::default() },
                values.len(),
            ),
            values,
            schedule: Schedule::WarmupCosine { warmup_steps: central.warmup_steps, final_fraction: 0.1 },
            steps: u32::try_from(tokens.div_ceil(per_step).max(1)).unwrap_or(u32::MAX),
            batch_size: central.batch_size,
            learning_rate: central.learning_rate,
            gradient_clip: if clip > 0.0 { clip } else { f32::INFINITY },
            tokens: 0,
        }
    }

    fn step(&mut self, trainer: &mut dyn Trainer, step: u32) -> Result<()> {
        if self.order.len() < self.batch_size {
            self.order = (0..self.pooled.len()).collect();
            self.order.shuffle(&mut self.rng);
        }
        let chosen = self.order.split_off(self.order.len().saturating_sub(self.batch_size));
        let blocks: Vec<&[u32]> = chosen.iter().map(|i| self.pooled[*i].as_slice()).collect();
        let batch = Batch::from_blocks(&blocks)?;
        trainer.loss_and_gradient(&self.values, &batch, &mut self.gradient)?;
        clip_gradient_norm(&mut self.gradient, self.gradient_clip);
        let rate = self.learning_rate * self.schedule.factor(step, self.steps);
        self.optimizer.step(&mut self.values, &self.gradient, rate);
        self.tokens += batch.predicted() as u64;
        Ok(())
    }
}

/// Devices that train alone on their own text, each as one job; `federated` is scored on the same
/// texts.
pub fn local_only(
    pool: &Pool,
    experiment: &Experiment,
    scenario: &Scenario,
    federated: &[f32],
    seed: u64,
) -> Result<Vec<Pending<LocalOnlyDevice>>> {
    let plan =
        LocalTraining { steps: scenario.local_only.steps, ..local_training(&scenario.training_plan()?) };
    let federated = Arc::new(experiment.layout.model(&experiment.base, federated.to_vec())?);
    let options = scenario.engine.options()?;
    let start = |user| alone(pool, experiment, user, (&plan, options), &federated, seed);
    Ok(choose_users(experiment, scenario.local_only.devices, seed).into_iter().map(start).collect())
}

fn choose_users(experiment: &Experiment, count: usize, seed: u64) -> Vec<usize> {
    let mut users: Vec<usize> =
        (0..experiment.users.len()).filter(|u| !experiment.users[*u].test.is_empty()).collect();
    users.shuffle(&mut ChaCha8Rng::seed_from_u64(seed ^ 0x6c6f_6361));
    users.truncate(count);
    users
}

fn alone(
    pool: &Pool,
    experiment: &Experiment,
    index: usize,
    (plan, options): (&LocalTraining, TrainerOptions),
    federated: &Arc<TrainedModel>,
    seed: u64,
) -> Pending<LocalOnlyDevice> {
    let (base, layout) = (Arc::clone(&experiment.base), experiment.layout.clone());
    let (user, plan, federated) = (experiment.users[index].clone(), plan.clone(), Arc::clone(federated));
    let [a, b, c, d, e, f, g, h, ..] = training_seed(seed, index);
    let batch_seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    pool.submit(move |workspace| {
        workspace.trainer = None;
        let mut trainer = layout.trainer(&base, options)?;
        let mut own = layout.initial_values(&base);
        fine_tune(trainer.as_mut(), &mut own, &user.train, &plan, batch_seed, &mut || false)?;
        let local = score(&layout.model(&base, own)?, &user.test)?;
        Ok(LocalOnlyDevice {
            user: user.name,
            base_nll: evaluate(&base, None, &user.test)?.nll,
            local_nll: local.nll,
            federated_nll: score(&federated, &user.test)?.nll,
            tokens: local.tokens,
        })
    })
}
