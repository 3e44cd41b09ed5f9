//! The engine by itself: LoRA training steps, on one thread or more, and reading and writing text, on one. Seconds
//! are of CPU time of the process unless they are called wall.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]
#![allow(clippy::disallowed_methods, reason = "wall time is one of the figures")]

use crate::run::peak_rss_mib;
use crate::tools::{open_adapter, sequence};
use anyhow::{Context, Result, ensure};
use fleetune_model::{
    adapter::{Adapter, AdapterLayout, LoraConfig},
    base::BaseModel,
    config::Projection,
    infer::{Engine, Sequence, Span},
    train::{
        LocalTraining, LoraTrainer, OptimizerConfig, Precision, Recompute, Schedule, TrainerOptions,
        fine_tune,
    },
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use std::{path::PathBuf, sync::Arc, time::Instant};

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
    /// Factors of the large products: f32, or bf16 where the processor multiplies it.
    #[arg(long, value_enum, default_value_t = Factors::F32)]
    pub precision: Factors,
    /// Threads that train.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Most memory in MB by prediction; 0: no bound.
    #[arg(long, default_value_t = 0)]
    pub memory_mb: u64,
    /// One line of JSON instead of words.
    #[arg(long)]
    pub json: bool,
}

/// Number format of the factors of products.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Factors {
    /// Single precision.
    F32,
    /// bf16 with f32 sums.
    Bf16,
}

impl From<Factors> for Precision {
    fn from(factors: Factors) -> Self {
        match factors {
            Factors::F32 => Self::F32,
            Factors::Bf16 => Self::Bf16,
        }
    }
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
    /// Tokens written, after 16 of the prompt.
    #[arg(long, default_value_t = 128)]
    pub tokens: usize,
    /// An adapter beside the model: a GGUF LoRA file or a PEFT folder.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Times each; the best counts.
    #[arg(long, default_value_t = 3)]
    pub repeats: u32,
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
    let options = TrainerOptions {
        recompute: if args.recompute { Recompute::Always } else { Recompute::Auto },
        precision: args.precision.into(),
        threads: args.threads,
        memory_bytes: (args.memory_mb > 0).then(|| args.memory_mb.saturating_mul(1_000_000)),
        time: None,
    };
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
            "loss": loss, "predicted_mb": summary.fit.memory_bytes.map(|bytes| bytes as f64 / 1e6),
            "micro_batch_tokens": summary.fit.micro_tokens, "block_tokens": summary.fit.block_tokens,
            "recompute": summary.fit.recompute, "threads": summary.fit.threads,
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
    ensure!(args.prompt > 0 && args.tokens > 0, "--prompt, --tokens: at least 1");
    ensure!(args.repeats > 0, "--repeats: at least 1");
    let start = Instant::now();
    let engine = Engine::new(Arc::new(open(&args.model)?));
    let prompt = ids(engine.base(), 1, args.prompt).remove(0);
    read(&engine, &mut engine.sequence(None), &prompt[..1])?;
    let load = start.elapsed().as_secs_f64();
    let adapter = args.adapter.as_deref().map(|path| open_adapter(path, engine.base())).transpose()?;
    let (mut prefill, mut decode) = (0f64, 0f64);
    for _ in 0..args.repeats {
        let mut text = sequence(&engine, adapter.as_ref())?;
        let before = cpu_s();
        read(&engine, &mut text, &prompt)?;
        prefill = prefill.max(args.prompt as f64 / (cpu_s() - before));
        text.truncate(CONTEXT);
        let before = cpu_s();
        let mut last = prompt[0];
        for _ in 0..args.tokens {
            last = read(&engine, &mut text, &[last])?;
        }
        decode = decode.max(args.tokens as f64 / (cpu_s() - before));
    }
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

/// Tokens that writing starts after.
const CONTEXT: usize = 16;

/// Takes in ids; returns the likeliest token after them.
fn read(engine: &Engine, sequence: &mut Sequence, ids: &[u32]) -> Result<u32> {
    let logits = engine.read(&mut [Span { sequence, ids }])?;
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    u32::try_from(best.unwrap_or(0)).context("a token's id")
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
