//! What `run` is told once and keeps in `STATE/device.toml`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use fleetune_client::files::write_atomically;
use fleetune_client::{ClientBuilder, DeviceFloors, Name, Registrars, TrustRoot};
use fleetune_model::train::{Precision, Recompute, WhenShort};
use fleetune_privacy::{Delta, PrivacyPolicy};
use serde::{Deserialize, Serialize};

/// Settings as flags; one that is given replaces the one kept.
#[derive(Args, Default)]
pub(crate) struct SettingsArguments {
    /// Population of this device.
    #[arg(long, value_name = "NAME")]
    pub population: Option<String>,
    /// Ed25519 public key that this device trusts for plans and releases; may be given several times.
    #[arg(long = "trust-key", value_name = "HEX")]
    pub trust_keys: Vec<String>,
    /// Trusted keys that must have signed [default: 1].
    #[arg(long, value_name = "N")]
    pub trust_threshold: Option<usize>,
    /// PEM certificates that sign the coordinator's [default: the public web's].
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Device class; many devices must share it.
    #[arg(long = "class", value_name = "NAME")]
    pub device_class: Option<String>,
    /// Let the coordinator see this device's update by itself. Tests and trusted silos only.
    #[arg(long)]
    pub insecure_allow_plaintext_aggregation: bool,
    /// Speak http:// to another machine: everybody on the way reads and changes what passes.
    #[arg(long)]
    pub insecure_plaintext_remote: bool,
    /// Ed25519 public key of a registrar, who certifies the devices of secure aggregation; may be given
    /// several times.
    #[arg(long = "registrar", value_name = "HEX")]
    pub registrars: Vec<String>,
    /// Aggregate with anybody: a coordinator that makes peers up learns this device's update. Tests only.
    #[arg(long)]
    pub insecure_allow_unregistered_peers: bool,
    /// Fewest devices of a cohort of secure aggregation.
    #[arg(long, value_name = "N")]
    pub cohort_min: Option<u32>,
    /// Fewest devices in any sum.
    #[arg(long, value_name = "N")]
    pub survivors_min: Option<u32>,
    /// Take part only with differential privacy.
    #[arg(long)]
    pub require_privacy: bool,
    /// Most epsilon that one task may cost with all its participations; at `privacy.delta` of device.toml.
    #[arg(long, value_name = "E")]
    pub epsilon_task_max: Option<f64>,
    /// Most epsilon that everything may cost over the device's life.
    #[arg(long, value_name = "E")]
    pub epsilon_max: Option<f64>,
    /// Most memory of a training in MB, the base model included; 0: no bound.
    #[arg(long, value_name = "MB")]
    pub memory_mb: Option<u64>,
    /// Most seconds of a training; 0: no bound.
    #[arg(long, value_name = "S")]
    pub time_s: Option<u64>,
    /// What happens when a training's steps do not fit in --time-s.
    #[arg(long, value_enum)]
    pub when_short: Option<Short>,
    /// Factors of training's large products: bf16 is faster where the processor multiplies it.
    #[arg(long, value_enum)]
    pub precision: Option<Factors>,
    /// Threads that train.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Run layers again in training's backward pass: less memory, more time.
    #[arg(long, value_enum)]
    pub recompute: Option<Again>,
}

/// What happens when a training's steps do not fit in the time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Short {
    /// Those that fit are done.
    #[default]
    FewerSteps,
    /// None is done.
    Refuse,
}

/// Number format of the factors of products.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Factors {
    /// Single precision.
    #[default]
    F32,
    /// bf16 with f32 sums.
    Bf16,
}

/// Whether layers run again in the backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Again {
    /// Where the memory bound asks for it.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

/// The file. Every field may be edited by the device's owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// See [`SettingsArguments`].
    pub population: Option<String>,
    pub trust_keys: Vec<String>,
    pub trust_threshold: usize,
    pub ca: Option<PathBuf>,
    pub device_class: String,
    pub insecure_allow_plaintext_aggregation: bool,
    pub insecure_plaintext_remote: bool,
    pub registrars: Vec<String>,
    pub insecure_allow_unregistered_peers: bool,
    /// No plan may go below these, whoever signed it.
    pub floors: Floors,
    /// What may be given away, whoever asks.
    pub privacy: Privacy,
    /// How this device trains.
    pub training: Training,
}

/// How the device trains, and within which bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Training {
    /// Most memory in MB, the base model included; 0: no bound.
    pub memory_mb: u64,
    /// Most seconds; 0: no bound.
    pub time_s: u64,
    pub when_short: Short,
    pub precision: Factors,
    pub threads: usize,
    pub recompute: Again,
}

/// [`PrivacyPolicy`] as it stands in the file. Epsilons are at `delta`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Privacy {
    /// Take part only with differential privacy.
    pub required: bool,
    pub delta: f64,
    pub epsilon_task_max: f64,
    pub epsilon_training_max: f64,
    pub epsilon_evaluation_max: f64,
    pub epsilon_telemetry_max: f64,
    pub epsilon_max: f64,
    /// Least hours between two contributions to a task, whatever its plan says.
    pub separation_hours_min: f64,
}

/// The numbers among [`DeviceFloors`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Floors {
    pub summands_min: u32,
    pub clipping_norm_max: f32,
    pub base_model_bytes_max: u64,
    pub steps_max: u32,
    pub cohort_min: u32,
    pub survivors_min: u32,
    pub corrupted_permille: u32,
    pub dropout_permille: u32,
    pub sigma: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            population: None,
            trust_keys: Vec::new(),
            trust_threshold: 1,
            ca: None,
            device_class: "reference".to_owned(),
            insecure_allow_plaintext_aggregation: false,
            insecure_plaintext_remote: false,
            registrars: Vec::new(),
            insecure_allow_unregistered_peers: false,
            floors: Floors::default(),
            privacy: Privacy::default(),
            training: Training::default(),
        }
    }
}

impl Default for Training {
    fn default() -> Self {
        Self {
            memory_mb: 0,
            time_s: 0,
            when_short: Short::default(),
            precision: Factors::default(),
            threads: 1,
            recompute: Again::default(),
        }
    }
}

impl Training {
    /// The same told to the client.
    pub(crate) fn apply(&self, mut builder: ClientBuilder) -> Result<ClientBuilder> {
        ensure!((1..=THREADS_MAX).contains(&self.threads), "training.threads: 1 to {THREADS_MAX}");
        ensure!(self.time_s <= TIME_S_MAX, "training.time_s: at most {TIME_S_MAX}");
        builder = builder.threads(self.threads).precision(match self.precision {
            Factors::F32 => Precision::F32,
            Factors::Bf16 => Precision::Bf16,
        });
        builder = builder.recompute(match self.recompute {
            Again::Auto => Recompute::Auto,
            Again::Always => Recompute::Always,
            Again::Never => Recompute::Never,
        });
        if self.memory_mb > 0 {
            builder = builder.memory_budget(self.memory_mb.saturating_mul(1_000_000));
        }
        if self.time_s > 0 {
            let when_short = match self.when_short {
                Short::FewerSteps => WhenShort::FewerSteps,
                Short::Refuse => WhenShort::Refuse,
            };
            builder = builder.time_budget(Duration::from_secs(self.time_s), when_short);
        }
        Ok(builder)
    }

    fn update(&mut self, given: &SettingsArguments) {
        self.memory_mb = given.memory_mb.unwrap_or(self.memory_mb);
        self.time_s = given.time_s.unwrap_or(self.time_s);
        self.when_short = given.when_short.unwrap_or(self.when_short);
        self.precision = given.precision.unwrap_or(self.precision);
        self.threads = given.threads.unwrap_or(self.threads);
        self.recompute = given.recompute.unwrap_or(self.recompute);
    }
}

/// More threads than any batch has parts.
const THREADS_MAX: usize = 256;

/// A week: no round waits longer.
const TIME_S_MAX: u64 = 7 * 24 * 3600;

impl Default for Privacy {
    fn default() -> Self {
        let policy = PrivacyPolicy::default();
        let [training, evaluation, telemetry] = policy.epsilon_purpose_max;
        Self {
            required: policy.required,
            delta: policy.delta.value(),
            epsilon_task_max: policy.epsilon_task_max,
            epsilon_training_max: training,
            epsilon_evaluation_max: evaluation,
            epsilon_telemetry_max: telemetry,
            epsilon_max: policy.epsilon_max,
            separation_hours_min: 0.0,
        }
    }
}

impl Privacy {
    /// The policy; a bound that is no number is refused, since nothing is above it.
    pub(crate) fn policy(&self) -> Result<PrivacyPolicy> {
        let bounds = [
            ("epsilon_task_max", self.epsilon_task_max),
            ("epsilon_training_max", self.epsilon_training_max),
            ("epsilon_evaluation_max", self.epsilon_evaluation_max),
            ("epsilon_telemetry_max", self.epsilon_telemetry_max),
            ("epsilon_max", self.epsilon_max),
        ];
        for (name, value) in bounds {
            ensure!(value.is_finite() && value >= 0.0, "privacy.{name}: {value}; a number from 0");
        }
        let hours = self.separation_hours_min;
        ensure!((0.0..=100_000.0).contains(&hours), "privacy.separation_hours_min: {hours}; 0 to 100000");
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
        let separation_ms_min = (hours * 3_600_000.0) as u64;
        Ok(PrivacyPolicy {
            required: self.required,
            delta: Delta::new(self.delta).context("privacy.delta")?,
            epsilon_task_max: self.epsilon_task_max,
            epsilon_purpose_max: [
                self.epsilon_training_max,
                self.epsilon_evaluation_max,
                self.epsilon_telemetry_max,
            ],
            epsilon_max: self.epsilon_max,
            separation_ms_min,
            insecure_noise_cohort: false,
        })
    }
}

impl Default for Floors {
    fn default() -> Self {
        let DeviceFloors { summands_min, clipping_norm_max, base_model_bytes_max, steps_max, secure, .. } =
            DeviceFloors::default();
        Self {
            summands_min,
            clipping_norm_max,
            base_model_bytes_max,
            steps_max,
            cohort_min: secure.cohort_min,
            survivors_min: secure.survivors_min,
            corrupted_permille: secure.corrupted_permille,
            dropout_permille: secure.dropout_permille,
            sigma: secure.sigma,
        }
    }
}

impl Settings {
    /// The settings kept in a state directory; the defaults before the first run.
    pub(crate) fn load(state: &Path) -> Result<Self> {
        let path = path(state);
        match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).with_context(|| path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Keeps the settings for later runs.
    pub(crate) fn save(&self, state: &Path) -> Result<()> {
        let text = toml::to_string(self).context("settings as TOML")?;
        Ok(write_atomically(&path(state), text.as_bytes())?)
    }

    /// With what was given now in place of what was kept.
    pub(crate) fn updated(mut self, given: &SettingsArguments) -> Result<Self> {
        if given.population.is_some() {
            self.population.clone_from(&given.population);
        }
        if !given.trust_keys.is_empty() {
            self.trust_keys.clone_from(&given.trust_keys);
        }
        if let Some(ca) = &given.ca {
            self.ca = Some(ca.canonicalize().with_context(|| format!("cannot read {}", ca.display()))?);
        }
        self.trust_threshold = given.trust_threshold.unwrap_or(self.trust_threshold);
        if let Some(class) = &given.device_class {
            self.device_class.clone_from(class);
        }
        self.insecure_allow_plaintext_aggregation |= given.insecure_allow_plaintext_aggregation;
        self.insecure_plaintext_remote |= given.insecure_plaintext_remote;
        if !given.registrars.is_empty() {
            self.registrars.clone_from(&given.registrars);
        }
        self.insecure_allow_unregistered_peers |= given.insecure_allow_unregistered_peers;
        self.floors.cohort_min = given.cohort_min.unwrap_or(self.floors.cohort_min);
        self.floors.survivors_min = given.survivors_min.unwrap_or(self.floors.survivors_min);
        self.privacy.required |= given.require_privacy;
        self.privacy.epsilon_task_max = given.epsilon_task_max.unwrap_or(self.privacy.epsilon_task_max);
        self.privacy.epsilon_max = given.epsilon_max.unwrap_or(self.privacy.epsilon_max);
        self.training.update(given);
        Ok(self)
    }

    /// The population, which has no default.
    pub(crate) fn population(&self) -> Result<Name> {
        let text = self.population.as_deref();
        let text = text.context("the population is not known: give --population NAME once")?;
        Ok(Name::parse("population", text)?)
    }

    /// The trust root, which has no default.
    pub(crate) fn trust_root(&self) -> Result<TrustRoot> {
        if self.trust_keys.is_empty() {
            bail!("no key is trusted: give --trust-key HEX once (the coordinator's keygen prints it)");
        }
        let keys: Vec<[u8; 32]> = self.trust_keys.iter().map(|key| parse_32(key)).collect::<Result<_>>()?;
        Ok(TrustRoot::new(&keys, self.trust_threshold)?)
    }

    /// The floors without a protocol; [`fleetune_client::ClientBuilder`] adds the plaintext one by name.
    pub(crate) fn floors(&self) -> Result<DeviceFloors> {
        Ok(DeviceFloors {
            summands_min: self.floors.summands_min,
            clipping_norm_max: self.floors.clipping_norm_max,
            base_model_bytes_max: self.floors.base_model_bytes_max,
            steps_max: self.floors.steps_max,
            secure: fleetune_secagg::Floors {
                cohort_min: self.floors.cohort_min,
                survivors_min: self.floors.survivors_min,
                corrupted_permille: self.floors.corrupted_permille,
                dropout_permille: self.floors.dropout_permille,
                sigma: self.floors.sigma,
                ..fleetune_secagg::Floors::default()
            },
            privacy: self.privacy.policy().context("device.toml")?,
            ..DeviceFloors::default()
        })
    }

    /// Who certifies this device's peers. A device that may contribute in the clear needs nobody.
    pub(crate) fn registrars(&self) -> Result<Registrars> {
        if self.insecure_allow_unregistered_peers {
            return Ok(Registrars::InsecureAnyone);
        }
        if self.registrars.is_empty() && !self.insecure_allow_plaintext_aggregation {
            bail!(
                "no registrar is known: give --registrar HEX once, of whoever certifies the fleet's devices \
                 (or --insecure-allow-unregistered-peers in a laboratory)"
            );
        }
        let keys: Vec<[u8; 32]> = self.registrars.iter().map(|key| parse_32(key)).collect::<Result<_>>()?;
        Registrars::from_keys(&keys).context("--registrar")
    }
}

/// 32 bytes in hexadecimal.
pub(crate) fn parse_32(text: &str) -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes)
        .with_context(|| format!("{text:?} is not 64 hexadecimal digits"))?;
    Ok(bytes)
}

fn path(state: &Path) -> PathBuf {
    state.join("device.toml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_once_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let given = SettingsArguments {
            population: Some("roles".into()),
            trust_keys: vec!["ab".repeat(32)],
            insecure_allow_plaintext_aggregation: true,
            memory_mb: Some(300),
            precision: Some(Factors::Bf16),
            ..SettingsArguments::default()
        };
        let first = Settings::load(dir.path()).unwrap().updated(&given).unwrap();
        first.save(dir.path()).unwrap();
        let later = Settings::load(dir.path()).unwrap().updated(&SettingsArguments::default()).unwrap();
        assert_eq!(later, first);
        assert_eq!(later.population().unwrap().as_str(), "roles");
        assert_eq!((later.training.memory_mb, later.training.precision), (300, Factors::Bf16));
    }

    #[test]
    fn says_what_is_missing() {
        let nothing = Settings::default();
        assert!(nothing.population().unwrap_err().to_string().contains("give --population NAME once"));
        assert!(nothing.trust_root().unwrap_err().to_string().contains("give --trust-key HEX once"));
        assert!(nothing.registrars().unwrap_err().to_string().contains("give --registrar HEX once"));
        let odd = Settings { trust_keys: vec!["xyz".into()], ..Settings::default() };
        assert!(odd.trust_root().unwrap_err().to_string().contains("\"xyz\" is not 64 hexadecimal digits"));
    }

    #[test]
    fn a_budget_that_is_no_number_is_refused() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            let privacy = Privacy { epsilon_max: bad, ..Privacy::default() };
            let error = Settings { privacy, ..Settings::default() }.floors().unwrap_err();
            assert!(format!("{error:#}").contains("device.toml: privacy.epsilon_max"), "{error:#}");
        }
        let default = Settings::default().floors().unwrap().privacy;
        assert_eq!(default, PrivacyPolicy::default());
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(path(dir.path()), "populaton = \"roles\"").unwrap();
        let error = format!("{:#}", Settings::load(dir.path()).unwrap_err());
        assert!(error.contains("device.toml") && error.contains("populaton"), "{error}");
    }
}
