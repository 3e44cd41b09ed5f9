//! The pretraining loop: batches, AdamW with warm-up and cosine, looks at the validation text.

#![allow(clippy::disallowed_methods, reason = "progress needs the clock; no result depends on it")]

use std::time::Instant;

use anyhow::ensure;
use fleetune_model::base::BaseModel;
use fleetune_model::batch::Batch;
use fleetune_model::config::ModelConfig;
use fleetune_model::eval::evaluate;
use fleetune_model::full::FullTrainer;
use fleetune_model::gguf::Metadata;
use fleetune_model::optim::{AdamW, AdamWConfig, clip_gradient_norm};
use fleetune_model::tokenizer::Tokenizer;
use fleetune_model::train::Schedule;
use fleetune_model::weights::WeightFormat;

use super::corpus::Batches;
use super::record::CurvePoint;
use super::{PretrainArgs, write_file};

/// Steps between two lines of progress.
const PROGRESS_STEPS: u32 = 20;
/// Norm to which a step's gradient is clipped.
const GRADIENT_NORM_MAX: f32 = 1.0;
/// The last learning rate as a share of the highest.
const FINAL_FRACTION: f32 = 0.1;

/// Everything the loop reads.
pub(super) struct Pretraining<'a> {
    pub(super) args: &'a PretrainArgs,
    pub(super) config: &'a ModelConfig,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) ids: &'a [u32],
    pub(super) curve_blocks: Vec<Vec<u32>>,
    pub(super) recipe_sha256: String,
}

/// What the loop leaves.
pub(super) struct Finished {
    pub(super) file: Vec<u8>,
    pub(super) curve: Vec<CurvePoint>,
    pub(super) seconds: f64,
}

/// Where the loop is.
pub(super) struct Progress {
    pub(super) step: u32,
    pub(super) steps: u32,
    /// Mean over the last steps, nats a token.
    pub(super) nll: f64,
    pub(super) tokens_per_second: f64,
    pub(super) seconds: f64,
    /// Of the quantized model, when this is a look at the validation text.
    pub(super) validation_nll: Option<f64>,
}

impl Progress {
    pub(super) fn seconds_left(&self) -> f64 {
        self.seconds / f64::from(self.step) * f64::from(self.steps - self.step)
    }
}

impl Pretraining<'_> {
    pub(super) fn run(&self, on_progress: &mut dyn FnMut(&Progress)) -> anyhow::Result<Finished> {
        let args = self.args;
        let mut trainer = FullTrainer::new(self.config.clone(), args.threads)?;
        let mut parameters = trainer.initial_parameters(args.seed);
        self.file(&trainer, &parameters)?;
        let mut gradient = vec![0.0; parameters.len()];
        let adamw = AdamWConfig { beta2: 0.95, weight_decay: args.weight_decay, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(adamw, parameters.len());
        let mut batches = Batches::new(self.ids, args.block, args.seed)?;
        let schedule = Schedule::WarmupCosine { warmup_steps: args.warmup, final_fraction: FINAL_FRACTION };
        let mut curve = Vec::new();
        let (mut recent, mut since_look) = (Mean::default(), Mean::default());
        let start = Instant::now();
        for step in 1..=args.steps {
            let batch = Batch::from_blocks(&batches.next(args.batch))?;
            let nll = trainer.loss_and_gradient(&parameters, &batch, &mut gradient)?;
            ensure!(nll.is_finite(), "the loss of step {step} is no number");
            clip_gradient_norm(&mut gradient, GRADIENT_NORM_MAX);
            optimizer.step(
                &mut parameters,
                &gradient,
                args.learning_rate * schedule.factor(step - 1, args.steps),
            );
            recent.add(nll);
            since_look.add(nll);

            let seconds = start.elapsed().as_secs_f64();
            let tokens = f64::from(step) * (args.batch * args.block) as f64;
            let progress = |nll, validation_nll| Progress {
                step,
                steps: args.steps,
                nll,
                tokens_per_second: tokens / seconds,
                seconds,
                validation_nll,
            };
            if step % PROGRESS_STEPS == 0 {
                on_progress(&progress(recent.take(), None));
            }
            if step % args.eval_every.max(1) == 0 || step == args.steps {
                let file = self.file(&trainer, &parameters)?;
                write_file(&args.out, &file)?;
                let validation_nll =
                    evaluate(&BaseModel::from_gguf_bytes(file)?, None, &self.curve_blocks)?.nll;
                let train_nll = since_look.take();
                curve.push(CurvePoint { step, train_nll, validation_nll });
                on_progress(&progress(train_nll, Some(validation_nll)));
            }
        }
        Ok(Finished {
            file: self.file(&trainer, &parameters)?,
            curve,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The model as a file; fails when it is larger than the bound, so also before the first step.
    fn file(&self, trainer: &FullTrainer, parameters: &[f32]) -> anyhow::Result<Vec<u8>> {
        let model = trainer.to_base(parameters, self.tokenizer.clone(), WeightFormat::Q8_0)?;
        let file = model.to_gguf_bytes(&self.metadata());
        let max = self.args.file_bytes_max;
        ensure!(file.len() <= max, "the file takes {} bytes and passes file_bytes_max = {max}", file.len());
        Ok(file)
    }

    fn metadata(&self) -> Metadata {
        let mut metadata = Metadata::default();
        metadata.set("general.license", self.args.licence.as_str());
        metadata.set("general.description", "pretrained by fleetune-sim pretrain");
        metadata.set("fleetune.recipe_sha256", self.recipe_sha256.as_str());
        metadata
    }
}

/// A mean that starts again when it is taken.
#[derive(Default)]
struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, value: f32) {
        self.sum += f64::from(value);
        self.count += 1;
    }

    fn take(&mut self) -> f64 {
        let mean = self.sum / f64::from(self.count.max(1));
        *self = Self::default();
        mean
    }
}
