//! The reference device: the client crate with a file for its data and flags for its conditions.
//!
//! `run` is in `run.rs`, what is kept between runs in `settings.rs`; `generate`, `privacy` and `status` only
//! read.

mod certify;
mod generate;
mod privacy;
mod run;
mod settings;
mod status;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(name = "fleetune-device", version, about = "A device of a fleetune fleet.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take part: check in, train on own data, contribute, install releases.
    Run(Box<run::RunArguments>),
    /// Continue a text with the model that serves on this device.
    Generate(generate::GenerateArguments),
    /// Print this device's public key, for a registrar to certify.
    Identity(certify::IdentityArguments),
    /// Certify a device: what a registrar does. Prints the certificate.
    Certify(certify::CertifyArguments),
    /// Show what this device has given away, what it allows, and what its model's makers promise.
    Privacy(privacy::PrivacyArguments),
    /// Show what this device holds.
    Status(status::StatusArguments),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let done = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Generate(arguments) => generate::generate(&arguments),
        Command::Identity(arguments) => certify::identity(&arguments),
        Command::Certify(arguments) => certify::certify(&arguments),
        Command::Privacy(arguments) => privacy::privacy(&arguments),
        Command::Status(arguments) => status::status(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
