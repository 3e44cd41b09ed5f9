//! A notes app that takes part in a fleet: everything an app writes to embed fleetune.
//!
//! `cargo run --example embed -- https://coordinator.example TRUSTED_KEY REGISTRAR_KEY`, both in hexadecimal

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use fleetune_client::{
    App, ClientBuilder, Conditions, Consent, ExampleError, ExampleSource, GrpcOptions, GrpcTransport, Name,
    Registrars, TaskOffer, TrustRoot,
};

/// The user's notes, one a file. They stay on the device.
struct Notes(PathBuf);

impl ExampleSource for Notes {
    fn texts(&self) -> Result<Vec<String>, ExampleError> {
        let mut files: Vec<_> =
            fs::read_dir(&self.0)?.map(|entry| Ok(entry?.path())).collect::<Result<_, ExampleError>>()?;
        files.sort();
        files.into_iter().map(|file| Ok(fs::read_to_string(file)?)).collect()
    }
}

/// Plugged in. An app adds what matters to it: an unmetered network, an idle screen, a cool battery.
struct OnPower;

impl Conditions for OnPower {
    fn hold(&self) -> Result<(), String> {
        match fs::read_to_string("/sys/class/power_supply/AC/online") {
            Ok(online) if online.trim() == "0" => Err("on battery".to_owned()),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

/// What the user switched on in the app's settings.
struct Agreed(Vec<&'static str>);

impl Consent for Agreed {
    fn allows(&self, task: &TaskOffer) -> bool {
        self.0.contains(&task.task.as_str())
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let coordinator = arguments.next().context("first argument: the coordinator's address")?;
    let mut key = [0; 32];
    hex::decode_to_slice(arguments.next().context("second argument: the trusted key")?, &mut key)?;
    let mut registrar = [0; 32];
    hex::decode_to_slice(arguments.next().context("third argument: the registrar's key")?, &mut registrar)?;

    let transport = GrpcTransport::new(&GrpcOptions { coordinator, ..GrpcOptions::default() })?;
    let app = App::new(Notes("notes".into()), OnPower, Agreed(vec!["next-word"]));
    let mut client =
        ClientBuilder::new("fleetune-state", Name::parse("population", "notes")?, TrustRoot::new(&[key], 1)?)
            .device_class("desktop")
            .registrars(Registrars::from_keys(&[registrar])?)
            .build(transport, app)?;

    let stop = Arc::new(AtomicBool::new(false));
    let closing = Arc::clone(&stop);
    let background = std::thread::spawn(move || client.run(&closing));
    std::thread::sleep(Duration::from_secs(3600)); // the app lives its life
    stop.store(true, Ordering::Relaxed);
    background.join().ok().context("the client's thread panicked")
}
