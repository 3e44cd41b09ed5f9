//! The configuration file. Its defaults are the values of `coordinator.sample.toml`, over which a file is
//! laid; so the sample cannot drift from them. How a task's table becomes a [`TaskSpec`] is in
//! `config/task.rs`.

mod task;

pub use task::TaskConfig;

use crate::PacePolicy;
use ed25519_dalek::{SigningKey, pkcs8::DecodePrivateKey};
use fleetune_proto::Name;
use fleetune_secagg::Registrars;
use serde::Deserialize;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};
use thiserror::Error;
use toml::{Table, Value};

/// The sample, which is also the defaults.
pub const SAMPLE: &str = include_str!("../coordinator.sample.toml");

/// The environment variable that holds the signing key as PEM.
pub const SIGNING_KEY_VARIABLE: &str = "FLEETUNE_SIGNING_KEY";

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no such configuration.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// A setting has a value that makes no sense.
    #[error("{}: {setting}: {problem}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The setting.
        setting: String,
        /// What is wrong.
        problem: String,
    },
}

/// Everything `serve` needs, with absolute or working-directory-relative paths.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The devices served.
    pub population: Name,
    /// The signing key's file.
    pub signing_key_file: PathBuf,
    /// Where and how to listen.
    pub listen: Listen,
    /// Where state is kept.
    pub storage: Storage,
    /// When devices come back.
    pub pace: PacePolicy,
    /// Updates received at once.
    pub upload_slots: usize,
    /// Who certifies the devices of secure aggregation.
    pub registrars: Registrars,
    /// The tasks.
    pub tasks: Vec<TaskConfig>,
}

/// Where and how to listen.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// PEM chain; empty for plaintext.
    pub certificate_file: PathBuf,
    /// PEM key of the certificate.
    pub key_file: PathBuf,
    /// Plaintext on any address.
    pub insecure_plaintext_listen: bool,
    /// Calls worked on at once.
    pub calls_max: usize,
    /// Blobs streamed at once.
    pub downloads_max: usize,
    /// A call that takes longer is given up.
    pub call_timeout_ms: u64,
}

/// Where state is kept.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// The SQLite file.
    pub database: PathBuf,
    /// The folder of blobs.
    pub blobs: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    population: String,
    signing_key_file: PathBuf,
    registrars: Vec<String>,
    insecure_unregistered_devices: bool,
    listen: Listen,
    storage: Storage,
    pace: Pace,
    uploads: Uploads,
    task: Vec<task::Table>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pace {
    soon_ms: u64,
    idle_ms_min: u64,
    idle_ms_max: u64,
    check_ins_per_second_max: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Uploads {
    slots: usize,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the setting.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// Parses the text of `path`, laid over the sample.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the setting.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let in_file = |source| ConfigError::Parse { path: path.to_owned(), source };
        let own: Table = toml::from_str(text).map_err(in_file)?;
        required(path, &own)?;
        let file: File = over_sample(own).try_into().map_err(in_file)?;
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        let registrars = registrars(path, &file)?;
        let config = Self {
            registrars,
            population: parse_name(path, "population", &file.population)?,
            signing_key_file: folder.join(file.signing_key_file),
            listen: file.listen.in_folder(folder),
            storage: Storage {
                database: folder.join(file.storage.database),
                blobs: folder.join(file.storage.blobs),
            },
            pace: PacePolicy {
                soon_ms: file.pace.soon_ms,
                idle_ms_min: file.pace.idle_ms_min,
                idle_ms_max: file.pace.idle_ms_max,
                check_ins_per_second_max: file.pace.check_ins_per_second_max,
            },
            upload_slots: file.uploads.slots,
            tasks: file.task.into_iter().map(|task| task.check(path, folder)).collect::<Result<_, _>>()?,
        };
        config.check(path)?;
        Ok(config)
    }

    /// The signing key: from the environment, else from its file.
    ///
    /// # Errors
    /// [`ConfigError`]; the key itself is in no message.
    pub fn signing_key(&self) -> Result<SigningKey, ConfigError> {
        let (path, pem) = match std::env::var(SIGNING_KEY_VARIABLE) {
            Ok(pem) => (PathBuf::from(SIGNING_KEY_VARIABLE), pem),
            Err(_) => {
                let path = self.signing_key_file.clone();
                let pem = std::fs::read_to_string(&path);
                (path.clone(), pem.map_err(|source| ConfigError::Read { path, source })?)
            }
        };
        SigningKey::from_pkcs8_pem(&pem)
            .map_err(|_| setting(&path, "signing key", "not an Ed25519 key in PKCS #8 PEM"))
    }

    /// Refuses to serve secure aggregation to devices that nobody certifies: the coordinator, or anybody,
    /// could surround a device with peers of its own making.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] says which settings there are.
    pub fn check_registrars(&self) -> Result<(), ConfigError> {
        let secure = self.tasks.iter().find(|task| task.is_secure());
        match secure.filter(|_| self.registrars.is_empty()) {
            None => Ok(()),
            Some(task) => Err(ConfigError::Setting {
                path: PathBuf::from("configuration"),
                setting: "registrars".into(),
                problem: format!(
                    "task {} aggregates securely among certified devices: name the registrars' public keys, \
                     or set insecure_unregistered_devices",
                    task.name()
                ),
            }),
        }
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let listen = &self.listen;
        let tls = listen.is_tls();
        if tls == listen.key_file.as_os_str().is_empty() {
            return Err(setting(path, "listen.key_file", "certificate_file and key_file come together"));
        }
        let rules = [
            ("listen.calls_max", listen.calls_max > 0, "at least 1"),
            ("listen.downloads_max", listen.downloads_max > 0, "at least 1"),
            ("listen.call_timeout_ms", listen.call_timeout_ms > 0, "at least 1"),
            ("uploads.slots", self.upload_slots > 0, "at least 1"),
            ("pace.idle_ms_max", self.pace.idle_ms_max >= self.pace.idle_ms_min, "at least pace.idle_ms_min"),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            Some((name, _, problem)) => Err(setting(path, name, problem)),
            None => Ok(()),
        }
    }
}

impl Listen {
    /// True with a certificate.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        !self.certificate_file.as_os_str().is_empty()
    }

    fn in_folder(self, folder: &Path) -> Self {
        let join = |file: PathBuf| if file.as_os_str().is_empty() { file } else { folder.join(file) };
        Self { certificate_file: join(self.certificate_file), key_file: join(self.key_file), ..self }
    }
}

fn registrars(path: &Path, file: &File) -> Result<Registrars, ConfigError> {
    if file.insecure_unregistered_devices {
        return Ok(Registrars::InsecureAnyone);
    }
    let parse = |text: &String| {
        let mut key = [0; 32];
        let read = hex::decode_to_slice(text, &mut key);
        read.map(|()| key)
            .map_err(|_| setting(path, "registrars", &format!("{text:?}: not 64 hexadecimal digits")))
    };
    let keys = file.registrars.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    Registrars::from_keys(&keys).map_err(|error| setting(path, "registrars", &error.to_string()))
}

/// The few settings that have no sensible default.
fn required(path: &Path, own: &Table) -> Result<(), ConfigError> {
    let missing = |table: &Table, key: &str| !table.contains_key(key);
    if missing(own, "population") {
        return Err(setting(path, "population", "missing"));
    }
    let tasks = own.get("task").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for (index, task) in tasks.iter().enumerate() {
        for key in ["name", "base_model"] {
            if task.as_table().is_some_and(|task| missing(task, key)) {
                return Err(setting(path, &format!("task {index}: {key}"), "missing"));
            }
        }
    }
    Ok(())
}

/// Each task is laid over the sample's only one; the rest key by key.
fn over_sample(mut own: Table) -> Table {
    let mut table: Table = toml::from_str(SAMPLE).expect("the sample parses");
    let sample_task = table.remove("task").and_then(|tasks| tasks.as_array()?.first()?.as_table().cloned());
    let sample_task = sample_task.expect("the sample has a task");
    if let Some(Value::Array(tasks)) = own.get_mut("task") {
        for task in tasks.iter_mut() {
            if let Value::Table(own) = std::mem::replace(task, Value::Table(sample_task.clone()))
                && let Value::Table(table) = task
            {
                lay_over(table, own);
            }
        }
    }
    table.insert("task".into(), Value::Array(Vec::new()));
    lay_over(&mut table, own);
    table
}

fn lay_over(table: &mut Table, own: Table) {
    for (key, value) in own {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(own)) => lay_over(below, own),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

fn parse_name(path: &Path, name: &'static str, text: &str) -> Result<Name, ConfigError> {
    Name::parse(name, text).map_err(|error| setting(path, name, &error.to_string()))
}

fn setting(path: &Path, setting: &str, problem: &str) -> ConfigError {
    ConfigError::Setting { path: path.to_owned(), setting: setting.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
        population = "sample"
        [[task]]
        name = "sample-task"
        base_model = "base.gguf"
    "#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("etc/c.toml"), text)
    }

    #[test]
    fn the_sample_is_the_defaults() {
        let config = parse(SAMPLE).unwrap();
        assert_eq!(parse(LEAST).unwrap(), config);
        assert_eq!(config.storage.database, Path::new("etc/coordinator.sqlite"));
        assert_eq!(config.tasks[0].spec(fleetune_proto::UnixMillis(5)).expires.0, 5 + 90 * 24 * 3600 * 1000);
    }

    #[test]
    fn secure_aggregation_is_not_served_to_devices_that_nobody_certifies() {
        let error = parse(LEAST).unwrap().check_registrars().unwrap_err().to_string();
        assert!(error.contains("registrars: task sample-task aggregates securely"), "{error}");
        let open = parse(&format!("insecure_unregistered_devices = true\n{LEAST}")).unwrap();
        assert!(open.check_registrars().is_ok());
        let plain = LEAST.replace("base.gguf\"", "b\"\naggregation.protocol = \"insecure_plaintext\"");
        assert!(parse(&plain).unwrap().check_registrars().is_ok());
    }

    #[test]
    fn errors_name_the_file_and_the_setting() {
        let check = |text: &str, expected: &str| {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("etc/c.toml: ") && error.contains(expected), "{error}");
        };
        check("", "population: missing");
        check("population = \"A\"", "population");
        check("population = \"a\"\nlisten = 3", "listen");
        check("population = \"a\"\n[[task]]\nname = \"t\"", "task 0: base_model: missing");
        check(&format!("{LEAST}\nturns = 3"), "unknown field `turns`");
        check(&format!("{LEAST}\n[listen]\ncertificate_file = \"a.pem\""), "listen.key_file");
        check(&format!("{LEAST}\n[uploads]\nslots = 0"), "uploads.slots: at least 1");
        check(&LEAST.replace("base.gguf\"", "b\"\nadapter.targets = [\"head\"]"), "adapter.targets");
        check(&LEAST.replace("base.gguf\"", "b\"\nadapter.wrong = 1"), "unknown field `wrong`");
        check(&LEAST.replace("base.gguf\"", "b\"\ntrains = \"head\""), "task sample-task: trains: \"head\"");
        check(&LEAST.replace("base.gguf\"", "b\"\nrelease_format = \"q4_0\""), "release_format: \"q4_0\"");
        check(
            &LEAST.replace("base.gguf\"", "b\"\naggregation.protocol = \"secagg\""),
            "aggregation.protocol",
        );
        check(
            &LEAST.replace("base.gguf\"", "b\"\naggregation.mask_suite = \"des\""),
            "aggregation.mask_suite",
        );
        check(
            &LEAST.replace("base.gguf\"", "b\"\naggregation.dropout_permille = 500"),
            "aggregation: 100 permille corrupted and 500 permille dropouts",
        );
        check(&format!("registrars = [\"00\"]\n{LEAST}"), "registrars: \"00\"");
        let weak = format!("registrars = [\"01{}\"]\n{LEAST}", "00".repeat(31));
        check(&weak, "registrars: the public key is malformed or weak");
        check(&LEAST.replace("base.gguf\"", "b\"\naggregation.ring_bits = 7"), "aggregation.ring_bits");
        check(&LEAST.replace("base.gguf\"", "b\"\ntraining.optimizer = \"lion\""), "training.optimizer");
        check(
            &LEAST.replace("base.gguf\"", "b\"\nserver_optimizer.kind = \"adam\""),
            "server_optimizer.kind",
        );
    }
}
