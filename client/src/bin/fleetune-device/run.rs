//! `fleetune-device run`: the client with a data file, until it is told to stop.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Args;
use fleetune_client::data::load_device;
use fleetune_client::{App, Client, ClientBuilder, Event, ExampleError, GrpcOptions, GrpcTransport};

use crate::certify::parse_certificate;
use crate::settings::{Settings, SettingsArguments, parse_32};

/// Flags of `run`.
#[derive(Args)]
pub(crate) struct RunArguments {
    /// https://HOST[:PORT] of the coordinator, or http:// on this machine.
    #[arg(long, value_name = "URL")]
    coordinator: String,
    /// This user's text: .txt, or .jsonl (gzip or not).
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Directory for what the device keeps.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Exit after that many contributions.
    #[arg(long, value_name = "N")]
    rounds: Option<u64>,
    /// Exit once a release is active. With --rounds, whichever comes first.
    #[arg(long)]
    until_release: bool,
    /// Seed of this device's batches, kept; for comparing with a simulation.
    #[arg(long, value_name = "HEX")]
    device_seed: Option<String>,
    /// Train in less than half the memory and a third more time; --recompute always, for this run.
    #[arg(long)]
    low_memory: bool,
    /// A registrar's certificate for this device (`fleetune-device certify`), kept.
    #[arg(long, value_name = "HEX")]
    certificate: Option<String>,
    #[command(flatten)]
    settings: SettingsArguments,
}

/// Runs until a signal or a goal of the flags.
pub(crate) fn run(arguments: &RunArguments) -> Result<()> {
    let mut client = client(arguments)?;
    if arguments.until_release && client.release_versions().active.is_some() {
        tracing::info!("a release is active already");
        return Ok(());
    }
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signals(&stop)?;
    let mut contributions = 0;
    client.run_with(&stop, &mut |event| {
        contributions += u64::from(matches!(event, Event::Contributed { .. }));
        let released = arguments.until_release && matches!(event, Event::ReleaseActive(_));
        let contributed = arguments.rounds.is_some_and(|rounds| contributions >= rounds);
        if released || contributed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    tracing::info!(contributions, "done");
    Ok(())
}

fn client(arguments: &RunArguments) -> Result<Client<GrpcTransport>> {
    let settings = Settings::load(&arguments.state)?.updated(&arguments.settings)?;
    let (population, trust_root) = (settings.population()?, settings.trust_root()?);
    let app = app(arguments)?;
    let transport = transport(arguments, &settings)?;
    let mut builder = ClientBuilder::new(&arguments.state, population, trust_root)
        .device_class(settings.device_class.as_str())
        .floors(settings.floors()?)
        .registrars(settings.registrars()?);
    builder = settings.training.apply(builder).context("device.toml")?;
    if settings.insecure_allow_unregistered_peers {
        tracing::warn!("this device aggregates with anybody: a coordinator can make its peers up");
    }
    if let Some(certificate) = &arguments.certificate {
        builder = builder.certificate(parse_certificate(certificate).context("--certificate")?);
    }
    if settings.insecure_allow_plaintext_aggregation {
        tracing::warn!("the coordinator may see this device's update by itself");
        builder = builder.insecure_allow_plaintext_aggregation();
    }
    if let Some(seed) = &arguments.device_seed {
        builder = builder.device_seed(parse_32(seed).context("--device-seed")?);
    }
    if arguments.low_memory {
        builder = builder.low_memory();
    }
    let client = builder.build(transport, app)?;
    settings.save(&arguments.state)?;
    Ok(client)
}

/// The file is read at once, so that a broken one is told before anything runs, and again at each
/// training, so that new text counts. A user's test texts are not trained on.
fn app(arguments: &RunArguments) -> Result<App> {
    load_device(&arguments.data)?;
    let data = arguments.data.clone();
    let examples = move || Ok::<_, ExampleError>(load_device(&data)?.train);
    Ok(App::new(examples, || Ok(()), |_: &_| true))
}

fn transport(arguments: &RunArguments, settings: &Settings) -> Result<GrpcTransport> {
    let ca_pem = match &settings.ca {
        Some(path) => Some(fs::read(path).with_context(|| format!("cannot read {}", path.display()))?),
        None => None,
    };
    let options = GrpcOptions {
        coordinator: arguments.coordinator.clone(),
        ca_pem,
        insecure_plaintext_remote: settings.insecure_plaintext_remote,
    };
    Ok(GrpcTransport::new(&options)?)
}

/// The first signal asks the client to stop and to say so, the second one ends the process.
fn stop_on_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let stop = Arc::clone(stop);
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            while next_signal().await.is_ok() {
                if stop.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                tracing::info!("stopping");
            }
        });
    })?;
    Ok(())
}

#[cfg(unix)]
async fn next_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(not(unix))]
async fn next_signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}
