//! `fleetune-sim bench`: parts of the system measured by themselves.

mod meter;
mod secagg;

use anyhow::Result;

/// What to measure.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// One session of secure aggregation in one process, over the state machines that ship.
    Secagg(SecaggArgs),
}

/// Measures and prints.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Secagg(args) => secagg::run(args),
    }
}

pub use secagg::{Measured, SecaggArgs, measure};
