//! `fleetune-sim bench`: parts of the system measured by themselves.

mod engine;
mod meter;
mod secagg;

use anyhow::Result;

/// What to measure.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// One session of secure aggregation in one process, over the state machines that ship.
    Secagg(SecaggArgs),
    /// LoRA training steps on one thread.
    Train(TrainArgs),
    /// Reading a prompt and writing after it, on one thread.
    Infer(InferArgs),
}

/// Measures and prints.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Secagg(args) => secagg::run(args),
        Command::Train(args) => engine::train(args),
        Command::Infer(args) => engine::infer(args),
    }
}

pub use engine::{InferArgs, TrainArgs};
pub use secagg::{Measured, SecaggArgs, measure};
