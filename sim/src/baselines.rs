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
    adapter::Adapter,
    base::BaseModel,
    batch::Batch,
    eval::{Evaluation, evaluate},
    optim::{AdamW, AdamWConfig, clip_gradient_norm},
    train::{LocalTraining, LoraTrainer, Schedule, TrainerOptions, fine_tune},
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
}

/// Evaluates an adapter (the base without one) on both groups, as one job.
pub fn evaluate_both(pool: &Pool, experiment: &Experiment, adapter: Option<Vec<f32>>) -> Pending<BothGroups> {
    let (base, layout) = (Arc::clone(&experiment.base), Arc::clone(&experiment.layout));
    let blocks = (Arc::clone(&experiment.eval_blocks), Arc::clone(&experiment.heldout_blocks));
    pool.submit(move |_| {
        let adapter = adapter.map(|values| Adapter::new(layout, values)).transpose()?;
        both(&base, adapter.as_ref(), &blocks.0, &blocks.1)
    })
}

fn both(
    base: &BaseModel,
    adapter: Option<&Adapter>,
    seen: &[Vec<u32>],
    heldout: &[Vec<u32>],
) -> Result<BothGroups> {
    Ok(BothGroups { seen: evaluate(base, adapter, seen)?, heldout: evaluate(base, adapter, heldout)? })
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
    let (base, layout) = (Arc::clone(&experiment.base), Arc::clone(&experiment.layout));
    let (seen, heldout) = (Arc::clone(&experiment.eval_blocks), Arc::clone(&experiment.heldout_blocks));
    let scenario = scenario.clone();
    pool.submit(move |workspace| {
        workspace.trainer = None; // its buffers are not needed any more
        let options = scenario.engine.options()?;
        let mut trainer = LoraTrainer::new(Arc::clone(&base), Arc::clone(&layout), options)?;
        let mut run = CentralRun::new(&scenario, &layout, pooled, tokens, seed);
        let mut curve = Vec::new();
        for step in 0..run.steps {
            run.step(&mut trainer, step)?;
            let next = (step + 1) * CURVE_POINTS / run.steps;
            if next > step * CURVE_POINTS / run.steps || step + 1 == run.steps {
                let adapter = Adapter::new(Arc::clone(&layout), run.values.clone())?;
                let scores = both(&base, Some(&adapter), &seen, &heldout)?;
                curve.push((run.tokens, scores));
            }
        }
        let scores = curve.last().context("central training needs at least one step")?.1;
        let point = |(tokens, scores): &(u64, BothGroups)| CentralPoint {
            tokens: *tokens,
            eval_nll: scores.seen.nll,
            heldout_nll: scores.heldout.nll,
        };
        Ok(CentralOutcome { scores, curve: curve.iter().map(point).collect(), tokens: run.tokens })
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
    fn new(
        scenario: &Scenario,
        layout: &Arc<fleetune_model::adapter::AdapterLayout>,
        pooled: Vec<Vec<u32>>,
        tokens: u64,
        seed: u64,
    ) -> Self {
        let central = &scenario.central;
        let per_step = (central.batch_size * scenario.training.block_tokens as usize) as u64;
        let clip = scenario.training.gradient_clip;
        Self {
            pooled,
            order: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed ^ 0x6365_6e74),
            values: Adapter::init(Arc::clone(layout)).values,
            gradient: vec![0.0; layout.len()],
            optimizer: AdamW::new(
                AdamWConfig { weight_decay: scenario.training.weight_decay, ..AdamWConfig::default() },
                layout.len(),
            ),
            schedule: Schedule::WarmupCosine { warmup_steps: central.warmup_steps, final_fraction: 0.1 },
            steps: u32::try_from(tokens.div_ceil(per_step).max(1)).unwrap_or(u32::MAX),
            batch_size: central.batch_size,
            learning_rate: central.learning_rate,
            gradient_clip: if clip > 0.0 { clip } else { f32::INFINITY },
            tokens: 0,
        }
    }

    fn step(&mut self, trainer: &mut LoraTrainer, step: u32) -> Result<()> {
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
    let federated = Arc::new(Adapter::new(Arc::clone(&experiment.layout), federated.to_vec())?);
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
    federated: &Arc<Adapter>,
    seed: u64,
) -> Pending<LocalOnlyDevice> {
    let (base, layout) = (Arc::clone(&experiment.base), Arc::clone(&experiment.layout));
    let (user, plan, federated) = (experiment.users[index].clone(), plan.clone(), Arc::clone(federated));
    let [a, b, c, d, e, f, g, h, ..] = training_seed(seed, index);
    let batch_seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    pool.submit(move |workspace| {
        workspace.trainer = None;
        let mut trainer = LoraTrainer::new(Arc::clone(&base), Arc::clone(&layout), options)?;
        let mut own = Adapter::init(layout);
        fine_tune(&mut trainer, &mut own.values, &user.train, &plan, batch_seed, &mut || false)?;
        let local = evaluate(&base, Some(&own), &user.test)?;
        Ok(LocalOnlyDevice {
            user: user.name,
            base_nll: evaluate(&base, None, &user.test)?.nll,
            local_nll: local.nll,
            federated_nll: evaluate(&base, Some(&federated), &user.test)?.nll,
            tokens: local.tokens,
        })
    })
}
