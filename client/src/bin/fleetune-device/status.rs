//! `fleetune-device status`: what a state directory holds.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use fleetune_client::blobs::BlobStore;
use fleetune_client::identity;
use fleetune_client::release::{ReleaseSlots, ReleaseVersions};
use serde::Serialize;

use crate::settings::Settings;

/// Flags of `status`.
#[derive(Args)]
pub(crate) struct StatusArguments {
    /// The device's directory.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Status {
    population: Option<String>,
    device_class: String,
    public_key: String,
    certified_until_unix_ms: Option<u64>,
    registrars: Vec<String>,
    releases: ReleaseVersions,
    release: Option<Release>,
    blobs: u64,
    blob_bytes: u64,
}

#[derive(Serialize)]
struct Release {
    task: String,
    rounds: u32,
    created_unix_ms: u64,
    base_model_sha256: String,
    /// Absent when the base is a fully trained model.
    adapter_sha256: Option<String>,
    privacy_statement: String,
}

/// Prints the status; takes no hold of the directory, so it works while the device runs.
pub(crate) fn status(arguments: &StatusArguments) -> Result<()> {
    ensure!(arguments.state.is_dir(), "no state directory {}", arguments.state.display());
    let status = read(arguments)?;
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&status)?)?;
    } else {
        print(&status, &mut out)?;
    }
    Ok(())
}

fn read(arguments: &StatusArguments) -> Result<Status> {
    let settings = Settings::load(&arguments.state)?;
    let slots = ReleaseSlots::open(&arguments.state)?;
    let releases = slots.versions();
    let manifest = releases.active.map(|version| slots.manifest(version)).transpose()?;
    let (blobs, blob_bytes) = BlobStore::open(arguments.state.join("blobs"))?.usage()?;
    let release = manifest.map(|manifest| Release {
        task: manifest.task.to_string(),
        rounds: manifest.rounds,
        created_unix_ms: manifest.created.0,
        base_model_sha256: manifest.base_model.hex(),
        adapter_sha256: manifest.adapter.map(|adapter| adapter.hex()),
        privacy_statement: manifest.privacy_statement,
    });
    let public_key = hex::encode(identity::public_key(&arguments.state)?);
    let certified_until_unix_ms =
        identity::certificate(&arguments.state)?.map(|certificate| certificate.expires_unix_ms);
    let Settings { population, device_class, registrars, .. } = settings;
    Ok(Status {
        population,
        device_class,
        public_key,
        certified_until_unix_ms,
        registrars,
        releases,
        release,
        blobs,
        blob_bytes,
    })
}

fn print(status: &Status, out: &mut impl Write) -> io::Result<()> {
    let version = |version: Option<u64>| version.map_or_else(|| "none".to_owned(), |v| v.to_string());
    writeln!(out, "population  {}", status.population.as_deref().unwrap_or("not known"))?;
    writeln!(out, "class       {}", status.device_class)?;
    let until = status.certified_until_unix_ms.map(|at| format!("certified until {at} ms since 1970"));
    writeln!(out, "identity    {}, {}", status.public_key, until.as_deref().unwrap_or("not certified"))?;
    writeln!(out, "registrars  {}", status.registrars.len())?;
    writeln!(out, "release     {}", version(status.releases.active))?;
    writeln!(out, "previous    {}", version(status.releases.previous))?;
    if let Some(release) = &status.release {
        writeln!(out, "trained by  task {}, {} rounds", release.task, release.rounds)?;
        match &release.adapter_sha256 {
            Some(adapter) => {
                writeln!(out, "base        {}", release.base_model_sha256)?;
                writeln!(out, "adapter     {adapter}")?;
            }
            None => writeln!(out, "model       {}, fully trained", release.base_model_sha256)?,
        }
        writeln!(out, "privacy     {}", release.privacy_statement)?;
    }
    writeln!(out, "blobs       {}, {} bytes", status.blobs, status.blob_bytes)
}
