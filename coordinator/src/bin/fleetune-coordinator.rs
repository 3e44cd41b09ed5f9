//! `fleetune-coordinator`: serves tasks to devices, makes a signing key, shows where tasks stand.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use ed25519_dalek::{SigningKey, pkcs8::EncodePrivateKey, pkcs8::spki::der::pem::LineEnding};
use fleetune_coordinator::{config::Config, serve::Server, store::Store};
use std::{
    fs,
    io::{IsTerminal, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use tokio::signal::unix::{SignalKind, signal};

/// The coordinator of a fleet that fine-tunes a model together.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves until SIGTERM or SIGINT.
    Serve {
        /// The configuration; coordinator.sample.toml shows every setting.
        #[arg(long)]
        config: PathBuf,
        /// Address instead of the configured one; port 0 takes a free port.
        #[arg(long)]
        listen: Option<SocketAddr>,
        /// Written with the address once it is listened on.
        #[arg(long)]
        ready_file: Option<PathBuf>,
    },
    /// Makes a signing key and prints its public half, which devices are given to trust.
    Keygen {
        /// The new file; it must not exist.
        #[arg(long)]
        out: PathBuf,
    },
    /// Shows tasks, rounds and releases from the store, also while it is served from.
    Status {
        /// The configuration.
        #[arg(long)]
        config: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    match Arguments::parse().command {
        Command::Serve { config, listen, ready_file } => serve(&config, listen, ready_file.as_deref()).await,
        Command::Keygen { out } => keygen(&out),
        Command::Status { config, json } => status(&config, json).await,
    }
}

async fn serve(config: &Path, listen: Option<SocketAddr>, ready_file: Option<&Path>) -> Result<()> {
    let config = Config::load(config)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = Server::bind(&config, listen).await?;
    let address = server.address();
    tracing::info!(%address, population = %config.population, tasks = config.tasks.len(), "serving");
    if let Some(path) = ready_file {
        write_whole(path, address.to_string().as_bytes())?;
    }
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    };
    Ok(server.run(shutdown).await?)
}

fn keygen(out: &Path) -> Result<()> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("no randomness")?;
    let key = SigningKey::from_bytes(&seed);
    let pem = key.to_pkcs8_pem(LineEnding::LF).context("the key cannot be written as PEM")?;
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(out);
    let mut file = file.with_context(|| format!("cannot create {}", out.display()))?;
    file.write_all(pem.as_bytes())
        .and_then(|()| file.sync_all())
        .with_context(|| out.display().to_string())?;
    say(&hex::encode(key.verifying_key().to_bytes()))
}

async fn status(config: &Path, json: bool) -> Result<()> {
    let config = Config::load(config)?;
    let store = Store::open_to_read(&config.storage, &config.population).await?;
    let mut tasks = Vec::new();
    for task in store.tasks().await? {
        let attempts = store.rounds(&task.name).await?;
        tasks.push(serde_json::json!({
            "task": task.name.as_str(),
            "round": task.progress.as_ref().map_or(0, |progress| progress.round),
            "rounds": task.rounds,
            "checkpoint": task.progress.as_ref().map(|progress| progress.checkpoint.hex()),
            "attempts": attempts,
            "privacy_ledger": store.charges(&task.name).await?,
        }));
    }
    let releases = store.releases().await?.into_iter().map(|release| {
        serde_json::json!({
            "version": release.version(),
            "task": release.manifest.task.as_str(),
            "adapter": release.manifest.adapter.map(|adapter| adapter.hex()),
            "base_model": release.manifest.base_model.hex(),
            "rounds": release.manifest.rounds,
            "created_unix_ms": release.manifest.created.0,
            "expires_unix_ms": release.manifest.expires.0,
            "privacy_statement": release.manifest.privacy_statement,
        })
    });
    let status = serde_json::json!({
        "population": config.population.as_str(),
        "tasks": tasks,
        "releases": releases.collect::<Vec<_>>(),
    });
    if json { say(&serde_json::to_string_pretty(&status)?) } else { say(&table(&status)) }
}

/// The same for people: a line a task, a line an attempt, a line a release.
fn table(status: &serde_json::Value) -> String {
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut lines = vec![format!("population {}", text(&status["population"]))];
    for task in list(&status["tasks"]) {
        lines.push(format!("task {}: round {} of {}", text(&task["task"]), task["round"], task["rounds"]));
        for attempt in list(&task["attempts"]) {
            let outcome = match attempt["outcome"]["Failed"].as_str() {
                Some(reason) => format!("failed: {reason}"),
                None => format!("finished, update norm {}", attempt["update_norm"]),
            };
            lines.push(format!(
                "  round {} attempt {}: {} selected, {} completed, {} withdrawn; {outcome}",
                attempt["round"],
                attempt["attempt"],
                attempt["selected"],
                attempt["completed"],
                attempt["withdrawn"]
            ));
        }
        for sum in list(&task["privacy_ledger"]) {
            lines.push(format!(
                "  round {} attempt {} cohort {}: {} opened, {} survivors, rho {:.5}, epsilon {:.3} at delta {:e}",
                sum["round"],
                sum["attempt"],
                sum["cohort"],
                text(&sum["purpose"]),
                sum["survivors"],
                sum["rho"].as_f64().unwrap_or(f64::NAN),
                sum["epsilon"].as_f64().unwrap_or(f64::NAN),
                sum["delta"].as_f64().unwrap_or(f64::NAN)
            ));
        }
    }
    for release in list(&status["releases"]) {
        let made = match release["adapter"].as_str() {
            Some(adapter) => format!("adapter {adapter}"),
            None => format!("model {}", text(&release["base_model"])),
        };
        lines.push(format!("release {}: task {}, {made}", release["version"], text(&release["task"])));
        lines.push(format!("  {}", text(&release["privacy_statement"])));
    }
    lines.join("\n")
}

/// Whole or not at all: whoever waits for the file must not read half an address.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    let written = fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn say(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}
