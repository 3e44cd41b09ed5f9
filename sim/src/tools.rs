//! Small programs beside the simulator: `eval`, `tokenize`, `generate` and `export`, for people and for
//! checks against other software.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]

use anyhow::{Context, Result, bail, ensure};
use fleetune_model::{
    adapter::Adapter,
    adapter_formats::{from_gguf_lora, from_peft, read_peft_dir, to_gguf_lora, to_peft, write_peft_dir},
    base::BaseModel,
    eval::token_nlls,
    generate::{Sampling, generate},
    gguf::Metadata,
    infer::{Engine, Sequence},
    weights::WeightFormat,
};
use serde::{Deserialize, Serialize};
use std::{
    fs,
    io::{self, BufRead, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A base model, with or without an adapter.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// Base model: a GGUF file or a Hugging Face folder.
    #[arg(long)]
    pub model: PathBuf,
    /// Adapter: a GGUF LoRA file or a PEFT folder.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
}

/// Prints the NLL of blocks of token ids.
#[derive(Clone, Debug, clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON file: {"seen": [{"ids": [..]}, ..], "heldout": [{"ids": [..]}, ..]}.
    #[arg(long)]
    blocks: PathBuf,
    /// Prints JSON with the NLL of every token instead of two lines.
    #[arg(long)]
    json: bool,
}

/// Reads one JSON string a line and prints one JSON array of token ids a line. Control tokens in the
/// text are recognized.
#[derive(Clone, Debug, clap::Args)]
pub struct TokenizeArgs {
    /// Model whose tokenizer is used.
    #[arg(long)]
    model: PathBuf,
}

/// Continues a text.
#[derive(Clone, Debug, clap::Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text.
    #[arg(long)]
    prompt: String,
    /// Most tokens to add.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    #[command(flatten)]
    choice: ChoiceArgs,
}

/// How the next token is chosen.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ChoiceArgs {
    /// 0 takes the likeliest token each time, as `generate` does if not told; `chat` takes 0.2 then.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Choose among this many likeliest tokens; 0: all.
    #[arg(long, default_value_t = 40)]
    pub(crate) top_k: usize,
    /// Of these, the likeliest that together have this share of the probability.
    #[arg(long, default_value_t = 0.95)]
    pub(crate) top_p: f32,
    /// Of these, those with this share of the likeliest token's probability; 0: all.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f32,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

impl ChoiceArgs {
    /// The same for a text of so many tokens at most.
    pub(crate) fn sampling(&self, temperature: f32, max_tokens: usize) -> Sampling {
        let Self { top_k, top_p, min_p, seed, .. } = *self;
        Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_k,
            top_p,
            min_p,
            seed,
            max_tokens,
        }
    }
}

/// Writes an adapter in another format.
#[derive(Clone, Debug, clap::Args)]
pub struct ExportArgs {
    /// Base model that the adapter is for: a GGUF file or a Hugging Face folder.
    #[arg(long)]
    model: PathBuf,
    /// Adapter: a GGUF LoRA file or a PEFT folder.
    #[arg(long)]
    adapter: PathBuf,
    /// "peft": a folder that peft loads; "gguf": a file that llama.cpp loads.
    #[arg(long)]
    format: String,
    /// The folder or file to write; a file that is there already is refused.
    #[arg(long)]
    out: PathBuf,
}

#[derive(Deserialize)]
struct Blocks {
    seen: Vec<Block>,
    heldout: Vec<Block>,
}

#[derive(Deserialize)]
struct Block {
    ids: Vec<u32>,
}

#[derive(Serialize)]
struct Evaluated {
    seen: GroupNll,
    heldout: GroupNll,
}

/// `nll` is the mean over all tokens of all blocks, nats; `token_nll` one list a block.
#[derive(Serialize)]
struct GroupNll {
    nll: f64,
    token_nll: Vec<Vec<f32>>,
}

/// `fleetune-sim eval`.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let (base, adapter) = open(&args.model)?;
    let name = args.blocks.display();
    let bytes = fs::read(&args.blocks).with_context(|| format!("blocks {name}"))?;
    let blocks: Blocks = serde_json::from_slice(&bytes).with_context(|| format!("blocks {name}"))?;
    let group = |group: &str, blocks: &[Block]| {
        group_nll(&base, adapter.as_ref(), blocks).with_context(|| format!("blocks {name}: {group}"))
    };
    let evaluated =
        Evaluated { seen: group("seen", &blocks.seen)?, heldout: group("heldout", &blocks.heldout)? };
    if args.json {
        println!("{}", serde_json::to_string(&evaluated)?);
    } else {
        println!("seen NLL     {:.4} nats a token", evaluated.seen.nll);
        println!("held-out NLL {:.4} nats a token", evaluated.heldout.nll);
    }
    Ok(())
}

/// `fleetune-sim tokenize`.
pub fn tokenize(args: &TokenizeArgs) -> Result<()> {
    let base = open_base(&args.model)?;
    let mut out = io::stdout().lock();
    for (index, line) in io::stdin().lock().lines().enumerate() {
        let line = line.context("standard input")?;
        let number = index + 1;
        let text: String =
            serde_json::from_str(&line).with_context(|| format!("line {number} is not a JSON string"))?;
        writeln!(out, "{}", serde_json::to_string(&base.tokenizer.encode(&text, false))?)?;
    }
    Ok(())
}

/// `fleetune-sim generate`.
pub fn generate_text(args: &GenerateArgs) -> Result<()> {
    let (base, adapter) = open(&args.model)?;
    let prompt = base.tokenizer.encode(&args.prompt, false);
    ensure!(!prompt.is_empty(), "--prompt: at least one token");
    let sampling = args.choice.sampling(0.0, args.max_tokens);
    let engine = Engine::new(Arc::new(base));
    let mut sequence = sequence(&engine, adapter.as_ref())?;
    let go_on = &mut |_| ControlFlow::Continue(());
    let answer = generate(&engine, &mut sequence, &prompt, &sampling, go_on)?;
    println!("{}{}", args.prompt, engine.base().tokenizer.decode(&answer));
    Ok(())
}

/// `fleetune-sim export`.
pub fn export(args: &ExportArgs) -> Result<()> {
    let base = open_base(&args.model)?;
    let adapter = open_adapter(&args.adapter, &base)?;
    ensure!(!args.out.exists(), "--out: {} is there already", args.out.display());
    let context = || format!("--out: {}", args.out.display());
    match args.format.as_str() {
        "peft" => {
            let files = to_peft(&adapter, &base.config, &base.config.name);
            write_peft_dir(&files, &args.out).with_context(context)?;
        }
        "gguf" => {
            let bytes = to_gguf_lora(&adapter, &base, WeightFormat::F32, &Metadata::default())?;
            fs::write(&args.out, bytes).with_context(context)?;
        }
        other => bail!("--format: {other:?}; peft or gguf"),
    }
    println!("{}", args.out.display());
    Ok(())
}

/// The model and adapter that the flags name.
pub(crate) fn open(args: &ModelArgs) -> Result<(BaseModel, Option<Adapter>)> {
    let base = open_base(&args.model)?;
    let adapter = args.adapter.as_deref().map(|path| open_adapter(path, &base)).transpose()?;
    Ok((base, adapter))
}

/// An empty sequence under the adapter, if there is one.
pub(crate) fn sequence(engine: &Engine, adapter: Option<&Adapter>) -> Result<Sequence> {
    let loaded = adapter.map(|adapter| engine.load_adapter(adapter)).transpose()?;
    Ok(engine.sequence(loaded))
}

fn open_base(path: &Path) -> Result<BaseModel> {
    BaseModel::open(path).with_context(|| format!("model {}", path.display()))
}

pub(crate) fn open_adapter(path: &Path, base: &BaseModel) -> Result<Adapter> {
    let context = || format!("adapter {}", path.display());
    if path.is_dir() {
        return from_peft(&read_peft_dir(path).with_context(context)?, &base.config).with_context(context);
    }
    from_gguf_lora(&fs::read(path).with_context(context)?, base).with_context(context)
}

fn group_nll(base: &BaseModel, adapter: Option<&Adapter>, blocks: &[Block]) -> Result<GroupNll> {
    ensure!(!blocks.is_empty(), "no blocks");
    let of = |(index, block): (usize, &Block)| {
        token_nlls(base, adapter, &block.ids).with_context(|| format!("block {index}"))
    };
    let token_nll = blocks.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
    let (sum, count) =
        token_nll.iter().flatten().fold((0.0, 0usize), |(sum, n), nll| (sum + f64::from(*nll), n + 1));
    Ok(GroupNll { nll: sum / count as f64, token_nll })
}

#[cfg(test)]
mod tests;
