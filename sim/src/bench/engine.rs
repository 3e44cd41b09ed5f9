//! The engine by itself: LoRA training steps, and reading and writing text, on one thread. Seconds are of
//! CPU time of the process unless they are called wall.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]
#![allow(clippy::disallowed_methods, reason = "wall time is one of the figures")]

use crate::run::peak_rss_mib;
use anyhow::{Context, Result, ensure};
use fleetune_model::{
    adapter::{Adapter, AdapterLayout, LoraConfig},
    base::BaseModel,
    config::Projection,
    generate::{Sampling, generate},
    train::{LocalTraining, LoraTrainer, OptimizerConfig, Schedule, TrainerOptions, fine_tune},
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use std::{ops::ControlFlow, path::PathBuf, sync::Arc, time::Instant};

/// Training steps to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct TrainArgs {
    /// Base model: a GGUF file.
    #[arg(long)]
    pub model: PathBuf,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// Adapted projections: of q, k, v, o, gate, up, down.
    #[arg(long, value_delimiter = ',', default_value = "q,k,v,o")]
    pub targets: Vec<String>,
    /// Sequences a step.
    #[arg(long, default_value_t = 4)]
    pub sequences: usize,
    /// Predicted tokens a sequence.
    #[arg(long, default_value_t = 128)]
    pub tokens: usize,
    /// Steps that are timed, after one that is not.
    #[arg(long, default_value_t = 5)]
    pub steps: u32,
    /// Runs layers again in the backward pass instead of keeping their activations.
    #[arg(long)]
    pub recompute: bool,
    /// One line of JSON instead of words.
    #[arg(long)]
    pub json: bool,
}

/// Reading a prompt and writing after it.
#[derive(Clone, Debug, clap::Args)]
pub struct InferArgs {
    /// Base model: a GGUF file.
    #[arg(long)]
    pub model: PathBuf,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    pub prompt: usize,
    /// Tokens written.
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// One line of JSON instead of words.
    #[arg(long)]
    pub json: bool,
}

/// Measures and prints.
pub(super) fn train(args: &TrainArgs) -> Result<()> {
    ensure!(args.steps > 0, "--steps: at least 1");
    let base = Arc::new(open(&args.model)?);
    let parse = |name: &String| Projection::from_name(name).with_context(|| format!("--targets: {name:?}"));
    let mut targets = args.targets.iter().map(parse).collect::<Result<Vec<_>>>()?;
    targets.sort_unstable();
    let lora = LoraConfig { rank: args.rank, alpha: 16.0, targets, freeze_a: false, init_seed: 1 };
    let layout = Arc::new(AdapterLayout::new(&base.config, &lora)?);
    let options = TrainerOptions { recompute: args.recompute, ..TrainerOptions::default() };
    let mut trainer = LoraTrainer::new(Arc::clone(&base), Arc::clone(&layout), options)?;
    let mut values = Adapter::init(layout).values;
    let blocks = ids(&base, args.sequences, args.tokens + 1);
    let plan = |steps| LocalTraining {
        steps,
        batch_size: args.sequences,
        block_tokens: args.tokens,
        optimizer: OptimizerConfig::default(),
        learning_rate: 1e-3,
        gradient_clip: None,
        schedule: Schedule::Constant,
    };
    fine_tune(&mut trainer, &mut values, &blocks, &plan(1), 1, &mut || false)?;
    let (cpu, wall) = (cpu_s(), Instant::now());
    let summary = fine_tune(&mut trainer, &mut values, &blocks, &plan(args.steps), 1, &mut || false)?;
    let steps = f64::from(args.steps);
    let (cpu, wall) = ((cpu_s() - cpu) / steps, wall.elapsed().as_secs_f64() / steps);
    let tokens = (args.sequences * args.tokens) as f64;
    let (peak, loss) = (peak_rss_mib(), summary.last_loss);
    if args.json {
        let line = json!({
            "cpu_s_per_step": cpu, "wall_s_per_step": wall, "peak_rss_mib": peak, "tokens_per_s": tokens / wall,
            "loss": loss,
        });
        println!("{line}");
    } else {
        println!(
            "a step of {} x {} tokens: {cpu:.3} s of CPU, {wall:.3} s, {:.0} tokens/s; peak memory {peak:.0} MiB; \
             loss {loss:.4}",
            args.sequences,
            args.tokens,
            tokens / wall
        );
    }
    Ok(())
}

/// Measures and prints.
pub(super) fn infer(args: &InferArgs) -> Result<()> {
    ensure!(args.prompt > 0 && args.tokens > 1, "--prompt: at least 1; --tokens: at least 2");
    let start = Instant::now();
    let base = open(&args.model)?;
    let prompt = ids(&base, 1, args.prompt).remove(0);
    // One token of prompt: what opening takes until the first token is there.
    write(&base, &prompt[..1], 1)?;
    let load = start.elapsed().as_secs_f64();
    let written = write(&base, &prompt, args.tokens)?;
    let prefill = args.prompt as f64 / written.first_cpu_s;
    let decode = (written.tokens - 1) as f64 / written.rest_cpu_s;
    let peak = peak_rss_mib();
    if args.json {
        let line = json!({
            "prefill_tokens_per_cpu_s": prefill, "decode_tokens_per_cpu_s": decode, "load_s": load,
            "peak_rss_mib": peak,
        });
        println!("{line}");
    } else {
        println!(
            "a second of CPU reads {prefill:.0} tokens of a prompt of {}, and writes {decode:.1}; opened and at the \
             first token after {load:.3} s; peak memory {peak:.0} MiB",
            args.prompt
        );
    }
    Ok(())
}

/// CPU seconds to the first token and from there to the last.
struct Written {
    first_cpu_s: f64,
    rest_cpu_s: f64,
    tokens: usize,
}

fn write(base: &BaseModel, prompt: &[u32], tokens: usize) -> Result<Written> {
    let sampling = Sampling { temperature: 0.0, max_tokens: tokens, ..Sampling::default() };
    let (start, mut first) = (cpu_s(), None);
    let made = generate(base, None, prompt, &sampling, &mut |_| {
        first.get_or_insert_with(cpu_s);
        ControlFlow::Continue(())
    })?;
    let end = cpu_s();
    ensure!(made.len() == tokens, "the model ended its text after {} of {tokens} tokens", made.len());
    let first = first.unwrap_or(end);
    Ok(Written { first_cpu_s: first - start, rest_cpu_s: end - first, tokens })
}

fn open(path: &std::path::Path) -> Result<BaseModel> {
    BaseModel::open(path).with_context(|| format!("model {}", path.display()))
}

/// Made-up token ids: the arithmetic does not depend on them.
fn ids(base: &BaseModel, sequences: usize, length: usize) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let vocab = u32::try_from(base.config.vocab_size).unwrap_or(u32::MAX);
    let mut sequence = |_| (0..length).map(|_| rng.random_range(0..vocab)).collect();
    (0..sequences).map(&mut sequence).collect()
}

/// CPU seconds of all threads of the process.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
