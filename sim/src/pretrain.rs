//! `fleetune-sim pretrain`: makes a small base model from plain text, tokenizer included.
//!
//! It wrote the embedded base (`sim/base/`). Reading text is in `pretrain/corpus.rs`, the loop over batches in
//! `pretrain/training.rs`, judging the file in `pretrain/measure.rs`. A shell: it reads the clock and prints.

#![allow(clippy::print_stdout, reason = "a program's final words go to standard output")]

mod corpus;
mod measure;
mod record;
mod training;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use fleetune_model::base::BaseModel;
use fleetune_model::config::ModelConfig;
use fleetune_model::family::Family;
use fleetune_model::tokenizer::{SpecialTokens, Tokenizer, train_bpe};
use sha2::{Digest, Sha256};

use corpus::Corpus;
use record::{Measured, Probe, Recipe, Record};
use training::{Pretraining, Progress};

/// The token that stands between documents, and the model's only control token.
const BOUNDARY: &str = "<|endoftext|>";
/// Blocks of the validation text that are looked at during training; the finished file is judged on all.
const CURVE_BLOCKS: usize = 100;
/// Block length on the probe's users, as in the reference experiments.
const PROBE_BLOCK_TOKENS: usize = 64;

/// Trains a small Llama-family model and its tokenizer from nothing, and writes it as a Q8_0 GGUF file with a
/// training record beside it.
#[derive(Clone, Debug, clap::Args)]
pub struct PretrainArgs {
    /// Plain text to train on; blank lines separate documents.
    #[arg(long, required = true, num_args = 1..)]
    pub corpus: Vec<PathBuf>,
    /// Plain text to measure on, never trained on.
    #[arg(long)]
    pub validation: PathBuf,
    /// Users (as for `run --data`) on whose texts the finished model is measured without training.
    #[arg(long)]
    pub probe: Option<PathBuf>,
    /// Tokens of the vocabulary.
    #[arg(long, default_value_t = 4096)]
    pub vocab: usize,
    /// Width of the residual stream; a multiple of 32.
    #[arg(long, default_value_t = 192)]
    pub hidden: usize,
    /// Decoder layers.
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Attention heads; a head's width is hidden / heads.
    #[arg(long, default_value_t = 6)]
    pub heads: usize,
    /// Key and value heads.
    #[arg(long, default_value_t = 3)]
    pub kv_heads: usize,
    /// Width of the feed-forward layer; a multiple of 32.
    #[arg(long, default_value_t = 512)]
    pub feed_forward: usize,
    /// Optimizer steps.
    #[arg(long)]
    pub steps: u32,
    /// Blocks in a step.
    #[arg(long, default_value_t = 32)]
    pub batch: usize,
    /// Tokens in a block, and the model's context length.
    #[arg(long, default_value_t = 128)]
    pub block: usize,
    /// Highest learning rate of AdamW.
    #[arg(long, default_value_t = 3e-3)]
    pub learning_rate: f32,
    /// Steps over which the learning rate rises; then it falls to a tenth along a cosine.
    #[arg(long, default_value_t = 100)]
    pub warmup: u32,
    /// Weight decay of AdamW.
    #[arg(long, default_value_t = 0.1)]
    pub weight_decay: f32,
    /// Seed of the initial weights and of the order of blocks.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads; a run repeats byte for byte only with the same number.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Steps between looks at the validation text; the file is written at each.
    #[arg(long, default_value_t = 250)]
    pub eval_every: u32,
    /// The model's name in its file.
    #[arg(long, default_value = "fleetune-base")]
    pub name: String,
    /// The licence named in the file.
    #[arg(long, default_value = "Apache-2.0")]
    pub licence: String,
    /// Largest file that is still written, in bytes.
    #[arg(long, default_value_t = 3_000_000)]
    pub file_bytes_max: usize,
    /// The GGUF file to write; the record goes to the same name with `.json` added.
    #[arg(long)]
    pub out: PathBuf,
}

/// Trains, writes the file and its record, and prints what came out.
///
/// # Errors
/// Text that cannot be read, sizes that do not fit together, a file over its bound, or a loss that is no number.
pub fn run(args: &PretrainArgs) -> anyhow::Result<()> {
    let corpus = Corpus::read(&args.corpus)?;
    let validation = Corpus::read(std::slice::from_ref(&args.validation))?;
    eprintln!(
        "learning {} tokens from {} documents, {} bytes",
        args.vocab,
        corpus.documents.len(),
        corpus.bytes()
    );
    let tokenizer = train_tokenizer(&corpus, args.vocab)?;
    let boundary = tokenizer.eos().context("the tokenizer has no end token")?;
    let (ids, validation_ids) = (corpus.ids(&tokenizer, boundary), validation.ids(&tokenizer, boundary));
    let recipe = recipe(args, &corpus);
    let config = model_config(args, tokenizer.vocab_size())?;
    eprintln!("{} parameters, {} tokens of text", config.parameter_count(), ids.len());

    let pretraining = Pretraining {
        args,
        config: &config,
        tokenizer: &tokenizer,
        ids: &ids,
        curve_blocks: measure::sample(corpus::blocks(&validation_ids, args.block), CURVE_BLOCKS),
        recipe_sha256: recipe.sha256()?,
    };
    let finished = pretraining.run(&mut print_progress)?;

    write_file(&args.out, &finished.file)?;
    let model = BaseModel::open(&args.out)?;
    let tokens_per_byte = validation_ids.len() as f64 / validation.bytes() as f64;
    let record = Record {
        recipe_sha256: pretraining.recipe_sha256.clone(),
        recipe,
        licence: args.licence.clone(),
        parameters: config.parameter_count(),
        corpus_tokens: ids.len(),
        corpus_bytes: corpus.bytes(),
        tokens_trained: u64::from(args.steps) * (args.batch * args.block) as u64,
        threads: args.threads,
        seconds: finished.seconds,
        file_bytes: finished.file.len(),
        file_sha256: hex::encode(Sha256::digest(&finished.file)),
        curve: finished.curve,
        validation: measure::measure(&model, &corpus::blocks(&validation_ids, args.block), tokens_per_byte)?,
        probe: args
            .probe
            .as_deref()
            .map(|path| measure::probe(&model, path, PROBE_BLOCK_TOKENS))
            .transpose()?,
    };
    write_file(&record_path(&args.out), format!("{}\n", serde_json::to_string_pretty(&record)?).as_bytes())?;
    print_record(&record, &args.out);
    Ok(())
}

fn train_tokenizer(corpus: &Corpus, vocab_size: usize) -> anyhow::Result<Tokenizer> {
    let special = SpecialTokens { control: vec![BOUNDARY.to_owned()], bos: Some(0), eos: Some(0) };
    let tokenizer = train_bpe(corpus.documents.iter().cloned(), vocab_size, &special)?;
    let found = tokenizer.vocab_size();
    ensure!(found == vocab_size, "the corpus gives only {found} of {vocab_size} tokens");
    Ok(tokenizer)
}

fn model_config(args: &PretrainArgs, vocab_size: usize) -> anyhow::Result<ModelConfig> {
    ensure!(args.heads > 0 && args.hidden.is_multiple_of(args.heads), "hidden must be a multiple of heads");
    let config = ModelConfig {
        name: args.name.clone(),
        family: Family::Llama,
        vocab_size,
        hidden: args.hidden,
        layers: args.layers,
        feed_forward: args.feed_forward,
        heads: args.heads,
        kv_heads: args.kv_heads,
        head_dim: args.hidden / args.heads,
        context_length: args.block,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    };
    Ok(config.validated()?)
}

fn recipe(args: &PretrainArgs, corpus: &Corpus) -> Recipe {
    Recipe {
        name: args.name.clone(),
        vocab_size: args.vocab,
        hidden: args.hidden,
        layers: args.layers,
        heads: args.heads,
        kv_heads: args.kv_heads,
        feed_forward: args.feed_forward,
        corpus: corpus.files.clone(),
        steps: args.steps,
        batch: args.batch,
        block_tokens: args.block,
        learning_rate: args.learning_rate,
        warmup_steps: args.warmup,
        weight_decay: args.weight_decay,
        seed: args.seed,
    }
}

/// Writes beside the file first, so that a reader never sees half of one.
fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    fs::write(&beside, bytes)
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn record_path(out: &Path) -> PathBuf {
    let mut path = out.as_os_str().to_owned();
    path.push(".json");
    path.into()
}

fn print_progress(progress: &Progress) {
    let Progress { step, steps, nll, tokens_per_second, .. } = progress;
    let left = progress.seconds_left();
    match progress.validation_nll {
        Some(validation) => eprintln!("step {step}/{steps}  train {nll:.4}  validation {validation:.4}"),
        None => eprintln!(
            "step {step}/{steps}  train {nll:.4}  {tokens_per_second:.0} tokens/s  {left:.0} s left"
        ),
    }
}

fn print_record(record: &Record, out: &Path) {
    let Record { parameters, file_bytes, file_sha256, seconds, .. } = record;
    println!(
        "{}: {parameters} parameters, {file_bytes} bytes, {seconds:.0} s, sha256 {file_sha256}",
        out.display()
    );
    print_measured("validation", &record.validation);
    if let Some(Probe { seen, heldout, .. }) = &record.probe {
        print_measured("probe, seen users' test texts", seen);
        print_measured("probe, held-out users", heldout);
    }
}

fn print_measured(what: &str, measured: &Measured) {
    let Measured { nll_per_token, nll_per_byte, accuracy, tokens } = measured;
    println!(
        "{what}: {nll_per_token:.4} nats a token, {nll_per_byte:.4} a byte, accuracy {accuracy:.3}, {tokens} tokens"
    );
}

#[cfg(test)]
mod tests;
