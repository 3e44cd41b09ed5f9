//! `fleetune-device generate`: a text continued by the model that serves here.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::Args;
use fleetune_client::release::{ReleaseSlots, ReleasedModel};
use fleetune_model::generate::{Sampling, generate as continue_ids};
use fleetune_model::infer::Engine;

/// Flags of `generate`.
#[derive(Args)]
pub(crate) struct GenerateArguments {
    /// The device's directory.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Text to continue.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// New tokens at most.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// 0 always takes the most likely token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Seed of the choices.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Writes the prompt and its continuation to standard output, each token as it is made.
pub(crate) fn generate(arguments: &GenerateArguments) -> Result<()> {
    ensure!(
        arguments.temperature.is_finite() && arguments.temperature >= 0.0,
        "--temperature must be 0 or more"
    );
    ensure!(arguments.state.is_dir(), "no state directory {}", arguments.state.display());
    let model = ReleaseSlots::open(&arguments.state)?.open_model()?;
    let model = model.with_context(|| format!("no release is active in {}", arguments.state.display()))?;
    let tokenizer = &model.base.tokenizer;
    let mut out = io::stdout().lock();
    write!(out, "{}", arguments.prompt)?;
    let mut written = Ok(());
    let mut write_token = |token| {
        written = out.write_all(&tokenizer.token_bytes(token)).and_then(|()| out.flush());
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    continue_prompt(&model, arguments, &mut write_token)?;
    written?;
    writeln!(out)?;
    Ok(())
}

fn continue_prompt(
    model: &ReleasedModel,
    arguments: &GenerateArguments,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<()> {
    let sampling = Sampling {
        temperature: arguments.temperature,
        seed: arguments.seed,
        max_tokens: arguments.max_tokens,
        ..Sampling::default()
    };
    let prompt = model.base.tokenizer.encode(&arguments.prompt, true);
    let engine = Engine::new(Arc::clone(&model.base));
    let adapter = model.adapter.as_ref().map(|adapter| engine.load_adapter(adapter)).transpose()?;
    let mut sequence = engine.sequence(adapter);
    continue_ids(&engine, &mut sequence, &prompt, &sampling, on_token)?;
    Ok(())
}
