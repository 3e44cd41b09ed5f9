//! The prediction against what sessions take, and the choices that follow from it.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::adapter::Adapter;
use crate::config::Projection;
use crate::fixtures::{base_of, blocks, config, layout};
use crate::gguf::Metadata;
use crate::optim::AdamWConfig;
use crate::train::{LoraTrainer, Schedule, Trainer, fine_tune};
use crate::weights::WeightFormat;

/// Names the model file and the options to the process that is measured.
const CHILD: &str = "FLEETUNE_TEST_MEMORY";

fn model() -> ModelConfig {
    ModelConfig { hidden: 384, layers: 8, feed_forward: 1024, context_length: 512, ..config(6, 2, 64) }
}

fn plan(batch_size: usize, block_tokens: usize) -> LocalTraining {
    LocalTraining {
        steps: 2,
        batch_size,
        block_tokens,
        optimizer: OptimizerConfig::AdamW(AdamWConfig::default()),
        learning_rate: 1e-3,
        gradient_clip: None,
        schedule: Schedule::Constant,
    }
}

fn options(words: &str) -> TrainerOptions {
    let has = |word: &str| words.split_whitespace().any(|found| found == word);
    TrainerOptions {
        recompute: if has("recompute") { Recompute::Always } else { Recompute::Never },
        precision: if has("bf16") { Precision::Bf16 } else { Precision::F32 },
        threads: if has("threads") { 2 } else { 1 },
        ..TrainerOptions::default()
    }
}

/// A field of this process's status, in bytes.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// What a small program takes before it does anything; the test program takes more.
const PROGRAM_BYTES: u64 = 6 << 20;

/// Runs a session and prints its predicted and its real peak.
fn child(file: &Path, words: &str) {
    let before = status("VmRSS");
    let base = Arc::new(BaseModel::open(file).unwrap());
    let layout = layout(&base.config, &Projection::ALL, false);
    let blocks = blocks(&base.config, 4, 256);
    let start = Adapter::init(Arc::clone(&layout));
    let checkpoint = start.to_checkpoint_bytes();
    let mut values = start.values.clone();
    let mut trainer = LoraTrainer::new(base, layout, options(words)).unwrap();
    let summary = fine_tune(&mut trainer, &mut values, &blocks, &plan(4, 256), 1, &mut || false).unwrap();
    assert!(checkpoint.len() > 4 * values.len());
    let peak = status("VmHWM") - before + PROGRAM_BYTES;
    eprintln!("FOUND {} {peak}", summary.fit.memory_bytes.unwrap());
}

/// Each session has a process of its own: this test again, with the environment variable.
#[test]
#[cfg(target_os = "linux")]
fn the_prediction_is_an_upper_bound_and_not_a_lax_one() {
    if let Ok(case) = std::env::var(CHILD) {
        let (file, words) = case.split_once('\n').unwrap();
        return child(Path::new(file), words);
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("base.gguf");
    let base = base_of(&model(), WeightFormat::Q8_0);
    base.write_gguf(&Metadata::default(), &mut std::fs::File::create(&file).unwrap()).unwrap();
    let name = "train::budget::tests::the_prediction_is_an_upper_bound_and_not_a_lax_one";
    for words in ["", "bf16", "recompute", "bf16 recompute", "threads", "bf16 threads"] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([name, "--exact", "--nocapture", "--test-threads", "1"]);
        let output = command.env(CHILD, format!("{}\n{words}", file.display())).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let found = text.split("FOUND ").nth(1).unwrap_or_else(|| panic!("{words:?}: {text}"));
        let mut numbers = found.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
        let (predicted, peak) = (numbers.next().unwrap(), numbers.next().unwrap());
        assert!(peak <= predicted, "{words:?}: {peak} of {predicted}");
        assert!(predicted <= peak + peak / 4 + (12 << 20), "{words:?}: {predicted} for {peak}");
    }
}

fn fit(memory_bytes: u64, options: TrainerOptions, plan: &LocalTraining) -> Result<Fit, TrainError> {
    let model = model();
    let layout = layout(&model, &Projection::ALL, false);
    let shape = SessionShape {
        model: &model,
        weights: WeightMemory { kept: 20_000_000, passing: 0 },
        layout: &layout,
        optimizer: plan.optimizer,
        precision: options.precision,
    };
    Fit::new(&shape, plan, &TrainerOptions { memory_bytes: Some(memory_bytes), ..options })
}

#[test]
fn a_smaller_budget_costs_time_first_then_length_and_then_says_no() {
    let (plan, options) = (plan(4, 256), TrainerOptions { threads: 4, ..TrainerOptions::default() });
    let ample = fit(u64::MAX, options, &plan).unwrap();
    assert_eq!((ample.threads, ample.recompute, ample.block_tokens), (4, false, 256));
    let mut last = ample;
    let mut budget = ample.memory_bytes.unwrap();
    let refused = loop {
        match fit(budget, options, &plan) {
            Ok(found) => {
                let need = found.memory_bytes.unwrap();
                assert!(need <= budget);
                assert!(found.block_tokens <= last.block_tokens);
                assert!(found.block_tokens == 256 || (found.recompute && found.threads == 1), "{found:?}");
                (last, budget) = (found, need - 1);
            }
            Err(error) => break error,
        }
    };
    assert!(last.recompute && last.block_tokens == BLOCK_TOKENS_MIN, "{last:?}");
    let TrainError::OverMemory { needed_bytes, budget_bytes } = refused else { panic!("{refused}") };
    assert_eq!((needed_bytes, budget_bytes), (last.memory_bytes.unwrap(), last.memory_bytes.unwrap() - 1));
    let never = TrainerOptions { recompute: Recompute::Never, ..options };
    assert!(!fit(ample.memory_bytes.unwrap() / 2, never, &plan).unwrap().recompute);
}

#[test]
fn a_refusal_names_both_figures() {
    let error = fit(30_000_000, TrainerOptions::default(), &plan(1, 8)).unwrap_err().to_string();
    assert!(error.contains("MB of memory at the least, the budget is 30 MB"), "{error}");
}

/// Whatever the budget chooses, the gradient is that of the plan's batch; only rounding differs.
#[test]
fn budgets_change_nothing_but_rounding() {
    let base = crate::fixtures::base();
    let layout = layout(&base.config, &Projection::ALL, false);
    let blocks = blocks(&base.config, 8, 64);
    let plan = LocalTraining { learning_rate: 0.01, ..plan(8, 64) };
    let run = |options: TrainerOptions| {
        let mut values = Adapter::init(Arc::clone(&layout)).values;
        let mut trainer = LoraTrainer::new(Arc::clone(&base), Arc::clone(&layout), options).unwrap();
        let fit = trainer.prepare(&plan).unwrap();
        fine_tune(&mut trainer, &mut values, &blocks, &plan, 1, &mut || false).unwrap();
        (fit, values)
    };
    let (ample, expected) = run(TrainerOptions::default());
    let tight = ample.memory_bytes.unwrap() - 100_000;
    let (fit, found) = run(TrainerOptions { memory_bytes: Some(tight), ..TrainerOptions::default() });
    assert!(fit.micro_tokens < ample.micro_tokens || fit.recompute, "{fit:?}");
    assert_eq!(fit.block_tokens, 64);
    let largest = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(largest < 1e-3, "{largest}");
}
