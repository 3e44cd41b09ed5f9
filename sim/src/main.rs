//! The program `fleetune-sim`.

use clap::{Parser, Subcommand};
use fleetune_sim::{account, bench, chat, classify, pretrain, quantize, run, tools};
use tracing_subscriber::EnvFilter;

/// Simulates federated fine-tuning fleets on one machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a simulated fleet and compare it with central training and training alone.
    Run(run::RunArgs),
    /// Print the NLL of blocks of token ids.
    Eval(tools::EvalArgs),
    /// Print the token ids of texts.
    Tokenize(tools::TokenizeArgs),
    /// Write an adapter in another format.
    Export(tools::ExportArgs),
    /// Write a model in another weight format.
    Quantize(quantize::QuantizeArgs),
    /// Continue a text.
    Generate(tools::GenerateArgs),
    /// Talk with a model that has a chat template.
    Chat(chat::ChatArgs),
    /// Classify texts with an encoder of the BERT family.
    #[command(subcommand)]
    Classify(classify::Command),
    /// Plan a private run: what a mechanism gives away, and how much noise an epsilon needs.
    #[command(subcommand)]
    Account(account::Command),
    /// Measure parts of the system by themselves.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Train a small base model from plain text.
    Pretrain(pretrain::PretrainArgs),
}

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match Arguments::parse().command {
        Command::Run(args) => run::run(&args).map(|_| ()),
        Command::Eval(args) => tools::eval(&args),
        Command::Tokenize(args) => tools::tokenize(&args),
        Command::Export(args) => tools::export(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Generate(args) => tools::generate_text(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Classify(command) => classify::run(&command),
        Command::Account(command) => account::run(&command),
        Command::Bench(command) => bench::run(&command),
        Command::Pretrain(args) => pretrain::run(&args),
    }
}
