//! The program `fleetune-sim`.

use clap::{Parser, Subcommand};
use fleetune_sim::{pretrain, run};
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
    /// Train a small base model from plain text.
    Pretrain(pretrain::PretrainArgs),
}

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match Arguments::parse().command {
        Command::Run(args) => run::run(&args).map(|_| ()),
        Command::Pretrain(args) => pretrain::run(&args),
    }
}
